"""Processes of a sweep's children: that they end with the one that started them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flows.child_pool import END_S, _Interrupt, uninterrupted
from tests.conftest import ROOT
from tests.operations.services import eventually


def test_a_process_ends_when_the_one_that_started_it_is_killed(tmp_path: Path) -> None:
    code = "import sys; from tests.flows.waiting import *; start(Path(sys.argv[1]))"
    starter = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    eventually((tmp_path / "begun").exists, "a child that waits", 60)
    child = psutil.Process(int((tmp_path / "begun").read_text()))
    starter.kill()
    starter.wait()

    def ended() -> bool:
        # one that nobody waits for may stay as a zombie
        return not child.is_running() or child.status() == "zombie"

    eventually(ended, "the child's end", END_S + 10)
    assert ended()
    assert (tmp_path / "interrupted").exists()


def test_an_interrupt_comes_only_where_work_waits_for_it() -> None:
    interrupt = _Interrupt()
    with interrupt.wait():
        pass
    interrupt()
    # nor does any work begin after it
    with pytest.raises(KeyboardInterrupt), interrupt.wait():
        pytest.fail("began")
    interrupt = _Interrupt()
    with pytest.raises(KeyboardInterrupt), interrupt.wait():
        interrupt()
        pytest.fail("went on")
    interrupt.awaited = True
    # the second of two is not heard
    interrupt()


def test_processes_begin_without_hearing_of_the_terminal() -> None:
    code = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))"
    with uninterrupted():
        blocked = subprocess.check_output([sys.executable, "-c", code], text=True)
    after = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert (blocked, after) == ("True\n", "False\n")
