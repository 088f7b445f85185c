"""Starts the processes of a crew: they load what they need, and find each other, before any job.

Imports nothing that takes long: a command begins with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path

# a file that torch's profiler writes what a process did to, as Chrome's tracing reads it
TRACE = "BLOCKQUANT_TRACE"
# how torch takes memory, by its own and its older name; it reads them when it is loaded
ALLOCATORS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# host memory is touched by several threads before it is locked: no launch waits while it is locked
PINNING = "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"


@dataclass(frozen=True)
class Seat:
    """What a process of a crew is started with.

    Attributes:
        rank: its own.
        devices: of all, in the order of the ranks, as they were asked for.
        meeting: a file through which they find each other.
        calibrated: whether it is to run blocks, which takes libraries that load for seconds.
    """

    rank: int
    devices: tuple[str, ...]
    meeting: str
    calibrated: bool


class Member:
    """A process that was started: ``python -m flows.crew_member SEAT FILE``.

    Attributes:
        seat: its own.
        log: what it prints.
        said: number of the open file that it says its results to.
        process: the system's.
    """

    def __init__(self, seat: Seat, folder: Path) -> None:
        """Start it, its log in a folder."""
        self.seat = seat
        self.log = folder / f"device-{os.getpid()}-{seat.rank}.log"
        # a pipe of its own: what libraries print is for the log
        self.said, saying = os.pipe()
        command = [sys.executable, "-m", "flows.crew_member", json.dumps(asdict(seat)), str(saying)]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=(saying,),
                env=surroundings(self.device, os.environ),
                # an interrupt is told by who is interrupted
                start_new_session=True,
            )
        os.close(saying)

    @property
    def device(self) -> str:
        """Its own, as it was asked for."""
        return self.seat.devices[self.seat.rank]

    def tell(self, lines: Sequence[str]) -> None:
        """Have it read lines; that one is gone is heard otherwise."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError, ValueError):
            self.process.stdin.write("".join(f"{line}\n" for line in lines).encode())
            self.process.stdin.flush()

    def close(self) -> None:
        """Tell it that there is no more."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def kill(self) -> None:
        """End it now, if it did not end."""
        # before it hears that there is no more, and takes its files for nobody's
        self.process.kill()
        self.close()
        self.process.wait()


def trace_of(path: str, rank: int) -> Path:
    """The file that a member's trace goes to: the one that TRACE names, of others beside it."""
    return Path(f"{path}.{rank}" if rank else path)


def surroundings(device: str, own: Mapping[str, str]) -> dict[str, str]:
    """What a member finds in its environment: torch is told how to lock host memory for a GPU.

    What the user told it stands.
    """
    told = "cuda" not in device or any(name in own for name in ALLOCATORS)
    return {**own} if told else {**own, ALLOCATORS[-1]: PINNING}


class Started:
    """Processes, one on each of some devices, that wait for a job.

    Attributes:
        devices: as they were asked for.
        members: the processes, in the order of their ranks.
        taken: whether they were given a job.
    """

    def __init__(self, devices: Sequence[str], calibrated: bool) -> None:
        """Start them, which takes them some seconds; nothing waits for them here."""
        self._folder = tempfile.TemporaryDirectory(prefix="blockquant-crew-")
        folder = Path(self._folder.name)
        self.devices = tuple(devices)
        self.taken = False
        meeting = f"{folder}/meeting"
        seats = [Seat(rank, self.devices, meeting, calibrated) for rank in range(len(devices))]
        self.members = [Member(seat, folder) for seat in seats]

    def end(self) -> None:
        """End them at once, if they did not end; nothing of them is left."""
        for member in self.members:
            member.kill()
        self._folder.cleanup()


def apart(device: str) -> bool:
    """Whether processes of their own compute on what ``--device`` says: GPUs, or several."""
    return "cuda" in device or "," in device


def names(device: str) -> tuple[str, ...]:
    """Devices as ``--device`` says them, with commas between."""
    return tuple(name.strip() for name in device.split(","))


# begun by a command before its flow asks for them
_EARLY: ContextVar[Started | None] = ContextVar("crew that was started early", default=None)


@contextmanager
def started_early(device: str, calibrated: bool) -> Iterator[None]:
    """Have the processes start, where there are to be any, while input is checked.

    Those that nobody took by the end are ended.

    Args:
        device: as ``--device`` says it.
        calibrated: whether they are to run blocks.
    """
    if not apart(device) or _EARLY.get() is not None:
        yield
        return
    started = Started(names(device), calibrated)
    token = _EARLY.set(started)
    try:
        yield
    finally:
        _EARLY.reset(token)
        if not started.taken:
            started.end()


def take_started(device: str, calibrated: bool) -> Started:
    """Processes on what ``--device`` says: those that were started early, or new ones."""
    early = _EARLY.get()
    if early is None or early.taken or early.devices != names(device):
        early = Started(names(device), calibrated)
    early.taken = True
    return early
