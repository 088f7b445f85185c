"""Start a server, wait until it answers, and leave nothing of it behind."""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from tasks.engine.errors import RunError
from tasks.engine.serving import guard
from tasks.engine.serving.client import Client, NotReadyError

LOOPBACK = "127.0.0.1"
PORTS = range(20000, 32000)
POLL_S = 0.5
DYING_S = 10.0
# the end of a log, in which an error is looked for, and what is shown of it
TAIL_LINES = 100
SHOWN_LINES = 20
# of this process's environment, not of the server's
_NOT_HANDED_ON = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
# the last line of a traceback
_AN_ERROR = re.compile(r"(\w+\.)*\w*(Error|Exception)\b")


class ServerError(RunError):
    """A server did not start, died, or is not the one that was started.

    Attributes:
        lines: the last ones of its log.
    """

    def __init__(self, message: str, lines: Sequence[str] = ()) -> None:
        """Say what happened, and keep what the server said."""
        super().__init__(message)
        self.lines = tuple(lines)

    def __reduce__(self) -> tuple[type[ServerError], tuple[str, tuple[str, ...]]]:
        """Travel with the lines."""
        return ServerError, (str(self), self.lines)


def told(what: str, log_file: Path) -> ServerError:
    """An error of a server: what happened, what it said last, and where all of that is."""
    lines = [line for line in _lines(log_file) if line.strip()][-TAIL_LINES:]
    errors = [line for line in lines if _AN_ERROR.match(line)]
    last = f": {(errors or lines)[-1].strip()[:300]}" if lines else ""
    return ServerError(f"{what}{last}; its log is {log_file}", lines[-SHOWN_LINES:])


@dataclass(frozen=True)
class Server:
    """A running server, its log, and a client of it."""

    process: subprocess.Popen[bytes]
    client: Client
    log: Path

    def require_alive(self) -> None:
        """Say with its last lines why a server is gone.

        Raises:
            ServerError: it is.
        """
        status = self.process.poll()
        if status is not None:
            raise told(f"the server ended with status {status}", self.log)


def launch_command(
    python: str, checkpoint: Path, port: int, parallel: int = 1, more: Sequence[str] = ()
) -> list[str]:
    """The command that serves a checkpoint with SGLang on this machine."""
    command = [python, "-m", "sglang.launch_server", "--model-path", str(checkpoint)]
    command += ["--host", LOOPBACK, "--port", str(port)]
    if parallel > 1:
        command += ["--tp-size", str(parallel)]
    return [*command, *more]


def free_port() -> int:
    """A port of this machine that nothing listens on, out of those that SGLang can be given.

    It adds 10000 for a second port, and asks for more above; from 32768 on the system gives ports
    to whoever connects somewhere.

    Raises:
        ServerError: there is none.
    """
    for port in random.sample(PORTS, k=len(PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ServerError(f"no port from {PORTS.start} to {PORTS.stop - 1} is free; end a server")


def environment_of(python: str) -> dict[str, str]:
    """The environment for another interpreter: packages of this one stay out of it."""
    if python == sys.executable:
        return dict(os.environ)
    return {name: value for name, value in os.environ.items() if name not in _NOT_HANDED_ON}


@contextmanager
def running_server(
    command: Sequence[str],
    client: Client,
    checkpoint: Path,
    log_file: Path,
    start_timeout_s: float,
) -> Iterator[Server]:
    """Run a server until the block ends; its process group ends with it, whatever happens.

    Args:
        command: starts it.
        client: speaks to its address.
        checkpoint: what it is to serve, as its own /model_info names it.
        log_file: where its output goes.
        start_timeout_s: how long it may take until it answers.

    Raises:
        ServerError: it ended, did not answer in time, or another one answers at its address.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-I", guard.__file__, *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment_of(command[0]),
            start_new_session=True,
        )
    server = Server(process, client, log_file)
    try:
        _wait_until_ready(server, checkpoint, start_timeout_s)
        yield server
    except NotReadyError as error:
        # a server that dies stops answering first: what a client meets then is told as that
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=DYING_S)
        server.require_alive()
        raise told(str(error), log_file) from error
    finally:
        _end(process)


def _wait_until_ready(server: Server, checkpoint: Path, limit_s: float) -> None:
    def asked() -> str:
        server.require_alive()
        return server.client.model_path()

    attempts = Retrying(
        retry=retry_if_exception_type(NotReadyError),
        stop=stop_after_delay(limit_s),
        wait=wait_fixed(POLL_S),
        reraise=True,
    )
    try:
        served = attempts(asked)
    except NotReadyError as error:
        limit = f"{limit_s:g} s (serving.start_timeout)"
        raise told(f"the server did not answer within {limit}", server.log) from error
    if Path(served).resolve() != checkpoint.resolve():
        raise ServerError(
            f"{server.client.url}: another server answers there, with {served}; end it, or let "
            "--server-url name it"
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close the guard's standard input, upon which it ends the server's process group."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(timeout=guard.GRACE_S + 15)
    except subprocess.TimeoutExpired:
        # the server dies with its guard
        process.kill()
        process.wait()


def _lines(log_file: Path) -> list[str]:
    try:
        return log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
