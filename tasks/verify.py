"""Reopen an exported checkpoint and check it: schema, every tensor, an independent reader."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from tasks.engine.checkpoint import Checkpoint, open_checkpoint
from tasks.engine.decoder import Decoder, build_decoder, run_block
from tasks.engine.draft import Draft
from tasks.engine.errors import InputError, VerificationError
from tasks.engine.export_format import (
    INPUT_SCALE,
    Scheme,
    decompress,
    quantization_config,
    restore,
)
from tasks.engine.footprint import WHOLE_MODEL_BYTES
from tasks.engine.job import Job, require
from tasks.engine.kernel_limits import misfits, require_parallel
from tasks.engine.plan import outside_shapes
from tasks.engine.publication import REPORT
from tasks.engine.source import TensorInfo
from tasks.engine.step import step
from tasks.quantize import codes_digest

if TYPE_CHECKING:
    # it imports transformers, which a run that finds all does not need
    from compressed_tensors.quantization import QuantizationScheme

LOGIT_TOLERANCE = 1e-4
PROBE_TOKENS = 64


def _depends_on(job: Job, exported: str, digests: Mapping[str, str] | None) -> dict[str, Any]:
    del job
    return {
        "exported": exported,
        "digests": None if digests is None else dict(digests),
        "reader": version("compressed-tensors"),
    }


@step(depends_on=_depends_on)
def verify(
    job: Job, draft: Draft, exported: str, digests: Mapping[str, str] | None
) -> dict[str, Any]:
    """Check the exported checkpoint against what was quantized, from disk alone.

    Args:
        job: the run.
        draft: the entry to fill.
        exported: key of the export.
        digests: digest of the codes of each quantized linear, by its full name; None for a
            checkpoint that is not quantized.
    """
    del draft
    folder, quantized = require(job, exported).folder, digests is not None
    return verify_folder(folder, digests, quantized, device=job.device)


def verify_folder(
    folder: Path,
    digests: Mapping[str, str] | None = None,
    quantized: bool = True,
    *,
    device: str = "cpu",
) -> dict[str, Any]:
    """Check a checkpoint folder, one that is ``quantized`` or one that is not.

    Every tensor's name, dtype and shape; finite values; compressed-tensors' own schema and its
    own decompression of every linear against ours; the codes' digests where they are known; and
    the logits of transformers' own loader where the model is small enough. Tensors are compared on
    ``device``.

    Raises:
        InputError: not an exported checkpoint.
        VerificationError: names the tensor and what is wrong with it.
    """
    checkpoint = open_checkpoint(folder)
    scheme, reader = checkpoint.scheme, None
    if (scheme is not None) is not quantized:
        found = "a" if scheme is not None else "no"
        raise InputError(f"{folder}/config.json: {found} quantization_config; nothing to verify")
    if scheme is not None:
        reader = _independent_scheme(checkpoint)
        _check_description(checkpoint, scheme)
    decoder = build_decoder(checkpoint.source.config)
    linears = 0
    expected: set[str] = set()
    for block, module in enumerate(decoder.blocks):
        stored = checkpoint.stored_block(block, device)
        expected |= set(checkpoint.names(block).values())
        _check_untouched(checkpoint, decoder, block, stored)
        for linear in checkpoint.quantized(block):
            assert scheme is not None and reader is not None
            name = checkpoint.architecture.block_prefix(block) + linear
            members = _members(stored, linear)
            rows, columns = _weight_shape(module, linear)
            _check_tensors(name, members, scheme, (rows, columns))
            _check_independent(name, members, scheme, reader)
            if digests is not None:
                _check_digest(name, members, scheme, digests)
            linears += 1
    _check_outside(checkpoint, decoder, expected, device)
    report: dict[str, Any] = {"linears": linears, "tensors": len(checkpoint.source.tensors)}
    if _float32_bytes(checkpoint, decoder) <= WHOLE_MODEL_BYTES:
        report["logit_difference"] = _compare_logits(checkpoint, decoder)
    return report


def require_served(folder: Path, gpus: int | None = None) -> int:
    """Check that SGLang's kernels take the sizes of every quantized linear.

    Args:
        folder: a checkpoint; one whose report says that it is not for SGLang passes on one GPU.
        gpus: over how many it is to be spread; by default as many as its report says.

    Returns:
        The number of GPUs that was checked for.

    Raises:
        InputError: the model's heads cannot be shared by so many.
        VerificationError: names the first linear that does not fit, and what would.
    """
    checkpoint, report = open_checkpoint(folder), _report_of(folder)
    spread = gpus or int(report.get("tensor_parallel") or 1)
    config = checkpoint.source.config
    require_parallel(config, spread, "--tensor-parallel")
    if checkpoint.scheme is None or (gpus is None and report.get("unserved")):
        return spread
    decoder = build_decoder(config)
    for block, module in enumerate(decoder.blocks):
        shapes = {name: _weight_shape(module, name) for name in checkpoint.quantized(block)}
        for line in misfits(shapes, config, checkpoint.scheme, spread).values():
            raise VerificationError(f"{checkpoint.architecture.block_prefix(block)}{line}")
    return spread


def _report_of(folder: Path) -> dict[str, Any]:
    """The published report, empty where there is none that can be read."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def unserved_of(folder: Path) -> str | None:
    """Why a checkpoint's report says that SGLang does not serve it, None where it does not."""
    reason = _report_of(folder).get("unserved")
    return None if reason is None else str(reason)


