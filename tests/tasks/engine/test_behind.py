"""Work beside the computation: one at a time, and never a failure of the run."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from tasks.engine.behind import Behind


def test_one_work_at_a_time() -> None:
    behind, go, done = Behind(), threading.Event(), []
    assert behind.offer("first", lambda: (go.wait(10), done.append(1))[1])
    assert behind.busy
    assert not behind.offer("second", lambda: done.append(2))
    go.set()
    behind.wait()
    assert not behind.busy
    assert behind.offer("third", lambda: done.append(3))
    behind.wait()
    assert done == [1, 3]


def test_it_rests_after_each_work() -> None:
    behind = Behind(rest_s=60)
    assert behind.offer("first", lambda: None)
    behind.wait()
    assert not behind.busy
    assert not behind.offer("second", lambda: None)
    short = Behind(rest_s=0.01)
    assert short.offer("first", lambda: None)
    short.wait()
    time.sleep(0.02)
    assert short.offer("second", lambda: None)


def test_what_fails_is_said_and_does_not_stop_the_run(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    behind = Behind()
    with caplog.at_level(logging.WARNING, logger="blockquant"):
        behind.offer("block 3: its hidden states", fail)
        behind.wait()
    assert "block 3: its hidden states" in caplog.text and "No space left" in caplog.text
    assert behind.offer("next", lambda: None)


def test_nothing_was_offered() -> None:
    behind = Behind()
    behind.wait()
    assert not behind.busy
