"""Text is read in all its forms, to the letter, and nothing of it is left behind."""

from __future__ import annotations

import errno
import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict, DatasetInfo, SplitDict, SplitInfo
from datasets.arrow_writer import ArrowWriter

from tasks.engine.disk import DiskFullError
from tasks.engine.errors import InputError
from tasks.engine.text import TextSource, read_documents, text_digest
from tests.models import make_text
from tests.tasks.engine.texts import DOCUMENTS, save_rows


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder", "splits", "jsonl.gz"])
def test_rows_of_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    text = save_rows(tmp_path, kind, [{"text": document} for document in DOCUMENTS])
    assert not text.remote
    assert read_documents(text) == DOCUMENTS


@pytest.mark.parametrize(
    ("name", "evaluation", "split", "read"),
    [
        ("wikitext2", False, None, "train"),
        ("wikitext2", True, None, "test"),
        ("pileval", True, None, "validation"),
        ("dataset", True, None, "test"),
        ("dataset", True, "validation", "validation"),
    ],
)
def test_a_saved_data_set_is_read_by_the_split_of_the_hub_s(
    tmp_path: Path, name: str, evaluation: bool, split: str | None, read: str
) -> None:
    # in the order of the hub's copy of WikiText
    parts = {part: Dataset.from_dict({"text": [part]}) for part in ("test", "train", "validation")}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    section = "eval" if evaluation else "calib"
    text = TextSource(section, name, str(tmp_path / "saved"), split, evaluation=evaluation)
    assert read_documents(text) == [read]
    other = replace(text, split="test" if read != "test" else "train")
    assert text_digest(other) != text_digest(text) == text_digest(replace(text, split=read))


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    one = {"train": Dataset.from_dict({"text": ["one"]})}
    DatasetDict(one).save_to_disk(tmp_path / "one")
    text = TextSource("eval", "dataset", str(tmp_path / "one"), evaluation=True)
    # there is no other
    assert read_documents(text) == ["one"]
    DatasetDict(one | {"valid": one["train"]}).save_to_disk(tmp_path / "two")
    for given in (replace(text, path=str(tmp_path / "two")), replace(text, split="dev")):
        with pytest.raises(InputError, match=r"has no split '.*', but train.* set eval\.split"):
            text_digest(given)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TextSource:
    """A data set of a hub that was fetched before, and no hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    # only what HF_HUB_OFFLINE sets
    monkeypatch.delenv("HF_DATASETS_OFFLINE")
    rows = Dataset.from_dict({"text": DOCUMENTS})
    place = tmp_path / "acme___words" / "default" / "0.0.0" / "0123abcd"
    place.mkdir(parents=True)
    with ArrowWriter(path=str(place / "words-train.arrow"), features=rows.features) as writer:
        writer.write_table(rows.data.table)
        count, size = writer.finalize()
    split = SplitInfo("train", size, count, dataset_name="words")
    known = {"builder_name": "parquet", "dataset_name": "words", "config_name": "default"}
    DatasetInfo(
        **known, features=rows.features, version="0.0.0", splits=SplitDict({"train": split})
    ).write_to_directory(str(place))
    return TextSource("calib", "dataset", "acme/words")


def test_without_a_hub_what_was_fetched_is_read(cached: TextSource) -> None:
    assert text_digest(cached) == text_digest(cached)
    assert text_digest(cached).startswith("acme/words@")
    assert read_documents(cached) == DOCUMENTS


def test_a_split_that_a_hub_s_data_set_does_not_have(cached: TextSource) -> None:
    for read in (text_digest, read_documents):
        with pytest.raises(InputError, match=r"calib\.split: .*acme/words: Unknown split .tst."):
            read(replace(cached, split="tst"))


def test_a_hub_that_is_not_asked_and_nothing_fetched(cached: TextSource) -> None:
    with pytest.raises(InputError, match=r"acme/others .*cannot be reached .*local file"):
        text_digest(replace(cached, path="acme/others"))


@pytest.mark.parametrize("remote", [True, False], ids=["of a hub", "here"])
def test_a_full_disk_is_no_bad_input(
    cached: TextSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        full = OSError(errno.ENOSPC, "No space left on device")
        raise datasets.exceptions.DatasetGenerationError("An error occurred") from full

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    here = make_text(tmp_path / "words.txt", words=10)
    asked = cached if remote else TextSource("calib", "text", str(here))
    said = re.escape(f"{tmp_path if remote else tempfile.gettempdir()}: no room is left")
    with pytest.raises(DiskFullError, match=said):
        read_documents(asked)


def test_the_name_decides_before_the_ending(tmp_path: Path) -> None:
    path = tmp_path / "rows.data"
    path.write_text("\n".join(json.dumps({"text": document}) for document in DOCUMENTS))
    assert read_documents(TextSource("calib", "jsonl", str(path))) == DOCUMENTS


@pytest.mark.parametrize("text", ["\n\n one \n\n\n two\n", "no end of line", "a\n", "é ü 中文\nx"])
def test_a_plain_file_is_one_document_to_the_letter(tmp_path: Path, text: str) -> None:
    path = tmp_path / "some.txt"
    path.write_bytes(text.encode())
    assert read_documents(TextSource("eval", "text", str(path))) == [text]


def test_large_plain_file_is_one_document(tmp_path: Path) -> None:
    """Larger than what the loader reads at once."""
    path = tmp_path / "large.txt"
    path.write_text("0123456789abcde\n" * (1 << 20))
    (document,) = read_documents(TextSource("eval", "text", str(path)))
    assert document == path.read_text()


@pytest.mark.shared
def test_wikitext_as_rows_and_as_a_file_is_one_string(shared: Path, tmp_path: Path) -> None:
    """The protocol's string: every row, blank ones too, joined by blank lines."""
    path = shared / "text" / "wikitext-2-raw-test.txt"
    head = path.read_text()[:20000].rsplit("\n\n", 1)[0]
    rows = [{"text": row} for row in head.split("\n\n")]
    text = save_rows(tmp_path, "parquet", rows)
    documents = read_documents(text, blank=True)
    assert "\n\n".join(str(document) for document in documents) == head


