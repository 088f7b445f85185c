"""``blockquant sweep``: many quantizations at one command, ranked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from flows.logs import logging_to
from flows.options import (
    DeviceOption,
    JsonOption,
    KeepOption,
    MemoryOption,
    OverwriteOption,
    SetOption,
    StoreOption,
    bytes_of,
    out,
)
from flows.showing import mlflow_line

SweepArgument = Annotated[str, typer.Argument(help="A sweep file, or the name of a shipped one.")]


def sweep(
    sweep: SweepArgument,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder of the children's outputs.")
    ] = None,
    set_: SetOption = None,
    store: StoreOption = None,
    device: DeviceOption = "cpu",
    memory: MemoryOption = None,
    runner: Annotated[str, typer.Option("--runner", help="local or ray.")] = "local",
    address: Annotated[
        str | None, typer.Option("--address", help="A Ray cluster's; else one is started here.")
    ] = None,
    cores: Annotated[int | None, typer.Option("--cores", min=1, help="Of a child.")] = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=0, help="Of a child, on Ray; 1 with cuda.")
    ] = None,
    at_once: Annotated[
        int | None,
        typer.Option("--at-once", min=1, help="Children that run at once; 1, or 1 a GPU."),
    ] = None,
    keep_incompatible: KeepOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize by every recipe, on every model, with every set of overrides; rank the results."""
    parameters = {
        "sweep": sweep,
        "output": str(output) if output else None,
        "overrides": list(set_ or ()),
        "device": device,
        "memory": bytes_of(memory),
        "store": str(store) if store else None,
        "keep_incompatible": keep_incompatible,
        "overwrite": overwrite,
        "runner": runner,
        "address": address,
        "cores": cores,
        "gpus": gpus,
        "at_once": at_once,
    }
    _check(parameters)
    from flows.sweep import SweepError

    try:
        result = run_sweep(parameters)
    except SweepError as error:
        _show(error.result, as_json)
        raise
    _show(result, as_json)


def _check(parameters: dict[str, Any]) -> None:
    """Check all before any server starts: bad input costs seconds and leaves nothing behind."""
    from flows.children import checked_sweep
    from flows.runner import Runner

    of_runner = ("runner", "address", "cores", "gpus", "at_once", "device")
    common = ("overrides", "device", "memory", "store", "keep_incompatible", "overwrite")
    checked_sweep(
        parameters["sweep"],
        parameters["output"],
        {name: parameters[name] for name in common},
        Runner(*(parameters[name] for name in of_runner)),
    )


def run_sweep(parameters: dict[str, Any]) -> dict[str, Any]:
    """Run the flow under a Prefect API."""
    from flows.prefect_api import prefect_api
    from flows.sweep import sweep as sweep_flow
    from tasks.engine.settings import new_log, settings

    store = parameters["store"]
    log_file = new_log(settings(Path(store) if store else None).store)
    server_log = log_file.with_name(f"prefect-server-{os.getpid()}.log")
    with logging_to(log_file), prefect_api(server_log):
        result: dict[str, Any] = sweep_flow(**parameters, log_file=str(log_file))
        return result


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    table = Table(caption="* not beaten in both size and KL")
    for name in ("", "child", "scheme", "KL", "NLL +", "top-1", "MB", "found"):
        table.add_column(name, overflow="fold", no_wrap=name != "child")
    for row in result["children"]:
        table.add_row(*_cells(row))
    out.print(table)
    for row in result["children"]:
        if row["failed"]:
            line = f"{row['child']} failed: {row['failed']}"
            out.print(line, highlight=False, soft_wrap=True, markup=False)
    out.print(
        f"{len(result['children']) - len(result['failed'])} checkpoints in {result['output']} "
        f"({result['steps']} steps, {result['found']} found in the store)",
        highlight=False,
        soft_wrap=True,
    )
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


def _cells(row: dict[str, Any]) -> list[str]:
    if row["failed"]:
        return ["", row["child"], "failed"]
    return [
        f"{row['rank']}{'*' if row['pareto'] else ''}",
        row["child"],
        row["scheme"],
        f"{row['kl']:.5f}",
        f"{row['nll_increase']:+.4f}",
        f"{row['top1_agreement']:.1%}",
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['found']} of {row['steps']}",
    ]
