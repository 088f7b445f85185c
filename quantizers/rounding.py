"""Scales, rounding to nearest, and back."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quantizers.devices import compiles_kernels
from quantizers.errors import NonFiniteError
from quantizers.schemes import Granularity, WeightScheme

__all__ = [
    "ClipRange",
    "QuantizedWeight",
    "dequantize",
    "expand_scale",
    "quantize_dequantize_weight",
    "quantize_weight",
    "round_group",
    "round_to_nearest",
    "row_scales",
    "scales_of",
    "weight_extremes",
    "weight_scales",
]

# Entries worked on at once: a slice that stays in a CPU's cache rounds four times faster.
_CPU_ENTRIES = 1 << 19
_DEVICE_ENTRIES = 1 << 26


# factors on the lower and on the upper end of every range that a scale comes from
ClipRange = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A quantized weight (N, K): W is about (codes - zero_point) * scale.

    Attributes:
        codes: (N, K), int8 signed codes or float8.
        scale: scheme.scale_dtype, of shape scheme.scale_shape(N, K).
        zero_point: int8, shape of scale, within the range of the codes; None if symmetric.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


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
        from quantizers.rounding_kernel import scales_at_once

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


def quantize_weight(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: WeightScheme
) -> QuantizedWeight:
    """Codes of a weight under given scales, computed in float32.

    Integers: clamp(round(W / scale) + zero_point), ties to even. Floats: W / scale, clamped
    to the largest finite value, rounded to the format, ties to even.
    Where W / scale is NaN, so is a float code, and an integer code means nothing.

    Args:
        weight: (N, K), floating point; no gradient passes.
        scale: scheme.scale_dtype, scheme.scale_shape(N, K); kept in the result as it is.
        zero_point: int8, shape of scale; None if the scheme is symmetric.
        scheme: the scheme.

    Raises:
        ValueError: a shape, a dtype, or a zero point's presence does not suit the scheme.
    """
    rows, columns = _matrix_shape(weight)
    _check_parameters(scale, zero_point, scheme, rows, columns)
    number, weight = scheme.number_format, weight.detach()
    scales = _per_row(scale.detach(), scheme, rows)
    zeros = None if zero_point is None else _per_row(zero_point, scheme, rows)
    width = scheme.width(columns)
    if compiles_kernels(weight) and weight.stride(1) == 1:
        from quantizers.rounding_kernel import codes_of

        found = codes_of(weight, scales, zeros, width, number)
        return QuantizedWeight(found, scale, zero_point)
    scales = scales.to(torch.float32)
    codes = torch.empty_like(weight, dtype=number.code_dtype, memory_format=torch.contiguous_format)
    for part in _row_slices(weight):
        work = weight[part].to(torch.float32, copy=True)
        for tile, tile_scale in _tiles(work, scales[part], width):
            tile.div_(tile_scale)
        if not number.is_float:
            work.round_()
        if zeros is not None:
            for tile, tile_zero in _tiles(work, zeros[part], width):
                tile.add_(tile_zero)
        codes[part] = work.clamp_(number.qmin, number.qmax)
    return QuantizedWeight(codes, scale, zero_point)


def round_to_nearest(
    weight: Tensor, scheme: WeightScheme, clip: Tensor | ClipRange | None = None
) -> QuantizedWeight:
    """Quantize a weight by its own extremes: weight_scales, then quantize_weight.

    Waits for the device once.

    Args:
        weight: (N, K), floating point.
        scheme: the scheme.
        clip: factors on the extremes, scheme.scale_shape(N, K): one for both, or a pair for the
            lower and the upper; 1 where None.

    Raises:
        NonFiniteError: weight holds NaN or infinity, or a range that float32 cannot hold.
        ValueError: weight does not suit the scheme.
    """
    ((scale, zero_point),) = _scales([weight], scheme, [clip], refuse=True)
    return quantize_weight(weight, scale, zero_point, scheme)


def round_group(
    weights: Sequence[Tensor],
    scheme: WeightScheme,
    clips: Sequence[Tensor | ClipRange | None],
    *,
    refuse: bool = True,
) -> list[QuantizedWeight]:
    """Quantize linears that a server fuses: one scale for all where a tensor has one.

    Waits for the device once, unless nothing is to be refused.

    Args:
        weights: (N_i, K) each, floating point.
        scheme: the scheme.
        clips: of each weight, as round_to_nearest takes it; all the same where the scale is.
        refuse: whether weights that are not finite are refused; where not, their scales are NaN.

    Raises:
        NonFiniteError, ValueError: as round_to_nearest.
    """
    if scheme.granularity is not Granularity.TENSOR:
        found = _scales(weights, scheme, clips, refuse)
        return [
            quantize_weight(weight, scale, zero_point, scheme)
            for weight, (scale, zero_point) in zip(weights, found, strict=True)
        ]
    stacked = torch.cat(list(weights))
    ((scale, zero_point),) = _scales([stacked], scheme, clips[:1], refuse)
    # each its own copy: files hold no tensor twice
    return [quantize_weight(weight, scale.clone(), zero_point, scheme) for weight in weights]


def _scales(
    weights: Sequence[Tensor],
    scheme: WeightScheme,
    clips: Sequence[Tensor | ClipRange | None],
    refuse: bool,
) -> list[tuple[Tensor, Tensor | None]]:
    """Scales and zero points of each weight; all before one is looked at: one wait."""
    pairs = [clip if isinstance(clip, tuple) else (clip, clip) for clip in clips]
    found = [
        weight_scales(weight.detach(), scheme, clip_low=low, clip_high=high)
        for weight, (low, high) in zip(weights, pairs, strict=True)
    ]
    if not refuse:
        return found
    finite = torch.stack([scale.isfinite().all() for scale, _ in found]).tolist()
    for weight, whole in zip(weights, finite, strict=True):
        if not whole:
            raise NonFiniteError(f"a weight of shape {tuple(weight.shape)} holds NaN or infinity")
    return found


def dequantize(
    quantized: QuantizedWeight, scheme: WeightScheme, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(codes - zero_point) * scale, computed in float32.

    Args:
        quantized: codes (N, K) with their scales.
        scheme: the scheme they were made with.
        dtype: of the result.

    Returns:
        (N, K), dtype.

    Raises:
        ValueError: a shape, a dtype, or a zero point's presence does not suit the scheme.
    """
    codes, zero_point = quantized.codes, quantized.zero_point
    rows, columns = _matrix_shape(codes)
    _check_parameters(quantized.scale, zero_point, scheme, rows, columns)
    scales, zeros = row_scales(quantized, scheme)
    width = scheme.width(columns)
    if compiles_kernels(codes) and codes.stride(1) == 1:
        from quantizers.rounding_kernel import restored_of

        return restored_of(codes, scales, zeros, width, dtype)
    scales = scales.to(torch.float32)
    restored = torch.empty_like(codes, dtype=dtype, memory_format=torch.contiguous_format)
    for part in _row_slices(codes):
        work = codes[part].to(torch.float32)
        if zeros is not None:
            for tile, tile_zero in _tiles(work, zeros[part], width):
                tile.sub_(tile_zero)
        for tile, tile_scale in _tiles(work, scales[part], width):
            tile.mul_(tile_scale)
        restored[part] = work
    return restored


