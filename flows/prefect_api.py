"""A Prefect API for one command: the configured server, else a local one that ends with us."""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from filelock import FileLock

from flows.loading import end_without_collecting, load
from tasks.engine.errors import InputError, one_line

log = logging.getLogger("blockquant")

# of servers that start in one home at the same time, each waits until those before it are up
START_LIMIT_S = 600.0
# how often a local server that dies is started again
RESTARTS = 3
API_URL = "PREFECT_API_URL"
NEVER_PROXIED = ("127.0.0.1", "localhost")
# what a server that serves one command has no use for, and what it may do in batches: on few cores
# it takes time from the quantization
_SERVICES = "PREFECT_SERVER_SERVICES"
LEAN_SERVER = {
    "PREFECT_UI_ENABLED": "0",
    **{
        f"{_SERVICES}_{name}_ENABLED": "false"
        for name in (
            "SCHEDULER",
            "LATE_RUNS",
            "CANCELLATION_CLEANUP",
            "PAUSE_EXPIRATIONS",
            "FOREMAN",
            "REPOSSESSOR",
            "TRIGGERS",
        )
    },
    **{
        f"{_SERVICES}_{name}_BATCH_SIZE": "100" for name in ("TASK_RUN_RECORDER", "EVENT_PERSISTER")
    },
    **{
        f"{_SERVICES}_{name}_READ_BATCH_SIZE": "100"
        for name in ("TASK_RUN_RECORDER", "EVENT_PERSISTER")
    },
}
# which web pages may read what the API answers, and so post to it
ORIGINS = "PREFECT_SERVER_CORS_ALLOWED_ORIGINS"
OFFLINE = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def quiet_defaults(prefect_home: Path) -> None:
    """Set, before Prefect is imported, what the user did not: no telemetry, a quiet console.

    Loopback is never reached through a proxy: what listens there is ours.
    """
    for name, value in OFFLINE.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("PREFECT_HOME", str(prefect_home))
    # logs go to the API and to our own log; a person sees progress and one line of error
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ |= unproxied(os.environ)


def unproxied(environment: Mapping[str, str]) -> dict[str, str]:
    """``NO_PROXY`` and ``no_proxy`` as they are, and loopback in both."""
    found = {}
    for name in ("NO_PROXY", "no_proxy"):
        kept = [host for host in environment.get(name, "").split(",") if host.strip()]
        found[name] = ",".join([*kept, *(host for host in NEVER_PROXIED if host not in kept)])
    return found


def own_pages(port: int) -> dict[str, str]:
    """Let no web page ask a server on loopback but its own: any may by default."""
    return {ORIGINS: ",".join(f"http://{host}:{port}" for host in NEVER_PROXIED)}


