"""Write a quantized block as it will be exported: codes packed, other tensors as they are."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tasks.engine.draft import Draft
from tasks.engine.export_format import compress, export_dtype
from tasks.engine.job import Job
from tasks.engine.step import step
from tasks.engine.version import transformed_block
from tasks.quantize import Origin, block_codes, block_input_scales, quantize

# no file of an export is larger
LARGEST_SHARD = 5 * 10**9


def _depends_on(job: Job, origin: Origin, block: int) -> dict[str, Any]:
    return {
        "codes": quantize.key(job, origin, block=block),
        "format": job.scheme.format,
        "dtype": str(export_dtype(job.dtype)),
    }


@step(depends_on=_depends_on, code=("quantizers.packing",), kept=True)
def pack(job: Job, draft: Draft, origin: Origin, block: int) -> dict[str, Any]:
    """Write a block's exported tensors into shards of at most 5 GB."""
    plan = job.plan.blocks[block]
    codes = block_codes(job, origin, block)
    scales = block_input_scales(job, origin, block)
    packed: dict[str, Tensor] = {}
    tensors = transformed_block(job, block, origin.decision, origin.version)
    for name in tensors:
        linear, _, ending = name.rpartition(".")
        if linear in codes and ending == "weight":
            # a GPU would be waited for; verify compares every code that is on disk
            given = (codes[linear], job.scheme, scales.get(linear))
            members = compress(*given, check=not job.on_gpu)
            packed |= {f"{plan.prefix}{linear}.{part}": t for part, t in members.items()}
        else:
            packed[plan.prefix + name] = untouched(tensors[name], job)
    return save_shards(draft, packed)


def save_shards(draft: Draft, tensors: dict[str, Tensor], name: str = "block") -> dict[str, Any]:
    """Write tensors into as many files as it takes, called ``name``; how many, and their bytes."""
    shards = split_into_shards(tensors)
    for number, names in enumerate(shards):
        file = f"{name}.safetensors" if len(shards) == 1 else f"{name}-{number}.safetensors"
        draft.save_tensors(file, {n: tensors[n] for n in names}, {"format": "pt"})
    return {"tensors": len(tensors), "bytes": sum(_size(t) for t in tensors.values())}


def untouched(tensor: Tensor, job: Job) -> Tensor:
    """Return a tensor that is exported as it is; a float32 source is exported as bf16."""
    return tensor.to(export_dtype(job.dtype)) if tensor.is_floating_point() else tensor


def split_into_shards(tensors: dict[str, Tensor], largest: int = LARGEST_SHARD) -> list[list[str]]:
    """Distribute tensors, in the order of their names, over shards of at most ``largest`` bytes."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(tensors):
        size = _size(tensors[name])
        if shards[-1] and filled + size > largest:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize
