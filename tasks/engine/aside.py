"""A result that a thread makes beside other steps; its task takes it when it is its turn."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tasks.engine.draft import Draft
from tasks.engine.job import Job
from tasks.engine.step import Made, Step


class Aside:
    """What a thread makes of a step, for its task to take."""

    def __init__(self, begun: Future[Made | None], make: Callable[[], Made]) -> None:
        """Take what was begun; ``make`` makes it anew where that came to nothing."""
        self._begun: Future[Made | None] | None = begun
        self._make = make

    def take(self) -> Made:
        """Wait for it; made anew where it failed, for what kept it then may have passed.

        Raises:
            Exception: as it fails now.
        """
        begun, self._begun = self._begun, None
        with suppress(Exception):
            made = None if begun is None else begun.result()
            if made is not None:
                return made
        return self._make()

    def halt(self) -> None:
        """Nothing of it is on a device."""


@contextmanager
def made_aside(job: Job, step: Step[...], *args: Any) -> Iterator[Aside]:
    """Have a thread make the result of a step that computes on the host, if it is not there.

    Args:
        job: the run.
        step: which one.
        args: its own.
    """
    with job.store.scratch("aside") as place, ThreadPoolExecutor(1) as thread:

        def make() -> Made:
            return _made(job, step, place, args)

        def make_missing() -> Made | None:
            return None if job.store.get(step.key(job, *args)) is not None else make()

        yield Aside(thread.submit(make_missing), make)


def _made(job: Job, step: Step[...], place: Path, args: tuple[Any, ...]) -> Made:
    place.mkdir(parents=True, exist_ok=True)
    try:
        draft = Draft(place)
        value = step.compute(job, draft, *args)
        for name in draft.saved:
            # read while it is in memory: the task asks for it
            job.store.describe(place / name)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return Made(Draft.written(place, draft.saved), value, None)
