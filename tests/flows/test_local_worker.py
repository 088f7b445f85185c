"""A worker whose event loop stands still ends, and says where; one that waits or works does not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT

LIMIT_S = 2.0
PROGRAM = """
import asyncio, time
from flows.local_worker import ending_when_stuck

async def work():
    {work}

asyncio.run(ending_when_stuck(work(), {limit}))
print("ended by itself")
"""
# a ring of contexts, as it is walked where a task of anyio ends
RING = """
    ring = asyncio.CancelledError()
    ring.__context__ = other = asyncio.CancelledError()
    other.__context__ = ring
    while isinstance(ring.__context__, asyncio.CancelledError):
        ring = ring.__context__
"""


def ran(work: str) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(work=work.strip(), limit=LIMIT_S)
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("stuck", [RING, "time.sleep(600)"], ids=["ring", "asleep"])
def test_an_event_loop_that_stands_still_ends_the_process(stuck: str) -> None:
    done = ran(stuck)
    assert done.returncode == 1 and done.stdout == ""
    assert "most recent call first" in done.stderr and "in work" in done.stderr


@pytest.mark.parametrize(
    "turn", ["await asyncio.sleep(0.2)", "time.sleep(0.2); await asyncio.sleep(0)"]
)
def test_one_that_turns_goes_on(turn: str) -> None:
    done = ran(f"for _ in range({15 * LIMIT_S:.0f}): {turn}")
    assert (done.returncode, done.stdout) == (0, "ended by itself\n"), done.stderr


def test_a_failure_is_the_worker_s_own() -> None:
    done = ran("raise ValueError('made to fail')")
    assert done.returncode == 1 and "ValueError: made to fail" in done.stderr
