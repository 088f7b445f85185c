"""The weekly flow, as Prefect runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.tidy import tidy
from tasks.engine import store as module
from tasks.engine.errors import InputError
from tasks.engine.store import DAY_S, Store

pytestmark = pytest.mark.usefixtures("services")


def test_what_is_older_than_some_days_goes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, key = Store(home / "store"), "a" * 64
    with store.lock(key), store.draft(key) as draft:
        entry = store.commit(key, "quantize", draft, {})
    now = module.time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + 31 * DAY_S)
    kept = tidy(str(store.root), 32, return_state=True)
    assert kept.is_completed() and store.get(key) is not None
    removed = tidy(str(store.root), return_state=True)
    assert removed.message == f"removed 1 results, {entry.size / 1e6:.1f} MB, from {store.root}"
    assert store.get(key) is None


def test_days_that_are_none(home: Path) -> None:
    with pytest.raises(InputError, match="days: -1 is negative; give 0 or more"):
        tidy(str(home / "store"), -1)
