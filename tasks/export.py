"""Assemble a checkpoint inside the store, quantized or not; publishing it is another step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from safetensors import safe_open

from tasks.engine.draft import Draft
from tasks.engine.encoding import TOKENIZER_FILES, files_digest
from tasks.engine.export_format import export_dtype, quantization_config
from tasks.engine.job import Job, require
from tasks.engine.source import CONFIG, INDEX, SINGLE
from tasks.engine.step import step
from tasks.engine.version import SOURCE, Version

# small files that a checkpoint carries beside its weights
COMPANIONS = (*TOKENIZER_FILES, "generation_config.json", "preprocessor_config.json")


def _depends_on(
    job: Job, packed: Sequence[str], beside: str, version: Version = SOURCE
) -> dict[str, Any]:
    return {
        **_transformed_depends_on(job, packed, beside, version),
        "quantization": quantization_config(job.scheme, job.plan.ignore),
    }


@step(depends_on=_depends_on)
def export(
    job: Job, draft: Draft, packed: Sequence[str], beside: str, version: Version = SOURCE
) -> dict[str, Any]:
    """Link packed blocks and the tensors beside them; write index, config and tokenizer.

    Args:
        job: the run.
        draft: the entry to fill.
        packed: keys of the blocks, in their order.
        beside: key of the tensors outside of the blocks.
        version: of the model before rounding.
    """
    return _assemble(job, draft, [*packed, beside], exported_config(job, version))


def _transformed_depends_on(
    job: Job, blocks: Sequence[str], beside: str, version: Version
) -> dict[str, Any]:
    return {
        "blocks": list(blocks),
        "beside": beside,
        "config": unquantized_config(job, version),
        "companions": files_digest(job.source, COMPANIONS),
    }


@step(depends_on=_transformed_depends_on)
def export_transformed(
    job: Job, draft: Draft, blocks: Sequence[str], beside: str, version: Version
) -> dict[str, Any]:
    """Assemble a checkpoint of blocks before rounding, the ones of :mod:`tasks.transformed`."""
    return _assemble(job, draft, [*blocks, beside], unquantized_config(job, version))


def _assemble(
    job: Job, draft: Draft, parts: Sequence[str], config: dict[str, Any]
) -> dict[str, Any]:
    entries = [require(job, key) for key in parts]
    shards = [entry.file(name) for entry in entries for name in sorted(entry.files)]
    total = len(shards)
    weight_map: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(shards, start=1):
        name = _shard_name(number, total)
        linked = draft.link(name, shard)
        with safe_open(linked, framework="pt") as file:
            weight_map |= {tensor: name for tensor in file.keys()}  # noqa: SIM118
        size += linked.stat().st_size
    if total > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(draft, INDEX, index)
    _write_json(draft, CONFIG, config)
    for companion in COMPANIONS:
        if (job.source.path / companion).is_file():
            # a copy: the source's own file must not share its bytes with the export
            (draft.folder / companion).write_bytes((job.source.path / companion).read_bytes())
    return {"bytes": size, "tensors": len(weight_map), "shards": total}


def exported_config(job: Job, version: Version = SOURCE) -> dict[str, Any]:
    """The source's ``config.json`` with the exported dtype and the quantization described."""
    quantization = quantization_config(job.scheme, job.plan.ignore)
    return unquantized_config(job, version) | {"quantization_config": quantization}


def unquantized_config(job: Job, version: Version = SOURCE) -> dict[str, Any]:
    """The source's ``config.json`` with the exported dtype."""
    dtype = str(export_dtype(job.dtype)).removeprefix("torch.")
    config = {k: v for k, v in job.source.config.items() if k not in ("auto_map", "torch_dtype")}
    return config | {
        "dtype": dtype,
        # a rotated head has taken the final norm, and is no longer the embedding
        "tie_word_embeddings": job.plan.tied and version.rotation is None,
    }


def _shard_name(number: int, total: int) -> str:
    return SINGLE if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"


def _write_json(draft: Draft, name: str, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    (draft.folder / name).write_text(text + "\n", encoding="utf-8")
