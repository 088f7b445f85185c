"""What a person sees while a flow runs: a bar on a terminal, a line per block elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

log = logging.getLogger("blockquant")


class Reporter(Protocol):
    """Told what a flow does."""

    def plan(self, blocks: int) -> None:
        """Say how many blocks there will be, those of all passes together."""

    def begin(self, step: str) -> None:
        """Say that a step starts."""

    def end(self, step: str, cached: bool) -> None:
        """Say that a step ended, and whether its result was found."""

    def block_done(self) -> None:
        """Say that a pass is through with a block."""


@dataclass
class LogLines:
    """One log line per block."""

    blocks: int = 0
    done: int = 0
    cached: int = 0

    def plan(self, blocks: int) -> None:
        """Keep the number of blocks; none is done yet."""
        self.blocks, self.done, self.cached = blocks, 0, 0

    def begin(self, step: str) -> None:
        """Log at debug level."""
        log.debug("%s", step)

    def end(self, step: str, cached: bool) -> None:
        """Count cache hits."""
        self.cached += cached
        log.debug("%s %s", step, "cached" if cached else "done")

    def block_done(self) -> None:
        """Log the block."""
        self.done += 1
        log.info("block %d of %d done (%d cache hits)", self.done, self.blocks, self.cached)


@dataclass
class Bar:
    """A rich progress bar: blocks done, the current step, time left, cache hits."""

    progress: Progress
    cached: int = 0
    task: int = field(default=-1)

    def plan(self, blocks: int) -> None:
        """Open the bar."""
        self.task = self.progress.add_task("blocks", total=blocks, step="", cached=0)

    def begin(self, step: str) -> None:
        """Show the step."""
        if self.task >= 0:
            self.progress.update(self.task, step=step)  # type: ignore[arg-type]

    def end(self, step: str, cached: bool) -> None:
        """Count cache hits."""
        self.cached += cached
        if self.task >= 0:
            self.progress.update(self.task, cached=self.cached)  # type: ignore[arg-type]

    def block_done(self) -> None:
        """Move the bar."""
        self.progress.advance(self.task)  # type: ignore[arg-type]


_reporter: ContextVar[Reporter | None] = ContextVar("reporter", default=None)


def reporter() -> Reporter:
    """Return the reporter of this context, log lines where none was set."""
    found = _reporter.get()
    if found is None:
        found = LogLines()
        _reporter.set(found)
    return found


@contextmanager
def shown(console: Console) -> Iterator[None]:
    """Show progress on ``console``: a bar where it is a terminal, log lines where it is not."""
    if not console.is_terminal:
        token = _reporter.set(LogLines())
        try:
            yield
        finally:
            _reporter.reset(token)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[step]}"),
        TextColumn("{task.fields[cached]} cached"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        token = _reporter.set(Bar(progress))
        try:
            yield
        finally:
            _reporter.reset(token)
