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
from quantizers import awq, os_plus
from quantizers.activations import quantize_dequantize_activation
from quantizers.channel_transform import ChannelTransform
from quantizers.clipping import range_factors, search_clip
from quantizers.errors import NonFiniteError
from quantizers.omniquant import Learnable, clip_of, fake_quantize, starting_logits
from quantizers.omniquant import learn as descend
from quantizers.smoothquant import smoothing_scale
from tasks.clip import LEARNED, stacked
from tasks.engine.architectures import LinearGroup
from tasks.engine.collect import block_statistics
from tasks.engine.decoder import InputHook, micro_batches, run_block
from tasks.engine.doubts import settle
from tasks.engine.draft import Draft
from tasks.engine.export_format import export_dtype
from tasks.engine.folding import (
    apply_transforms,
    head_dim,
    is_norm,
    quantized_groups,
    realizer,
    scaled_together,
    shift_of,
    to_tensors,
)
from tasks.engine.job import Job, scheme_lineage
from tasks.engine.precision import search_products
from tasks.engine.step import step
from tasks.engine.streams import Stream, Streams, block_arguments, hidden_states, pass_block
from tasks.engine.version import DECISION, version_block
from tasks.transform import GroupInputs, group_problem, input_lineage

log = logging.getLogger("blockquant")


def _depends_on(
    job: Job, recipe_step: ResolvedStep, streams: Streams, block: int
) -> dict[str, Any]:
    return {
        "special": effective(recipe_step.quant.special),
        "scheme": scheme_lineage(job),
        "activations": input_lineage(job, recipe_step.quant),
        "linears": list(job.plan.blocks[block].quantized),
        "dtype": str(export_dtype(job.dtype)),
        "streams": [streams.quantized.key, streams.float.key],
        "weights": streams.quantized.version.lineage(job, block),
        "config": dict(job.source.config),
    }


@step(depends_on=_depends_on, version=3, kept=True)
def learn(
    job: Job, draft: Draft, recipe_step: ResolvedStep, streams: Streams, block: int
) -> dict[str, Any]:
    """Learn factors on both ends of every range, and maybe channel scales, by gradient descent.

    The loss is the mean squared difference of the quantized block's output and that of the block
    before rounding on the stream that was never quantized. A loss that is no number ends it.

    The value holds the loss before the first epoch and after each; the least of them is kept.
    """
    quant, special = recipe_step.quant, recipe_step.quant.special
    assert isinstance(special, OmniQuantSpecial)
    stream = streams.quantized
    tensors = version_block(job, stream.version, block)
    logits = _start(job, special, stream, block) if special.lwc else {}
    channels = _starting_channels(job, quant, special, stream, block) if special.let else {}
    learnable = [
        Learnable([leaf for m in channels.values() for leaf in m.leaves], special.let_lr),
        # linears that share a scale share theirs
        Learnable(list(dict.fromkeys(e for pair in logits.values() for e in pair)), special.lwc_lr),
    ]
    loss_of, batches = _objective(job, special, streams, block, logits, channels)
    losses, fell_back = [], False
    try:
        losses = descend(
            [part for part in learnable if part.parameters],
            loss_of,
            batches,
            epochs=special.epochs,
            weight_decay=special.wd,
        )
    except NonFiniteError as error:
        fell_back = True
        log.warning("block %d: %s; it keeps what was best before", block, error)
    if special.lwc:
        named = {
            f"{linear}.{end}": clip_of(value.detach())
            for linear, pair in logits.items()
            for end, value in zip(("low", "high"), pair, strict=True)
        }
        draft.save_tensors(LEARNED, named)
    if special.let:
        with torch.no_grad():
            exact = _transforms(job, block, tensors, channels, exact=True)
        draft.save_tensors(DECISION, to_tensors(exact))
    return {"loss": losses, "fell_back": fell_back, "batches": batches}


