"""Cyclic coordinate descent over codes whose scales stay: QuantEase (arXiv 2309.01885, eq. 8).

The output error of a row of codes q is e H e^T with e = w - q. With all other columns as they are,
column j makes it least at w_j + sum over k != j of e_k H_kj / H_jj, which is rounded to the grid.
Rounding that to nearest never adds to the error, as the error is a parabola of each column.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from quantizers.gptq import round_columns, scales_by_group
from quantizers.number_formats import codes_in_float32
from quantizers.rounding import QuantizedWeight, dequantize
from quantizers.scale_refit import better_rows
from quantizers.schemes import WeightScheme

__all__ = ["descend"]


def descend(
    weight: Tensor,
    quantized: QuantizedWeight,
    gram: Tensor,
    scheme: WeightScheme,
    *,
    sweeps: int,
    block_size: int = 128,
) -> QuantizedWeight:
    """Better codes for a weight, its scales as they are.

    A row whose error with respect to gram would not be less keeps its codes. Sweeps end where none
    changes a code, which waits for the device.

    Args:
        weight: (N, K), floating point.
        quantized: codes of it, where the descent starts.
        gram: (K, K), H, the inputs' Gram matrix, of any scale, damped or not.
        scheme: the scheme.
        sweeps: how often every column is rounded again, at most.
        block_size: columns between two products with H. It changes the last bits.

    Returns:
        Codes of the same dtype, the scale and zero point given.
    """
    rows, columns = weight.shape
    gram = gram.to(torch.float32)
    pull = _pull(gram)
    # columns as rows: what is rounded together lies together
    work = weight.to(torch.float32).t().contiguous()
    scale, zero = (
        None if p is None else scales_by_group(p, scheme, rows)
        for p in (quantized.scale, quantized.zero_point)
    )
    assert scale is not None
    groups = torch.arange(columns, device=weight.device) // scheme.width(columns)
    codes = codes_in_float32(quantized.codes).t().contiguous()
    error = work - dequantize(quantized, scheme).t()
    for _ in range(sweeps):
        before = codes.clone()
        for part in _parts(columns, block_size):
            inside = pull[part, part].triu(1)
            # what the block's own columns hand on is added while they are rounded
            carried = pull[:, part].t() @ error - inside.t() @ error[part]
            codes[part], error[part] = round_columns(
                work[part],
                carried,
                inside,
                scale,
                zero,
                groups[part],
                scheme.number_format,
            )
        if torch.equal(codes, before):
            break
    found = codes.t().to(quantized.codes.dtype).contiguous()
    descended = QuantizedWeight(found, quantized.scale, quantized.zero_point)
    return better_rows(weight, quantized, descended, gram, scheme)


def _pull(gram: Tensor) -> Tensor:
    """H_kj / H_jj, (K, K): what the error of column k asks of column j; nothing of itself."""
    diagonal = gram.diagonal()
    # a column that was always zero is asked for nothing: it is rounded to nearest
    pull = gram / torch.where(diagonal > 0, diagonal, 1.0)
    pull.fill_diagonal_(0.0)
    return pull


def _parts(columns: int, block_size: int) -> Iterator[slice]:
    for start in range(0, columns, block_size):
        yield slice(start, min(start + block_size, columns))
