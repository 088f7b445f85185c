"""The flow: a recipe and a checkpoint in, a measured checkpoint for SGLang out."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from tasks.engine.streams import Stream, drop_boundaries, start_stream
from tasks.engine.tracking import Run, flatten, open_run
from tasks.evaluate import evaluate, summary
from tasks.evaluation_set import evaluation_set
from tasks.export import export
from tasks.load_model import load_model
from tasks.pack import pack
from tasks.publish import launch_line, model_card, publish
from tasks.quantize import Origin, quantize
from tasks.register import block_points, error_rows, register
from tasks.report import make_report
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
    course, step = Course(), job.steps[-1]
    described = course.run(load_model, job)
    reporter().plan(described.value["blocks"])
    sets: dict[str, Entry] = {}
    stream = None
    # before the blocks: a text that cannot be had is better found now
    sets["evaluation"] = course.run(evaluation_set, job, job.evaluation).entry
    if step.calib is not None:
        sets["calibration"] = course.run(calibration_set, job, step.calib).entry
        found = sets["calibration"].value["windows"]
        if found < step.calib.n_samples:
            log.warning("calib: the text gives %d of %d samples", found, step.calib.n_samples)
        stream = start_stream(job, sets["calibration"].key)
    quantized, packed, decided = _blocks(job, run, course, step, stream)
    exported = course.run(export, job, tuple(p.key for p in packed))
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


def _blocks(
    job: Job, run: Run, course: Course, step: ResolvedStep, stream: Stream | None
) -> tuple[list[Result], list[Result], list[Result]]:
    """Take every block through its steps; those that the method does not have are left out.

    Returns:
        what was quantized, packed and decided.
    """
    quantized: list[Result] = []
    packed: list[Result] = []
    decided: list[Result] = []
    for block in job.blocks:
        decision = clipped = None
        if stream is not None and has_transform(step.quant):
            decided.append(course.run(transform, job, step, stream, block=block))
            decision = decided[-1].key
        if stream is not None and has_clip(step.quant):
            decided.append(course.run(clip, job, step, stream, decision, block=block))
            clipped = decided[-1].key
        origin = Origin(step, stream, decision, clipped)
        codes = course.run(quantize, job, origin, block=block)
        shard = course.run(pack, job, origin, block=block)
        run.log_points(block_points(block, codes.entry))
        quantized.append(codes)
        packed.append(shard)
        if stream is not None and block + 1 < len(job.blocks):
            through = shard.key if step.quant.quant_out else None
            passed = course.run(advance, job, stream, through, block=block)
            stream = stream.after(passed.key, through)
        reporter().block_done(block)
    if stream is not None:
        drop_boundaries(job, stream)
    job.memo.clear()
    return quantized, packed, decided


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
