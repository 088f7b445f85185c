"""A child of a sweep that notes that it ran, and kills its process or waits as its name says."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect import task

from flows.child_pool import interruptible
from flows.child_run import Surroundings


@task(persist_result=False)
def child(name: str, parameters: dict[str, Any], place: Surroundings) -> dict[str, str]:
    """Run for a moment; ``killer`` dies, ``waiter`` waits until it is interrupted."""
    folder = Path(place.folder)
    note(folder / "ran", name)
    note(folder / "devices", parameters["device"])
    time.sleep(0.5)
    if name == "killer":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "waiter":
        wait()
    time.sleep(1)
    note(folder / "ended", name)
    return {"ran": name}


def note(file: Path, line: str) -> None:
    """Add a line to a file."""
    with file.open("a") as notes:
        notes.write(f"{line}\n")


def wait() -> None:
    """Wait until an interrupt; by name, for a task takes copies of its own of what it uses."""
    with suppress(KeyboardInterrupt), interruptible.wait():
        time.sleep(60)