def digests_of(folder: Path) -> dict[str, str] | None:
    """Read the codes' digests from a checkpoint's report, or None where there is none."""
    try:
        linears = _report_of(folder)["linears"]
        return {name: str(linear["digest"]) for name, linear in linears.items()}
    except (KeyError, TypeError, AttributeError):
        return None


def _independent_scheme(checkpoint: Checkpoint) -> QuantizationScheme:
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    described = checkpoint.source.config["quantization_config"]
    try:
        config = QuantizationConfig.model_validate(described)
    except ValidationError as error:
        raise VerificationError(
            f"{checkpoint.source.path}/config.json: compressed-tensors refuses "
            f"quantization_config ({error.errors()[0]['msg']})"
        ) from error
    scheme = config.config_groups["group_0"]
    if not isinstance(scheme, QuantizationScheme):
        raise VerificationError(f"{checkpoint.source.path}/config.json: group_0 holds no scheme")
    return scheme


def _check_description(checkpoint: Checkpoint, scheme: Scheme) -> None:
    """Compare ``quantization_config`` with what is written for its scheme, key by key."""
    place = f"{checkpoint.source.path}/config.json: quantization_config"
    found = checkpoint.source.config["quantization_config"]
    ignore = list(found.get("ignore", ()))
    written = quantization_config(scheme, ignore)
    for key in sorted({*found, *written}):
        if found.get(key) != written.get(key):
            raise VerificationError(
                f"{place}.{key}: is {found.get(key)!r}, should be {written.get(key)!r}"
            )
    architecture = checkpoint.architecture
    head = architecture.head.removesuffix(".weight")
    if head not in ignore:
        raise VerificationError(f"{place}.ignore: {head} is missing, it would load as garbage")
    prefixes = [architecture.block_prefix(block) for block in range(checkpoint.blocks)]
    linears = {prefix + linear for prefix in prefixes for linear in architecture.linears}
    if unknown := sorted(set(ignore) - linears - {head}):
        raise VerificationError(f"{place}.ignore: {unknown[0]} is no linear of the model")


def _check_untouched(
    checkpoint: Checkpoint, decoder: Decoder, block: int, stored: Mapping[str, Tensor]
) -> None:
    """Check every tensor of a block that is no part of a quantized linear."""
    prefix, linears = checkpoint.architecture.block_prefix(block), checkpoint.quantized(block)
    quantized = {f"{linear}.weight" for linear in linears}
    built = {n: t for n, t in decoder.blocks[block].state_dict().items() if n not in quantized}
    for name, tensor in built.items():
        if name not in stored:
            raise VerificationError(f"{prefix}{name}: not in the checkpoint")
        _require(prefix + name, stored[name], checkpoint.dtype, tuple(tensor.shape))
    for name in sorted(set(stored) - set(built)):
        if name.rpartition(".")[0] not in linears:
            raise VerificationError(f"{prefix}{name}: no tensor of the model")


def _require(
    name: str, found: Tensor | TensorInfo, dtype: torch.dtype, extents: tuple[int, ...]
) -> None:
    if found.dtype != dtype or tuple(found.shape) != extents:
        raise VerificationError(
            f"{name}: is {found.dtype} {list(found.shape)}, should be {dtype} {list(extents)}"
        )


def _members(stored: Mapping[str, Tensor], linear: str) -> dict[str, Tensor]:
    prefix = linear + "."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in stored.items()
        if name.startswith(prefix) and name != prefix + "bias"
    }


def _weight_shape(block: nn.Module, linear: str) -> tuple[int, int]:
    weight = block.get_submodule(linear).weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return rows, columns


