"""One process of a crew, seen from the flow's: what it is told, says, and why it ended."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from flows.crew_start import Member
from tasks.engine.errors import InputError, RunError, one_line
from tasks.engine.residency import ran_out_of_memory

# kinds of failures that are the same here as there
MEMORY, RUN, INPUT, DISK = "memory", "run", "input", "disk"
# of a process that said nothing, and of one that failed otherwise, maybe as another was gone
LOST, OTHER = "lost", "other"
# what threads are called that hear what processes say
LISTENER = "blockquant-hears"
_ORDER = (MEMORY, RUN, INPUT, DISK, LOST, OTHER)


@dataclass(frozen=True)
class Failure:
    """Why a process failed.

    Attributes:
        kind: of the failure.
        said: in a line.
        number: of an operating system's error.
    """

    kind: str
    said: str
    number: int | None = None

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """What an error is told as."""
        if ran_out_of_memory(error):
            return cls(MEMORY, one_line(error))
        if isinstance(error, InputError):
            return cls(INPUT, str(error))
        if isinstance(error, RunError):
            return cls(RUN, str(error))
        if isinstance(error, OSError | SafetensorError):
            words = getattr(error, "strerror", None) or str(error)
            return cls(DISK, words, getattr(error, "errno", None))
        return cls(OTHER, one_line(error))

    @property
    def vague(self) -> bool:
        """Whether another process may know better."""
        return self.kind in (LOST, OTHER)

    def error(self) -> Exception:
        """As it is raised here."""
        if self.kind == MEMORY:
            return MemoryError(self.said)
        if self.kind == INPUT:
            return InputError(self.said)
        if self.kind == DISK:
            return OSError(self.number, self.said) if self.number else OSError(self.said)
        # what may pass: the step is tried again with a new process
        return ChildProcessError(self.said) if self.kind == LOST else RunError(self.said)


def worst_of(failures: Sequence[Failure]) -> Exception:
    """Of failures of processes that waited for each other, the one that the others came from."""
    return min(failures, key=lambda failure: _ORDER.index(failure.kind)).error()


class Process:
    """A process that computes; what it says is told to ``heard`` by a thread."""

    def __init__(
        self, member: Member, logs: Path, heard: Callable[[dict[str, Any] | Failure], None]
    ) -> None:
        """Listen to one that was started; what it printed is kept in ``logs`` where it fails."""
        self._member = member
        self._logs = logs
        self._heard = heard
        name = f"{LISTENER} {self.device}"
        threading.Thread(target=self._listen, name=name, daemon=True).start()

    @property
    def device(self) -> str:
        """What it computes on."""
        return self._member.device

    @property
    def pid(self) -> int:
        """Its number."""
        return self._member.process.pid

    def _listen(self) -> None:
        failed = False
        with os.fdopen(self._member.said, "rb") as lines:
            for line in lines:
                try:
                    said = json.loads(line)
                except ValueError:
                    # it was killed as it said it
                    break
                failed = failed or "failed" in said
                self._heard(Failure(**said["failed"]) if "failed" in said else said)
        status = self._member.process.wait()
        if status and not failed:
            self._heard(Failure(LOST, self._last_words(status)))

    def _last_words(self, status: int) -> str:
        text = "nothing"
        with suppress(OSError):
            text = self._member.log.read_text(encoding="utf-8", errors="replace").strip() or text
            self._logs.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._member.log, self._logs / self._member.log.name)
        kept = self._logs / self._member.log.name
        return f"the process on {self.device} ended ({status}): {text.splitlines()[-1]}; see {kept}"

    def tell(self, lines: Sequence[str]) -> None:
        """Have it read lines; that one is gone is heard otherwise."""
        self._member.tell(lines)

    def close(self) -> None:
        """Tell it that there is no more."""
        self._member.close()

    def ended(self, within_s: float) -> bool:
        """Whether it ends within so many seconds."""
        try:
            self._member.process.wait(within_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """End it now, if it did not end."""
        self._member.kill()