def quantize_dequantize_weight(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: WeightScheme
) -> Tensor:
    """dequantize(quantize_weight(weight, ...)) in float32, bit for bit, without codes.

    For searches, which try many scales on rows that fit a cache.

    Args:
        weight: (N, K) float32.
        scale: as quantize_weight takes it.
        zero_point: likewise.
        scheme: the scheme.

    Returns:
        (N, K) float32.

    Raises:
        ValueError: a shape, a dtype, or a zero point's presence does not suit the scheme.
    """
    rows, columns = _matrix_shape(weight)
    if weight.dtype != torch.float32:
        raise ValueError(f"searched are float32 weights, not {weight.dtype}")
    _check_parameters(scale, zero_point, scheme, rows, columns)
    number, width = scheme.number_format, scheme.width(columns)
    scales = _per_row(scale.detach(), scheme, rows).to(torch.float32)
    zeros = None if zero_point is None else _per_row(zero_point, scheme, rows)
    work = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for (tile, tile_scale), (source, _) in zip(
        _tiles(work, scales, width), _tiles(weight, scales, width), strict=True
    ):
        torch.div(source, tile_scale, out=tile)
    if number.is_float:
        work.copy_(work.clamp_(number.qmin, number.qmax).to(number.code_dtype))
    elif zeros is None:
        work.round_().clamp_(number.qmin, number.qmax)
    else:
        work.round_()
        for tile, tile_zero in _tiles(work, zeros, width):
            tile.add_(tile_zero).clamp_(number.qmin, number.qmax).sub_(tile_zero)
    for tile, tile_scale in _tiles(work, scales, width):
        tile.mul_(tile_scale)
    return work


