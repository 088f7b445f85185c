"""Input scales of static activation schemes, from calibration."""

from enum import StrEnum

import torch
from torch import Tensor

from quantizers.number_formats import NumberFormat

__all__ = ["InputRange", "static_input_scale"]


class InputRange(StrEnum):
    """Which range of the calibration inputs a static scale covers."""

    MINMAX = "minmax"  # all of it
    WINDOW_MEAN = "window_mean"  # the mean of the windows' largest values, LLMC's static_minmax
    PERCENTILE = "percentile"  # a share of a sample's values; the rest saturates


def static_input_scale(
    window_absmax: Tensor,
    sample: Tensor,
    number_format: NumberFormat,
    covers: InputRange,
    percentile: float = 99.99,
) -> Tensor:
    """The scale that divides every input of a group of linears before rounding.

    Args:
        window_absmax: (W, K) float32, the largest |x| of each channel in each window.
        sample: (m, K) rows of inputs, for PERCENTILE only.
        number_format: the inputs' format; its largest value is what the range becomes.
        covers: which range.
        percentile: of |x|, in (0, 100].

    Returns:
        float32 (1,), positive; 1 / qmax where all inputs are zero.

    Raises:
        ValueError: no windows, or a percentile outside (0, 100].
    """
    if window_absmax.shape[0] == 0:
        raise ValueError("a static scale needs at least one window of inputs")
    per_window = window_absmax.amax(1)
    if covers is InputRange.MINMAX:
        largest = per_window.amax()
    elif covers is InputRange.WINDOW_MEAN:
        largest = per_window.mean()
    else:
        largest = _percentile(sample.abs().flatten(), percentile)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    # A tensor as divisor: CUDA multiplies by the rounded reciprocal of a Python number.
    return (largest / torch.full_like(largest, number_format.qmax)).reshape(1)


def _percentile(values: Tensor, percentile: float) -> Tensor:
    """The smallest value that a share of all values does not exceed."""
    if not 0 < percentile <= 100:
        raise ValueError(f"a percentile lies in (0, 100], not {percentile}")
    rank = max(1, min(values.numel(), -int(-values.numel() * percentile // 100)))
    return values.to(torch.float32).kthvalue(rank).values
