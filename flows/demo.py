"""The demo: the embedded model, quantized two ways, and what each costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tasks.engine.errors import InputError

MODEL = Path(__file__).parent.parent / "assets" / "demo-model"
RECIPES = {"demo/w4a16": "exports/demo-w4a16", "demo/w8a16": "exports/demo-w8a16"}


def run_demo(quantize: Callable[[dict[str, Any]], dict[str, Any]]) -> list[dict[str, Any]]:
    """Quantize the demo model with each recipe and return the results, each with its seconds.

    Raises:
        InputError: the demo model is not beside the code, as in an installed wheel.
    """
    if not MODEL.is_dir():
        raise InputError(f"demo: {MODEL} is not here; run it from a clone of the repository")
    results = []
    for recipe, output in RECIPES.items():
        start = time.perf_counter()
        result = quantize(
            {
                "recipe": recipe,
                "model": str(MODEL),
                "output": output,
                "overrides": [],
                "device": "cpu",
                "memory": None,
                "store": None,
                "keep_incompatible": False,
                "overwrite": True,
            }
        )
        results.append(result | {"seconds_total": round(time.perf_counter() - start, 1)})
    return results


def show_demo(results: Sequence[dict[str, Any]], console: Console, look: str) -> None:
    """Print a table of the results, where the checkpoints lie, and how to look at the runs."""
    table = Table("scheme", "NLL", "NLL increase", "KL", "top-1", "size", "seconds")
    size = sum(file.stat().st_size for file in MODEL.glob("*.safetensors"))
    source = f"{results[0]['metrics']['reference_nll']:.4f}"
    table.add_row("source", source, "", "", "", f"{size / 1e6:.1f} MB", "")
    for result in results:
        metrics = result["metrics"]
        table.add_row(
            result["scheme"],
            f"{metrics['nll']:.4f}",
            f"{metrics['nll_increase']:+.4f}",
            f"{metrics['kl']:.4f}",
            f"{metrics['top1_agreement']:.1%}",
            f"{result['bytes'] / 1e6:.1f} MB",
            f"{result['seconds_total']:.1f}",
        )
    console.print(table)
    for result in results:
        line = f"{result['scheme']}: {result['checkpoint']}"
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"MLflow UI: .venv/bin/{look}", highlight=False, soft_wrap=True)
