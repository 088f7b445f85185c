"""GPTQ's column loop as one launch of a Triton kernel, for devices that have a compiler.

Triton comes with torch where torch is built for CUDA; elsewhere this module cannot be imported, and
:func:`quantizers.gptq.round_columns_plainly` does the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantizers.number_formats import NumberFormat
from quantizers.rounding_kernel import kind_of, level_of

__all__ = ["round_columns_at_once"]

# rows of the weight that one program rounds, and columns that a warp of it holds
_ROWS = 16
_COLUMNS = 128


def round_columns_at_once(
    weight: Tensor,
    carried: Tensor,
    unit: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    groups: Tensor,
    number: NumberFormat,
) -> tuple[Tensor, Tensor]:
    """quantizers.gptq.round_columns without a step of Python per column.

    Errors of columns are added in their order here, by one product there: last bits differ.
    """
    columns, rows = weight.shape
    codes, error = torch.empty_like(weight), torch.empty_like(weight)
    block = triton.next_power_of_2(columns)
    _round_columns[(triton.cdiv(rows, _ROWS),)](
        weight.contiguous(),
        carried.contiguous(),
        unit.contiguous(),
        scale.contiguous(),
        scale if zero_point is None else zero_point.contiguous(),
        groups,
        codes,
        error,
        columns,
        rows,
        float(number.qmin),
        float(number.qmax),
        FORMAT=kind_of(number),
        SYMMETRIC=zero_point is None,
        BLOCK=block,
        ROWS=_ROWS,
        num_warps=min(max(1, block // _COLUMNS), 8),
    )
    return codes, error


@triton.jit
def _round_columns(
    weight,
    carried,
    unit,
    scale,
    zero_point,
    groups,
    codes,
    error,
    columns,
    rows,
    qmin,
    qmax,
    FORMAT: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    lane = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    on = lane < rows
    place = column[:, None] * rows + lane[None, :]
    inside = (column[:, None] < columns) & on[None, :]
    target = tl.load(weight + place, inside, 0.0) + tl.load(carried + place, inside, 0.0)
    # what a column takes is loaded while the one before is rounded
    group = tl.load(groups)
    after = tl.load(groups + 1, columns > 1, 0)
    own = tl.load(weight + lane, on, 0.0)
    step = tl.load(scale + group * rows + lane, on, 1.0)
    zero = step
    if not SYMMETRIC:
        zero = tl.load(zero_point + group * rows + lane, on, 0.0)
    share = tl.load(unit + column, (column > 0) & (column < columns), 0.0)
    for j in range(columns):
        follows = on & (j + 1 < columns)
        next_own = tl.load(weight + (j + 1) * rows + lane, follows, 0.0)
        next_step = tl.load(scale + after * rows + lane, follows, 1.0)
        next_zero = next_step
        if not SYMMETRIC:
            next_zero = tl.load(zero_point + after * rows + lane, follows, 0.0)
        later = (column > j + 1) & (column < columns)
        next_share = tl.load(unit + (j + 1) * columns + column, later, 0.0)
        after = tl.load(groups + j + 2, j + 2 < columns, 0)
        # adding zeros changes nothing: this is row j itself
        wanted = tl.sum(tl.where(column[:, None] == j, target, 0.0), 0)
        code = level_of(wanted, step, zero, qmin, qmax, FORMAT, SYMMETRIC)
        level = code if SYMMETRIC else code - zero
        lost = own - level * step
        tl.store(codes + j * rows + lane, code, on)
        tl.store(error + j * rows + lane, lost, on)
        target += share[:, None] * lost[None, :]
        own, step, zero, share = next_own, next_step, next_zero, next_share
