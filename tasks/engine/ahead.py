"""Results of the steps to come, computed and written beside the one that is being noted.

A thread computes, others write what it made; the tasks that steps are run as take both and note
them. Where it fails, the task of that step fails in its place, and all that was begun is left to
the tasks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from tasks.engine.job import Job
from tasks.engine.step import Made, Step, Upcoming
from tasks.engine.transfer import beside
from tasks.engine.values import begun

Begun = TypeVar("Begun")

# steps that are begun before they are written: about those of two blocks
DEPTH = 11
# a block's codes are digested while its tensors are written
HOST_THREADS = 3


@dataclass(frozen=True, eq=False)
class Call:
    """One step of the flow and what it is given."""

    step: Step[...]
    args: tuple[Any, ...]
    block: int

    def key(self, job: Job) -> str:
        """Lineage key of its result."""
        return self.step.key(job, *self.args, block=self.block)


# what is planned is told the key of each call
Plan = Generator[Call, str, None]


class Host:
    """Threads that write what a device made, and work out its values, while the device goes on."""

    def __init__(self, job: Job) -> None:
        """Begin with nothing to do."""
        self._job = job
        self._threads = ThreadPoolExecutor(HOST_THREADS, thread_name_prefix="blockquant-host")

    def begun(self, made: Made, place: Path) -> Made:
        """The same result, its files and values begun; files lie in the folder ``place``."""

        def begin(work: Callable[[], Any]) -> Future[Any]:
            return self._threads.submit(self._beside, made, work)

        made.draft.write_ahead(place, begin, self._job.store)
        return replace(made, value=begun(made.value, begin))

    def _beside(self, made: Made, work: Callable[[], Any]) -> Any:
        with beside(self._job.device, made.ready):
            return work()

    def close(self) -> None:
        """End the threads, after what they are at."""
        self._threads.shutdown(cancel_futures=True)


class Lane:
    """The thread that computes ahead, one step after the other, in the order of a plan."""

    def __init__(self, job: Job, lean: Callable[[], bool], place: Path) -> None:
        """Begin with nothing to do; where ``lean`` says so, nothing is computed ahead.

        Files are written to ``place``.
        """
        self._job = job
        self._place = place
        self._lean = lean
        self._thread = ThreadPoolExecutor(
            1,
            thread_name_prefix="blockquant-ahead",
            initializer=torch.set_num_threads,
            initargs=(torch.get_num_threads(),),
        )
        self._host = Host(job)
        self._halted = False

    def calls(self, plan: Plan) -> Iterator[tuple[Call, Upcoming]]:
        """The calls of a plan, each with its result, which may still be computed."""

        def begin(call: Call, key: str) -> _Begun:
            return _Begun(self, self._thread.submit(self._make, call, key))

        return begun_ahead(self._job, plan, begin, self._depth)

    def _depth(self, begun: int) -> int:
        if not begun:
            # after a failure, what was begun was made by the tasks
            self._halted = self._lean()
        return 1 if self._halted else DEPTH

    def _make(self, call: Call, key: str) -> Made | None:
        store = self._job.store
        if self._halted or store.get(key) is not None:
            return None
        if store.is_locked(key):
            # another process is making it, and the task waits for that
            self._halted = True
            return None
        try:
            made = call.step.make(self._job, key, *call.args, block=call.block)
            return self._host.begun(made, self._place / key)
        except BaseException:
            self._halted = True
            raise

    def halt(self) -> None:
        """Leave what was begun to the tasks; returns once nothing is computed any more."""
        self._halted = True
        self._thread.submit(_nothing).result()

    def close(self) -> None:
        """End the threads, after what they are computing."""
        self._halted = True
        self._thread.shutdown(cancel_futures=True)
        self._host.close()


class _Begun:
    """A result that the lane makes."""

    def __init__(self, lane: Lane, future: Future[Made | None]) -> None:
        """Of a lane, promised."""
        self._lane = lane
        self._future = future
        self._failed = False

    def take(self) -> Made | None:
        """Wait for it; None where the task has to make it, and nothing else is computed then.

        Raises:
            Exception: what went wrong, once: asked again, the task makes it.
        """
        made = None
        if not self._failed:
            try:
                made = self._future.result()
            except BaseException:
                self._failed = True
                raise
        if made is None:
            self._lane.halt()
        return made

    def halt(self) -> None:
        """Have nothing more computed ahead, until what was begun is done."""
        self._lane.halt()


def begun_ahead(
    job: Job,
    plan: Plan,
    begin: Callable[[Call, str], Begun],
    depth: Callable[[int], int],
) -> Iterator[tuple[Call, Begun]]:
    """The calls of a plan in their order, each with what was begun of it.

    Args:
        job: the run.
        plan: of calls.
        begin: begins a call, given the key of its result.
        depth: how many may be begun at once, given how many are.
    """
    begun: deque[tuple[Call, Begun]] = deque()
    planned = keyed(job, plan)
    while True:
        while len(begun) < depth(len(begun)) and (found := next(planned, None)) is not None:
            call, key = found
            begun.append((call, begin(call, key)))
        if not begun:
            return
        yield begun.popleft()


@contextmanager
def in_turn(
    job: Job, plan: Plan, lean: Callable[[], bool]
) -> Iterator[Iterator[tuple[Call, Upcoming | None]]]:
    """The calls of a plan; beside a GPU, each with its result, which may still be computed."""
    if not job.on_gpu:
        yield ((call, None) for call, _ in keyed(job, plan))
        return
    with job.store.scratch("ahead") as place:
        lane = Lane(job, lean, place)
        try:
            yield lane.calls(plan)
        finally:
            lane.close()


def keyed(job: Job, plan: Plan) -> Iterator[tuple[Call, str]]:
    """The calls of a plan with the keys of their results."""
    try:
        call = next(plan)
        while True:
            key = call.key(job)
            yield call, key
            call = plan.send(key)
    except StopIteration:
        return


def _nothing() -> None:
    return
