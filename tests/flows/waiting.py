"""Work that waits until it is interrupted, in a process that ends with the one that started it."""

from __future__ import annotations

import os
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from flows.child_pool import end_with, interruptible


def wait(starter: Connection, notes: Path) -> None:
    """Note who waits, and that it was interrupted."""
    end_with(starter)
    try:
        with interruptible.wait():
            (notes / "begun.part").write_text(str(os.getpid()))
            (notes / "begun.part").rename(notes / "begun")
            time.sleep(60)
    except KeyboardInterrupt:
        (notes / "interrupted").touch()


def start(notes: Path) -> None:
    """Start a process that waits, and wait too."""
    context = get_context("spawn")
    theirs, _ours = context.Pipe(duplex=False)
    context.Process(target=wait, args=(theirs, notes)).start()
    time.sleep(60)
