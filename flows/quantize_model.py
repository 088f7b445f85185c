"""The flow: a recipe and a checkpoint in, a measured checkpoint for SGLang out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow

from configs.loading import ineffective_keys
from flows.course import Course
from flows.crew import Crew, crew_of
from flows.crew_start import started_early
from flows.finishing import look, publish_products, sample, scored, serve, settled, show, uploaded
from flows.logs import heard_by_prefect
from flows.steps import State, apply, calibration, passes
from flows.tracked import failure_kept, open_tracked
from tasks.check import Request, check, request_of
from tasks.engine.aside import Aside, made_aside
from tasks.engine.job import Job
from tasks.engine.journal import ToldRun, told, told_run
from tasks.engine.publication import alone, end, note_work, work_identity
from tasks.engine.residency import forget_peaks, peaks
from tasks.engine.settings import Settings, settings
from tasks.engine.step import Result, action
from tasks.engine.store import Entry
from tasks.evaluate import evaluate, summary
from tasks.evaluation_set import evaluation_set
from tasks.export import export, export_transformed
from tasks.gate import offer
from tasks.load_model import load_model
from tasks.looks.log_looks import Looked
from tasks.outside import outside
from tasks.publish import QUANTIZED, TRANSFORMED, launch_line
from tasks.register import log_measured, register, served_tags
from tasks.report import Product, make_report
from tasks.transformed import transformed
from tasks.verify import verify

log = logging.getLogger("blockquant")


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
    upload: str | None = None,
    log_file: str | None = None,
    parent: str | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """Quantize a model block by block and publish it after it was reopened and measured.

    Args:
        recipe: a recipe file, or the name of one that ships.
        model: a checkpoint folder or a hub id; the recipe's ``model.path`` where it is not given.
        output: the folder to publish; the recipe's ``save.save_path`` where it is not given.
        overrides: ``key.path=value`` each, over the recipe.
        device: cpu, cuda or cuda:N; several with commas between.
        memory: bytes that may be used on the device.
        store: the folder of results; the user's own where it is not given.
        keep_incompatible: leave linears unquantized whose sizes do not fit, instead of refusing.
        overwrite: replace the output folder.
        upload: where to copy the published folder to, such as ``s3://bucket/folder``.
        log_file: a log to keep with the MLflow run.
        parent: identity of the sweep that this is a part of; its output may be there already, if
            this very work published it.
        name: of the MLflow run; by default it is made of model and scheme.

    Returns:
        Where the checkpoint lies if it is published, its metrics, the MLflow run, and which steps
        were found.
    """
    heard_by_prefect()
    request = request_of(
        recipe,
        model=model,
        output=output,
        overrides=overrides,
        device=device,
        memory=memory,
        store=store,
        keep_incompatible=keep_incompatible,
        overwrite=overwrite,
        upload=upload,
    )
    place = settings(Path(store) if store else None)
    with started_early(device, request.recipe.calibrated):
        return _checked(request, place, log_file, parent, name)


def _checked(
    request: Request,
    place: Settings,
    log_file: str | None,
    parent: str | None,
    name: str | None,
) -> dict[str, Any]:
    """Check the request, then work on it, known to MLflow."""
    job, _ = action(check)(request, download=True)
    for key in ineffective_keys(request.recipe):
        log.info("%s has no effect here and is ignored", key)
    identity = work_identity(job, request.output)
    with alone(job.store, request.output or identity), told_run(place, identity) as run:
        note_work(job.store.root, identity)
        open_tracked(job, run, request, parent, name)
        kept = Path(log_file) if log_file else None
        crewed = crew_of(job, request)
        # after a failure the devices end first, and then the thread is waited for
        with failure_kept(run, kept), _outside_aside(job) as aside, crewed as crew:
            result = _quantize(job, run, request, kept, crew, aside)
            # after MLflow was told: killed before, the same command goes on. The work of a sweep
            # stays begun: the sweep, run again, finds it
            if parent is None and not _undecided(result, request):
                end(job.store.root, request.output, identity)
            return result


def _undecided(result: Mapping[str, Any], request: Request) -> bool:
    """Say whether a checkpoint waits beside its output for a gate that has not decided."""
    at = result["checkpoint"]
    return at not in (None, str(request.output)) and result["gate"] is None


def _quantize(
    job: Job,
    run: ToldRun,
    request: Request,
    log_file: Path | None,
    crew: Crew | None,
    aside: Aside | None,
) -> dict[str, Any]:
    course = Course()
    described = course.run(load_model, job)
    course.plan(described.value["blocks"] * sum(passes(job)))
    sets: dict[str, Entry] = {}
    job.digest_ahead(0)
    # before the blocks: a text that cannot be had is better found now
    sets["evaluation"] = course.run(evaluation_set, job, job.evaluation).entry
    calibrated = [calibration(job, course, step, sets) for step in job.steps]
    state = State()
    forget_peaks(job.device)
    job.phases.begin()
    course.mark("first block")
    for step, tokens in zip(job.steps, calibrated, strict=True):
        state = apply(job, run, course, step, tokens, state, crew)
    course.mark("last block")
    if crew is not None:
        # what is measured next takes the devices
        crew.close()
    taken = peaks(job.device) | (crew.peaks if crew is not None else {})
    phases = job.phases.of(course.marks["last block"] - course.marks["first block"])
    beside = course.run(outside, job, state.version, ahead=aside).key
    products = _products(job, course, state, beside, sets)
    blocks = [q.entry for q in state.quantized] if job.quantizes else []
    report = make_report(job, blocks, products, sets)
    sampled = sample(job, course, products, sets["evaluation"])
    # weights that were measured with
    job.clear()
    location = publish_products(job, run, request, products, report, sets["evaluation"])
    course.mark("published")
    show(job, report, blocks)
    decided = [d.entry for d in state.decided]
    action(log_measured)(run, report, blocks, decided, sets, dict(course.seconds))
    scores = scored(job, run, course, products)
    looked = Looked(report, blocks, decided, len(job.blocks), sampled)
    released = _released(job, run, request, looked, location, sets["evaluation"], log_file)
    return {
        **released,
        "metrics": report["metrics"],
        "bytes": report["bytes"],
        "scheme": report["scheme"],
        "seconds": {name: round(s, 3) for name, s in course.seconds.items()},
        "phases": {name: round(s, 3) for name, s in phases.items()},
        "marks": course.marks,
        "block_ends": course.block_ends,
        "peaks": taken,
        "steps": course.steps,
        "unserved": report["unserved"],
        "scores": scores,
    }


def _released(
    job: Job,
    run: ToldRun,
    request: Request,
    looked: Looked,
    location: str | None,
    evaluated_on: Entry,
    log_file: Path | None,
) -> dict[str, Any]:
    """Serve what is published, have the gate decide about it, and copy it to where it is asked for.

    Returns:
        ``checkpoint``, where it lies now, ``launch``, ``served``, ``uploaded``, ``mlflow``, and as
        ``gate`` what was decided, None as long as it is not.
    """
    identity = work_identity(job, request.output)
    published = (identity, looked.report, location, evaluated_on)
    offered = partial(action(offer, name="gate"), job, run, *published, output=request.output)

    def concluded(served: Mapping[str, Any]) -> None:
        look(job, run, looked, served)
        offered(served)

    served = serve(job, run, location, concluded)
    # before the upload: one that fails leaves what was measured, served and decided
    concluded(served)
    run.set_tags(served_tags(served))
    location, in_place = settled(run, location, request.output)
    copied = uploaded(run, location, request.upload) if in_place else None
    action(register)(run, looked.report, location, served, log_file)
    done = "measured" if location is None else f"published {location}"
    log.info("%s: %s", done, summary(looked.report["metrics"]))
    mlflow, decided = told(run), run.decision
    if in_place is None and decided is not None:
        # the gate decided while the end was told
        location, in_place = settled(run, location, request.output)
        run.set_tags({"checkpoint": str(location)})
        if in_place:
            log.info("%s: it lies there now", location)
            copied = uploaded(run, location, request.upload)
        mlflow = told(run)
    return {
        "checkpoint": location,
        "launch": None if location is None else launch_line(Path(location), looked.report),
        "served": served,
        "uploaded": copied,
        "mlflow": mlflow,
        "gate": decided,
    }


def _outside_aside(job: Job) -> AbstractContextManager[Aside | None]:
    """Have what is outside of the blocks written while a GPU computes, if no step rotates it."""
    return made_aside(job, outside) if job.on_gpu and not job.recipe.rotated else nullcontext()


def _products(
    job: Job, course: Course, state: State, beside: str, sets: Mapping[str, Entry]
) -> dict[str, Product]:
    """Assemble and measure what is to be published; ``beside`` is outside of the blocks."""
    products: dict[str, Product] = {}
    if job.quantizes:
        packed = tuple(p.key for p in state.packed)
        exported = course.run(export, job, packed, beside, state.version).entry
        products[QUANTIZED] = _measured(job, course, exported, _digests(job, state.quantized), sets)
    if job.recipe.save.save_trans:
        kept = _transformed_blocks(job, course, state)
        exported = course.run(export_transformed, job, kept, beside, state.version).entry
        products[TRANSFORMED] = _measured(job, course, exported, None, sets)
    return products


def _measured(
    job: Job,
    course: Course,
    exported: Entry,
    digests: Mapping[str, str] | None,
    sets: Mapping[str, Entry],
) -> Product:
    """Reopen a checkpoint, verify it and measure it."""
    verified = course.run(verify, job, exported.key, digests)
    evaluated = course.run(evaluate, job, exported.key, sets["evaluation"].key, job.evaluation)
    return Product(exported, verified.entry, evaluated.entry)


def _transformed_blocks(job: Job, course: Course, state: State) -> tuple[str, ...]:
    """Keys of the blocks before rounding, as the steps left them."""
    clips = state.clipped or (None,) * len(job.blocks)
    return tuple(
        course.run(transformed, job, state.version, clips[block], block=block).key
        for block in job.blocks
    )


def _digests(job: Job, quantized: Sequence[Result]) -> dict[str, str]:
    return {
        plan.prefix + name: linear["digest"]
        for plan, result in zip(job.plan.blocks, quantized, strict=True)
        for name, linear in result.value["linears"].items()
    }
