"""A stand-in for SGLang that says what a real server said once; tests/conftest.py has it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.engine.serving import gpus

HERE = Path(__file__).parent / "tasks" / "engine" / "serving"
RECORDING = HERE / "sglang-0.5.15.json"


@pytest.fixture(scope="session")
def recording() -> dict[str, Any]:
    """What the real server said."""
    found: dict[str, Any] = json.loads(RECORDING.read_text(encoding="utf-8"))
    return found


@pytest.fixture
def replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """An interpreter that serves the recording; told what is to go wrong. Nothing of it stays."""

    # a GPU that there is not, which other tests use too
    monkeypatch.setattr(gpus, "LOCKS", tmp_path / "gpus")

    def interpreter(how: str = "") -> str:
        monkeypatch.setenv("REPLAY_RECORDING", str(RECORDING))
        monkeypatch.setenv("REPLAY_HOW", how)
        script = tmp_path / "python-with-sglang"
        command = f'exec "{sys.executable}" "{HERE / "replay.py"}" "$@"'
        script.write_text(f"#!/bin/sh\n{command}\n", encoding="utf-8")
        script.chmod(0o755)
        return str(script)

    yield interpreter
    assert left_of(tmp_path) == []


@pytest.fixture
def processes_of() -> Callable[[Path], list[str]]:
    """Find the processes that name a folder."""
    return left_of


def left_of(folder: Path) -> list[str]:
    """Command lines of processes that name a folder: servers, and what those started."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if str(folder) in line and process.pid != os.getpid():
            found.append(line)
    return found
