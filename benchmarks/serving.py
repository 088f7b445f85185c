"""Every recipe quantized by the flow and served by a real SGLang: what it computes, how fast it is.

    python benchmarks/serving.py --python SGLANG_ENVIRONMENT/bin/python

Needs a GPU that SGLang knows. Each recipe is run as a user runs it (``blockquant quantize``, on
the GPU), its checkpoint is served, and the server scores the evaluation windows that lie in it: its
mean NLL stands beside the one that the flow measured. Greedy agreement is the share of the server's
tokens that transformers' modules, with weights and inputs quantized as the checkpoint says, find
likeliest at the same place. Tokens per second are those of one request alone and of 16 at once
(128 tokens of prompt, 128 new ones), and the source model is served and timed in the same way.

Several checkpoints may be quantized at once; servers follow one another, for each takes the memory
that it finds. With --work, a run that was cut off goes on. Arguments after -- go to the server.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from recipes import RECIPES, calibrations, chosen
from rich import box
from rich.console import Console
from rich.table import Table

from configs.serving_schema import Serving
from tasks.engine.checkpoint import open_checkpoint
from tasks.engine.errors import RunError
from tasks.engine.served_windows import ServedWindows, read_windows
from tasks.engine.serving.speed import prompts_of
from tasks.evaluate import measure_tokens
from tasks.smoke_test import ask, compared, served, speed_of

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
SOURCE = "source"
console = Console(width=180)
progress = Console(stderr=True)


@dataclass(frozen=True)
class Bench:
    """What every row shares."""

    model: Path
    calibration: Path
    heldout: Path
    samples: int
    seq_len: int
    windows: int
    device: str
    work: Path
    serving: Serving


def main(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="After --: arguments of the server's.")
    ] = None,
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
    windows: Annotated[int, typer.Option(min=1, help="Held-out windows of 2048 tokens.")] = 16,
    recipes: Annotated[str, typer.Option(help="Recipes, with commas between.")] = ",".join(RECIPES),
    python: Annotated[
        str | None, typer.Option(help="Interpreter of an environment with SGLang.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to quantize.")] = "cuda",
    quantized_at_once: Annotated[int, typer.Option(min=1, help="Flows at once.")] = 1,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="A file to write all figures to.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="A folder to keep checkpoints and logs in.")
    ] = None,
) -> None:
    """Quantize, serve, measure, print one table."""
    names = chosen("--recipes", recipes)
    with ExitStack() as stack:
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="serving-")))
        work.mkdir(parents=True, exist_ok=True)
        serving = Serving(python=python, server_args=tuple(arguments or ()))
        bench = Bench(
            *(model.resolve(), calibration.resolve(), heldout.resolve(), samples, seq_len, windows),
            *(device, work.resolve(), serving),
        )
        with ThreadPoolExecutor(quantized_at_once) as pool:
            made = dict(zip(names, pool.map(lambda n: quantized(bench, n), names), strict=True))
        kept = json_file or work / "rows.json"
        rows = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else []
        rows = [row for row in rows if "speed" in row]
        known = {row["recipe"] for row in rows}
        for name in (SOURCE, *names):
            if name in known:
                continue
            rows.append(row_of(bench, name, made.get(name, {})))
            # a long run that is cut off keeps what it has
            kept.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    console.print(table(rows, model.name))


def quantized(bench: Bench, name: str) -> dict[str, Any]:
    """Run a recipe as a user does; what it printed, or why it failed."""
    output, kept = (
        checkpoint_of(bench, name),
        bench.work / "made" / f"{name.replace('/', '-')}.json",
    )
    if kept.is_file():
        known: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return known
    text = f"name: text, path: {bench.calibration}, n_samples: {bench.samples}"
    overrides = [f"{place}={{{text}, seq_len: {bench.seq_len}}}" for place in calibrations(name)]
    overrides += [
        f"eval={{name: text, path: {bench.heldout}, windows: {bench.windows}, dtype: float32}}",
        f"serving={{smoke_test: false, windows: {bench.windows}}}",
    ]
    command = [sys.executable, "-m", "flows.cli", "quantize", name, "--json"]
    command += ["--model", str(bench.model), "--output", str(output), "--overwrite"]
    command += ["--store", str(bench.work / "store"), "--device", bench.device]
    for override in overrides:
        command += ["--set", override]
    # a home for each: several flows would wait for one Prefect server and one database
    home = bench.work / "homes" / name.replace("/", "-")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"BLOCKQUANT_HOME": str(home), "PYTHONPATH": path}
    done = subprocess.run(
        command, cwd=bench.work, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        progress.print(f"{name}: {done.stderr[-2000:]}", style="red", markup=False)
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    found: dict[str, Any] = json.loads(done.stdout)
    progress.print(f"{name}: quantized, NLL {found['metrics']['nll_increase']:+.5f}")
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(done.stdout, encoding="utf-8")
    return found


def checkpoint_of(bench: Bench, name: str) -> Path:
    """Where a recipe's checkpoint lies; the source's own folder for SOURCE."""
    return bench.model if name == SOURCE else bench.work / "out" / name.replace("/", "-")


def row_of(bench: Bench, name: str, made: dict[str, Any]) -> dict[str, Any]:
    """Serve a checkpoint, ask it and time it; or why that failed, beside what was made."""
    row = {"recipe": name, **made}
    if "failed" in row:
        return row
    log_file = bench.work / "logs" / f"{name.replace('/', '-')}.log"
    try:
        with served(checkpoint_of(bench, name), bench.serving, log_file) as (client, found):
            return row | found | figures(bench, name, client)
    except RunError as error:
        progress.print(f"{name}: {error}", style="red", markup=False)
        return row | {"failed": str(error)}


def figures(bench: Bench, name: str, client: Any) -> dict[str, Any]:
    """What a server computes and how fast, beside what was measured."""
    folder = checkpoint_of(bench, name)
    opened, windows = open_checkpoint(folder), windows_of(bench, name)
    asked = ask(client, windows)
    found = compared(opened, windows, asked, bench.device)
    found["speed"] = speed_of(client, prompts_of(windows.tokens))
    progress.print(f"{name}: served, NLL {found['nll']:.4f} ({found['nll_gap']:+.4f})")
    return found


def windows_of(bench: Bench, name: str) -> ServedWindows:
    """The windows of a checkpoint; the source is scored on those of any other."""
    if name != SOURCE:
        return read_windows(checkpoint_of(bench, name))
    some = next((bench.work / "out").glob("*/blockquant_windows.json")).parent
    tokens = read_windows(some).tokens
    _, nll = measure_tokens(
        open_checkpoint(bench.model), tokens, device=bench.device, dtype="float32"
    )
    return ServedWindows(tokens, tuple(nll.double().mean(-1).tolist()))


def table(rows: Sequence[dict[str, Any]], model: str) -> Table:
    """One row for each checkpoint, beside the source's speed."""
    known = [row for row in rows if "speed" in row]
    source = next((row["speed"] for row in known if row["recipe"] == SOURCE), None)
    where = sorted({f"SGLang {row['sglang']}, {row['gpu']}" for row in known})
    drawn = Table(
        *("recipe", "scheme", "NLL, server", "NLL, measured", "gap", "greedy agreement"),
        *("tokens/s", "of source", "tokens/s, 16 at once", "of source", "first token, ms"),
        title="; ".join([model, *where]),
        box=box.MARKDOWN,
    )
    for row in rows:
        if "speed" not in row:
            drawn.add_row(f"`{row['recipe']}`", row.get("scheme", ""), str(row.get("failed")))
            continue
        speed = row["speed"]
        ratios = {
            key: f"{speed[key] / source[key]:.2f}" if source else ""
            for key in ("tokens_per_s", "loaded_tokens_per_s")
        }
        drawn.add_row(
            f"`{row['recipe']}`",
            row.get("scheme", "bf16"),
            f"{row['nll']:.4f}",
            f"{row['measured_nll']:.4f}",
            f"{row['nll_gap']:+.4f}",
            f"{row['greedy_agreement']:.1%}",
            f"{speed['tokens_per_s']:.0f}",
            ratios["tokens_per_s"],
            f"{speed['loaded_tokens_per_s']:.0f}",
            ratios["loaded_tokens_per_s"],
            f"{speed['first_token_ms']:.1f}",
        )
    return drawn


if __name__ == "__main__":
    typer.run(main)
