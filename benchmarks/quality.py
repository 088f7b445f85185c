"""This project and llm-compressor side by side: what quantization costs, and how long it takes.

    make bench-env
    .venv/bin/python benchmarks/quality.py

Both quantize the same model, calibrated on the same token windows (those of this project's
calibration set), and both checkpoints are reopened and measured by this project's evaluator on the
same held-out windows, in float32, activations quantized as SGLang does it where the scheme asks for
it. The figure is the increase of the mean token NLL over the model before quantization.

Seconds are wall time of quantization alone:

- ours: the flow's steps that work on blocks (transform, clip, quantize, pack, advance), with all
  that belongs to them: reading the source's blocks, writing results to the store, Prefect. Not
  counted: start-up, reading the model's headers, cutting the text, export, verification,
  evaluation, publishing.
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
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from tasks.calibration_set import calibration_set
from tasks.engine.checkpoint import open_checkpoint
from tasks.engine.store import Store
from tasks.engine.text import TextSource
from tasks.engine.windows import TOKENS, evaluation_windows
from tasks.evaluate import measure

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
PEER_PYTHON = ROOT / ".venv-bench" / "bin" / "python"
PEER_SCRIPT = Path(__file__).resolve().with_name("peer_llmcompressor.py")
# steps that are not quantization; whatever else the flow times is counted
UNCOUNTED = {"load_model", "evaluation_set", "calibration_set", "export", "verify", "evaluate"}

SIDES = ("blockquant", "llm-compressor")

# wide enough for the table, also in a pipe
console = Console(width=120)
progress = Console(stderr=True)


@dataclass(frozen=True)
class Peer:
    """What llm-compressor runs: a transform and a preset scheme."""

    method: str
    scheme: str


@dataclass(frozen=True)
class Row:
    """One line of the table: a recipe of ours and what it is compared with."""

    scheme: str
    method: str
    recipe: str
    peer: Peer
    calibrated: bool = True


ROWS = {
    "rtn_w4a16": Row("W4A16", "RTN", "rtn_w4a16", Peer("rtn", "W4A16"), calibrated=False),
    "awq_w4a16": Row("W4A16", "AWQ", "awq_w4a16", Peer("awq", "W4A16")),
    "awq_w4a16_tuned": Row("W4A16", "AWQ, tuned", "tuned/awq_w4a16", Peer("awq", "W4A16")),
    "rtn_w8a8": Row("W8A8", "RTN", "rtn_w8a8", Peer("rtn", "W8A8"), calibrated=False),
    "awq_w8a8": Row("W8A8", "AWQ", "awq_w8a8", Peer("awq", "W8A8")),
    "awq_w8a8_tuned": Row("W8A8", "AWQ, tuned", "tuned/awq_w8a8", Peer("awq", "W8A8")),
    "smoothquant_w8a8": Row("W8A8", "SmoothQuant", "smoothquant_w8a8", Peer("smoothquant", "W8A8")),
    "rtn_fp8": Row(
        "FP8 dynamic", "RTN", "fp8/rtn_fp8", Peer("rtn", "FP8_DYNAMIC"), calibrated=False
    ),
    "awq_fp8": Row("FP8 dynamic", "AWQ", "fp8/awq_fp8", Peer("awq", "FP8_DYNAMIC")),
}


@dataclass(frozen=True)
class Bench:
    """What every row shares."""

    model: Path
    calibration: Path
    samples: int
    seq_len: int
    heldout: Path
    windows: Tensor
    source_nll: float
    peer_dtype: str
    work: Path

    def increase(self, checkpoint: Path) -> float:
        """Measure a checkpoint: NLL over that of the model before quantization."""
        return float(measure(open_checkpoint(checkpoint), self.windows)["nll"]) - self.source_nll


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
    rows: Annotated[
        str, typer.Option(help=f"Rows, with commas between: {', '.join(ROWS)}.")
    ] = ",".join(ROWS),
    peer: Annotated[bool, typer.Option(help="Run llm-compressor too.")] = True,
    peer_dtype: Annotated[str, typer.Option(help="What llm-compressor loads in.")] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="A file to write all figures to.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="A new folder to keep checkpoints and logs in.")
    ] = None,
) -> None:
    """Quantize with both, measure both, print one table."""
    chosen = _chosen(rows)
    if peer and not PEER_PYTHON.is_file():
        raise typer.BadParameter("llm-compressor is not there: run `make bench-env`")
    with ExitStack() as stack:
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quality-")))
        else:
            work.mkdir(parents=True)
        source = open_checkpoint(model)
        text = TextSource("--heldout", "text", str(heldout), evaluation=True)
        held_out = evaluation_windows(source.source, text, 2048, windows)
        nll = float(measure(source, held_out)["nll"])
        progress.print(f"{model.name}: NLL {nll:.5f} before quantization")
        bench = Bench(
            model.resolve(),
            calibration.resolve(),
            samples,
            seq_len,
            heldout.resolve(),
            held_out,
            nll,
            peer_dtype,
            work.resolve(),
        )
        report: dict[str, Any] = {"model": model.name, "nll": nll, "rows": []}
        for result in _run(bench, chosen, peer):
            report["rows"].append(result)
            if json_file is not None:
                # after every row: a long run that is cut off keeps what it has
                json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print(_table(report))


def _chosen(rows: str) -> list[str]:
    names = [name.strip() for name in rows.split(",") if name.strip()]
    unknown = [name for name in names if name not in ROWS]
    if unknown or not names:
        raise typer.BadParameter(f"--rows {rows}: choose from {', '.join(ROWS)}")
    return names


def _run(bench: Bench, names: list[str], with_peer: bool) -> Iterator[dict[str, Any]]:
    """Run the rows; what llm-compressor did for one row also serves another like it."""
    peers: dict[Peer, dict[str, Any]] = {}
    for name in names:
        row = ROWS[name]
        progress.print(f"{name}: blockquant")
        ours, tokens = _run_ours(bench, name, row)
        progress.print(f"  {_figures(ours)}")
        if with_peer and row.peer not in peers:
            progress.print(f"{name}: llm-compressor")
            peers[row.peer] = _run_peer(bench, row.peer, tokens)
            progress.print(f"  {_figures(peers[row.peer])}")
        yield {
            "row": name,
            "scheme": row.scheme,
            "method": row.method,
            **dict(zip(SIDES, (ours, peers.get(row.peer)), strict=True)),
        }


def _run_ours(bench: Bench, name: str, row: Row) -> tuple[dict[str, Any], Path | None]:
    """Run a recipe as a user does; returns its figures and the calibration tokens."""
    store, output = bench.work / name / "store", bench.work / name / "checkpoint"
    # measured below, together with the peer's checkpoint: the flow's own evaluation is kept short
    overrides = ["eval.name=text", f"eval.path={bench.heldout}"]
    overrides += ["eval.windows=1", "eval.seq_len=256"]
    if row.calibrated:
        overrides += [
            "calib.name=text",
            f"calib.path={bench.calibration}",
            f"calib.n_samples={bench.samples}",
            f"calib.seq_len={bench.seq_len}",
        ]
    recipe = ROOT / "configs" / f"{row.recipe}.yml"
    command = [sys.executable, "-m", "flows.cli", "quantize", str(recipe), "--json"]
    command += ["--model", str(bench.model), "--output", str(output), "--store", str(store)]
    for override in overrides:
        command += ["--set", override]
    kept = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "PYTHONPATH")}
    home = bench.work / "home"
    home.mkdir(exist_ok=True)
    environment = kept | {"BLOCKQUANT_HOME": str(home), "PYTHONPATH": str(ROOT)}
    before = _Whole()
    done = subprocess.run(
        command, cwd=bench.work, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    whole = before.since()
    _require_success(f"{name}: blockquant", done.returncode)
    steps = {
        step: seconds
        for step, seconds in json.loads(done.stdout)["seconds"].items()
        if step not in UNCOUNTED
    }
    figures = {
        "nll_increase": bench.increase(output),
        "seconds": sum(steps.values()),
        "steps": steps,
    } | whole
    return figures, _calibration_tokens(store) if row.calibrated else None


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
    figures["nll_increase"] = bench.increase(folder / "checkpoint")
    return figures | whole


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
    return f"NLL {result['nll_increase']:+.5f}, {result['seconds']:.2f} s, load {result['load']}"


def _table(report: dict[str, Any]) -> Table:
    table = Table(
        title=f"{report['model']}: increase of NLL {report['nll']:.5f}, and seconds",
        box=box.MARKDOWN,
    )
    for heading in ("scheme", "method"):
        table.add_column(heading)
    for heading in ("NLL", "seconds"):
        for side in SIDES:
            table.add_column(f"{heading}, {side}", justify="right")
    for row in report["rows"]:
        sides = [row[side] for side in SIDES]
        table.add_row(
            row["scheme"],
            row["method"],
            *("" if side is None else f"{side['nll_increase']:.4f}" for side in sides),
            *("" if side is None else f"{side['seconds']:.2f}" for side in sides),
        )
    return table


if __name__ == "__main__":
    typer.run(main)