def row_scales(quantized: QuantizedWeight, scheme: WeightScheme) -> tuple[Tensor, Tensor | None]:
    """Scales, and zero points, with a row for each row of a weight (N, K): (N, groups of a row)."""
    rows, zero = len(quantized.codes), quantized.zero_point
    scales = _per_row(quantized.scale.detach(), scheme, rows)
    return scales, None if zero is None else _per_row(zero, scheme, rows)


def expand_scale(scale: Tensor, scheme: WeightScheme, rows: int, columns: int) -> Tensor:
    """The scale, or zero point, of every entry of a weight.

    Args:
        scale: any dtype, scheme.scale_shape(rows, columns).
        scheme: the scheme.
        rows: N, out features.
        columns: K, in features.

    Returns:
        (N, K), the dtype of scale; a view where one scale serves whole rows.

    Raises:
        ValueError: scale has another shape.
    """
    _check_shape("scale", scale, scheme.scale_shape(rows, columns))
    per_row, width = _per_row(scale, scheme, rows), scheme.width(columns)
    if per_row.shape[1] == 1:
        return per_row.expand(rows, columns)
    return per_row.repeat_interleave(width, dim=1)[:, :columns]


def weight_extremes(weight: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry per scale, zero counted in; float32, scale shape.

    Raises:
        ValueError: weight is not a matrix of floats, or its shape does not suit the scheme.
    """
    rows, columns = _matrix_shape(weight)
    if not weight.is_floating_point():
        raise ValueError(f"a weight to be quantized holds floats, not {weight.dtype}")
    shape, width = scheme.scale_shape(rows, columns), scheme.width(columns)
    by_row = scheme.granularity in (Granularity.GROUP, Granularity.CHANNEL)
    whole = columns % width == 0 and weight.is_contiguous() and not weight.requires_grad
    if by_row and whole and compiles_kernels(weight):
        from quantizers.search_kernel import group_extremes

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


def _per_row(parameter: Tensor, scheme: WeightScheme, rows: int) -> Tensor:
    """Scales or zero points with one row for each row of the weight: (N, groups of a row)."""
    if scheme.granularity is Granularity.TENSOR:
        return parameter.reshape(1, 1).expand(rows, 1)
    if scheme.granularity is Granularity.BLOCK:
        assert scheme.block_shape is not None
        return parameter.repeat_interleave(scheme.block_shape[0], dim=0)[:rows]
    return parameter


def _row_slices(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows small enough that a float32 copy of one is cheap."""
    entries = _CPU_ENTRIES if matrix.device.type == "cpu" else _DEVICE_ENTRIES
    step = max(1, entries // matrix.shape[1])
    return (slice(start, start + step) for start in range(0, matrix.shape[0], step))


def _tiles(matrix: Tensor, per_row: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of a matrix (n, K), each with the part of per_row that broadcasts over it.

    One view holds the full groups of width columns, a second the rest, if there is one.
    """
    columns = matrix.shape[1]
    groups = columns // width
    if groups:
        full = torch.unflatten(matrix[:, : groups * width], 1, (groups, width))
        yield full, per_row[:, :groups, None]
    if groups * width < columns:
        yield matrix[:, groups * width :], per_row[:, groups:]


def _matrix_shape(matrix: Tensor) -> tuple[int, int]:
    if matrix.ndim != 2:
        raise ValueError(f"a weight is a matrix (N, K), not of shape {tuple(matrix.shape)}")
    return matrix.shape[0], matrix.shape[1]


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the scheme needs {shape}")


def _check_parameters(
    scale: Tensor, zero_point: Tensor | None, scheme: WeightScheme, rows: int, columns: int
) -> None:
    shape = scheme.scale_shape(rows, columns)
    _check_shape("scale", scale, shape)
    if scale.dtype != scheme.scale_dtype:
        raise ValueError(
            f"scale is {scale.dtype}, but is stored as {scheme.scale_dtype}: "
            "round it before computing codes"
        )
    if (zero_point is None) != scheme.symmetric:
        raise ValueError(
            "a symmetric scheme has no zero point"
            if scheme.symmetric
            else "an asymmetric scheme needs a zero point"
        )
    if zero_point is not None:
        _check_shape("zero_point", zero_point, shape)
        if zero_point.dtype != torch.int8:
            raise ValueError(f"zero_point is {zero_point.dtype}, not torch.int8")
