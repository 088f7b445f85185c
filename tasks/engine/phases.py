"""Where the time of a run's steps goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

# by other processes, beside all else, and where their device waited to be asked for the next step
AHEAD = "computed ahead"
IDLE = "device idle between steps"
# by the flow, one after the other
IN_TASK = "computed in tasks"
WAITED = "waited for what is computed ahead"
WRITTEN = "written"
# what is left of its time: keys, locks, Prefect, MLflow
ORCHESTRATED = "orchestrated"


@dataclass
class Phases:
    """Seconds of kinds of work since it was last begun anew."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def measured(self, kind: str) -> Iterator[None]:
        """Add the time of what is done inside, also where it fails."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[kind] += time.perf_counter() - start

    def begin(self) -> None:
        """Begin anew."""
        self.seconds.clear()

    def of(self, whole: float) -> dict[str, float]:
        """All kinds, given the seconds that the flow took: what is left was orchestration."""
        found = {
            kind: self.seconds.get(kind, 0.0) for kind in (AHEAD, IDLE, IN_TASK, WAITED, WRITTEN)
        }
        known = found[IN_TASK] + found[WAITED] + found[WRITTEN]
        return found | {ORCHESTRATED: whole - known}
