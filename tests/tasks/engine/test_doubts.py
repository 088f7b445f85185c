"""What is doubted is settled at once on a CPU, later where a device has still to say it."""

from __future__ import annotations

import pytest
import torch

from tasks.engine.doubts import Doubt, Doubts, settle


class OnDevice(torch.Tensor):
    """A flag that says it is on a GPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


def flag(well: bool) -> torch.Tensor:
    return torch.tensor(well).as_subclass(OnDevice)


def test_a_cpu_says_it_at_once() -> None:
    doubts = Doubts()
    doubts.add(torch.tensor(True), lambda: ValueError("never"))
    with pytest.raises(ValueError, match="block 3"):
        doubts.add(torch.tensor(False), lambda: ValueError("block 3"))
    assert doubts.take() == ()


def test_a_device_is_asked_when_they_are_settled() -> None:
    doubts = Doubts()
    for number, well in enumerate([True, False, False]):
        doubts.add(flag(well), lambda number=number: ValueError(f"number {number}"))  # type: ignore[misc]
    taken = doubts.take()
    assert len(taken) == 3 and doubts.take() == ()
    with pytest.raises(ValueError, match="number 1"):
        settle(taken)
    settle(taken[:1])
    settle(())
    settle([Doubt(torch.tensor(True), lambda: ValueError("never"))])
