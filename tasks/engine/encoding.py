"""How documents become token ids: by the checkpoint's own tokenizer, from local files only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tasks.engine.errors import InputError
from tasks.engine.source import CONFIG, Source
from tasks.engine.store import checksum, mark_of
from tasks.engine.text import Document, TextSource

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


def load_tokenizer(source: Source) -> Any:
    """Load the checkpoint's tokenizer, from local files only; the last one is kept.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    found = tokenizer_files(source)
    if not found:
        raise InputError(
            f"model {source.path}: no tokenizer files, but the recipe needs text; copy "
            "tokenizer.json and tokenizer_config.json beside the weights"
        )
    # the model's type is the configuration's
    marks = tuple(mark_of(file) for file in (*found, source.path / CONFIG))
    try:
        return _loaded(source.path, marks)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise _unreadable(source, error) from error


def tokenizer_files(source: Source) -> list[Path]:
    """Files of a tokenizer that lie beside the weights."""
    return [file for name in TOKENIZER_FILES if (file := source.path / name).is_file()]


def require_tokenizer(source: Source) -> None:
    """Check that the tokenizer's own file, where there is one, is whole and this model's.

    Raises:
        InputError: it cannot be read, or has tokens that the model does not know.
    """
    file = source.path / "tokenizer.json"
    if not file.is_file():
        return
    try:
        tokens = _size(file, mark_of(file))
    except Exception as error:  # as above
        raise _unreadable(source, error) from error
    known = int(source.config.get("vocab_size", 0))
    if 0 < known < tokens:
        raise InputError(
            f"model {source.path}: its tokenizer has {tokens} tokens, and the model knows {known}; "
            "copy the tokenizer that belongs to it"
        )


@lru_cache(maxsize=8)
def _size(file: Path, mark: tuple[int, ...]) -> int:
    """Tokens of a file with this mark, without those that users add."""
    del mark
    # transformers takes seconds, which a run that is found does without
    from tokenizers import Tokenizer

    return int(Tokenizer.from_file(str(file)).get_vocab_size(with_added_tokens=False))


def _unreadable(source: Source, error: Exception) -> InputError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError(
        f"model {source.path}: the tokenizer cannot be read ({reason}); copy its files once more"
    )


# a large one takes a second, and a run asks for it six times
@lru_cache(maxsize=1)
def _loaded(folder: Path, marks: tuple[tuple[int, ...], ...]) -> Any:
    """The tokenizer of a folder whose files have these marks."""
    del marks
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def files_digest(source: Source, names: Sequence[str] = TOKENIZER_FILES) -> str:
    """Digest of those of the source's small files that are there; by default the tokenizer's."""
    files = [n for n in names if (source.path / n).is_file()]
    return ";".join(f"{name}={checksum(source.path / name)}" for name in files)


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
    return [_encoded_chat(text, tokenizer, document) for document in documents]


def _encoded_chat(text: TextSource, tokenizer: Any, document: Document) -> list[int]:
    try:
        return list(tokenizer.apply_chat_template(document, tokenize=True, return_dict=False))
    # a template may refuse roles and their order, and fail in any way over what is no message
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{text.section}: the model's chat template does not take a conversation of the text "
            f"({reason[:200]}); remove such conversations, or give plain text"
        ) from error


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


def encode_packed(text: TextSource, tokenizer: Any, documents: Sequence[Document]) -> list[int]:
    """Token ids of the documents one after the other, as they are packed into windows."""
    return [token for ids in encode_documents(text, tokenizer, documents) for token in ids]
