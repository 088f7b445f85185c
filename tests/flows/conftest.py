"""Two ways to run the command line: in this process, for speed, and in one of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, Outcome

# what the command sets for itself: a process that is to show its own defaults must not inherit it
OWN_DEFAULTS = ("PREFECT_", "MLFLOW_", "DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY", "BLOCKQUANT_")


def bare_environment(**more: str) -> dict[str, str]:
    """The environment of a user who set nothing; hubs stay out of reach."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(OWN_DEFAULTS)}
    return kept | {"PYTHONPATH": str(ROOT)} | more


def command(*arguments: object) -> list[str]:
    """The command line as a process."""
    return [sys.executable, "-m", "flows.cli", *map(str, arguments)]


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder with its size and time of change; folders with neither."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        mark = (status.st_size, status.st_mtime_ns) if path.is_file() else (0, 0)
        found[str(path.relative_to(folder))] = mark
    return found


@pytest.fixture
def here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Run the command line in this process, from ``tmp_path/work``; the home is not there yet."""
    from flows.cli import main

    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("BLOCKQUANT_HOME", str(tmp_path / "home"))
    for name in ("BLOCKQUANT_STORE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    # the command sets these where they are not set; monkeypatch takes them back
    monkeypatch.setenv("PREFECT_HOME", os.environ.get("PREFECT_HOME", str(tmp_path / "home/p")))
    monkeypatch.setenv("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["blockquant", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capfd.readouterr()
        assert isinstance(stopped.value.code, int)
        return Outcome(stopped.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def bare(tmp_path: Path) -> Callable[..., Outcome]:
    """Run the command line in a process of its own with an environment that sets nothing."""

    def run(*arguments: object, home: Path, cwd: Path, limit: float = 240) -> Outcome:
        done = subprocess.run(
            command(*arguments),
            cwd=cwd,
            env=bare_environment(BLOCKQUANT_HOME=str(home)),
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[..., Path]:
    """Copy a checkpoint into the test's own folder, to be damaged there."""

    def copy(source: Path, name: str = "model") -> Path:
        return Path(shutil.copytree(source, tmp_path / name))

    return copy
