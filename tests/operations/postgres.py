"""A PostgreSQL server of Debian's package, in a folder of its own, for the time of a test."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg2

from tests.operations.services import eventually

PROGRAMS = Path("/usr/lib/postgresql")
PASSWORD = "of-the-test"


def programs() -> Path:
    """Where Debian keeps the newest server's programs."""
    found = sorted(PROGRAMS.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    assert found, "PostgreSQL is not installed: apt-get install postgresql (make ops-packages)"
    return found[-1].parent


@contextmanager
def postgres(*databases: str) -> Iterator[str]:
    """Start a server on loopback with some databases; its address is user:password@host:port."""
    binaries, account = programs(), _account()
    folder = Path(tempfile.mkdtemp(prefix="blockquant-postgres-"))
    secret = folder / "password"
    secret.write_text(PASSWORD)
    for path in (folder, secret):
        shutil.chown(path, *account)
    data, user = folder / "data", _as(account)
    create = [f"{binaries}/initdb", "-D", f"{data}", "-U", "blockquant", "--auth=scram-sha-256"]
    create += [f"--pwfile={secret}", "--encoding=UTF8", "--locale=C.UTF-8"]
    subprocess.run([*user, *create], check=True, capture_output=True, cwd=folder)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    serve = [f"{binaries}/postgres", "-D", f"{data}", "-p", f"{port}", "-k", f"{folder}"]
    serve += ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([*user, *serve], stdout=log, stderr=log, cwd=folder)
    try:
        eventually(lambda: _create(port, databases), "a PostgreSQL server", 60)
        yield f"blockquant:{PASSWORD}@127.0.0.1:{port}"
    finally:
        # at once: clients may still be there
        server.terminate()
        server.send_signal(2)
        server.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def _account() -> tuple[int, int]:
    """Whom the server runs as: it refuses to run as root."""
    if os.getuid():
        return os.getuid(), os.getgid()
    found = pwd.getpwnam("postgres")
    return found.pw_uid, found.pw_gid


def _as(account: tuple[int, int]) -> list[str]:
    if not os.getuid():
        return ["setpriv", f"--reuid={account[0]}", f"--regid={account[1]}", "--clear-groups"]
    return []


def _create(port: int, databases: tuple[str, ...]) -> bool:
    place = {"host": "127.0.0.1", "port": port, "user": "blockquant", "password": PASSWORD}
    try:
        connection = psycopg2.connect(**place, dbname="postgres")
    except psycopg2.OperationalError:
        return False
    connection.autocommit = True
    with connection.cursor() as cursor:
        for name in databases:
            cursor.execute(f"CREATE DATABASE {name}")
    connection.close()
    return True
