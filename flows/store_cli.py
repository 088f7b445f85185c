"""``blockquant store``: what lies in the store of results, and how to trim it."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from flows.options import JsonOption, StoreOption, out

store_app = typer.Typer(help="Show and trim the store of results.")


@store_app.command("ls")
def store_ls(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show what is in the store."""
    from tasks.engine.settings import settings
    from tasks.engine.store import Store

    opened = Store(settings(store).store)
    entries = opened.entries()
    if as_json:
        rows = [
            {"key": e.key, "task": e.task, "bytes": e.size, "created": e.created} for e in entries
        ]
        print(json.dumps({"store": str(opened.root), "entries": rows}))
        return
    table = Table("task", "entries", "MB", title=str(opened.root))
    for task in sorted({e.task for e in entries}):
        members = [e for e in entries if e.task == task]
        table.add_row(task, str(len(members)), f"{sum(e.size for e in members) / 1e6:.1f}")
    out.print(table)


@store_app.command("gc")
def store_gc(
    store: StoreOption = None,
    days: Annotated[float, typer.Option("--days", min=0, help="Keep what was used since.")] = 30.0,
    as_json: JsonOption = False,
) -> None:
    """Remove entries not used for some days, and what dead processes left half-written."""
    from tasks.engine.settings import settings
    from tasks.engine.store import DAY_S, Store

    removed, freed = Store(settings(store).store).collect(days * DAY_S)
    if as_json:
        print(json.dumps({"removed": removed, "bytes": freed}))
        return
    out.print(f"removed {removed} entries, {freed / 1e6:.1f} MB")
