"""Rounding a block with GPTQ: group after group, each seeing what the ones before it became."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from configs.special_keys import GptqSpecial
from quantizers.coordinate_descent import descend
from quantizers.gptq import GramFactor, factorize, gptq, made_up_target
from quantizers.rounding import ClipRange, QuantizedWeight, dequantize, round_group
from quantizers.scale_refit import better_rows, refit_scales
from quantizers.scales import own_copies, weight_scales
from quantizers.schemes import Granularity, WeightScheme
from tasks.engine.collect import block_statistics, observe, observe_beside
from tasks.engine.doubts import Doubt, settle
from tasks.engine.folding import quantized_groups
from tasks.engine.job import Job
from tasks.engine.precision import feedback_products, search_products
from tasks.engine.sharing import errors_of_all, own_energies, rounded_by_rows, splits
from tasks.engine.streams import Streams, activation_hook
from tasks.engine.transfer import ToHost, asked_for

log = logging.getLogger("blockquant")

Parameters = tuple[Tensor, Tensor | None]
Holds = Callable[[Tensor], bool]


@dataclass(frozen=True, eq=False)
class RoundedBlock:
    """Codes of a block's linears, and what their rounding has to report, by linear."""

    codes: Mapping[str, QuantizedWeight]
    notes: Mapping[str, dict[str, Any]]


def asked_once(job: Job, fed_back: Callable[[Holds], RoundedBlock], *, hopes: bool) -> RoundedBlock:
    """A block rounded by feed_back, which is given what says whether a factor is one.

    Args:
        job: the run.
        fed_back: rounds it.
        hopes: to ask the device only in the end whether the least damping was enough, and to do
            all again where it was not: a device is waited for once, and has work meanwhile.
    """
    if hopes:
        rounded = _hoped_for(job, fed_back)
        if rounded is not None:
            return rounded

    def sure(whole: Tensor) -> bool:
        settle(job.doubts.take())
        return bool(whole)

    return fed_back(sure)


def _hoped_for(job: Job, fed_back: Callable[[Holds], RoundedBlock]) -> RoundedBlock | None:
    """A block rounded with the first factor of each group; None where one is none."""
    # with each, what was doubted before it was used
    asked: list[tuple[ToHost, tuple[Doubt, ...]]] = []

    def hoped(whole: Tensor) -> bool:
        asked.append((asked_for(whole), job.doubts.take()))
        return True

    rounded = fed_back(hoped)
    held = list(itertools.takewhile(lambda one: bool(one[0].told()), asked))
    if len(held) == len(asked):
        job.doubts.put_back(doubt for _, doubts in asked for doubt in doubts)
        return rounded
    # what came of a factor that is none says nothing of the inputs
    job.doubts.take()
    settle(doubt for _, doubts in asked[: len(held) + 1] for doubt in doubts)
    return None


def feed_back(
    job: Job,
    special: GptqSpecial,
    streams: Streams,
    block: int,
    tensors: Mapping[str, Tensor],
    clips: Mapping[str, ClipRange],
    holds: Holds,
) -> RoundedBlock:
    """Round a block's linears with GPTQ.

    A matrix that no damping makes positive definite leaves its linears rounded to nearest.

    Args:
        job: the run.
        special: GPTQ's keys.
        streams: the hidden states that enter the block, and those that would were nothing
            rounded.
        block: its number.
        tensors: of the block, before rounding.
        clips: factors on the ranges that scales come from, by linear.
        holds: says whether a factor is one, as factorize asks it.
    """
    codes: dict[str, QuantizedWeight] = {}
    notes: dict[str, dict[str, Any]] = {}
    current = dict(tensors)
    activation = job.scheme.activation
    hook = activation_hook(activation) if activation is not None and activation.dynamic else None
    for group in quantized_groups(job, block):
        weights = [tensors[f"{linear}.weight"].float() for linear in group.linears]
        place = job.plan.blocks[block].prefix + group.linears[0]
        targets = weights
        if special.make_up:
            seen = current if special.true_sequential else tensors
            given = hook if special.true_sequential else None
            statistics, gap = observe_beside(job, streams, block, seen, group, tensors, given)
            targets = _targets(job, place, special, weights, statistics.gram_mean(), gap)
        elif special.true_sequential:
            stream = streams.quantized
            statistics = observe(job, stream, block, current, (group,), hook)[group.name]
        else:
            statistics = block_statistics(job, streams.quantized, block)[group.name]
        gram = statistics.gram_mean()
        factor = factorize(gram, percdamp=special.percdamp, actorder=special.actorder, holds=holds)
        clipped = [clips.get(linear) for linear in group.linears]
        _warn(place, factor, special)
        if factor is None:
            rounded = round_group(targets, job.scheme.weight, clipped)
        else:
            with feedback_products(job.device):
                rounded = _round_group(job, targets, clipped, factor, gram, special)
        for linear, weight, quantized in zip(group.linears, weights, rounded, strict=True):
            restored = dequantize(quantized, job.scheme.weight)
            current[f"{linear}.weight"] = restored
            codes[linear] = quantized
            with search_products(job.device):
                lost = own_energies(job.team, weight, quantized, job.scheme.weight, gram)
            notes[linear] = {
                "output_error": errors_of_all(job.team, {linear: lost})[linear]["output_error"],
                "tokens": statistics.tokens,
                "damping": None if factor is None else factor.damping,
            }
    return RoundedBlock(codes, notes)


