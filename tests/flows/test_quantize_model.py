"""What the flow does around its steps."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from flows.tracked import failure_kept
from tasks.engine import delivery
from tasks.engine.journal import ToldRun
from tasks.engine.messages import Journal, journals
from tasks.engine.served_windows import WINDOWS
from tasks.engine.settings import Settings
from tasks.engine.tracking import Point


def short(words: Path, *more: str) -> list[str]:
    """Overrides of a run that is over soon: two small windows, nothing drawn or served."""
    evaluated = f"eval={{name: text, path: {words}, windows: 2, seq_len: 32, report: false}}"
    return ["serving.smoke_test=false", evaluated, *more]


def sets(overrides: Iterable[str]) -> tuple[str, ...]:
    """Overrides as a command takes them."""
    return tuple(part for each in overrides for part in ("--set", each))


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


def test_a_source_that_changed_in_place_has_a_run_of_its_own(
    here, services, home: Path, tiny: Path, words: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    given = ("rtn_w4a16", "--model", model, "--output", tmp_path / "out", "--json")
    given += sets(short(words, "serving.check_kernels=false"))
    # published, and not ended
    failed = here("quantize", *given, "--upload", "file:///proc/nowhere")
    assert failed.status == 1
    file = model / "model.safetensors"
    written = load_file(file)
    name = sorted(name for name in written if "down_proj" in name)[-1]
    save_file(written | {name: written[name].roll(1, 1)}, file, metadata={"format": "pt"})
    refused = here("quantize", *given)
    assert refused.status == 2 and "exists already" in refused.err
    done = here("quantize", *given, "--overwrite")
    assert done.status == 0, done.err
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("blockquant")
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    assert [run.info.status for run in found] == ["FAILED", "FINISHED"]
    assert len({run.data.metrics["weight_error.mean"] for run in found}) == 2
    for run in found:
        for metric in run.data.metrics:
            steps = [m.step for m in client.get_metric_history(run.info.run_id, metric)]
            assert len(steps) == len(set(steps)), metric


def test_errors_of_blocks_are_told_as_they_are_made_and_together_where_they_are_found(
    here, services, tiny: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[set[int]] = []
    log_points = ToldRun.log_points

    def noted(self: ToldRun, points: Iterable[Point]) -> None:
        listed = list(points)
        if any(point.name == "weight_error.mean" for point in listed):
            told.append({point.step for point in listed})
        log_points(self, listed)

    monkeypatch.setattr(ToldRun, "log_points", noted)
    given = ("rtn_w4a16", "--model", tiny, "--output", tmp_path / "out", "--overwrite")
    given += sets(short(words, "gate.registry=false"))
    given += ("--set", "quant.weight.group_size=64")
    assert here("quantize", *given).status == 0
    assert told == [{0}, {1}]
    told.clear()
    assert here("quantize", *given).status == 0
    assert told == [{0, 1}]


@pytest.mark.parametrize("kl", [9, 0])
def test_a_decision_that_comes_while_the_end_is_told_is_followed(
    here, services, tiny: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kl
) -> None:
    fast = short(words)
    fast += ["gate.max_nll_increase=9", "gate.min_top1_agreement=0"]
    fast += [f"gate.against_champion.{name}=9" for name in ("kl", "nll_increase")]
    fast += ["gate.against_champion.top1_agreement=1"]
    out, kept = tmp_path / "out", tmp_path / "uploaded"

    def quantized(*overrides: str):
        given = ("rtn_w4a16", "--model", tiny, "--output", out, "--overwrite", "--json")
        given += sets([*fast, *overrides])
        return here("quantize", *given, "--upload", f"file://{kept}")

    first = quantized("gate.max_kl=9").json
    assert first["gate"]["champion"] is True
    # a slow server: it decides once the run's end is told too
    ended = threading.Event()
    decide, flush, finish = delivery.offer, ToldRun.flush, ToldRun.finish

    def slow(*given: Any) -> Any:
        assert ended.wait(60)
        return decide(*given)

    def finished(self: ToldRun) -> None:
        finish(self)
        ended.set()

    monkeypatch.setattr(delivery, "offer", slow)
    monkeypatch.setattr(ToldRun, "finish", finished)
    monkeypatch.setattr(
        ToldRun, "flush", lambda self: flush(self) if ended.is_set() else self.journal.count()
    )
    outcome = quantized("quant.weight.group_size=64", f"gate.max_kl={kl}")
    assert outcome.status == 0, outcome.err
    found = outcome.json
    assert f"{found['checkpoint']} " in f"{found['launch']} " and found["mlflow"]["left"] == 0
    assert Path(found["checkpoint"]).is_dir() and found["gate"]["location"] == found["checkpoint"]
    client = MlflowClient(found["mlflow"]["uri"])
    tags = client.get_run(found["mlflow"]["run"]).data.tags
    assert tags["checkpoint"] == found["checkpoint"]
    if kl:
        assert found["gate"]["champion"] is True and found["checkpoint"] == str(out)
        assert f"{out}: it lies there now" in outcome.err
        assert found["uploaded"]["sent"] > 0 and tags["uploaded"] == f"file://{kept}"
    else:
        assert found["gate"]["champion"] is False and found["checkpoint"] != str(out)
        assert found["uploaded"] is None
    assert (kept / "blockquant.json").read_bytes() == (out / "blockquant.json").read_bytes()
    # it is done: the next run finds the output in its way
    assert not list((tmp_path / "home" / "store" / "publishing").glob("*"))


def test_the_nightly_flow_sends_what_another_night_could_not(
    services, home: Path, tiny: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.requantize import requantize

    fast = short(words, "serving.check_kernels=false")
    output = str(tmp_path / "out")

    def night() -> None:
        requantize("rtn_w4a16", str(tiny), output, fast, store=str(home / "store"))

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    night()
    (left,) = journals(home / "store")
    assert left.count() > 3
    made = (tmp_path / "out").stat().st_ino
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    night()
    assert journals(home / "store") == []
    assert (tmp_path / "out").stat().st_ino == made
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("blockquant")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"


def test_the_nightly_flow_publishes_what_its_recipe_asks_for_now(
    services, home: Path, tiny: Path, words: Path, tmp_path: Path
) -> None:
    from flows.requantize import requantize

    fast = short(words, "serving.check_kernels=false")
    out = tmp_path / "out"

    def night(*more: str) -> str | None:
        given = ("rtn_w4a16", str(tiny), str(out), [*fast, "gate.registry=false", *more])
        return requantize(*given, store=str(home / "store"), return_state=True).name

    transformed, both = ("save.save_trans=true", "save.save_sgl=false"), ("save.save_trans=true",)
    assert night(*transformed) == "Completed"
    assert not (out / "config.json").exists()
    assert night(*transformed) == "Skipped"
    assert night(*both) == "Completed"
    assert (out / "config.json").is_file() and (out / "transformed_model/config.json").is_file()
    assert night(*both) == "Skipped"
    assert (out / WINDOWS).is_file()
    assert night(*both, "serving.windows=0") == "Completed"
    assert not (out / WINDOWS).exists()
    assert night(*both, "serving.windows=0") == "Skipped"
