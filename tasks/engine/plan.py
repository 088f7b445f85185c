"""Which linears of a model are quantized, and whether their sizes allow it: decided once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from configs.schemes import MARLIN_GROUP_SIZES
from quantizers.schemes import Granularity, WeightScheme
from tasks.engine.architectures import Architecture, architecture_of
from tasks.engine.decoder import Decoder
from tasks.engine.errors import InputError
from tasks.engine.kernel_limits import Shapes
from tasks.engine.source import CONFIG, Source

SIZES = ("num_hidden_layers", "hidden_size", "vocab_size")
# transformers has a default for those that are missing or null
OPTIONAL_SIZES = (
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class BlockPlan:
    """One block: all its tensors and the linears of it that are quantized, by names in it."""

    prefix: str
    tensors: tuple[str, ...]
    quantized: tuple[str, ...]

    def full(self, names: Sequence[str]) -> list[str]:
        """Names in the checkpoint of names in the block."""
        return [self.prefix + name for name in names]

    @property
    def weights(self) -> list[str]:
        """Names in the block of the weights that are quantized."""
        return [f"{linear}.weight" for linear in self.quantized]


@dataclass(frozen=True)
class Plan:
    """A whole model: its blocks, the tensors outside of them, and the linears left out."""

    architecture: Architecture
    blocks: tuple[BlockPlan, ...]
    outside: tuple[str, ...]
    ignored: tuple[str, ...]
    tied: bool

    @property
    def ignore(self) -> list[str]:
        """The ``ignore`` list of the export: the head, then every linear left out."""
        return [self.architecture.head.removesuffix(".weight"), *self.ignored]


def plan_model(
    source: Source,
    scheme: WeightScheme,
    ignored_layers: Sequence[str] = (),
    keep_incompatible: bool = False,
    misfits: Callable[[Shapes], Mapping[str, str]] | None = None,
) -> Plan:
    """Decide which linears are quantized.

    Args:
        source: the checkpoint.
        scheme: how weights are quantized.
        ignored_layers: linears to leave out: a full name, an ending of one (``mlp.down_proj``),
            or ``re:`` and a regular expression that matches the full name.
        keep_incompatible: leave out linears whose sizes the scheme cannot take.
        misfits: of the sizes of a block's linears, why its kernels would not take them.

    Raises:
        InputError: a tensor is missing; a name that matches nothing; sizes that do not divide;
            a part of a fused layer left out without the others.
    """
    architecture = architecture_of(source.config)
    count = int(source.config["num_hidden_layers"])
    prefixes = [architecture.block_prefix(block) for block in range(count)]
    linears = [_linears(source, architecture, prefix) for prefix in prefixes]
    everything = [p + name for p, names in zip(prefixes, linears, strict=True) for name in names]
    left_out = _match(ignored_layers, everything)
    incompatible = {n: why for n in everything if (why := _problem(source, n, scheme))}
    if misfits is not None:
        for prefix, names in zip(prefixes, linears, strict=True):
            kept = [name for name in names if prefix + name not in left_out]
            incompatible |= _misfits(source, prefix, kept, misfits)
    refused = [name for name in everything if name in incompatible and name not in left_out]
    if refused and not keep_incompatible:
        others = len(refused) - 1
        more = f" (and {others} more linear{'s' * (others > 1)})" if others else ""
        raise InputError(incompatible[refused[0]] + more)
    left_out |= set(refused)
    _require_whole_fusions(architecture, prefixes, linears, left_out)
    blocks = tuple(
        _plan_block(source, prefix, names, left_out)
        for prefix, names in zip(prefixes, linears, strict=True)
    )
    inside = {
        prefix + name for prefix, b in zip(prefixes, blocks, strict=True) for name in b.tensors
    }
    if not any(block.quantized for block in blocks):
        raise InputError(
            "ignored_layers, --keep-incompatible: no linear is left to quantize; leave out fewer, "
            "or choose another group size"
        )
    tied = is_tied(source)
    outside = tuple(
        name
        for name in sorted(source.tensors)
        if name not in inside and not (tied and name == architecture.head)
    )
    _require_outside(source, architecture, tied)
    ordered = tuple(name for name in everything if name in left_out)
    return Plan(architecture, blocks, outside, ordered, tied)


def require_sizes(source: Source) -> None:
    """Check the sizes in ``config.json``, before anything is reckoned or built from them.

    Raises:
        InputError: one is missing, no positive whole number, or more blocks than are stored.
    """
    file, config = source.path / CONFIG, source.config
    for key in SIZES:
        if key not in config:
            raise InputError(f"{file}: {key}: is missing; copy the model's own config.json again")
    for key in (*SIZES, *(key for key in OPTIONAL_SIZES if config.get(key) is not None)):
        size = config[key]
        if type(size) is not int or size < 1:
            raise InputError(f"{file}: {key}: {size!r} is not a whole number of at least 1")
    prefix = f"{architecture_of(config).blocks}."
    inside = (name.removeprefix(prefix) for name in source.tensors if name.startswith(prefix))
    stored = len({name.split(".")[0] for name in inside})
    if config["num_hidden_layers"] > stored:
        raise InputError(
            f"{file}: num_hidden_layers: {config['num_hidden_layers']}, but {stored} blocks are "
            "stored; set it to that, or download the checkpoint again"
        )


def require_fit(source: Source, plan: Plan, decoder: Decoder) -> None:
    """Compare the stored tensors with the model that ``config.json`` describes.

    Raises:
        InputError: a tensor is missing, of another shape, or of no use to the model.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for block, planned in zip(decoder.blocks, plan.blocks, strict=True):
        built = {planned.prefix + name: tuple(t.shape) for name, t in block.state_dict().items()}
        if unknown := sorted(set(planned.full(planned.tensors)) - set(built)):
            raise InputError(
                f"model {source.path}: transformers' block has no place for {unknown[0]}; "
                "is config.json of another model?"
            )
        expected |= built
    expected |= outside_shapes(source.config, plan.architecture, decoder, plan.tied)
    for name, shape in expected.items():
        info = source.tensors.get(name)
        if info is None:
            raise InputError(
                f"model {source.path}: no tensor {name}, which transformers' model needs; "
                "download the checkpoint again"
            )
        if info.shape != shape:
            raise InputError(
                f"model {source.path}: {name} is {list(info.shape)}, but config.json makes it "
                f"{list(shape)}; is config.json of another model?"
            )
    for name in plan.outside:
        if name.startswith(f"{plan.architecture.blocks}."):
            raise InputError(
                f"model {source.path}: {name} is of a block beyond the {len(plan.blocks)} of "
                "config.json; set num_hidden_layers to what is stored"
            )
        if name not in expected:
            raise InputError(
                f"model {source.path}: transformers' model has no place for {name}; "
                "is config.json of another model?"
            )