def test_blank_rows(tmp_path: Path) -> None:
    rows = [{"text": ""}, {"text": " = Title = \n"}, {"text": ""}, {"text": None}, {"text": "End."}]
    text = save_rows(tmp_path, "parquet", rows)
    assert read_documents(text) == [" = Title = \n", "End."]
    assert read_documents(text, blank=True) == ["", " = Title = \n", "", "End."]


def test_another_column(tmp_path: Path) -> None:
    rows = [{"text": "not this", "content": document} for document in DOCUMENTS]
    path = save_rows(tmp_path, "jsonl", rows).path
    assert read_documents(TextSource("calib", "jsonl", path, None, "content")) == DOCUMENTS


def test_digest_is_of_the_bytes(tmp_path: Path) -> None:
    texts = []
    for name, content in (("a.txt", "one"), ("b.txt", "one"), ("c.txt", "two")):
        (tmp_path / name).write_text(content)
        texts.append(text_digest(TextSource("calib", "text", str(tmp_path / name))))
    assert texts[0] == texts[1] != texts[2]


def test_text_wins_over_messages(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Where?"}], "text": "Here."}]
    assert read_documents(save_rows(tmp_path, "jsonl", rows)) == ["Here."]


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "jsonl.gz"])
def test_reading_a_file_leaves_no_copy(
    tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    rows = [{"text": document} for document in DOCUMENTS]
    text = (
        TextSource("eval", "text", str(words))
        if kind == "text"
        else save_rows(tmp_path, kind, rows)
    )
    assert read_documents(text)
    assert not cache.exists()
    assert list((tmp_path / "temporary").iterdir()) == []
