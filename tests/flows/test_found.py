"""What is found is read by threads; what is damaged of it is told before more is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flows.found import Found
from tasks.engine.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    for key in ("aa", "bb", "cc"):
        with store.draft(key) as draft:
            draft.save_tensors("numbers.safetensors", {"numbers": torch.arange(4)})
            store.commit(key, "step", draft, {})
    # nothing that was read before
    return Store(store.root)


@pytest.fixture
def found(store: Store) -> Iterator[Found[str]]:
    with Found[str](store) as found:
        yield found


def flip(store: Store, key: str) -> None:
    path = store.folder(key) / "numbers.safetensors"
    data = path.read_bytes()
    path.write_bytes(bytes([*data[:-1], data[-1] ^ 1]))


def test_what_is_there_is_taken(store: Store, found: Found[str]) -> None:
    assert [found.take(key, key) for key in ("aa", "missing", "bb")] == [True, False, True]
    assert found.damaged() == []


def test_what_is_damaged_is_told_in_its_order_and_once(store: Store, found: Found[str]) -> None:
    for key in ("aa", "cc"):
        flip(store, key)
    assert all(found.take(key.upper(), key) for key in ("cc", "bb", "aa"))
    assert found.damaged() == ["CC", "AA"]
    assert found.damaged() == []


def test_what_had_its_turn_is_its_task_s(store: Store, found: Found[str]) -> None:
    for key in ("aa", "cc"):
        flip(store, key)
    assert all(found.take(key, key) for key in ("aa", "bb", "cc"))
    found.passed("aa")
    # one that is not the next had its turn while it was not there
    found.passed("cc")
    assert found.damaged() == ["cc"]
    found.passed("bb")


def test_the_files_were_read_when_a_task_asks(
    store: Store, found: Found[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found.take("aa", "aa") and found.damaged() == []
    monkeypatch.setattr("tasks.engine.store.checksum", lambda _: 1 / 0)
    assert store.get("aa") is not None
