"""Turn the recipe's calibration text into token windows."""

from __future__ import annotations

from typing import Any

from configs.schema import Calibration
from tasks.engine.draft import Draft
from tasks.engine.job import Job
from tasks.engine.step import step
from tasks.engine.windows import save_windows, window_lineage


def _depends_on(job: Job, section: Calibration) -> dict[str, Any]:
    return window_lineage(job, section)


@step(depends_on=_depends_on)
def calibration_set(job: Job, draft: Draft, section: Calibration) -> dict[str, Any]:
    """Cut text into token windows: ``tokens`` int32 (W, T)."""
    return save_windows(job, draft, section)