def _check_tensors(
    name: str, members: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]
) -> None:
    expected = scheme.expected(*shape)
    if missing := sorted(set(expected) - set(members)):
        raise VerificationError(f"{name}.{missing[0]}: not in the checkpoint")
    if unknown := sorted(set(members) - set(expected)):
        raise VerificationError(f"{name}.{unknown[0]}: no tensor of the format {scheme.format}")
    for part, (dtype, extents) in expected.items():
        _require(f"{name}.{part}", members[part], dtype, tuple(extents))
    if "weight_shape" in members and tuple(members["weight_shape"].tolist()) != shape:
        raise VerificationError(f"{name}.weight_shape: does not say {list(shape)}")


def _check_independent(
    name: str, members: Mapping[str, Tensor], scheme: Scheme, reader: QuantizationScheme
) -> None:
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    theirs = compressor.decompress(dict(members), reader)["weight"]
    ours = restore(members, scheme)
    if not bool(torch.isfinite(theirs.float()).all()):
        raise VerificationError(f"{name}: compressed-tensors reads NaN or Inf")
    gap = (theirs.float() - ours.float()).abs().max()
    if float(gap) > float(ours.float().abs().max()) * torch.finfo(theirs.dtype).eps:
        raise VerificationError(
            f"{name}: compressed-tensors reads other weights than we do (by {float(gap):.3g})"
        )


def _check_digest(
    name: str, members: Mapping[str, Tensor], scheme: Scheme, digests: Mapping[str, str]
) -> None:
    if name not in digests:
        raise VerificationError(f"{name}: quantized in the checkpoint, but not by the run")
    found = codes_digest(decompress(members, scheme), members.get(INPUT_SCALE))
    if found != digests[name]:
        raise VerificationError(f"{name}: other codes or scales than the run computed")


def _check_outside(checkpoint: Checkpoint, decoder: Decoder, inside: set[str], device: str) -> None:
    architecture = checkpoint.architecture
    names = outside_shapes(checkpoint.source.config, architecture, decoder, checkpoint.tied)
    found = set(checkpoint.source.tensors) - inside
    if missing := sorted(set(names) - found):
        raise VerificationError(f"{missing[0]}: not in the checkpoint")
    if checkpoint.tied and architecture.head in found:
        raise VerificationError(f"{architecture.head}: written although it is the embedding")
    if unknown := sorted(found - set(names)):
        raise VerificationError(f"{unknown[0]}: no tensor of the model")
    for name, shape in names.items():
        _require(name, checkpoint.source.tensors[name], checkpoint.dtype, shape)
        # reading refuses NaN and Inf
        checkpoint.source.read([name], device)


def _float32_bytes(checkpoint: Checkpoint, decoder: Decoder) -> int:
    numbers = sum(p.numel() for block in decoder.blocks for p in block.parameters())
    embedding = checkpoint.source.tensors[checkpoint.architecture.embedding]
    return 4 * (numbers + 2 * embedding.size // embedding.dtype.itemsize)


def _compare_logits(checkpoint: Checkpoint, decoder: Decoder) -> float:
    """Largest difference, over the largest logit, to the logits of transformers' own loader."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig
    from transformers.utils import logging

    vocabulary = int(checkpoint.source.config["vocab_size"])
    context = int(checkpoint.source.config.get("max_position_embeddings") or PROBE_TOKENS)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (1, min(PROBE_TOKENS, context)), generator=draw)
    how = {}
    if checkpoint.scheme is not None:
        how["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        # transformers says that ours overrides the file's dequantize, which is the point
        warnings.simplefilter("ignore")
        theirs_model = AutoModelForCausalLM.from_pretrained(
            checkpoint.source.path,
            dtype=torch.float32,
            **how,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    with torch.no_grad():
        theirs = theirs_model(tokens).logits
    ours = weights_only_logits(checkpoint, decoder, tokens)
    difference = float((theirs - ours).abs().max() / theirs.abs().max())
    if not difference <= LOGIT_TOLERANCE:
        raise VerificationError(
            f"{checkpoint.source.path}: transformers' loader gives other logits "
            f"(by {difference:.3g} of the largest; {LOGIT_TOLERANCE} is allowed)"
        )
    return difference


def weights_only_logits(checkpoint: Checkpoint, decoder: Decoder, tokens: Tensor) -> Tensor:
    """Logits (B, T, V) in float32, block by block, activations not quantized."""
    dtype = torch.float32
    hidden, arguments = decoder.embed(
        checkpoint.outside(checkpoint.architecture.embedding, dtype), tokens
    )
    for block in range(checkpoint.blocks):
        weights = checkpoint.block_weights(block, dtype)
        hidden = run_block(decoder.blocks[block], weights, hidden, arguments[block])
    norm = {"weight": checkpoint.outside(checkpoint.architecture.final_norm, dtype)}
    hidden = torch.func.functional_call(decoder.final_norm, norm, (hidden,))
    return decoder.logits(hidden, checkpoint.head(dtype))
