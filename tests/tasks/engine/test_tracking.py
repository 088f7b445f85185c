"""One MLflow run per work, in a real database: gone on with, never doubled, kept when it failed."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sqlite3
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.store.tracking import sqlalchemy_store

from tasks.engine.errors import InputError, RunError
from tasks.engine.settings import Settings
from tasks.engine.tracking import (
    LONGEST_PARAMETER,
    Point,
    Run,
    client_modules,
    existing_run,
    flatten,
    open_run,
    prepared_client,
)
from tests.places import place_in

PARAMETERS = {"quant.weight.bit": 4, "source": "/models/one", "seed": None, "names": ["a"]}


@pytest.fixture
def opened(place: Settings) -> Callable[..., Run]:
    def make(identity: str = "work", **changes: Any) -> Run:
        given = {"name": "one", "parameters": PARAMETERS, "tags": {"device": "cpu"}}
        return open_run(place, identity, **(given | changes))

    return make


def runs(place: Settings) -> list[Any]:
    client = MlflowClient(place.tracking_uri)
    experiment = client.get_experiment_by_name("blockquant")
    return list(client.search_runs([experiment.experiment_id]))


@pytest.mark.parametrize("uri", ["sqlite:////tmp/mlflow.db", "http://127.0.0.1:9", "databricks"])
def test_what_a_client_loads_is_named(uri: str) -> None:
    named = client_modules(uri)
    assert "mlflow" in named
    assert ("mlflow.store.tracking.sqlalchemy_store" in named) is uri.startswith("sqlite")
    for module in named:
        importlib.import_module(module)


def test_a_run_is_opened_with_all_that_is_known(
    place: Settings, opened: Callable[..., Run]
) -> None:
    run = opened()
    (found,) = runs(place)
    assert (found.info.run_id, found.info.status) == (run.id, "RUNNING")
    assert found.info.run_name == "one"
    assert found.data.params == {
        "quant.weight.bit": "4",
        "source": "/models/one",
        "seed": "null",
        "names": '["a"]',
    }
    assert found.data.tags["device"] == "cpu"
    assert found.data.tags["blockquant.identity"] == "work"
    run.finish()
    assert runs(place)[0].info.status == "FINISHED"


@pytest.mark.parametrize("end", ["killed", "failed"])
def test_work_that_was_not_finished_goes_on_in_its_run(
    place: Settings, opened: Callable[..., Run], end: str
) -> None:
    first = opened()
    if end == "failed":
        first.fail("RunError: the disk is full")
        (failed,) = runs(place)
        assert failed.info.status == "FAILED"
        assert failed.data.tags["failure"] == "RunError: the disk is full"
    other = opened("other work")
    again = opened(tags={"device": "cuda"})
    assert (again.id, again.experiment) == (first.id, first.experiment)
    assert other.id != first.id
    by_id = {run.info.run_id: run for run in runs(place)}
    assert set(by_id) == {first.id, other.id}
    assert by_id[first.id].info.status == "RUNNING"
    assert "failure" not in by_id[first.id].data.tags
    # it may go on elsewhere
    assert by_id[first.id].data.tags["device"] == "cuda"


def test_finished_work_gets_a_run_of_its_own(place: Settings, opened: Callable[..., Run]) -> None:
    first = opened()
    first.finish()
    second = opened()
    assert second.id != first.id
    second.finish()
    # published, and killed before the end: the newest is gone on with
    assert opened(even_finished=True).id == second.id
    assert len(runs(place)) == 2


def test_a_parameter_that_changes_becomes_a_tag(opened: Callable[..., Run]) -> None:
    first = opened()
    again = opened(parameters=PARAMETERS | {"source": "/models/two", "more": 1})
    assert again.id == first.id
    found = again.client().get_run(again.id).data
    assert found.params["source"] == PARAMETERS["source"]
    assert found.params["more"] == "1"
    assert found.tags["resumed.source"] == "/models/two"


def test_points_sent_twice_do_not_double(opened: Callable[..., Run]) -> None:
    run = opened()
    points = [
        Point(f"weight_error.{name}", block + 0.5, block, 1000 + block)
        for name in ("q_proj", "mean")
        for block in range(3)
    ]
    run.log_points(points[:2])
    run.log_points(points)
    run.log_points(reversed(points))
    assert run.known_metrics() == {"weight_error.q_proj", "weight_error.mean"}
    for name in run.known_metrics():
        history = run.client().get_metric_history(run.id, name)
        assert sorted((m.step, m.value, m.timestamp) for m in history) == [
            (0, 0.5, 1000),
            (1, 1.5, 1001),
            (2, 2.5, 1002),
        ]


def test_more_than_a_batch(place: Settings, opened: Callable[..., Run]) -> None:
    many = {f"ignored_layers.{number}": f"layer {number}" for number in range(250)}
    run = opened(parameters=many | {"long": "x" * (LONGEST_PARAMETER + 1)})
    run.log_points(Point(f"error.{number}", float(number), 0, 1000) for number in range(1001))
    run.log_points([])
    (found,) = runs(place)
    assert len(found.data.params) == 251
    assert found.data.params["ignored_layers.249"] == "layer 249"
    assert found.data.params["long"] == "x" * LONGEST_PARAMETER
    assert len(found.data.metrics) == 1001
    assert found.data.metrics["error.1000"] == 1000.0


def test_files_tables_and_inputs_lie_in_the_home(
    place: Settings, opened: Callable[..., Run], tmp_path: Path
) -> None:
    run = opened()
    log = tmp_path / "run.log"
    log.write_text("a line")
    run.log_file(log)
    run.log_file(log, "calibration")
    run.log_table([{"block": 0, "error": 0.5}, {"block": 1, "error": None}], "errors.json")
    run.log_table([], "none.json")
    run.log_input("text", "ab" * 32, {"windows": 4}, "evaluation")
    (folder,) = place.artifact_root.glob("*/artifacts")
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    assert set(files) == {"run.log", "calibration/run.log", "errors.json", "none.json"}
    assert json.loads(files["errors.json"].read_text()) == {
        "columns": ["block", "error"],
        "data": [[0, 0.5], [1, None]],
    }
    (given,) = run.client().get_run(run.id).inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("text", ("ab" * 32)[:36])
    assert json.loads(given.dataset.source) == {"windows": 4}
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "evaluation")]


def test_two_runs_may_tell_of_one_text_at_once(
    opened: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = one, other = opened("one"), opened("other")
    told = ("text", "ab" * 32, {"windows": 4}, "evaluation")
    with monkeypatch.context() as patch:

        def between_look_and_insert() -> uuid.UUID:
            patch.undo()
            other.log_input(*told)
            return uuid.uuid4()

        patch.setattr(sqlalchemy_store, "uuid", SimpleNamespace(uuid4=between_look_and_insert))
        one.log_input(*told)
    inputs = [run.client().get_run(run.id).inputs.dataset_inputs for run in both]
    assert [len(given) for given in inputs] == [1, 1]
    assert inputs[0][0].dataset.digest == inputs[1][0].dataset.digest


def test_a_reason_may_be_long(place: Settings, opened: Callable[..., Run]) -> None:
    opened().fail("x" * 9000)
    (found,) = runs(place)
    assert found.info.status == "FAILED"
    assert set(found.data.tags["failure"]) == {"x"}


# the database


def test_a_database_whose_creation_was_killed_is_made_again(
    tmp_path: Path, prepared_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = place_in(tmp_path / "home")
    (tmp_path / "home").mkdir()
    unfinished = tmp_path / "home" / ".mlflow.db.new"
    # a database without all of its tables, cut, and its journal
    shutil.copy(prepared_home / "mlflow.db", unfinished)
    with sqlite3.connect(unfinished) as half:
        half.execute("DROP TABLE metrics")
        half.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    os.truncate(unfinished, unfinished.stat().st_size // 2)
    (tmp_path / "home" / ".mlflow.db.new-journal").write_bytes(b"half")
    replaced: list[tuple[str, bool]] = []
    replace = os.replace

    def watch(source: Path, target: Path) -> None:
        replaced.append((Path(target).name, Path(target).exists()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    run = open_run(place, "work", "one", PARAMETERS, {})
    run.log_points([Point("error", 1.0, 0, 1000)])
    run.finish()
    assert runs(place)[0].data.metrics == {"error": 1.0}
    # it appeared by one rename, whole
    assert replaced == [("mlflow.db", False)]
    assert not list((tmp_path / "home").glob(".mlflow.db.new*"))


def test_a_database_that_is_there_is_not_touched(place: Settings) -> None:
    first = open_run(place, "work", "one", {}, {})
    prepared_client(place)
    assert [run.info.run_id for run in runs(place)] == [first.id]


# values


@pytest.mark.parametrize(
    ("nested", "flat"),
    [
        ({}, {}),
        ({"a": 1, "b": None}, {"a": 1, "b": None}),
        ({"a": {"b": {"c": 1}, "d": 2}}, {"a.b.c": 1, "a.d": 2}),
        ({"steps": [{"q": 1}, {"q": 2}]}, {"steps.0.q": 1, "steps.1.q": 2}),
        ({"names": ["x", "y"], "none": []}, {"names": ["x", "y"], "none": []}),
        ({"t": ({"q": {"r": 1}},)}, {"t.0.q.r": 1}),
    ],
)
def test_recipes_are_flattened(nested: dict[str, Any], flat: dict[str, Any]) -> None:
    assert flatten(nested) == flat


def test_another_attempt_stands_at_the_next_step(home: Path) -> None:
    run = open_run(place_in(home), "work", "a run", {}, {})

    def attempt(nll: float, time_ms: int) -> None:
        run.log_attempt([Point("served.nll", nll, 0, time_ms), Point("served.n", 5, 0, time_ms)])

    for nll, time_ms in ((3.7, 1), (3.7, 2), (3.5, 3), (3.5, 4)):
        attempt(nll, time_ms)
    history = run.client().get_metric_history(run.id, "served.nll")
    assert [(m.step, m.value) for m in history] == [(0, 3.7), (1, 3.5)]
    assert run.client().get_run(run.id).data.metrics == {"served.nll": 3.5, "served.n": 5}


def test_a_run_of_another_source_is_not_gone_on_in(home: Path) -> None:
    place = place_in(home)

    def opened(**source: str) -> str:
        return open_run(place, "work", "a run", {}, {}, source=source).id

    first = opened(files="one")
    assert opened(files="one", digest="d") == first
    # written again, with the same bytes
    assert opened(files="copied", digest="d") == first
    changed = opened(files="two", digest="e")
    assert changed != first
    assert opened(files="three") not in (first, changed)
    assert opened(files="copied") == first
    assert MlflowClient(place.tracking_uri).get_run(changed).data.tags["source.digest"] == "e"


def test_a_server_that_is_away_is_not_one_without_the_run(home: Path) -> None:
    with pytest.raises(InputError, match="has no such run"):
        existing_run(place_in(home), "0123")
    away = replace(place_in(home), tracking_uri="http://me:pass@127.0.0.1:9")
    with pytest.raises(RunError, match=r"MLflow at http://\*\*\*@127.0.0.1:9 does not answer"):
        existing_run(away, "0123")
