"""Processes that compute a run together, each on a device of its own.

Each holds its share of the calibration windows, and all make the same calls in the same order.
What a sum over all windows is needed for is summed in the order of the ranks, so that every
process has the same bits, each time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# bytes that are exchanged at once: of so many each process holds every other's
EXCHANGED_BYTES = 1 << 27
_PAIR = 2


@dataclass(frozen=True)
class Team:
    """What one process knows of all that compute together; of one alone nothing is exchanged.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        device: that tensors are exchanged on.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    def counts(self, things: int) -> list[int]:
        """How many of some things in a row each process has: they differ by one at most."""
        least, more = divmod(things, self.size)
        return [least + (rank < more) for rank in range(self.size)]

    def own(self, things: int) -> slice:
        """Which of some things in a row are this process's."""
        counts = self.counts(things)
        start = sum(counts[: self.rank])
        return slice(start, start + counts[self.rank])

    def summed_(self, tensor: Tensor) -> Tensor:
        """The sum of what every process has, in place of what this one has; contiguous."""
        if self.size == 1:
            return tensor
        for part in tensor.view(-1).split(EXCHANGED_BYTES // tensor.itemsize):
            if self.size == _PAIR:
                # a sum of two is the same in either order, and takes no memory
                dist.all_reduce(part)
                continue
            shares = [torch.empty_like(part) for _ in range(self.size)]
            dist.all_gather(shares, part)
            part.copy_(shares[0])
            for share in shares[1:]:
                part.add_(share)
        return tensor

    def joined(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows that every process has, one below the other in the order of the ranks.

        Args:
            own: (n, ...), this process's.
            counts: n of each process.
        """
        return self.all_joined([own], [counts])[0]

    def all_joined(self, own: Sequence[Tensor], counts: Sequence[Sequence[int]]) -> list[Tensor]:
        """``joined`` of some tensors, exchanged at once.

        Args:
            own: (n, ...) each, this process's.
            counts: of each, n of every process.
        """
        if self.size == 1 or not own:
            return list(own)
        own = [tensor.to(self.device) for tensor in own]
        widths = [tensor.itemsize * math.prod(tensor.shape[1:]) for tensor in own]
        # of each process, where the bytes of each tensor begin, and where the last end
        starts = [
            list(
                itertools.accumulate(
                    (w * c[rank] for w, c in zip(widths, counts, strict=True)), initial=0
                )
            )
            for rank in range(self.size)
        ]
        # bytes: not every dtype is sent as what it is; as many of each process
        sent = own[0].new_empty(max(ends[-1] for ends in starts), dtype=torch.uint8)
        for tensor, (start, end) in zip(own, itertools.pairwise(starts[self.rank]), strict=True):
            sent[start:end] = tensor.contiguous().view(-1).view(torch.uint8)
        parts = [torch.empty_like(sent) for _ in starts]
        if len(sent):
            dist.all_gather(parts, sent)
        found = []
        for number, (tensor, count) in enumerate(zip(own, counts, strict=True)):
            rows = torch.cat(
                [
                    part[ends[number] : ends[number + 1]]
                    for part, ends in zip(parts, starts, strict=True)
                ]
            )
            found.append(rows.view(tensor.dtype).reshape(sum(count), *tensor.shape[1:]))
        return found


# a process that computes by itself
ALONE = Team()
