"""Kernels that round weights and take them back, for devices that have Triton's compiler.

Each does in one pass over a weight what takes torch many, and gives the same bits as the plain
versions in :mod:`quantizers.rounding`; the search's and GPTQ's kernels round by the same functions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantizers.number_formats import NumberFormat

__all__ = [
    "codes_of",
    "kind_of",
    "level_of",
    "packed_nibbles",
    "restored",
    "restored_of",
    "rounding_report",
    "scales_at_once",
    "unpacked_nibbles",
]

# entries of a tile: what one program holds at once, and columns of it at most
_TILE = 4096
_COLUMNS = 1024
_SCALES = 1024
_WORDS = 256


def kind_of(number: NumberFormat) -> str:
    """What kernels call a format."""
    return str(number.code_dtype) if number.is_float else "int"


def scales_at_once(
    extremes: tuple[Tensor, Tensor],
    factors: tuple[Tensor | None, Tensor | None],
    steps: float,
    number: NumberFormat,
    symmetric: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of ranges, of one matrix (N, G) or of several.

    Args:
        extremes: lo and hi, (N, G) or (S, N, G) float32; may be expanded.
        factors: on lo and on hi, float32, of their shape; may be expanded; 1 where None.
        steps: what a range is divided by.
        number: the format.
        symmetric: whether there is no zero point.
        dtype: of scales.

    Returns:
        scale, dtype, and zero point, int8, or None; of the extremes' shape, contiguous.
    """
    low, high = extremes
    scale = torch.empty(low.shape, dtype=dtype, device=low.device)
    zero = scale if symmetric else torch.empty(low.shape, dtype=torch.int8, device=low.device)
    given = [_laid_out(t) for t in (low, high, *(low if f is None else f for f in factors))]
    limits = torch.finfo(dtype)
    _scales[(triton.cdiv(scale.numel(), _SCALES),)](
        *(tensor for tensor, _, _ in given),
        scale,
        zero,
        *(scale.numel(), low.shape[-2] * low.shape[-1]),
        *(stride for _, lead, step in given for stride in (lead, step)),
        *(float(number.qmin), float(number.qmax), float(steps)),
        *(limits.smallest_normal, limits.max),
        CLIP_LOW=factors[0] is not None,
        CLIP_HIGH=factors[1] is not None,
        SYMMETRIC=symmetric,
        BLOCK=_SCALES,
        # a product and what is added to it are rounded each, as by two operations
        enable_fp_fusion=False,
    )
    return scale, None if symmetric else zero


def _laid_out(tensor: Tensor) -> tuple[Tensor, int, int]:
    """A tensor (N, G) or (S, N, G), what lies between two matrices, and between entries of one."""
    if tensor.stride(-1) == tensor.stride(-2) == 0:
        step = 0
    else:
        step = 1
        if tensor.stride(-1) != 1 or tensor.stride(-2) != tensor.shape[-1]:
            tensor = tensor.contiguous()
    return tensor, tensor.stride(0) if tensor.ndim > 2 else 0, step


def codes_of(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, width: int, number: NumberFormat
) -> Tensor:
    """Codes of a weight under given scales.

    Args:
        weight: (N, K), floating point, rows contiguous.
        scale: (N, G), the scale of each group of a row; strides may be 0.
        zero_point: int8, likewise; None if symmetric.
        width: columns that share a scale, the last group's maybe fewer.
        number: the format.

    Returns:
        (N, K), the format's dtype.
    """
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=number.code_dtype, device=weight.device)
    zero = scale if zero_point is None else zero_point
    grid, sizes = _grid(rows, columns)
    _codes[grid](
        weight,
        scale,
        zero,
        codes,
        *(rows, columns, width, weight.stride(0), *scale.stride(), *zero.stride()),
        *(float(number.qmin), float(number.qmax)),
        FORMAT=kind_of(number),
        SYMMETRIC=zero_point is None,
        **sizes,
    )
    return codes


def restored_of(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, width: int, dtype: torch.dtype
) -> Tensor:
    """(codes - zero_point) * scale, computed in float32.

    Args:
        codes: (N, K), int8 or float8, rows contiguous.
        scale: as codes_of takes it.
        zero_point: likewise.
        width: likewise.
        dtype: of the result.

    Returns:
        (N, K), dtype.
    """
    rows, columns = codes.shape
    found = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    zero = scale if zero_point is None else zero_point
    grid, sizes = _grid(rows, columns)
    _restored[grid](
        codes,
        scale,
        zero,
        found,
        *(rows, columns, width, codes.stride(0), *scale.stride(), *zero.stride()),
        SYMMETRIC=zero_point is None,
        **sizes,
    )
    return found


