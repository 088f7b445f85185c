"""Real servers for tests: what `make up` starts, in a home of its own."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil

from flows.prefect_api import flush

ROOT = Path(__file__).parent.parent.parent
PORTS = ("BLOCKQUANT_PREFECT_PORT", "BLOCKQUANT_MLFLOW_PORT")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Up:
    """Services that run: their home, their addresses, and the environment of their user."""

    home: Path
    prefect: str
    mlflow: str
    env: dict[str, str]

    def api(self, method: str, path: str, **more: Any) -> Any:
        """Ask Prefect's API."""
        answer = httpx.request(method, f"{self.prefect}/api/{path}", timeout=60, **more)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def run(self, *arguments: object, module: str = "prefect") -> subprocess.CompletedProcess[str]:
        """Run a command as a user of these services does."""
        command = [sys.executable, "-m", module, *map(str, arguments)]
        return subprocess.run(
            command, env=self.env, cwd=self.home, capture_output=True, text=True, check=False
        )

    def submit(self, deployment: str, parameters: dict[str, Any]) -> str:
        """Have a deployment run; the id of its run."""
        found = self.api("GET", f"deployments/name/{deployment}")
        body = {"parameters": parameters}
        return str(self.api("POST", f"deployments/{found['id']}/create_flow_run", json=body)["id"])

    def ended(self, run: str, after: int = 0, limit: float = 240) -> dict[str, Any]:
        """Wait until a run is in a final state, after it was begun more often than ``after``."""

        def final() -> dict[str, Any] | None:
            found: dict[str, Any] = self.api("GET", f"flow_runs/{run}")
            over = found["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
            return found if over and found["run_count"] > after else None

        return eventually(final, f"the end of run {run}", limit)

    def log(self, run: str) -> list[str]:
        """What a run logged, as its page shows it."""
        body = {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200}
        return [line["message"] for line in self.api("POST", "logs/filter", json=body)]

    def processes(self) -> list[psutil.Process]:
        """All processes of these services."""
        return [p for p in psutil.process_iter() if services_of(p) == str(self.home / "services")]


def services_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("BLOCKQUANT_SERVICES")
    except (psutil.Error, OSError):
        return None


def eventually(look: Callable[[], Found | None], what: str, limit: float = 120) -> Found:
    """Wait until a look finds something: what is neither None nor False nor empty."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.2)
    raise TimeoutError(f"{what}: not within {limit} s")


def clean_environment(**more: str) -> dict[str, str]:
    """The environment of somebody who set nothing; hubs stay out of reach."""
    ours = ("PREFECT_", "MLFLOW_", "BLOCKQUANT_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return kept | {"PYTHONPATH": str(ROOT)} | more


def lasting_ports(count: int) -> list[int]:
    """Free ports that the system gives to nobody who asks for any: they are still free later."""
    found: list[int] = []
    for port in random.sample(range(20000, 30000), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            return found
    raise OSError("no ports are free")


@contextmanager
def telling(up: Up) -> Iterator[None]:
    """Flows of this process tell these services of themselves, and nobody else afterwards."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    flush()
    with temporary_settings({PREFECT_API_URL: f"{up.prefect}/api"}):
        yield
        flush()


@contextmanager
def brought_up(home: Path, **settings: str) -> Iterator[Up]:
    """Bring services up, and down at the end; nothing of them is left."""
    home.mkdir(parents=True, exist_ok=True)
    # of two that are brought up at once, both would find the usual ones
    ports = dict(zip(PORTS, map(str, lasting_ports(len(PORTS))), strict=True))
    env = clean_environment(BLOCKQUANT_HOME=str(home), **(ports | settings))
    bare = Up(home, "", "", env)
    try:
        started = bare.run("up", module="flows.local_services")
        assert started.returncode == 0, started.stderr
        prefect, mlflow = (line.split(": ")[1] for line in started.stdout.splitlines())
        clients = {"PREFECT_API_URL": f"{prefect}/api", "MLFLOW_TRACKING_URI": mlflow}
        clients["PREFECT_HOME"] = str(home / "prefect")
        yield Up(home, prefect, mlflow, env | clients)
    finally:
        bare.run("down", module="flows.local_services")
        assert bare.processes() == []
