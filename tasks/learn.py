"""Learn a block's clipping, and its channel scales where asked: OmniQuant."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from configs.fields import effective
from configs.schema import Quant, ResolvedStep
from configs.special_keys import OmniQuantSpecial
from quantizers.activations import quantize_dequantize_activation
from quantizers.channel_transform import ChannelTransform
from quantizers.clipping import range_factors, search_clip
from quantizers.errors import NonFiniteError
from quantizers.omniquant import Learnable, clip_of, fake_quantize, starting_logits
from quantizers.omniquant import learn as descend
from quantizers.smoothquant import smoothing_scale
from tasks.clip import LEARNED
from tasks.engine.collect import block_statistics
from tasks.engine.decoder import InputHook, micro_batches, run_block
from tasks.engine.export_format import export_dtype
from tasks.engine.folding import (
    Transforms,
    apply_transforms,
    head_dim,
    is_norm,
    quantized_groups,
    realizer,
    to_tensors,
)
from tasks.engine.job import Job, activation_lineage, scheme_lineage
from tasks.engine.precision import search_products
from tasks.engine.step import step
from tasks.engine.store import Draft
from tasks.engine.streams import Stream, block_arguments, hidden_states, pass_block
from tasks.engine.version import DECISION, version_block

log = logging.getLogger("blockquant")

Pairs = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Streams:
    """What a learned block is fed, and what the block before rounding is fed beside it."""

    quantized: Stream
    float: Stream


def has_learning(quant: Quant) -> bool:
    """Whether the method learns."""
    return isinstance(quant.special, OmniQuantSpecial)


def has_learned_transform(quant: Quant) -> bool:
    """Whether channel scales are learned."""
    return isinstance(quant.special, OmniQuantSpecial) and quant.special.let


def has_learned_clip(quant: Quant) -> bool:
    """Whether clip factors are learned."""
    return isinstance(quant.special, OmniQuantSpecial) and quant.special.lwc


def _depends_on(
    job: Job, recipe_step: ResolvedStep, streams: Streams, block: int
) -> dict[str, Any]:
    return {
        "special": effective(recipe_step.quant.special),
        "scheme": scheme_lineage(job),
        "activations": activation_lineage(job),
        "linears": list(job.plan.blocks[block].quantized),
        "dtype": str(export_dtype(job.dtype)),
        "streams": [streams.quantized.key, streams.float.key],
        "weights": streams.quantized.version.lineage(job, block),
        "config": dict(job.source.config),
    }


@step(depends_on=_depends_on, tags=("learn",))
def learn(
    job: Job, draft: Draft, recipe_step: ResolvedStep, streams: Streams, block: int
) -> dict[str, Any]:
    """Learn factors on both ends of every range, and maybe channel scales, by gradient descent.

    The loss is the mean squared difference of the quantized block's output and that of the block
    before rounding on the stream that was never quantized. A loss that is no number leaves the
    block at its start.

    The value holds the loss of every epoch.
    """
    special = recipe_step.quant.special
    assert isinstance(special, OmniQuantSpecial)
    logits = _start(job, special, streams.quantized, block) if special.lwc else {}
    scales = _starting_scales(job, special, streams.quantized, block) if special.let else {}
    kept = {linear: tuple(end.detach().clone() for end in ends) for linear, ends in logits.items()}
    kept_scales = {name: scale.detach().clone() for name, scale in scales.items()}
    loss_of, batches = _objective(job, streams, block, logits, scales)
    learnable = [Learnable(list(scales.values()), special.let_lr)] if special.let else []
    if special.lwc:
        ends = [end for pair in logits.values() for end in pair]
        learnable.append(Learnable(ends, special.lwc_lr))
    losses, fell_back = [], False
    try:
        losses = descend(
            learnable, loss_of, batches, epochs=special.epochs, weight_decay=special.wd
        )
    except NonFiniteError as error:
        fell_back = True
        log.warning("block %d: %s; it keeps the clip that learning started from", block, error)
        logits = {linear: (pair[0], pair[1]) for linear, pair in kept.items()}
        scales = kept_scales
    if special.lwc:
        named = {
            f"{linear}.{end}": clip_of(value.detach())
            for linear, pair in logits.items()
            for end, value in zip(("low", "high"), pair, strict=True)
        }
        draft.save_tensors(LEARNED, named)
    if special.let:
        draft.save_tensors(DECISION, to_tensors(_realized(job, streams.quantized, block, scales)))
    return {"loss": losses, "fell_back": fell_back, "batches": batches}


def _objective(
    job: Job,
    streams: Streams,
    block: int,
    logits: Mapping[str, tuple[Tensor, Tensor]],
    scales: Mapping[str, Tensor],
) -> tuple[Callable[[int], Tensor], int]:
    """The loss of a micro-batch by its number, and how many there are."""
    tensors = version_block(job, streams.quantized.version, block)
    hidden = hidden_states(job, streams.quantized)
    targets = pass_block(job, streams.float, hidden_states(job, streams.float), None)
    inputs, wanted = micro_batches(hidden, job.device), micro_batches(targets, job.device)
    architecture, head = job.plan.architecture, head_dim(job)
    linears = job.plan.blocks[block].quantized
    hook, scheme = _straight_through(job), job.scheme.weight

    def loss_of(batch: int) -> Tensor:
        transforms = {name: ChannelTransform(scale.exp()) for name, scale in scales.items()}
        current = apply_transforms(tensors, transforms, architecture, head, torch.float32)
        for linear in linears:
            weight = current[f"{linear}.weight"]
            low = high = torch.ones(scheme.scale_shape(*weight.shape), device=job.device)
            if linear in logits:
                low, high = (clip_of(end) for end in logits[linear])
            current[f"{linear}.weight"] = fake_quantize(weight, scheme, low, high)
        weights = {name: t.to(job.compute_dtype) for name, t in current.items()}
        x = inputs[batch].to(job.device)
        arguments = block_arguments(job, x.shape[0], x.shape[1])[block]
        module = job.decoder.blocks[block]
        found = run_block(module, weights, x, arguments, linears, hook, gradients=True)
        return (found.float() - wanted[batch].to(job.device).float()).square().mean()

    return loss_of, len(inputs)


def _straight_through(job: Job) -> InputHook | None:
    """Inputs rounded as they will be, gradients past it; static scales are not known yet."""
    scheme = job.scheme.activation
    if scheme is None or not scheme.dynamic:
        return None

    def see(_: str, x: Tensor) -> Tensor:
        return x + (quantize_dequantize_activation(x.detach(), scheme) - x.detach())

    return see


def _start(
    job: Job, special: OmniQuantSpecial, stream: Stream, block: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Logits of every linear's factors: of a clip search where asked for, else near 1."""
    tensors, scheme = version_block(job, stream.version, block), job.scheme.weight
    factors = range_factors(scheme.number_format).to(job.device)
    searched = special.search_clip_init and not scheme.number_format.is_float
    statistics = block_statistics(job, stream, block) if searched else {}
    logits: dict[str, tuple[Tensor, Tensor]] = {}
    for group in quantized_groups(job, block):
        for linear in group.linears:
            weight = tensors[f"{linear}.weight"]
            start = torch.ones(scheme.scale_shape(*weight.shape), device=job.device)
            if searched:
                with search_products(job.device):
                    gram = statistics[group.name].gram_mean()
                    start = factors[search_clip(weight, gram, scheme, factors).int()]
            logits[linear] = (starting_logits(start), starting_logits(start))
    return logits


def _starting_scales(
    job: Job, special: OmniQuantSpecial, stream: Stream, block: int
) -> dict[str, Tensor]:
    """Logarithms of SmoothQuant's factors for the groups that a norm feeds, as leaves."""
    tensors, statistics = (
        version_block(job, stream.version, block),
        block_statistics(job, stream, block),
    )
    scales = {}
    for group in quantized_groups(job, block):
        if is_norm(job.plan.architecture, group):
            weights = [tensors[f"{linear}.weight"] for linear in group.linears]
            start = smoothing_scale(statistics[group.name].absmax, weights, special.alpha)
            scales[group.name] = start.log().requires_grad_()
    return scales


def _realized(job: Job, stream: Stream, block: int, scales: Mapping[str, Tensor]) -> Transforms:
    """Learned scales as their norms can take them."""
    tensors = version_block(job, stream.version, block)
    groups = {group.name: group for group in quantized_groups(job, block)}
    return {
        name: ChannelTransform(realizer(job, block, groups[name], tensors)(scale.detach().exp()))
        for name, scale in scales.items()
    }
