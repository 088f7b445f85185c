"""The flow: a recipe and a checkpoint in, a measured checkpoint for SGLang out."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State as PrefectState
from prefect.runtime import flow_run

from configs.loading import ineffective_keys, load_recipe
from configs.schemes import scheme_name
from flows.course import Course
from flows.progress import reporter
from flows.steps import State, apply, calibration, passes
from tasks.check import Request, check, output_folder
from tasks.engine.job import Job
from tasks.engine.journal import ToldRun, told, told_run
from tasks.engine.publication import alone, begun, end, work_identity
from tasks.engine.served_windows import WINDOWS, served_windows
from tasks.engine.settings import settings
from tasks.engine.step import Result, action
from tasks.engine.store import Entry
from tasks.engine.tracking import flatten
from tasks.engine.windows import read_tokens
from tasks.evaluate import evaluate, read_token_nll, summary
from tasks.evaluation_set import evaluation_set
from tasks.export import export, export_transformed
from tasks.load_model import load_model
from tasks.publish import QUANTIZED, TRANSFORMED, launch_line, model_card, publish
from tasks.register import error_rows, register, tell_failure
from tasks.report import Product, make_report
from tasks.smoke_test import smoke_test
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
        Where the checkpoint lies if it is published, its metrics, the MLflow run, and which steps
        were found.
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
    identity = work_identity(job, request.output)
    with alone(job.store, request.output or identity), told_run(place, identity) as run:
        _open_run(job, run, request)
        kept = Path(log_file) if log_file else None
        with _failure_kept(run, kept):
            result = _quantize(job, run, request, kept)
            # after MLflow was told: killed before, the same command goes on
            result["mlflow"] = told(run)
            if request.output is not None:
                end(job.store.root, request.output)
            return result


def _quantize(job: Job, run: ToldRun, request: Request, log_file: Path | None) -> dict[str, Any]:
    course = Course()
    described = course.run(load_model, job)
    reporter().plan(described.value["blocks"] * sum(passes(job)))
    sets: dict[str, Entry] = {}
    # before the blocks: a text that cannot be had is better found now
    sets["evaluation"] = course.run(evaluation_set, job, job.evaluation).entry
    calibrated = [calibration(job, course, step, sets) for step in job.steps]
    state = State()
    for step, tokens in zip(job.steps, calibrated, strict=True):
        state = apply(job, run, course, step, tokens, state)
    products: dict[str, Product] = {}
    if job.quantizes:
        packed = tuple(p.key for p in state.packed)
        exported = course.run(export, job, packed, state.version).entry
        products[QUANTIZED] = _measured(job, course, exported, _digests(job, state.quantized), sets)
    if job.recipe.save.save_trans:
        kept = _transformed_blocks(job, course, state)
        exported = course.run(export_transformed, job, kept, state.version).entry
        products[TRANSFORMED] = _measured(job, course, exported, None, sets)
    blocks = [q.entry for q in state.quantized] if job.quantizes else []
    report = make_report(job, blocks, products, sets)
    location = _publish(job, request, products, report, sets["evaluation"])
    _show(job, report, blocks)
    served = _serve(job, run, location)
    found = [d.entry for d in state.decided]
    action(register)(
        run, report, blocks, found, sets, location, dict(course.seconds), served, log_file
    )
    done = "measured" if location is None else f"published {location}"
    log.info("%s: %s", done, summary(report["metrics"]))
    return {
        "checkpoint": location,
        "metrics": report["metrics"],
        "bytes": report["bytes"],
        "scheme": report["scheme"],
        "seconds": {name: round(s, 3) for name, s in course.seconds.items()},
        "steps": course.steps,
        "launch": None if location is None else launch_line(Path(location), report),
        "unserved": report["unserved"],
        "served": served,
    }


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


def _serve(job: Job, run: ToldRun, location: str | None) -> dict[str, Any]:
    """Try the published checkpoint on a real server; what came of it, or why there was none."""
    serving = job.recipe.serving
    if not serving.smoke_test:
        return {"served": False, "reason": "serving.smoke_test is false"}
    if location is None or not job.recipe.save.save_sgl:
        return {"served": False, "reason": "no quantized checkpoint is published"}
    if not (Path(location) / WINDOWS).is_file():
        return {"served": False, "reason": "no evaluation windows are published to compare with"}
    # a server takes the memory that it finds free
    job.memo.clear()
    log_file = (
        job.store.root / "logs" / f"server-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    )
    try:
        outcome = action(smoke_test)(Path(location), serving, job.device, log_file, job.source.path)
    except Exception as error:
        tell_failure(run, error)
        raise
    finally:
        for kept in sorted(log_file.parent.glob(f"{log_file.stem}*")):
            run.log_file(kept)
    # skipped is a state of its own, whose data is what the task found
    served: dict[str, Any] = outcome.result() if isinstance(outcome, PrefectState) else outcome
    if not served["served"]:
        log.warning("not served: %s", served["reason"])
    return served


def _publish(
    job: Job,
    request: Request,
    products: Mapping[str, Product],
    report: Mapping[str, Any],
    evaluated_on: Entry,
) -> str | None:
    """Publish what is asked for; where, or None for a run that only measures."""
    save, output = job.recipe.save, request.output
    asked = {QUANTIZED: save.save_sgl, TRANSFORMED: save.save_trans}
    entries = {folder: p.exported for folder, p in products.items() if asked[folder]}
    if not entries or output is None:
        return None
    identity = work_identity(job, output)
    windows = None
    if save.save_sgl:
        windows = served_windows(
            read_tokens(evaluated_on),
            read_token_nll(products[QUANTIZED].evaluated),
            job.recipe.serving.windows,
            job.source.config.get("max_position_embeddings"),
        )
    location: str = action(publish)(
        job.store, identity, entries, report, output, request.overwrite, windows
    )
    return location


def _digests(job: Job, quantized: Sequence[Result]) -> dict[str, str]:
    return {
        plan.prefix + name: linear["digest"]
        for plan, result in zip(job.plan.blocks, quantized, strict=True)
        for name, linear in result.value["linears"].items()
    }


def _open_run(job: Job, run: ToldRun, request: Request) -> None:
    identity = work_identity(job, request.output)
    parameters = flatten(job.recipe.model_dump(mode="json")) | {
        "source": str(job.source.path),
        "output": str(request.output or "none"),
    }
    # a resumed run may go on elsewhere, and a parameter cannot change
    tags = {
        "device": job.device,
        "blockquant.version": version("blockquant"),
        "prefect.flow_run": str(flow_run.id or ""),
        **{f"version.{k}": v for k, v in job.fingerprint.items()},
    }
    name = f"{job.source.name} {scheme_name(job.steps[-1].quant)}"
    output = request.output
    published = output is not None and begun(job.store.root, output) == identity
    run.open(identity, name, parameters, tags, even_finished=published)
    # at once: a run that fails is to say of what recipe
    run.log_text(yaml.safe_dump(job.recipe.canonical(), sort_keys=False), "recipe.yml")


@contextmanager
def _failure_kept(run: ToldRun, log_file: Path | None = None) -> Any:
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
            log.warning("MLflow is not told of the failure: %s", type(unsaid).__name__)
        raise


def _show(job: Job, report: dict[str, Any], blocks: Sequence[Entry]) -> None:
    """Leave the errors and the model card as artifacts in Prefect."""
    if blocks:
        create_table_artifact(
            table=error_rows(blocks), key="linear-errors", description=job.source.name
        )
    create_markdown_artifact(markdown=model_card(report), key="model-card")
