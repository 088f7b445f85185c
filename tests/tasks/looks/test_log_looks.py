"""Pictures of the same numbers are drawn once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks.engine.store import Entry, Store
from tasks.looks import log_looks as module
from tasks.looks.log_looks import Looked, drawn_once


def looked(key: str) -> Looked:
    value: dict[str, Any] = {
        "linears": {"q_proj": {"weight_error": 0.1}, "o_proj": {"weight_error": 0.2}},
        "weights": {},
        "inputs": {},
    }
    return Looked({}, [Entry(key, "quantize", Path(), value, 0.0)], [], 1)


def test_they_are_found_until_they_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    draw = module.pictures

    def counted(*given: Any) -> dict[str, bytes]:
        calls.append(given)
        return draw(*given)

    monkeypatch.setattr(module, "pictures", counted)
    store = Store(tmp_path / "store")
    first = drawn_once(store, looked("a"))
    assert len(first) > 0 and all(png.startswith(b"\x89PNG") for png in first.values())
    assert drawn_once(Store(store.root), looked("a")) == first
    assert len(calls) == 1
    drawn_once(store, looked("b"))
    assert len(calls) == 2
    # a picture that was damaged is drawn again
    (entry, *_) = store.entries()
    file = entry.folder / sorted(entry.files)[0]
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert drawn_once(Store(store.root), looked("a")) == first
    assert len(calls) == 3
