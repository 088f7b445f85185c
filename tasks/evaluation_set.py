"""Turn the recipe's evaluation text into token windows."""

from __future__ import annotations

from typing import Any

from configs.schema import Evaluation
from tasks.engine.draft import Draft
from tasks.engine.job import Job
from tasks.engine.step import step
from tasks.engine.windows import save_windows, window_lineage


def _depends_on(job: Job, section: Evaluation) -> dict[str, Any]:
    return window_lineage(job, section)


@step(depends_on=_depends_on)
def evaluation_set(job: Job, draft: Draft, section: Evaluation) -> dict[str, Any]:
    """Cut text into token windows: ``tokens`` int32 (W, T)."""
    return save_windows(job, draft, section)
