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
    """Something that has to be so.

    Attributes:
        well: whether it is; bool, scalar.
        error: gives what is raised where it is not.
    """

    well: Tensor
    error: Callable[[], Exception]


class Doubts:
    """Those of the steps that were computed, until they are taken to be settled."""

    def __init__(self) -> None:
        """Begin without any."""
        self._open: list[Doubt] = []

    def add(self, well: Tensor, error: Callable[[], Exception]) -> None:
        """Have something settled later; at once where it is known.

        Raises:
            Exception: ``error``'s, where it is known not to be so.
        """
        if well.is_cuda:
            self._open.append(Doubt(well, error))
        elif not bool(well):
            raise error()

    def take(self) -> tuple[Doubt, ...]:
        """All that were added since they were last taken."""
        taken, self._open = tuple(self._open), []
        return taken


def settle(doubts: Iterable[Doubt]) -> None:
    """Wait for the device, once.

    Raises:
        Exception: the first doubt's that turns out to be right.
    """
    found = tuple(doubts)
    if found:
        for doubt, well in zip(found, torch.stack([d.well for d in found]).tolist(), strict=True):
            if not well:
                raise doubt.error()
