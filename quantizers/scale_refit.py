"""Better scales for codes that are there: least squares per row."""

import torch
from torch import Tensor

from quantizers.losses import row_errors
from quantizers.rounding import QuantizedWeight, dequantize
from quantizers.schemes import Granularity, WeightScheme

__all__ = ["better_rows", "refit_scales"]

# a scale that would leave this range around the one it replaces is not believed
_RANGE = (0.5, 2.0)


def refit_scales(
    weight: Tensor, quantized: QuantizedWeight, gram: Tensor, scheme: WeightScheme
) -> Tensor:
    """The scales that give a weight's codes the least output error.

    The error of a row, (w - q) H (w - q)^T with q = sum over groups g of s_g l_g (levels l, codes
    less zero point), is a quadratic form of its scales: one linear system for each row. A row keeps
    its scales where those found, once rounded to the dtype they are stored in, are not better.

    Args:
        weight: (N, K), floating point.
        quantized: codes of it, with one scale per row or group.
        gram: (K, K), the inputs' Gram matrix.
        scheme: the scheme, GROUP or CHANNEL.

    Returns:
        scheme.scale_dtype, shape of quantized.scale.

    Raises:
        ValueError: scales that rows share.
    """
    if scheme.granularity not in (Granularity.GROUP, Granularity.CHANNEL):
        raise ValueError(f"scales per {scheme.granularity} are shared by rows and not refitted")
    rows, columns = weight.shape
    width = min(scheme.width(columns), columns)
    work, gram = weight.to(torch.float32), gram.to(torch.float32)
    ones = torch.ones_like(quantized.scale)
    levels = dequantize(QuantizedWeight(quantized.codes, ones, quantized.zero_point), scheme)
    groups = columns // width
    system = torch.empty(rows, groups, groups, dtype=torch.float64, device=work.device)
    wanted = torch.empty(rows, groups, dtype=torch.float64, device=work.device)
    for group in range(groups):
        part = slice(group * width, (group + 1) * width)
        product = levels[:, part] @ gram[part]
        system[:, group] = torch.unflatten(product * levels, 1, (groups, width)).sum(2)
        wanted[:, group] = (product * work).sum(1)
    before = quantized.scale.to(torch.float64)
    # scales that the error does not depend on stay where they are
    ridge = 1e-6 * system.diagonal(dim1=1, dim2=2).mean(1).clamp(
        min=torch.finfo(torch.float32).tiny
    )
    system.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    found = torch.linalg.solve(system, wanted + ridge[:, None] * before)
    low, high = (edge * before for edge in _RANGE)
    found = torch.where((found > low) & (found < high), found, before).to(scheme.scale_dtype)
    return torch.where(
        _errors(work, levels, found, gram) < _errors(work, levels, quantized.scale, gram),
        found,
        quantized.scale,
    )


def better_rows(
    weight: Tensor,
    first: QuantizedWeight,
    second: QuantizedWeight,
    gram: Tensor,
    scheme: WeightScheme,
) -> QuantizedWeight:
    """Row by row, the codes and scales that lose less; the first where both lose the same.

    Args:
        weight: (N, K) float32.
        first: codes of it.
        second: others, with the same zero points; with the same scales, or one per row or group.
        gram: (K, K) float32, the inputs' Gram matrix.
        scheme: the scheme.
    """
    errors = [row_errors(dequantize(q, scheme) - weight, gram) for q in (first, second)]
    better = (errors[1] < errors[0])[:, None]
    # float8 knows no where
    codes = torch.where(better, second.codes.view(torch.int8), first.codes.view(torch.int8))
    scale = first.scale
    if second.scale is not scale:
        scale = torch.where(better, second.scale, scale)
    return QuantizedWeight(codes.view(first.codes.dtype), scale, first.zero_point)


def _errors(work: Tensor, levels: Tensor, scale: Tensor, gram: Tensor) -> Tensor:
    """The error of each row, (N, 1) float32."""
    spread = scale.to(torch.float32).repeat_interleave(work.shape[1] // scale.shape[1], dim=1)
    lost = work - levels * spread
    return (lost @ gram).mul_(lost).sum(1, keepdim=True)
