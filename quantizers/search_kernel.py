"""Kernels of the searches, for devices that have Triton's compiler.

Each does in one pass over a weight, or over inputs, what takes torch many: a search over scales or
clip factors waits for memory, not for arithmetic. The scales themselves come from
:func:`quantizers.scales.scales_of` in all cases.
Nothing here adds in an order that changes from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantizers.number_formats import NumberFormat
from quantizers.rounding_kernel import kind_of, restored

__all__ = ["add_row_dots_", "clip_errors", "rounding_loss", "window_sums"]

# entries of a tile: what one program holds at once
_TILE = 8192
_ROWS = 32
# columns of inputs that one program sums, and rows it takes at a time
_SUM_COLUMNS, _SUM_ROWS = 64, 32


def rounding_loss(
    weight: Tensor,
    factors: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    width: int,
    number: NumberFormat,
) -> Tensor:
    """(Q(W f) - W f) / f: what rounding loses, seen from the inputs as they were.

    Args:
        weight: (N, K), floating point, contiguous.
        factors: (R, K) float32, contiguous, each time another f.
        scale: (R, N, K / width), contiguous, the stored dtype.
        zero_point: int8, likewise; None if symmetric.
        width: columns that share a scale; divides K.
        number: the format.

    Returns:
        (R, N, K) bfloat16.
    """
    rows, columns = weight.shape
    shape = (len(factors), rows, columns)
    lost = torch.empty(shape, dtype=torch.bfloat16, device=weight.device)
    block = min(triton.next_power_of_2(width), 1024)
    tall = max(1, _TILE // block)
    _rounding_loss[(triton.cdiv(rows, tall), columns // width, len(factors))](
        weight,
        factors,
        scale,
        scale if zero_point is None else zero_point,
        lost,
        rows,
        columns,
        width,
        float(number.qmin),
        float(number.qmax),
        FORMAT=kind_of(number),
        SYMMETRIC=zero_point is None,
        ROWS=tall,
        BLOCK=block,
    )
    return lost


def add_row_dots_(out: Tensor, left: Tensor, right: Tensor, single: int | None = None) -> None:
    """Add the products of equal rows, (N,) float32, to what is there.

    Args:
        out: (N,) float32, contiguous.
        left: (N, K) float32; rows may lie apart.
        right: (N, K) float32 or bfloat16, likewise.
        single: columns that count once, those after them twice; all once where None.
    """
    rows, columns = left.shape
    block = min(triton.next_power_of_2(columns), 1024)
    tall = max(1, _TILE // block)
    _row_dots[(triton.cdiv(rows, tall),)](
        left,
        right,
        out,
        rows,
        columns,
        columns if single is None else single,
        left.stride(0),
        right.stride(0),
        ROWS=tall,
        BLOCK=block,
    )


def clip_errors(
    weight: Tensor,
    gram: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    number: NumberFormat,
) -> tuple[Tensor, Tensor]:
    """The error d H_gg d^T of every row's group under each of several scales, and the best scale.

    With d what rounding loses. Products of 19 bit factors (TF32), sums in float32.

    Args:
        weight: (N, K), floating point, contiguous.
        gram: (groups, g, g) float32, the blocks of the Gram matrix, g = K / groups <= 128.
        scales: (S, N, groups), contiguous, the stored dtype; S <= 256.
        zero_points: int8, likewise; None if symmetric.
        number: the format.

    Returns:
        errors (S, N, groups) float32, and which is the least, the first of equals: (N, groups)
        uint8.
    """
    rows, columns = weight.shape
    steps, _, groups = scales.shape
    width = columns // groups
    errors = torch.empty(steps, rows, groups, device=weight.device)
    best = torch.empty(rows, groups, dtype=torch.uint8, device=weight.device)
    _clip_errors[(triton.cdiv(rows, _ROWS), groups)](
        weight,
        gram,
        scales,
        scales if zero_points is None else zero_points,
        errors,
        best,
        rows,
        columns,
        width,
        steps,
        float(number.qmin),
        float(number.qmax),
        FORMAT=kind_of(number),
        SYMMETRIC=zero_points is None,
        ROWS=_ROWS,
        BLOCK=max(16, triton.next_power_of_2(width)),
    )
    return errors, best


def window_sums(windows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of x, sum of |x|, smallest and largest x of each window and channel, in one pass.

    Args:
        windows: (W, T, K), floating point, contiguous.

    Returns:
        four of (W, K) float32.
    """
    count, length, columns = windows.shape
    sums = tuple(torch.empty(count, columns, device=windows.device) for _ in range(4))
    _window_sums[(triton.cdiv(columns, _SUM_COLUMNS), count)](
        windows, *sums, length, columns, ROWS=_SUM_ROWS, COLUMNS=_SUM_COLUMNS
    )
    return sums  # type: ignore[return-value]


