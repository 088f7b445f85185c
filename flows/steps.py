"""The steps of a recipe: each a rotation of the whole model, or a pass over all blocks."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from configs.schema import ResolvedStep
from configs.special_keys import GptqSpecial
from configs.vocabulary import Method
from flows.course import Course
from tasks.advance import advance
from tasks.calibration_set import calibration_set
from tasks.clip import clip, has_clip
from tasks.engine.feedback import warn_of_rank
from tasks.engine.job import Job
from tasks.engine.journal import ToldRun
from tasks.engine.step import Result
from tasks.engine.store import Entry
from tasks.engine.streams import Stream, Streams, drop_boundaries, start_stream
from tasks.engine.version import SOURCE, Version
from tasks.learn import (
    has_learned_clip,
    has_learned_transform,
    has_learning,
    learn,
)
from tasks.pack import pack
from tasks.quantize import Origin, makes_up, quantize
from tasks.register import block_points, loss_points
from tasks.rotate import rotate
from tasks.transform import has_transform, transform

log = logging.getLogger("blockquant")


@dataclass(frozen=True)
class State:
    """What the steps of a recipe have come to.

    Attributes:
        version: of the model before rounding.
        clipped: keys of the blocks' clips, which hold until weights are transformed again.
        quantized: each block's codes, of the newest step that rounded.
        packed: the blocks as they would be exported.
        decided: all decisions, in their order.
    """

    version: Version = SOURCE
    clipped: tuple[str | None, ...] = ()
    quantized: tuple[Result, ...] = ()
    packed: tuple[Result, ...] = ()
    decided: tuple[Result, ...] = ()


@dataclass(frozen=True)
class Choice:
    """What is decided about one block.

    Attributes:
        decision: key of its transforms.
        clipped: key of its ranges.
        made: the steps that decided.
    """

    decision: str | None
    clipped: str | None
    made: tuple[Result, ...] = ()


def passes(job: Job) -> list[bool]:
    """Which steps take every block through their hands: a rotation only where it is to round."""
    return [
        step.quant.method is not Method.QUAROT or (number + 1 == len(job.steps) and job.quantizes)
        for number, step in enumerate(job.steps)
    ]


def calibration(job: Job, course: Course, step: ResolvedStep, sets: dict[str, Entry]) -> str | None:
    """Key of a step's calibration windows, None where it reads none."""
    if step.calib is None:
        return None
    found = course.run(calibration_set, job, step.calib).entry
    if found.key not in {entry.key for entry in sets.values()}:
        number = sum(role.startswith("calibration") for role in sets) + 1
        sets["calibration" if number == 1 else f"calibration-{number}"] = found
    if found.value["windows"] < step.calib.n_samples:
        windows = found.value["windows"]
        log.warning("calib: the text gives %d of %d samples", windows, step.calib.n_samples)
    if isinstance(step.quant.special, GptqSpecial):
        warn_of_rank(job, found.value["windows"] * found.value["window"])
    return found.key


def apply(
    job: Job, run: ToldRun, course: Course, step: ResolvedStep, tokens: str | None, state: State
) -> State:
    """One step of the recipe: a rotation, or a pass over all blocks."""
    last = step is job.steps[-1] and job.quantizes
    if step.quant.method is Method.QUAROT:
        rotated = course.run(rotate, job, step)
        state = replace(
            state, version=Version(rotation=rotated.key), decided=(*state.decided, rotated)
        )
        if not last:
            return state
    return _blocks(job, run, course, step, tokens, state, last)


def _blocks(
    job: Job,
    run: ToldRun,
    course: Course,
    step: ResolvedStep,
    tokens: str | None,
    state: State,
    last: bool,
) -> State:
    """Take every block through a step; what the method does not have is left out.

    Blocks are rounded and packed by the last step, and by one whose next block is to see them.
    """
    version, quant = state.version, step.quant
    stream = None if tokens is None else start_stream(job, tokens, version)
    floats = stream if has_learning(quant) or makes_up(quant) else None
    rounds = last or (stream is not None and quant.quant_out)
    quantized: list[Result] = []
    packed: list[Result] = []
    choices: list[Choice] = []
    for block in job.blocks:
        job.read_ahead(block + 1)
        clipped = state.clipped[block] if state.clipped else None
        choice = Choice(None, clipped)
        if stream is not None:
            choice = _decide(job, run, course, step, stream, floats, clipped, block)
        choices.append(choice)
        through = None
        if rounds:
            beside = floats if makes_up(quant) else None
            origin = Origin(step, stream, choice.decision, choice.clipped, version, beside)
            quantized.append(course.run(quantize, job, origin, block=block))
            packed.append(course.run(pack, job, origin, block=block))
            through = packed[-1].key if quant.quant_out else None
            if last:
                run.log_points(block_points(block, quantized[-1].entry))
        if stream is not None and block + 1 < len(job.blocks):
            passed = course.run(advance, job, stream, through, block=block)
            stream = stream.after(passed.key, through)
            if floats is not None:
                unquantized = course.run(advance, job, floats, None, block=block)
                floats = floats.after(unquantized.key, None)
        course.block_done(block)
    for passed_on in (stream, floats):
        if passed_on is not None:
            drop_boundaries(job, passed_on)
    job.memo.clear()
    return State(
        version.after([choice.decision for choice in choices]),
        tuple(choice.clipped for choice in choices),
        tuple(quantized),
        tuple(packed),
        (*state.decided, *(made for choice in choices for made in choice.made)),
    )


def _decide(
    job: Job,
    run: ToldRun,
    course: Course,
    step: ResolvedStep,
    stream: Stream,
    floats: Stream | None,
    clipped: str | None,
    block: int,
) -> Choice:
    """What a step decides about a block before it rounds: scales, learned factors, ranges."""
    quant, decision = step.quant, None
    made: list[Result] = []
    if has_transform(quant):
        made.append(course.run(transform, job, step, stream, block=block))
        decision, clipped = made[-1].key, None
    if floats is not None and has_learning(quant):
        found = course.run(learn, job, step, Streams(stream, floats), block=block)
        run.log_points(loss_points(block, found.entry))
        made.append(found)
        decision = found.key if has_learned_transform(quant) else None
        clipped = found.key if has_learned_clip(quant) else clipped
    if has_clip(quant):
        made.append(course.run(clip, job, step, stream, decision, block=block))
        clipped = made[-1].key
    return Choice(decision, clipped, tuple(made))
