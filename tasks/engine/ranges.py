"""How large numbers are: weights before and after rounding, inputs before and after a transform."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from quantizers.channel_transform import ChannelTransform, transformed_absmax
from quantizers.statistics import InputStatistics

# entries that percentiles are taken of, at equal distances: the largest is looked for among all
SAMPLED = 1 << 16
PERCENTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}


def weight_range(weight: Tensor) -> dict[str, Tensor]:
    """The largest magnitude of a weight (any shape) and percentiles of its magnitudes, scalars."""
    entries = weight.flatten()
    stride = -(-entries.numel() // SAMPLED)
    # at least as wide as it is stored: float64 holds every value exactly
    return _described(weight.abs().max(), entries[::stride].abs().double())


def input_range(channel_absmax: Tensor) -> dict[str, Tensor]:
    """The largest input, and percentiles of the channels' largest (K,); scalars."""
    return _described(channel_absmax.max(), channel_absmax.double())


def input_ranges(
    found: Mapping[str, InputStatistics], transforms: Mapping[str, ChannelTransform]
) -> dict[str, dict[str, Any]]:
    """Ranges of the inputs of groups of linears, before and after the channels' transforms."""
    ranges = {}
    for name, statistics in found.items():
        before = input_range(statistics.absmax)
        after = before
        if name in transforms:
            after = input_range(transformed_absmax(statistics, transforms[name]).amax(0))
        ranges[name] = {"before": before, "after": after}
    return ranges


def _described(largest: Tensor, magnitudes: Tensor) -> dict[str, Tensor]:
    ordered = magnitudes.sort().values
    # the entry at that place, not one between two: the same everywhere
    places = {name: round(share * (len(ordered) - 1)) for name, share in PERCENTILES.items()}
    return {
        "absmax": largest,
        **{name: ordered[place] for name, place in places.items()},
    }
