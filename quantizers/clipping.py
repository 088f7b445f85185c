"""Clip search: a smaller range per row and group where its output error is less.

As AWQ's (arXiv 2306.00978, appendix), but from the Gram matrix instead of the inputs.
"""

import torch
from torch import Tensor

from quantizers.channel_transform import gram_blocks
from quantizers.devices import compiles_kernels
from quantizers.losses import row_errors
from quantizers.number_formats import NumberFormat
from quantizers.rounding import ClipRange, expand_scale, quantize_dequantize_weight
from quantizers.scales import scales_of, weight_extremes
from quantizers.schemes import Granularity, WeightScheme

__all__ = [
    "clamp_to_range",
    "clip_factors",
    "range_factors",
    "search_clip",
    "search_clip_curve",
]

_CPU_ENTRIES = 1 << 20
_DEVICE_ENTRIES = 1 << 26
# Columns of the widest group whose block of the Gram matrix a kernel holds.
_KERNEL_COLUMNS = 128


def clip_factors(steps: int = 10, shrink: float = 0.5) -> Tensor:
    """1 - i shrink / steps for i = 0, 1, ... below steps: (steps,) float32, falling from 1.

    Raises:
        ValueError: no step, more than 256, or a range that is no range.
    """
    if not 1 <= steps <= 256 or not 0 < shrink <= 1:
        raise ValueError(f"{steps} clip steps down by {shrink}: use 1 to 256, and within (0, 1]")
    return 1 - torch.arange(steps, dtype=torch.float32) * (shrink / steps)


def range_factors(number_format: NumberFormat, steps: int = 10, shrink: float = 0.5) -> Tensor:
    """Factors on the range that a scale comes from, (steps,) float32, the first of them 1.

    Integers: clip_factors. Floats: 2^(i / steps): a float's grid looks the same in every octave, so
    a range that is wider by less than one shifts the grid, and nothing saturates; clipping the
    largest weights costs more than the grid gains.

    Raises:
        ValueError: as clip_factors.
    """
    factors = clip_factors(steps, shrink)
    if number_format.is_float:
        return torch.exp2(torch.arange(steps, dtype=torch.float32) / steps)
    return factors


def search_clip(
    weight: Tensor, gram: Tensor | None, scheme: WeightScheme, factors: Tensor
) -> Tensor:
    """Numbers of the clip factors with the least output error, one per scale.

    A factor multiplies both ends of the range that a scale comes from. The error of a row's group
    is d H_gg d^T with d what the group's weights lose and H_gg its block of the Gram matrix; where
    a row has one scale, the whole row with the whole H. The first of equals wins.

    Args:
        weight: (N, K), floating point, after any transform; the stacked weights of a group of
            linears where they share one scale.
        gram: (K, K) float32, the inputs' Gram matrix, after the transform too; or, where groups of
            g columns share a scale, what is read of it, gram_blocks (K / g, g, g); None: the
            squared error of the weight itself.
        scheme: the weights' scheme.
        factors: (steps,), at most 256.

    Returns:
        uint8, scheme.scale_shape(N, K).

    Raises:
        ValueError: shapes that do not fit.
    """
    return search_clip_curve(weight, gram, scheme, factors)[0]