def _objective(
    job: Job,
    special: OmniQuantSpecial,
    streams: Streams,
    block: int,
    logits: Mapping[str, tuple[Tensor, Tensor]],
    channels: Mapping[str, Moved],
) -> tuple[Callable[[int], Tensor], int]:
    """The loss of a micro-batch by its number, and how many there are.

    With aug_loss, the block is held to its output on the unquantized stream from there, too.
    """
    tensors = version_block(job, streams.quantized.version, block)
    floats = hidden_states(job, streams.float)
    targets = micro_batches(pass_block(job, streams.float, floats, None), job.device)
    sides = [micro_batches(hidden_states(job, streams.quantized), job.device)]
    if special.aug_loss:
        sides.append(micro_batches(floats, job.device))
    linears, scheme = job.plan.blocks[block].quantized, job.scheme.weight
    groups = quantized_groups(job, block)
    parts = [part for group in groups for part in scaled_together(job, group.linears)]
    hook, module = _straight_through(job), job.decoder.blocks[block]

    def rounded() -> dict[str, Tensor]:
        transforms = _transforms(job, block, tensors, channels, exact=False)
        current = dict(
            apply_transforms(
                tensors, transforms, job.plan.architecture, head_dim(job), torch.float32
            )
        )
        for part in parts:
            weight = stacked(current, part)
            low = high = torch.ones(scheme.scale_shape(*weight.shape), device=job.device)
            if part[0] in logits:
                low, high = (clip_of(end) for end in logits[part[0]])
            names = [f"{linear}.weight" for linear in part]
            found = fake_quantize(weight, scheme, low, high).split([len(current[n]) for n in names])
            current |= dict(zip(names, found, strict=True))
        return {name: tensor.to(job.compute_dtype) for name, tensor in current.items()}

    def loss_of(batch: int) -> Tensor:
        weights, target = rounded(), targets[batch].to(job.device).float()
        arguments = block_arguments(job, *target.shape[:2])[block]
        loss = torch.zeros((), device=job.device)
        for inputs in sides:
            x = inputs[batch].to(job.device)
            found = run_block(module, weights, x, arguments, linears, hook, gradients=True)
            loss = loss + (found.float() - target).square().mean()
        return loss

    return loss_of, len(targets)


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
    """Logits of every linear's factors: of a clip search where asked for, else near 1.

    Linears that share a scale have the same two tensors.
    """
    tensors, scheme = version_block(job, stream.version, block), job.scheme.weight
    factors = range_factors(scheme.number_format).to(job.device)
    searched = special.search_clip_init and not scheme.number_format.is_float
    statistics = block_statistics(job, stream, block) if searched else {}
    settle(job.doubts.take())
    logits: dict[str, tuple[Tensor, Tensor]] = {}
    for group in quantized_groups(job, block):
        for part in scaled_together(job, group.linears):
            weight = stacked(tensors, part)
            start = torch.ones(scheme.scale_shape(*weight.shape), device=job.device)
            if searched:
                with search_products(job.device):
                    gram = statistics[group.name].gram_mean()
                    start = factors[search_clip(weight, gram, scheme, factors).int()]
            pair = (starting_logits(start), starting_logits(start))
            logits |= dict.fromkeys(part, pair)
    return logits


@dataclass(frozen=True, eq=False)
class Moved:
    """What is learned of a group's channels: leaves, of which the scale is the exponential."""

    log_scale: Tensor
    shift: Tensor | None

    @property
    def leaves(self) -> list[Tensor]:
        """All that gradient descent changes."""
        return [self.log_scale] if self.shift is None else [self.log_scale, self.shift]


def _moved_groups(job: Job, block: int) -> list[LinearGroup]:
    """The groups whose channels are scaled: those fed by a norm, and attention's output."""
    architecture = job.plan.architecture
    return [
        group
        for group in quantized_groups(job, block)
        if is_norm(architecture, group) or group.fed_by == architecture.value
    ]


def _starting_channels(
    job: Job, quant: Quant, special: OmniQuantSpecial, stream: Stream, block: int
) -> dict[str, Moved]:
    """SmoothQuant's factors, or AWQ's where asked, and shifts where biases take them."""
    tensors = version_block(job, stream.version, block)
    statistics = block_statistics(job, stream, block)
    settle(job.doubts.take())
    found: dict[str, Moved] = {}
    for group in _moved_groups(job, block):
        inputs = statistics[group.name]
        problem = group_problem(job, quant, GroupInputs(block, group, tensors, inputs))
        start = smoothing_scale(inputs.absmax, problem.weights, special.alpha)
        if special.search_scale_init:
            with search_products(job.device):
                start = awq.search(problem, realizer(job, block, group, tensors))[0].scale
        shift = None
        if special.use_shift:
            shift = shift_of(job, group, tensors, os_plus.middle(inputs))
        found[group.name] = Moved(
            start.log().requires_grad_(),
            None if shift is None else shift.detach().clone().requires_grad_(),
        )
    return found


def _transforms(
    job: Job, block: int, tensors: Mapping[str, Tensor], channels: Mapping[str, Moved], exact: bool
) -> dict[str, ChannelTransform]:
    """The transforms of learned channels; ``exact`` ones are those that norms can take."""
    transforms: dict[str, ChannelTransform] = {}
    for group in _moved_groups(job, block):
        if group.name not in channels:
            continue
        moved = channels[group.name]
        scale, shift = moved.log_scale.exp(), moved.shift
        # rounding to what a norm can store has no gradient
        if exact or not is_norm(job.plan.architecture, group):
            scale = realizer(job, block, group, tensors)(scale)
        if shift is not None:
            shift = shift_of(job, group, tensors, shift)
        transforms[group.name] = ChannelTransform(scale, shift)
    return transforms
