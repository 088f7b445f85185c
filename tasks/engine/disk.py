"""A disk without room, said in one line."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tasks.engine.errors import RunError

_FULL = (errno.ENOSPC, errno.EDQUOT)
# safetensors, written in Rust, and SQLite say it in words
_WORDS = ("no space left on device", "disk quota exceeded", "os error 28", "disk is full")


class DiskFullError(RunError):
    """There is no room left on a disk; trying again makes none."""


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Say that the disk of ``folder`` is full where what is written in here finds it so.

    Raises:
        DiskFullError: in place of the error that says so.
    """
    try:
        yield
    except (OSError, SafetensorError, sqlite3.Error) as error:
        if not is_full(error):
            raise
        raise no_room(folder) from error


def no_room(folder: Path | str) -> DiskFullError:
    """The error that says that the disk of ``folder`` is full."""
    return DiskFullError(
        f"{folder}: no room is left on its disk; make some, and the same command goes on"
    )


def is_full(error: BaseException) -> bool:
    """Say whether an error is a full disk's, or that of a quota that is used up."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return any(words in str(error).lower() for words in _WORDS)