@triton.jit
def _rounding_loss(
    weight,
    factors,
    scale,
    zero_point,
    lost,
    rows,
    columns,
    width,
    qmin,
    qmax,
    FORMAT: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    time = tl.program_id(2)
    own = (time * rows + row.to(tl.int64)) * (columns // width) + group
    step = tl.load(scale + own, row < rows, 1.0).to(tl.float32)[:, None]
    zero = step
    if not SYMMETRIC:
        zero = tl.load(zero_point + own, row < rows, 0).to(tl.float32)[:, None]
    for start in range(0, width, BLOCK):
        inside = start + tl.arange(0, BLOCK) < width
        column = group * width + start + tl.arange(0, BLOCK)
        on = (row < rows)[:, None] & inside[None, :]
        place = row[:, None].to(tl.int64) * columns + column[None, :]
        by = tl.load(factors + time * columns + column, inside, 1.0)[None, :]
        value = tl.load(weight + place, on, 0.0).to(tl.float32) * by
        left = restored(value, step, zero, qmin, qmax, FORMAT, SYMMETRIC)
        loss = ((left - value) / by).to(tl.bfloat16)
        tl.store(lost + time.to(tl.int64) * rows * columns + place, loss, on)


@triton.jit
def _row_dots(
    left,
    right,
    out,
    rows,
    columns,
    single,
    left_stride,
    right_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.load(out + row, row < rows, 0.0)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        on = (row < rows)[:, None] & (column < columns)[None, :]
        a = tl.load(left + row[:, None].to(tl.int64) * left_stride + column[None, :], on, 0.0)
        b = tl.load(right + row[:, None].to(tl.int64) * right_stride + column[None, :], on, 0.0)
        times = tl.where(column < single, 1.0, 2.0)
        total += tl.sum(a * b.to(tl.float32) * times[None, :], 1)
    tl.store(out + row, total, row < rows)


@triton.jit
def _clip_errors(
    weight,
    gram,
    scales,
    zero_points,
    errors,
    best,
    rows,
    columns,
    width,
    steps,
    qmin,
    qmax,
    FORMAT: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    groups = columns // width
    lane = tl.arange(0, BLOCK)
    on = (row < rows)[:, None] & (lane < width)[None, :]
    value = tl.load(
        weight + row[:, None].to(tl.int64) * columns + group * width + lane[None, :], on, 0.0
    ).to(tl.float32)
    square = (lane < width)[:, None] & (lane < width)[None, :]
    within = lane[:, None] * width + lane[None, :]
    inputs = tl.load(gram + group.to(tl.int64) * width * width + within, square, 0.0)
    least = tl.full((ROWS,), float("inf"), tl.float32)
    chosen = tl.zeros((ROWS,), tl.int32)
    for number in range(steps):
        own = (number * rows + row.to(tl.int64)) * groups + group
        step = tl.load(scales + own, row < rows, 1.0).to(tl.float32)[:, None]
        zero = step
        if not SYMMETRIC:
            zero = tl.load(zero_points + own, row < rows, 0).to(tl.float32)[:, None]
        lost = restored(value, step, zero, qmin, qmax, FORMAT, SYMMETRIC) - value
        product = tl.dot(lost, inputs, input_precision="tf32")
        error = tl.sum(product * lost, 1)
        tl.store(errors + own, error, row < rows)
        chosen = tl.where(error < least, number, chosen)
        least = tl.where(error < least, error, least)
    tl.store(best + row.to(tl.int64) * groups + group, chosen.to(tl.uint8), row < rows)


@triton.jit
def _window_sums(
    windows,
    total,
    absolute,
    low,
    high,
    length,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    window = tl.program_id(1)
    own = column < columns
    # row by row of a tile: what lies below one another meets once, at the end
    summed = tl.zeros((ROWS, COLUMNS), tl.float32)
    size = tl.zeros((ROWS, COLUMNS), tl.float32)
    least = tl.full((ROWS, COLUMNS), float("inf"), tl.float32)
    most = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    for start in range(0, length, ROWS):
        row = start + tl.arange(0, ROWS)
        on = (row < length)[:, None] & own[None, :]
        place = (window.to(tl.int64) * length + row[:, None]) * columns + column[None, :]
        value = tl.load(windows + place, on, 0.0).to(tl.float32)
        summed += value
        size += tl.abs(value)
        least = tl.minimum(least, tl.where(on, value, float("inf")))
        most = tl.maximum(most, tl.where(on, value, float("-inf")))
    place = window * columns + column
    tl.store(total + place, tl.sum(summed, 0), own)
    tl.store(absolute + place, tl.sum(size, 0), own)
    tl.store(low + place, tl.min(least, 0), own)
    tl.store(high + place, tl.max(most, 0), own)
