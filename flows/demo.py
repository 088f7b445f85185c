"""The demo: the embedded model, quantized two ways, and what each costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MODEL = Path(__file__).parent.parent / "assets" / "demo-model"
RECIPES = {"demo/w4a16": "exports/demo-w4a16", "demo/w8a16": "exports/demo-w8a16"}


def run_demo(quantize: Callable[[dict[str, Any]], dict[str, Any]], console: Console) -> None:
    """Quantize the demo model with each recipe and print a table of the results."""
    table = Table("scheme", "NLL", "NLL increase", "KL", "top-1", "size", "seconds")
    results: list[dict[str, Any]] = []
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
        seconds = time.perf_counter() - start
        metrics = result["metrics"]
        if not results:
            source = sum(file.stat().st_size for file in MODEL.glob("*.safetensors"))
            nll = f"{metrics['reference_nll']:.4f}"
            table.add_row("source", nll, "", "", "", f"{source / 1e6:.1f} MB", "")
        table.add_row(
            result["scheme"],
            f"{metrics['nll']:.4f}",
            f"{metrics['nll_increase']:+.4f}",
            f"{metrics['kl']:.4f}",
            f"{metrics['top1_agreement']:.1%}",
            f"{result['bytes'] / 1e6:.1f} MB",
            f"{seconds:.1f}",
        )
        results.append(result)
    console.print(table)
    for result in results:
        console.print(
            f"{result['scheme']}: {result['checkpoint']}", highlight=False, soft_wrap=True
        )
    uri = results[-1]["mlflow"]["uri"]
    console.print(
        f"MLflow UI: .venv/bin/mlflow ui --backend-store-uri {uri}", highlight=False, soft_wrap=True
    )
