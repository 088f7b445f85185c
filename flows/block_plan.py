"""What a pass over all blocks asks for, in which order: it takes keys alone to plan it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from configs.methods import (
    has_clip,
    has_learned_clip,
    has_learned_transform,
    has_learning,
    has_transform,
)
from configs.schema import ResolvedStep
from tasks.advance import advance
from tasks.clip import clip
from tasks.engine.ahead import Call, Plan
from tasks.engine.job import Job
from tasks.engine.streams import Stream, Streams, start_stream
from tasks.engine.team import ALONE
from tasks.engine.version import Version
from tasks.learn import learn
from tasks.pack import pack
from tasks.quantize import Origin, makes_up, quantize
from tasks.transform import transform


@dataclass(frozen=True)
class Choice:
    """What is decided about one block: keys of its transforms and of its ranges."""

    decision: str | None
    clipped: str | None


@dataclass(frozen=True)
class Pass:
    """A pass of a step through every block, in values that can be told to other processes.

    Attributes:
        step: number of the recipe's.
        tokens: key of the calibration windows, None where none are read.
        version: of the model before rounding, as the steps before left it.
        clipped: per block, the key of the ranges that those decided.
        last: whether what is rounded is exported.
    """

    step: int
    tokens: str | None
    version: Version
    clipped: tuple[str | None, ...]
    last: bool

    @property
    def calibrated(self) -> bool:
        """Whether it reads calibration windows, which several devices share."""
        return self.tokens is not None

    def job(self, job: Job) -> Job:
        """The job as it computes this pass: alone where nothing is shared, each its own blocks."""
        if self.calibrated or job.team.size == 1:
            return job
        return replace(job, team=ALONE, stride=job.team.size)

    def plan(self, job: Job) -> BlockPlan:
        """What it asks for."""
        step = job.steps[self.step]
        return BlockPlan(job, step, self.tokens, self.version, self.clipped, self.last)

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Pass:
        """The pass whose ``asdict`` was told as JSON."""
        version = told["version"]
        decisions = tuple(tuple(keys) for keys in version["decisions"])
        known = Version(version["rotation"], decisions)
        return cls(**{**told, "version": known, "clipped": tuple(told["clipped"])})


@dataclass
class BlockPlan:
    """A recipe's step taken through every block; what the method does not have is left out.

    Blocks are rounded and packed by the last step, and by one whose next block is to see them.

    Attributes:
        job: the run.
        step: the recipe's.
        tokens: key of the calibration windows, None where none are read.
        version: of the model before rounding, as the steps before left it.
        clipped: per block, the key of the ranges that those decided.
        last: whether what is rounded is exported.
        choices: what was planned so far to be decided about each block.
        streams: of hidden states, as they are after the last block; known once all is planned.
    """

    job: Job
    step: ResolvedStep
    tokens: str | None
    version: Version
    clipped: tuple[str | None, ...]
    last: bool
    choices: list[Choice] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)

    def calls(self) -> Plan:
        """The calls of all blocks in their order; each is answered with the key of its result."""
        quant = self.step.quant
        stream = None if self.tokens is None else start_stream(self.job, self.tokens, self.version)
        floats = stream if has_learning(quant) or makes_up(quant) else None
        rounds = self.last or (stream is not None and quant.quant_out)
        for block in self.job.blocks:
            choice = Choice(None, self.clipped[block] if self.clipped else None)
            if stream is not None:
                choice = yield from self._decided(stream, floats, choice.clipped, block)
            self.choices.append(choice)
            through = None
            if rounds:
                packed = yield from self._rounded(stream, floats, choice, block)
                through = packed if quant.quant_out else None
            if stream is not None and block + 1 < len(self.job.blocks):
                # one call where nothing tells the two apart
                alike = through is None and floats == stream
                if floats is not None and not alike:
                    # first, while the block as it was is there
                    floats = floats.after((yield Call(advance, (floats, None), block)), None)
                key = yield Call(advance, (stream, through), block)
                stream = stream.after(key, through)
                floats = stream if alike else floats
        self.streams = [passed for passed in (stream, floats) if passed is not None]

    def _rounded(
        self, stream: Stream | None, floats: Stream | None, choice: Choice, block: int
    ) -> Generator[Call, str, str]:
        """Round and pack; the key of what is exported."""
        beside = floats if makes_up(self.step.quant) else None
        decided = (choice.decision, choice.clipped)
        origin = Origin(self.step, stream, *decided, self.version, beside)
        yield Call(quantize, (origin,), block)
        return (yield Call(pack, (origin,), block))

    def _decided(
        self, stream: Stream, floats: Stream | None, clipped: str | None, block: int
    ) -> Generator[Call, str, Choice]:
        """What is decided before a block is rounded: scales, learned factors, ranges."""
        quant, decision = self.step.quant, None
        if has_transform(quant):
            decision = yield Call(transform, (self.step, stream), block)
            clipped = None
        if floats is not None and has_learning(quant):
            key = yield Call(learn, (self.step, Streams(stream, floats)), block)
            decision = key if has_learned_transform(quant) else None
            if has_learned_clip(quant):
                clipped = key
            elif decision is not None:
                # ranges of weights that are scaled now
                clipped = None
        if has_clip(quant):
            clipped = yield Call(clip, (self.step, stream, decision), block)
        return Choice(decision, clipped)
