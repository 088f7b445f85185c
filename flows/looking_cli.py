"""``blockquant compare`` and ``blockquant status``: runs side by side, and what is going on."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.table import Table

from flows.options import JsonOption, StoreOption, out
from tasks.engine.errors import InputError, one_line

# flow runs of Prefect that are told of
_UNDER_WAY = ("Running", "Retrying", "Pending")
_WAITING = ("Late", "Scheduled")
FLOW_RUNS = 20


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(help="Ids of MLflow runs, their beginnings, names, or checkpoint folders."),
    ],
    as_json: JsonOption = False,
) -> None:
    """Show what differs between runs, and what each of them measured."""
    from tasks.engine.settings import settings
    from tasks.looks.compare import compare as compared
    from tasks.looks.compare import find_runs

    if len(runs) < 2:
        raise InputError("compare: one run is no comparison; give two or more")
    found = compared(find_runs(settings(), runs))
    if as_json:
        print(json.dumps(found.as_values()))
        return
    table = Table("", *(run["run"][:8] for run in found.runs))
    for field in ("name", "status", "scheme", "checkpoint"):
        table.add_row(field, *(run[field] for run in found.runs))
    table.add_section()
    for name, values in found.recipe.items():
        table.add_row(name, *("" if value is None else value for value in values))
    table.add_section()
    for name, numbers in found.figures.items():
        table.add_row(name, *map(_figure, numbers))
    out.print(table)


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    # NaN, and what MLflow makes of infinity, are no counts
    counted = float(value).is_integer() and abs(value) < 1e15
    return str(int(value)) if counted else f"{value:.5g}"


def status(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show what is running, what ended last, and what is in the store."""
    from tasks.engine.settings import settings
    from tasks.looks.status import in_store

    place = settings(store)
    found = {"store": str(place.store), **in_store(place.store), **_tracked(place)}
    found["prefect"] = _flow_runs()
    if as_json:
        print(json.dumps(found))
        return
    _show(found)


def _tracked(place: Any) -> dict[str, Any]:
    """Names of MLflow's runs by their ids, and the one that ended last; or why not."""
    from tasks.looks.compare import all_runs

    try:
        runs = all_runs(place)
    except InputError:
        raise
    except Exception as error:
        return {"names": {}, "last": None, "mlflow": f"no answer: {one_line(error)}"}
    last = next((run for run in runs if run.status == "FINISHED"), None)
    return {
        "names": {run.id: run.name for run in runs},
        "last": None
        if last is None
        else {
            "run": last.id,
            "name": last.name,
            "started": last.started_ms / 1000,
            "checkpoint": last.tags.get("checkpoint"),
            "kl": last.metrics.get("eval.kl"),
        },
        "mlflow": "answers",
    }


def _flow_runs() -> list[dict[str, str]] | str | None:
    """Flow runs that are under way on the server that PREFECT_API_URL names; None without one."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        return None

    # the newest that are under way, then those that begin next: schedules make many of them
    asked = ((_UNDER_WAY, FlowRunSort.START_TIME_DESC), (_WAITING, FlowRunSort.START_TIME_ASC))
    try:
        runs = []
        with get_client(sync_client=True) as client:
            for states, order in asked:
                wanted = FlowRunFilter.model_validate({"state": {"name": {"any_": list(states)}}})
                runs += client.read_flow_runs(flow_run_filter=wanted, sort=order, limit=FLOW_RUNS)
    except Exception as error:
        return f"no answer: {type(error).__name__}"
    return [
        {"id": str(run.id), "name": run.name, "state": str(run.state_name)}
        for run in runs[:FLOW_RUNS]
    ]


def _show(found: dict[str, Any]) -> None:
    def line(text: str) -> None:
        out.print(text, highlight=False, soft_wrap=True, markup=False)

    names = found["names"]
    for run in found["running"]:
        name = names.get(run["run"], "a run that MLflow does not know yet")
        line(f"running: {name} ({run['run'] or run['identity']}), {found['steps']} steps in work")
    if not found["running"]:
        line("nothing is running in this store")
    for run in found["left"]:
        line(f"{run['messages']} messages to MLflow wait ({run['identity']}): blockquant sync")
    if found["mlflow"] != "answers":
        line(f"MLflow: {found['mlflow']}")
    if found["last"]:
        last = found["last"]
        when = datetime.fromtimestamp(last["started"]).isoformat(" ", "minutes")
        line(f"last finished: {last['name']} ({last['run']}), begun {when}: {last['checkpoint']}")
    if isinstance(found["prefect"], str):
        line(f"Prefect: {found['prefect']}")
    for run in found["prefect"] if isinstance(found["prefect"], list) else []:
        line(f"Prefect: {run['name']} ({run['id']}): {run['state']}")
    table = Table("task", "entries", "MB", title=found["store"])
    for task, held in found["entries"].items():
        table.add_row(task, str(held["entries"]), f"{held['bytes'] / 1e6:.1f}")
    out.print(table)
