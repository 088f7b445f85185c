"""What is told of a failure in another process, and which of several is the cause."""

from __future__ import annotations

import errno
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import flows.crew_start
from flows.crew_process import LISTENER, LOST, OTHER, Failure, Process, worst_of
from flows.crew_start import Member, Seat
from tasks.engine.disk import is_full
from tasks.engine.errors import InputError, RunError
from tasks.engine.residency import ran_out_of_memory
from tests.operations.services import eventually


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (RunError("block 3: its output holds NaN"), RunError),
        (InputError("model: no such folder"), InputError),
        (OSError(errno.EIO, "Input/output error"), OSError),
        (SafetensorError("header cut"), OSError),
        (ValueError("shapes differ"), RunError),
    ],
)
def test_an_error_is_raised_as_what_it_was(raised: Exception, kind: type[Exception]) -> None:
    found = Failure.of(raised).error()
    assert isinstance(found, kind)
    assert str(raised.args[-1]) in str(found)


def test_a_full_device_and_a_full_disk_are_known_as_such() -> None:
    assert ran_out_of_memory(Failure.of(torch.OutOfMemoryError("CUDA out of memory.")).error())
    assert ran_out_of_memory(Failure.of(MemoryError()).error())
    assert is_full(Failure.of(OSError(errno.ENOSPC, "No space left on device")).error())


def test_the_cause_is_told_and_not_what_it_led_to() -> None:
    gone = Failure(OTHER, "RuntimeError: connection closed by peer")
    lost = Failure(LOST, "the process on cuda:1 ended (-9)")
    full = Failure.of(torch.OutOfMemoryError("CUDA out of memory."))
    assert isinstance(worst_of([gone, lost]), ChildProcessError)
    assert isinstance(worst_of([gone, lost, full]), MemoryError)
    assert isinstance(worst_of([gone]), RunError)
    assert gone.vague and lost.vague and not full.vague


# as a member of the crew does, in the file whose number it is given last
SAYING = "import os, sys\nsay = lambda line: os.write(int(sys.argv[-1]), line)\n"


@pytest.fixture
def heard() -> list[Any]:
    return []


def process(script: str, heard: list[Any], logs: Path, patch: pytest.MonkeyPatch) -> Process:
    """A process that runs a script in place of a member of the crew."""
    # `python -m flows.crew_member SEAT` with another program
    patch.setattr(flows.crew_start.sys, "executable", str(script))
    folder = logs.with_name("crew")
    folder.mkdir()
    member = Member(Seat(1, ("cuda", "cpu"), str(folder / "meeting"), True), folder)
    return Process(member, logs, heard.append)


def all_is_heard() -> None:
    """Wait until the threads that listen to processes are through."""
    for listener in [each for each in threading.enumerate() if each.name.startswith(LISTENER)]:
        listener.join(30)
        assert not listener.is_alive()


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "script"
    path.write_text("")
    path.chmod(0o755)
    yield path


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('say(b\'{"made": "k"}\\n\')', [{"made": "k"}]),
        (
            'say(b\'{"failed": {"kind": "run", "said": "no"}}\\n\'); raise SystemExit(1)',
            [Failure("run", "no")],
        ),
        ("print('what a library prints')", []),
    ],
)
def test_what_a_process_says_is_heard(
    tmp_path: Path,
    script: Path,
    heard: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    body: str,
    expected: list[Any],
) -> None:
    script.write_text(f"#!{sys.executable}\n{SAYING}{body}\n")
    running = process(str(script), heard, tmp_path / "logs", monkeypatch)
    assert running.ended(30)
    all_is_heard()
    assert heard == expected
    running.kill()
    assert not (tmp_path / "logs").exists(), "kept though nothing was lost"


def test_one_that_is_killed_as_it_says_something_is_lost(
    tmp_path: Path, script: Path, heard: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = 'say(b\'{"made": "k"}\\n{"made": "an\'); os.kill(os.getpid(), 9)'
    script.write_text(f"#!{sys.executable}\n{SAYING}{body}\n")
    running = process(str(script), heard, tmp_path / "logs", monkeypatch)
    all_is_heard()
    said, failure = heard
    assert said == {"made": "k"}
    assert failure.kind == LOST and "ended (-9)" in failure.said
    running.kill()


def test_the_last_words_of_a_process_that_died(
    tmp_path: Path, script: Path, heard: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    script.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('driver: no such device')\n")
    running = process(str(script), heard, tmp_path / "logs", monkeypatch)
    eventually(lambda: heard, "its end", 30)
    (failure,) = heard
    assert failure.kind == LOST
    assert "the process on cpu ended (1): driver: no such device; see " in failure.said
    # told after its end, nothing happens
    running.tell(["{}"])
    running.kill()
    assert len(list((tmp_path / "logs").iterdir())) == 1, "what it said is kept"
