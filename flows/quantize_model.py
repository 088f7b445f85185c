"""The flow: a recipe and a checkpoint in, a measured checkpoint for SGLang out."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.runtime import flow_run

from configs.loading import ineffective_keys, load_recipe
from configs.schema import ResolvedStep
from configs.schemes import scheme_name
from configs.vocabulary import Method
from flows.progress import reporter
from tasks.advance import advance
from tasks.calibration_set import calibration_set
from tasks.check import Request, check, output_folder
from tasks.clip import clip, has_clip
from tasks.engine.job import Job
from tasks.engine.publication import alone, begun, end, work_identity
from tasks.engine.settings import Settings, settings
from tasks.engine.step import Result, Step, action
from tasks.engine.store import Entry
from tasks.engine.streams import drop_boundaries, start_stream
from tasks.engine.tracking import Run, flatten, open_run
from tasks.engine.version import SOURCE, Version
from tasks.evaluate import evaluate, summary
from tasks.evaluation_set import evaluation_set
from tasks.export import export
from tasks.learn import (
    Streams,
    has_learned_clip,
    has_learned_transform,
    has_learning,
    learn,
)
from tasks.load_model import load_model
from tasks.pack import pack
from tasks.publish import launch_line, model_card, publish
from tasks.quantize import Origin, quantize
from tasks.register import block_points, error_rows, loss_points, register
from tasks.report import make_report
from tasks.rotate import rotate
from tasks.transform import has_transform, transform
from tasks.verify import verify

log = logging.getLogger("blockquant")


@dataclass
class Course:
    """What ran so far: which steps, found or made, and how long each kind took."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def run(self, step: Step[...], job: Job, *args: Any, **kwargs: Any) -> Result:
        """Run a step, tell the reporter, and note it."""
        block = kwargs.get("block")
        label = step.name if block is None else f"{step.name}[block {block}]"
        reporter().begin(label)
        start = time.perf_counter()
        result = step(job, *args, **kwargs)
        self.seconds[step.name] += time.perf_counter() - start
        self.steps.append({"step": label, "cached": result.cached})
        reporter().end(label, result.cached)
        return result


@flow(name="quantize", flow_run_name="quantize with {recipe}", validate_parameters=False)
def quantize_model(
    recipe: str,
    model: str | None = None,
    output: str | None = None,
    overrides: Sequence[str] = (),
    device: str = "cpu",
    memory: int | None = None,
    store: str | None = None,
    keep_incompatible: bool = False,
    overwrite: bool = False,
    log_file: str | None = None,
) -> dict[str, Any]:
    """Quantize a model block by block and publish it after it was reopened and measured.

    Args:
        recipe: a recipe file, or the name of one that ships.
        model: a checkpoint folder or a hub id; the recipe's ``model.path`` where it is not given.
        output: the folder to publish; the recipe's ``save.save_path`` where it is not given.
        overrides: ``key.path=value`` each, over the recipe.
        device: cpu, cuda or cuda:N.
        memory: bytes that may be used on the device.
        store: the folder of results; the user's own where it is not given.
        keep_incompatible: leave linears unquantized whose sizes do not fit, instead of refusing.
        overwrite: replace the output folder.
        log_file: a log to keep with the MLflow run.

    Returns:
        Where the checkpoint lies, its metrics, the MLflow run, and which steps were found.
    """
    loaded = load_recipe(recipe, overrides)
    place = settings(Path(store) if store else None)
    request = Request(
        loaded,
        model,
        output_folder(loaded, recipe, model, output),
        place.store,
        device,
        memory,
        keep_incompatible,
        overwrite,
    )
    job, _ = action(check)(request, download=True)
    for key in ineffective_keys(loaded):
        log.info("%s has no effect here and is ignored", key)
    assert request.output is not None
    with alone(job.store, request.output):
        run = _open_run(job, place, request)
        kept = Path(log_file) if log_file else None
        with _failure_kept(run, kept):
            return _quantize(job, run, request, kept)


def _quantize(job: Job, run: Run, request: Request, log_file: Path | None) -> dict[str, Any]:
    course = Course()
    described = course.run(load_model, job)
    reporter().plan(described.value["blocks"] * sum(_passes(job)))
    sets: dict[str, Entry] = {}
    # before the blocks: a text that cannot be had is better found now
    sets["evaluation"] = course.run(evaluation_set, job, job.evaluation).entry
    calibrated = [_calibration(job, course, step, sets) for step in job.steps]
    state = State()
    for step, tokens in zip(job.steps, calibrated, strict=True):
        state = _apply(job, run, course, step, tokens, state)
    quantized, packed, decided = state.quantized, state.packed, state.decided
    exported = course.run(export, job, tuple(p.key for p in packed), state.version)
    digests = _digests(job, quantized)
    verified = course.run(verify, job, exported.key, digests)
    evaluated = course.run(evaluate, job, exported.key, sets["evaluation"].key, job.evaluation)
    blocks = [q.entry for q in quantized]
    report = make_report(job, blocks, exported.entry, verified.entry, evaluated.entry, sets)
    assert request.output is not None
    identity = work_identity(job, request.output)
    location = action(publish)(
        job.store, identity, exported.entry, report, request.output, request.overwrite
    )
    _show(job, report, blocks)
    found = [d.entry for d in decided]
    action(register)(run, report, blocks, found, sets, location, dict(course.seconds), log_file)
    end(job.store.root, request.output)
    log.info("published %s: %s", location, summary(report["metrics"]))
    return {
        "checkpoint": location,
        "metrics": report["metrics"],
        "bytes": report["bytes"],
        "scheme": report["scheme"],
        "seconds": {name: round(s, 3) for name, s in course.seconds.items()},
        "steps": course.steps,
        "mlflow": {"uri": run.uri, "run": run.id},
        "launch": launch_line(Path(location)),
    }


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


