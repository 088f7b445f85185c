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
    for notes, line in (("ran", name), ("devices", parameters["device"])):
        with (Path(place.folder) / notes).open("a") as file:
            file.write(f"{line}\n")
    time.sleep(0.5)
    if name == "killer":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "waiter":
        with suppress(KeyboardInterrupt), interruptible.wait():
            time.sleep(60)
    time.sleep(1)
    return {"ran": name}
