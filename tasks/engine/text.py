"""Calibration and evaluation text: where it comes from."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema import Calibration, Evaluation
from tasks.engine.disk import is_full, no_room
from tasks.engine.errors import InputError
from tasks.engine.store import checksum

# documents of C4's validation file that its published perplexities are measured on
_C4_EVALUATED = 1100
LOCAL_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# what a section of a recipe and the command line call the same
COMMAND_LINE = "--text"
_OPTIONS = {"path": COMMAND_LINE, "seq_len": "--window"}


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


def text_digest(text: TextSource) -> str:
    """Digest of the text: a file's bytes, or a hub data set's revision.

    Raises:
        InputError: the file is missing or the hub cannot be reached; says what to do.
    """
    if text.remote:
        return _hub_revision(text)
    path = _local_path(text)
    split = _split_of(text, path)
    read = [_loader(text, path), *([] if split is None else [split])]
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return ";".join([*read, *(checksum(file) for file in files)])


def text_of(section: Calibration | Evaluation) -> TextSource:
    """The text that a section of a recipe names."""
    evaluation = isinstance(section, Evaluation)
    return TextSource(
        section.place,
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
            return loaded[_split_of(text, path)] if isinstance(loaded, dict) else loaded
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
        if is_full(cause):
            cache = datasets.config.HF_DATASETS_CACHE if text.remote else tempfile.gettempdir()
            raise no_room(cache) from error
        if text.remote:
            raise _not_had(text, cause) from error
        reason = (str(cause).splitlines() or [type(cause).__name__])[0][:200]
        raise InputError(
            f"{text.key('path')}: {text.path} cannot be read ({reason}); give a file of text, "
            "jsonl or parquet"
        ) from error


def _loader(text: TextSource, path: Path) -> str:
    """What ``datasets`` reads a file with: the recipe's word, else the file's ending."""
    # a compressed file has its kind before its last ending
    named = (LOCAL_LOADERS.get(ending) for ending in (f".{text.name}", *path.suffixes))
    return next((loader for loader in named if loader is not None), "text")


def _split_of(text: TextSource, path: Path) -> str | None:
    """Which split of a saved data set is read: as of the hub's; None where it has none.

    Raises:
        InputError: there are several, and not that one.
    """
    described = path / "dataset_dict.json"
    if not described.is_file():
        return None
    splits = [str(split) for split in json.loads(described.read_text())["splits"]]
    split = text.split or _hub_part(text).split
    if split in splits:
        return split
    if text.split is None and len(splits) == 1:
        return splits[0]
    raise InputError(
        f"{text.key('path')}: {text.path} has no split {split!r}, but {', '.join(splits)}; set "
        f"{text.section}.split"
    )


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
        import datasets

        # what either of HF_HUB_OFFLINE and HF_DATASETS_OFFLINE asks for
        if datasets.config.HF_HUB_OFFLINE:
            return f"{name}@{_load(text)._fingerprint}"
        raise _not_had(text, error) from error


def _not_had(text: TextSource, error: BaseException) -> InputError:
    """What to do about a hub's data set that cannot be used."""
    reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
    section, id_ = text.section, _hub_part(text).id
    if isinstance(error, ValueError) and "split" in reason:
        return InputError(f"{section}.split: the data set {id_}: {reason} Set {section}.split")
    return InputError(
        f"{section}.name: the data set {id_} ({text.name}) cannot be reached "
        f"({reason}); give a local file: --set {section}.name=text --set {section}.path=FILE"
    )