def _targets(
    job: Job,
    place: str,
    special: GptqSpecial,
    weights: list[Tensor],
    gram: Tensor,
    gap: Tensor,
) -> list[Tensor]:
    """Weights moved to make up for what their inputs lack already."""
    rows = [len(weight) for weight in weights]
    with search_products(job.device):
        moved = made_up_target(
            torch.cat(weights),
            *(gram, gap),
            percdamp=special.percdamp,
            share=special.make_up,
        )
    if moved is None:
        log.warning("%s: its Gram matrix is not regular; nothing is made up for", place)
        return weights
    return list(moved.split(rows))


def warn_of_rank(job: Job, tokens: int) -> None:
    """Name the linear with the most input features, where calibration has fewer tokens."""
    shapes = {
        name: job.source.tensors[name].shape[1]
        for block in job.plan.blocks
        for name in block.full(block.weights)
    }
    wide = {name: columns for name, columns in shapes.items() if columns > tokens}
    if wide:
        widest = max(wide, key=wide.__getitem__)
        others = len(wide) - 1
        more = f" (and {others} more linear{'s' * (others > 1)})" if others else ""
        log.warning(
            "calib: %d tokens for the %d input features of %s%s: the Gram matrix has rank %d at "
            "most, and GPTQ leans on damping; use more samples",
            *(tokens, wide[widest], widest.removesuffix(".weight"), more, tokens),
        )


def _warn(place: str, factor: GramFactor | None, special: GptqSpecial) -> None:
    if factor is None:
        log.warning("%s: no damping makes its Gram matrix regular; rounded to nearest", place)
    elif factor.damping > special.percdamp:
        log.warning("%s: damping raised to %g of the mean diagonal", place, factor.damping)


def _round_group(
    job: Job,
    weights: Sequence[Tensor],
    clips: Sequence[ClipRange | None],
    factor: GramFactor,
    gram: Tensor,
    special: GptqSpecial,
) -> list[QuantizedWeight]:
    """Codes of linears that share their inputs."""
    scheme = job.scheme.weight
    pairs = [clip or (None, None) for clip in clips]
    if scheme.granularity is Granularity.TENSOR:
        low, high = pairs[0]
        stacked = torch.cat(list(weights))
        found = weight_scales(stacked, scheme, clip_low=low, clip_high=high)
        scales: list[Parameters | None] = [*own_copies(*found, len(weights))]
    elif scheme.granularity is Granularity.GROUP and not special.static_groups:
        scales = [None for _ in weights]
    else:
        scales = [
            weight_scales(weight, scheme, clip_low=low, clip_high=high)
            for weight, (low, high) in zip(weights, pairs, strict=True)
        ]
    return [
        _of_rows(job, weight, factor, gram, given, special)
        for weight, given in zip(weights, scales, strict=True)
    ]


def _of_rows(
    job: Job,
    weight: Tensor,
    factor: GramFactor,
    gram: Tensor,
    parameters: Parameters | None,
    special: GptqSpecial,
) -> QuantizedWeight:
    """Codes of one linear, whose rows are rounded apart from each other."""
    scheme = job.scheme.weight

    def compute(rows: slice) -> QuantizedWeight:
        given = parameters
        if given is not None:
            scale, zero = given
            given = scale[rows], None if zero is None else zero[rows]
        return _refitted(weight[rows], factor, gram, scheme, given, special)

    if splits(job.team, scheme, len(weight)):
        return rounded_by_rows(job.team, weight, compute)
    return _refitted(weight, factor, gram, scheme, parameters, special)


def _refitted(
    weight: Tensor,
    factor: GramFactor,
    gram: Tensor,
    scheme: WeightScheme,
    parameters: Parameters | None,
    special: GptqSpecial,
) -> QuantizedWeight:
    """Codes of one linear; scales and codes improved in turns as often as asked.

    First by rounding all columns anew with error feedback, then column by column.
    """
    best = gptq(weight, factor, scheme, parameters, block_size=special.blocksize)
    for _ in range(special.refit_scales):
        scale = refit_scales(weight, best, gram, scheme)
        found = gptq(weight, factor, scheme, (scale, best.zero_point), block_size=special.blocksize)
        best = better_rows(weight, best, found, gram, scheme)
    for _ in range(special.descend):
        if special.refit_scales:
            best = replace(best, scale=refit_scales(weight, best, gram, scheme))
        best = descend(weight, best, gram, scheme, sweeps=1, block_size=special.blocksize)
    return best