def rounding_report(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    width: int,
    inverse: Tensor,
) -> tuple[Tensor, Tensor]:
    """What rounding a weight lost, and how large that and the weight are.

    Args:
        weight: (N, K), floating point, rows contiguous.
        codes: (N, K), int8 or float8, likewise.
        scale: as codes_of takes it.
        zero_point: likewise.
        width: likewise.
        inverse: (K,) float32, what columns of the result are multiplied with.

    Returns:
        (W - Q) inverse and W inverse, (2, N, K) float32; sums over the columns of (W - Q)^2 and
        W^2, (2, N) float32.
    """
    rows, columns = weight.shape
    lost = torch.empty(2, rows, columns, device=weight.device)
    squares = torch.empty(2, rows, device=weight.device)
    zero = scale if zero_point is None else zero_point
    block = min(triton.next_power_of_2(columns), _COLUMNS)
    tall = max(1, _TILE // block)
    _report[(triton.cdiv(rows, tall),)](
        weight,
        codes,
        scale,
        zero,
        inverse,
        lost,
        squares,
        *(rows, columns, width, weight.stride(0), codes.stride(0)),
        *(*scale.stride(), *zero.stride()),
        SYMMETRIC=zero_point is None,
        ROWS=tall,
        BLOCK=block,
    )
    return lost, squares


def packed_nibbles(codes: Tensor) -> Tensor:
    """Codes of 4 bits, each plus 8, eight to a word, the first in its lowest bits.

    Args:
        codes: int8 (N, K), contiguous.

    Returns:
        int32 (N, ceil(K / 8)), what is left over of the last word zero.
    """
    rows, columns = codes.shape
    words = triton.cdiv(columns, 8)
    packed = torch.empty(rows, words, dtype=torch.int32, device=codes.device)
    _pack[(rows, triton.cdiv(words, _WORDS))](codes, packed, columns, words, BLOCK=_WORDS)
    return packed


def unpacked_nibbles(packed: Tensor, columns: int) -> Tensor:
    """Undo packed_nibbles.

    Args:
        packed: int32 (N, ceil(columns / 8)), contiguous.
        columns: K.

    Returns:
        int8 (N, K).
    """
    rows, words = packed.shape
    codes = torch.empty(rows, columns, dtype=torch.int8, device=packed.device)
    block = 8 * _WORDS
    _unpack[(rows, triton.cdiv(columns, block))](packed, codes, columns, words, BLOCK=block)
    return codes


def _grid(rows: int, columns: int) -> tuple[tuple[int, int], dict[str, int]]:
    """How many programs cover a matrix, and the tile of each."""
    block = min(triton.next_power_of_2(columns), _COLUMNS)
    tall = max(1, _TILE // block)
    grid = (triton.cdiv(rows, tall), triton.cdiv(columns, block))
    return grid, {"ROWS": tall, "BLOCK": block}


@triton.jit
def level_of(value, scale, zero, qmin, qmax, FORMAT: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Codes of values under scales, all float32; a float's NaN stays."""
    level = tl.div_rn(value, scale)
    if FORMAT == "int":
        # far outside every format; within it, adding 1.5 * 2^23 rounds to nearest even
        level = tl.minimum(tl.maximum(level, -65536.0), 65536.0)
        level = (level + 12582912.0) - 12582912.0
        if not SYMMETRIC:
            level += zero
        level = tl.minimum(tl.maximum(level, qmin), qmax)
    else:
        level = tl.where(level == level, tl.minimum(tl.maximum(level, qmin), qmax), level)
        if FORMAT == "torch.float8_e4m3fn":
            level = level.to(tl.float8e4nv, fp_downcast_rounding="rtne").to(tl.float32)
        else:
            level = level.to(tl.float8e5, fp_downcast_rounding="rtne").to(tl.float32)
    return level


@triton.jit
def restored(value, scale, zero, qmin, qmax, FORMAT: tl.constexpr, SYMMETRIC: tl.constexpr):
    """What is left of values after rounding to the format; all float32."""
    level = level_of(value, scale, zero, qmin, qmax, FORMAT, SYMMETRIC)
    if not SYMMETRIC:
        level -= zero
    return level * scale


@triton.jit
def _scales(
    low,
    high,
    clip_low,
    clip_high,
    scale,
    zero_point,
    count,
    inner,
    low_lead,
    low_step,
    high_lead,
    high_step,
    clip_low_lead,
    clip_low_step,
    clip_high_lead,
    clip_high_step,
    qmin,
    qmax,
    steps,
    smallest,
    largest,
    CLIP_LOW: tl.constexpr,
    CLIP_HIGH: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    on = place < count
    matrix, entry = place // inner, place % inner
    least = tl.load(low + matrix * low_lead + entry * low_step, on, 0.0)
    most = tl.load(high + matrix * high_lead + entry * high_step, on, 0.0)
    if CLIP_LOW:
        least = least * tl.load(clip_low + matrix * clip_low_lead + entry * clip_low_step, on, 1.0)
    if CLIP_HIGH:
        factor = tl.load(clip_high + matrix * clip_high_lead + entry * clip_high_step, on, 1.0)
        most = most * factor
    span = tl.maximum(-least, most) if SYMMETRIC else most - least
    known = (least == least) & (most == most) & (tl.abs(span) < float("inf"))
    step = tl.div_rn(span, tl.full((BLOCK,), 1.0, tl.float32) * steps)
    step = tl.minimum(tl.maximum(step, smallest), largest)
    step = tl.where(span == 0.0, 1.0, step)
    step = tl.where(known, step, float("nan")).to(scale.dtype.element_ty)
    tl.store(scale + place, step, on)
    if not SYMMETRIC:
        zero = qmin - tl.div_rn(least, step.to(tl.float32))
        zero = tl.where(zero == zero, zero, 0.0)
        # see level_of
        zero = tl.minimum(tl.maximum(zero, -65536.0), 65536.0)
        zero = (zero + 12582912.0) - 12582912.0
        zero = tl.where(span == 0.0, 0.0, tl.minimum(tl.maximum(zero, qmin), qmax))
        tl.store(zero_point + place, zero.to(tl.int8), on)


@triton.jit
def _pack(codes, packed, columns, words, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = tl.arange(0, 8)
    column = word[:, None] * 8 + within[None, :]
    on = column < columns
    code = tl.load(codes + row * columns + column, on, 0).to(tl.int32)
    # no two share a bit: their sum is what they are together
    part = tl.where(on, (code + 8) & 15, 0) << (4 * within)[None, :]
    tl.store(packed + row * words + word, tl.sum(part, 1), word < words)


@triton.jit
def _unpack(packed, codes, columns, words, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    on = column < columns
    word = tl.load(packed + row * words + column // 8, on, 0)
    code = ((word >> (4 * (column % 8))) & 15) - 8
    tl.store(codes + row * columns + column, code.to(tl.int8), on)


@triton.jit
def _codes(
    weight,
    scale,
    zero_point,
    codes,
    rows,
    columns,
    width,
    weight_stride,
    scale_stride,
    scale_step,
    zero_stride,
    zero_step,
    qmin,
    qmax,
    FORMAT: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    on = (row < rows) & (column < columns)
    group = column // width
    step = tl.load(scale + row * scale_stride + group * scale_step, on, 1.0).to(tl.float32)
    zero = step
    if not SYMMETRIC:
        zero = tl.load(zero_point + row * zero_stride + group * zero_step, on, 0).to(tl.float32)
    value = tl.load(weight + row * weight_stride + column, on, 0.0).to(tl.float32)
    level = level_of(value, step, zero, qmin, qmax, FORMAT, SYMMETRIC)
    tl.store(codes + row * columns + column, level.to(codes.dtype.element_ty), on)


@triton.jit
def _restored(
    codes,
    scale,
    zero_point,
    found,
    rows,
    columns,
    width,
    codes_stride,
    scale_stride,
    scale_step,
    zero_stride,
    zero_step,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    on = (row < rows) & (column < columns)
    group = column // width
    level = tl.load(codes + row * codes_stride + column, on, 0.0).to(tl.float32)
    if not SYMMETRIC:
        zero = tl.load(zero_point + row * zero_stride + group * zero_step, on, 0)
        level -= zero.to(tl.float32)
    step = tl.load(scale + row * scale_stride + group * scale_step, on, 1.0).to(tl.float32)
    tl.store(found + row * columns + column, (level * step).to(found.dtype.element_ty), on)


@triton.jit
def _report(
    weight,
    codes,
    scale,
    zero_point,
    inverse,
    lost,
    squares,
    rows,
    columns,
    width,
    weight_stride,
    codes_stride,
    scale_stride,
    scale_step,
    zero_stride,
    zero_step,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = own.to(tl.int64)[:, None]
    error = tl.zeros((ROWS,), tl.float32)
    size = tl.zeros((ROWS,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = (start + tl.arange(0, BLOCK))[None, :]
        on = (row < rows) & (column < columns)
        group = column // width
        level = tl.load(codes + row * codes_stride + column, on, 0.0).to(tl.float32)
        if not SYMMETRIC:
            zero = tl.load(zero_point + row * zero_stride + group * zero_step, on, 0)
            level -= zero.to(tl.float32)
        step = tl.load(scale + row * scale_stride + group * scale_step, on, 1.0).to(tl.float32)
        value = tl.load(weight + row * weight_stride + column, on, 0.0).to(tl.float32)
        difference = tl.where(on, value - level * step, 0.0)
        error += tl.sum(difference * difference, 1)
        size += tl.sum(value * value, 1)
        by = tl.load(inverse + column, column < columns, 0.0)
        tl.store(lost + row * columns + column, difference * by, on)
        tl.store(lost + (rows + row) * columns + column, value * by, on)
    tl.store(squares + own, error, own < rows)
    tl.store(squares + rows + own, size, own < rows)
