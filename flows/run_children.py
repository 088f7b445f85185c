"""Runs the children of a sweep: in this process, in several, or on a Ray cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from typing import Any

from prefect.futures import PrefectFuture, as_completed

from flows.child_pool import child_pool, uninterrupted
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
# in place of the reason why a child failed: its pool broke
LOST = "its process died"

Submit = Callable[[Child], PrefectFuture[Any]]
Ended = tuple[Child, dict[str, Any] | None, str | None]


def run_children(
    children: Sequence[Child], runner: Runner, place: Surroundings
) -> Generator[Ended]:
    """Run children, as many at once as there may be, and yield each as it ends.

    A child that fails stops no other one.

    Yields:
        The child, and what its flow gave or else why it failed.
    """
    if runner.kind == RAY:
        yield from _on_ray(children, runner, place)
    elif runner.children_at_once == 1:
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
    except BrokenProcessPool:
        return None, LOST
    except Exception as error:
        log.debug("a child failed", exc_info=error)
        library, *_ = type(error).__module__.split(".")
        if library == "ray":
            return None, f"its worker died {AGAIN + 1} times ({type(error).__name__})"
        # what a failed state says is the child's own line
        return None, str(error) if library == "prefect" else one_line(error)


def _in_processes(
    children: Sequence[Child], runner: Runner, place: Surroundings
) -> Iterator[Ended]:
    """Run children in processes; of one that dies, only those that ran beside it are begun again.

    A process that dies takes its whole pool with it, and which child killed it is not known: each
    of those that were under way goes on in a pool of its own, where nobody else can end it.
    """
    waiting = list(children)
    while waiting:
        lost: list[Child] = []
        workers = runner.children_at_once or 1
        for child, value, reason in _in_pool(waiting, workers, runner.devices, place):
            if reason is LOST:
                lost.append(child)
            else:
                yield child, value, reason
        if lost:
            log.warning("a process died: %d children are begun again, one by one", len(lost))
        for child in lost:
            yield _by_itself(child, runner.devices[:1], place)


def _by_itself(child: Child, devices: tuple[str, ...], place: Surroundings) -> Ended:
    """Go on with a child whose process died once, at most so often that it ends."""
    for _ in range(AGAIN):
        ((_, value, reason),) = _in_pool([child], 1, devices, place)
        if reason is not LOST:
            return child, value, reason
    end_lost_runs(child.name)
    return child, None, f"its process died {AGAIN + 1} times; is there memory enough?"


def _in_pool(
    waiting: list[Child], workers: int, devices: tuple[str, ...], place: Surroundings
) -> Iterator[Ended]:
    """Run children out of ``waiting`` in one pool, until that breaks; LOST are those under way.

    Each begins on the device with the fewest of them.
    """
    placed: dict[str, str] = {}
    broken = False
    with child_pool(workers) as pool:

        def submit(child: Child) -> PrefectFuture[Any]:
            placed[child.name] = min(devices, key=list(placed.values()).count)
            with uninterrupted():
                return pool.submit(run_child, _arguments(child, place, device=placed[child.name]))

        def room(under_way: int) -> bool:
            return under_way < workers and not broken

        for child, future in _ended(waiting, submit, room):
            del placed[child.name]
            value, reason = _outcome(future.result)
            broken = broken or reason is LOST
            yield child, value, reason


def _on_ray(children: Sequence[Child], runner: Runner, place: Surroundings) -> Iterator[Ended]:
    """Run children on Ray, which begins again what a worker that died was working at."""
    from prefect_ray.context import remote_options

    resources = {"num_cpus": runner.threads or 1, "num_gpus": runner.gpus_of_child}
    at_once = runner.children_at_once
    with ExitStack() as stack:
        pool = stack.enter_context(cluster(runner))
        require_room(runner, resources)
        stack.enter_context(remote_options(**resources, max_retries=AGAIN))

        def submit(child: Child) -> PrefectFuture[Any]:
            return pool.submit(run_child, _arguments(child, place))

        def room(under_way: int) -> bool:
            return at_once is None or under_way < at_once

        for child, future in _ended(list(children), submit, room):
            value, reason = _outcome(future.result)
            if reason is not None:
                # of a worker that died
                end_lost_runs(child.name)
            yield child, value, reason


def _arguments(child: Child, place: Surroundings, **more: Any) -> dict[str, Any]:
    return {"name": child.name, "parameters": {**child.parameters, **more}, "place": place}


def _ended(
    waiting: list[Child], submit: Submit, room: Callable[[int], bool]
) -> Iterator[tuple[Child, PrefectFuture[Any]]]:
    """Submit children out of ``waiting`` while there is room beside those that are under way.

    Yields:
        Each as it ends.
    """
    under_way: dict[PrefectFuture[Any], Child] = {}
    while under_way or (waiting and room(0)):
        while waiting and room(len(under_way)):
            child = waiting.pop(0)
            under_way[submit(child)] = child
        done = next(iter(as_completed(list(under_way))))
        yield under_way.pop(done), done
