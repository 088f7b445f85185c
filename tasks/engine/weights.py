"""What a checkpoint computes with, for passes that come back to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from tasks.engine.checkpoint import Checkpoint
from tasks.engine.memo import Memo

# share of a device's free memory that weights are kept in
KEPT_SHARE = 0.4

Read = TypeVar("Read", Tensor, Mapping[str, Tensor])


@dataclass
class Weights:
    """Weights in one dtype on one device: read when asked for, kept for the next pass if they fit.

    Blocks are asked for in turn, so the first ones stay: of those that were used last, none would
    ever be found.

    Attributes:
        checkpoint: where they are read.
        device: where they are wanted.
        dtype: what they are wanted in.
        budget: bytes that may be kept.
    """

    checkpoint: Checkpoint
    device: str
    dtype: torch.dtype
    budget: int = 0
    _kept: dict[str, Tensor | Mapping[str, Tensor]] = field(default_factory=dict, repr=False)

    def block(self, number: int) -> Mapping[str, Tensor]:
        """The weights of a block, by their names in it."""
        return self._get(
            f"block {number}",
            lambda: self.checkpoint.block_weights(number, self.dtype, self.device),
        )

    def embedding(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the embedding (U, D) that tokens ask for, and tokens as numbers of these."""
        used, numbers = tokens.unique(return_inverse=True)
        stored = self._stored(self.checkpoint.architecture.embedding)
        return stored[used.to(self.device)].to(self.dtype), numbers

    @property
    def norm(self) -> Tensor:
        """The final norm's weight (D,)."""
        return self._stored(self.checkpoint.architecture.final_norm).to(self.dtype)

    @property
    def head(self) -> Tensor:
        """The output head (V, D), kept: all that is scored asks for it."""
        tied, architecture = self.checkpoint.tied, self.checkpoint.architecture
        name = architecture.embedding if tied else architecture.head
        return self._get("head", lambda: self._stored(name).to(self.dtype), always=True)

    def _stored(self, name: str) -> Tensor:
        """A tensor outside of the blocks as it is stored; one that is mapped takes no memory."""
        return self._get(
            f"stored {name}",
            lambda: self.checkpoint.source.read([name], self.device)[name],
            always=self.device == "cpu",
        )

    def _get(self, name: str, read: Callable[[], Read], always: bool = False) -> Read:
        if name in self._kept:
            return self._kept[name]  # type: ignore[return-value]
        value = read()
        tensors = [value] if isinstance(value, Tensor) else value.values()
        size = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        if always or size <= self.budget:
            self.budget -= 0 if always else size
            self._kept[name] = value
        return value


def weights_of(
    checkpoint: Checkpoint,
    device: str,
    dtype: torch.dtype,
    *,
    passes: int = 2,
    kept: Memo | None = None,
) -> Weights:
    """Weights for some passes: kept in a GPU's free memory where there is more than one.

    On a CPU files are mapped, and read again.

    Args:
        checkpoint: where they are read.
        device: where they are wanted.
        dtype: what they are wanted in.
        passes: how many there are at most.
        kept: where steps that measure one after the other find the same ones, until it forgets.
    """
    if kept is None:
        return Weights(checkpoint, device, dtype, budget_on(device) if passes > 1 else 0)
    kind, key = f"weights {checkpoint.source.path}", f"{device} {dtype}"
    return kept.get(kind, key, lambda: weights_of(checkpoint, device, dtype))


def budget_on(device: str) -> int:
    """Bytes of a device that weights may be kept in: some of what is free of a GPU's."""
    place = torch.device(device)
    if place.type != "cuda":
        return 0
    unused = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
    return int(KEPT_SHARE * (torch.cuda.mem_get_info(place)[0] + unused))
