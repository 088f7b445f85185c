"""What `make up` is started with, and what it refuses before anything starts."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from flows import local_services
from flows.local_servers import Services
from flows.local_services import PORTS, down, environment, main


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home in which nothing was started."""
    monkeypatch.setenv("BLOCKQUANT_HOME", str(tmp_path))
    return tmp_path


def test_hosts_that_reach_no_proxy_are_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("no_proxy", "hub.example")
    given = environment(Services(home / "services", home, 1, 2, 1, 1))
    assert given["no_proxy"] == "hub.example,127.0.0.1,localhost"
    assert given["NO_PROXY"] == "127.0.0.1,localhost"


@pytest.mark.parametrize("name", PORTS)
def test_a_port_that_is_taken_is_refused_before_anything_starts(
    name: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv(name, str(port))
        assert main(["up"]) == 2
    said = capsys.readouterr().err
    assert said == f"blockquant: {name}: {port} is taken; give another one or unset it\n"
    assert not (home / "services" / "supervisord.conf").exists()


def test_services_that_end_while_they_are_ended_are_no_failure(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "services").mkdir()
    # it answered a moment ago, and neither its socket nor its file is there any more
    monkeypatch.setattr(local_services, "_is_running", lambda folder: True)
    assert down()
