"""Big values that can always be made again: kept behind their lineage key while they fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Value = TypeVar("Value")


class Memo:
    """The newest value of each kind, in this process only.

    Statistics, codes and hidden states are too big to be results: a task that needs one asks for
    it by key and says how to compute it.
    """

    def __init__(self) -> None:
        """Keep nothing yet."""
        self._values: dict[str, tuple[str, Any]] = {}

    def get(self, kind: str, key: str, compute: Callable[[], Value]) -> Value:
        """Return the value of ``key``, computed if it is not here, in the room of the last."""
        if not self.has(kind, key):
            # an old value beside the new one would be twice the memory
            self.forget(kind)
            self.put(kind, key, compute())
        value: Value = self._values[kind][1]
        return value

    def put(self, kind: str, key: str, value: object) -> None:
        """Keep ``value``, and of its kind nothing else."""
        self._values[kind] = key, value

    def has(self, kind: str, key: str) -> bool:
        """Say whether the value of ``key`` is here."""
        return kind in self._values and self._values[kind][0] == key

    def forget(self, *kinds: str) -> None:
        """Drop the values of some kinds."""
        for kind in kinds:
            self._values.pop(kind, None)

    def clear(self) -> None:
        """Forget everything."""
        self._values.clear()
