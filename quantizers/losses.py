"""How far a restored weight is from its source."""

import torch
from torch import Tensor

from quantizers.devices import compiles_kernels

__all__ = ["energy_ratio", "relative_output_error", "relative_weight_error", "row_errors"]

# columns of a Gram matrix that are multiplied at once
_CPU_BLOCK, _DEVICE_BLOCK = 512, 2048


def relative_weight_error(weight: Tensor, restored: Tensor) -> float:
    """||W - Q||_F / ||W||_F, a ratio without unit; 0 if both norms are 0.

    Waits for the device.

    Args:
        weight: (N, K), floating point.
        restored: (N, K), floating point, same device.

    Raises:
        ValueError: the shapes differ.
    """
    _check_pair(weight, restored)
    lost = _squared_norm(_difference(weight, restored))
    return float(energy_ratio(torch.stack([lost, _squared_norm(weight)])))


def relative_output_error(weight: Tensor, restored: Tensor, gram: Tensor) -> float:
    """sqrt(tr(D H D^T) / tr(W H W^T)), D = W - Q: the relative error of the outputs X W^T.

    The ratio is the same whether gram is a sum or a mean over tokens. 0 if both traces are 0.
    Products in float32, traces in float64. Waits for the device.

    Args:
        weight: (N, K), floating point.
        restored: (N, K), floating point, same device.
        gram: (K, K), the inputs' Gram matrix.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    _check_pair(weight, restored)
    columns = weight.shape[1]
    if tuple(gram.shape) != (columns, columns):
        raise ValueError(f"gram has shape {tuple(gram.shape)}, not ({columns}, {columns})")
    gram = gram.to(torch.float32)
    lost = _energy(_difference(weight, restored), gram)
    return float(energy_ratio(torch.stack([lost, _energy(weight, gram)])))


def energy_ratio(energies: Tensor) -> Tensor:
    """sqrt(error / reference) of energies (2,) as a scalar, or of (2, n) as (n,).

    0 / 0 is 0, a negative trace is rounding about zero, NaN stays.
    """
    above, below = energies[0].clamp(min=0.0), energies[1].clamp(min=0.0)
    return (above / below).sqrt().masked_fill(above == 0.0, 0.0)


def row_errors(difference: Tensor, gram: Tensor) -> Tensor:
    """D H d^T of every row d, (N,) float32.

    H is symmetric: its entries left of a diagonal block count twice on the right instead.

    Args:
        difference: (N, K) float32.
        gram: (K, K) float32, symmetric.
    """
    errors = torch.zeros(len(difference), device=difference.device)
    step = _CPU_BLOCK if difference.device.type == "cpu" else _DEVICE_BLOCK
    if compiles_kernels(difference) and difference.stride(-1) == 1:
        from quantizers.search_kernel import add_row_dots_

        for start in range(0, difference.shape[1], step):
            block = slice(start, start + step)
            product = torch.mm(difference[:, block], gram[block, start:])
            add_row_dots_(errors, product, difference[:, start:], step)
        return errors
    for start in range(0, difference.shape[1], step):
        block = slice(start, start + step)
        product = torch.mm(difference[:, block], gram[block, start:])
        product.mul_(difference[:, start:])[:, step:].mul_(2.0)
        errors += product.sum(1)
    return errors


def _difference(weight: Tensor, restored: Tensor) -> Tensor:
    return weight.detach().to(torch.float32) - restored.detach().to(torch.float32)


def _squared_norm(matrix: Tensor) -> Tensor:
    """||M||_F^2; rows in float32, their sum in float64."""
    norms: Tensor = torch.linalg.vector_norm(matrix.detach(), dim=1, dtype=torch.float32)
    return norms.to(torch.float64).square().sum()


def _energy(matrix: Tensor, gram: Tensor) -> Tensor:
    """tr(M H M^T); rows in float32, their sum in float64."""
    matrix = matrix.detach().to(torch.float32)
    return row_errors(matrix, gram).to(torch.float64).sum()


def _check_pair(weight: Tensor, restored: Tensor) -> None:
    if weight.ndim != 2 or weight.shape != restored.shape:
        raise ValueError(
            f"need two matrices of one shape, not {tuple(weight.shape)} and {tuple(restored.shape)}"
        )
