"""Runs the children of a sweep: in this process, in several, or on a Ray cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from typing import Any

from prefect.futures import PrefectFuture, as_completed
from prefect.task_runners import ProcessPoolTaskRunner

from flows.child_run import Surroundings, end_lost_runs, run_child
from flows.children import Child
from flows.options import err
from flows.progress import shown
from flows.ray_cluster import cluster, require_room
from flows.runner import RAY, Runner
from tasks.engine.errors import one_line

log = logging.getLogger("blockquant")

# how often a child whose process died is begun again; it goes on from what lies in the store
AGAIN = 2

Submit = Callable[[Child], PrefectFuture[Any]]
Ended = tuple[Child, dict[str, Any] | None, str | None]


def run_children(children: Sequence[Child], runner: Runner, place: Surroundings) -> Iterator[Ended]:
    """Run children, as many at once as there may be, and yield each as it ends.

    A child that fails stops no other one.

    Yields:
        The child, and what its flow gave or else why it failed.
    """
    if runner.kind == RAY:
        yield from _on_ray(children, runner, place)
    elif (runner.at_once or 1) == 1:
        for child in children:
            with shown(err):
                ended = run_child(**_arguments(child, place), return_state=True)
            outcome = _outcome(ended.result)
            yield child, *outcome
    else:
        yield from _in_processes(children, runner, place)


def _outcome(run: Callable[[], Any]) -> tuple[dict[str, Any] | None, str | None]:
    try:
        return run(), None
    except Exception as error:
        log.debug("a child failed", exc_info=error)
        # what a failed state says is the child's own line
        line = str(error) if type(error).__module__.startswith("prefect.") else one_line(error)
        return None, line


def _in_processes(
    children: Sequence[Child], runner: Runner, place: Surroundings
) -> Iterator[Ended]:
    """Run children in processes; one that dies takes the others with it, and all are begun again.

    So often at most that a child which kills its process, for want of memory say, does not do so
    for ever.
    """
    left = list(children)
    for attempt in range(AGAIN + 1):
        lost: list[Child] = []
        with ProcessPoolTaskRunner(max_workers=runner.at_once) as pool:

            def submit(child: Child, pool: Any = pool) -> PrefectFuture[Any]:
                return pool.submit(run_child, _arguments(child, place))

            for child, future in _ended(left, submit, runner.at_once):
                try:
                    value, reason = future.result(), None
                except BrokenProcessPool:
                    lost.append(child)
                    continue
                except Exception as error:
                    value, reason = _outcome(_raising(error))
                yield child, value, reason
        if not lost:
            return
        left = lost
        if attempt < AGAIN:
            log.warning("a process died: %d children are begun again", len(lost))
    for child in left:
        end_lost_runs(child.name)
        yield child, None, f"its process died {AGAIN + 1} times; is there memory enough?"


def _on_ray(children: Sequence[Child], runner: Runner, place: Surroundings) -> Iterator[Ended]:
    """Run children on Ray, which begins again what a worker that died was working at."""
    from prefect_ray.context import remote_options

    room = {"num_cpus": runner.threads or 1, "num_gpus": runner.gpus_of_child}
    with ExitStack() as stack:
        pool = stack.enter_context(cluster(runner))
        require_room(runner, room)
        stack.enter_context(remote_options(**room, max_retries=AGAIN))

        def submit(child: Child) -> PrefectFuture[Any]:
            return pool.submit(run_child, _arguments(child, place))

        for child, future in _ended(children, submit, runner.at_once):
            try:
                value, reason = future.result(), None
            except Exception as error:
                value, reason = _outcome(_raising(error))
                if type(error).__module__.startswith("ray."):
                    reason = f"its worker died {AGAIN + 1} times ({type(error).__name__})"
                    end_lost_runs(child.name)
            yield child, value, reason


def _raising(error: Exception) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


def _arguments(child: Child, place: Surroundings) -> dict[str, Any]:
    return {"name": child.name, "parameters": child.parameters, "place": place}


def _ended(
    children: Iterable[Child], submit: Submit, at_once: int | None
) -> Iterator[tuple[Child, PrefectFuture[Any]]]:
    """Submit children so that never more than ``at_once`` are under way; yield them as they end."""
    waiting = list(children)
    under_way: dict[PrefectFuture[Any], Child] = {}
    while waiting or under_way:
        while waiting and (at_once is None or len(under_way) < at_once):
            child = waiting.pop(0)
            under_way[submit(child)] = child
        done = next(iter(as_completed(list(under_way))))
        yield under_way.pop(done), done
