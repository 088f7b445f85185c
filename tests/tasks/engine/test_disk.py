"""A full disk is told from other faults, and named."""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path

import pytest
from safetensors import SafetensorError

from tasks.engine.disk import DiskFullError, writing_to

FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error: I/O error: No space left on device (os error 28)"),
    sqlite3.OperationalError("database or disk is full"),
]
OTHERS = [
    OSError(errno.EIO, "Input/output error"),
    OSError("the copy differs from the export; is the disk full?"),
    sqlite3.OperationalError("database is locked"),
    ValueError("disk is full"),
]


@pytest.mark.parametrize("error", FULL, ids=str)
def test_a_full_disk_is_one_line_that_names_the_folder(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(DiskFullError) as raised, writing_to(tmp_path):
        raise error
    assert str(raised.value) == (
        f"{tmp_path}: no room is left on its disk; make some, and the same command goes on"
    )
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_faults_stay_as_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as raised, writing_to(tmp_path):
        raise error
    assert raised.value is error
