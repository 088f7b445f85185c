"""Calls of steps that are planned, begun before they are needed, and written beside what follows.

A device computes, threads write what it made; the tasks that steps are run as take and note it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tasks.engine.job import Job
from tasks.engine.step import Made, Step
from tasks.engine.transfer import beside
from tasks.engine.values import begun

Begun = TypeVar("Begun")
Done = TypeVar("Done")

# steps that are begun before they are written: about those of two blocks
DEPTH = 11
# that write, and that digest a block's codes meanwhile
WRITERS = 3
READERS = 2


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
    """Threads that write what a device made, and work out its values, while the device goes on.

    One fetches it and some read its values, whatever the disk is at: the device keeps it no longer.
    """

    def __init__(self, job: Job) -> None:
        """Begin with nothing to do."""
        self._job = job
        self._fetching = ThreadPoolExecutor(1, thread_name_prefix="blockquant-fetch")
        self._writing = ThreadPoolExecutor(WRITERS, thread_name_prefix="blockquant-write")
        self._reading = ThreadPoolExecutor(READERS, thread_name_prefix="blockquant-values")

    def begun(self, made: Made, place: Path) -> tuple[Made, tuple[Future[Any], ...]]:
        """The same result, its files and values begun; files lie in the folder ``place``.

        Returns:
            It, and what is done once the device need keep nothing of it for the host.
        """
        fetch, write, read = (
            partial(self._given_to, threads, made)
            for threads in (self._fetching, self._writing, self._reading)
        )
        fetched = made.draft.write_ahead(place, fetch, write, self._job.store.describe)
        values: list[Future[Any]] = []

        def work_out(work: Callable[[], Any]) -> Future[Any]:
            values.append(read(work))
            return values[-1]

        return replace(made, value=begun(made.value, work_out)), (*fetched, *values)

    def _given_to(
        self, threads: ThreadPoolExecutor, made: Made, work: Callable[[], Done]
    ) -> Future[Done]:
        return threads.submit(self._beside, made, work)

    def _beside(self, made: Made, work: Callable[[], Done]) -> Done:
        with beside(self._job.device, made.ready):
            return work()


def begun_ahead(
    job: Job, plan: Plan, begin: Callable[[Job, Call, str], Begun], depth: int
) -> Iterator[tuple[Call, Begun]]:
    """The calls of a plan in their order, each with what was begun of it.

    Args:
        job: the run.
        plan: of calls.
        begin: begins a call, given the key of its result.
        depth: how many may be begun at once.
    """
    begun: deque[tuple[Call, Begun]] = deque()
    planned = keyed(job, plan)
    while True:
        while len(begun) < depth and (found := next(planned, None)) is not None:
            call, key = found
            begun.append((call, begin(job, call, key)))
        if not begun:
            return
        yield begun.popleft()


@contextmanager
def in_turn(job: Job, plan: Plan) -> Iterator[Iterator[tuple[Call, None]]]:
    """The calls of a plan, none begun before it is needed."""
    yield ((call, None) for call, _ in keyed(job, plan))


def keyed(job: Job, plan: Plan) -> Iterator[tuple[Call, str]]:
    """The calls of a plan with the keys of their results."""
    block = -1
    with suppress(StopIteration):
        call = next(plan)
        while True:
            key = call.key(job)
            if call.block != block:
                block = call.block
                # the thread is through with this one, which the key took
                job.digest_ahead(block + 1)
            yield call, key
            call = plan.send(key)
