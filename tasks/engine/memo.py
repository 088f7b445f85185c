"""Big values that can always be made again: kept behind their lineage key while they fit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

Value = TypeVar("Value")


class Memo:
    """The newest ``keep`` values of each kind, in this process only.

    Statistics, codes and hidden states are too big to be results: a task that needs one asks for
    it by key and says how to compute it. A copy sent to another process starts empty.
    """

    def __init__(self, keep: int = 1) -> None:
        """Keep ``keep`` values of each kind."""
        self._keep = keep
        self._values: dict[str, OrderedDict[str, Any]] = {}

    def __reduce__(self) -> tuple[type[Memo], tuple[int]]:
        """Travel without the values."""
        return Memo, (self._keep,)

    def get(self, kind: str, key: str, compute: Callable[[], Value]) -> Value:
        """Return the value of ``key``, computed if it is not here, in the room of the oldest."""
        values = self._values.setdefault(kind, OrderedDict())
        if key not in values:
            # an old value beside the new one would be twice the memory
            while len(values) >= self._keep:
                values.popitem(last=False)
            self.put(kind, key, compute())
        values.move_to_end(key)
        value: Value = values[key]
        return value

    def put(self, kind: str, key: str, value: object) -> None:
        """Keep ``value``, dropping the oldest of its kind."""
        values = self._values.setdefault(kind, OrderedDict())
        values[key] = value
        values.move_to_end(key)
        while len(values) > self._keep:
            values.popitem(last=False)

    def has(self, kind: str, key: str) -> bool:
        """Say whether the value of ``key`` is here."""
        return key in self._values.get(kind, {})

    def forget(self, *kinds: str) -> None:
        """Drop the values of some kinds."""
        for kind in kinds:
            self._values.pop(kind, None)

    def clear(self) -> None:
        """Forget everything."""
        self._values.clear()
