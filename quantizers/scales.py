"""Scales and zero points of weights, from the extremes of what shares one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from quantizers.devices import compiles_kernels
from quantizers.schemes import Granularity, WeightScheme

__all__ = ["matrix_shape", "scales_of", "weight_extremes", "weight_scales"]


def weight_scales(
    weight: Tensor,
    scheme: WeightScheme,
    *,
    clip_low: Tensor | None = None,
    clip_high: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scales from the extremes of every group of entries that share one.

    With lo = min(0, smallest entry) and hi = max(0, largest entry), b bits:
    symmetric integers: scale = max(-lo, hi) / ((2^b - 1) / 2), llm-compressor's convention, below
    8 bits, and max(-lo, hi) / 127 at 8 bits, where a finer step gains .4% and would put the
    largest entry half a step off;
    floats: max(-lo, hi) / largest finite value;
    asymmetric integers: (hi - lo) / (2^b - 1), zero point = round(-2^(b-1) - lo / scale).
    Scales are rounded to the dtype they are stored in, no smaller than its smallest normal
    number and no larger than its largest. A group of zeros gets scale 1 and zero point 0.

    Nothing here waits for the device, so NaN and infinity are not raised: a group that holds
    one gets the scale NaN. Gradients reach the weight and the clip factors.

    Args:
        weight: (N, K), floating point.
        scheme: the scheme; its scale_shape(N, K) is called the scale shape below.
        clip_low: factors on lo, floating point, scale shape; 1 where None.
        clip_high: factors on hi, likewise.

    Returns:
        scale, scheme.scale_dtype, and zero_point, int8, or None if symmetric; scale shape.

    Raises:
        ValueError: weight is not a matrix of floats, its shape does not suit the scheme, or
            clip factors have another shape.
    """
    return scales_of(
        weight_extremes(weight, scheme), scheme, clip_low=clip_low, clip_high=clip_high
    )


def own_copies(
    scale: Tensor, zero_point: Tensor | None, count: int
) -> list[tuple[Tensor, Tensor | None]]:
    """A scale and zero point that linears share, once for each: files hold no tensor twice."""
    return [
        (scale.clone(), None if zero_point is None else zero_point.clone()) for _ in range(count)
    ]


def scales_of(
    extremes: tuple[Tensor, Tensor],
    scheme: WeightScheme,
    *,
    clip_low: Tensor | None = None,
    clip_high: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """weight_scales of a weight whose extremes are known.

    Args:
        extremes: lo and hi of weight_extremes.
        scheme: the scheme.
        clip_low: as weight_scales takes it.
        clip_high: likewise.

    Raises:
        ValueError: clip factors of another shape.
    """
    low, high = extremes
    for name, factor in (("clip_low", clip_low), ("clip_high", clip_high)):
        if factor is not None and factor.shape != low.shape:
            raise ValueError(
                f"{name} has shape {tuple(factor.shape)}, scales have {tuple(low.shape)}"
            )
    number = scheme.number_format
    factors = _in_float32(clip_low), _in_float32(clip_high)
    learned = any(f is not None and f.requires_grad for f in (low, high, *factors))
    if low.ndim > 1 and compiles_kernels(low) and not learned:
        from quantizers.scales_kernel import scales_at_once

        divisor = _steps(scheme)
        return scales_at_once(
            extremes, factors, divisor, number, scheme.symmetric, scheme.scale_dtype
        )
    low, high = (
        end if factor is None else end * factor
        for end, factor in zip(extremes, factors, strict=True)
    )
    span = torch.maximum(-low, high) if scheme.symmetric else high - low
    # A tensor as divisor: CUDA multiplies by the rounded reciprocal of a Python number.
    scale = _storable(span / torch.full_like(span, _steps(scheme)), scheme.scale_dtype)
    scale = scale.masked_fill(span == 0, 1.0).masked_fill(~span.isfinite(), torch.nan)
    if scheme.symmetric:
        return scale, None

    zero = (number.qmin - low / scale.to(torch.float32)).round().nan_to_num(0.0)
    zero = zero.clamp(number.qmin, number.qmax).masked_fill(span == 0, 0.0)
    return scale, zero.to(torch.int8)


def weight_extremes(weight: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry per scale, zero counted in; float32, scale shape.

    Raises:
        ValueError: weight is not a matrix of floats, or its shape does not suit the scheme.
    """
    rows, columns = matrix_shape(weight)
    if not weight.is_floating_point():
        raise ValueError(f"a weight to be quantized holds floats, not {weight.dtype}")
    shape, width = scheme.scale_shape(rows, columns), scheme.width(columns)
    by_row = scheme.granularity in (Granularity.GROUP, Granularity.CHANNEL)
    whole = columns % width == 0 and weight.is_contiguous() and not weight.requires_grad
    if by_row and whole and compiles_kernels(weight):
        from quantizers.scales_kernel import group_extremes

        low, high = group_extremes(weight, None, width)
        return low[0], high[0]
    full = columns - columns % width
    parts = [torch.unflatten(weight[:, :full], 1, (-1, width))] if full else []
    if full < columns:
        parts.append(weight[:, full:].unsqueeze(1))
    # amin and amax, not aminmax: together they are twice as fast on a CPU.
    low = torch.cat([part.amin(-1) for part in parts], 1).to(torch.float32).clamp(max=0.0)
    high = torch.cat([part.amax(-1) for part in parts], 1).to(torch.float32).clamp(min=0.0)
    if scheme.granularity is Granularity.TENSOR:
        return low.amin().reshape(shape), high.amax().reshape(shape)
    if scheme.granularity is Granularity.BLOCK:
        assert scheme.block_shape is not None
        height = scheme.block_shape[0]
        # Padding with zero changes nothing: zero is counted in already.
        padding = (0, 0, 0, shape[0] * height - rows)
        low = torch.unflatten(F.pad(low, padding), 0, (-1, height)).amin(1)
        high = torch.unflatten(F.pad(high, padding), 0, (-1, height)).amax(1)
    return low, high


def _in_float32(factor: Tensor | None) -> Tensor | None:
    return None if factor is None else factor.to(torch.float32)


def _steps(scheme: WeightScheme) -> float:
    """What a range is divided by."""
    number = scheme.number_format
    if number.is_float:
        return number.qmax
    if not scheme.symmetric:
        return number.qmax - number.qmin
    return number.qmax if number.bits == 8 else (number.qmax - number.qmin) / 2


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the stored dtype; neither zero nor subnormal nor infinite. NaN stays."""
    limits = torch.finfo(dtype)
    return scale.clamp(limits.smallest_normal, limits.max).to(dtype)


def matrix_shape(matrix: Tensor) -> tuple[int, int]:
    """Rows and columns of a weight.

    Raises:
        ValueError: it is not a matrix.
    """
    if matrix.ndim != 2:
        raise ValueError(f"a weight is a matrix (N, K), not of shape {tuple(matrix.shape)}")
    return matrix.shape[0], matrix.shape[1]
