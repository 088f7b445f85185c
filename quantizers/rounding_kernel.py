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
    "restored",
    "restored_of",
    "rounding_report",
]

# entries of a tile: what one program holds at once, and columns of it at most
_TILE = 4096
_COLUMNS = 1024


def kind_of(number: NumberFormat) -> str:
    """What kernels call a format."""
    return str(number.code_dtype) if number.is_float else "int"


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
    # a program goes along its rows: what they lose is summed there
    (programs, _), sizes = _grid(rows, columns)
    _report[(programs,)](
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
        **sizes,
        # what is on the grid loses nothing
        enable_fp_fusion=False,
    )
    return lost, squares


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
