"""Putting a block's channel transforms onto its tensors: weights scaled, feeders folded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantizers.channel_transform import (
    ChannelTransform,
    absorbed_shift,
    expand_to_heads,
    fold_into_bias,
    fold_into_linear,
    fold_into_norm,
    nearest_power_of_two,
    norm_scale,
    scale_columns,
    share_between_heads,
)
from quantizers.schemes import Granularity
from tasks.engine.architectures import Architecture, LinearGroup
from tasks.engine.export_format import export_dtype
from tasks.engine.job import Job
from tasks.engine.residency import Computed

Transforms = Mapping[str, ChannelTransform]
Realize = Callable[[Tensor], Tensor]
Make = Callable[[], Tensor]


def quantized_groups(job: Job, block: int) -> list[LinearGroup]:
    """The groups of a block whose linears are quantized: all of a group, or none."""
    quantized = set(job.plan.blocks[block].quantized)
    return [g for g in job.plan.architecture.groups if quantized.issuperset(g.linears)]


def scaled_together(job: Job, linears: Sequence[str]) -> list[tuple[str, ...]]:
    """The linears of a group in parts whose weights share a scale: all of them, or each alone."""
    if job.scheme.weight.granularity is Granularity.TENSOR:
        return [tuple(linears)] if linears else []
    return [(linear,) for linear in linears]


def is_norm(architecture: Architecture, group: LinearGroup) -> bool:
    """Whether a norm feeds the group."""
    return group.fed_by not in architecture.linears


def shares_heads(group: LinearGroup, tensors: Mapping[str, Tensor]) -> bool:
    """Whether several query heads read one channel of the feeder."""
    rows = tensors[f"{group.fed_by}.weight"].shape[0]
    return bool(rows != tensors[f"{group.linears[0]}.weight"].shape[1])


def realizer(
    job: Job, block: int, group: LinearGroup, tensors: Mapping[str, Tensor], how: str = "mean"
) -> Realize:
    """What turns wanted factors of a group's inputs into those that its feeder can take.

    A norm's are rounded with its weight, query heads that share a channel share a factor, and a
    linear that stays unquantized takes powers of two, which round nothing.
    """
    architecture = job.plan.architecture
    feeder = tensors[f"{group.fed_by}.weight"]
    if is_norm(architecture, group):
        dtype = export_dtype(job.dtype)
        return lambda scale: norm_scale(scale, feeder, dtype, architecture.norm_offset)
    columns, rows, head = tensors[f"{group.linears[0]}.weight"].shape[1], len(feeder), head_dim(job)
    unquantized = group.fed_by not in job.plan.blocks[block].quantized

    def realize(scale: Tensor) -> Tensor:
        if rows != columns:
            shared = share_between_heads(scale, rows, head, how)
            scale = expand_to_heads(shared, columns, head)
        return nearest_power_of_two(scale) if unquantized else scale

    return realize


def shift_of(
    job: Job, group: LinearGroup, tensors: Mapping[str, Tensor], wanted: Tensor
) -> Tensor | None:
    """The shift of a group's inputs that biases can take, (K,); None where there are none."""
    needed = [f"{name}.bias" for name in (group.fed_by, *group.linears)]
    if not group.passes_shifts or not all(name in tensors for name in needed):
        return None
    if not is_norm(job.plan.architecture, group) and shares_heads(group, tensors):
        rows = tensors[f"{group.fed_by}.weight"].shape[0]
        shared = share_between_heads(wanted, rows, head_dim(job), "mean")
        return expand_to_heads(shared, len(wanted), head_dim(job))
    return wanted


def apply_transforms(
    tensors: Mapping[str, Tensor],
    transforms: Transforms,
    architecture: Architecture,
    head: int,
    dtype: torch.dtype,
) -> Mapping[str, Tensor]:
    """Return a block's tensors after the transforms of its groups, the arguments unchanged.

    Each is computed when it is looked at, so that a block need not be in float32 at once.

    Args:
        tensors: by their names in the block.
        transforms: by the names of groups.
        architecture: of the block.
        head: size of an attention head.
        dtype: what folded norms are stored in.

    Returns:
        scaled and folded linears and biases in float32, folded norms in ``dtype``, others as given.
    """
    made: dict[str, Make] = {name: partial(tensors.__getitem__, name) for name in tensors}
    groups = [group for group in architecture.groups if group.name in transforms]
    for group in groups:
        transform = transforms[group.name]
        for linear in group.linears:
            weight, bias = f"{linear}.weight", f"{linear}.bias"
            if transform.shift is not None:
                made[bias] = _shifted(made[bias], made[weight], transform)
            made[weight] = _then(made[weight], partial(scale_columns, transform=transform))
    for group in groups:
        transform = transforms[group.name]
        weight, bias = f"{group.fed_by}.weight", f"{group.fed_by}.bias"
        rows = tensors[weight].shape[0]
        if rows != len(transform.scale):
            transform = _of_shared_channels(transform, rows, head)
        fold = partial(fold_into_linear, transform=transform)
        if is_norm(architecture, group):
            offset = architecture.norm_offset
            fold = partial(fold_into_norm, transform=transform, dtype=dtype, offset=offset)
        made[weight] = _then(made[weight], fold)
        if bias in made:
            made[bias] = _then(made[bias], partial(fold_into_bias, transform=transform))
    return Computed(made)


def _then(before: Make, change: Callable[[Tensor], Tensor]) -> Make:
    return lambda: change(before())


def _shifted(bias: Make, weight: Make, transform: ChannelTransform) -> Make:
    """A bias that takes what its linear's shifted inputs lack."""
    return lambda: bias().float() + absorbed_shift(weight(), transform)


def _of_shared_channels(transform: ChannelTransform, rows: int, head: int) -> ChannelTransform:
    """The transform of the channels that sharing heads read; theirs are equal."""
    shift = transform.shift
    return ChannelTransform(
        share_between_heads(transform.scale, rows, head, "max"),
        None if shift is None else share_between_heads(shift, rows, head, "max"),
    )


def head_dim(job: Job) -> int:
    """Size of an attention head."""
    # not the file's own: what is missing there has another default in each model type
    config: Any = job.decoder.model.config
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def to_tensors(transforms: Transforms) -> dict[str, Tensor]:
    """Name the tensors of transforms, for a file."""
    named = {f"{name}.scale": t.scale for name, t in transforms.items()}
    shifts = {f"{n}.shift": t.shift for n, t in transforms.items() if t.shift is not None}
    return named | shifts


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, ChannelTransform]:
    """Read the transforms of :func:`to_tensors` back."""
    names = [name.removesuffix(".scale") for name in tensors if name.endswith(".scale")]
    return {n: ChannelTransform(tensors[f"{n}.scale"], tensors.get(f"{n}.shift")) for n in names}
