"""One process of a crew: ``python -m flows.crew_member ASSIGNMENT FILE``, which the flow starts.

It plans the same passes as the flow and computes what it is told to, in step with the others. The
first one writes the files of results and says what their values are; the others write nothing but
their share of the hidden states.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from configs.loading import load_recipe
from flows.block_plan import Pass
from flows.crew import END_S, Assignment, meet
from flows.crew_process import Failure
from tasks.check import Request, checked_job
from tasks.engine.ahead import Call, Host, keyed
from tasks.engine.job import Job
from tasks.engine.residency import peaks
from tasks.engine.step import Made
from tasks.engine.streams import drop_boundaries
from tasks.engine.team import Team
from tasks.engine.transfer import beside
from tasks.engine.values import resolved


def job_of(given: Assignment) -> Job:
    """The flow's job, on this process's device."""
    device = given.devices[given.rank]
    request = Request(
        load_recipe(given.recipe, given.overrides),
        given.model,
        None,
        Path(given.store),
        device,
        given.memory,
        given.keep_incompatible,
    )
    return replace(checked_job(request), team=Team(given.rank, len(given.devices), device))


class Work:
    """What is computed of one pass."""

    def __init__(self, job: Job, passed: Pass) -> None:
        """Plan it; nothing is computed."""
        self._job = job
        self._plan = passed.plan(job)
        self._calls = keyed(job, self._plan.calls())
        self._call: tuple[Call, str] | None = None

    def make(self, key: str, lean: bool) -> Made:
        """Compute a result, later in the plan than the one before.

        Raises:
            LookupError: the plan has no such result.
        """
        while self._call is None or self._call[1] != key:
            self._call = next(self._calls, None)
            if self._call is None:
                raise LookupError(f"no step of this pass makes {key}: the processes disagree")
        if lean and not self._job.lean:
            self._job = self._job.leaner() or self._job
        call, _ = self._call
        return call.step.make(self._job, key, *call.args, block=call.block)

    def end(self) -> None:
        """Drop the hidden states of a pass that is through."""
        if next(self._calls, None) is None:
            for stream in self._plan.streams:
                drop_boundaries(self._job, stream)
            self._job.memo.clear()


class Voice:
    """Says, in their order, that results are written, while the next are computed."""

    def __init__(self, job: Job, said: int) -> None:
        """Say it to an open file."""
        self._job = job
        self._said = said
        self._host = Host(job)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="blockquant-voice")

    def tell(self, key: str, made: Made, place: Path, seconds: float) -> None:
        """Have a result written below a folder and told; where it cannot be, this process ends."""
        begun = self._host.begun(made, place / key)
        self._thread.submit(_or_fail, self._said, partial(self._tell, key, begun, seconds))

    def _tell(self, key: str, made: Made, seconds: float) -> None:
        written = made.draft.wait().items()
        files = {name: self._job.store.describe(path).checksum for name, path in written}
        with beside(self._job.device, made.ready):
            value = resolved(made.value)
        found = {"files": files, "value": value, "peaks": peaks(self._job.device)}
        say(self._said, {"made": key, "seconds": seconds, **found})

    def end(self) -> None:
        """Wait until all is told."""
        self._thread.shutdown()


def say(said: int, message: dict[str, Any]) -> None:
    """Write a line of JSON, whole."""
    line = json.dumps(message).encode() + b"\n"
    while line:
        line = line[os.write(said, line) :]


def work(job: Job, told: Iterator[dict[str, Any]], said: int) -> None:
    """Do what is told."""
    current: Work | None = None
    place = Path()
    voice = Voice(job, said)
    for message in told:
        if "end" in message:
            break
        if "pass" in message:
            if current is not None:
                current.end()
            current, place = Work(job, Pass.of(message["pass"])), Path(message["place"])
        elif current is not None:
            start = time.perf_counter()
            made = current.make(message["make"], message["lean"])
            if job.team.rank == 0:
                voice.tell(message["make"], made, place, time.perf_counter() - start)
    voice.end()
    if current is not None:
        current.end()


def messages() -> Iterator[dict[str, Any]]:
    """What the flow's process says; once that is gone this one ends, whatever it waits for."""
    heard: SimpleQueue[dict[str, Any]] = SimpleQueue()

    def read() -> None:
        # not through sys.stdin: its buffer is locked while it waits, which ends Python in an abort
        with os.fdopen(os.dup(0), "rb") as lines:
            message: dict[str, Any] = {}
            for line in lines:
                message = json.loads(line)
                heard.put(message)
        if "end" in message:
            time.sleep(END_S)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield heard.get()


def _or_fail(said: int, do: Callable[[], None]) -> None:
    """Do something; where it fails that is told, and this process ends."""
    try:
        do()
    except Exception as error:
        say(said, {"failed": asdict(Failure.of(error))})
        os._exit(1)


def main() -> None:
    """Work until there is no more; a failure is told in a line."""
    given = json.loads(sys.argv[1])
    lists = {name: tuple(given[name]) for name in ("devices", "overrides")}
    assignment = Assignment(**(given | lists))
    told, said = messages(), int(sys.argv[2])

    def run() -> None:
        torch.set_num_threads(assignment.threads)
        job = job_of(assignment)
        meet(assignment.rank, assignment.devices, assignment.meeting)
        work(job, told, said)

    _or_fail(said, run)
    # not by the way of interpreters: what others of us still exchange is no more waited for
    os._exit(0)


if __name__ == "__main__":
    main()
