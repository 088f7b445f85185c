"""In which order a crew's processes are asked for results, whatever becomes of them.

What real processes make of it is tested in tests/integration/test_several_devices.py.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flows import crew as module
from flows.block_plan import Pass
from flows.crew import Asked, Crew
from flows.shift import Assignment, Round
from tasks.engine.errors import RunError
from tasks.engine.version import SOURCE


@dataclass(eq=False)
class PretendedShift:
    """Notes what it is asked for; says so where it is told to."""

    asked: list[int] = field(default_factory=list)
    promised: dict[int, Future[dict[str, Any]]] = field(default_factory=dict)
    over: bool = False
    raised: bool = False

    def ask(self, at: Round, number: int, block: int, lean: bool) -> Future[dict[str, Any]]:
        assert not self.asked or number > self.asked[-1], "it is told calls in their order"
        self.asked.append(number)
        self.promised[number] = Future()
        return self.promised[number]

    def wait(self, promised: Future[dict[str, Any]]) -> dict[str, Any] | None:
        if self.raised and not (promised.done() and promised.exception() is None):
            return None
        try:
            return promised.result(timeout=0.1)
        except RunError:
            self.raised = True
            raise

    def make(self, *numbers: int) -> None:
        for number in numbers:
            self.promised[number].set_result({"made": str(number)})

    def fail(self) -> None:
        self.over = True
        for promised in self.promised.values():
            if not promised.done():
                promised.set_exception(RunError("a process is gone"))

    def end(self, at_once: bool) -> None:
        assert self.over or at_once


@dataclass
class Pretended:
    """A crew whose processes are pretended, and the results that it is asked for."""

    crew: Crew
    shifts: list[PretendedShift]
    results: list[Asked]

    def took(self, number: int) -> str:
        return str(self.results[number].take())


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pretended:
    shifts: list[PretendedShift] = []

    def begun(*_: object) -> PretendedShift:
        shifts.append(PretendedShift())
        return shifts[-1]

    monkeypatch.setattr(module, "Shift", begun)
    made: Callable[..., Any] = lambda self, job, said: said["made"]  # noqa: E731
    monkeypatch.setattr(Crew, "made", made)
    assignment = Assignment(1, {}, "model", "store", 0, False, False)
    crew = Crew("cuda:0", assignment, tmp_path)
    crew._round = Round(Pass(0, None, SOURCE, (), True), tmp_path)
    job: Any = None
    return Pretended(crew, shifts, [Asked(crew, job, number, number) for number in range(8)])


def test_pretended_processes_are_asked_ahead_and_once(pretended: Pretended) -> None:
    for result in pretended.results[:4]:
        result.ask()
    # one that was damaged is asked for by who finds it and by its task
    pretended.results[3].ask()
    (shift,) = pretended.shifts
    shift.make(0, 1, 2, 3)
    assert [pretended.took(n) for n in (0, 1, 2, 3, 3)] == ["0", "1", "2", "3", "3"]
    assert shift.asked == [0, 1, 2, 3]


def test_what_pretended_processes_lost_is_asked_of_others_before_what_follows(
    pretended: Pretended,
) -> None:
    for result in pretended.results[:5]:
        result.ask()
    first = pretended.shifts[0]
    first.make(0, 3)
    first.fail()
    assert pretended.took(0) == "0"
    with pytest.raises(RunError, match="is gone"):
        pretended.took(1)
    # while its step is tried again, others are planned
    pretended.results[5].ask()
    assert len(pretended.shifts) == 1, "who failed is told first"
    with pytest.raises(TimeoutError):
        # nobody has made it yet
        pretended.took(1)
    second = pretended.shifts[1]
    assert second.asked == [1]
    pretended.results[6].ask()
    assert second.asked == [1, 2, 4, 5, 6], "3 was made before"
    second.make(1, 2, 4, 5, 6)
    assert [pretended.took(n) for n in range(1, 7)] == list("123456")
    assert second.asked == [1, 2, 4, 5, 6] and len(pretended.shifts) == 2


def test_nothing_is_asked_again_where_pretended_processes_fail_between_steps(
    pretended: Pretended,
) -> None:
    for result in pretended.results[:3]:
        result.ask()
    pretended.shifts[0].make(0, 1, 2)
    pretended.shifts[0].fail()
    assert [pretended.took(n) for n in range(3)] == ["0", "1", "2"]
    assert len(pretended.shifts) == 1
    pretended.results[3].ask()
    assert len(pretended.shifts) == 1
    with pytest.raises(TimeoutError):
        pretended.took(3)
    assert pretended.shifts[1].asked == [3]


def test_who_comes_after_pretended_processes_begins_where_they_were(pretended: Pretended) -> None:
    assert pretended.crew.assignment.first
    pretended.results[0].ask()
    assert not pretended.crew.assignment.first
