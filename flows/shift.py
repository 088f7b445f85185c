"""Processes that compute together until one fails: what they are told, and what they say.

They are told, one line of JSON each, what the job is, which pass over the blocks begins and which
result is computed next.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Mapping, Sequence
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
from tasks.engine.ahead import Call
from tasks.engine.errors import RunError

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
        recipe: as it was read, whatever its file says by now.
        model: the source's folder.
        store: the folder of results.
        memory: bytes that may be used on a device.
        keep_incompatible: whether linears are left out whose sizes do not fit.
        calibrated: whether they are to run blocks.
        first: whether nothing was asked of others before.
    """

    threads: int
    recipe: Mapping[str, Any]
    model: str
    store: str
    memory: int
    keep_incompatible: bool
    calibrated: bool
    first: bool = True


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
        self._started = take_started(device, assignment.calibrated)
        self._lock = threading.Lock()
        self._asked: dict[str, Future[dict[str, Any]]] = {}
        self._failures: list[Failure] = []
        self._ending = self._settled = self._raised = False
        # of each process, the round it is at and how many of its calls it knows
        self._told: dict[int, tuple[Round, int]] = {}
        self.processes: list[Process] = []
        for member in self._started.members:
            # one that failed already is heard at once
            self.processes.append(Process(member, logs, self._heard))
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
        if number < known:
            raise RunError(
                f"{at.calls[number][0]}: its result lay in the store and is gone or damaged since; "
                "run the same command again"
            )
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
