"""A Prefect API for one command: the configured server, else a local one that ends with us."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tasks.engine.errors import InputError

START_LIMIT_S = 180.0
OFFLINE = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def quiet_defaults(prefect_home: Path) -> None:
    """Set, before Prefect is imported, what the user did not: no telemetry, a quiet console."""
    for name, value in OFFLINE.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("PREFECT_HOME", str(prefect_home))
    # logs go to the API and to our own log; a person sees progress and one line of error
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")


@contextmanager
def prefect_api(log: Path) -> Iterator[str]:
    """Give the URL of a Prefect API.

    Where ``PREFECT_API_URL`` (or the active profile) names a server, that one is used. Otherwise a
    server on loopback is started, its output kept in ``log``; it ends when this process does,
    however that dies.

    Raises:
        RuntimeError: the local server did not start.
    """
    from prefect.settings import PREFECT_API_URL, temporary_settings

    configured = PREFECT_API_URL.value()
    if configured:
        _require_server(str(configured))
        yield str(configured)
        return
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "flows.prefect_api", str(port)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PREFECT_UI_ENABLED": "0"},
        )
    try:
        _wait_until_healthy(url, server, log)
        with temporary_settings({PREFECT_API_URL: url}):
            try:
                yield url
            finally:
                _flush()
    finally:
        assert server.stdin is not None
        # the server ends when its standard input does
        server.stdin.close()
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _require_server(url: str) -> None:
    try:
        httpx.get(f"{url}/health", timeout=30).raise_for_status()
    except httpx.HTTPError as error:
        raise InputError(
            f"PREFECT_API_URL: no Prefect server answers there ({type(error).__name__}); start "
            "one with `prefect server start`, or unset it to use one that comes and goes with us"
        ) from error


def _flush() -> None:
    """Send what Prefect still holds, while the server is there to take it."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all()
    EventsWorker.drain_all()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    server.kill()
    raise RuntimeError(f"the local Prefect server did not start; its last words are in {log}")


def _lock_before_reading() -> None:
    """Have Prefect's writing transactions on SQLite wait for each other instead of failing.

    Prefect begins them DEFERRED, so of two that overlap the later fails with SQLITE_BUSY_SNAPSHOT;
    the client then waits two seconds. Taking a slot of a tag's concurrency limit, which every
    tagged task does, is one: a fourth of all steps stalled.
    """
    from prefect.server.database.configurations import AioSqliteConfiguration

    begin = AioSqliteConfiguration.begin_transaction

    def immediate(self: Any, session: Any, with_for_update: bool = True) -> Any:
        del with_for_update
        return begin(self, session, with_for_update=True)

    AioSqliteConfiguration.begin_transaction = immediate  # type: ignore[assignment]


def _serve(port: int) -> None:
    """Serve until standard input ends: it does when the process that started us is gone."""
    import uvicorn

    _lock_before_reading()
    config = uvicorn.Config(
        "prefect.server.api.server:create_app",
        factory=True,
        host="127.0.0.1",
        port=port,
        log_level="error",
        lifespan="on",
    )
    server = uvicorn.Server(config)

    def watch() -> None:
        sys.stdin.buffer.read()
        server.should_exit = True
        time.sleep(5)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    server.run()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
