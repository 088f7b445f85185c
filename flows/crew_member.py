"""One process of a crew: ``python -m flows.crew_member ASSIGNMENT``, which the flow starts.

It plans the same passes as the flow, computes what it is told to compute, in step with the others,
and writes nothing but its share of the hidden states.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from configs.loading import load_recipe
from flows.block_plan import BlockPlan
from flows.crew import END_S, FULL, READY, Assignment, Pass, meet
from tasks.check import Request, check
from tasks.engine.ahead import Call, keyed
from tasks.engine.errors import one_line
from tasks.engine.job import Job
from tasks.engine.residency import ran_out_of_memory
from tasks.engine.streams import drop_boundaries
from tasks.engine.team import Team


def job_of(given: Assignment) -> Job:
    """The flow's job, on this process's device."""
    request = Request(
        load_recipe(given.recipe, given.overrides),
        given.model,
        None,
        Path(given.store),
        given.devices[given.rank],
        given.memory,
        given.keep_incompatible,
    )
    job, _ = check(request)
    device = given.devices[given.rank]
    return replace(job, team=Team(given.rank, len(given.devices), device))


class Work:
    """What is computed of one pass."""

    def __init__(self, job: Job, passed: Pass) -> None:
        """Plan it; nothing is computed."""
        self._job = job
        step = job.steps[passed.step]
        self._plan = BlockPlan(
            job, step, passed.tokens, passed.version, passed.clipped, passed.last
        )
        self._calls = keyed(job, self._plan.calls())
        self._call: tuple[Call, str] | None = None

    def make(self, key: str, lean: bool) -> None:
        """Compute a result, later in the plan than the one before or that one again.

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
        call.step.make(self._job, key, *call.args, block=call.block)

    def end(self) -> None:
        """Drop the hidden states of a pass that is through."""
        if next(self._calls, None) is None:
            for stream in self._plan.streams:
                drop_boundaries(self._job, stream)
            self._job.memo.clear()


def work(job: Job, told: Iterator[dict[str, Any]]) -> None:
    """Do what is told."""
    current: Work | None = None
    for message in told:
        if "pass" in message:
            if current is not None:
                current.end()
            current = Work(job, Pass.of(message["pass"]))
        elif current is not None:
            current.make(message["make"], message["lean"])
    if current is not None:
        current.end()


def messages() -> Iterator[dict[str, Any]]:
    """What the flow's process says; once that is gone this one ends, whatever it waits for."""
    said: SimpleQueue[dict[str, Any] | None] = SimpleQueue()

    def read() -> None:
        # not through sys.stdin: its buffer is locked while it waits, which ends Python in an abort
        with os.fdopen(os.dup(0), "rb", closefd=True) as lines:
            for line in lines:
                said.put(json.loads(line))
        said.put(None)
        time.sleep(END_S)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    while (message := said.get()) is not None:
        yield message


def main() -> None:
    """Work until there is no more; a failure is one line."""
    given = json.loads(sys.argv[1])
    lists = {name: tuple(given[name]) for name in ("devices", "overrides")}
    assignment = Assignment(**(given | lists))
    told = messages()
    try:
        torch.set_num_threads(assignment.threads)
        job = job_of(assignment)
        # what else is printed is for the log
        os.write(1, READY + b"\n")
        os.dup2(2, 1)
        meet(assignment.rank, assignment.devices, assignment.meeting)
        work(job, told)
    except Exception as error:
        print(one_line(error), file=sys.stderr, flush=True)
        os._exit(FULL if ran_out_of_memory(error) else 1)
    # not by the way of interpreters: what others of us still exchange is no more waited for
    os._exit(0)


if __name__ == "__main__":
    main()
