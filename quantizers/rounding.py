"""Rounding to nearest, and back."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.devices import compiles_kernels
from quantizers.errors import NonFiniteError
from quantizers.number_formats import codes_in_float32, rounded_to_float8
from quantizers.scales import matrix_shape, own_copies, weight_scales
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
    "scales_by_row",
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
    rows, columns = matrix_shape(weight)
    _check_parameters(scale, zero_point, scheme, rows, columns)
    number, weight = scheme.number_format, weight.detach()
    scales = scales_by_row(scale.detach(), scheme, rows)
    zeros = None if zero_point is None else scales_by_row(zero_point, scheme, rows)
    width = scheme.width(columns)
    if weight.stride(1) == 1 and compiles_kernels(weight, number):
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
    return [
        quantize_weight(weight, *own, scheme)
        for weight, own in zip(weights, own_copies(scale, zero_point, len(weights)), strict=True)
    ]


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
    rows, columns = matrix_shape(codes)
    _check_parameters(quantized.scale, zero_point, scheme, rows, columns)
    scales, zeros = row_scales(quantized, scheme)
    width = scheme.width(columns)
    if codes.stride(1) == 1 and compiles_kernels(codes, scheme.number_format):
        from quantizers.rounding_kernel import restored_of

        return restored_of(codes, scales, zeros, width, dtype)
    scales = scales.to(torch.float32)
    restored = torch.empty_like(codes, dtype=dtype, memory_format=torch.contiguous_format)
    for part in _row_slices(codes):
        work = codes_in_float32(codes[part])
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
    rows, columns = matrix_shape(weight)
    if weight.dtype != torch.float32:
        raise ValueError(f"searched are float32 weights, not {weight.dtype}")
    _check_parameters(scale, zero_point, scheme, rows, columns)
    number, width = scheme.number_format, scheme.width(columns)
    scales = scales_by_row(scale.detach(), scheme, rows).to(torch.float32)
    zeros = None if zero_point is None else scales_by_row(zero_point, scheme, rows)
    work = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for (tile, tile_scale), (source, _) in zip(
        _tiles(work, scales, width), _tiles(weight, scales, width), strict=True
    ):
        torch.div(source, tile_scale, out=tile)
    if number.is_float:
        work = rounded_to_float8(work.clamp_(number.qmin, number.qmax), number)
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
    scales = scales_by_row(quantized.scale.detach(), scheme, rows)
    return scales, None if zero is None else scales_by_row(zero, scheme, rows)


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
    per_row, width = scales_by_row(scale, scheme, rows), scheme.width(columns)
    if per_row.shape[1] == 1:
        return per_row.expand(rows, columns)
    return per_row.repeat_interleave(width, dim=1)[:, :columns]


def scales_by_row(parameter: Tensor, scheme: WeightScheme, rows: int) -> Tensor:
    """Scales or zero points with one row for each row of the weight.

    Args:
        parameter: any dtype, of scheme.scale_shape(N, K).
        scheme: the scheme.
        rows: N.

    Returns:
        (N, groups of a row), the same dtype; a view where it can be.
    """
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
