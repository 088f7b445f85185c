"""Where the time of a block goes on a GPU: by step, by kernel, and what the host waits for.

    python benchmarks/timeline.py WORK --recipe awq_w4a16

A model as `speed.py` makes it is quantized twice, the second time with torch's profiler in the
processes that compute (`BLOCKQUANT_TRACE`). Counted is what the device does between the end of the
first block and that of the last but one, over the number of blocks. Profiling itself costs time:
`speed.py` has the times.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from traced import (
    Gap,
    by_phase,
    covered,
    gaps,
    idle_before,
    inner_span,
    inner_work,
    longest_gaps,
)

ROOT = Path(__file__).resolve().parent.parent
# in which the host waits for the device
WAITS = ("Synchronize", "cudaMemcpyAsync", "cudaMalloc", "cudaFree", "cudaHostAlloc")

console = Console(width=200)


def main(
    work: Annotated[Path, typer.Argument(help="A folder for the model, stores and checkpoints.")],
    recipe: Annotated[str, typer.Option()] = "awq_w4a16",
    device: Annotated[str, typer.Option(help="As `blockquant quantize` takes it.")] = "cuda",
    blocks: Annotated[int, typer.Option(min=4)] = 6,
    hidden: Annotated[int, typer.Option()] = 4096,
    intermediate: Annotated[int, typer.Option()] = 14336,
    vocabulary: Annotated[int, typer.Option()] = 32000,
    kv_share: Annotated[int, typer.Option(help="Query heads that share a key.")] = 4,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key.path=value")] = None,
    rows: Annotated[int, typer.Option(help="Kernels that are listed.")] = 25,
) -> None:
    """Profile the blocks of a recipe."""
    import speed

    from flows.crew_start import TRACE, trace_of

    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    shape = speed.Shape(blocks, hidden, intermediate, vocabulary, kv_share)
    devices = device.split(",")
    model, text = speed.made_model(work, shape, devices[0]), speed.made_text(work, samples)
    given = [*speed.settings(recipe, text, samples), *(set_ or ())]
    with _served(work), tempfile.TemporaryDirectory() as folder:
        _quantized(work, recipe, model, given, device)
        os.environ[TRACE] = f"{folder}/trace.json"
        result = _quantized(work, recipe, model, given, device)
        files = [trace_of(os.environ[TRACE], rank) for rank, _ in enumerate(devices)]
        traces = [json.loads(file.read_text(encoding="utf-8"))["traceEvents"] for file in files]
    console.print(f"{recipe}, phases of the whole run: {result['phases']}")
    for rank, events in enumerate(traces):
        for title, table in tables(events, blocks, rows):
            console.print(f"\n{title}{f', process {rank}' if devices[1:] else ''}\n")
            console.print(table)


@contextmanager
def _served(work: Path) -> Iterator[None]:
    """A home of its own and a Prefect server, as the command line has them."""
    from flows.prefect_api import quiet_defaults
    from tasks.engine.settings import settings

    os.environ["BLOCKQUANT_HOME"] = str(work / "home")
    (work / "home").mkdir(exist_ok=True)
    # before anything imports Prefect
    quiet_defaults(settings().prefect_home)
    from flows.prefect_api import prefect_api

    with prefect_api(work / "prefect.log"):
        yield


def _quantized(
    work: Path, recipe: str, model: Path, given: Iterable[str], device: str
) -> dict[str, Any]:
    """Quantize from nothing, in this process."""
    from flows.quantize_model import quantize_model

    with tempfile.TemporaryDirectory(dir=work) as folder:
        return quantize_model(
            recipe,
            str(model),
            f"{folder}/out",
            list(given),
            device=device,
            store=f"{folder}/store",
        )


def tables(events: list[Mapping[str, Any]], blocks: int, rows: int) -> list[tuple[str, Table]]:
    """What a trace tells of the blocks but the first and the last, over their number."""
    timed = [event for event in events if event.get("ph") == "X"]
    start, end = inner_span(timed)
    count = blocks - 2
    inside = [e for e in timed if start <= e["ts"] < end]
    work = inner_work(timed)
    whole = (end - start) / count / 1000
    busy = covered((e["ts"], e["ts"] + e["dur"]) for e in work) / count / 1000
    title = f"{whole:.1f} ms/block between ends of blocks, the device works in {busy:.1f} ms"
    steps = [e for e in inside if e.get("cat") in ("user_annotation", "gpu_user_annotation")]
    waits = [
        e
        for e in inside
        if e.get("cat") == "cuda_runtime" and any(part in e["name"] for part in WAITS)
    ]
    idle = [(str(gap.after["name"])[:110], {"dur": gap.end - gap.start}) for gap in gaps(work)]
    named = [(f"{e['name']} ({'device' if 'gpu' in e['cat'] else 'host'})", e) for e in steps]
    return [
        (title, _summed("step", named, count, rows)),
        ("Device, by phase", _of_phases(by_phase(events, blocks))),
        ("Device, idle before what is asked of a phase", _of_phases(idle_before(events, blocks))),
        ("Device, longest idle", _of_gaps(longest_gaps(events, rows), start)),
        ("Device", _summed("kernel", [(e["name"][:110], e) for e in work], count, rows)),
        ("Device, idle before", _summed("kernel", idle, count, rows)),
        ("Host, waiting", _summed("call", [(e["name"], e) for e in waits], count, rows)),
    ]


def _of_phases(found: Mapping[str, float]) -> Table:
    table = Table(box=box.MARKDOWN)
    for heading in ("phase", "ms/block"):
        table.add_column(heading)
    for name, seconds in found.items():
        table.add_row(name, f"{1000 * seconds:.2f}")
    return table


def _of_gaps(found: Iterable[tuple[Gap, str]], start: float) -> Table:
    table = Table(box=box.MARKDOWN)
    for heading in ("ms", "at, ms", "after", "before", "the host's longest call"):
        table.add_column(heading)
    for gap, call in found:
        times = f"{(gap.end - gap.start) / 1000:.2f}", f"{(gap.start - start) / 1000:.0f}"
        beside = (str(event["name"])[:50] for event in (gap.before, gap.after))
        table.add_row(*times, *beside, call[:50])
    return table


def _summed(
    what: str, named: Iterable[tuple[str, Mapping[str, Any]]], blocks: int, rows: int
) -> Table:
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for name, event in named:
        sums[name][0] += event["dur"] / 1000 / blocks
        sums[name][1] += 1 / blocks
    table = Table(box=box.MARKDOWN)
    for heading in (what, "ms/block", "times/block"):
        table.add_column(heading)
    for name, (taken, times) in sorted(sums.items(), key=lambda item: -item[1][0])[:rows]:
        table.add_row(name, f"{taken:.2f}", f"{times:.1f}")
    return table


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    typer.run(main)
