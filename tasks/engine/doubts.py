"""What a device has still to say of a step: whether its numbers can be used.

Asking it at once would have it wait for what is asked next, so it is asked when the step's result
is written. A CPU says it at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Doubt:
    """Numbers that have to be finite.

    Attributes:
        numbers: a few, floating point, of any shape.
        error: gives what is raised where one is not.
    """

    numbers: Tensor
    error: Callable[[], Exception]


class Doubts:
    """Those of the steps that were computed, until they are taken to be settled."""

    def __init__(self) -> None:
        """Begin without any."""
        self._open: list[Doubt] = []

    def add(self, numbers: Tensor, error: Callable[[], Exception]) -> None:
        """Have something settled later; at once where it is known.

        Raises:
            Exception: ``error``'s, where a number is known not to be finite.
        """
        doubt = Doubt(numbers, error)
        if numbers.is_cuda:
            self._open.append(doubt)
        else:
            settle([doubt])

    def put_back(self, doubts: Iterable[Doubt]) -> None:
        """Have settled later what was taken, before what was added since."""
        self._open[:0] = doubts

    def take(self) -> tuple[Doubt, ...]:
        """All that were added since they were last taken."""
        taken, self._open = tuple(self._open), []
        return taken


def settle(doubts: Iterable[Doubt]) -> None:
    """Wait for the device, once.

    Raises:
        Exception: the first doubt's that turns out to be right.
    """
    found = [doubt for doubt in doubts if doubt.numbers.numel()]
    if not found:
        return
    flat = [doubt.numbers.reshape(-1).to(torch.float64) for doubt in found]
    known = torch.cat(flat).cpu().split([len(numbers) for numbers in flat])
    for doubt, numbers in zip(found, known, strict=True):
        if not bool(numbers.isfinite().all()):
            raise doubt.error()
