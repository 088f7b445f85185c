"""Servers that start, do not, or die: a stand-in that replays a real one, over HTTP on loopback."""

from __future__ import annotations

import os
import pickle
import socket
import sys
from pathlib import Path

import httpx
import pytest

from tasks.engine.serving import server as servers
from tasks.engine.serving.client import Client
from tasks.engine.serving.server import (
    PORTS,
    ServerError,
    environment_of,
    free_port,
    launch_command,
    running_server,
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder; the stand-in does not look into it."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    return folder


def run(python, checkpoint, limit_s=20.0, port=None):
    port = port or free_port()
    client = Client(f"http://127.0.0.1:{port}", 20.0)
    command = launch_command(python, checkpoint, port)
    return running_server(command, client, checkpoint, checkpoint.parent / "log", limit_s)


def test_a_replayed_server_runs_until_the_block_ends(replayed, checkpoint, recording, processes_of):
    with run(replayed(), checkpoint) as server:
        assert server.client.model_path() == str(checkpoint)
        assert server.client.version() == recording["found"]["sglang"]
        assert len(processes_of(checkpoint)) == 3
        url = server.client.url
    assert processes_of(checkpoint) == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)


def test_nothing_is_left_of_a_replayed_server_after_an_error(replayed, checkpoint, processes_of):
    with pytest.raises(KeyboardInterrupt), run(replayed(), checkpoint):
        raise KeyboardInterrupt
    assert processes_of(checkpoint) == []


def test_a_slow_replayed_server_is_waited_for(replayed, checkpoint, processes_of):
    with run(replayed("slow"), checkpoint) as server:
        assert server.client.model_path() == str(checkpoint)
    assert processes_of(checkpoint) == []


def test_a_replayed_server_that_never_answers(replayed, checkpoint, processes_of):
    said = r"did not answer within 1 s \(serving.start_timeout\).*; its log is .*log$"
    with pytest.raises(ServerError, match=said), run(replayed("silent"), checkpoint, 1.0):
        pass
    assert processes_of(checkpoint) == []


def test_a_replayed_failure_to_start_is_told_with_its_last_lines(
    replayed, checkpoint, recording, processes_of
):
    with pytest.raises(ServerError) as raised, run(replayed("refuses"), checkpoint):
        pass
    assert processes_of(checkpoint) == []
    # the error in the real log, which is not its last line
    said = "ImportError: Other method (CompressedTensorsW4A16Sparse24) is not supported now"
    assert str(raised.value).startswith(f"the server ended with status 1: {said}; its log is ")
    assert "\n" not in str(raised.value)
    said = [line for line in recording["refused"]["log"] if line.strip()]
    assert list(raised.value.lines) == said[-20:]
    again = pickle.loads(pickle.dumps(raised.value))
    assert (str(again), again.lines) == (str(raised.value), raised.value.lines)


def test_a_replayed_server_that_dies_is_told_as_that(replayed, checkpoint, recording, processes_of):
    tokens = recording["exchanges"][1]["body"]["input_ids"]
    said = "status 9: RuntimeError: CUDA error: device-side assert triggered; its log is"
    with pytest.raises(ServerError, match=said), run(replayed("dies"), checkpoint) as server:
        server.client.token_nll(tokens)
        server.client.token_nll(tokens)
    assert processes_of(checkpoint) == []


def test_a_port_that_is_taken(replayed, checkpoint, processes_of):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = "OSError: .*Address already in use"
        with pytest.raises(ServerError, match=said), run(replayed(), checkpoint, port=port):
            pass
    assert processes_of(checkpoint) == []


def test_another_replayed_server_at_the_port(replayed, checkpoint, processes_of):
    said = "another server answers there, with /another/model; end it"
    with pytest.raises(ServerError, match=said), run(replayed("another"), checkpoint):
        pass
    assert processes_of(checkpoint) == []


def test_a_program_that_is_not_there(checkpoint):
    said = "ended with status 1: FileNotFoundError"
    with pytest.raises(ServerError, match=said), run("/no/such/python", checkpoint):
        pass


def test_free_ports_leave_room_for_those_that_sglang_adds(monkeypatch):
    port = free_port()
    assert port in PORTS and port + 10000 < 65536
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        monkeypatch.setattr(servers, "PORTS", range(port, port + 1))
        with pytest.raises(ServerError, match=f"no port from {port} to {port} is free"):
            free_port()


def test_the_command_listens_here_only():
    command = launch_command("python", Path("/a model"), 30000, 2, ["--dtype", "bfloat16"])
    assert command == [
        *("python", "-m", "sglang.launch_server", "--model-path", "/a model"),
        *("--host", "127.0.0.1", "--port", "30000", "--tp-size", "2", "--dtype", "bfloat16"),
    ]
    assert "--tp-size" not in launch_command("python", Path("x"), 1)


def test_packages_of_this_environment_stay_out_of_another(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("KEPT", "yes")
    other = environment_of("/other/python")
    assert "PYTHONPATH" not in other and other["KEPT"] == "yes"
    assert environment_of(sys.executable) == dict(os.environ)
