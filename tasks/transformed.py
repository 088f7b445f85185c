"""Write a block before rounding: rotated and transformed, its ranges clipped, not quantized."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from quantizers.clipping import clamp_to_range
from tasks.clip import block_clip
from tasks.engine.draft import Draft
from tasks.engine.export_format import export_dtype
from tasks.engine.job import Job, scheme_lineage
from tasks.engine.step import step
from tasks.engine.version import Version, version_block
from tasks.pack import save_shards, untouched


def _depends_on(job: Job, version: Version, clipped: str | None, block: int) -> dict[str, Any]:
    return {
        "weights": version.lineage(job, block),
        "clip": None if clipped is None else [clipped, scheme_lineage(job)],
        "dtype": str(export_dtype(job.dtype)),
    }


@step(depends_on=_depends_on)
def transformed(
    job: Job, draft: Draft, version: Version, clipped: str | None, block: int
) -> dict[str, Any]:
    """Write a block's tensors as a version leaves them, linears within their clipped ranges."""
    prefix, scheme = job.plan.blocks[block].prefix, job.scheme.weight
    clips = block_clip(job, clipped)
    kept: dict[str, Tensor] = {}
    for name, tensor in version_block(job, version, block).items():
        clip = clips.get(name.removesuffix(".weight"))
        within = tensor if clip is None else clamp_to_range(tensor, scheme, clip)
        kept[prefix + name] = untouched(within, job)
    return save_shards(draft, kept)
