"""How token ids become windows of one length, and whether there are enough of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from tasks.engine.encoding import encode_documents, encode_joined, encode_packed, load_tokenizer
from tasks.engine.errors import InputError
from tasks.engine.source import Source
from tasks.engine.text import Document, TextSource, read_documents

_PROBE_CHARACTERS_PER_TOKEN = 64


class Cut(Enum):
    """What windows are cut from: documents joined as text, their tokens packed, or one of them."""

    JOINED = "joined"
    PACKED = "packed"
    ONE = "one"


def check_text(text: TextSource, source: Source, seq_len: int, cut: Cut = Cut.JOINED) -> list[int]:
    """Check, without the whole work, that at least one window of ``seq_len`` can be cut.

    Args:
        text: the text.
        source: the checkpoint whose tokenizer counts.
        seq_len: tokens of a window.
        cut: what a window is cut from.

    Returns:
        The token ids that were looked at.

    Raises:
        InputError: as :func:`read_documents` and the cutting functions would raise it.
    """
    tokenizer = load_tokenizer(source)
    enough = seq_len * _PROBE_CHARACTERS_PER_TOKEN
    documents = read_documents(text, blank=cut is Cut.JOINED)
    if cut is Cut.ONE:
        return _longest_document(text, tokenizer, documents, seq_len)
    encode = encode_joined if cut is Cut.JOINED else encode_packed
    sample: list[Document] = []
    for document in documents:
        sample.append(document[:enough] if isinstance(document, str) else document)
        if sum(len(str(d)) for d in sample) >= enough:
            break
    ids = encode(text, tokenizer, sample)
    if len(ids) < seq_len:
        ids = encode(text, tokenizer, documents)
    _require_window(text, len(ids), seq_len)
    return ids


def _longest_document(
    text: TextSource, tokenizer: Any, documents: Sequence[Document], seq_len: int
) -> list[int]:
    """Return the first document found that fills a window, the likeliest looked at first."""
    longest = 0
    for document in sorted(documents, key=lambda d: len(str(d)), reverse=True):
        (ids,) = encode_documents(text, tokenizer, [document])
        if len(ids) >= seq_len:
            return ids
        longest = max(longest, len(ids))
    _require_window(text, longest, seq_len)
    raise AssertionError("a document was too short and was not refused")


def consecutive_windows(
    text: TextSource, ids: Sequence[int], seq_len: int, windows: int | None
) -> Tensor:
    """Cut ``ids`` into non-overlapping windows from the start: int64 (W, seq_len).

    Raises:
        InputError: shorter than one window.
    """
    _require_window(text, len(ids), seq_len)
    count = len(ids) // seq_len
    count = count if windows is None else min(windows, count)
    return torch.tensor(ids[: count * seq_len], dtype=torch.int64).view(count, seq_len)


def packed_windows(
    text: TextSource, encoded: Sequence[Sequence[int]], seq_len: int, samples: int, seed: int
) -> Tensor:
    """Pack documents into windows and choose ``samples`` of them, seeded, in text order."""
    ids = [token for document in encoded for token in document]
    windows = consecutive_windows(text, ids, seq_len, None)
    if len(windows) <= samples:
        return windows
    chosen = sorted(random.Random(seed).sample(range(len(windows)), samples))
    return windows[chosen]


def truncated_windows(
    text: TextSource, encoded: Sequence[Sequence[int]], seq_len: int, samples: int, seed: int
) -> Tensor:
    """Shuffle documents, drop those shorter than a window, cut the others to one.

    Documents are looked at one by one until there are enough.
    """
    order = list(range(len(encoded)))
    random.Random(seed).shuffle(order)
    windows: list[Sequence[int]] = []
    longest = 0
    for number in order:
        if len(windows) == samples:
            break
        ids = encoded[number]
        longest = max(longest, len(ids))
        if len(ids) >= seq_len:
            windows.append(ids[:seq_len])
    if not windows:
        _require_window(text, longest, seq_len)
    return torch.tensor(windows, dtype=torch.int64)


def random_crops(
    text: TextSource, ids: Sequence[int], seq_len: int, samples: int, seed: int
) -> Tensor:
    """Crop ``samples`` windows at random places of one stretch: (samples, seq_len)."""
    _require_window(text, len(ids), seq_len)
    draw = random.Random(seed)
    starts = [draw.randint(0, len(ids) - seq_len) for _ in range(samples)]
    return torch.tensor([ids[start : start + seq_len] for start in starts], dtype=torch.int64)


def random_document_crops(
    text: TextSource, encoded: Sequence[Sequence[int]], seq_len: int, samples: int, seed: int
) -> Tensor:
    """Crop one window from each of ``samples`` randomly drawn long documents.

    Documents are looked at when they are drawn; those that are too short are not drawn again.
    """
    draw = random.Random(seed)
    numbers = list(range(len(encoded)))
    crops: list[Sequence[int]] = []
    longest = 0
    while len(crops) < samples and numbers:
        place = draw.randrange(len(numbers))
        ids = encoded[numbers[place]]
        longest = max(longest, len(ids))
        if len(ids) < seq_len:
            numbers[place] = numbers[-1]
            numbers.pop()
            continue
        start = draw.randint(0, len(ids) - seq_len)
        crops.append(ids[start : start + seq_len])
    if not crops:
        _require_window(text, longest, seq_len)
    return torch.tensor(crops, dtype=torch.int64)


def _require_window(text: TextSource, length: int, seq_len: int) -> None:
    if length < seq_len:
        raise InputError(
            f"{text.key('path')}: {text.path or text.name} gives {length} tokens, fewer than one "
            f"window of {seq_len}; give more text or set {text.key('seq_len')}"
        )
