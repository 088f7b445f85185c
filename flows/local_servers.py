"""The processes that ``make up`` keeps running; each of one process, so that none outlives another.

``python -m flows.local_servers NAME`` becomes the service NAME of the folder that
``BLOCKQUANT_SERVICES`` names.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from tasks.engine.settings import Settings, settings
from tasks.engine.store import write_text

SERVICES = "BLOCKQUANT_SERVICES"
POOL = "blockquant"
# what only the servers are to know: a database's address holds its password
_PREFECT_DATABASES = (
    "PREFECT_SERVER_DATABASE_CONNECTION_URL",
    "PREFECT_API_DATABASE_CONNECTION_URL",
    "PREFECT_SERVER_DATABASE_PASSWORD",
    "PREFECT_API_DATABASE_PASSWORD",
)
# kept in PREFECT_HOME: in memory, a server that ends forgets who has a slot, which stays taken
LEASES = "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"
LEASES_IN_FILES = "prefect.server.concurrency.lease_storage.filesystem"
# options of `mlflow server`, by its own names of them
BACKEND = "MLFLOW_BACKEND_STORE_URI"
DESTINATION = "MLFLOW_ARTIFACTS_DESTINATION"


@dataclass(frozen=True)
class Services:
    """What runs: where its state lies, its ports, and how many workers with how many runs each."""

    folder: Path
    repository: Path
    prefect_port: int
    mlflow_port: int
    workers: int
    runs: int

    @property
    def prefect_url(self) -> str:
        """Where a person looks at Prefect; its API is below ``/api``."""
        return f"http://127.0.0.1:{self.prefect_port}"

    @property
    def mlflow_url(self) -> str:
        """MLflow's server."""
        return f"http://127.0.0.1:{self.mlflow_port}"

    def save(self) -> None:
        """Keep it in its folder, for the processes that are started in it."""
        record = asdict(self) | {"folder": str(self.folder), "repository": str(self.repository)}
        write_text(self.folder / "services.json", json.dumps(record, indent=1))


def saved(folder: Path) -> Services | None:
    """Return what was kept in a folder, None where nothing is."""
    try:
        record = json.loads((folder / "services.json").read_text(encoding="utf-8"))
        places = {name: Path(record[name]) for name in ("folder", "repository")}
        return Services(**(record | places))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def worker_name(number: int) -> str:
    """What Prefect calls a worker: the same after a restart."""
    return f"local-{number}"


def _prefect(services: Services) -> None:
    """Serve Prefect's API and pages, with its scheduler."""
    from flows.prefect_api import own_pages, serve_until_told

    os.environ.pop("PREFECT_API_URL", None)
    os.environ["PREFECT_UI_API_URL"] = f"{services.prefect_url}/api"
    given = own_pages(services.prefect_port) | {LEASES: LEASES_IN_FILES}
    for name, value in given.items():
        os.environ.setdefault(name, value)
    lock = settings().prefect_home / "server-start.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", services.prefect_port)) as listening:
        serve_until_told(listening, lock)


def _mlflow(services: Services) -> None:
    """Serve MLflow's API and pages on the database that commands without a server use too."""
    from mlflow.server.constants import (
        ARTIFACT_ROOT_ENV_VAR,
        ARTIFACTS_DESTINATION_ENV_VAR,
        BACKEND_STORE_URI_ENV_VAR,
        SERVE_ARTIFACTS_ENV_VAR,
    )

    from tasks.engine.tracking import prepare_experiment, prepared_client

    place = settings()
    base = place.prefect_home.parent
    backend = os.environ.pop(BACKEND, None) or f"sqlite:///{base / 'mlflow.db'}"
    here = Settings(place.store, backend, place.artifact_root, place.prefect_home)
    # of processes that create one local database at once, each waits for the other
    client = prepared_client(here)
    if backend.startswith("sqlite:") and not os.environ.get(DESTINATION):
        # the server would create it with artifacts that nobody but its own clients can keep
        prepare_experiment(client, here)
    os.environ |= {
        BACKEND_STORE_URI_ENV_VAR: backend,
        SERVE_ARTIFACTS_ENV_VAR: "true",
        ARTIFACT_ROOT_ENV_VAR: "mlflow-artifacts:/",
        ARTIFACTS_DESTINATION_ENV_VAR: os.environ.get(DESTINATION) or str(place.artifact_root),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    import uvicorn

    app = "mlflow.server.fastapi_app:app"
    uvicorn.run(app, host="127.0.0.1", port=services.mlflow_port, log_level="warning")


def _worker(services: Services, number: int) -> None:
    """Become a Prefect worker, whose runs speak to the two servers."""
    for name in (*_PREFECT_DATABASES, BACKEND, DESTINATION):
        os.environ.pop(name, None)
    os.environ |= {
        "PREFECT_API_URL": f"{services.prefect_url}/api",
        "MLFLOW_TRACKING_URI": services.mlflow_url,
        "BLOCKQUANT_REPOSITORY": str(services.repository),
        "PREFECT_LOGGING_EXTRA_LOGGERS": "blockquant",
    }
    # the server is on this machine: asking it costs little, and a person waits for a run to begin
    os.environ.setdefault("PREFECT_WORKER_QUERY_SECONDS", "2")
    command = [sys.executable, "-m", "flows.local_worker"]
    os.execv(sys.executable, [*command, POOL, worker_name(number), str(services.runs)])


def main(name: str) -> None:
    """Be one service.

    Raises:
        ValueError: there is none of that name.
    """
    services = saved(Path(os.environ[SERVICES]))
    kind, _, number = name.partition("-")
    if services is None or kind not in ("prefect", "mlflow", "worker"):
        raise ValueError(f"no service {name}")
    if kind == "prefect":
        _prefect(services)
    elif kind == "mlflow":
        _mlflow(services)
    else:
        _worker(services, int(number))


if __name__ == "__main__":
    main(sys.argv[1])
