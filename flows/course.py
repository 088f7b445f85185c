"""What a flow ran: each step is run, shown, timed and noted in one place."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from flows.progress import reporter
from flows.progress_artifact import ProgressArtifact
from tasks.engine.job import Job
from tasks.engine.step import Result, Step, Upcoming


@dataclass
class Course:
    """What ran so far: which steps, found or made, and how long each kind took.

    Attributes:
        steps: in their order.
        seconds: by kind of step.
        marks: seconds from the start until something was reached.
        block_ends: seconds from the start until a pass was through with a block, in their order.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    marks: dict[str, float] = field(default_factory=dict)
    block_ends: list[float] = field(default_factory=list)
    _began: float = field(default_factory=time.perf_counter)
    _lean: Job | None = None
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    progress: ProgressArtifact = field(default_factory=lambda: ProgressArtifact(0))

    def plan(self, blocks: int) -> None:
        """Say how many blocks there will be, those of all passes together."""
        reporter().plan(blocks)
        self.progress = ProgressArtifact(blocks)
        self.progress.begin()

    def block_done(self) -> None:
        """Say that a pass is through with a block."""
        self.block_ends.append(self._since())
        reporter().block_done()
        self.progress.block_done()

    def mark(self, reached: str) -> None:
        """Note when something was reached."""
        self.marks[reached] = self._since()

    def _since(self) -> float:
        return round(time.perf_counter() - self._began, 4)

    def leaned(self, job: Job) -> Job:
        """The job, or the one that keeps less on the device once that was full."""
        return self._lean or job

    def run(
        self,
        step: Step[...],
        job: Job,
        *args: Any,
        ahead: Upcoming | None = None,
        **kwargs: Any,
    ) -> Result:
        """Run a step, or write what was computed ahead of it, tell the reporter, and note it.

        Once the device was full, all later steps keep less on it.
        """
        label = step.label(kwargs.get("block"))
        reporter().begin(label)
        start = time.perf_counter()
        result = step.run(self.leaned(job), ahead, *args, **kwargs)
        self._lean = result.lean or self._lean
        self.seconds[step.name] += time.perf_counter() - start
        self.steps.append({"step": label, "cached": result.cached})
        reporter().end(label, result.cached)
        return result
