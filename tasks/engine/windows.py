"""Token windows for calibration and evaluation, as the sections of a recipe ask for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from configs.fields import effective
from configs.schema import Calibration, Evaluation
from configs.vocabulary import DataName
from tasks.engine.cutting import (
    Cut,
    check_text,
    consecutive_windows,
    packed_windows,
    random_crops,
    random_document_crops,
    truncated_windows,
)
from tasks.engine.draft import Draft
from tasks.engine.encoding import (
    EncodedDocuments,
    encode_documents,
    encode_joined,
    files_digest,
    load_tokenizer,
)
from tasks.engine.errors import InputError
from tasks.engine.generate import BATCH, sample_windows
from tasks.engine.job import Job
from tasks.engine.source import Source
from tasks.engine.store import Entry, load_tensors
from tasks.engine.text import TextSource, read_documents, text_digest, text_of

TOKENS = "tokens.safetensors"
# what the windows of each preset are cut from
_CUT_FROM = {
    "crop": Cut.JOINED,
    "pack": Cut.PACKED,
    "truncate": Cut.ONE,
    "crop_documents": Cut.ONE,
}

Section = Calibration | Evaluation


def window_lineage(job: Job, section: Section) -> dict[str, Any]:
    """What decides the windows of a section: the text's bytes and the tokenizer, or the model."""
    asked = effective(section) | {"path": None}
    if section.name is DataName.SELF_GENERATED:
        return {
            "text": asked,
            "model": job.source.digest(job.source.tensors),
            "config": dict(job.source.config),
            "side by side": BATCH,
        }
    text = text_of(section)
    return {
        "text": asked,
        "bytes": text_digest(text),
        "tokenizer": files_digest(job.source),
    }


def save_windows(job: Job, draft: Draft, section: Section) -> dict[str, Any]:
    """Cut the section's text and save ``tokens`` int32 (W, T); returns their counts."""
    windows = token_windows(job.source, section, job.device)
    draft.save_tensors(TOKENS, {"tokens": windows.to(torch.int32)})
    return {
        "windows": windows.shape[0],
        "window": windows.shape[1],
        "tokens": windows.numel(),
        "name": str(section.name),
    }


def read_tokens(entry: Entry) -> Tensor:
    """Read the windows of a calibration or evaluation set: int64 (W, T)."""
    return load_tensors(entry.file(TOKENS))["tokens"].to(torch.int64)


def check_section(
    source: Source, section: Section, cut: Callable[[], Entry | None] = lambda: None
) -> None:
    """Check that the text of a section can give windows, without the whole work.

    Args:
        source: the checkpoint whose tokenizer counts.
        section: of the recipe.
        cut: finds the windows that were cut of this very text before, which is not read then.

    Raises:
        InputError: no text, no tokenizer, too short, or windows longer than the model's context.
    """
    require_context(source, section.seq_len, f"{section.place}.seq_len")
    if section.name is DataName.SELF_GENERATED:
        return
    found = cut()
    if found is not None:
        require_known_tokens(read_tokens(found), source)
        return
    text = text_of(section)
    load_tokenizer(source)
    text_digest(text)
    if not text.remote:
        kind = _CUT_FROM[_preset(section)] if isinstance(section, Calibration) else Cut.JOINED
        ids = check_text(text, source, section.seq_len, kind)
        require_known_tokens(torch.tensor(ids), source)


def require_context(source: Source, seq_len: int, key: str) -> None:
    """Refuse windows that are longer than the model's context; ``key`` is what sets them."""
    context = source.config.get("max_position_embeddings")
    if context and seq_len > context:
        raise InputError(
            f"{key}: windows of {seq_len} tokens are longer than the model's context of {context}; "
            f"set {key} to at most {context}"
        )


def token_windows(source: Source, section: Section, device: str) -> Tensor:
    """Cut the text that a section names into windows: int64 (W, T).

    Evaluation text is encoded once and cut from its start; calibration text follows the preset.
    """
    seed = section.seed or 0
    if isinstance(section, Evaluation):
        if section.name is DataName.SELF_GENERATED:
            return sample_windows(source, section.windows or 16, section.seq_len, seed, device)
        return evaluation_windows(source, text_of(section), section.seq_len, section.windows)
    if section.name is DataName.SELF_GENERATED:
        return sample_windows(source, section.n_samples, section.seq_len, seed, device)
    text, tokenizer = text_of(section), load_tokenizer(source)
    length, samples = section.seq_len, section.n_samples
    preset = _preset(section)
    documents = read_documents(text, blank=_CUT_FROM[preset] is Cut.JOINED)
    if preset == "crop":
        windows = random_crops(
            text, encode_joined(text, tokenizer, documents), length, samples, seed
        )
    else:
        cut = {
            "pack": packed_windows,
            "truncate": truncated_windows,
            "crop_documents": random_document_crops,
        }[preset]
        encoded: Sequence[Sequence[int]] = (
            encode_documents(text, tokenizer, documents)
            if preset == "pack"
            else EncodedDocuments(text, tokenizer, documents)
        )
        windows = cut(text, encoded, length, samples, seed)
    return require_known_tokens(windows, source)


def evaluation_windows(
    source: Source, text: TextSource, seq_len: int, windows: int | None
) -> Tensor:
    """Encode a text once, with one BOS, and cut it into non-overlapping windows from its start."""
    ids = encode_joined(text, load_tokenizer(source), read_documents(text, blank=True))
    return require_known_tokens(consecutive_windows(text, ids, seq_len, windows), source)


def require_known_tokens(windows: Tensor, source: Source) -> Tensor:
    """Return ``windows``, or refuse token ids that the model has no embedding for."""
    vocabulary = int(source.config.get("vocab_size", 0))
    if vocabulary and int(windows.max()) >= vocabulary:
        raise InputError(
            f"model {source.path}: the tokenizer gives token {int(windows.max())}, but the model "
            f"knows {vocabulary}; copy the tokenizer that belongs to it"
        )
    return windows


def _preset(section: Calibration) -> str:
    """How windows are cut: ``preproc`` says it where it names a data set, else the name does."""
    for asked in (section.preproc or "", str(section.name)):
        for data, preset in _PRESETS.items():
            if data in asked.lower():
                return preset
    return "pack"


_PRESETS = {"pileval": "truncate", "wikitext2": "crop", "c4": "crop_documents"}