def search_clip_curve(
    weight: Tensor, gram: Tensor | None, scheme: WeightScheme, factors: Tensor
) -> tuple[Tensor, Tensor]:
    """search_clip, and the error of the whole weight under each factor, (steps,) float64."""
    columns = weight.shape[1]
    if gram is not None and tuple(gram.shape) not in _gram_shapes(scheme, columns):
        raise ValueError(f"gram has shape {tuple(gram.shape)}, not ({columns}, {columns})")
    if len(factors) > 256:
        raise ValueError(f"{len(factors)} clip factors: their numbers are stored in a byte")
    if scheme.granularity in (Granularity.TENSOR, Granularity.BLOCK):
        return _search(weight, gram, scheme, factors)
    fits = (
        scheme.granularity is Granularity.GROUP
        and scheme.width(columns) <= _KERNEL_COLUMNS
        and columns % scheme.width(columns) == 0
    )
    if gram is not None and fits and compiles_kernels(weight, scheme.number_format):
        return _search_groups(weight, gram, scheme, factors)
    entries = _CPU_ENTRIES if weight.device.type == "cpu" else _DEVICE_ENTRIES
    parts = torch.split(weight, max(1, entries // columns))
    found = [_search(part, gram, scheme, factors) for part in parts]
    return torch.cat([chosen for chosen, _ in found]), torch.stack([e for _, e in found]).sum(0)


def clamp_to_range(weight: Tensor, scheme: WeightScheme, clip: ClipRange) -> Tensor:
    """A weight whose own extremes are those that clip factors make of them.

    Args:
        weight: (N, K), floating point.
        scheme: the scheme.
        clip: factors on the lower and on the upper extremes, scheme.scale_shape(N, K) each; where
            they are symmetric, the wider end is the range.

    Returns:
        (N, K) float32; factors above 1 leave it as it is.

    Raises:
        ValueError: weight does not suit the scheme.
    """
    rows, columns = weight.shape
    ends = weight_extremes(weight, scheme)
    low, high = (end * factor.to(torch.float32) for end, factor in zip(ends, clip, strict=True))
    if scheme.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    low, high = (expand_scale(end, scheme, rows, columns) for end in (low, high))
    return weight.to(torch.float32).clamp(low, high)


def _search(
    weight: Tensor, gram: Tensor | None, scheme: WeightScheme, factors: Tensor
) -> tuple[Tensor, Tensor]:
    shape = scheme.scale_shape(*weight.shape)
    work = weight.to(torch.float32)
    least = torch.full(shape, torch.inf, device=weight.device)
    chosen = torch.zeros(shape, dtype=torch.uint8, device=weight.device)
    curve = []
    extremes = weight_extremes(work, scheme)
    # read by the device alone: nothing waits for them
    factors = factors.to(weight.device, torch.float32)
    for number in range(len(factors)):
        ends = factors[number].expand(shape)
        scale, zero_point = scales_of(extremes, scheme, clip_low=ends, clip_high=ends)
        restored = quantize_dequantize_weight(work, scale, zero_point, scheme)
        difference = restored.sub_(work)
        error = _errors(difference, gram, scheme)
        curve.append(error.to(torch.float64).sum())
        better = error < least
        least = torch.where(better, error, least)
        chosen = torch.where(better, torch.full_like(chosen, number), chosen)
    return chosen, torch.stack(curve)


def _search_groups(
    weight: Tensor, gram: Tensor, scheme: WeightScheme, factors: Tensor
) -> tuple[Tensor, Tensor]:
    """_search of groups by a kernel, which reads a weight once for all factors."""
    from quantizers.scales_kernel import group_extremes
    from quantizers.search_kernel import clip_errors

    columns = weight.shape[1]
    width = scheme.width(columns)
    weight = weight.contiguous()
    low, high = group_extremes(weight, None, width)
    # every factor at once
    low, high = (end.expand(len(factors), -1, -1) for end in (low, high))
    ends = factors.to(weight.device, torch.float32)[:, None, None].expand_as(low)
    scale, zero = scales_of((low, high), scheme, clip_low=ends, clip_high=ends)
    blocks = gram if gram.ndim == 3 else gram_blocks(gram, width)
    errors, chosen = clip_errors(
        weight,
        blocks.contiguous(),
        scale.contiguous(),
        None if zero is None else zero.contiguous(),
        scheme.number_format,
    )
    return chosen, errors.sum((1, 2), dtype=torch.float64)


def _gram_shapes(scheme: WeightScheme, columns: int) -> list[tuple[int, ...]]:
    """Of a Gram matrix, or of its blocks where those are all that is read."""
    width = scheme.width(columns)
    blocks = scheme.granularity is Granularity.GROUP and columns % width == 0
    return [(columns, columns), *([(columns // width, width, width)] if blocks else [])]


def _block(gram: Tensor, start: int, width: int) -> Tensor:
    if gram.ndim == 3:
        return gram[start // width]
    return gram[start : start + width, start : start + width]


def _errors(difference: Tensor, gram: Tensor | None, scheme: WeightScheme) -> Tensor:
    """The error of everything that shares a scale, in the shape of the scales."""
    columns = difference.shape[1]
    width = min(scheme.width(columns), columns)
    parts = [
        part.square().sum(1) if gram is None else row_errors(part, _block(gram, start, width))
        for start, part in zip(
            range(0, columns, width), torch.split(difference, width, dim=1), strict=True
        )
    ]
    per_row = torch.stack(parts, 1)
    if scheme.granularity is Granularity.TENSOR:
        return per_row.sum().reshape(1)
    if scheme.granularity is Granularity.BLOCK:
        assert scheme.block_shape is not None
        return torch.stack([part.sum(0) for part in torch.split(per_row, scheme.block_shape[0])])
    return per_row
