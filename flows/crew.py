"""The processes that compute a run's blocks, one on each of its devices; the flow notes.

They are told, one line of JSON each, what the job is, which pass over the blocks begins and which
result is computed next. What calibration takes they compute together (:mod:`tasks.engine.team`),
and the first writes the files of a result and says what its values are; where a pass reads no
calibration, each block is one process's. Where one fails or is lost, all are begun anew by the next
step that is asked for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flows.block_plan import Pass
from flows.crew_process import Failure, Process, worst_of
from flows.crew_start import TRACE, take_started
from flows.found import Found, looking
from tasks.check import Request
from tasks.engine.ahead import DEPTH, Call, Plan, begun_ahead
from tasks.engine.draft import Draft
from tasks.engine.job import Job
from tasks.engine.phases import AHEAD, IDLE
from tasks.engine.residency import vacate
from tasks.engine.step import Made

log = logging.getLogger("blockquant")

# after which there is no more; without it, the flow's process was killed
END = json.dumps({"end": True})
# how long the others may be waited for, and how long one may take to end
LIMIT = timedelta(minutes=10)
END_S = 600.0 if os.environ.get(TRACE) else 30.0
# how long what another process says of a failure is waited for
NEWS_S = 3.0


@dataclass(frozen=True)
class Assignment:
    """What the processes of a crew are to compute.

    Attributes:
        threads: to compute with.
        recipe: its file or name.
        overrides: over the recipe.
        model: the source's folder.
        store: the folder of results.
        memory: bytes that may be used on a device.
        keep_incompatible: whether linears are left out whose sizes do not fit.
    """

    threads: int
    recipe: str
    overrides: tuple[str, ...]
    model: str
    store: str
    memory: int
    keep_incompatible: bool


def meet(rank: int, devices: Sequence[str], meeting: str) -> None:
    """Find the other processes, by a file and over loopback alone; waits until all are there."""
    if len(devices) == 1:
        return
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")
    device = torch.device(devices[rank])
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.FileStore(meeting, len(devices)),  # type: ignore[attr-defined]
        rank=rank,
        world_size=len(devices),
        timeout=LIMIT,
        device_id=device if on_gpu else None,
    )


@dataclass(eq=False)
class Round:
    """A pass over the blocks, as far as it was planned.

    Attributes:
        passed: the pass.
        place: the folder of its results' files.
        calls: what each call is called, and the key of its result, in their order.
    """

    passed: Pass
    place: Path
    calls: list[tuple[str, str]] = field(default_factory=list)

    @property
    def shared(self) -> bool:
        """Whether all processes compute each result together."""
        return self.passed.calibrated

    def planned(self, call: Call, key: str) -> int:
        """Note the next call; its number."""
        self.calls.append((call.step.label(call.block), key))
        return len(self.calls) - 1


class Shift:
    """Processes that compute together until one of them fails."""

    def __init__(self, device: str, assignment: Assignment, logs: Path) -> None:
        """Give a job to those that were started, or start them; nothing waits for them here."""
        self._started = take_started(device)
        self._lock = threading.Lock()
        self._asked: dict[str, Future[dict[str, Any]]] = {}
        self._failures: list[Failure] = []
        self._ending = self._settled = self._raised = False
        # of each process, the round it is at and how many of its calls it knows
        self._told: dict[int, tuple[Round, int]] = {}
        self.processes = [Process(member, logs, self._heard) for member in self._started.members]
        for process in self.processes:
            process.tell([json.dumps({"job": asdict(assignment)})])

    @property
    def over(self) -> bool:
        """Whether one has failed."""
        return bool(self._failures)

    def wait(self, promised: Future[dict[str, Any]]) -> dict[str, Any] | None:
        """What is said of a result; None where the failure that kept it was raised before.

        Raises:
            Exception: the failure.
        """
        if self._raised and not (promised.done() and promised.exception() is None):
            return None
        try:
            return promised.result()
        except Exception:
            self._raised = True
            raise

    def ask(self, at: Round, number: int, block: int, lean: bool) -> Future[dict[str, Any]]:
        """Have a call's result computed; what who computes it says of it.

        Args:
            at: the round.
            number: of the call in it; none before it is asked for after it.
            block: that it is of.
            lean: whether less is kept on the devices.
        """
        promised: Future[dict[str, Any]] = Future()
        with self._lock:
            if self._settled:
                promised.set_exception(worst_of(self._failures))
                return promised
            key = at.calls[number][1]
            if key in self._asked:
                return self._asked[key]
            self._asked[key] = promised
        count = len(self.processes)
        for rank in range(count) if at.shared else (block % count,):
            self._tell(rank, at, number, lean)
        return promised

    def _tell(self, rank: int, at: Round, number: int, lean: bool) -> None:
        current, known = self._told.get(rank, (None, 0))
        lines = []
        if current is not at:
            lines.append(json.dumps({"pass": asdict(at.passed), "place": str(at.place)}))
            known = 0
        lines.append(json.dumps({"make": at.calls[known : number + 1], "lean": lean}))
        self._told[rank] = (at, number + 1)
        self.processes[rank].tell(lines)

    def _heard(self, said: dict[str, Any] | Failure) -> None:
        """A process said that a result is there, or what it has to say, or failed."""
        if isinstance(said, Failure):
            with self._lock:
                first = not self._failures and not self._ending
                self._failures.append(said)
            if first:
                # one that waited for another fails too, and may be heard first
                threading.Timer(NEWS_S if said.vague else 0.0, self._settle).start()
            return
        if "log" in said:
            now, _ = self._told.get(said["rank"], (None, 0))
            # what all compute together each of them says
            if said["rank"] == 0 or (now is not None and not now.shared):
                log.log(said["level"], said["log"])
            return
        with self._lock:
            promised = self._asked.pop(said["made"], None)
        if promised is not None:
            promised.set_result(said)

    def _settle(self) -> None:
        for process in self.processes:
            process.kill()
        with self._lock:
            self._settled = True
            asked, self._asked = list(self._asked.values()), {}
            error = worst_of(self._failures)
        for promised in asked:
            promised.set_exception(error)

    def end(self, at_once: bool = False) -> None:
        """Let all end what they have to end, or end them at once."""
        with self._lock:
            self._ending = True
        for process in self.processes:
            process.tell([END])
            process.close()
        for process in self.processes:
            if not (at_once or self.over or not self._told or process.ended(END_S)):
                log.warning("the process on %s did not end and is killed", process.device)
        self._started.end()


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

    def begin(self) -> Shift:
        """Those that compute now; started where there are none."""
        if self._shift is not None and self._shift.over:
            self.close()
        if self._shift is None:
            self._shift = Shift(self.device, self.assignment, self.logs)
        return self._shift

    @property
    def ahead(self) -> bool:
        """Whether results are asked for before they are needed: GPUs keep them in memory."""
        return "cuda" in self.device

    @contextlib.contextmanager
    def in_turn(self, job: Job, plan: Plan, passed: Pass) -> Iterator[Iterator[tuple[Call, Asked]]]:
        """The calls of a plan, each with its result, which may still be computed."""
        job.memo.clear()
        vacate(job.device)
        with job.store.scratch("ahead") as place, looking(job.store) as self._found:
            self._round = Round(passed, place)
            yield begun_ahead(job, plan, self._begun, DEPTH if self.ahead else 1)

    def _begun(self, job: Job, call: Call, key: str) -> Asked:
        assert self._round is not None and self._found is not None
        asked = Asked(self, job, call.block, self._round.planned(call, key))
        if self.ahead and not self._found.take(asked, key):
            # in their order: what comes after a result is not asked for before it
            for damaged in self._found.damaged():
                damaged.ask()
            asked.ask()
        return asked

    def ask(self, number: int, block: int) -> tuple[Shift, Future[dict[str, Any]]]:
        """Have the result of a call of this round computed, and by whom."""
        assert self._round is not None
        shift = self.begin()
        return shift, shift.ask(self._round, number, block, self.lean)

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


@dataclass(eq=False)
class Asked:
    """A result that the crew makes, once it is asked for it."""

    crew: Crew
    job: Job
    block: int
    number: int
    _asked: tuple[Shift, Future[dict[str, Any]]] | None = None
    _made: Made | None = None

    def ask(self) -> None:
        """Have it made."""
        self._asked = self.crew.ask(self.number, self.block)

    def take(self) -> Made:
        """Wait for it; made again where it could not be, and the same where it was.

        Raises:
            Exception: as it failed there.
        """
        said = None
        if self._made is not None:
            return self._made
        if self._asked is not None:
            (shift, promised), self._asked = self._asked, None
            said = shift.wait(promised)
        if said is None:
            # what was asked of those that are gone is asked of others
            shift, promised = self.crew.ask(self.number, self.block)
            said = shift.wait(promised)
        assert said is not None
        self._made = self.crew.made(self.job, said)
        return self._made

    def halt(self) -> None:
        """Keep less on the devices from now on: one of them was full."""
        self.crew.lean = True


@contextlib.contextmanager
def crew_of(
    job: Job, request: Request, recipe: str, overrides: Sequence[str]
) -> Iterator[Crew | None]:
    """The processes on a job's devices; None where it has one CPU, which the flow computes on."""
    if job.team.size == 1 and not job.on_gpu:
        yield None
        return
    assignment = Assignment(
        torch.get_num_threads(),
        recipe,
        tuple(overrides),
        str(job.source.path),
        str(request.store),
        job.memory,
        job.keep_incompatible,
    )
    crew = Crew(request.device, assignment, request.store / "logs")
    crew.begin()
    try:
        yield crew
    except BaseException:
        crew.close(at_once=True)
        raise
    crew.close()
