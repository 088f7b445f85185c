"""Work that is done beside the computation, one thing at a time, and may be left out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from tasks.engine.errors import one_line

log = logging.getLogger("blockquant")


class Behind:
    """A thread for work that a run does not depend on: where it fails, the run goes on."""

    def __init__(self, rest_s: float = 0.0) -> None:
        """Start nothing before the first work comes; rest for so many seconds after each."""
        self._rest_s = rest_s
        self._rested_at = 0.0
        self._threads: ThreadPoolExecutor | None = None
        self._current: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether the last work is still being done."""
        return self._current is not None and not self._current.done()

    def offer(self, what: str, work: Callable[[], None]) -> bool:
        """Have ``work`` done unless other work is, or was a moment ago: whether it was taken.

        Args:
            what: it is, for the log.
            work: is called in the thread; what it raises is logged.
        """
        if self.busy or time.monotonic() < self._rested_at:
            return False
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, thread_name_prefix="blockquant-behind")
        self._current = self._threads.submit(self._done, what, work)
        return True

    def _done(self, what: str, work: Callable[[], None]) -> None:
        _tolerated(what, work)
        self._rested_at = time.monotonic() + self._rest_s

    def wait(self) -> None:
        """Wait until nothing is being done."""
        if self._current is not None:
            self._current.result()


def _tolerated(what: str, work: Callable[[], None]) -> None:
    try:
        work()
    except Exception as error:
        log.warning("%s: %s; the run goes on without", what, one_line(error))
