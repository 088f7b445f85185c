"""Token ids become windows as the conventions say, and what is too short is told before work."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.engine.cutting import (
    Cut,
    check_text,
    consecutive_windows,
    packed_windows,
    random_crops,
    random_document_crops,
    truncated_windows,
)
from tasks.engine.errors import InputError
from tasks.engine.source import Source
from tasks.engine.text import TextSource
from tests.tasks.engine.texts import ANY, DOCUMENTS, plain, save_rows

# the numbers stand for tokens
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