def _passes(job: Job) -> list[bool]:
    """Which steps take every block through their hands: all but a rotation that others follow."""
    return [
        step.quant.method is not Method.QUAROT or number + 1 == len(job.steps)
        for number, step in enumerate(job.steps)
    ]


def _calibration(
    job: Job, course: Course, step: ResolvedStep, sets: dict[str, Entry]
) -> str | None:
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
    return found.key


def _apply(
    job: Job, run: Run, course: Course, step: ResolvedStep, tokens: str | None, state: State
) -> State:
    """One step of the recipe: a rotation, or a pass over all blocks."""
    last = step is job.steps[-1]
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
    run: Run,
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
    floats = stream if has_learning(quant) else None
    rounds = last or (stream is not None and quant.quant_out)
    quantized: list[Result] = []
    packed: list[Result] = []
    decided: list[Result] = []
    decisions: list[str | None] = []
    clips: list[str | None] = []
    for block in job.blocks:
        decision = None
        clipped = state.clipped[block] if state.clipped else None
        if stream is not None and has_transform(quant):
            decided.append(course.run(transform, job, step, stream, block=block))
            decision, clipped = decided[-1].key, None
        if stream is not None and floats is not None and has_learning(quant):
            found = course.run(learn, job, step, Streams(stream, floats), block=block)
            run.log_points(loss_points(block, found.entry))
            decided.append(found)
            decision = found.key if has_learned_transform(quant) else None
            clipped = found.key if has_learned_clip(quant) else clipped
        if stream is not None and has_clip(quant):
            decided.append(course.run(clip, job, step, stream, decision, block=block))
            clipped = decided[-1].key
        decisions.append(decision)
        clips.append(clipped)
        through = None
        if rounds:
            origin = Origin(step, stream, decision, clipped, version)
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
        reporter().block_done(block)
    for passed_on in (stream, floats):
        if passed_on is not None:
            drop_boundaries(job, passed_on)
    job.memo.clear()
    return State(
        version.after(decisions),
        tuple(clips),
        tuple(quantized),
        tuple(packed),
        (*state.decided, *decided),
    )


def _digests(job: Job, quantized: Sequence[Result]) -> dict[str, str]:
    return {
        plan.prefix + name: linear["digest"]
        for plan, result in zip(job.plan.blocks, quantized, strict=True)
        for name, linear in result.value["linears"].items()
    }


def _open_run(job: Job, place: Settings, request: Request) -> Run:
    assert request.output is not None
    identity = work_identity(job, request.output)
    parameters = flatten(job.recipe.model_dump(mode="json")) | {
        "source": str(job.source.path),
        "output": str(request.output),
    }
    # a resumed run may go on elsewhere, and a parameter cannot change
    tags = {
        "device": job.device,
        "blockquant.version": version("blockquant"),
        "prefect.flow_run": str(flow_run.id or ""),
        **{f"version.{k}": v for k, v in job.fingerprint.items()},
    }
    name = f"{job.source.name} {scheme_name(job.steps[-1].quant)}"
    published = begun(job.store.root, request.output) == identity
    run = open_run(place, identity, name, parameters, tags, even_finished=published)
    # at once: a run that fails is to say of what recipe
    run.log_text(yaml.safe_dump(job.recipe.canonical(), sort_keys=False), "recipe.yml")
    return run


@contextmanager
def _failure_kept(run: Run, log_file: Path | None = None) -> Any:
    """Keep a failed run as failed, with its reason and its log."""
    try:
        yield
    except BaseException as error:
        log.debug("failed", exc_info=error)
        try:
            if log_file is not None and log_file.is_file():
                run.log_file(log_file)
            run.fail(f"{type(error).__name__}: {error}")
        except Exception as unsaid:
            log.warning("MLflow was not told of the failure: %s", type(unsaid).__name__)
        raise


def _show(job: Job, report: dict[str, Any], blocks: Sequence[Entry]) -> None:
    """Leave the errors and the model card as artifacts in Prefect."""
    create_table_artifact(
        table=error_rows(blocks), key="linear-errors", description=job.source.name
    )
    create_markdown_artifact(markdown=model_card(report), key="model-card")
