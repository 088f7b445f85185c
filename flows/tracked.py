"""The MLflow run of a flow: how it begins, and what it keeps when the flow fails."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from prefect.runtime import flow_run

from configs.schemes import scheme_name
from tasks.check import Request
from tasks.engine.errors import masked
from tasks.engine.job import Job
from tasks.engine.journal import ToldRun
from tasks.engine.publication import published_by, source_state, work_identity
from tasks.engine.tracking import flatten

log = logging.getLogger("blockquant")


def open_tracked(
    job: Job, run: ToldRun, request: Request, parent: str | None = None, name: str | None = None
) -> None:
    """Open the run with what the recipe decides, or go on in the one that was not finished.

    A part of the work ``parent`` goes on in its own run there even if that was finished.
    """
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
    named = name or f"{job.source.name} {scheme_name(job.steps[-1].quant)}"
    output = request.output
    published = output is not None and published_by(job, output)
    again = published or parent is not None
    source = source_state(job.source)
    run.open(identity, named, parameters, tags, even_finished=again, parent=parent, source=source)
    # at once: a run that fails is to say of what recipe
    run.log_text(yaml.safe_dump(job.recipe.canonical(), sort_keys=False), "recipe.yml")


@contextmanager
def failure_kept(run: ToldRun, log_file: Path | None = None) -> Any:
    """Keep a failed run as failed, with its reason and its log."""
    try:
        yield
    except BaseException as error:
        log.debug("failed", exc_info=error)
        try:
            if log_file is not None and log_file.is_file():
                run.log_file(log_file)
            run.fail(masked(f"{type(error).__name__}: {error}"))
        except Exception as unsaid:
            log.warning("MLflow is not told of the failure: %s", type(unsaid).__name__)
        raise
