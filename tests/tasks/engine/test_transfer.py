"""Copies to the host; those from a GPU need one."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from tasks.engine.transfer import Leash, asked_for, beside, host_memory, reached, to_host


def test_what_is_on_the_host_is_not_copied() -> None:
    tensor = torch.arange(6).reshape(2, 3)
    assert to_host(tensor).data_ptr() == tensor.data_ptr()
    assert to_host(tensor.T).is_contiguous()
    assert torch.equal(to_host(tensor.T), tensor.T)


def test_no_gradient_comes_along() -> None:
    assert not to_host(torch.ones(2, requires_grad=True)).requires_grad


def test_memory_where_nothing_can_be_pinned() -> None:
    room = host_memory(torch.Size((3, 2)), torch.bfloat16, pinned=True)
    assert (room.shape, room.dtype, room.device.type) == ((3, 2), torch.bfloat16, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(3,), (1500, 1501)])
def test_from_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = torch.randn(shape, device="cuda").to(dtype)
    for tensor in (given, given.T):
        found = to_host(tensor)
        assert not found.is_cuda and found.is_contiguous()
        assert torch.equal(found.view(torch.uint8), tensor.cpu().contiguous().view(torch.uint8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_who_waits_for_a_gpu_keeps_nobody_from_asking_it() -> None:
    few = torch.zeros(3, device="cuda")
    # a kernel that is asked for the first time waits for all before it
    assert to_host(few + 1).sum() == 3
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # type: ignore[no-untyped-call]
    few += 1
    ready = reached("cuda")
    assert ready is not None

    def fetch() -> torch.Tensor:
        with beside("cuda", ready):
            return to_host(few)

    with ThreadPoolExecutor(1) as thread:
        fetched = thread.submit(fetch)
        time.sleep(0.2)
        for _ in range(10):
            _ = few + 1
        working = not ready.query()  # type: ignore[no-untyped-call]
        assert working, "asked while the GPU was at what came before"
        assert fetched.result().tolist() == [1, 1, 1]


def test_what_is_on_the_host_is_told_at_once() -> None:
    assert asked_for(torch.tensor(True)).told().item() is True


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_an_answer_waits_for_nothing_that_was_asked_later() -> None:
    number = torch.tensor(3.0, device="cuda")
    assert (number + 1).item() == 4
    asked = asked_for(number + 2)
    torch.cuda._sleep(2_000_000_000)  # type: ignore[no-untyped-call]
    later = reached("cuda")
    assert later is not None
    assert asked.told().item() == 5
    assert not later.query()  # type: ignore[no-untyped-call]


def test_a_leash_waits_for_the_oldest_steps() -> None:
    reached: list[int] = []

    class Event:
        def __init__(self, number: int) -> None:
            self.number = number

        def synchronize(self) -> None:
            reached.append(self.number)

    leash = Leash()
    for number in range(5):
        leash.wait(2)
        leash.ask(Event(number))  # type: ignore[arg-type]
    assert reached == [0, 1], "before the fourth and the fifth"
    leash.ask(None)
    leash.wait(2)
    leash.wait(2)
    assert reached == [0, 1, 2]
    leash.wait(1)
    assert reached == [0, 1, 2, 3], "fewer are asked for ahead"


def test_a_leash_waits_for_what_is_fetched() -> None:
    class Event:
        def synchronize(self) -> None:
            order.append("reached")

    class Copy(Future[int]):
        def result(self, timeout: float | None = None) -> int:
            order.append("fetched")
            return super().result(timeout)

    order: list[str] = []
    leash = Leash()
    first, second = Copy(), Copy()
    first.set_result(1)
    second.set_exception(OSError("no memory to copy to"))
    leash.ask(Event(), (first,))  # type: ignore[arg-type]
    leash.wait(0)
    assert order == ["reached", "fetched"]
    leash.ask(Event(), (second,))  # type: ignore[arg-type]
    with pytest.raises(OSError, match="no memory"):
        leash.wait(0)
