"""The transform that changes nothing: scales of one, weights as they were."""

from collections.abc import Mapping

import torch
from torch import Tensor

from quantizers.statistics import InputStatistics

__all__ = ["apply", "decide"]


def decide(
    statistics: Mapping[str, InputStatistics], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Scales of one for every group of linears.

    Args:
        statistics: per group of linears, by its name.
        weights: the linears' weights (N, K), by name; not looked at.

    Returns:
        per group, float32 (K,) on the device of its statistics.
    """
    return {
        name: torch.ones_like(entry.absmax, dtype=torch.float32)
        for name, entry in statistics.items()
    }


def apply(weights: Mapping[str, Tensor], decision: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights in a new dict.

    Args:
        weights: the linears' weights (N, K), by name.
        decision: what decide returned; all ones, so nothing to multiply.
    """
    return dict(weights)
