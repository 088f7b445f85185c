"""Open the source: describe the model and its blocks from headers, with no weights in memory."""

from __future__ import annotations

from typing import Any

from tasks.engine.draft import Draft
from tasks.engine.job import Job
from tasks.engine.plan import require_fit
from tasks.engine.step import step


def _depends_on(job: Job) -> dict[str, Any]:
    return {
        "config": dict(job.source.config),
        "tensors": {
            name: [str(info.dtype), *info.shape] for name, info in job.source.tensors.items()
        },
        "ignored": list(job.plan.ignored),
    }


@step(depends_on=_depends_on)
def load_model(job: Job, draft: Draft) -> dict[str, Any]:
    """Check that transformers can build every block, and count what there is."""
    del draft
    require_fit(job.source, job.plan, job.decoder)
    sizes = [info.size for info in job.source.tensors.values()]
    shapes = [info.shape for info in job.source.tensors.values()]
    return {
        "architecture": job.plan.architecture.model_type,
        "blocks": len(job.plan.blocks),
        "dtype": str(job.dtype).removeprefix("torch."),
        "parameters": sum(_count(shape) for shape in shapes),
        "bytes": sum(sizes),
        "linears": sum(len(block.quantized) for block in job.plan.blocks),
        "ignored": list(job.plan.ignored),
        "tied": job.plan.tied,
    }


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count
