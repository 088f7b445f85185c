"""GPUs that servers of ours run on, one server at a time: each takes the memory that it finds."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tasks.engine.errors import RunError

log = logging.getLogger("blockquant")

# of this user on this machine, whatever the home and the store
LOCKS = Path(tempfile.gettempdir()) / f"blockquant-gpus-{os.getuid()}"
# of SGLang's arguments, those that say which GPUs it takes
_FIRST = ("--base-gpu-id",)
_COPIES = ("--data-parallel-size", "--dp-size")
_STAGES = ("--pipeline-parallel-size", "--pp-size")
_COPIES_WITHIN = "--enable-dp-attention"


def gpus_of(parallel: int, arguments: Sequence[str] = ()) -> list[str]:
    """Names of the GPUs that a server takes: the first ones that this process may see.

    Args:
        parallel: over how many each weight is split.
        arguments: those of SGLang's own, among which may be which one is the first, and how many
            stages and copies of the model there are.
    """
    copies = 1 if _COPIES_WITHIN in arguments else _number(arguments, _COPIES, 1)
    count = parallel * copies * _number(arguments, _STAGES, 1)
    first = _number(arguments, _FIRST, 0)
    seen = [n.strip() for n in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if n.strip()]
    return [seen[n] if n < len(seen) else str(n) for n in range(first, first + count)]


def _number(arguments: Sequence[str], names: Sequence[str], default: int) -> int:
    """The number that follows the last of some names, after a space or ``=``."""
    found = default
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        name, _, value = argument.partition("=")
        if name in names and (value or following).isdigit():
            found = int(value or following)
    return found


class BusyGpuError(RunError):
    """Another process serves on a GPU, and did so for as long as could be waited."""


@contextmanager
def alone_on(gpus: Sequence[str], limit_s: float) -> Iterator[None]:
    """Be the only one of this user who serves on some GPUs; another one is waited for.

    Raises:
        BusyGpuError: another process still serves on one of them.
        RunError: the locks are not this user's.
    """
    LOCKS.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_own(LOCKS)
    deadline = time.monotonic() + limit_s
    with ExitStack() as held:
        # in one order, so that no two wait for each other
        for gpu in sorted(set(gpus)):
            held.enter_context(_held(gpu, deadline, limit_s))
        yield


def _require_own(folder: Path) -> None:
    """Refuse a folder that another user could have made, or can write to: its name is known."""
    found = folder.lstat()
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if not own or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RunError(
            f"{folder}: is no folder that only this user writes to; remove it, it holds locks only"
        )


@contextmanager
def _held(gpu: str, deadline: float, limit_s: float) -> Iterator[None]:
    name = re.sub(r"[^A-Za-z0-9-]", "-", gpu)
    lock, holder = FileLock(LOCKS / f"{name}.lock"), LOCKS / f"{name}.holder"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("GPU %s: waiting for process %s, which serves on it", gpu, _said(holder))
        try:
            lock.acquire(timeout=max(0.0, deadline - time.monotonic()))
        except Timeout as error:
            raise BusyGpuError(
                f"GPU {gpu}: process {_said(holder)} still serves on it after {limit_s:g} s "
                "(serving.start_timeout); end it, or wait longer"
            ) from error
    try:
        holder.write_text(str(os.getpid()))
        yield
    finally:
        lock.release()


def _said(holder: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return holder.read_text().strip() or "of another run"
    return "of another run"
