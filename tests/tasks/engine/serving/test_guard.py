"""What is started ends with its starter, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.engine.serving import guard

# a server that starts two workers, one of which leaves its process group, and says when it is up
SERVER = """
import os, pathlib, subprocess, sys, time
wait = "import os, sys, time; os.setsid() if sys.argv[2] == 'leaves' else 0; time.sleep(600)"
for how in ("stays", "leaves"):
    subprocess.Popen([sys.executable, "-c", wait, sys.argv[1], how])
pathlib.Path(sys.argv[1], "up").touch()
time.sleep(float(sys.argv[2]))
sys.exit(7)
"""


def command(folder: Path, seconds: float) -> list[str]:
    server = [sys.executable, "-c", SERVER, str(folder), str(seconds)]
    return [sys.executable, "-I", guard.__file__, *server]


def start(folder: Path, seconds: float) -> subprocess.Popen[bytes]:
    started = subprocess.Popen(
        command(folder, seconds), stdin=subprocess.PIPE, start_new_session=True
    )
    wait_for(lambda: (folder / "up").exists())
    return started


def wait_for(condition, limit_s: float = 20.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, processes_of):
    yield
    wait_for(lambda: processes_of(tmp_path) == [])


def test_the_status_is_the_commands_and_its_workers_end_with_it(tmp_path, processes_of):
    started = start(tmp_path, 0.2)
    assert started.wait(timeout=20) == 7
    assert processes_of(tmp_path) == []


def test_closing_its_input_ends_it(tmp_path, processes_of):
    started = start(tmp_path, 600)
    assert len(processes_of(tmp_path)) == 4
    assert started.stdin is not None
    started.stdin.close()
    assert started.wait(timeout=20) == 128 + signal.SIGTERM
    assert processes_of(tmp_path) == []


def test_a_killed_starter_takes_it_along(tmp_path, processes_of):
    starter = f"""
import subprocess, time
subprocess.Popen({command(tmp_path, 600)!r}, stdin=subprocess.PIPE, start_new_session=True)
time.sleep(600)
"""
    started = subprocess.Popen([sys.executable, "-c", starter])
    wait_for(lambda: (tmp_path / "up").exists())
    started.kill()
    started.wait()
    wait_for(lambda: processes_of(tmp_path) == [])


def test_a_killed_guard_takes_the_server_along(tmp_path, processes_of):
    started = start(tmp_path, 600)
    started.kill()
    started.wait()
    # the workers of a real server watch it themselves
    wait_for(lambda: len(processes_of(tmp_path)) == 2)
    for line in processes_of(tmp_path):
        assert "server" not in line
    subprocess.run(["pkill", "-KILL", "-f", str(tmp_path)], check=True)


def test_a_command_that_is_not_there_leaves_nothing(tmp_path):
    asked = [sys.executable, "-I", guard.__file__, str(tmp_path / "no-such-program")]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1
    assert "FileNotFoundError" in done.stderr


def test_an_ended_process_is_waited_for():
    # a dead child that nobody waited for would be listed
    child = os.fork()
    if child == 0:
        os._exit(0)
    wait_for(lambda: child in guard._children())
    os.waitpid(child, 0)
    assert child not in guard._children()
