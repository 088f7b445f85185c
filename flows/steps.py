"""The steps of a recipe: each a rotation of the whole model, or a pass over all blocks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace

from configs.schema import ResolvedStep
from configs.special_keys import GptqSpecial
from configs.vocabulary import Method
from flows.block_plan import Pass
from flows.course import Course
from flows.crew import Crew
from tasks.calibration_set import calibration_set
from tasks.clip import clip
from tasks.engine.ahead import Call, in_turn
from tasks.engine.errors import InputError
from tasks.engine.feedback import warn_of_rank
from tasks.engine.job import Job
from tasks.engine.journal import ToldRun
from tasks.engine.step import Result, Step, Upcoming
from tasks.engine.store import Entry
from tasks.engine.streams import drop_boundaries
from tasks.engine.tracking import Point
from tasks.engine.version import SOURCE, Version
from tasks.learn import learn
from tasks.pack import pack
from tasks.quantize import quantize
from tasks.register import block_points, loss_points
from tasks.rotate import rotate
from tasks.transform import transform

log = logging.getLogger("blockquant")

# the calls of a pass, each with its result where others than its task compute that
Turns = AbstractContextManager[Iterator[tuple[Call, Upcoming | None]]]


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
    windows = found.value["windows"]
    if windows < job.team.size:
        raise InputError(
            f"calib: the text gives {windows} windows for {job.team.size} devices; use fewer "
            "devices, a longer text or a shorter seq_len"
        )
    if windows < step.calib.n_samples:
        log.warning("calib: the text gives %d of %d samples", windows, step.calib.n_samples)
    if isinstance(step.quant.special, GptqSpecial):
        warn_of_rank(job, windows * found.value["window"])
    return found.key


def apply(
    job: Job,
    run: ToldRun,
    course: Course,
    step: ResolvedStep,
    tokens: str | None,
    state: State,
    crew: Crew | None = None,
) -> State:
    """One step of the recipe: a rotation, or a pass over all blocks, be it with a crew."""
    last = step is job.steps[-1] and job.quantizes
    if step.quant.method is Method.QUAROT:
        rotated = course.run(rotate, job, step)
        state = replace(
            state, version=Version(rotation=rotated.key), decided=(*state.decided, rotated)
        )
        if not last:
            return state
    passed = Pass(job.steps.index(step), tokens, state.version, state.clipped, last)
    return _blocks(job, run, course, crew, passed, state.decided)


def _blocks(
    job: Job,
    run: ToldRun,
    course: Course,
    crew: Crew | None,
    passed: Pass,
    decided: tuple[Result, ...],
) -> State:
    """Take every block through a step, as :mod:`flows.block_plan` plans it."""
    job = passed.job(job)
    plan = passed.plan(job)
    results: list[tuple[Step[...], Result]] = []
    points: list[Point] = []
    done = 0
    if crew is None:
        turns: Turns = in_turn(job, plan.calls())
    else:
        turns = crew.in_turn(job, plan.calls(), passed)

    def tell() -> None:
        if points:
            run.log_points(points)
            points.clear()

    # written down by a thread: a disk may be busy with what the blocks have written
    with turns as calls, run.beside(), ExitStack() as stack:
        # of what is found, all at once: to tell it takes as long as to find it
        stack.callback(tell)
        for call, ahead in calls:
            while done < call.block:
                course.block_done()
                done += 1
            result = course.run(call.step, job, *call.args, ahead=ahead, block=call.block)
            results.append((call.step, result))
            if call.step is quantize and passed.last:
                points += block_points(call.block, result.entry)
            if call.step is learn:
                points += loss_points(call.block, result.entry)
            if not result.cached:
                tell()
    for _ in range(done, len(job.blocks)):
        course.block_done()
    for passed_on in plan.streams:
        drop_boundaries(job, passed_on)
    job.memo.clear()
    return State(
        passed.version.after([choice.decision for choice in plan.choices]),
        tuple(choice.clipped for choice in plan.choices),
        tuple(result for made, result in results if made is quantize),
        tuple(result for made, result in results if made is pack),
        (*decided, *(r for made, r in results if made in (transform, learn, clip))),
    )
