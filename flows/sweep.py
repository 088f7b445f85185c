"""The sweep: every recipe on every model with every set of overrides, ranked, in one MLflow run."""

from __future__ import annotations

import base64
import logging
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from filelock import Timeout
from prefect import flow
from prefect.artifacts import create_image_artifact, create_table_artifact
from prefect.runtime import flow_run

from configs.sweep_schema import Sweep, as_given
from flows.child_run import Surroundings
from flows.children import Checked, checked_sweep
from flows.logs import heard_by_prefect
from flows.options import err
from flows.ray_cluster import handed_over
from flows.run_children import run_children
from flows.runner import RAY, Runner
from flows.tracked import failure_kept
from tasks.engine.errors import RunError
from tasks.engine.job import Job
from tasks.engine.journal import ToldRun, told, told_run
from tasks.engine.messages import journal_of
from tasks.engine.publication import alone
from tasks.engine.settings import Settings, new_log, settings
from tasks.engine.step import action
from tasks.engine.store import Store
from tasks.engine.tracking import Point
from tasks.pareto import pareto_plot
from tasks.sweep import Outcome, ranked, sweep_rows

log = logging.getLogger("blockquant")

TABLE, PLOT, FILE = "sweep.json", "pareto.svg", "sweep.yml"
KIND_TAG = "blockquant.kind"


class SweepError(RunError):
    """Some children of a sweep failed; ``result`` is what came of the sweep all the same."""

    def __init__(self, line: str, result: dict[str, Any]) -> None:
        super().__init__(line)
        self.result = result


@flow(name="sweep", flow_run_name="sweep {sweep}", validate_parameters=False)
def sweep(
    sweep: str = "demo",
    output: str | None = None,
    overrides: Sequence[str] = (),
    device: str = "cpu",
    memory: int | None = None,
    store: str | None = None,
    keep_incompatible: bool = False,
    overwrite: bool = False,
    runner: str = "local",
    address: str | None = None,
    cores: int | None = None,
    gpus: int | None = None,
    at_once: int | None = None,
    log_file: str | None = None,
) -> dict[str, Any]:
    """Quantize by every recipe, on every model, with every set of overrides; rank what came of it.

    Run again, it goes on in the same MLflow runs; what is done is found in the store.

    Args:
        sweep: a sweep's file, or the name of one that ships.
        output: the folder of the children's outputs; the sweep's where it is not given.
        overrides: ``key.path=value`` each, over every recipe.
        device: of every child: cpu, cuda or cuda:N.
        memory: bytes that a child may use on the device.
        store: the folder of results; the user's own where it is not given.
        keep_incompatible: leave linears unquantized whose sizes do not fit, instead of refusing.
        overwrite: replace outputs of other work.
        runner: local, or ray.
        address: of a Ray cluster; without one, a cluster of this machine is started and ended.
        cores: of a child; by default this machine's, shared among those that run at once.
        gpus: of a child on Ray; by default one where the device is CUDA.
        at_once: how many children run at once: by default one, with ``cuda`` one for each GPU, and
            on Ray what there is room for.
        log_file: a log to keep with the sweep's MLflow run.

    Returns:
        The children ranked, the steps and how many of them were found, the MLflow run.

    Raises:
        SweepError: children failed; the others are done.
    """
    heard_by_prefect()
    asked = Runner(runner, address, cores, gpus, at_once, device)
    common = {
        "overrides": list(overrides),
        "device": device,
        "memory": memory,
        "store": store,
        "keep_incompatible": keep_incompatible,
        "overwrite": overwrite,
    }
    loaded, checked = action(checked_sweep)(sweep, output, common, asked)
    place = settings(Path(store) if store else None)
    return _sweep(loaded, checked, asked, place, Path(log_file) if log_file else None)


def _sweep(
    loaded: Sweep, checked: Checked, runner: Runner, place: Settings, log_file: Path | None
) -> dict[str, Any]:
    folder = str(Path(checked.children[0].parameters["output"]).parent)
    alone_here = alone(Store(place.store), folder)
    with alone_here, told_run(place, checked.identity) as run:
        _open(run, loaded, checked, runner, folder)
        with failure_kept(run, log_file):
            know_sources(checked.jobs)
            outcomes = _run(checked, runner, place)
            result = _ended(run, loaded, checked.identity, outcomes, folder, log_file)
            if result["failed"]:
                raise SweepError(_failure_line(loaded, outcomes), result)
            return result


def know_sources(jobs: Sequence[Job]) -> None:
    """Take the digests of every model's weights once, before children ask for them at once."""
    for job in jobs:
        # the headers of a hub's model are known, and no weights yet
        if job.source.hub_id is None:
            job.source.digest(job.source.tensors)


