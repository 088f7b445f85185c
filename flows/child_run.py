"""One child of a sweep as a Prefect task, in whatever process it runs."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterName,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import State, StateType
from prefect.context import FlowRunContext
from prefect.states import Crashed, Failed

from flows.child_pool import interruptible
from flows.logs import keeping_log
from flows.quantize_model import quantize_model
from flows.runner import computing_with
from tasks.engine.errors import one_line

log = logging.getLogger("blockquant")


@dataclass(frozen=True)
class Surroundings:
    """What a child finds where it runs, be it on another machine.

    Attributes:
        folder: the working directory; relative paths in recipes begin there.
        logs: the folder of its log.
        cores: threads to compute with, None for what there is; they decide the last bits.
        environment: variables to set; among them may be secrets.
    """

    folder: str
    logs: str
    cores: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)


@task(
    name="child",
    task_run_name="{name}",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def run_child(name: str, parameters: dict[str, Any], place: Surroundings) -> Any:
    """Run the flow ``quantize``; its result, or a failed state whose message is the reason."""
    return work_at(name, parameters, place)


def work_at(name: str, parameters: dict[str, Any], place: Surroundings) -> Any:
    """Work at a child; what another process that died left Running is Crashed from now on."""
    with surrounded(place), keeping_log(Path(place.logs) / f"{name}.log") as kept:
        try:
            with interruptible.wait():
                end_lost_runs(name)
                flow = quantize_model.with_options(flow_run_name=name)
                return flow(**parameters, log_file=str(kept))
        except KeyboardInterrupt:
            # a pool's thread that hears of one ends, and leaves its processes
            if parent_process() is None:
                raise
            return Failed(message="interrupted")
        except Exception as error:
            log.debug("failed", exc_info=error)
            # as a line: not every error can be told to another process
            return Failed(message=one_line(error))


@contextlib.contextmanager
def surrounded(place: Surroundings) -> Iterator[None]:
    """Work in the folder, with the variables and the threads of whoever asked."""
    before = {name: os.environ.get(name) for name in place.environment}
    os.environ.update(place.environment)
    try:
        with contextlib.chdir(place.folder), computing_with(place.cores):
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def end_lost_runs(name: str) -> None:
    """Mark this sweep's flow runs of a child as Crashed whose process is gone: nobody else will."""
    context = FlowRunContext.get()
    sweep = context.flow_run if context is not None else None
    if sweep is None:
        return
    wanted = FlowRunFilter(
        name=FlowRunFilterName(any_=[name]),
        parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[sweep.id]),
        state=FlowRunFilterState(
            type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING])
        ),
    )
    with get_client(sync_client=True) as client:
        for lost in client.read_flow_runs(flow_run_filter=wanted):
            crashed: State[Any] = Crashed(message="its process died")
            client.set_flow_run_state(lost.id, crashed, force=True)
