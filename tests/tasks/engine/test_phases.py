"""Seconds of kinds of work add up to those of the whole."""

from __future__ import annotations

import time

import pytest

from tasks.engine.phases import AHEAD, IN_TASK, ORCHESTRATED, WAITED, WRITTEN, Phases


def test_what_is_left_is_orchestration() -> None:
    phases = Phases()
    for kind in (IN_TASK, WAITED, WRITTEN, WRITTEN, AHEAD):
        with phases.measured(kind):
            time.sleep(0.02)
    found = phases.of(1.0)
    assert found[WRITTEN] >= 0.04 and min(found.values()) >= 0.02
    # what another thread does is not the flow's time
    assert sum(found.values()) - found[AHEAD] == pytest.approx(1.0)
    assert found[ORCHESTRATED] == pytest.approx(0.92, abs=0.05)


def test_failures_take_time_too() -> None:
    phases = Phases()
    with pytest.raises(OSError, match="full"), phases.measured(WRITTEN):
        time.sleep(0.02)
        raise OSError("full")
    assert phases.of(1.0)[WRITTEN] >= 0.02
    phases.begin()
    assert phases.of(1.0) == {AHEAD: 0, IN_TASK: 0, WAITED: 0, WRITTEN: 0, ORCHESTRATED: 1.0}
