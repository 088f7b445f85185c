"""Kernels of ranges and scales, for devices that have Triton's compiler: see quantizers.scales."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantizers.number_formats import NumberFormat

__all__ = ["group_extremes", "scales_at_once"]

# entries of a tile: what one program holds at once; scales that one finds
_TILE = 8192
_SCALES = 1024


def group_extremes(weight: Tensor, factors: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry of each group of a weight whose columns are multiplied, 0 too.

    NaN, both of them, where nothing is multiplied and a group holds one.

    Args:
        weight: (N, K), floating point, contiguous.
        factors: (R, K) float32, contiguous, what columns are multiplied with each time; None:
            nothing, once.
        width: columns of a group; divides K.

    Returns:
        low and high, (R, N, K / width) float32.
    """
    rows, columns = weight.shape
    groups = columns // width
    times = 1 if factors is None else len(factors)
    low = torch.empty(times, rows, groups, device=weight.device)
    high = torch.empty_like(low)
    block = min(triton.next_power_of_2(width), _TILE)
    tall = max(1, _TILE // block)
    _group_extremes[(triton.cdiv(rows, tall), groups)](
        weight,
        weight if factors is None else factors,
        low,
        high,
        rows,
        columns,
        width,
        times,
        FACTOR=factors is not None,
        ROWS=tall,
        BLOCK=block,
    )
    return low, high


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


@triton.jit
def _group_extremes(
    weight,
    factors,
    low,
    high,
    rows,
    columns,
    width,
    times,
    FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    for time in range(times):
        # zero is counted in
        least = tl.zeros((ROWS,), tl.float32)
        most = tl.zeros((ROWS,), tl.float32)
        unknown = tl.zeros((ROWS,), tl.int32)
        for start in range(0, width, BLOCK):
            inside = start + tl.arange(0, BLOCK) < width
            column = group * width + start + tl.arange(0, BLOCK)
            on = (row < rows)[:, None] & inside[None, :]
            place = row[:, None].to(tl.int64) * columns + column[None, :]
            value = tl.load(weight + place, on, 0.0).to(tl.float32)
            if FACTOR:
                value = value * tl.load(factors + time * columns + column, inside, 0.0)[None, :]
            else:
                # a smallest or largest entry is never NaN
                unknown += tl.sum((value != value).to(tl.int32), 1)
            least = tl.minimum(least, tl.min(value, 1))
            most = tl.maximum(most, tl.max(value, 1))
        least = tl.where(unknown > 0, float("nan"), least)
        most = tl.where(unknown > 0, float("nan"), most)
        own = (time * rows + row.to(tl.int64)) * (columns // width) + group
        tl.store(low + own, least, row < rows)
        tl.store(high + own, most, row < rows)


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
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
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
