"""What is doubted is settled at once on a CPU, later where a device has still to say it."""

from __future__ import annotations

import math

import pytest
import torch

from tasks.engine.doubts import Doubt, Doubts, settle


class OnDevice(torch.Tensor):
    """Numbers that say they are on a GPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


def on_device(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers).as_subclass(OnDevice)


def never() -> Exception:
    raise AssertionError("asked for the error of what is well")


def test_a_cpu_says_it_at_once() -> None:
    doubts = Doubts()
    doubts.add(torch.tensor(1e30), never)
    doubts.add(torch.zeros(0), never)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="block 3"):
            doubts.add(torch.tensor([0.0, bad]), lambda: ValueError("block 3"))
    assert doubts.take() == ()


def test_a_device_is_asked_when_they_are_settled() -> None:
    doubts = Doubts()
    for number, found in enumerate([(1.0, 2.0), (3.0, math.nan), (math.inf,)]):
        doubts.add(on_device(*found), lambda number=number: ValueError(f"number {number}"))  # type: ignore[misc]
    taken = doubts.take()
    assert len(taken) == 3 and doubts.take() == ()
    with pytest.raises(ValueError, match="number 1"):
        settle(taken)
    settle(taken[:1])
    with pytest.raises(ValueError, match="number 2"):
        settle(taken[2:])
    settle(())
    settle([Doubt(torch.zeros(2, 3, dtype=torch.bfloat16), never)])


def test_what_was_taken_is_put_back_first() -> None:
    doubts = Doubts()
    for number in (1, 2):
        doubts.add(on_device(math.nan), lambda number=number: ValueError(f"number {number}"))  # type: ignore[misc]
    first, second = doubts.take()
    doubts.put_back([second])
    doubts.put_back([first])
    assert doubts.take() == (first, second)