def outside_shapes(
    config: Mapping[str, Any], architecture: Architecture, decoder: Decoder, tied: bool
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors outside of the blocks: embedding, final norm, head where untied."""
    width = tuple(decoder.final_norm.state_dict()["weight"].shape)
    embedding = (int(config["vocab_size"]), *width)
    shapes = {architecture.final_norm: width, architecture.embedding: embedding}
    return shapes if tied else shapes | {architecture.head: embedding}


def is_tied(source: Source) -> bool:
    """Say whether the head is the embedding: the config says so, or no head is stored."""
    head = architecture_of(source.config).head
    return bool(source.config.get("tie_word_embeddings", head not in source.tensors))


def _linears(source: Source, architecture: Architecture, prefix: str) -> list[str]:
    for name in architecture.linears:
        info = source.tensors.get(f"{prefix}{name}.weight")
        if info is None:
            raise InputError(
                f"model {source.path}: no tensor {prefix}{name}.weight; every block of a "
                f"{architecture.model_type} checkpoint has it, download it again"
            )
        if len(info.shape) != 2 or not info.dtype.is_floating_point or info.dtype.itemsize == 1:
            raise InputError(
                f"model {source.path}: {prefix}{name}.weight is {info.dtype} {list(info.shape)}, "
                "not a matrix of bf16, fp16 or fp32; give the checkpoint before quantization"
            )
    return list(architecture.linears)


def _match(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    matched: set[str] = set()
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                expression = re.compile(pattern[3:])
            except re.error as error:
                raise InputError(f"ignored_layers: {pattern!r}: {error}") from error
            hits = {name for name in names if expression.fullmatch(name)}
        else:
            hits = {name for name in names if name == pattern or name.endswith("." + pattern)}
        # heads are never quantized: naming one is right and changes nothing
        if not hits and pattern != "lm_head":
            short = sorted({".".join(name.split(".")[-2:]) for name in names} | set(names))
            near = difflib.get_close_matches(pattern, short, n=1, cutoff=0.0)
            raise InputError(
                f"ignored_layers: {pattern!r} matches no linear of the model; "
                f"did you mean {near[0]!r}?"
            )
        matched |= hits
    return matched


def _problem(source: Source, linear: str, scheme: WeightScheme) -> str | None:
    columns = source.tensors[f"{linear}.weight"].shape[1]
    if scheme.block_shape is not None and columns % scheme.block_shape[1]:
        return (
            f"quant.weight.block_size: {scheme.block_shape[1]} does not divide the {columns} input "
            f"features of {linear}; take another scheme, or give --keep-incompatible to leave such "
            "linears unquantized"
        )
    if scheme.granularity is not Granularity.GROUP or scheme.group_size is None:
        return None
    if columns % scheme.group_size == 0:
        return None
    fitting = [str(size) for size in MARLIN_GROUP_SIZES if columns % size == 0]
    sizes = f"sizes that fit it: {', '.join(fitting)}" if fitting else "no served size fits it"
    return (
        f"quant.weight.group_size: {scheme.group_size} does not divide the {columns} input "
        f"features of {linear}; {sizes}; or give --keep-incompatible to leave such linears "
        "unquantized"
    )


def _misfits(
    source: Source,
    prefix: str,
    linears: Sequence[str],
    misfits: Callable[[Shapes], Mapping[str, str]],
) -> dict[str, str]:
    found = misfits({name: matrix_shape(source, prefix + name) for name in linears})
    return {
        prefix + name: f"{prefix}{line}; or give --keep-incompatible to leave such linears "
        "unquantized, or serving.check_kernels=false for an export that SGLang is not to serve"
        for name, line in found.items()
    }


def matrix_shape(source: Source, linear: str) -> tuple[int, int]:
    """(N, K) of a linear's weight."""
    rows, columns = source.tensors[f"{linear}.weight"].shape
    return rows, columns


def _require_whole_fusions(
    architecture: Architecture,
    prefixes: Sequence[str],
    linears: Sequence[Sequence[str]],
    left_out: set[str],
) -> None:
    for prefix, names in zip(prefixes, linears, strict=True):
        for fusion in architecture.fusions:
            members = [prefix + name for name in fusion if name in names]
            out = [name for name in members if name in left_out]
            if out and len(out) != len(members):
                rest = ", ".join(name for name in members if name not in left_out)
                raise InputError(
                    f"ignored_layers: {out[0]} is left out, but SGLang fuses it with {rest}; "
                    "leave out all of them or none"
                )


def _plan_block(
    source: Source, prefix: str, linears: Sequence[str], left_out: set[str]
) -> BlockPlan:
    tensors = tuple(
        name.removeprefix(prefix) for name in sorted(source.tensors) if name.startswith(prefix)
    )
    return BlockPlan(prefix, tensors, tuple(n for n in linears if prefix + n not in left_out))


def _require_outside(source: Source, architecture: Architecture, tied: bool) -> None:
    needed = [architecture.embedding, architecture.final_norm]
    for name in needed if tied else [*needed, architecture.head]:
        if name not in source.tensors:
            raise InputError(
                f"model {source.path}: no tensor {name}; download the checkpoint again"
            )
