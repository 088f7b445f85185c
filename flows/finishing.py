"""What a flow does with a measured checkpoint: publish it, show it, serve it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State as PrefectState

from flows.course import Course
from tasks.check import Request
from tasks.engine.job import Job
from tasks.engine.journal import ToldRun
from tasks.engine.publication import work_identity
from tasks.engine.registry import is_champions
from tasks.engine.served_windows import WINDOWS, served_windows
from tasks.engine.settings import new_log
from tasks.engine.step import action
from tasks.engine.store import Entry
from tasks.engine.task_list import MISSING, is_installed
from tasks.engine.windows import read_tokens
from tasks.evaluate import read_token_nll
from tasks.gate import failed_serving
from tasks.looks.log_looks import Looked, log_looks
from tasks.publish import QUANTIZED, TRANSFORMED, model_card, publish
from tasks.register import error_rows, log_scores, tell_failure
from tasks.report import Product
from tasks.sample_text import sample_text
from tasks.smoke_test import smoke_test
from tasks.task_scores import score_metrics, task_scores
from tasks.upload import upload

log = logging.getLogger("blockquant")


def publish_products(
    job: Job,
    run: ToldRun,
    request: Request,
    products: Mapping[str, Product],
    report: Mapping[str, Any],
    evaluated_on: Entry,
) -> str | None:
    """Publish what is asked for; where, or None for a run that only measures.

    What would replace a champion lies beside it until the gate has decided.
    """
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
    replaces = save.save_sgl and job.recipe.gate.registry and output.exists()
    waits = replaces and (run.away is not None or is_champions(run.settings, output))
    location: str = action(publish)(
        job.store, identity, entries, report, output, request.overwrite, windows, waits
    )
    if waits and location != str(output):
        log.info("%s: waits there for the gate, as %s may be a champion", location, output)
    return location


def settled(
    run: ToldRun, location: str | None, output: Path | None
) -> tuple[str | None, bool | None]:
    """Where a checkpoint lies once the gate has decided, and whether that is its output.

    One that waits beside the output stays there where it is refused, and as long as it is not
    decided about: whether it lies at its output is None then.
    """
    if location is None or location == str(output):
        return location, location is not None
    run.flush()
    decided = run.decision
    if decided is None:
        log.warning("%s: waits there until MLflow answers and the gate decides", location)
        return location, None
    place = str(decided["location"])
    if place != str(output):
        log.warning("%s: stays there, and %s as it was: %s", place, output, decided["gate"])
    return place, place == str(output)


def serve(
    job: Job,
    run: ToldRun,
    location: str | None,
    concluded: Callable[[Mapping[str, Any]], None],
) -> dict[str, Any]:
    """Try the published checkpoint on a real server; what came of it, or why there was none.

    One that is not served as measured is ``concluded`` with that: shown, and registered, but not
    accepted.
    """
    serving = job.recipe.serving
    if not serving.smoke_test:
        return {"served": False, "reason": "serving.smoke_test is false"}
    if location is None or not job.recipe.save.save_sgl:
        return {"served": False, "reason": "no quantized checkpoint is published"}
    if not (Path(location) / WINDOWS).is_file():
        return {"served": False, "reason": "no evaluation windows are published to compare with"}
    # a server takes the memory that it finds free
    job.clear()
    log_file = new_log(job.store.root, "server-")
    try:
        outcome = action(smoke_test)(Path(location), serving, job.device, log_file, job.source.path)
    except Exception as error:
        tell_failure(run, error)
        concluded(failed_serving(error))
        raise
    finally:
        for kept in sorted(log_file.parent.glob(f"{log_file.stem}*")):
            run.log_file(kept)
    # skipped is a state of its own, whose data is what the task found
    served: dict[str, Any] = outcome.result() if isinstance(outcome, PrefectState) else outcome
    if not served["served"]:
        log.warning("not served: %s", served["reason"])
    return served


def uploaded(run: ToldRun, location: str | None, url: str | None) -> dict[str, Any] | None:
    """Copy the published folder to where it is asked for; None where it is not."""
    if location is None or url is None:
        return None
    found: dict[str, Any] = action(upload)(Path(location), url)
    run.set_tags({"uploaded": url})
    return found


def show(job: Job, report: dict[str, Any], blocks: Sequence[Entry]) -> None:
    """Leave the errors and the model card as artifacts in Prefect."""
    if blocks:
        create_table_artifact(
            table=error_rows(blocks), key="linear-errors", description=job.source.name
        )
    create_markdown_artifact(markdown=model_card(report), key="model-card")


def look(job: Job, run: ToldRun, looked: Looked, served: Mapping[str, Any]) -> None:
    """Leave pictures and a page of what was measured in MLflow, unless the recipe wants none."""
    if job.evaluation.report:
        action(log_looks)(job.store, run, looked, served)


def scored(
    job: Job, run: ToldRun, course: Course, products: Mapping[str, Product]
) -> dict[str, float]:
    """Scores of the tasks that the recipe asks for, told to MLflow; else it is told why not."""
    section = job.evaluation
    if not section.lm_eval.tasks:
        return {}
    if not is_installed():
        log.warning("no tasks are scored: %s", MISSING)
        log_scores(run, None, MISSING)
        return {}
    exported = next(iter(products.values())).exported.key
    found = course.run(task_scores, job, exported, section)
    log_scores(run, found.entry, "")
    return score_metrics(found.value)


def sample(
    job: Job, course: Course, products: Mapping[str, Product], evaluated_on: Entry
) -> dict[str, Any] | None:
    """Text that source and checkpoint write, None where the recipe asks for none."""
    section = job.evaluation
    if not section.report or not section.sample_tokens:
        return None
    exported = next(iter(products.values())).exported.key
    return course.run(sample_text, job, exported, evaluated_on.key, section).value
