"""GPTQ (arXiv 2210.17323): rounding column by column, each carrying the error of those before.

With H = R R^T, R upper triangular, the output error of codes Q is ||(W - Q) R||^2 (Frobenius).
Column j of (W - Q) R is R_jj (w_j - q_j) plus the sum over k < j of R_kj (w_k - q_k): rounding
w_j + sum over k < j of (w_k - q_k) R_kj / R_jj makes it as small as a grid allows. These are the
codes of the paper's algorithm 1, whose factor of the inverse of H is the inverse of R; here the
inverse is never formed, and the error of a block of columns is passed on by one product.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.devices import compiles_kernels
from quantizers.number_formats import NumberFormat, rounded_to_float8
from quantizers.rounding import QuantizedWeight, scales_by_row
from quantizers.scales import weight_scales
from quantizers.schemes import Granularity, WeightScheme

__all__ = [
    "GramFactor",
    "factorize",
    "gptq",
    "made_up_target",
    "round_columns",
    "round_columns_plainly",
    "scales_by_group",
]

# what damping is multiplied with, one after the other, until H is positive definite
_RAISES = (1.0, 10.0, 100.0)


@dataclass(frozen=True, eq=False)
class GramFactor:
    """A damped Gram matrix, its columns in the order they are rounded in: H = R R^T.

    Attributes:
        upper: R, (K, K) float32, upper triangular.
        order: (K,) int64, the column that comes first, second, ...
        damping: share of the mean diagonal that was added to it.
        in_order: whether columns are rounded as they stand.
    """

    upper: Tensor
    order: Tensor
    damping: float
    in_order: bool


def factorize(
    gram: Tensor,
    *,
    percdamp: float = 0.01,
    actorder: bool = False,
    holds: Callable[[Tensor], bool] = bool,
) -> GramFactor | None:
    """Damp a Gram matrix and factorize it; None where no damping makes it positive definite.

    A column that was always zero gets the diagonal entry 1: it is rounded to nearest, and neither
    takes nor hands on an error. Damping is percdamp, then ten and a hundred times that.

    Args:
        gram: (K, K), the inputs' Gram matrix, of any scale.
        percdamp: share of the mean diagonal of the columns that were not always zero.
        actorder: largest diagonal first (the first of equals), else as they stand.
        holds: says whether a factor is one, given that as a bool (). To read it a device is waited
            for; who goes on with it at once says yes, and reads it later.
    """
    diagonal = gram.diagonal().to(torch.float64)
    dead = diagonal <= 0
    order = torch.arange(len(diagonal), device=gram.device)
    if actorder:
        order = diagonal.sort(descending=True, stable=True).indices
    mean = torch.where(dead, 0.0, diagonal).sum() / (~dead).sum().clamp(min=1)
    live = torch.where(dead, torch.ones_like(diagonal), diagonal)
    # reversed in both directions a lower factor is an upper one
    backwards = order.flip(0)
    # copied once, and only then in float64: of a wide matrix each copy counts
    reversed_gram = gram[backwards[:, None], backwards].to(torch.float64)
    for times in _RAISES:
        damped = torch.where(dead, live, live + percdamp * times * mean)
        reversed_gram.diagonal().copy_(damped[backwards])
        lower, failed = torch.linalg.cholesky_ex(reversed_gram)
        if holds((failed == 0) & lower.diagonal().isfinite().all()):
            del reversed_gram
            upper = lower.to(torch.float32).flip(0, 1)
            return GramFactor(upper, order, percdamp * times, in_order=not actorder)
    return None


def gptq(
    weight: Tensor,
    factor: GramFactor,
    scheme: WeightScheme,
    parameters: tuple[Tensor, Tensor | None] | None = None,
    *,
    block_size: int = 128,
) -> QuantizedWeight:
    """Quantize a weight with error feedback.

    Args:
        weight: (N, K), floating point; linears that share their inputs can be stacked, as every
            row is on its own.
        factor: of the inputs' Gram matrix.
        scheme: the scheme.
        parameters: scale and zero point, of scheme.scale_shape(N, K). None: those of each group
            are found from its weights when it is reached, after all errors so far; without groups
            from the weight itself.
        block_size: columns between two products that pass errors on. It changes the last bits.

    Raises:
        ValueError: groups whose scales are found on the way, and columns out of their order.
    """
    rows, columns = weight.shape
    order, width = factor.order, min(scheme.width(columns), columns)
    on_the_way = parameters is None and scheme.granularity is Granularity.GROUP
    if on_the_way and not factor.in_order:
        raise ValueError("columns out of their order need scales that are found before")
    given = parameters or weight_scales(weight, scheme)
    scale, zero = (None if p is None else scales_by_group(p, scheme, rows) for p in given)
    assert scale is not None
    # columns as rows: what is rounded together lies together
    work = weight.to(torch.float32).t()[order].contiguous()
    unit = factor.upper / factor.upper.diagonal()
    codes, error = torch.empty_like(work), torch.empty_like(work)
    for part in _parts(columns, block_size, width if on_the_way else columns):
        before = slice(0, part.start)
        if on_the_way and part.start % width == 0:
            group = slice(part.start, part.start + width)
            completed = work[group] + _passed_on(factor.upper, error, group)
            found, found_zero = weight_scales(completed.t(), scheme)
            scale[part.start // width] = found[:, 0]
            if zero is not None and found_zero is not None:
                zero[part.start // width] = found_zero[:, 0]
        codes[part], error[part] = round_columns(
            work[part],
            unit[before, part].t() @ error[before],
            unit[part, part],
            scale,
            zero,
            order[part] // width,
            scheme.number_format,
        )
    restored = torch.empty_like(codes)
    restored[order] = codes
    final = restored.t().to(scheme.number_format.code_dtype).contiguous()
    if not on_the_way:
        return QuantizedWeight(final, *given)
    stored_zero = None if zero is None else zero.t().to(torch.int8).contiguous()
    return QuantizedWeight(final, scale.t().to(scheme.scale_dtype).contiguous(), stored_zero)


def made_up_target(
    weight: Tensor, gram: Tensor, gap: Tensor, *, percdamp: float = 0.01, share: float = 1.0
) -> Tensor | None:
    """The weight whose outputs, from inputs that carry errors already, are nearest those wanted.

    W + a W C^T (H + d I)^-1 with C = X^T (X_float - X) / T: for a = 1 and d = 0 the least squares
    solution of X W'^T = X_float W^T, the target of GPTAQ (arXiv 2504.02692, eq. 5).

    Args:
        weight: (N, K), floating point.
        gram: (K, K), H = X^T X / T of the inputs X.
        gap: (K, K), C of the same tokens.
        percdamp: d as a share of H's mean diagonal; what calibration does not tell stays.
        share: a, how much of it is made up for.

    Returns:
        (N, K) float32; None where H is not positive definite.
    """
    damped = gram.to(torch.float64)
    damped.diagonal().add_(percdamp * damped.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed):
        return None
    # from the right: solve for the transpose, as H is symmetric
    moved = torch.cholesky_solve(gap.to(torch.float64) @ weight.to(torch.float64).T, lower)
    return (weight + share * moved.T).to(torch.float32)


def round_columns(
    weight: Tensor,
    carried: Tensor,
    unit: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    groups: Tensor,
    number: NumberFormat,
) -> tuple[Tensor, Tensor]:
    """round_columns_plainly, on a GPU with a compiler as one kernel, whose last bits differ."""
    if compiles_kernels(weight, number):
        from quantizers.gptq_kernel import round_columns_at_once

        return round_columns_at_once(weight, carried, unit, scale, zero_point, groups, number)
    return round_columns_plainly(weight, carried, unit, scale, zero_point, groups, number)


def round_columns_plainly(
    weight: Tensor,
    carried: Tensor,
    unit: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    groups: Tensor,
    number: NumberFormat,
) -> tuple[Tensor, Tensor]:
    """Round b columns one after the other, each carrying the error of those before.

    Args:
        weight: (b, N) float32, columns as rows.
        carried: (b, N) float32, what the columns before this block hand on.
        unit: (b, b) float32, R_kj / R_jj of the block.
        scale: (G, N) float32, contiguous, a row for each group of columns.
        zero_point: likewise, None if symmetric.
        groups: (b,) int64, each column's group.
        number: format of the codes.

    Returns:
        codes and error W - Q, each (b, N) float32.
    """
    codes, error = torch.empty_like(weight), torch.empty_like(weight)
    target = weight + carried
    scale, zero_point = scale[groups], None if zero_point is None else zero_point[groups]
    for column in range(len(weight)):
        wanted = target[column]
        if column:
            wanted = torch.addmv(wanted, error[:column].t(), unit[:column, column])
        code = wanted / scale[column]
        if number.is_float:
            code = rounded_to_float8(code.clamp_(number.qmin, number.qmax), number)
        elif zero_point is None:
            code = code.round_().clamp_(number.qmin, number.qmax)
        else:
            code = code.round_().add_(zero_point[column]).clamp_(number.qmin, number.qmax)
        codes[column] = code
        level = code if zero_point is None else code - zero_point[column]
        torch.sub(weight[column], level * scale[column], out=error[column])
    return codes, error


def _passed_on(upper: Tensor, error: Tensor, group: slice) -> Tensor:
    """What the best real weights of a group would add for the errors before it, (g, N)."""
    before = slice(0, group.start)
    arriving = upper[before, group].t() @ error[before]
    passed: Tensor = torch.linalg.solve_triangular(upper[group, group].t(), arriving, upper=False)
    return passed


def _parts(columns: int, block_size: int, width: int) -> list[slice]:
    """Blocks of columns that begin anew with every group."""
    starts = sorted({*range(0, columns, block_size), *range(0, columns, width)})
    ends = [*starts[1:], columns]
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)]


def scales_by_group(parameter: Tensor, scheme: WeightScheme, rows: int) -> Tensor:
    """Scales or zero points with a row for each group of columns: scales_by_row, turned.

    Args:
        parameter: of scheme.scale_shape(N, K).
        scheme: the scheme.
        rows: N.

    Returns:
        (G, N) float32, contiguous, a copy; column k of the weight is in group k // width.
    """
    by_row = scales_by_row(parameter, scheme, rows).to(torch.float32)
    return by_row.mT.clone(memory_format=torch.contiguous_format)
