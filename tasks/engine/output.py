"""An output folder and what lies beside it: what is made ready, what waits, what was replaced."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from tasks.engine.publication import REPORT

# of renameat2(2)
_HERE, _EXCHANGE = -100, 2
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def staging_folder(output: Path) -> Path:
    """The folder in which an output is made ready, beside it."""
    return output.with_name(f".{output.name}.blockquant-new")


def replaced_folder(output: Path) -> Path:
    """Where an old output lies while the new one takes its place in two renames."""
    return output.with_name(f".{output.name}.blockquant-old")


def waiting_folder(output: Path, content: str) -> Path:
    """Where a checkpoint of this content waits until the gate lets it take the output's place."""
    return output.with_name(f"{output.name}.{content[:8]}")


def waiting_beside(output: Path) -> list[Path]:
    """Checkpoints that wait for the gate beside an output, or were refused by it."""
    named = re.compile(re.escape(output.name) + r"\.[0-9a-f]{8}")
    if not output.parent.is_dir():
        return []
    found = (path for path in output.parent.iterdir() if named.fullmatch(path.name))
    return sorted(path for path in found if (path / REPORT).is_file())


def content_of(identity: str, report: str) -> str:
    """Digest of a checkpoint that the work ``identity`` made, from its report as it is written."""
    return hashlib.sha256(f"{identity} {report}".encode()).hexdigest()[:32]


def holds(folder: Path, identity: str, content: str) -> bool:
    """Say whether a folder is the checkpoint of this content."""
    try:
        return content_of(identity, (folder / REPORT).read_text(encoding="utf-8")) == content
    except (OSError, ValueError):
        return False


@contextmanager
def held(output: Path) -> Iterator[None]:
    """Be the only process that writes at ``output`` or beside it, whatever store it works with."""
    lock = output.with_name(f".{output.name}.blockquant-own")
    with FileLock(lock):
        try:
            yield
        finally:
            # whoever waits for a lock whose file is gone takes a new one: filelock sees to it
            lock.unlink(missing_ok=True)


def restore(output: Path) -> None:
    """Put back an old output that a process, killed between two renames, left aside."""
    replaced = replaced_folder(output)
    if replaced.is_dir() and not output.exists():
        os.rename(replaced, output)


def replace_folder(new: Path, output: Path) -> None:
    """Let ``new`` take the place of ``output``, which is gone then; the caller holds it.

    By one rename where the system can exchange two folders, else by two, between which the output
    is not there: ``restore`` puts it back if a kill comes in between.
    """
    replaced = replaced_folder(output)
    shutil.rmtree(replaced, ignore_errors=True)
    if not output.exists():
        os.rename(new, output)
    elif exchange(new, output):
        shutil.rmtree(new, ignore_errors=True)
    else:
        os.rename(output, replaced)
        os.rename(new, output)
        shutil.rmtree(replaced, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two folders of one disk at once; False where the system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error in _CANNOT_EXCHANGE:
        return False
    raise OSError(error, os.strerror(error), str(one), None, str(other))


def take_place(waiting: Path, output: Path, identity: str, content: str) -> bool:
    """Let a checkpoint that waited take its output's place; said again, it stays there.

    Returns:
        Whether it lies at ``output`` now: not where neither folder holds it, on another machine.
    """
    if not output.parent.is_dir():
        return False
    with held(output):
        restore(output)
        if not holds(output, identity, content):
            if not holds(waiting, identity, content):
                return False
            replace_folder(waiting, output)
        # killed before, it may hold what was replaced
        shutil.rmtree(waiting, ignore_errors=True)
    return True
