"""``blockquant champion``, and how the gate's decision is shown."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from flows.options import JsonOption, out


def champion(
    model: Annotated[
        str | None, typer.Argument(help="A registered model; without it, all of them.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show which version of each registered model is champion, and where it lies."""
    from tasks.engine.errors import InputError
    from tasks.engine.registry import champions
    from tasks.engine.settings import settings
    from tasks.engine.tracking import answering, check_uri

    place = settings()
    check_uri(place.tracking_uri)
    with answering(place) as client:
        found = champions(client)
    if model is not None:
        found = [one for one in found if one["model"] == model]
        if not found:
            raise InputError(f"{model}: no registered model of that name has a champion")
    if as_json:
        print(json.dumps({"champions": found}))
        return
    if not found:
        out.print("no model has a champion")
        return
    table = Table("model", "version", "NLL increase", "KL", "top-1", "served")
    for one in found:
        figures = [
            "" if one[key] is None else f"{one[key]:{form}}"
            for key, form in (("nll_increase", "+.4f"), ("kl", ".4f"), ("top1_agreement", ".1%"))
        ]
        served = one["served"] or "not known"
        table.add_row(one["model"], one["version"], *figures, served)
    out.print(table)
    for one in found:
        out.print(f"{one['model']}: {one['location']}", highlight=False, soft_wrap=True)


def show_gate(decided: dict[str, Any] | None) -> None:
    """Say in a line whether a checkpoint is champion, and why not; nothing while not known."""
    if decided is None:
        return
    name = f"{decided['model']} version {decided['version']}"
    line = f"champion: {'yes' if decided['champion'] else 'no'}, {name}"
    if decided["gate"] != "champion":
        line += f" {decided['gate']}"
    out.print(line, highlight=False, soft_wrap=True, markup=False)
