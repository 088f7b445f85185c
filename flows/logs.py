"""The log of a command: a file, and standard error where there is no progress bar."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flows.options import err
from tasks.engine.errors import masked


class MaskedLines(logging.Formatter):
    """Lines of a log, tracebacks among them, whose addresses bear no passwords."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        return masked(super().format(record))


def heard_by_prefect() -> None:
    """Have Prefect hear our log from its own level on, where it was asked to keep that.

    ``PREFECT_LOGGING_EXTRA_LOGGERS`` alone leaves the root logger's level: warnings.
    """
    from prefect.settings import PREFECT_LOGGING_EXTRA_LOGGERS

    logger = logging.getLogger("blockquant")
    if logger.name in PREFECT_LOGGING_EXTRA_LOGGERS.value() and logger.level == logging.NOTSET:
        logger.setLevel(logging.getLogger("prefect.extra").level)


@contextmanager
def keeping_log(path: Path) -> Iterator[Path]:
    """Keep the log in a file, beside what else is kept or shown of it."""
    with _handled(_file(path, mode="w")):
        yield path


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Keep the run's log in a file, and show it where there is no progress bar."""
    handlers: list[logging.Handler] = [_file(path, delay=True)]
    if not err.is_terminal:
        shown = logging.StreamHandler()
        shown.setLevel(logging.INFO)
        handlers.append(shown)
    with _handled(*handlers):
        yield


def _file(path: Path, mode: str = "a", delay: bool = False) -> logging.FileHandler:
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = logging.FileHandler(path, mode=mode, delay=delay)
    # a disk that is full takes no log, and the error that ends the run says so
    kept.handleError = lambda record: None  # type: ignore[assignment,method-assign]
    return kept


@contextmanager
def _handled(*handlers: logging.Handler) -> Iterator[None]:
    """Hand all lines of the log to handlers."""
    logger = logging.getLogger("blockquant")
    logger.setLevel(logging.DEBUG)
    for handler in handlers:
        handler.setFormatter(MaskedLines("%(asctime)s %(message)s"))
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            with suppress(OSError):
                handler.close()
