"""Runs that workers of ``make up`` took: of one that died with its worker, nobody tells Prefect.

It knows neither the machine of a run nor whether its process lives: after a loss of power, what
was under way would stay Running for good.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import httpx

from tasks.engine.store import write_text

UNDER_WAY = ("PENDING", "RUNNING", "CANCELLING")
LOST = "it ended together with its worker; the same work, run again, goes on from the store"


def note(folder: Path, run: str, run_count: int) -> None:
    """Note that a worker takes a run, which was begun so often before."""
    # a full disk takes no note, and is no reason for a worker to end
    with suppress(OSError):
        (folder / "runs").mkdir(exist_ok=True)
        write_text(folder / "runs" / run, str(run_count))


def end_lost(api: str, folder: Path) -> list[str]:
    """Tell a Prefect API of what was noted, and did not end, that it crashed; the ids of it.

    No worker of ``folder`` may run. What was begun again since is another worker's.

    Raises:
        httpx.HTTPError: the API does not answer; what it was not told of stays noted.
    """
    lost = []
    for noted in sorted((folder / "runs").glob("[!.]*")):
        url = f"{api}/flow_runs/{noted.name}"
        answer = httpx.get(url, timeout=60, trust_env=False)
        if answer.status_code != 404:
            run = answer.raise_for_status().json()
            begun_again = run["run_count"] > int(noted.read_text(encoding="utf-8")) + 1
            if run["state_type"] in UNDER_WAY and not begun_again:
                asked = {"state": {"type": "CRASHED", "message": LOST}, "force": True}
                told = httpx.post(f"{url}/set_state", json=asked, timeout=60, trust_env=False)
                told.raise_for_status()
                lost.append(noted.name)
        noted.unlink()
    return lost
