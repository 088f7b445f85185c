"""Text in its forms becomes token ids and windows as the conventions say."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from tasks.engine.errors import InputError
from tasks.engine.source import Source, open_source
from tasks.engine.text import (
    Cut,
    TextSource,
    check_text,
    consecutive_windows,
    encode_documents,
    encode_joined,
    files_digest,
    load_tokenizer,
    packed_windows,
    random_crops,
    random_document_crops,
    read_documents,
    text_digest,
    truncated_windows,
)
from tests.models import DEMO_MODEL

DOCUMENTS = [
    "The river rose in the night.\nIn the morning it had gone back.",
    "Nobody had seen the captain since winter.",
    "A letter lay on the garden table, and nobody read it.",
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{{ eos_token }}"
)
ANY = TextSource("calib", "text", "words.txt")


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source(DEMO_MODEL)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture
def model_with(tmp_path: Path) -> Callable[..., Source]:
    """The demo model with another tokenizer configuration."""

    def make(**changes: Any) -> Source:
        folder = tmp_path / "model"
        folder.mkdir()
        for file in DEMO_MODEL.iterdir():
            if file.name != "tokenizer_config.json":
                (folder / file.name).symlink_to(file)
        described = json.loads((DEMO_MODEL / "tokenizer_config.json").read_text()) | changes
        kept = {key: value for key, value in described.items() if value is not None}
        (folder / "tokenizer_config.json").write_text(json.dumps(kept))
        return open_source(folder)

    return make


def plain(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def save_rows(folder: Path, kind: str, rows: list[dict[str, Any]]) -> TextSource:
    """Save rows as a kind of file and say how a recipe names it."""
    data = Dataset.from_list(rows)
    path = folder / f"rows.{kind}"
    name = kind
    if kind == "parquet":
        data.to_parquet(str(path))
    elif kind == "folder":
        data.save_to_disk(str(path))
        name = "dataset"
    elif kind == "splits":
        other = Dataset.from_list([{"text": "of the other split"}])
        DatasetDict({"train": other, "test": data}).save_to_disk(str(path))
        return TextSource("calib", "dataset", str(path), "test")
    elif kind == "jsonl.gz":
        with gzip.open(path, "wt") as file:
            file.write("\n".join(json.dumps(row) for row in rows))
        name = "pileval"
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    return TextSource("calib", name, str(path))


# reading


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder", "splits", "jsonl.gz"])
def test_rows_of_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    text = save_rows(tmp_path, kind, [{"text": document} for document in DOCUMENTS])
    assert not text.remote
    assert read_documents(text) == DOCUMENTS


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


def test_files_digest_sees_every_file(source: Source, model_with: Callable[..., Source]) -> None:
    assert files_digest(source) != files_digest(model_with(chat_template=TEMPLATE))


# encoding


def test_one_bos_before_each_document(source: Source, tokenizer: Any) -> None:
    encoded = encode_documents(ANY, load_tokenizer(source), DOCUMENTS)
    assert encoded == [[0, *plain(tokenizer, document)] for document in DOCUMENTS]


def test_one_bos_before_joined_documents(source: Source, tokenizer: Any) -> None:
    ids = encode_joined(ANY, load_tokenizer(source), DOCUMENTS)
    assert ids == [0, *plain(tokenizer, "\n\n".join(DOCUMENTS))]
    assert ids.count(0) == 1


def test_tokenizer_without_bos(model_with: Callable[..., Source], tokenizer: Any) -> None:
    loaded = load_tokenizer(model_with(bos_token=None))
    assert loaded.bos_token_id is None
    assert encode_joined(ANY, loaded, DOCUMENTS) == plain(tokenizer, "\n\n".join(DOCUMENTS))
    assert encode_documents(ANY, loaded, DOCUMENTS[:1]) == [plain(tokenizer, DOCUMENTS[0])]


def test_messages_go_through_the_chat_template(
    tmp_path: Path, model_with: Callable[..., Source], tokenizer: Any
) -> None:
    chats = [
        [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}],
        [{"role": "user", "content": "When?"}],
    ]
    text = save_rows(tmp_path, "jsonl", [{"messages": chat} for chat in chats])
    loaded = load_tokenizer(model_with(chat_template=TEMPLATE))
    encoded = encode_documents(text, loaded, read_documents(text))
    # the template writes BOS and end of text itself: no second BOS
    written = ["[user] Where?\n[assistant] Here.\n", "[user] When?\n"]
    assert encoded == [[0, *plain(tokenizer, chat), 1] for chat in written]
    assert encode_joined(text, loaded, read_documents(text)) == encoded[0] + encoded[1]


def test_text_wins_over_messages(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Where?"}], "text": "Here."}]
    assert read_documents(save_rows(tmp_path, "jsonl", rows)) == ["Here."]


def test_messages_without_a_template(tmp_path: Path, source: Source) -> None:
    text = save_rows(tmp_path, "jsonl", [{"messages": [{"role": "user", "content": "Where?"}]}])
    with pytest.raises(InputError, match=r"calib: .* no chat template"):
        encode_documents(text, load_tokenizer(source), read_documents(text))


# cutting; the numbers stand for tokens

LONG = [list(range(100 * n, 100 * n + length)) for n, length in enumerate([9, 3, 25, 10, 40, 7])]


def test_consecutive_windows() -> None:
    ids = list(range(35))
    windows = consecutive_windows(ANY, ids, 10, None)
    assert windows.dtype is torch.int64
    assert windows.tolist() == [ids[0:10], ids[10:20], ids[20:30]]
    assert consecutive_windows(ANY, ids, 10, 2).tolist() == [ids[0:10], ids[10:20]]
    assert consecutive_windows(ANY, ids, 35, 7).tolist() == [ids]


def test_packed_windows_take_all_or_a_seeded_choice_in_order() -> None:
    ids = [token for document in LONG for token in document]
    every = [ids[start : start + 8] for start in range(0, len(ids) - 7, 8)]
    assert packed_windows(ANY, LONG, 8, 100, seed=0).tolist() == every
    chosen = packed_windows(ANY, LONG, 8, 5, seed=0).tolist()
    assert len(chosen) == 5
    places = [every.index(window) for window in chosen]
    assert places == sorted(set(places))
    assert packed_windows(ANY, LONG, 8, 5, seed=0).tolist() == chosen
    assert packed_windows(ANY, LONG, 8, 5, seed=1).tolist() != chosen


def test_truncated_windows_shuffle_cut_and_drop() -> None:
    windows = truncated_windows(ANY, LONG, 10, 100, seed=3).tolist()
    assert sorted(windows) == sorted(ids[:10] for ids in LONG if len(ids) >= 10)
    order = list(range(len(LONG)))
    random.Random(3).shuffle(order)
    assert windows == [LONG[n][:10] for n in order if len(LONG[n]) >= 10]
    assert truncated_windows(ANY, LONG, 10, 2, seed=3).tolist() == windows[:2]
    orders = {str(truncated_windows(ANY, LONG, 10, 100, seed=s).tolist()) for s in range(10)}
    assert len(orders) > 1


def test_random_crops_of_one_stretch() -> None:
    ids = list(range(30))
    windows = random_crops(ANY, ids, 10, 200, seed=5).tolist()
    starts = [window[0] for window in windows]
    assert windows == [list(range(start, start + 10)) for start in starts]
    # the last start too: all ids are seen
    assert (min(starts), max(starts)) == (0, 20)
    assert random_crops(ANY, ids, 10, 200, seed=5).tolist() == windows
    assert random_crops(ANY, ids, 10, 200, seed=6).tolist() != windows
    assert random_crops(ANY, ids, 30, 2, seed=0).tolist() == [ids, ids]


def test_random_document_crops_stay_in_long_documents() -> None:
    windows = random_document_crops(ANY, LONG, 10, 300, seed=7).tolist()
    documents = {window[0] // 100 for window in windows}
    assert documents == {2, 3, 4}
    assert all(window == list(range(window[0], window[0] + 10)) for window in windows)
    assert all(window[-1] <= LONG[window[0] // 100][-1] for window in windows)
    assert random_document_crops(ANY, LONG, 10, 300, seed=7).tolist() == windows
    assert random_document_crops(ANY, LONG, 10, 300, seed=8).tolist() != windows


@pytest.mark.parametrize(
    "cut",
    [
        lambda: consecutive_windows(ANY, [1, 2, 3], 4, None),
        lambda: packed_windows(ANY, [[1], [2, 3]], 4, 1, 0),
        lambda: truncated_windows(ANY, [[1], [1, 2, 3]], 4, 1, 0),
        lambda: random_crops(ANY, [1, 2, 3], 4, 1, 0),
        lambda: random_document_crops(ANY, [[1], [1, 2, 3]], 4, 1, 0),
    ],
)
def test_too_short_for_a_window(cut: Callable[[], object]) -> None:
    with pytest.raises(
        InputError, match=r"calib.path: words.txt gives 3 tokens, fewer than one window of 4"
    ):
        cut()


# checking before any work


@pytest.mark.parametrize("cut", list(Cut))
def test_check_knows_what_a_window_is_cut_from(
    tmp_path: Path, source: Source, tokenizer: Any, cut: Cut
) -> None:
    """The longest window that passes is the longest that can be cut."""
    text = save_rows(tmp_path, "jsonl", [{"text": document} for document in DOCUMENTS])
    encoded = [[0, *plain(tokenizer, document)] for document in DOCUMENTS]
    longest = {
        Cut.JOINED: len(plain(tokenizer, "\n\n".join(DOCUMENTS))) + 1,
        Cut.PACKED: sum(len(ids) for ids in encoded),
        Cut.ONE: max(len(ids) for ids in encoded),
    }[cut]
    assert len(check_text(text, source, longest, cut)) == longest
    with pytest.raises(InputError, match=f"gives {longest} tokens, fewer than one window"):
        check_text(text, source, longest + 1, cut)


def test_check_reads_no_more_than_it_needs(source: Source, words: Path) -> None:
    ids = check_text(TextSource("eval", "text", str(words)), source, 16)
    assert 16 <= len(ids) <= 16 * 64


def test_words_of_the_command_line(tmp_path: Path, source: Source) -> None:
    path = tmp_path / "short.txt"
    path.write_text("short")
    given = TextSource("--text", "text", str(path), evaluation=True)
    with pytest.raises(InputError) as raised:
        check_text(given, source, 2048)
    assert str(raised.value).startswith(f"--text: {path} gives ")
    assert str(raised.value).endswith("give more text or set --window")


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "jsonl.gz"])
def test_reading_a_file_leaves_no_copy(
    tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    import datasets

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
