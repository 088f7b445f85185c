"""How far a run is, as an artifact of Prefect that its run page shows."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

log = logging.getLogger("blockquant")

KEY = "blocks"
# a server is told no more often; found blocks take a tenth of it
BETWEEN_S = 1.0


@dataclass
class ProgressArtifact:
    """Blocks done of all; a server that does not take it is no reason to fail."""

    total: int
    done: int = 0
    artifact: UUID | None = None
    shown_at: float = 0.0

    def begin(self) -> None:
        """Show that none is done yet."""
        try:
            found: Any = create_progress_artifact(
                progress=0.0, key=KEY, description=self.description
            )
            self.artifact = found
        except Exception as error:
            log.debug("Prefect shows no progress: %s", error)

    def block_done(self) -> None:
        """Show that one more is done: the last at once, others if it is a while since one was."""
        self.done += 1
        now = time.monotonic()
        soon = now - self.shown_at < BETWEEN_S and self.done < self.total
        if self.artifact is None or soon:
            return
        self.shown_at = now
        try:
            update_progress_artifact(
                artifact_id=self.artifact,
                progress=100.0 * self.done / max(self.total, 1),
                description=self.description,
            )
        except Exception as error:
            log.debug("Prefect shows no progress: %s", error)

    @property
    def description(self) -> str:
        """In words."""
        return f"{self.done} of {self.total} blocks"
