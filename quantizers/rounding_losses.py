"""What rounding a weight lost, of the weight and of its outputs, for some of its rows."""

from collections.abc import Callable

import torch
from torch import Tensor

from quantizers.devices import compiles_kernels
from quantizers.losses import row_errors
from quantizers.rounding import QuantizedWeight, dequantize, row_scales
from quantizers.schemes import WeightScheme

__all__ = ["PART_ENTRIES", "rounding_energies"]

# entries worked on at once
PART_ENTRIES = {"cpu": 1 << 22, "cuda": 1 << 25}

# of some rows: (W - Q) inverse and W inverse, (2, n, K) float32, and sums of (W - Q)^2 and W^2,
# (2, n) float32
Differences = Callable[[slice], tuple[Tensor, Tensor]]


def rounding_energies(
    weight: Tensor,
    quantized: QuantizedWeight,
    scheme: WeightScheme,
    rows: slice = slice(None),
    gram: Tensor | None = None,
    inverse: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """||D||^2 and ||W||^2, and tr(D H D^T) and tr(W H W^T), of some rows; D = W - Q.

    Those of all rows are their sums. Products in float32, the sums of rows in float64. Some rows
    at a time; nothing waits for the device.

    Args:
        weight: (N, K), floating point.
        quantized: what it was rounded to.
        scheme: how.
        rows: those that are looked at.
        gram: (K, K) float32, the Gram matrix of the inputs, or of them times ``inverse``.
        inverse: (K,) float32; 1 where None.

    Returns:
        (2,) float64, and as much where there is a Gram matrix.
    """
    if inverse is None:
        inverse = torch.ones(weight.shape[1], device=weight.device)
    differences = _differences(weight, quantized, scheme, inverse)
    step = max(1, PART_ENTRIES[weight.device.type] // weight.shape[1])
    first, stop, _ = rows.indices(len(weight))
    squares, outputs = [], []
    for start in range(first, stop, step):
        part = slice(start, min(start + step, stop))
        lost, found = differences(part)
        squares.append(found)
        if gram is not None:
            outputs.append(row_errors(lost.flatten(0, 1), gram).reshape(2, -1))
    return _summed(squares, weight), None if gram is None else _summed(outputs, weight)


def _summed(parts: list[Tensor], weight: Tensor) -> Tensor:
    """(2,) float64, the sums of what is known of rows, (2, n) each."""
    parts = parts or [torch.zeros(2, 0, device=weight.device)]
    return torch.cat(parts, 1).sum(1, dtype=torch.float64)


def _differences(
    weight: Tensor, quantized: QuantizedWeight, scheme: WeightScheme, inverse: Tensor
) -> Differences:
    codes = quantized.codes
    fits = weight.stride(1) == codes.stride(1) == 1
    if fits and compiles_kernels(weight, scheme.number_format):
        from quantizers.rounding_kernel import rounding_report

        scale, zero = row_scales(quantized, scheme)
        width = scheme.width(weight.shape[1])
        return lambda rows: rounding_report(
            weight[rows],
            codes[rows],
            scale[rows],
            None if zero is None else zero[rows],
            width,
            inverse,
        )
    restored = dequantize(quantized, scheme)

    def plainly(rows: slice) -> tuple[Tensor, Tensor]:
        given = weight[rows].to(torch.float32)
        lost = given - restored[rows]
        squares = [
            torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float32).square()
            for matrix in (lost, given)
        ]
        return torch.stack((lost, given)).mul_(inverse), torch.stack(squares)

    return plainly
