"""What is big is kept once, the newest of its kind, in one process."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest

from tasks.engine.memo import Memo


class Value:
    """Something big."""


def counting() -> tuple[Callable[[], int], list[int]]:
    calls: list[int] = []

    def compute() -> int:
        calls.append(1)
        return len(calls)

    return compute, calls


def test_a_value_is_computed_once() -> None:
    memo, (compute, calls) = Memo(), counting()
    assert [memo.get("codes", "a", compute) for _ in range(3)] == [1, 1, 1]
    assert len(calls) == 1
    assert memo.has("codes", "a")
    assert not memo.has("codes", "b")
    assert not memo.has("stream", "a")


def test_the_newest_of_each_kind_is_kept() -> None:
    memo, (compute, calls) = Memo(), counting()
    memo.get("codes", "a", compute)
    memo.get("stream", "a", compute)
    memo.get("codes", "b", compute)
    assert [memo.has(*place) for place in [("codes", "a"), ("codes", "b"), ("stream", "a")]] == [
        *(False, True, True)
    ]
    assert memo.get("codes", "a", compute) == 4
    assert len(calls) == 4


def test_put_replaces() -> None:
    memo = Memo()
    memo.put("codes", "a", 1)
    memo.put("codes", "a", 2)
    assert memo.get("codes", "a", lambda: 3) == 2


def test_none_is_a_value() -> None:
    memo, (compute, calls) = Memo(), counting()
    memo.put("codes", "a", None)
    assert memo.get("codes", "a", compute) is None
    assert calls == []


def test_room_is_made_before_a_value_is_computed() -> None:
    memo = Memo()
    old = weakref.ref(memo.get("codes", "a", Value))

    def compute() -> Value:
        gc.collect()
        assert old() is None
        return Value()

    memo.get("codes", "b", compute)
    assert memo.has("codes", "b")


def test_a_failed_computation_leaves_nothing_half_done() -> None:
    memo = Memo()
    memo.put("codes", "a", 1)

    def fail() -> int:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        memo.get("codes", "b", fail)
    assert not memo.has("codes", "b")
    assert memo.get("codes", "a", lambda: 2) == 2


def test_kinds_are_forgotten() -> None:
    memo = Memo()
    for kind in ("codes", "statistics", "stream"):
        memo.put(kind, "a", kind)
    memo.forget("codes", "statistics", "never there")
    held = [kind for kind in ("codes", "statistics", "stream") if memo.has(kind, "a")]
    assert held == ["stream"]


def test_values_may_need_others_of_their_kind() -> None:
    memo = Memo()
    found = memo.get("stream", "b", lambda: memo.get("stream", "a", lambda: 1) + 1)
    assert found == 2
    assert memo.has("stream", "b")


def test_a_dropped_value_is_free() -> None:
    memo = Memo()
    kept = [memo.get("codes", key, Value) for key in "ab"]
    first, second = weakref.ref(kept[0]), weakref.ref(kept[1])
    kept.clear()
    gc.collect()
    assert first() is None
    assert second() is not None
    memo.clear()
    gc.collect()
    assert second() is None
