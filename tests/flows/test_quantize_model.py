"""What the flow does around its steps."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from flows.tracked import failure_kept
from tasks.engine.journal import ToldRun
from tasks.engine.messages import Journal
from tasks.engine.settings import Settings


def test_the_reason_of_a_failure_is_not_replaced_by_that_of_mlflow(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    told: list[str] = []

    def fail(self: ToldRun, reason: str) -> None:
        told.append(reason)
        raise OSError("the disk is full")

    monkeypatch.setattr(ToldRun, "fail", fail)
    place = Settings(tmp_path / "store", "http://127.0.0.1:9", tmp_path / "a", tmp_path / "p")
    run = ToldRun(place, Journal(tmp_path / "journal.sqlite"))
    caplog.set_level(logging.WARNING)
    with pytest.raises(ValueError, match="the real reason"), failure_kept(run):
        raise ValueError("the real reason")
    assert told == ["ValueError: the real reason"]
    assert "MLflow is not told of the failure: OSError" in caplog.text
