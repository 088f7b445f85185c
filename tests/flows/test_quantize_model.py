"""What the flow does around its steps."""

from __future__ import annotations

import logging

import pytest

from flows.quantize_model import _failure_kept
from tasks.engine.tracking import Run


def test_the_reason_of_a_failure_is_not_replaced_by_that_of_mlflow(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []

    def fail(self: Run, reason: str) -> None:
        told.append(reason)
        raise ConnectionError("the tracking server is gone")

    monkeypatch.setattr(Run, "fail", fail)
    run = Run("http://127.0.0.1:9", "id", "experiment")
    caplog.set_level(logging.WARNING)
    with pytest.raises(ValueError, match="the real reason"), _failure_kept(run):
        raise ValueError("the real reason")
    assert told == ["ValueError: the real reason"]
    assert "MLflow was not told of the failure: ConnectionError" in caplog.text
