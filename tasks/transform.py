"""Decide a block's channel transforms from the statistics of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from configs.fields import effective
from configs.schema import Quant, ResolvedStep
from configs.special_keys import AwqSpecial, SmoothQuantSpecial
from configs.vocabulary import ActAlgorithm, Method, TransVersion
from quantizers import awq, os_plus
from quantizers.awq import AwqVersion, ImportanceMeasure
from quantizers.channel_transform import ChannelTransform
from quantizers.input_scales import InputRange
from quantizers.output_error import GroupProblem
from quantizers.smoothquant import smoothing_scale
from quantizers.statistics import InputStatistics
from tasks.engine.architectures import LinearGroup
from tasks.engine.collect import block_statistics
from tasks.engine.export_format import export_dtype
from tasks.engine.folding import (
    apply_transforms,
    from_tensors,
    head_dim,
    is_norm,
    quantized_groups,
    realizer,
    shares_heads,
    shift_of,
    to_tensors,
)
from tasks.engine.job import Job, activation_lineage, scheme_lineage
from tasks.engine.precision import search_products
from tasks.engine.step import step
from tasks.engine.store import Draft, load_tensors
from tasks.engine.streams import Stream, require

DECISION = "transform.safetensors"
_RANGES = {
    None: InputRange.MINMAX,
    ActAlgorithm.MINMAX: InputRange.MINMAX,
    ActAlgorithm.STATIC_MINMAX: InputRange.WINDOW_MEAN,
    ActAlgorithm.STATIC_PERCENTILE: InputRange.PERCENTILE,
}
_CLIP_KEYS = ("trans", "weight_clip", "clip_query_key", "clip_steps", "clip_shrink")

Trials = list[dict[str, Any]]
Decide = Callable[
    [Job, Quant, int, LinearGroup, InputStatistics], tuple[ChannelTransform, Trials] | None
]


def has_transform(quant: Quant) -> bool:
    """Whether the method changes weights before they are rounded."""
    trans = not isinstance(quant.special, AwqSpecial) or quant.special.trans
    return quant.method in _METHODS and trans


def _depends_on(job: Job, recipe_step: ResolvedStep, stream: Stream, block: int) -> dict[str, Any]:
    quant = recipe_step.quant
    special = {k: v for k, v in effective(quant.special).items() if k not in _CLIP_KEYS}
    searched = quant.method in (Method.AWQ, Method.OSPLUS)
    return {
        "method": str(quant.method),
        "special": special,
        "scheme": scheme_lineage(job) if searched else None,
        "activations": activation_lineage(job) if searched else None,
        "linears": list(job.plan.blocks[block].quantized),
        "dtype": str(export_dtype(job.dtype)),
        "stream": stream.key,
        "weights": job.block_digest(block),
        "config": dict(job.source.config),
    }


@step(depends_on=_depends_on, tags=("search",))
def transform(
    job: Job, draft: Draft, recipe_step: ResolvedStep, stream: Stream, block: int
) -> dict[str, Any]:
    """Decide a block's transforms: per group of linears, float32 scales (K,) and maybe shifts.

    The value holds, per group, the largest input and everything that the search tried.
    """
    statistics = block_statistics(job, stream, block)
    decide = _METHODS[recipe_step.quant.method]
    decided, tried = {}, {}
    for group in quantized_groups(job, block):
        with search_products(job.device):
            found = decide(job, recipe_step.quant, block, group, statistics[group.name])
        if found is not None:
            decided[group.name], tried[group.name] = found
    draft.save_tensors(DECISION, to_tensors(decided))
    return {
        "tokens": next(iter(statistics.values())).tokens,
        "absmax": {name: float(found.absmax.max()) for name, found in statistics.items()},
        "search": tried,
    }


def group_problem(
    job: Job, quant: Quant, block: int, group: LinearGroup, statistics: InputStatistics
) -> GroupProblem:
    """A group's linears and inputs, and how both are quantized."""
    tensors = job.read_block(block)
    act = quant.act
    return GroupProblem(
        [tensors[f"{linear}.weight"] for linear in group.linears],
        statistics,
        job.scheme.weight,
        job.scheme.activation,
        _RANGES[act.calib_algo] if act is not None and act.static else InputRange.MINMAX,
        act.percentile if act is not None else 100.0,
    )


def block_transforms(job: Job, decision: str | None) -> Mapping[str, ChannelTransform]:
    """The transforms of a block that were decided, by the names of groups."""
    if decision is None:
        return {}
    return from_tensors(load_tensors(require(job, decision).file(DECISION), job.device))


def transformed_block(job: Job, block: int, decision: str | None) -> Mapping[str, Tensor]:
    """A block's tensors after its transforms, by their names in it; as stored without any."""
    tensors = job.read_block(block)
    if decision is None:
        return tensors

    def compute() -> dict[str, Tensor]:
        transforms = block_transforms(job, decision)
        architecture, dtype = job.plan.architecture, export_dtype(job.dtype)
        return apply_transforms(tensors, transforms, architecture, head_dim(job), dtype)

    return job.memo.get("transformed block", f"{decision} {block}", compute)


def no_transform(statistics: InputStatistics) -> ChannelTransform:
    """The transform that changes nothing."""
    return ChannelTransform(torch.ones_like(statistics.total))


def _identity(
    job: Job, quant: Quant, block: int, group: LinearGroup, statistics: InputStatistics
) -> tuple[ChannelTransform, Trials]:
    del job, quant, block, group
    return no_transform(statistics), []


def _awq(
    job: Job, quant: Quant, block: int, group: LinearGroup, statistics: InputStatistics
) -> tuple[ChannelTransform, Trials] | None:
    special = quant.special
    assert isinstance(special, AwqSpecial)
    fed_by_linear = not is_norm(job.plan.architecture, group)
    if fed_by_linear and not special.do_gqa_trans and shares_heads(group, job.read_block(block)):
        return None
    both = special.trans_version is TransVersion.BEST
    found, trials = awq.search(
        group_problem(job, quant, block, group, statistics),
        realizer(job, block, group),
        versions=tuple(AwqVersion) if both else (AwqVersion(special.trans_version.value),),
        measure=ImportanceMeasure(special.importance.value),
        ratios=special.ratios,
        refine=special.refine,
    )
    return found, [asdict(trial) for trial in trials]


def _smoothquant(
    job: Job, quant: Quant, block: int, group: LinearGroup, statistics: InputStatistics
) -> tuple[ChannelTransform, Trials] | None:
    special = quant.special
    assert isinstance(special, SmoothQuantSpecial)
    if not is_norm(job.plan.architecture, group):
        return None
    weights = group_problem(job, quant, block, group, statistics).weights
    scale = smoothing_scale(statistics.absmax, weights, special.alpha)
    return ChannelTransform(realizer(job, block, group)(scale)), []


def _os_plus(
    job: Job, quant: Quant, block: int, group: LinearGroup, statistics: InputStatistics
) -> tuple[ChannelTransform, Trials]:
    found, trials = os_plus.search(
        group_problem(job, quant, block, group, statistics),
        realizer(job, block, group, how="max"),
        shift=shift_of(job, block, group, os_plus.middle(statistics)),
    )
    return found, [asdict(trial) for trial in trials]


_METHODS: Mapping[Method, Decide] = {
    Method.IDENTITY: _identity,
    Method.AWQ: _awq,
    Method.SMOOTHQUANT: _smoothquant,
    Method.OSPLUS: _os_plus,
}
