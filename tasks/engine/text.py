"""Calibration and evaluation text: where it comes from and how it becomes token windows."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.schema import Calibration, Evaluation
from tasks.engine.errors import InputError
from tasks.engine.source import Source
from tasks.engine.store import checksum

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)
# documents of C4's validation file that its published perplexities are measured on
_C4_EVALUATED = 1100
LOCAL_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# what a section of a recipe and the command line call the same
COMMAND_LINE = "--text"
_OPTIONS = {"path": COMMAND_LINE, "seq_len": "--window"}
_PROBE_CHARACTERS_PER_TOKEN = 64


@dataclass(frozen=True)
class TextSource:
    """One text as a recipe names it; ``section`` is where, for error messages."""

    section: str
    name: str
    path: str | None
    split: str | None = None
    column: str = "text"
    evaluation: bool = False

    @property
    def remote(self) -> bool:
        """Whether the text comes from a hub."""
        if self.name == "dataset":
            return not Path(str(self.path)).expanduser().exists()
        return self.path is None and self.name in HUB

    def key(self, name: str) -> str:
        """What the user writes to set ``name``: a key of the recipe, or an option."""
        return _OPTIONS[name] if self.section == COMMAND_LINE else f"{self.section}.{name}"

    @property
    def column_mend(self) -> str:
        """How the user names another column."""
        given = self.section == COMMAND_LINE
        return f"call it {self.column!r}" if given else f"set {self.section}.text_column"


@dataclass(frozen=True)
class HubPart:
    """One part of a data set on the hub: a file of it, or all; of these documents the first."""

    id: str
    configuration: str | None
    file: str | None
    split: str
    documents: int | None = None


_C4, _PILE, _WIKITEXT = "allenai/c4", "mit-han-lab/pile-val-backup", "Salesforce/wikitext"
# for calibration, and for evaluation; the Pile's validation set has one part only
HUB = {
    "pileval": (HubPart(_PILE, None, None, "validation"),) * 2,
    "wikitext2": (
        HubPart(_WIKITEXT, "wikitext-2-raw-v1", None, "train"),
        HubPart(_WIKITEXT, "wikitext-2-raw-v1", None, "test"),
    ),
    "c4": (
        HubPart(_C4, None, "en/c4-train.00000-of-01024.json.gz", "train"),
        HubPart(_C4, None, "en/c4-validation.00000-of-00008.json.gz", "train", _C4_EVALUATED),
    ),
}
Document = str | list[dict[str, Any]]


class Cut(Enum):
    """What windows are cut from: documents joined as text, their tokens packed, or one of them."""

    JOINED = "joined"
    PACKED = "packed"
    ONE = "one"


def load_tokenizer(source: Source) -> Any:
    """Load the checkpoint's tokenizer, from local files only.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    if not any((source.path / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(
            f"model {source.path}: no tokenizer files, but the recipe needs text; copy "
            "tokenizer.json and tokenizer_config.json beside the weights"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            source.path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"model {source.path}: the tokenizer cannot be read ({reason})") from error


def files_digest(source: Source, names: Sequence[str] = TOKENIZER_FILES) -> str:
    """Digest of those of the source's small files that are there; by default the tokenizer's."""
    files = [n for n in names if (source.path / n).is_file()]
    return ";".join(f"{name}={checksum(source.path / name)}" for name in files)


def text_digest(text: TextSource) -> str:
    """Digest of the text: a file's bytes, or a hub data set's revision.

    Raises:
        InputError: the file is missing or the hub cannot be reached; says what to do.
    """
    if text.remote:
        return _hub_revision(text)
    path = _local_path(text)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return ";".join([_loader(text, path), *(checksum(file) for file in files)])


def text_of(section: Calibration | Evaluation) -> TextSource:
    """The text that a section of a recipe names."""
    evaluation = isinstance(section, Evaluation)
    return TextSource(
        "eval" if evaluation else "calib",
        str(section.name),
        section.path,
        section.split,
        section.text_column,
        evaluation,
    )


def read_documents(text: TextSource, blank: bool = False) -> list[Document]:
    """Read the documents of a text with ``datasets``; a plain text file is one document.

    Args:
        text: the text.
        blank: whether to keep blank rows: WikiText's belong to the string that perplexity is
            measured on, as GPTQ (arXiv 2210.17323) and all after it join it.

    Raises:
        InputError: unreadable, without the named column, or empty.
    """
    rows = _load(text)
    columns = rows.column_names
    if "messages" in columns and text.column not in columns:
        documents: list[Document] = [row for row in rows["messages"] if row]
    elif text.column in columns:
        kind = rows.features[text.column]
        if getattr(kind, "dtype", None) not in ("string", "large_string"):
            raise InputError(
                f"{text.section}: the column {text.column!r} holds no text; {text.column_mend}"
            )
        written: list[str] = [row for row in rows[text.column] if row is not None]
        filled = [row for row in written if row.strip()]
        documents = [*written] if blank and filled else [*filled]
    else:
        raise InputError(
            f"{text.section}: no column {text.column!r} (columns: {', '.join(columns)}); "
            f"{text.column_mend}"
        )
    if not documents:
        raise InputError(f"{text.key('path')}: {text.path or text.name} holds no text")
    return documents


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
    encode = encode_joined if cut is Cut.JOINED else _encode_packed
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


