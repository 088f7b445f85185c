"""What stays on the device, and how to tell that it was too much.

Where something waits decides no bits: values are moved, never computed in another order.
"""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor

from tasks.engine.errors import RunError

Value = TypeVar("Value")


class DeviceMemoryError(RunError):
    """A step found no room on the device."""


class OnHost(Mapping[str, Value]):
    """Values that wait in host memory; each is on the device for as long as it is looked at."""

    def __init__(self, values: Mapping[str, Value], device: str) -> None:
        """Move ``values`` to the host one by one; ``device`` is where they are handed out."""
        self._values = {name: moved(value, "cpu") for name, value in values.items()}
        self._device = device

    def __getitem__(self, name: str) -> Value:
        return moved(self._values[name], self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Computed(Mapping[str, Value]):
    """Values that are computed anew each time one is looked at, and not kept."""

    def __init__(self, values: Mapping[str, Callable[[], Value]]) -> None:
        """Know how each is computed."""
        self._values = values

    def __getitem__(self, name: str) -> Value:
        return self._values[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def moved(value: Value, device: str) -> Value:
    """Return a tensor, or a dataclass with tensors in it, on a device; all else as it is."""
    if isinstance(value, Tensor):
        return cast(Value, value.to(device))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        members = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **{n: moved(m, device) for n, m in members.items()})
    return value


def one_by_one(
    names: Mapping[str, Callable[[], Mapping[str, Value]]], device: str
) -> OnHost[Value]:
    """Compute values one after the other; each waits on the host while the next is computed."""
    done: dict[str, Value] = {}
    for name, compute in names.items():
        done[name] = moved(compute()[name], "cpu")
    return OnHost(done, device)


def ran_out_of_memory(error: BaseException) -> bool:
    """Say whether an error is the device's, or the host's, lack of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # torch raises the host's as a plain RuntimeError
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def vacate(device: str) -> None:
    """Give back what of a GPU's memory this process holds and does not use."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def forget_peaks(device: str) -> None:
    """Begin to note anew how much of a GPU's memory was taken at most."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peaks(device: str) -> dict[str, int]:
    """Bytes that this process took at most: of the host, since it began, and of a GPU."""
    found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.device(device).type == "cuda":
        found["device"] = torch.cuda.max_memory_allocated(device)
    return found
