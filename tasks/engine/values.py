"""Small values of a step that are not at hand yet: numbers on a device, work for the host.

A step that asks a device for a number waits until all is done that was asked before, and the device
waits for what is asked next. So values may stay where they are until they are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Later:
    """A value that the host works out when it is written.

    Attributes:
        work: gives it.
    """

    work: Callable[[], Any]


def begun(value: Any, begin: Callable[[Callable[[], Any]], Future[Any]]) -> Any:
    """The value with all work for later begun, by what begins work in another thread."""

    def replace(member: Any) -> Any:
        return begin(member.work) if isinstance(member, Later) else member

    return _mapped(value, replace)


def resolved(value: Any) -> Any:
    """The value with every tensor in it as a number, or a list of numbers, and all work done.

    Work that was begun is waited for, each device once. Integers beyond 2^53 would be rounded.
    """
    numbers = {id(tensor): tensor for tensor in _tensors(value)}
    fetched: dict[int, Any] = {}
    for device in {tensor.device for tensor in numbers.values()}:
        own = {key: tensor for key, tensor in numbers.items() if tensor.device == device}
        flat = torch.cat([tensor.reshape(-1).to(torch.float64) for tensor in own.values()]).tolist()
        for key, tensor in own.items():
            taken, flat = flat[: tensor.numel()], flat[tensor.numel() :]
            kind = float if tensor.is_floating_point() else int
            entries = [kind(entry) for entry in taken]
            fetched[key] = entries if tensor.ndim else entries[0]

    def replace(member: Any) -> Any:
        if isinstance(member, Tensor):
            return fetched[id(member)]
        if isinstance(member, Later):
            return member.work()
        return member.result() if isinstance(member, Future) else member

    return _mapped(value, replace)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.ndim > 1 or value.is_complex():
            raise TypeError(f"a value of shape {tuple(value.shape)} is no small value")
        yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from _tensors(member)
    elif isinstance(value, list | tuple):
        for member in value:
            yield from _tensors(member)


def _mapped(value: Any, replace: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {name: _mapped(member, replace) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(member, replace) for member in value]
    return replace(value)
