"""Write the tensors outside of the blocks as they are exported: once for all exports of a model."""

from __future__ import annotations

from typing import Any

from tasks.engine.draft import Draft
from tasks.engine.export_format import export_dtype
from tasks.engine.job import Job
from tasks.engine.step import step
from tasks.engine.version import SOURCE, Version, outside_tensors
from tasks.pack import save_shards, untouched


def _depends_on(job: Job, version: Version = SOURCE) -> dict[str, Any]:
    rotated = (
        None if version.rotation is None else [version.rotation, job.plan.architecture.model_type]
    )
    return {
        "outside": [job.source.digest(job.plan.outside), rotated],
        "dtype": str(export_dtype(job.dtype)),
    }


@step(depends_on=_depends_on)
def outside(job: Job, draft: Draft, version: Version = SOURCE) -> dict[str, Any]:
    """Write embedding, final norm and head into shards of at most 5 GB."""
    tensors = outside_tensors(job, version)
    kept = {name: untouched(tensor, job) for name, tensor in tensors.items()}
    return save_shards(draft, kept, "outside")
