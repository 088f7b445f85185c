"""Processes of crews that live."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from flows.crew import Crew
from tasks.engine.job import Job

ROOT = Path(__file__).parent.parent

# what a process of a crew is made to believe where there is no GPU: results stay in its memory
PRETENDED = """
from tasks.engine.job import Job
Job.on_gpu = property(lambda job: True)
"""


def left_running() -> list[psutil.Process]:
    """Those that this process, or one of its children, has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "flows.crew_member" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def beside_a_gpu(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process and its crew take the CPU for a GPU; the crew runs some code first."""
    monkeypatch.setattr(Job, "on_gpu", property(lambda job: True))
    monkeypatch.setattr(Crew, "ahead", True)
    made_to_run(PRETENDED + code, folder, monkeypatch)


def made_to_run(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have processes that are started from now on run some code before all else."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    paths = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
