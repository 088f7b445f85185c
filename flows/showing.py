"""How a finished run is shown on a terminal."""

from __future__ import annotations

import shlex
from typing import Any

from flows.gate_cli import show_gate
from flows.options import out
from flows.serving_cli import show_served


def show_result(result: dict[str, Any]) -> None:
    """Print what a run measured, where it published, and where to look at it."""
    from tasks.evaluate import summary

    found = sum(step["cached"] for step in result["steps"])
    line = f"{result['scheme']}: {summary(result['metrics'])}"
    out.print(line, highlight=False, soft_wrap=True)
    place = result["checkpoint"] or "the store only (save.save_sgl: false)"
    out.print(
        f"{result['bytes'] / 1e6:.1f} MB in {place} "
        f"({len(result['steps'])} steps, {found} found in the store)",
        highlight=False,
        soft_wrap=True,
    )
    if result["launch"]:
        out.print(f"serve it: {result['launch']}", highlight=False, soft_wrap=True)
    show_served(result["served"])
    if result["uploaded"]:
        line = "copied to {url} ({sent} files sent, {kept} there already)"
        out.print(line.format(**result["uploaded"]), highlight=False, soft_wrap=True)
    show_gate(result["gate"])
    out.print(
        f"look at it: {mlflow_line(result['mlflow']['uri'])}", highlight=False, soft_wrap=True
    )
    if result["mlflow"]["left"]:
        out.print(
            f"MLflow was not told all: {result['mlflow']['left']} messages are kept; when its "
            "server is back: blockquant sync",
            highlight=False,
            soft_wrap=True,
        )


def mlflow_line(uri: str) -> str:
    """The command that opens the MLflow UI on a tracking database, or the server's address."""
    if uri.startswith(("http://", "https://")):
        return uri
    return f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
