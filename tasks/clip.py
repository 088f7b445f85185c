"""Decide how far the range of each row and group of a block's weights is clipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from configs.schema import Quant, ResolvedStep
from configs.special_keys import AwqSpecial, GptqSpecial
from configs.vocabulary import WeightAlgorithm
from quantizers.channel_transform import (
    ChannelTransform,
    transformed_gram,
    transformed_gram_blocks,
)
from quantizers.clipping import range_factors, search_clip
from quantizers.rounding import ClipRange
from quantizers.schemes import Granularity
from quantizers.statistics import InputStatistics
from tasks.engine.architectures import Architecture, LinearGroup
from tasks.engine.collect import block_statistics
from tasks.engine.draft import Draft
from tasks.engine.folding import quantized_groups, scaled_together
from tasks.engine.job import Job, result_files, result_tensors, scheme_lineage
from tasks.engine.memo import Memo
from tasks.engine.precision import search_products
from tasks.engine.sharing import clips_of_all
from tasks.engine.step import step
from tasks.engine.streams import Stream
from tasks.engine.version import block_transforms, transformed_block
from tasks.transform import no_transform

CLIP = "clip.safetensors"
FACTORS = "factors"
LEARNED = "learned.safetensors"
# LLMC's grid for calib_algo mse: a hundred steps, of which eighty are walked
MSE_STEPS, MSE_SHRINK = 80, 0.8


def _depends_on(
    job: Job, recipe_step: ResolvedStep, stream: Stream, decision: str | None, block: int
) -> dict[str, Any]:
    special = recipe_step.quant.special
    assert isinstance(special, AwqSpecial | GptqSpecial)
    return {
        "steps": special.clip_steps,
        "shrink": special.clip_shrink,
        "query and key": special.clip_query_key,
        "scheme": scheme_lineage(job),
        "linears": list(job.plan.blocks[block].quantized),
        "transform": decision,
        "stream": stream.key,
        "weights": stream.version.lineage(job, block),
        "config": dict(job.source.config),
    }


@step(depends_on=_depends_on, kept=True)
def clip(
    job: Job,
    draft: Draft,
    recipe_step: ResolvedStep,
    stream: Stream,
    decision: str | None,
    block: int,
) -> dict[str, Any]:
    """Search clip factors: per linear, the number of a factor for each of its scales.

    The value holds, per linear, how many scales took each factor, and the mean squared output
    error if all had taken it; where a scale is shared, that of all who share it.
    """
    special = recipe_step.quant.special
    assert isinstance(special, AwqSpecial | GptqSpecial)
    codes = job.scheme.weight.number_format
    known = range_factors(codes, special.clip_steps, special.clip_shrink)
    # on the device once for all blocks, which wait for no copy
    factors = job.memo.get("clip factors", str(known.tolist()), lambda: known.to(job.device))
    statistics = block_statistics(job, stream, block)
    transforms = block_transforms(job, decision)
    tensors = transformed_block(job, block, decision, stream.version)

    # of wide inputs no two matrices at once
    grams = Memo()

    def gram_of(group: str) -> Tensor:
        transform = transforms.get(group) or no_transform(statistics[group])
        return grams.get("gram", group, lambda: _gram(job, statistics[group], transform))

    asked: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {}
    sharers: dict[str, tuple[str, ...]] = {}
    for group in quantized_groups(job, block):
        linears = clipped_linears(job, group, special.clip_query_key)
        for part in scaled_together(job, linears):
            # linears of one scale have one factor too
            asked[part[0]] = partial(stacked, tensors, part), partial(gram_of, group.name)
            sharers[part[0]] = part
    with search_products(job.device):
        found = clips_of_all(job.team, job.scheme.weight, asked, factors)
    chosen = {linear: found[first][0] for first, part in sharers.items() for linear in part}
    errors = {linear: found[first][1] for first, part in sharers.items() for linear in part}
    draft.save_tensors(CLIP, {n: t.clone() for n, t in chosen.items()} | {FACTORS: factors})
    numbers = torch.arange(len(factors), device=job.device)[:, None]
    counts = {linear: (found.reshape(1, -1) == numbers).sum(1) for linear, found in chosen.items()}
    return {"factors": known.tolist(), "chosen": counts, "errors": errors}


def stacked(tensors: Mapping[str, Tensor], linears: Sequence[str]) -> Tensor:
    """The weights of some linears, one below the other; of one its own."""
    weights = [tensors[f"{linear}.weight"] for linear in linears]
    return torch.cat(weights) if weights[1:] else weights[0]


def _gram(job: Job, found: InputStatistics, transform: ChannelTransform) -> Tensor:
    """Of a Gram matrix of transformed inputs, what is read of it."""
    scheme, columns = job.scheme.weight, len(transform.scale)
    width = scheme.width(columns)
    if scheme.granularity is Granularity.GROUP and columns % width == 0:
        return transformed_gram_blocks(found, transform, width)
    return transformed_gram(found, transform)


def rounding_ranges(
    job: Job, quant: Quant, block: int, tensors: Mapping[str, Tensor], clipped: str | None
) -> Mapping[str, ClipRange]:
    """Factors on the ranges that a block's scales come from, in the shape of the scales.

    Those that were decided; for other linears, with calib_algo mse, those with the least squared
    error of the weight. A linear without has its own extremes.
    """
    decided = block_clip(job, clipped)
    if quant.weight.calib_algo is not WeightAlgorithm.MSE:
        return decided
    found = dict(decided)
    scheme = job.scheme.weight
    factors = range_factors(scheme.number_format, MSE_STEPS, MSE_SHRINK).to(job.device)
    for group in quantized_groups(job, block):
        free = [linear for linear in group.linears if linear not in decided]
        weights = [tensors[f"{linear}.weight"] for linear in free]
        if scheme.granularity is Granularity.TENSOR and len(free) == len(group.linears):
            shared = factors[search_clip(torch.cat(weights), None, scheme, factors).int()]
            found |= dict.fromkeys(free, (shared, shared))
        elif scheme.granularity is not Granularity.TENSOR:
            for linear, weight in zip(free, weights, strict=True):
                best = factors[search_clip(weight, None, scheme, factors).int()]
                found[linear] = (best, best)
    return found


def clipped_linears(job: Job, group: LinearGroup, query_and_key: bool) -> tuple[str, ...]:
    """The linears of a group that are clipped.

    Query and key are left out unless asked for, as their products go through a softmax; with one
    scale for a whole group, all of it is.
    """
    kept = _query_and_key(job.plan.architecture) if not query_and_key else set()
    linears = tuple(linear for linear in group.linears if linear not in kept)
    shared = job.scheme.weight.granularity is Granularity.TENSOR
    return () if shared and len(linears) != len(group.linears) else linears


def _query_and_key(architecture: Architecture) -> set[str]:
    return {architecture.query, architecture.key}


def block_clip(job: Job, clipped: str | None) -> Mapping[str, ClipRange]:
    """Factors on both ends of the ranges of a block's linears, searched or learned.

    Float32, in the shape of their scales.
    """
    if clipped is None:
        return {}
    if LEARNED in result_files(job, clipped):
        learned = result_tensors(job, clipped, LEARNED)
        names = [name.removesuffix(".low") for name in learned if name.endswith(".low")]
        return {name: (learned[f"{name}.low"], learned[f"{name}.high"]) for name in names}
    tensors = dict(result_tensors(job, clipped, CLIP))
    factors = tensors.pop(FACTORS)
    searched = {linear: factors[numbers.int()] for linear, numbers in tensors.items()}
    return {linear: (both, both) for linear, both in searched.items()}
