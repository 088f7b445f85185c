"""Outlier Suppression+ (arXiv 2304.09145): shifts to the middle, scales down to a threshold."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.channel_transform import ChannelTransform
from quantizers.output_error import Errors, GroupProblem, output_errors
from quantizers.statistics import InputStatistics

__all__ = ["Trial", "middle", "search", "threshold_scale"]


@dataclass(frozen=True)
class Trial:
    """One threshold: mean squared output error per token."""

    threshold: float
    error: float


def middle(statistics: InputStatistics) -> Tensor:
    """The shift (max + min) / 2 of each channel (equation 3), (K,) float32."""
    return (statistics.maximum + statistics.minimum) / 2


def threshold_scale(channel_absmax: Tensor, threshold: float) -> Tensor:
    """max(1, absmax / threshold) per channel (equation 6), (K,) float32."""
    return (channel_absmax / threshold).clamp(min=1.0)


def search(
    problem: GroupProblem,
    realize: Callable[[Tensor], Tensor],
    *,
    shift: Tensor | None = None,
    thresholds: int = 32,
    errors_of: Errors = output_errors,
) -> tuple[ChannelTransform, list[Trial]]:
    """The threshold with the least output error, and everything that was tried.

    Thresholds fall in equal ratios from the largest channel's absmax, which changes nothing, to
    half of the middle channel's.

    Args:
        problem: the linears and their inputs.
        realize: turns wanted factors (K,) into those that can be folded.
        shift: (K,), where biases can take it.
        thresholds: how many are tried, at least 2.
        errors_of: what gives the output errors of candidates, (R,) float64.
    """
    unscaled = ChannelTransform(torch.ones_like(problem.statistics.total), shift)
    low, high = problem.statistics.minimum, problem.statistics.maximum
    if shift is not None:
        low, high = low - shift, high - shift
    absmax = torch.maximum(high, -low)
    largest, least = float(absmax.amax()), float(absmax.median()) / 2
    if not 0 < least < largest:
        return unscaled, []
    tried = [largest * (least / largest) ** (step / (thresholds - 1)) for step in range(thresholds)]
    candidates = [ChannelTransform(realize(threshold_scale(absmax, t)), shift) for t in tried]
    # the device is waited for once
    errors = errors_of(problem, candidates).tolist()
    smallest = min(errors)
    # of equals the lowest threshold; where no error is a number, none
    best = [c for c, error in zip(candidates, errors, strict=True) if error == smallest]
    trials = [Trial(*pair) for pair in zip(tried, errors, strict=True)]
    return (best[-1] if best else unscaled), trials
