"""``blockquant compare`` and ``blockquant status`` on runs that MLflow really has."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.looking_cli import FLOW_RUNS, _figure
from tasks.engine.settings import settings
from tasks.engine.tracking import Point, Run, open_run
from tests.conftest import Outcome
from tests.places import new_home

Here = Callable[..., Outcome]


@pytest.fixture
def tracked(here: Here, tmp_path: Path, prepared_home: Path) -> list[Run]:
    """Three runs: two of one name, the third failed."""
    new_home(tmp_path / "home", prepared_home)
    runs = []
    for number, name in enumerate(("model W4A16", "model W4A16", "model W8A8")):
        parameters = {"quant.method": "RTN", "quant.weight.bit": 4 * (1 + number // 2)}
        output = str(tmp_path / f"out-{number}")
        run = open_run(
            settings(), f"w{number}", name, parameters | {"output": output}, {}, time_ms=number + 1
        )
        run.log_points(
            [Point("eval.kl", 0.01 * (number + 1), 0, 1), Point("weight_error.mean", 1.0, 0, 1)]
        )
        run.set_tags({"checkpoint": output, "scheme": name.split()[1]})
        run.finish() if number < 2 else run.fail("no reason")
        runs.append(run)
    return runs


def test_runs_side_by_side(here: Here, tracked: list[Run], tmp_path: Path) -> None:
    asked = (tracked[0].id, tmp_path / "out-1", "model W8A8", tracked[2].id[:12])
    outcome = here("compare", *asked, "--json")
    assert outcome.status == 0, outcome.err
    found = outcome.json
    expected = [tracked[number].id for number in (0, 1, 2, 2)]
    assert [run["run"] for run in found["runs"]] == expected
    assert [run["status"] for run in found["runs"]] == ["FINISHED", "FINISHED", "FAILED", "FAILED"]
    assert found["recipe"] == {"quant.weight.bit": ["4", "4", "8", "8"]}
    assert found["figures"] == {"eval.kl": pytest.approx([0.01, 0.02, 0.03, 0.03])}
    shown = here("compare", *asked[:3])
    assert shown.status == 0
    assert any(
        all(f in line for f in ("eval.kl", "0.01", "0.02", "0.03"))
        for line in shown.out.splitlines()
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, ""),
        (3.0, "3"),
        (-128, "-128"),
        (0.0123456, "0.012346"),
        (float("nan"), "nan"),
        (sys.float_info.max, "1.7977e+308"),
    ],
)
def test_how_a_figure_is_shown(value: float | None, shown: str) -> None:
    assert _figure(value) == shown


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["model W4A16", "model W8A8"], "2 runs are meant"),
        (["nothing", "model W8A8"], "run nothing: no such run in MLflow"),
        (["model W8A8"], "one run is no comparison"),
    ],
)
def test_what_is_not_compared(here: Here, tracked: list[Run], asked: list[str], says: str) -> None:
    outcome = here("compare", *asked)
    assert (outcome.status, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    assert says in line


def test_to_compare_makes_no_database(here: Here, tmp_path: Path) -> None:
    assert here("compare", "abcd", "efgh").status == 2
    assert not (tmp_path / "home").exists()


def test_what_ended_last(here: Here, tracked: list[Run]) -> None:
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        found = here("status", "--json").json
    assert found["last"]["run"] == tracked[1].id
    assert found["last"]["kl"] == pytest.approx(0.02)
    assert (found["running"], found["left"], found["prefect"]) == ([], [], None)
    shown = here("status")
    assert "nothing is running in this store" in shown.out
    assert f"last finished: model W4A16 ({tracked[1].id})" in shown.out


def test_flow_runs_of_a_server(here: Here, services: dict[str, str]) -> None:
    """The newest one comes first, before all that killed runs left and schedules made."""
    from prefect.client.orchestration import get_client
    from prefect.flows import Flow
    from prefect.states import Completed, Running, Scheduled

    later = datetime.now(UTC) + timedelta(days=1)
    made = [("left", Running())] * FLOW_RUNS + [("nightly", Scheduled(scheduled_time=later))]
    made += [("under way", Running()), ("done", Completed())]
    at = temporary_settings({PREFECT_API_URL: services["PREFECT_API_URL"]})
    with at, get_client(sync_client=True) as client:
        runs = [
            client.create_flow_run(Flow(lambda: None, name="looked-at"), name=name, state=state)
            for name, state in made
        ]
        found = here("status", "--json").json["prefect"]
        for run in runs:
            client.delete_flow_run(run.id)
    assert found[0] == {"id": str(runs[-2].id), "name": "under way", "state": "Running"}
    assert [run["name"] for run in found[1:]] == ["left"] * (FLOW_RUNS - 1)


def test_servers_that_are_away_are_said(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        outcome = here("status", "--json")
    assert outcome.status == 0, outcome.err
    assert outcome.json["mlflow"].startswith("no answer: ")
    assert outcome.json["prefect"].startswith("no answer: ")


@pytest.mark.parametrize("command", [("champion",), ("compare", "one", "other")])
def test_a_tracking_server_that_is_away_is_one_line(
    here: Here, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://name:word@127.0.0.1:9")
    outcome = here(*command)
    (line,) = outcome.err.splitlines()
    assert outcome.status == 1
    assert line.startswith("blockquant: MLflow at http://***@127.0.0.1:9 cannot be asked (")
    assert line.endswith("); start it, or set MLFLOW_TRACKING_URI") and "word" not in line
