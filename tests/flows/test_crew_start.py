"""Processes that are started before their job: at once, by who needs them, and never left."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.crew_start import PINNING, Started, apart, started_early, surroundings, take_started
from tests.crews import left_running
from tests.operations.services import eventually


def are_running(count: int) -> bool:
    """Whether so many processes of crews live; one shows its name a moment after it began."""
    return eventually(lambda: len(left_running()) == count, f"{count} processes", 10)


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cpu", False), ("cuda", True), ("cuda:1", True), ("cpu,cpu", True), ("nonsense", False)],
)
def test_which_devices_are_computed_on_by_processes_of_their_own(
    device: str, expected: bool
) -> None:
    assert apart(device) is expected
    with started_early("cpu", True):
        assert left_running() == []


def test_those_that_nobody_takes_are_ended() -> None:
    with started_early("cpu, cpu", True):
        assert are_running(2)
        # one flow within another's command begins no more
        with started_early("cpu,cpu", True):
            assert are_running(2)
    assert left_running() == []


def test_they_are_taken_once_and_by_who_asks_for_the_same_devices() -> None:
    with started_early("cpu,cpu", True):
        others = take_started("cpu,cpu,cpu", True)
        assert are_running(5)
        early = take_started("cpu, cpu", True)
        again = take_started("cpu,cpu", True)
        assert are_running(7) and again is not early
    # who took them ends them
    assert are_running(7)
    for started in (others, early, again):
        started.end()
        # and may say so twice
        started.end()
    assert left_running() == []


def test_what_they_leave_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    started = Started(("cpu",), True)
    assert len(list(tmp_path.iterdir())) == 1
    started.end()
    assert list(tmp_path.iterdir()) == []


def test_one_whose_starter_is_gone_ends_by_itself() -> None:
    started = Started(("cpu",), True)
    (member,) = started.members
    # the pipe that it reads is all that it knows of its starter
    member.close()
    assert member.process.wait(60) == 1
    started.end()


@pytest.mark.parametrize(
    ("device", "own", "expected"),
    [
        ("cuda:1", {}, {"PYTORCH_CUDA_ALLOC_CONF": PINNING}),
        ("cpu", {}, {}),
        ("cuda", {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, {}),
        ("cuda", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {}),
    ],
)
def test_torch_is_told_how_to_lock_memory_unless_the_user_told_it(
    device: str, own: dict[str, str], expected: dict[str, str]
) -> None:
    given = {"HOME": "/home/someone", **own}
    assert surroundings(device, given) == {**given, **expected}
