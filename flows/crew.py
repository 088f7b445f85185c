"""The processes that compute a run's blocks, one on each of its devices; the flow notes.

What calibration takes they compute together (:mod:`tasks.engine.team`), and the first writes the
files of a result and says what its values are; where a pass reads no calibration, each block is one
process's. Where one fails or is lost, all are begun anew by the next step that is asked for.
"""

from __future__ import annotations

import contextlib
from bisect import insort
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from flows.block_plan import Pass
from flows.found import Found
from flows.shift import Assignment, Round, Shift
from tasks.check import Request
from tasks.engine.ahead import DEPTH, Call, Plan, begun_ahead
from tasks.engine.draft import Draft
from tasks.engine.job import Job
from tasks.engine.phases import AHEAD, IDLE
from tasks.engine.step import Made


@dataclass(eq=False)
class Crew:
    """The processes of one run: begun before they are needed, and anew after a failure.

    Attributes:
        device: theirs, as it was asked for.
        assignment: what they compute.
        logs: the folder of what those printed that failed.
        lean: whether they keep less on their devices, as one was full.
        peaks: bytes that one of them took at most, of its device and of the host.
    """

    device: str
    assignment: Assignment
    logs: Path
    lean: bool = False
    peaks: dict[str, int] = field(default_factory=dict)
    _shift: Shift | None = None
    _round: Round | None = None
    _found: Found[Asked] | None = None
    # of this round, what has to be made and was not taken, in its order
    _due: list[Asked] = field(default_factory=list)

    def begin(self) -> Shift:
        """Those that compute now; started where there are none."""
        if self.failed:
            self.close()
        if self._shift is None:
            self._shift = Shift(self.device, self.assignment, self.logs)
            # who comes after them goes on where they were
            self.assignment = replace(self.assignment, first=False)
        return self._shift

    @property
    def failed(self) -> bool:
        """Whether those that compute now do so no more."""
        return self._shift is not None and self._shift.over

    @property
    def ahead(self) -> bool:
        """Whether results are asked for before they are needed: GPUs keep them in memory."""
        return "cuda" in self.device

    @contextlib.contextmanager
    def in_turn(self, job: Job, plan: Plan, passed: Pass) -> Iterator[Iterator[tuple[Call, Asked]]]:
        """The calls of a plan, each with its result, which may still be computed."""
        job.clear()
        with job.store.scratch("ahead") as place, Found[Asked](job.store) as found:
            self._round, self._found, self._due = Round(passed, place), found, []
            yield self._passed(begun_ahead(job, plan, self._begun, DEPTH if self.ahead else 1))

    def _passed(self, calls: Iterator[tuple[Call, Asked]]) -> Iterator[tuple[Call, Asked]]:
        assert self._found is not None
        for call, asked in calls:
            self._found.passed(asked)
            yield call, asked

    def _begun(self, job: Job, call: Call, key: str) -> Asked:
        assert self._round is not None and self._found is not None
        asked = Asked(self, job, call.block, self._round.planned(call, key))
        # those that keep less read what they need from the store, where it is in its turn
        if self.ahead and not self._found.take(asked, key) and not self.lean:
            # in their order: what comes after a result is not asked for before it
            for damaged in self._found.damaged():
                damaged.ask()
            asked.ask()
        return asked

    def ask(self, asked: Asked) -> None:
        """Have a result of this round made, and before it what is still to be made of those before.

        What was asked of processes that are gone is asked of others.
        """
        assert self._round is not None
        shift = self.begin()
        self.note(asked)
        for due in self._due[: self._due.index(asked) + 1]:
            if not due.is_asked_of(shift):
                promised = shift.ask(self._round, due.number, due.block, self.lean)
                due.promise = Promise(shift, promised)

    def note(self, asked: Asked) -> None:
        """A result has to be made."""
        if asked not in self._due:
            insort(self._due, asked, key=attrgetter("number"))

    def taken(self, asked: Asked) -> None:
        """A result is made, and was told."""
        self._due.remove(asked)

    def made(self, job: Job, said: Mapping[str, Any]) -> Made:
        """A result as it was said."""
        assert self._round is not None
        place = self._round.place / said["made"]
        for name, checksum in said["files"].items():
            job.store.note(place / name, checksum)
        job.phases.seconds[AHEAD] += said["seconds"]
        job.phases.seconds[IDLE] += said["idle"]
        for name, size in said["peaks"].items():
            self.peaks[name] = max(size, self.peaks.get(name, 0))
        return Made(Draft.written(place, said["files"]), said["value"], None)

    def close(self, at_once: bool = False) -> None:
        """End the processes, which may end what they have to end unless it is to be at once."""
        if self._shift is not None:
            shift, self._shift = self._shift, None
            shift.end(at_once)


@dataclass(frozen=True, eq=False)
class Promise:
    """What processes that were asked for a result will say of it."""

    shift: Shift
    said: Future[dict[str, Any]]

    @property
    def kept(self) -> bool:
        """Whether it is said."""
        return self.said.done() and self.said.exception() is None


@dataclass(eq=False)
class Asked:
    """A result that the crew makes, once it is asked for it.

    Attributes:
        crew: that makes it.
        job: the run's.
        block: that it is of.
        number: of its call in the round.
        promise: of those that were asked for it last.
    """

    crew: Crew
    job: Job
    block: int
    number: int
    promise: Promise | None = None
    _made: Made | None = None

    def is_asked_of(self, shift: Shift) -> bool:
        """Whether these processes make it, or others have."""
        return self.promise is not None and (self.promise.shift is shift or self.promise.kept)

    def ask(self) -> None:
        """Have it made before it is needed; after a failure, which is told first, once it is."""
        self.crew.note(self)
        if not self.crew.failed:
            self.crew.ask(self)

    def take(self) -> Made:
        """Wait for it; made again where it could not be, and the same where it was.

        Raises:
            Exception: as it failed there.
        """
        if self._made is not None:
            return self._made
        said = None
        if self.promise is not None:
            said = self.promise.shift.wait(self.promise.said)
        if said is None:
            self.crew.ask(self)
            assert self.promise is not None
            said = self.promise.shift.wait(self.promise.said)
        assert said is not None
        self._made = self.crew.made(self.job, said)
        self.crew.taken(self)
        return self._made

    def halt(self) -> None:
        """Keep less on the devices from now on: one of them was full."""
        self.crew.lean = True


@contextlib.contextmanager
def crew_of(job: Job, request: Request) -> Iterator[Crew | None]:
    """The processes on a job's devices; None where it has one CPU, which the flow computes on."""
    if job.team.size == 1 and not job.on_gpu:
        yield None
        return
    assignment = Assignment(
        torch.get_num_threads(),
        job.recipe.model_dump(mode="json", exclude_unset=True),
        str(job.source.path),
        str(request.store),
        job.memory,
        job.keep_incompatible,
        job.recipe.calibrated,
    )
    crew = Crew(request.device, assignment, request.store / "logs")
    crew.begin()
    try:
        yield crew
    except BaseException:
        crew.close(at_once=True)
        raise
    crew.close()
