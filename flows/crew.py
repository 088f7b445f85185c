"""The processes that compute a run's blocks on its other devices, beside the one that has the flow.

They are told, one line of JSON each, which pass over the blocks begins and which result is computed
next; what they compute they exchange with the flow's process (:mod:`tasks.engine.team`), which
alone notes and writes results. A process that is lost fails the step that was computed, and is
begun anew by the next one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from tasks.check import Request, check_devices
from tasks.engine.errors import InputError, RunError
from tasks.engine.job import Job
from tasks.engine.memo import Memo
from tasks.engine.residency import ran_out_of_memory
from tasks.engine.team import Team
from tasks.engine.version import Version

log = logging.getLogger("blockquant")

# what a process says once it can meet the others
READY = b"ready"
# of a process whose device was full
FULL = 3
# how long the others may be waited for, and how long one may take to end
LIMIT = timedelta(minutes=10)
END_S = 30.0
# how long a failure of ours may be ahead of the news that another process ended
NEWS_S = 5.0


@dataclass(frozen=True)
class Assignment:
    """What a process of the crew is started with.

    Attributes:
        rank: its own, from 1.
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


@dataclass(frozen=True)
class Pass:
    """A pass over all blocks, as :class:`flows.block_plan.BlockPlan` takes it."""

    step: int
    tokens: str
    version: Version
    clipped: tuple[str | None, ...]
    last: bool

    def line(self) -> str:
        """As the processes are told of it."""
        return json.dumps({"pass": asdict(self)})

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Pass:
        """What such a line says."""
        version = said["version"]
        decisions = tuple(tuple(keys) for keys in version["decisions"])
        return cls(
            said["step"],
            said["tokens"],
            Version(version["rotation"], decisions),
            tuple(said["clipped"]),
            said["last"],
        )


class Lost(ChildProcessError):
    """A process of the crew ended before its work did."""


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


@dataclass(eq=False)
class Crew:
    """The processes of one run: begun when they are first needed, or before.

    Attributes:
        assignment: of the first of them; the others differ by their rank.
        memo: what this process has in memory, which is forgotten when they begin anew: what all
            have in memory decides what they exchange.
        logs: the folder of what they say.
    """

    assignment: Assignment
    memo: Memo
    logs: Path
    _passing: Pass | None = None
    _told: Pass | None = None
    _members: list[_Member] = field(default_factory=list)
    _met: bool = False
    _losses: int = 0
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _place: tempfile.TemporaryDirectory[str] | None = None

    def team(self) -> Team:
        """What this process, the first, knows of all."""
        devices = self.assignment.devices
        return Team(0, len(devices), devices[0], self.together, lambda: self._losses)

    def begin(self) -> None:
        """Start the processes, which takes them some seconds; nothing waits for them here."""
        if self._members:
            return
        self._place = tempfile.TemporaryDirectory(prefix="blockquant-crew-")
        self._members = [
            _Member(self._assigned(rank), self.logs, self._on_end)
            for rank in range(1, len(self.assignment.devices))
        ]

    def _assigned(self, rank: int) -> Assignment:
        assert self._place is not None
        given = asdict(self.assignment) | {"rank": rank, "meeting": f"{self._place.name}/meeting"}
        return Assignment(**given)

    @contextlib.contextmanager
    def passing(self, passed: Pass) -> Iterator[None]:
        """Compute what is asked for meanwhile together."""
        self._passing = passed
        try:
            yield
        finally:
            self._passing = None

    @contextlib.contextmanager
    def together(self, key: str, lean: bool) -> Iterator[None]:
        """Have all processes compute the result of a key while this one does.

        Raises:
            Lost: one of them ended; what was computed meanwhile may be wrong.
            MemoryError: the device of one is full.
        """
        if self._passing is None:
            yield
            return
        with self._lock:
            losses = self._losses
            try:
                self._tell(key, lean)
                yield
                if self._losses != losses:
                    raise Lost("a process was lost")
            except BaseException as error:
                lost = self._end(of=error)
                if lost is None:
                    raise
                raise lost from error

    def _tell(self, key: str, lean: bool) -> None:
        assert self._passing is not None
        self.begin()
        if not self._met:
            # what was left in memory by others is not what the new ones have
            self.memo.clear()
            assert self._place is not None
            for member in self._members:
                member.wait_until_ready()
            meet(0, self.assignment.devices, f"{self._place.name}/meeting")
            self._met = True
        lines = [json.dumps({"make": key, "lean": lean})]
        if self._told != self._passing:
            lines.insert(0, self._passing.line())
            self._told = self._passing
        for member in self._members:
            member.tell(lines)

    def _on_end(self, member: _Member) -> None:
        """One ended by itself: whoever waits for it on a GPU is let go."""
        if member not in self._members:
            return
        self._losses += 1
        if self._met and dist.get_backend() == "nccl":
            with contextlib.suppress(RuntimeError):
                distributed_c10d._abort_process_group()

    def _end(self, of: BaseException) -> BaseException | None:
        """End all after a failure; why one ended, if that is what failed."""
        ours = isinstance(of, RunError | InputError) or ran_out_of_memory(of)
        found = None
        for member in self._members:
            if not ours and member.ended(NEWS_S):
                found = found or member.reason()
        self._losses += 1
        members, self._members = self._members, []
        self._leave(members)
        return found

    def _leave(self, members: Sequence[_Member]) -> None:
        for member in members:
            member.kill()
        if self._met:
            with contextlib.suppress(RuntimeError, AssertionError):
                dist.destroy_process_group()
        self._met, self._told = False, None
        if self._place is not None:
            self._place.cleanup()
            self._place = None

    def close(self) -> None:
        """Let all end what they have to end."""
        members, self._members = self._members, []
        for member in members:
            member.close()
        for member in members:
            if not member.ended(END_S):
                log.warning("the process on %s did not end and is killed", member.device)
        self._leave(members)