def _encode_packed(text: TextSource, tokenizer: Any, documents: Sequence[Document]) -> list[int]:
    return [token for ids in encode_documents(text, tokenizer, documents) for token in ids]


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


def encode_documents(
    text: TextSource, tokenizer: Any, documents: Sequence[Document]
) -> list[list[int]]:
    """Token ids of each document, with one BOS in front where the tokenizer has one.

    Conversations go through the model's chat template, which writes its own special tokens.
    """
    plain = [d for d in documents if isinstance(d, str)]
    if len(plain) == len(documents):
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        encoded = tokenizer(plain, add_special_tokens=False, verbose=False)["input_ids"]
        return [bos + ids for ids in encoded]
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{text.section}: the file holds conversations, but the model's tokenizer has no chat "
            f"template; give plain text, or {text.column_mend}"
        )
    return [
        list(tokenizer.apply_chat_template(d, tokenize=True, return_dict=False)) for d in documents
    ]


@dataclass(frozen=True)
class EncodedDocuments(Sequence[list[int]]):
    """Documents whose token ids are made when they are asked for: few of a large text are."""

    text: TextSource
    tokenizer: Any
    documents: Sequence[Document]

    def __len__(self) -> int:
        """How many documents there are."""
        return len(self.documents)

    def __getitem__(self, number: Any) -> Any:
        """Token ids of one document."""
        return encode_documents(self.text, self.tokenizer, [self.documents[number]])[0]


def encode_joined(text: TextSource, tokenizer: Any, documents: Sequence[Document]) -> list[int]:
    """Token ids of the documents as one stretch: plain texts joined by blank lines, one BOS."""
    plain = [d for d in documents if isinstance(d, str)]
    whole: Sequence[Document] = ["\n\n".join(plain)] if len(plain) == len(documents) else documents
    return [token for ids in encode_documents(text, tokenizer, whole) for token in ids]


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


def _local_path(text: TextSource) -> Path:
    if text.path is None:
        raise InputError(f"{text.section}.path: {text.name} needs a file; set {text.section}.path")
    path = Path(text.path).expanduser()
    if not path.exists():
        raise InputError(f"{text.key('path')}: {text.path}: no such file; give a text file")
    return path


def _load(text: TextSource) -> Any:
    import datasets

    datasets.disable_progress_bars()
    # what it logs, it also raises
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        if text.remote:
            part = _hub_part(text)
            rows = datasets.load_dataset(
                part.id, part.configuration, data_files=part.file, split=text.split or part.split
            )
            return rows if part.documents is None else rows.select(range(part.documents))
        path = _local_path(text)
        if path.is_dir():
            loaded = datasets.load_from_disk(str(path))
            return loaded[text.split or next(iter(loaded))] if isinstance(loaded, dict) else loaded
        if path.stat().st_size == 0:
            raise InputError(f"{text.key('path')}: {text.path} is empty; give a file with text")
        kind = _loader(text, path)
        whole = {"sample_by": "document"} if kind == "text" else {}
        # in memory, its copy in a folder that goes away: a text that is read leaves nothing behind
        with tempfile.TemporaryDirectory() as cache:
            return datasets.load_dataset(
                kind,
                data_files=str(path),
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
                **whole,
            )
    except InputError:
        raise
    except Exception as error:  # datasets raises many kinds, wrapped in its own
        cause = error.__cause__ or error
        reason = (str(cause).splitlines() or [type(cause).__name__])[0][:200]
        if text.remote:
            raise _unreachable(text, reason) from error
        raise InputError(
            f"{text.key('path')}: {text.path} cannot be read ({reason}); give a file of text, "
            "jsonl or parquet"
        ) from error


def _loader(text: TextSource, path: Path) -> str:
    """What ``datasets`` reads a file with: the recipe's word, else the file's ending."""
    # a compressed file has its kind before its last ending
    named = (LOCAL_LOADERS.get(ending) for ending in (f".{text.name}", *path.suffixes))
    return next((loader for loader in named if loader is not None), "text")


def _hub_part(text: TextSource) -> HubPart:
    if text.name in HUB:
        return HUB[text.name][text.evaluation]
    if text.path is None:
        raise InputError(f"{text.section}.path: name: dataset needs a data set id; set it")
    return HubPart(text.path, None, None, "test" if text.evaluation else "train")


def _hub_revision(text: TextSource) -> str:
    from huggingface_hub import HfApi

    name = _hub_part(text).id
    try:
        return f"{name}@{HfApi().dataset_info(name, timeout=10).sha}"
    except Exception as error:  # offline, unknown, gated: all mean that it is not to be had
        cached = _cached_fingerprint(text)
        if cached is not None:
            return f"{name}@{cached}"
        raise _unreachable(text, type(error).__name__) from error


def _cached_fingerprint(text: TextSource) -> str | None:
    if not os.environ.get("HF_DATASETS_OFFLINE"):
        return None
    try:
        return str(_load(text)._fingerprint)
    except InputError:
        return None


def _unreachable(text: TextSource, reason: str) -> InputError:
    section = text.section
    return InputError(
        f"{section}.name: the data set {_hub_part(text).id} ({text.name}) cannot be reached "
        f"({reason}); give a local file: --set {section}.name=text --set {section}.path=FILE"
    )
