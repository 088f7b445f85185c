"""How long blocks take on this machine, beside llm-compressor where that is there.

    python benchmarks/speed.py WORK --device cuda --blocks 4
    python benchmarks/speed.py WORK --device cuda --blocks 32 --recipes awq_w4a16 --no-peer

A model of random weights in a given shape (Llama 3 8B's by default) is made in WORK, where it stays
for the next call. Each recipe is run by this project's command line and by llm-compressor's
``oneshot``, in turn, ``--repeat`` times, each time from nothing. Figures:

- s/block: the median over all blocks but the first of a pass, which waits for compilers and
  libraries, of the time between two blocks; everything is counted: reading, searching, packing,
  storing, Prefect. llm-compressor's: the whole of ``oneshot`` over the number of blocks, which
  counts no loading, no packing and no saving.
- to published: from the first block to the folder's rename, with export, verification, evaluation
  and sample text, whose own seconds stand beside it.
- disk alone: reading the source's files from their beginning to their end and writing as many bytes
  as the checkpoint has, in files of as many, with nothing between.
- device (``--phases``): a run more with torch's profiler in the process that computes, which costs
  about a tenth; seconds of a block but the first and the last, by what it was asked for.
- again: the same command once more, when all steps are found in the store.
- peaks: of the device's memory (allocated by torch) and the host's (resident), while blocks are
  quantized; and what `blockquant check` predicted for the device.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from recipes import calibrations
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from traced import by_phase

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
TOKENIZER = ROOT / "assets" / "demo-model"
PEERS = {"awq_w4a16": "awq", "gptq_w4a16": "gptq", "rtn_w4a16": "rtn"}
BESIDE = ("outside", "export", "verify", "evaluate", "sample_text")
GIB = 2**30
# of which the first and the last are not counted
MIN_PHASED = 3

console = Console(width=260)
progress = Console(stderr=True)


@dataclass(frozen=True)
class Shape:
    """Of a model of random weights."""

    blocks: int
    hidden: int
    intermediate: int
    vocabulary: int
    kv_share: int

    def options(self) -> list[str]:
        """As ``random_model.py`` takes them."""
        pairs = (
            (f"--{name.replace('_', '-')}", str(value)) for name, value in asdict(self).items()
        )
        return [word for pair in pairs for word in pair]


@dataclass(frozen=True)
class Bench:
    """What all runs share."""

    work: Path
    model: Path
    text: Path
    blocks: int
    samples: int
    device: str
    again: bool
    phases: bool
    overrides: tuple[str, ...]
    peer: Path | None
    peer_path: str


def main(
    work: Annotated[Path, typer.Argument(help="A folder for the model, stores and checkpoints.")],
    recipes: Annotated[str, typer.Option(help="With commas between.")] = "awq_w4a16,gptq_w4a16",
    device: Annotated[str, typer.Option(help="As `blockquant quantize` takes it.")] = "cuda",
    blocks: Annotated[int, typer.Option(min=2)] = 4,
    hidden: Annotated[int, typer.Option()] = 4096,
    intermediate: Annotated[int, typer.Option()] = 14336,
    vocabulary: Annotated[int, typer.Option()] = 128256,
    kv_share: Annotated[int, typer.Option(help="Query heads that share a key.")] = 4,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    repeat: Annotated[int, typer.Option(min=1)] = 2,
    again: Annotated[bool, typer.Option(help="Run each once more, all of it found.")] = True,
    phases: Annotated[bool, typer.Option(help="Run each once more, profiled.")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key.path=value")] = None,
    peer: Annotated[Path, typer.Option(help="llm-compressor's Python.")] = (
        ROOT / ".venv-bench" / "bin" / "python"
    ),
    peer_path: Annotated[str, typer.Option(help="Its PYTHONPATH.")] = "",
    no_peer: Annotated[bool, typer.Option("--no-peer", help="Leave llm-compressor out.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="All figures, here.")] = None,
) -> None:
    """Time recipes block by block, beside llm-compressor, in turn."""
    if not no_peer and not peer.is_file():
        raise typer.BadParameter(f"{peer} is not there: run `make bench-env`, or give --no-peer")
    if phases and (device == "cpu" or blocks < MIN_PHASED):
        raise typer.BadParameter(f"--phases asks for a GPU and {MIN_PHASED} blocks at least")
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    shape = Shape(blocks, hidden, intermediate, vocabulary, kv_share)
    bench = Bench(
        work,
        made_model(work, shape, device.split(",")[0]),
        made_text(work, samples),
        blocks,
        samples,
        device,
        again,
        phases,
        tuple(set_ or ()),
        None if no_peer else peer,
        peer_path,
    )
    report: dict[str, Any] = {"machine": _machine(device), "shape": asdict(shape), "rows": []}
    for recipe in recipes.split(","):
        ours, theirs = [], []
        for _ in range(repeat):
            found, tokens = _ours(bench, recipe)
            ours.append(found)
            progress.print(f"{recipe}: {found['s_per_block']:.3f} s/block")
            if bench.peer is not None and recipe in PEERS:
                theirs.append(_theirs(bench, recipe, tokens))
                progress.print(f"  llm-compressor: {theirs[-1]['s_per_block']:.3f} s/block")
        report["rows"].append({"recipe": recipe, "ours": ours, "theirs": theirs})
        if json_file is not None:
            json_file.write_text(json.dumps(report, indent=1), encoding="utf-8")
    console.print(f"{report['machine']}, {blocks} blocks, {samples} samples")
    console.print(_table(report))
    console.print(_steps(report))


def _machine(device: str) -> str:
    import torch

    first, *others = device.split(",")
    if torch.device(first).type == "cuda":
        count = f"{len(others) + 1} x " if others else ""
        return f"{count}{torch.cuda.get_device_name(first)}, torch {torch.__version__}"
    return f"{os.cpu_count()} cores, torch {torch.__version__}"


def made_model(work: Path, shape: Shape, device: str) -> Path:
    """The model of random weights, made where it is not there."""
    folder = work / f"model-{shape.blocks}-{shape.hidden}-{shape.intermediate}-{shape.vocabulary}"
    if not (folder / "tokenizer.json").is_file():
        command = [sys.executable, str(HERE / "random_model.py"), str(folder)]
        command += ["--tokenizer", str(TOKENIZER), *shape.options(), "--device", device]
        subprocess.run(command, check=True)
    return folder


def made_text(work: Path, samples: int) -> Path:
    """Random common words, enough for the longest calibration windows."""
    from tests.models import make_text

    path = work / f"words-{samples}.txt"
    return path if path.is_file() else make_text(path, words=int(samples * 2048 * 1.1) + 5000)


def settings(recipe: str, text: Path, samples: int) -> list[str]:
    """Overrides: texts of their own, and nothing that takes a server."""
    given = [f"eval={{name: text, path: {text}, windows: 2, seq_len: 512}}"]
    for section in calibrations(recipe):
        given += [f"{section}.name=text", f"{section}.path={text}"]
        given += [f"{section}.n_samples={samples}"]
    return [*given, "serving.smoke_test=false", "gate.registry=false"]


def _ours(bench: Bench, recipe: str) -> tuple[dict[str, Any], Path | None]:
    """Run a recipe as a user does, from nothing; its figures, and the calibration tokens."""
    place = bench.work / recipe.replace("/", "-")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    command = _command(bench, recipe, place, "store")
    environment = os.environ | {"BLOCKQUANT_HOME": str(bench.work / "home")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    (bench.work / "home").mkdir(exist_ok=True)
    predicted = _predicted(command, environment)
    # what was written before is not this run's
    os.sync()
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    whole = time.perf_counter() - start
    found = json.loads(done.stdout)
    again = None
    if bench.again:
        start = time.perf_counter()
        subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        again = time.perf_counter() - start
    marks, ends = found["marks"], found["block_ends"]
    between = [b - a for a, b in itertools.pairwise(ends)]
    # the last one of a pass moves no hidden states on
    inner = [
        seconds for number, seconds in enumerate(between) if (number + 2) % bench.blocks > 1
    ] or between
    figures = {
        "s_per_block": statistics.median(inner),
        "first_block": ends[0] - marks["first block"],
        "blocks": marks["last block"] - marks["first block"],
        "to_published": marks["published"] - marks["first block"],
        "whole": whole,
        "again": again,
        "disk": _disk_alone(bench.model, place / "out", place / "written"),
        "peaks": found["peaks"] | {"predicted": predicted},
        "seconds": found["seconds"],
        "phases": found.get("phases", {}),
        "device": _traced(bench, recipe, place, environment) if bench.phases else {},
    }
    tokens = sorted((place / "store" / "entries").glob("*/*/tokens.safetensors"))
    longest = max(tokens, key=lambda file: file.stat().st_size, default=None)
    return figures, longest


def _command(bench: Bench, recipe: str, place: Path, store: str) -> list[str]:
    command = [sys.executable, "-m", "flows.cli", "quantize", recipe, "--json"]
    command += ["--device", bench.device, "--store", str(place / store), "--overwrite"]
    command += ["--model", str(bench.model), "--output", str(place / "out")]
    for override in (*settings(recipe, bench.text, bench.samples), *bench.overrides):
        command += ["--set", override]
    return command


def _traced(
    bench: Bench, recipe: str, place: Path, environment: Mapping[str, str]
) -> dict[str, float]:
    """Seconds a block by what the device was asked for, of a run from nothing."""
    from flows.crew_start import TRACE

    trace = place / "trace.json"
    command = _command(bench, recipe, place, "store-traced")
    traced = {**environment, TRACE: str(trace)}
    subprocess.run(command, env=traced, stdout=subprocess.PIPE, check=True)
    return by_phase(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"], bench.blocks)


def _predicted(command: list[str], environment: dict[str, str]) -> int:
    """Bytes that `check` expects on the device while blocks are quantized."""
    asked = [*command[:3], "check", *command[4:]]
    done = subprocess.run(asked, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    stages: dict[str, int] = json.loads(done.stdout)["stages"]
    return max(size for name, size in stages.items() if name not in BESIDE)


def _disk_alone(model: Path, made: Path, scratch: Path) -> float:
    """Seconds to read all weights of a model and to write as many bytes as another has."""
    scratch.mkdir()
    chunk = memoryview(bytearray(os.urandom(1 << 20) * 16))
    start = time.perf_counter()
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(chunk):
                pass
    for file in sorted(made.glob("*.safetensors")):
        left = file.stat().st_size
        with (scratch / file.name).open("wb", buffering=0) as opened:
            while left > 0:
                left -= opened.write(chunk[:left])
    taken = time.perf_counter() - start
    shutil.rmtree(scratch)
    return taken


def _theirs(bench: Bench, recipe: str, tokens: Path | None) -> dict[str, Any]:
    """Run llm-compressor on the same tokens."""
    place = bench.work / "peer"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    report = place / "report.json"
    if tokens is not None:
        save_file({"tokens": load_file(tokens)["tokens"].long()}, place / "tokens.safetensors")
        tokens = place / "tokens.safetensors"
    task = {
        "model": str(bench.model),
        "method": PEERS[recipe],
        "scheme": "W4A16",
        "output": "",
        "tokens": None if tokens is None else str(tokens),
        "report": str(report),
        "device": bench.device,
    }
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": bench.peer_path}
    with (place / "output.log").open("w", encoding="utf-8") as log:
        done = subprocess.run(
            [str(bench.peer), str(HERE / "peer_llmcompressor.py"), json.dumps(task)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        progress.print((place / "output.log").read_text(encoding="utf-8")[-3000:], markup=False)
        raise typer.Exit(1)
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found | {"s_per_block": found["seconds"] / bench.blocks}


def _table(report: dict[str, Any]) -> Table:
    table = Table(box=box.MARKDOWN)
    headings = ("recipe", "s/block", "llm-compressor", "ratio", "blocks, s", "to published, s")
    rest = ("disk alone, s", "whole, s", "again, s", "device, GiB", "predicted, GiB", "host, GiB")
    for heading in (*headings, *BESIDE, *rest):
        table.add_column(heading)
    for row in report["rows"]:
        best = min(row["ours"], key=lambda found: found["s_per_block"])
        theirs = min((found["s_per_block"] for found in row["theirs"]), default=None)
        every = ", ".join(f"{found['s_per_block']:.3f}" for found in row["ours"])
        table.add_row(
            f"`{row['recipe']}`",
            every,
            "" if theirs is None else f"{theirs:.3f}",
            "" if theirs is None else f"{theirs / best['s_per_block']:.1f}",
            f"{best['blocks']:.2f}",
            f"{best['to_published']:.2f}",
            *(f"{best['seconds'].get(name, 0):.2f}" for name in BESIDE),
            f"{best['disk']:.2f}",
            f"{best['whole']:.2f}",
            "" if best["again"] is None else f"{best['again']:.2f}",
            f"{best['peaks'].get('device', 0) / GIB:.2f}",
            f"{best['peaks']['predicted'] / GIB:.2f}",
            f"{best['peaks']['host'] / GIB:.2f}",
        )
    return table


def _steps(report: dict[str, Any]) -> Table:
    """Seconds of each kind of step over the number of blocks, and of phases where known."""
    table = Table(box=box.MARKDOWN)
    for heading in ("recipe", "what", "s/block"):
        table.add_column(heading)
    count = report["shape"]["blocks"]
    for row in report["rows"]:
        best = min(row["ours"], key=lambda found: found["s_per_block"])
        for name, seconds in (best["phases"] | best["seconds"]).items():
            table.add_row(f"`{row['recipe']}`", name, f"{seconds / count:.4f}")
        for name, seconds in best["device"].items():
            table.add_row(f"`{row['recipe']}`", f"device: {name}", f"{seconds:.4f}")
    return table


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    typer.run(main)
