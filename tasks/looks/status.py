"""What is going on: runs of a store, what lies in it, and what MLflow is still to be told."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tasks.engine.messages import Journal, journals
from tasks.engine.store import Store


def in_store(store: Path) -> dict[str, Any]:
    """What a store says of itself; nothing in it changes.

    Returns:
        ``running``: per run that a process works on, its identity, its MLflow run as far as that
        is known, and the messages that wait; ``left``: the same of journals that nobody sends;
        ``steps``: how many results are being made right now; ``entries``: number and bytes of
        finished results by task.
    """
    found = journals(store)
    locks = (".telling", ".lock")
    held = {j.path: any(is_held(j.path.with_suffix(lock)) for lock in locks) for j in found}
    making = [
        lock
        for lock in (store / "locks").glob("*.lock")
        if (store / "staging" / lock.stem).is_dir()
    ]
    return {
        "running": [_described(journal) for journal in found if held[journal.path]],
        "left": [_described(journal) for journal in found if not held[journal.path]],
        "steps": sum(map(is_held, making)),
        "entries": _by_task(store),
    }


def is_held(path: Path) -> bool:
    """Whether a process holds a lock; one that is not there is not made."""
    if not path.is_file():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def _described(journal: Journal) -> dict[str, Any]:
    return {
        "identity": journal.identity,
        "run": journal.fact("run"),
        "messages": journal.count(),
    }


def _by_task(store: Path) -> dict[str, dict[str, int]]:
    entries = Store(store).entries() if store.is_dir() else []
    return {
        task: _summed(entry.size for entry in entries if entry.task == task)
        for task in sorted({entry.task for entry in entries})
    }


def _summed(sizes: Iterable[int]) -> dict[str, int]:
    listed = list(sizes)
    return {"entries": len(listed), "bytes": sum(listed)}
