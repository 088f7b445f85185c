"""Which sizes of linears SGLang's kernels take, on one GPU or spread over several.

SGLang fuses q, k and v, and gate and up, and gives each GPU a part of the rows of those, and a part
of the columns of o and down. It finds out that a size does not fit while it loads, or crashes.
Limits are those of SGLang 0.5.15 and its kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantizers.schemes import Granularity
from tasks.engine.architectures import Architecture, architecture_of
from tasks.engine.errors import InputError
from tasks.engine.export_format import PACKED, Scheme

PARALLEL_SIZES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Kernel:
    """What sizes a kernel takes.

    Attributes:
        name: for people.
        columns: input features are multiples of this.
        rows: output features of what is fused are multiples of this.
        part: and those of each part multiples of this; of the last one only where it is spread.
    """

    name: str
    columns: int
    rows: int
    part: int = 1


_MARLIN = Kernel("Marlin", 128, 64)
_INT8 = Kernel("the int8 kernel", 16, 8)
_FP8_TENSOR = Kernel("torch._scaled_mm", 16, 16)
_FP8_BLOCK = Kernel("the FP8 block kernel", 128, 1, 128)
# where cutlass does not take a size, Triton does; what quantizes the inputs wants whole vectors
_FP8_CHANNEL = Kernel("the FP8 kernel", 4, 1)
_SCHEMES = {
    "W4A16": _MARLIN,
    "W8A8": _INT8,
    "FP8 block": _FP8_BLOCK,
    "FP8 static": _FP8_TENSOR,
    "FP8 dynamic": _FP8_CHANNEL,
}


def kernel_of(scheme: Scheme) -> Kernel | None:
    """The kernel that computes with a scheme, None where SGLang has none."""
    if scheme.format == PACKED:
        return _MARLIN
    if scheme.activation is None:
        return None
    if not scheme.weight.number_format.is_float:
        return _INT8
    return {
        Granularity.TENSOR: _FP8_TENSOR,
        Granularity.BLOCK: _FP8_BLOCK,
        Granularity.CHANNEL: _FP8_CHANNEL,
    }.get(scheme.weight.granularity)


@dataclass(frozen=True)
class Share:
    """What one GPU holds of linears that are fused: rows of each, columns of all.

    ``split`` are the sizes of the whole linears that are cut into as many parts as GPUs.
    """

    linears: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int
    gpus: int
    split: tuple[int, ...]

    def misfits(self, kernel: Kernel) -> Iterator[str]:
        """What of it the kernel does not take."""
        who, on = " + ".join(self.linears), f" on each of {self.gpus} GPUs" * (self.gpus > 1)
        takes = f"{kernel.name} takes multiples of"
        for size in self.split:
            if size % self.gpus:
                yield f"{who} has {size} features, which {self.gpus} GPUs cannot share evenly"
        if self.columns % kernel.columns:
            yield f"{who} has {self.columns} input features{on}, {takes} {kernel.columns}"
        if sum(self.rows) % kernel.rows:
            yield f"{who} has {sum(self.rows)} output features{on}, {takes} {kernel.rows}"
        parts = self.rows if self.gpus > 1 else self.rows[:-1]
        for linear, rows in zip(self.linears, parts, strict=False):
            if rows % kernel.part:
                yield f"{linear} has {rows} output features{on}, {takes} {kernel.part}"


Shapes = Mapping[str, tuple[int, int]]


def shares(shapes: Shapes, config: Mapping[str, Any], gpus: int) -> list[Share]:
    """What one GPU holds of each linear of a block, fused as SGLang does.

    Args:
        shapes: (N, K) of the linears, by their names in the block.
        config: the model's.
        gpus: over which it is spread.
    """
    architecture = architecture_of(config)
    fused = {name: group for group in architecture.fusions for name in group}
    groups = dict.fromkeys(
        tuple(member for member in fused.get(name, (name,)) if member in shapes) for name in shapes
    )
    # with more GPUs than heads of keys and values, several GPUs hold the same head
    copies = dict.fromkeys(
        (architecture.key, architecture.value), max(1, gpus // _key_heads(config))
    )
    return [_share(shapes, architecture, copies, group, gpus) for group in groups]


def _share(
    shapes: Shapes,
    architecture: Architecture,
    copies: Mapping[str, int],
    linears: tuple[str, ...],
    gpus: int,
) -> Share:
    columns = shapes[linears[0]][1]
    # inputs of these are spread over GPUs, those of all others are whole on each
    if linears[0] in architecture.stream_writers:
        return Share(linears, (shapes[linears[0]][0],), columns // gpus, gpus, (columns,))
    whole = tuple(shapes[name][0] * copies.get(name, 1) for name in linears)
    return Share(linears, tuple(rows // gpus for rows in whole), columns, gpus, whole)


def misfits(
    shapes: Shapes, config: Mapping[str, Any], scheme: Scheme, gpus: int = 1
) -> dict[str, str]:
    """Why SGLang would not serve a block: a line for each linear that its kernel does not take.

    The line has the linear, the sizes, and what would fit.
    """
    kernel = kernel_of(scheme)
    if kernel is None:
        return {}
    lines: dict[str, str] = {}
    for share in shares(shapes, config, gpus):
        why = next(share.misfits(kernel), None)
        if why is not None:
            mend = _mend({name: shapes[name] for name in share.linears}, config, kernel, gpus)
            lines |= {name: f"{why}; {mend}" for name in share.linears}
    return lines


def require_parallel(config: Mapping[str, Any], gpus: int, key: str) -> None:
    """Refuse a number of GPUs that SGLang cannot spread a model's heads over.

    Raises:
        InputError: names ``key`` and the numbers that fit.
    """
    fitting = [size for size in PARALLEL_SIZES if _heads_fit(config, size)]
    if not _heads_fit(config, gpus):
        raise InputError(
            f"{key}: {gpus} GPUs cannot share {config.get('num_attention_heads')} attention heads "
            f"and {_key_heads(config)} key heads; sizes that fit: {_listed(fitting)}"
        )


def _heads_fit(config: Mapping[str, Any], gpus: int) -> bool:
    keys = _key_heads(config)
    return _heads(config) % gpus == 0 and (keys % gpus == 0 or gpus % keys == 0)


def _mend(shapes: Shapes, config: Mapping[str, Any], kernel: Kernel, gpus: int) -> str:
    """What would fit: other numbers of GPUs, else other schemes."""

    def fits(size: int, other: Kernel) -> bool:
        if size > 1 and not _heads_fit(config, size):
            return False
        return not any(any(share.misfits(other)) for share in shares(shapes, config, size))

    if sizes := [size for size in PARALLEL_SIZES if fits(size, kernel)]:
        return f"numbers of GPUs that fit: {_listed(sizes)}"
    return f"schemes that fit: {_listed(n for n, other in _SCHEMES.items() if fits(gpus, other))}"


def _heads(config: Mapping[str, Any]) -> int:
    return int(config.get("num_attention_heads") or 1)


def _key_heads(config: Mapping[str, Any]) -> int:
    return int(config.get("num_key_value_heads") or _heads(config))


def _listed(items: Any) -> str:
    return ", ".join(str(item) for item in items)
