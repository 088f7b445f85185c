"""Results that seem to be in the store, read by threads while the flow goes through them."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

from tasks.engine.store import Entry, Store

Item = TypeVar("Item")

THREADS = 3


class Found(Generic[Item]):
    """What was found of what a pass asks for, in its order; to be entered and left."""

    def __init__(self, store: Store) -> None:
        """Have threads read what is in a store."""
        self._store = store
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="blockquant-found")
        self._looked: deque[tuple[Item, Future[Entry | None]]] = deque()

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, *failure: object) -> None:
        """Read no more."""
        self._threads.shutdown(cancel_futures=True)

    def take(self, asked: Item, key: str) -> bool:
        """Have a result read, whose task will ask whether it is whole; False where none is."""
        if not self._store.seems_whole(key):
            return False
        self._looked.append((asked, self._threads.submit(self._store.get, key)))
        return True

    def damaged(self) -> list[Item]:
        """Those that are not whole, in their order, of all that were taken since the last call."""
        looked, self._looked = self._looked, deque()
        return [asked for asked, entry in looked if entry.result() is None]

    def passed(self, asked: Item) -> None:
        """It is a result's turn: its task sees to it, and nobody else."""
        if self._looked and self._looked[0][0] is asked:
            self._looked.popleft()
