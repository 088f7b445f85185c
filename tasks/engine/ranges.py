"""How large numbers are: weights before and after rounding, inputs before and after a transform."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from quantizers.channel_transform import ChannelTransform, transformed_absmax
from quantizers.statistics import InputStatistics
from tasks.engine.values import Later

# entries that percentiles are taken of, at equal distances: the largest is looked for among all
SAMPLED = 1 << 16
PERCENTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}


class Magnitudes(NamedTuple):
    """The largest magnitude of some numbers, a scalar, and those that percentiles are taken of."""

    largest: Tensor
    entries: Tensor


def of_weight(weight: Tensor) -> Magnitudes:
    """Magnitudes of a weight of any shape."""
    entries = weight.flatten()
    stride = -(-entries.numel() // SAMPLED)
    # a copy: a view would keep the whole
    return Magnitudes(largest_magnitude(weight), entries[::stride].abs())


def largest_magnitude(numbers: Tensor) -> Tensor:
    """Of numbers of any shape, none of them left out, a scalar of at least float32; NaN shows."""
    precise = torch.float64 if numbers.dtype == torch.float64 else torch.float32
    if numbers.is_cuda and numbers.itemsize > 1:
        return torch.linalg.vector_norm(numbers, torch.inf, dtype=precise)
    # no temporary as large as the numbers, but for float8, which has no aminmax; the norm is slow
    low, high = (numbers.float() if numbers.itemsize == 1 else numbers).aminmax()
    return torch.maximum(-low, high).to(precise)


def largest_of_all(tensors: Sequence[Tensor]) -> Tensor:
    """Of all numbers in some tensors of one dtype, a scalar; NaN shows."""
    if tensors[0].is_cuda and tensors[0].itemsize > 1:
        # as few launches as there can be
        return get_total_norm(tensors, torch.inf)
    return torch.stack([largest_magnitude(tensor) for tensor in tensors]).max()


def of_inputs(
    found: Mapping[str, InputStatistics], transforms: Mapping[str, ChannelTransform]
) -> dict[str, dict[str, Magnitudes]]:
    """Of each group's inputs, the channels' largest, before and after their transforms."""
    ranges = {}
    for name, statistics in found.items():
        before = after = _of_channels(statistics.absmax)
        if name in transforms:
            after = _of_channels(transformed_absmax(statistics, transforms[name]).amax(0))
        ranges[name] = {"before": before, "after": after}
    return ranges


def _of_channels(absmax: Tensor) -> Magnitudes:
    return Magnitudes(absmax.max(), absmax)


def described(ranges: Mapping[str, Mapping[str, Magnitudes]]) -> Later:
    """Largest and percentiles of each, by the same names; the device is waited for once, later."""
    alike: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for name, members in ranges.items():
        for member, magnitudes in members.items():
            alike[len(magnitudes.entries)].append((name, member))
    # as many as are of one length are sorted at once; float32 holds what is stored in less
    parts = [_table([ranges[a][b] for a, b in own], length) for length, own in alike.items()]
    table = torch.cat(parts) if parts else torch.empty(0)
    order = [key for own in alike.values() for key in own]

    def work() -> dict[str, dict[str, Any]]:
        rows = dict(zip(order, table.tolist(), strict=True))
        titles = ("absmax", *PERCENTILES)
        return {
            name: {member: dict(zip(titles, rows[name, member], strict=True)) for member in members}
            for name, members in ranges.items()
        }

    return Later(work)


def _table(ranges: list[Magnitudes], length: int) -> Tensor:
    """(n, 4) float64: the largest and the percentiles of each."""
    ordered = torch.stack([found.entries.float() for found in ranges]).sort(1).values
    # the entry at that place, not one between two: the same everywhere
    places = [round(share * (length - 1)) for share in PERCENTILES.values()]
    largest = torch.stack([found.largest.double() for found in ranges])
    # column by column: a list of places would be copied to the device, which is waited for
    return torch.stack([largest, *(ordered[:, place].double() for place in places)], 1)
