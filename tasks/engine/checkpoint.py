"""An exported checkpoint, reopened from disk: nothing of the run that wrote it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.engine.architectures import Architecture, architecture_of
from tasks.engine.decoder import InputHook
from tasks.engine.export_format import INPUT_SCALE, Scheme, restore_block, scheme_from_config
from tasks.engine.plan import is_tied, require_sizes
from tasks.engine.source import Source, open_source
from tasks.engine.streams import activation_hook

_FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to run block by block: quantized (``scheme``) or not (None)."""

    source: Source
    architecture: Architecture
    scheme: Scheme | None
    ignore: frozenset[str]
    tied: bool

    @property
    def blocks(self) -> int:
        """How many decoder blocks there are."""
        return int(self.source.config["num_hidden_layers"])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that ``config.json`` gives for tensors that are not quantized."""
        return _dtype_of(self.source.config)

    def names(self, block: int) -> dict[str, str]:
        """Names of a block's tensors: in the block -> in the checkpoint."""
        prefix = self.architecture.block_prefix(block)
        return {n.removeprefix(prefix): n for n in self.source.tensors if n.startswith(prefix)}

    def quantized(self, block: int) -> tuple[str, ...]:
        """Names in the block of the linears that are quantized."""
        if self.scheme is None:
            return ()
        prefix = self.architecture.block_prefix(block)
        return tuple(n for n in self.architecture.linears if prefix + n not in self.ignore)

    def stored_block(self, block: int, device: str = "cpu") -> dict[str, Tensor]:
        """A block's tensors as stored, by their names in it."""
        names = self.names(block)
        read = self.source.read(names.values(), device)
        return {short: read[name] for short, name in names.items()}

    def block_weights(
        self, block: int, dtype: torch.dtype, device: str = "cpu"
    ) -> dict[str, Tensor]:
        """A block's weights as a server computes with them, in ``dtype``."""
        stored = self.stored_block(block, device)
        if self.scheme is None:
            return {name: tensor.to(dtype) for name, tensor in stored.items()}
        return restore_block(stored, self.quantized(block), self.scheme, dtype)

    def input_hook(self, block: int, device: str = "cpu") -> InputHook | None:
        """What quantizes the inputs of the block's linears, as SGLang does; None if nothing."""
        if self.scheme is None or self.scheme.activation is None:
            return None
        scales: Mapping[str, Tensor] = {}
        if not self.scheme.activation.dynamic:
            prefix = self.architecture.block_prefix(block)
            names = {n: f"{prefix}{n}.{INPUT_SCALE}" for n in self.quantized(block)}
            read = self.source.read(names.values(), device)
            scales = {linear: read[name] for linear, name in names.items()}
        return activation_hook(self.scheme.activation, scales)

    def outside(self, name: str, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        """A tensor outside of the blocks, in ``dtype``."""
        return self.source.read([name], device)[name].to(dtype)

    def head(self, dtype: torch.dtype) -> Tensor:
        """The output head (V, D), the embedding where the two are tied."""
        name = self.architecture.embedding if self.tied else self.architecture.head
        return self.outside(name, dtype)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint folder, quantized by this project or not quantized.

    Raises:
        InputError: not a checkpoint, or in a format that this project does not write.
    """
    return checkpoint_of(open_source(path))


def checkpoint_of(source: Source) -> Checkpoint:
    """See a source checkpoint as one to run."""
    config = source.config
    require_sizes(source)
    described = config.get("quantization_config")
    scheme = None
    if described is not None:
        scheme = scheme_from_config(described, _dtype_of(config))
    ignore = frozenset(described.get("ignore", ())) if described else frozenset()
    return Checkpoint(source, architecture_of(config), scheme, ignore, is_tied(source))


def _dtype_of(config: Mapping[str, Any]) -> torch.dtype:
    stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return _FLOATS.get(stored, torch.bfloat16)
