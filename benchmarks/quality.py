"""Every recipe, beside llm-compressor where that has its like: what it costs, how long it takes.

    make bench-env
    .venv/bin/python benchmarks/quality.py

Both quantize the same model, calibrated on the same token windows (those of this project's
calibration set), and both checkpoints are reopened and measured by this project's evaluator on the
same held-out windows, in float32, activations quantized as SGLang does it where the scheme asks for
it. The figures: the increase of the mean token NLL over the model before quantization, the mean KL
divergence from it in nats, the share of positions where both find the same token likeliest, and the
size of the safetensors files.

Seconds are wall time of quantization alone:

- ours: the flow's steps that work on blocks (rotate, transform, learn, clip, quantize, pack,
  advance), with all that belongs to them: reading the source's blocks, writing results to the
  store, Prefect. Not counted: start-up, reading the model's headers, cutting the text, export,
  verification, evaluation, publishing.
- llm-compressor: ``oneshot`` on a model, tokenizer and token ids in memory. Not counted: imports,
  loading, saving, and packing to the stored format, which it does as it saves.

A run of ours starts from an empty store, so nothing is found that was made before. Each side uses
as many threads as its libraries choose; where the machine has other work, OMP_NUM_THREADS=1 keeps
threads from waiting for each other, on both sides, and the JSON file has CPU seconds too.
llm-compressor computes in the checkpoint's dtype, as its examples do (``--peer-dtype float32`` asks
for another).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from recipes import RECIPES, calibrations, chosen
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from tasks.calibration_set import calibration_set
from tasks.engine.checkpoint import Checkpoint, open_checkpoint
from tasks.engine.store import Store
from tasks.engine.text import TextSource
from tasks.engine.windows import TOKENS, evaluation_windows
from tasks.evaluate import measure

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
PEER_PYTHON = ROOT / ".venv-bench" / "bin" / "python"
PEER_SCRIPT = Path(__file__).resolve().with_name("peer_llmcompressor.py")
# steps that are not quantization; whatever else the flow times is counted
UNCOUNTED = {
    "load_model",
    "evaluation_set",
    "calibration_set",
    "outside",
    "export",
    "verify",
    "evaluate",
}

SIDES = ("blockquant", "llm-compressor")

# wide enough for the table, also in a pipe
console = Console(width=160)
progress = Console(stderr=True)


@dataclass(frozen=True)
class Peer:
    """What llm-compressor runs: a method and a preset scheme."""

    method: str
    scheme: str


# what llm-compressor has that is like a recipe
PEERS = {
    "rtn_w4a16": Peer("rtn", "W4A16"),
    "awq_w4a16": Peer("awq", "W4A16"),
    "gptq_w4a16": Peer("gptq", "W4A16"),
    "tuned/awq_w4a16": Peer("awq", "W4A16"),
    "tuned/best_w4a16": Peer("gptq", "W4A16"),
    "rtn_w8a8": Peer("rtn", "W8A8"),
    "awq_w8a8": Peer("awq", "W8A8"),
    "tuned/awq_w8a8": Peer("awq", "W8A8"),
    "smoothquant_w8a8": Peer("smoothquant", "W8A8"),
    "fp8/rtn_fp8": Peer("rtn", "FP8_DYNAMIC"),
    "fp8/awq_fp8": Peer("awq", "FP8_DYNAMIC"),
}
PEER_METHODS = sorted({peer.method for peer in PEERS.values()})


@dataclass(frozen=True)
class Bench:
    """What every row shares."""

    model: Path
    calibration: Path
    samples: int
    seq_len: int
    heldout: Path
    windows: Tensor
    source: Checkpoint
    device: str
    peer_dtype: str
    work: Path

    def measured(self, checkpoint: Path) -> dict[str, float]:
        """Measure a checkpoint beside the model before quantization."""
        found = measure(open_checkpoint(checkpoint), self.windows, self.source)
        size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        kept = ("nll_increase", "kl", "top1_agreement", "reference_nll")
        return {name: float(found[name]) for name in kept} | {"bytes": size}


def main(
    model: Annotated[Path, typer.Option(help="The model to quantize.")] = (
        SHARED / "models" / "llama-26m"
    ),
    calibration: Annotated[Path, typer.Option(help="Text to calibrate with.")] = (
        SHARED / "text" / "calibration.txt"
    ),
    heldout: Annotated[Path, typer.Option(help="Text to measure on.")] = (
        SHARED / "text" / "heldout.txt"
    ),
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 64,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 512,
    windows: Annotated[int, typer.Option(min=1, help="Held-out windows of 2048 tokens.")] = 32,
    recipes: Annotated[
        str, typer.Option(help=f"Recipes, with commas between: {', '.join(RECIPES)}.")
    ] = ",".join(RECIPES),
    device: Annotated[
        str, typer.Option(help="To quantize on, as `blockquant quantize` takes it.")
    ] = "cpu",
    peers: Annotated[
        str, typer.Option(help="Methods of llm-compressor to run too, with commas between.")
    ] = ",".join(PEER_METHODS),
    peer_dtype: Annotated[str, typer.Option(help="What llm-compressor loads in.")] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="A file to write all figures to.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="A new folder to keep checkpoints and logs in.")
    ] = None,
) -> None:
    """Quantize with both, measure both, print one table."""
    names = chosen("--recipes", recipes)
    methods = chosen("--peers", peers, PEER_METHODS)
    if methods and not PEER_PYTHON.is_file():
        raise typer.BadParameter("llm-compressor is not there: run `make bench-env`")
    with ExitStack() as stack:
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quality-")))
        else:
            work.mkdir(parents=True)
        source = open_checkpoint(model)
        text = TextSource("--heldout", "text", str(heldout), evaluation=True)
        held_out = evaluation_windows(source.source, text, 2048, windows)
        bench = Bench(
            model.resolve(),
            calibration.resolve(),
            samples,
            seq_len,
            heldout.resolve(),
            held_out,
            source,
            device,
            peer_dtype,
            work.resolve(),
        )
        report: dict[str, Any] = {"model": model.name, "rows": []}
        for result in _run(bench, names, methods):
            report["rows"].append(result)
            if json_file is not None:
                # after every row: a long run that is cut off keeps what it has
                json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print(_table(report))


def _run(bench: Bench, names: list[str], methods: list[str]) -> Iterator[dict[str, Any]]:
    """Run the recipes; what llm-compressor did for one also serves another like it."""
    done: dict[Peer, dict[str, Any]] = {}
    for name in names:
        progress.print(f"{name}: blockquant")
        ours, tokens = _run_ours(bench, name)
        progress.print(f"  {_figures(ours)}")
        peer = PEERS.get(name)
        if peer is not None and peer.method in methods and peer not in done:
            progress.print(f"{name}: llm-compressor")
            done[peer] = _run_peer(bench, peer, tokens)
            progress.print(f"  {_figures(done[peer])}")
        theirs = None if peer is None else done.get(peer)
        yield {"recipe": name, **dict(zip(SIDES, (ours, theirs), strict=True))}


def _run_ours(bench: Bench, name: str) -> tuple[dict[str, Any], Path | None]:
    """Run a recipe as a user does; returns its figures and the calibration tokens."""
    folder = name.replace("/", "-")
    store, output = bench.work / folder / "store", bench.work / folder / "checkpoint"
    # measured below, together with the peer's checkpoint: the flow's own evaluation is kept short
    overrides = [f"eval={{name: text, path: {bench.heldout}, windows: 1, seq_len: 256}}"]
    places = calibrations(name)
    text = f"name: text, path: {bench.calibration}, n_samples: {bench.samples}"
    overrides += [f"{place}={{{text}, seq_len: {bench.seq_len}}}" for place in places]
    recipe = ROOT / "configs" / f"{name}.yml"
    command = [sys.executable, "-m", "flows.cli", "quantize", str(recipe), "--json"]
    command += ["--model", str(bench.model), "--output", str(output), "--store", str(store)]
    command += ["--device", bench.device]
    for override in overrides:
        command += ["--set", override]
    kept = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    home = bench.work / "home"
    home.mkdir(exist_ok=True)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = kept | {"BLOCKQUANT_HOME": str(home), "PYTHONPATH": path}
    before = _Whole()
    done = subprocess.run(
        command, cwd=bench.work, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    whole = before.since()
    _require_success(f"{name}: blockquant", done.returncode)
    found = json.loads(done.stdout)
    steps = {step: s for step, s in found["seconds"].items() if step not in UNCOUNTED}
    figures = {
        "scheme": found["scheme"],
        **bench.measured(output),
        "seconds": sum(steps.values()),
        "steps": steps,
    } | whole
    return figures, _calibration_tokens(store) if places else None


class _Whole:
    """What a whole command takes, start-up, saving and all; CPU seconds tell on a busy machine."""

    def __init__(self) -> None:
        self.load, self.wall, self.times = os.getloadavg()[0], time.perf_counter(), os.times()

    def since(self) -> dict[str, float]:
        """Return wall and CPU seconds since, and the machine's load before."""
        times = os.times()
        user = times.children_user - self.times.children_user
        system = times.children_system - self.times.children_system
        return {
            "whole_run_seconds": time.perf_counter() - self.wall,
            "whole_run_cpu_seconds": user + system,
            "load": self.load,
        }


