"""SmoothQuant (arXiv 2211.10438): factors per channel between inputs and weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["smoothing_scale"]

_SMALLEST = 1e-5


def smoothing_scale(absmax: Tensor, weights: Sequence[Tensor], alpha: float = 0.5) -> Tensor:
    """S = max|X|^alpha / max|W|^(1 - alpha) per channel (equation 4).

    A channel whose inputs or weights were always zero needs no smoothing and gets the factor 1.

    Args:
        absmax: (K,) float32, the largest |x| of each input channel.
        weights: (N_i, K) of the linears that share these inputs.
        alpha: how much of the inputs' range moves into the weights, in [0, 1].

    Returns:
        (K,) float32, at least 1e-5.

    Raises:
        ValueError: alpha outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha lies in [0, 1], not {alpha}")
    sizes = torch.stack([weight.abs().amax(0).to(torch.float32) for weight in weights]).amax(0)
    scale = absmax.clamp(min=_SMALLEST).pow(alpha) / sizes.clamp(min=_SMALLEST).pow(1 - alpha)
    alive = (absmax > 0) & (sizes > 0)
    return torch.where(alive, scale.clamp(min=_SMALLEST), torch.ones_like(scale))
