"""The processes that compute a run's blocks, one on each of several devices; the flow notes.

They are told, one line of JSON each, which pass over the blocks begins and which result is computed
next. All compute it together (:mod:`tasks.engine.team`); the first writes its files and says what
its values are. Where one fails or is lost, all are begun anew by the next step that is asked for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flows.block_plan import Pass
from flows.crew_process import Failure, Process, worst_of
from tasks.check import Request, check_devices
from tasks.engine.ahead import DEPTH, Call, Plan, begun_ahead
from tasks.engine.job import Job
from tasks.engine.phases import AHEAD
from tasks.engine.step import Made
from tasks.engine.store import Draft

log = logging.getLogger("blockquant")

# after which there is no more; without it, the flow's process was killed
END = json.dumps({"end": True})
# how long the others may be waited for, and how long one may take to end
LIMIT = timedelta(minutes=10)
END_S = 30.0
# how long what another process says of a failure is waited for
NEWS_S = 3.0


@dataclass(frozen=True)
class Assignment:
    """What a process of the crew is started with.

    Attributes:
        rank: its own.
        devices: of all, in the order of the ranks.
        meeting: a file through which they find each other.
        threads: to compute with.
        recipe: its file or name.
        overrides: over the recipe.
        model: the source's folder.
        store: the folder of results.
        memory: bytes that may be used on the device.
        keep_incompatible: whether linears are left out whose sizes do not fit.
    """

    rank: int
    devices: tuple[str, ...]
    meeting: str
    threads: int
    recipe: str
    overrides: tuple[str, ...]
    model: str
    store: str
    memory: int
    keep_incompatible: bool


def meet(rank: int, devices: Sequence[str], meeting: str) -> None:
    """Find the other processes, by a file and over loopback alone; waits until all are there."""
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


class Shift:
    """Processes that compute together until one of them fails."""

    def __init__(self, assignment: Assignment, logs: Path) -> None:
        """Start them, which takes them some seconds; nothing waits for them here."""
        self._place = tempfile.TemporaryDirectory(prefix="blockquant-crew-")
        given = replace(assignment, meeting=f"{self._place.name}/meeting")
        self._lock = threading.Lock()
        self._asked: dict[str, Future[dict[str, Any]]] = {}
        self._failures: list[Failure] = []
        self._ending = self._settled = self._raised = False
        self._passed: Pass | None = None
        self.processes = [
            Process(asdict(replace(given, rank=rank)), given.devices[rank], rank, logs, self._heard)
            for rank in range(len(given.devices))
        ]

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

    def ask(self, passed: Pass, place: Path, key: str, lean: bool) -> Future[dict[str, Any]]:
        """Have a result of a pass computed; what the first of them says of it."""
        lines = [json.dumps({"make": key, "lean": lean})]
        if self._passed != passed:
            lines.insert(0, json.dumps({"pass": asdict(passed), "place": str(place)}))
            self._passed = passed
        promised: Future[dict[str, Any]] = Future()
        with self._lock:
            if self._settled:
                promised.set_exception(worst_of(self._failures))
                return promised
            self._asked[key] = promised
        for process in self.processes:
            process.tell(lines)
        return promised

    def _heard(self, said: dict[str, Any] | Failure) -> None:
        """A process said that a result is there, or failed."""
        if isinstance(said, Failure):
            with self._lock:
                first = not self._failures and not self._ending
                self._failures.append(said)
            if first:
                # one that waited for another fails too, and may be heard first
                threading.Timer(NEWS_S if said.vague else 0.0, self._settle).start()
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
            if not (at_once or self.over or self._passed is None or process.ended(END_S)):
                log.warning("the process on %s did not end and is killed", process.device)
            process.kill()
        self._place.cleanup()


@dataclass(eq=False)
class Crew:
    """The processes of one run: begun before they are needed, and anew after a failure.

    Attributes:
        assignment: of the first of them; the others differ by their rank.
        logs: the folder of what they say.
        lean: whether they keep less on their devices, as one was full.
        peaks: bytes that the first of them took at most, of its device and of the host.
    """

    assignment: Assignment
    logs: Path
    lean: bool = False
    peaks: dict[str, int] = field(default_factory=dict)
    _shift: Shift | None = None
    _pass: tuple[Pass, Path] | None = None

    def begin(self) -> Shift:
        """Those that compute now; started where there are none."""
        if self._shift is not None and self._shift.over:
            self.close()
        if self._shift is None:
            self._shift = Shift(self.assignment, self.logs)
        return self._shift

    @property
    def ahead(self) -> bool:
        """Whether results are asked for before they are needed: GPUs keep them in memory."""
        return self.assignment.devices[0] != "cpu"

    @contextlib.contextmanager
    def in_turn(self, job: Job, plan: Plan, passed: Pass) -> Iterator[Iterator[tuple[Call, Asked]]]:
        """The calls of a plan, each with its result, which may still be computed."""
        with job.store.scratch("ahead") as place:
            self._pass = (passed, place)
            depth = DEPTH if self.ahead else 1
            yield begun_ahead(
                job, plan, lambda call, key: self._begun(job, key), lambda begun: depth
            )

    def _begun(self, job: Job, key: str) -> Asked:
        asked = Asked(self, job, key)
        if self.ahead and job.store.get(key) is None:
            asked.ask()
        return asked

    def ask(self, key: str) -> tuple[Shift, Future[dict[str, Any]]]:
        """Have a result of the pass computed, and by whom."""
        assert self._pass is not None
        shift = self.begin()
        return shift, shift.ask(*self._pass, key, self.lean)

    def made(self, job: Job, said: Mapping[str, Any]) -> Made:
        """A result as it was said."""
        assert self._pass is not None
        place = self._pass[1] / said["made"]
        for name, checksum in said["files"].items():
            job.store.note(place / name, checksum)
        job.phases.seconds[AHEAD] += said["seconds"]
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
    key: str
    _asked: tuple[Shift, Future[dict[str, Any]]] | None = field(default=None)

    def ask(self) -> None:
        """Have it made."""
        self._asked = self.crew.ask(self.key)

    def take(self) -> Made:
        """Wait for it; taken again after a failure, it is made again.

        Raises:
            Exception: as it failed there.
        """
        said = None
        if self._asked is not None:
            (shift, promised), self._asked = self._asked, None
            said = shift.wait(promised)
        if said is None:
            # what was asked of those that are gone is asked of others
            shift, promised = self.crew.ask(self.key)
            said = shift.wait(promised)
        assert said is not None
        return self.crew.made(self.job, said)

    def halt(self) -> None:
        """Keep less on the devices from now on: one of them was full."""
        self.crew.lean = True


@contextlib.contextmanager
def crew_of(
    job: Job, request: Request, recipe: str, overrides: Sequence[str]
) -> Iterator[Crew | None]:
    """The processes on a job's devices, which start at once; None where it has one device."""
    if job.team.size == 1:
        yield None
        return
    assignment = Assignment(
        0,
        check_devices(request),
        "",
        torch.get_num_threads(),
        recipe,
        tuple(overrides),
        str(job.source.path),
        str(request.store),
        job.memory,
        job.keep_incompatible,
    )
    crew = Crew(assignment, request.store / "logs")
    crew.begin()
    try:
        yield crew
    except BaseException:
        crew.close(at_once=True)
        raise
    crew.close()