@contextlib.contextmanager
def crew_of(
    job: Job, request: Request, recipe: str, overrides: Sequence[str]
) -> Iterator[Crew | None]:
    """The processes on a job's other devices, which start at once; None where it has one device."""
    if job.team.size == 1:
        yield None
        return
    assignment = Assignment(
        1,
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
    crew = Crew(assignment, job.memo, request.store / "logs")
    crew.begin()
    try:
        yield crew
    finally:
        crew.close()


class _Member:
    """One process of the crew, seen from the flow's."""

    def __init__(self, assignment: Assignment, logs: Path, on_end: Any) -> None:
        """Start it; ``on_end`` is called once it has ended."""
        self.device = assignment.devices[assignment.rank]
        logs.mkdir(parents=True, exist_ok=True)
        self._log = logs / f"device-{os.getpid()}-{assignment.rank}.log"
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "flows.crew_member", json.dumps(asdict(assignment))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                # an interrupt is told by who is interrupted
                start_new_session=True,
            )
        self._news = threading.Thread(target=self._watch, args=(on_end,), daemon=True)
        self._news.start()

    def _watch(self, on_end: Any) -> None:
        self._process.wait()
        on_end(self)

    def wait_until_ready(self) -> None:
        """Wait until it can meet the others.

        Raises:
            Lost: it ended before.
        """
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != READY:
            raise Lost(f"the process on {self.device} did not start")

    def tell(self, lines: Sequence[str]) -> None:
        """Have it read lines; one that is gone says so when it is waited for."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("".join(f"{line}\n" for line in lines).encode())
            self._process.stdin.flush()

    def close(self) -> None:
        """Tell it that there is no more."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def ended(self, within_s: float) -> bool:
        """Whether it ends within so many seconds."""
        try:
            self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def reason(self) -> BaseException:
        """Why it ended."""
        said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = said[-1] if said else "it said nothing"
        if self._process.returncode == FULL:
            return MemoryError(f"{self.device} is full ({last})")
        status = self._process.returncode
        return Lost(f"the process on {self.device} ended ({status}): {last}; see {self._log}")

    def kill(self) -> None:
        """End it now; what it said is kept where that is a failure."""
        self.close()
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        if self._process.returncode == 0 and not self._log.stat().st_size:
            self._log.unlink()