@dataclass
class Waiting:
    """A local server that has loaded its libraries, or is about to, and begins when it is told."""

    process: subprocess.Popen[bytes]
    port: int
    begun: bool = False

    @classmethod
    def on(cls, port: int = 0) -> Waiting:
        """Start one; by default on a port that is free."""
        # the port is taken here: while the server waits for its turn, nobody else can have it
        with socket.create_server(("127.0.0.1", port)) as listening:
            taken = listening.getsockname()[1]
            process = subprocess.Popen(
                [sys.executable, "-m", "flows.prefect_api", str(listening.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # what it asks of itself it does not ask through its port
                env={
                    **(LEAN_SERVER | own_pages(taken)),
                    **{k: v for k, v in os.environ.items() if k != API_URL},
                },
                pass_fds=(listening.fileno(),),
                # an interrupt at the terminal is for the command, which tells of it
                start_new_session=True,
            )
            return cls(process, taken)

    def begin(self, said: Path, home: Path) -> str:
        """Have it serve, its output, if any, kept in ``said``; its API's URL."""
        for folder in (said.parent, home):
            folder.mkdir(parents=True, exist_ok=True)
        said.touch()
        self.begun = True
        given = {"lock": str(home / "server-start.lock"), "log": str(said)}
        assert self.process.stdin is not None
        # one that is gone is found out when it does not answer
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(given).encode() + b"\n")
            self.process.stdin.flush()
        return f"http://127.0.0.1:{self.port}/api"

    def end(self) -> None:
        """Have it end; one that did not begin is killed, for it has nothing to end."""
        assert self.process.stdin is not None
        if not self.begun:
            self.process.kill()
        # the server ends when its standard input does
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def waiting_server() -> Iterator[Waiting | None]:
    """A local server that waits, for libraries to be loaded while input is checked.

    It writes no file before it begins, and ends with this process, however that dies. None where
    ``PREFECT_API_URL`` names another one.
    """
    if os.environ.get(API_URL):
        yield None
        return
    waiting = Waiting.on()
    try:
        yield waiting
    finally:
        waiting.end()


@contextmanager
def prefect_api(
    said: Path, waiting: Waiting | None = None, meanwhile: Callable[[], None] = lambda: None
) -> Iterator[str]:
    """Give the URL of a Prefect API; ``meanwhile`` is called while a local server begins.

    Where ``PREFECT_API_URL`` (or the active profile) names a server, that one is used. Otherwise a
    server on loopback begins, its output, if any, kept in ``said``: the one that is ``waiting``, or
    a new one; it ends when this process does, however that dies, and is started again if it dies.

    Raises:
        RuntimeError: the local server did not start.
    """
    load("prefect.settings")
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        PREFECT_HOME,
        temporary_settings,
    )

    configured = PREFECT_API_URL.value()
    if configured:
        _require_server()
        meanwhile()
        yield str(configured)
        return
    with ExitStack() as stack:
        server = waiting or stack.enter_context(waiting_server())
        assert server is not None
        home = Path(PREFECT_HOME.value())
        url = server.begin(said, home)
        stack.callback(_drop_empty, said)
        with ThreadPoolExecutor(1) as beside:
            answered = beside.submit(_wait_until_healthy, url, server.process, said)
            try:
                meanwhile()
                answered.result()
            except BaseException:
                # the thread ends once there is no server to wait for
                server.process.kill()
                raise
        # a flow waits up to a second for its heart to stop, and this server looks at none
        own = {PREFECT_API_URL: url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
        with _kept_up(server, said, home), _known_to_all_threads(url), temporary_settings(own):
            try:
                yield url
            finally:
                flush()


@contextmanager
def _kept_up(server: Waiting, said: Path, home: Path) -> Iterator[None]:
    """Start the server again where it dies, as for want of memory: its clients wait for it."""
    changing, over = threading.Lock(), threading.Event()

    def keep() -> None:
        for died in itertools.count(1):
            status = server.process.wait()
            with changing:
                if over.is_set():
                    return
                if died > RESTARTS:
                    log.warning("the local Prefect server died %d times; is memory short?", died)
                    return
                log.warning("the local Prefect server died (%d) and is started again", status)
                try:
                    server.process = Waiting.on(server.port).process
                except OSError as error:
                    log.warning("it cannot be started again: %s", one_line(error))
                    return
                server.begin(said, home)

    threading.Thread(target=keep, name="keeps Prefect up", daemon=True).start()
    try:
        yield
    finally:
        with changing:
            over.set()


@contextmanager
def _known_to_all_threads(url: str) -> Iterator[None]:
    """Have threads that Prefect begins speak to this API: they begin without temporary settings.

    Else what forwards events of child processes starts a server of its own.
    """
    from prefect.context import refresh_global_settings_context

    before = os.environ.get(API_URL)
    os.environ[API_URL] = url
    refresh_global_settings_context()
    try:
        yield
    finally:
        if before is None:
            del os.environ[API_URL]
        else:
            os.environ[API_URL] = before
        refresh_global_settings_context()


def _drop_empty(said: Path) -> None:
    if not said.stat().st_size:
        said.unlink()


def _require_server() -> None:
    """Ask as Prefect's client does: with its certificates, headers and password."""
    load("prefect.client.orchestration")
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        error = client.api_healthcheck()
    if error is not None:
        raise InputError(
            f"PREFECT_API_URL: no Prefect server answers there ({type(error).__name__}); start "
            "one with `prefect server start`, or unset it to use one that comes and goes with us"
        ) from error


def flush() -> None:
    """Send what Prefect still holds, while the server is there to take it.

    What sends events speaks to the server that it began with, until it is flushed.
    """
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all()
    EventsWorker.drain_all()


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes], said: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            # not just its health: what it answers first takes it a moment
            # where it asks for a password, it is there too
            if httpx.get(f"{url}/admin/version", timeout=5).status_code in (200, 401):
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    server.kill()
    raise RuntimeError(f"the local Prefect server did not start; its last words are in {said}")


def _lock_before_reading() -> None:
    """Have Prefect's writing transactions on SQLite wait for each other instead of failing.

    Prefect begins them DEFERRED, so of two that overlap the later fails with SQLITE_BUSY_SNAPSHOT;
    the client then waits two seconds.
    """
    from prefect.server.database.configurations import AioSqliteConfiguration

    begin = AioSqliteConfiguration.begin_transaction

    def immediate(self: Any, session: Any, with_for_update: bool = True) -> Any:
        del with_for_update
        return begin(self, session, with_for_update=True)

    AioSqliteConfiguration.begin_transaction = immediate  # type: ignore[assignment]


def serve_until_told(listening: socket.socket, start_lock: Path, watched: bool = False) -> None:
    """Serve Prefect until a signal, or until standard input ends where that is ``watched``.

    Two servers that create or migrate one database at once fail: ``start_lock`` is held until this
    one is up. The server holds it, for it may outlive by seconds a command that is killed.
    """
    import uvicorn

    lock = FileLock(start_lock)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            lock.release()

    _lock_before_reading()
    config = uvicorn.Config(
        "prefect.server.api.server:create_app",
        factory=True,
        log_level="warning",
        lifespan="on",
        host="127.0.0.1",
    )
    server = Server(config)

    def watch() -> None:
        # not through sys.stdin: its buffer is locked while it waits, which ends Python in an abort
        while os.read(0, 1):
            pass
        server.should_exit = True
        time.sleep(5)
        os._exit(0)

    # the command that started us is gone then
    if watched:
        threading.Thread(target=watch, daemon=True).start()
    lock.acquire()
    server.run(sockets=[listening])


def main() -> None:
    """Load what takes long, then serve what standard input names; nothing, if that just ends."""
    end_without_collecting()
    load("prefect.server.api.server")
    said = b""
    while not said.endswith(b"\n"):
        read = os.read(0, 1)
        if not read:
            return
        said += read
    given = json.loads(said)
    output = os.open(given["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    listening = socket.socket(fileno=int(sys.argv[1]))
    serve_until_told(listening, Path(given["lock"]), watched=True)


if __name__ == "__main__":
    main()
