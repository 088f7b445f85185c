"""Decide a block's channel transforms from the statistics of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from configs.fields import effective
from configs.schema import Quant, ResolvedStep
from configs.special_keys import CLIP_KEYS, AwqSpecial, SmoothQuantSpecial
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
from tasks.engine.draft import Draft
from tasks.engine.export_format import export_dtype
from tasks.engine.folding import (
    is_norm,
    quantized_groups,
    realizer,
    shares_heads,
    shift_of,
    to_tensors,
)
from tasks.engine.job import Job, activation_lineage, scheme_lineage
from tasks.engine.precision import search_products
from tasks.engine.sharing import errors_of
from tasks.engine.step import step
from tasks.engine.streams import Stream
from tasks.engine.values import Later
from tasks.engine.version import DECISION, version_block

_RANGES = {
    None: InputRange.MINMAX,
    ActAlgorithm.MINMAX: InputRange.MINMAX,
    ActAlgorithm.STATIC_MINMAX: InputRange.WINDOW_MEAN,
    ActAlgorithm.STATIC_PERCENTILE: InputRange.PERCENTILE,
}

Trials = list[dict[str, Any]]
Decision = tuple[ChannelTransform, Trials | Later] | None


@dataclass(frozen=True, eq=False)
class GroupInputs:
    """A group of linears in its block, before any change of this step, and its inputs."""

    block: int
    group: LinearGroup
    tensors: Mapping[str, Tensor]
    statistics: InputStatistics


Decide = Callable[[Job, Quant, GroupInputs], Decision]


def input_lineage(job: Job, quant: Quant) -> Any:
    """What decides how inputs are quantized; of static ones also how their range is found."""
    act, lineage = quant.act, activation_lineage(job)
    if act is None or not act.static:
        return lineage
    return [lineage, str(act.calib_algo), act.percentile]


def _depends_on(job: Job, recipe_step: ResolvedStep, stream: Stream, block: int) -> dict[str, Any]:
    quant = recipe_step.quant
    special = {k: v for k, v in effective(quant.special).items() if k not in ("trans", *CLIP_KEYS)}
    searched = quant.method in (Method.AWQ, Method.OSPLUS)
    return {
        "method": str(quant.method),
        "special": special,
        "scheme": scheme_lineage(job) if searched else None,
        "activations": input_lineage(job, quant) if searched else None,
        "linears": list(job.plan.blocks[block].quantized),
        "dtype": str(export_dtype(job.dtype)),
        "stream": stream.key,
        "weights": stream.version.lineage(job, block),
        "config": dict(job.source.config),
    }


@step(depends_on=_depends_on, kept=True)
def transform(
    job: Job, draft: Draft, recipe_step: ResolvedStep, stream: Stream, block: int
) -> dict[str, Any]:
    """Decide a block's transforms: per group of linears, float32 scales (K,) and maybe shifts.

    The value holds, per group, the largest input and everything that the search tried.
    """
    statistics = block_statistics(job, stream, block)
    tensors = version_block(job, stream.version, block)
    decide = _METHODS[recipe_step.quant.method]
    decided, tried = {}, {}
    for group in quantized_groups(job, block):
        given = GroupInputs(block, group, tensors, statistics[group.name])
        with search_products(job.device):
            found = decide(job, recipe_step.quant, given)
        if found is not None:
            decided[group.name], tried[group.name] = found
    draft.save_tensors(DECISION, to_tensors(decided))
    return {
        "tokens": next(iter(statistics.values())).tokens,
        "absmax": {name: found.absmax.max() for name, found in statistics.items()},
        "search": tried,
    }


def group_problem(job: Job, quant: Quant, given: GroupInputs) -> GroupProblem:
    """A group's linears and inputs, and how both are quantized."""
    act = quant.act
    return GroupProblem(
        [given.tensors[f"{linear}.weight"] for linear in given.group.linears],
        given.statistics,
        job.scheme.weight,
        job.scheme.activation,
        _RANGES[act.calib_algo] if act is not None and act.static else InputRange.MINMAX,
        act.percentile if act is not None else 100.0,
    )


def no_transform(statistics: InputStatistics) -> ChannelTransform:
    """The transform that changes nothing."""
    return ChannelTransform(torch.ones_like(statistics.total))


def _identity(job: Job, quant: Quant, given: GroupInputs) -> Decision:
    del job, quant
    return no_transform(given.statistics), []


def _awq(job: Job, quant: Quant, given: GroupInputs) -> Decision:
    special = quant.special
    assert isinstance(special, AwqSpecial)
    fed_by_linear = not is_norm(job.plan.architecture, given.group)
    if fed_by_linear and not special.do_gqa_trans and shares_heads(given.group, given.tensors):
        return None
    both = special.trans_version is TransVersion.BEST
    found, tried = awq.search(
        group_problem(job, quant, given),
        realizer(job, given.block, given.group, given.tensors),
        versions=tuple(AwqVersion) if both else (AwqVersion(special.trans_version.value),),
        measure=ImportanceMeasure(special.importance.value),
        ratios=special.ratios,
        refine=special.refine,
        errors_of=errors_of(job.team),
    )
    return found, Later(lambda: [asdict(trial) for trial in tried.trials()])


def _smoothquant(job: Job, quant: Quant, given: GroupInputs) -> Decision:
    special = quant.special
    assert isinstance(special, SmoothQuantSpecial)
    if not is_norm(job.plan.architecture, given.group):
        return None
    weights = group_problem(job, quant, given).weights
    scale = smoothing_scale(given.statistics.absmax, weights, special.alpha)
    realize = realizer(job, given.block, given.group, given.tensors)
    return ChannelTransform(realize(scale)), []


def _os_plus(job: Job, quant: Quant, given: GroupInputs) -> Decision:
    found, trials = os_plus.search(
        group_problem(job, quant, given),
        realizer(job, given.block, given.group, given.tensors, how="max"),
        shift=shift_of(job, given.group, given.tensors, os_plus.middle(given.statistics)),
        errors_of=errors_of(job.team),
    )
    return found, [asdict(trial) for trial in trials]


_METHODS: Mapping[Method, Decide] = {
    Method.IDENTITY: _identity,
    Method.AWQ: _awq,
    Method.SMOOTHQUANT: _smoothquant,
    Method.OSPLUS: _os_plus,
}
