"""Processes for the children of a sweep: they end soon after the process that started them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection

from prefect.task_runners import ProcessPoolTaskRunner

# for a child that is interrupted to tell of it
END_S = 5.0


@contextmanager
def child_pool(workers: int) -> Iterator[ProcessPoolTaskRunner]:
    """Processes that end when this one dies; where it fails here, what they do is interrupted."""
    theirs, ours = get_context("spawn").Pipe(duplex=False)
    pool = ProcessPoolTaskRunner(workers, initializer=end_with, initargs=(theirs,))
    with theirs, ours, pool:
        try:
            yield pool
        except BaseException:
            # before they are waited for
            ours.close()
            raise


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Have processes that begin here hear of no interrupt at the terminal until they are ready.

    One that does while it loads its libraries dies in many lines.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Interrupt:
    """An interrupt that comes only where work waits for it.

    Attributes:
        awaited: whether work is under way.
        came: whether it came, be it while there was no work.
    """

    awaited = False
    came = False

    def __call__(self, *signalled: object) -> None:
        """It comes; a second one does not disturb what is told of the first."""
        before, self.came = self.came, True
        if self.awaited and not before:
            raise KeyboardInterrupt

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Work that may be interrupted."""
        self.awaited = True
        try:
            if self.came:
                raise KeyboardInterrupt
            yield
        finally:
            self.awaited = False


# of this process, which has a handler of it where it is one of a pool
interruptible = _Interrupt()


def end_with(starter: Connection) -> None:
    """Have this process interrupted, and soon ended, once whoever started it is gone or says so.

    Args:
        starter: nothing comes from there, but its end.
    """
    signal.signal(signal.SIGINT, interruptible)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
    main = threading.main_thread().ident
    assert main is not None

    def watch() -> None:
        starter.poll(None)
        # a signal, which ends what the thread waits for
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(END_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
