"""The Prefect server that comes and goes with a command."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from flows.prefect_api import quiet_defaults
from tests.flows.conftest import bare_environment

# a whole life of a server; what the API says shows that it was this one that answered
SERVED = """
import sys
from pathlib import Path
from flows.prefect_api import prefect_api, quiet_defaults

quiet_defaults(Path(sys.argv[1]))
import httpx
with prefect_api(Path(sys.argv[2])) as url:
    print(httpx.get(f"{url}/admin/version").json())
"""


def serve(home: Path, log: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SERVED, str(home), str(log)],
        env=bare_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_served(process: subprocess.Popen[str], log: Path) -> None:
    out, complaint = process.communicate()
    said = log.read_text() if log.exists() else ""
    assert (process.returncode, said) == (0, ""), complaint + said
    assert out.strip() == version("prefect")
    assert not log.exists()


@pytest.mark.ops
@pytest.mark.timeout(600)
def test_servers_that_start_at_once_in_an_empty_home(tmp_path: Path) -> None:
    logs = [tmp_path / f"{name}.log" for name in ("one", "two", "three")]
    processes = [serve(tmp_path / "home", log) for log in logs]
    for process, log in zip(processes, logs, strict=True):
        assert_served(process, log)


@pytest.mark.ops
def test_a_proxy_is_not_asked_for_loopback(tmp_path: Path) -> None:
    proxy = "http://127.0.0.1:9"
    log = tmp_path / "server.log"
    proxies = {"HTTP_PROXY": proxy, "http_proxy": proxy, "NO_PROXY": "", "no_proxy": ""}
    assert_served(serve(tmp_path / "home", log, **proxies), log)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "127.0.0.1,localhost"),
        ("", "127.0.0.1,localhost"),
        ("example.org", "example.org,127.0.0.1,localhost"),
        ("localhost,example.org", "localhost,example.org,127.0.0.1"),
        ("127.0.0.1,localhost", "127.0.0.1,localhost"),
    ],
)
@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
def test_loopback_is_kept_from_proxies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, before: str | None, after: str
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop(name, None)
    if before is not None:
        os.environ[name] = before
    quiet_defaults(tmp_path)
    quiet_defaults(tmp_path)
    assert os.environ[name] == after
