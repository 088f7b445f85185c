"""Results that seem to be in the store, read by threads while the flow goes through them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

from tasks.engine.store import Entry, Store

Asked = TypeVar("Asked")

THREADS = 3


class Found(Generic[Asked]):
    """What was found of what a pass asks for, in its order."""

    def __init__(self, store: Store, threads: ThreadPoolExecutor) -> None:
        """Have threads read what is in a store."""
        self._store = store
        self._threads = threads
        self._looked: list[tuple[Asked, Future[Entry | None]]] = []

    def take(self, asked: Asked, key: str) -> bool:
        """Have a result read, whose task will ask whether it is whole; False where none is."""
        if not self._store.seems_whole(key):
            return False
        self._looked.append((asked, self._threads.submit(self._store.get, key)))
        return True

    def damaged(self) -> list[Asked]:
        """Those that are not whole, in their order, of all that were taken since the last call."""
        looked, self._looked = self._looked, []
        return [asked for asked, entry in looked if entry.result() is None]


@contextmanager
def looking(store: Store) -> Iterator[Found[Asked]]:
    """Look at results of a store; at the end no more are read."""
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="blockquant-found")
    try:
        yield Found(store, threads)
    finally:
        threads.shutdown(cancel_futures=True)