def _calibration_tokens(store: Path) -> Path:
    """Find the windows that the flow calibrated with, in its store."""
    (found,) = [e for e in Store(store).entries() if e.task == calibration_set.name]
    return found.file(TOKENS)


def _run_peer(bench: Bench, peer: Peer, tokens: Path | None) -> dict[str, Any]:
    """Run llm-compressor in its own environment; its output is kept beside its checkpoint."""
    folder = bench.work / f"llmcompressor-{peer.method}-{peer.scheme}".lower()
    folder.mkdir()
    report = folder / "report.json"
    task = {
        "model": str(bench.model),
        "method": peer.method,
        "scheme": peer.scheme,
        "output": str(folder / "checkpoint"),
        "tokens": str(tokens) if tokens else None,
        "report": str(report),
        "dtype": bench.peer_dtype,
    }
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    before = _Whole()
    with (folder / "output.log").open("w", encoding="utf-8") as log:
        done = subprocess.run(
            [str(PEER_PYTHON), str(PEER_SCRIPT), json.dumps(task)],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    whole = before.since()
    if done.returncode:
        progress.print((folder / "output.log").read_text(encoding="utf-8")[-2000:], markup=False)
    _require_success(f"{peer.method} {peer.scheme}: llm-compressor", done.returncode)
    figures: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    _store_scales_in_float32(folder / "checkpoint")
    return figures | bench.measured(folder / "checkpoint") | whole


def _store_scales_in_float32(checkpoint: Path) -> None:
    """Widen the scales of 8 bit weights, as a server does when it loads them: no value changes.

    llm-compressor stores them in the model's dtype, and our evaluator takes float32 only.
    """
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if config["quantization_config"]["format"] == "pack-quantized":
        return
    for shard in checkpoint.glob("*.safetensors"):
        tensors = load_file(shard)
        scales = {n: t.float() for n, t in tensors.items() if n.endswith(".weight_scale")}
        save_file(tensors | scales, shard, metadata={"format": "pt"})


def _require_success(what: str, status: int) -> None:
    if status:
        progress.print(f"{what} ended with status {status}", style="red")
        raise typer.Exit(1)


def _figures(result: dict[str, Any]) -> str:
    line = f"NLL {result['nll_increase']:+.5f}, KL {result['kl']:.5f}"
    return f"{line}, {result['seconds']:.2f} s, load {result['load']}"


def _table(report: dict[str, Any]) -> Table:
    nll = report["rows"][0]["blockquant"]["reference_nll"]
    table = Table(title=f"{report['model']}: NLL {nll:.5f} before", box=box.MARKDOWN)
    for heading in ("recipe", "scheme"):
        table.add_column(heading)
    ours = ("NLL increase", "KL", "top-1", "size", "seconds")
    theirs = ("NLL, llm-compressor", "KL, llm-compressor", "seconds, llm-compressor")
    for heading in (*ours, *theirs):
        table.add_column(heading, justify="right")
    for row in report["rows"]:
        found, peer = (row[side] for side in SIDES)
        table.add_row(
            f"`{row['recipe']}`",
            found["scheme"],
            f"{found['nll_increase']:.4f}",
            f"{found['kl']:.4f}",
            f"{found['top1_agreement']:.1%}",
            f"{found['bytes'] / 1e6:.1f} MB",
            f"{found['seconds']:.1f}",
            "" if peer is None else f"{peer['nll_increase']:.4f}",
            "" if peer is None else f"{peer['kl']:.4f}",
            "" if peer is None else f"{peer['seconds']:.1f}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