def _open(run: ToldRun, loaded: Sweep, checked: Checked, runner: Runner, folder: str) -> None:
    given = as_given(loaded)
    combined = ("models", "recipes", "overrides")
    parameters: dict[str, Any] = {name: given[name] for name in combined if name in given}
    tags = {
        KIND_TAG: "sweep",
        "device": runner.device,
        "runner": runner.kind,
        "prefect.flow_run": str(flow_run.id or ""),
    }
    run.open(
        checked.identity,
        f"sweep {loaded.name}",
        {**parameters, "children": [c.name for c in checked.children], "output": folder},
        tags,
        even_finished=True,
    )
    run.log_text(yaml.safe_dump(given, sort_keys=False), FILE)
    # children are opened in a run that is there
    run.flush()


def _run(checked: Checked, runner: Runner, place: Settings) -> list[Outcome]:
    """Run all children; what came of each, in their order."""
    logs = new_log(place.store, "sweep-", suffix="")
    surroundings = Surroundings(
        str(Path.cwd()),
        str(logs),
        runner.threads,
        handed_over() if runner.kind == RAY else {},
    )
    parent = {"parent": checked.identity}
    children = [replace(c, parameters=c.parameters | parent) for c in checked.children]
    outcomes: dict[str, Outcome] = {}
    # closed at once where this is interrupted: children are to end first
    with closing(run_children(children, runner, surroundings)) as ran:
        for child, result, reason in ran:
            outcome = Outcome(
                child.name, child.model, child.recipe, child.overrides, result, reason
            )
            outcomes[child.name] = outcome
            if reason is not None:
                _end_lost(place, checked.works[child.name], reason)
                # shown in the end, with the table
                log.debug("%s failed: %s", child.name, reason)
            line = f"{len(outcomes)} of {len(children)}: {_line(outcome)}"
            log.info(line)
            if err.is_terminal:
                err.print(line, markup=False, highlight=False, soft_wrap=True)
    return [outcomes[child.name] for child in children]


def _end_lost(place: Settings, work: str, reason: str) -> None:
    """Keep the MLflow run of a child as failed whose process died before it could say so."""
    journal = journal_of(place, work)
    if not journal.path.exists() or journal.fact("run") is None:
        return
    try:
        with told_run(place, work) as lost:
            lost.fail(reason)
    except Timeout:
        log.warning("MLflow is not told of a failure: another process tells of that run")


def _line(outcome: Outcome) -> str:
    if outcome.result is None:
        return f"{outcome.name} failed"
    size = f"{outcome.size / 1e6:.1f} MB"
    return (
        f"{outcome.name}: KL {outcome.kl:.5f}, {size} "
        f"({outcome.steps} steps, {outcome.found} found in the store)"
    )


def _ended(
    run: ToldRun,
    loaded: Sweep,
    identity: str,
    outcomes: Sequence[Outcome],
    folder: str,
    log_file: Path | None,
) -> dict[str, Any]:
    """Tell MLflow and Prefect what came of the sweep, and return it."""
    rows = sweep_rows(outcomes)
    steps, found = sum(o.steps for o in outcomes), sum(o.found for o in outcomes)
    failed = [o for o in outcomes if o.result is None]
    run.log_changed_points(_points(outcomes, int(time.time() * 1000)))
    run.log_table(rows, TABLE)
    # those that were opened while the sweep's own run was not known
    run.adopt(identity)
    title = f"sweep {loaded.name}: size against KL"
    with tempfile.TemporaryDirectory() as aside:
        drawn = Path(aside) / PLOT
        drawn.write_bytes(pareto_plot(outcomes, title))
        run.log_file(drawn)
    create_table_artifact(table=rows, key="sweep", description=f"sweep {loaded.name}")
    picture = base64.b64encode(pareto_plot(outcomes, title, "png")).decode()
    create_image_artifact(
        image_url=f"data:image/png;base64,{picture}", key="pareto", description=title
    )
    if outcomes and not failed:
        if log_file is not None and log_file.is_file():
            run.log_file(log_file)
        run.finish()
    return {
        "sweep": loaded.name,
        "output": folder,
        "children": rows,
        "failed": [o.name for o in failed],
        "steps": steps,
        "found": found,
        "mlflow": told(run),
    }


def _points(outcomes: Sequence[Outcome], time_ms: int) -> list[Point]:
    done = [o for o in ranked(outcomes) if o.result is not None]
    values = {"children": len(outcomes), "children.failed": len(outcomes) - len(done)}
    best = {"best.kl": done[0].kl, "best.bytes": done[0].size} if done else {}
    return [Point(n, float(v), 0, time_ms) for n, v in {**values, **best}.items()]


def _failure_line(loaded: Sweep, outcomes: Sequence[Outcome]) -> str:
    failed = [o for o in outcomes if o.result is None]
    named = ", ".join(o.name for o in failed)
    others = "" if len(failed) == len(outcomes) else "the others are done, and "
    return (
        f"sweep {loaded.name}: {len(failed)} of {len(outcomes)} children failed ({named}); "
        f"{others}the same command goes on with these"
    )
