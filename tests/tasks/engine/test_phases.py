"""Seconds of kinds of work add up to those of the whole."""

from __future__ import annotations

import time

import pytest

from tasks.engine.phases import AHEAD, IDLE, IN_TASK, ORCHESTRATED, WAITED, WRITTEN, Phases


def test_what_is_left_is_orchestration() -> None:
    phases = Phases()
    for kind in (IN_TASK, WAITED, WRITTEN, WRITTEN, AHEAD, IDLE):
        with phases.measured(kind):
            time.sleep(0.02)
    found = phases.of(1.0)
    assert found[WRITTEN] >= 0.04 and min(found.values()) >= 0.02
    # what another process and its device do is not the flow's time
    assert sum(found.values()) - found[AHEAD] - found[IDLE] == pytest.approx(1.0)
    assert found[ORCHESTRATED] == pytest.approx(0.92, abs=0.05)


def test_failures_take_time_too() -> None:
    phases = Phases()
    with pytest.raises(OSError, match="full"), phases.measured(WRITTEN):
        time.sleep(0.02)
        raise OSError("full")
    assert phases.of(1.0)[WRITTEN] >= 0.02
    phases.begin()
    nothing = dict.fromkeys((AHEAD, IDLE, IN_TASK, WAITED, WRITTEN), 0)
    assert phases.of(1.0) == nothing | {ORCHESTRATED: 1.0}
