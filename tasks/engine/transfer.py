"""A GPU beside the host: which one works, and copies through memory that it writes to by itself."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

# smaller ones are not worth it
_PINNED_BYTES = 1 << 20


def launched_on(device: str) -> contextlib.AbstractContextManager[None]:
    """Have this thread launch kernels on a device; without, they go to its first one."""
    on_gpu = torch.device(device).type == "cuda" and torch.cuda.is_available()
    return torch.cuda.device(device) if on_gpu else contextlib.nullcontext()


@contextlib.contextmanager
def working_on(device: str, what: str) -> Iterator[None]:
    """Have a device do what this thread asks for; a profiler sees it under the name ``what``."""
    with launched_on(device), record_function(what):
        yield


def to_host(tensor: Tensor) -> Tensor:
    """The tensor in host memory, contiguous; itself where it is that already.

    Pageable memory takes a tenth of the speed. Waits for the copy.
    """
    tensor = tensor.detach()
    if not tensor.is_cuda or tensor.numel() * tensor.itemsize < _PINNED_BYTES:
        return tensor.cpu().contiguous()
    host = host_memory(tensor.shape, tensor.dtype, pinned=True)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host


def pinned(tensor: Tensor) -> Tensor:
    """A copy in host memory that a GPU reads by itself, where the system lets so much be locked."""
    host = host_memory(tensor.shape, tensor.dtype, pinned=torch.cuda.is_available())
    return host.copy_(tensor)


@dataclass(frozen=True, eq=False)
class ToHost:
    """A small tensor on its way to the host.

    Attributes:
        there: it, on the host, whole once ``done`` is reached.
        done: None where it was there before.
    """

    there: Tensor
    done: torch.cuda.Event | None

    def told(self) -> Tensor:
        """The tensor; waits for what the device was asked before it, and no more."""
        if self.done is not None:
            self.done.synchronize()
        return self.there


def asked_for(tensor: Tensor) -> ToHost:
    """Have a tensor copied to the host, which does not wait for it."""
    if not tensor.is_cuda:
        return ToHost(tensor, None)
    there = host_memory(tensor.shape, tensor.dtype, pinned=True)
    there.copy_(tensor, non_blocking=True)
    return ToHost(there, reached(str(tensor.device)))


def reached(device: str) -> torch.cuda.Event | None:
    """What a GPU reaches once it is through with all that it was given; None for a CPU."""
    if torch.device(device).type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True, blocking=True)
    return torch.cuda.current_stream(device).record_event(event)


def idle_s(ended: torch.cuda.Event | None, began: torch.cuda.Event | None) -> float:
    """Seconds in which a GPU had nothing to do between two events that it has reached."""
    if ended is None or began is None:
        return 0.0
    return max(0.0, float(ended.elapsed_time(began)) / 1000)


class Leash:
    """Keeps who asks a GPU from being too far ahead of it.

    What is asked for takes its memory at once, and what it used before is not yet free.
    """

    def __init__(self) -> None:
        """Begin with nothing asked."""
        self._asked: deque[tuple[torch.cuda.Event, tuple[Future[Any], ...]]] = deque()

    def ask(self, ready: torch.cuda.Event | None, fetched: tuple[Future[Any], ...] = ()) -> None:
        """Note a step that was asked for; CPUs are through with it.

        Args:
            ready: what the device reaches at its end.
            fetched: what is done once the device keeps nothing of it for others.
        """
        if ready is not None:
            self._asked.append((ready, fetched))

    def wait(self, steps: int) -> None:
        """Wait until no more than ``steps`` were asked for that the device did not reach.

        Raises:
            Exception: something could not be fetched.
        """
        while len(self._asked) > steps:
            ready, fetched = self._asked.popleft()
            ready.synchronize()
            for copy in fetched:
                copy.result()


@contextlib.contextmanager
def beside(device: str, ready: torch.cuda.Event | None) -> Iterator[None]:
    """Copy beside what a GPU goes on with, once it has reached ``ready``."""
    if ready is None:
        yield
        return
    # were a copy to memory that is not pinned to wait in the driver, nobody could ask for a kernel
    ready.synchronize()
    stream = _side_stream(torch.device(device), threading.get_ident())
    with torch.cuda.stream(stream):
        yield
        stream.synchronize()


@dataclass(frozen=True, eq=False)
class ToDevice:
    """Tensors on their way to a GPU.

    Attributes:
        tensors: there, by name.
        done: reached once they are whole.
    """

    tensors: dict[str, Tensor]
    done: torch.cuda.Event

    def arrived(self) -> dict[str, Tensor]:
        """The tensors, for what the GPU is asked next: it waits for them, the host does not."""
        torch.cuda.current_stream().wait_event(self.done)
        return self.tensors


def sent_beside(tensors: Mapping[str, Tensor], device: str) -> ToDevice:
    """Copy pinned tensors beside what a GPU is asked from now on."""
    asked = torch.cuda.current_stream(device)
    # room that what was asked before may still use: copies wait for it
    here = {name: torch.empty_like(tensor, device=device) for name, tensor in tensors.items()}
    stream = _side_stream(torch.device(device), threading.get_ident())
    stream.wait_stream(asked)
    with torch.cuda.stream(stream):
        for name, tensor in tensors.items():
            here[name].copy_(tensor, non_blocking=True)
            # one that is dropped before it is whole is overwritten by nobody
            here[name].record_stream(stream)
        return ToDevice(here, stream.record_event())


@functools.cache
def _side_stream(device: torch.device, thread: int) -> torch.cuda.Stream:
    """One for all that a thread does: no stream is given the memory of another."""
    del thread
    return torch.cuda.Stream(device)


def host_memory(shape: torch.Size, dtype: torch.dtype, *, pinned: bool) -> Tensor:
    """Host memory that nobody wrote; ``pinned``: such that a GPU writes to by itself."""
    if pinned:
        # the system may let no more be locked
        with contextlib.suppress(RuntimeError):
            return torch.empty(shape, dtype=dtype, pin_memory=True)
    return torch.empty(shape, dtype=dtype)
