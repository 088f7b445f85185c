"""Server, pool, deployments and worker as `make up` starts them: runs, retries, a schedule."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tasks.engine.store import Entry, Store
from tests.integration.resuming import contents
from tests.models import make_checkpoint, make_text
from tests.operations.services import Up, eventually

pytestmark = [pytest.mark.ops, pytest.mark.timeout(600), pytest.mark.xdist_group("services")]

RECIPE = """
calib: {{name: text, path: {text}, n_samples: 4, seq_len: 64}}
eval: {{name: text, path: {text}, windows: 2, seq_len: 64, sample_tokens: 0, report: false}}
quant:
  method: Identity
  quant_out: true
  weight: {{bit: 8, symmetric: true, granularity: per_channel}}
  act: {{bit: 8, symmetric: true, granularity: per_token}}
serving: {{smoke_test: false}}
"""


def recipe_in(folder: Path) -> Path:
    """Write the recipe, with a text of its own."""
    recipe = folder / "recipe.yml"
    recipe.write_text(RECIPE.format(text=make_text(folder / "words.txt", words=3000)))
    return recipe


def work_in(folder: Path, **shape: Any) -> dict[str, str]:
    """Write the recipe and a model, as ``make_checkpoint`` takes its shape."""
    model = make_checkpoint(folder / "model", **shape)
    return {"recipe": str(recipe_in(folder)), "model": str(model)}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A recipe with a model of two blocks, each in shards of its own."""
    return work_in(tmp_path_factory.mktemp("work"), shard_size="200KB")


@pytest.fixture(scope="module")
def deployed(
    up: Up, work: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Parameters of a run that nothing disturbed, and that has ended."""
    folder = tmp_path_factory.mktemp("deployed")
    parameters = work | {"output": str(folder / "out"), "store": str(folder / "store")}
    asked = [f"--param={name}={value}" for name, value in parameters.items()]
    ran = up.run("deployment", "run", "quantize/quantize", "--watch", *asked)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return parameters


def entries(parameters: dict[str, Any]) -> dict[str, Entry]:
    return {entry.key: entry for entry in Store(Path(parameters["store"])).entries()}


def tracked(up: Up, output: str) -> Any:
    """The one MLflow run that made an output."""
    client = MlflowClient(up.mlflow)
    experiment = client.get_experiment_by_name("blockquant")
    (found,) = client.search_runs([experiment.experiment_id], f"params.output = '{output}'")
    return found


def test_a_second_up_changes_nothing(up: Up) -> None:
    before = {p.pid for p in up.processes()}
    # supervisor, two servers, a worker
    assert len(before) == 4
    schedule, mine = nightly_of(up)["schedules"][0]["id"], {"recipe": "awq_w4a16"}
    place = f"deployments/{nightly_of(up)['id']}"
    described = nightly_of(up)["parameters"]
    up.api("PATCH", f"{place}/schedules/{schedule}", json={"active": False})
    up.api("PATCH", place, json={"parameters": described | mine})
    assert started_again(up) == before
    # as an operator left it
    assert not nightly_of(up)["schedules"][0]["active"]
    assert nightly_of(up)["parameters"] == described | mine
    # as if it had been described otherwise when it was deployed
    (up.home / "services" / "deployed.json").unlink()
    assert started_again(up) == before
    assert nightly_of(up)["schedules"][0]["active"]
    assert nightly_of(up)["parameters"] == described


def nightly_of(up: Up) -> Any:
    return up.api("GET", "deployments/name/requantize/nightly")


def started_again(up: Up) -> set[int]:
    """Start what does not run; the processes there are then."""
    again = up.run("up", module="flows.local_services")
    assert again.stdout == f"Prefect: {up.prefect}\nMLflow: {up.mlflow}\n", again.stderr
    return {p.pid for p in up.processes()}


def test_a_deployment_is_run_to_completed(
    up: Up, work: dict[str, str], deployed: dict[str, str], tmp_path: Path
) -> None:
    output = deployed["output"]
    assert tracked(up, output).info.status == "FINISHED"
    # the command line makes the same of it, from nothing
    here = ["--model", work["model"], "--output", tmp_path / "here", "--store", tmp_path / "other"]
    ran = up.run("quantize", work["recipe"], *here, module="flows.cli")
    assert ran.returncode == 0, ran.stderr
    assert contents(Path(output)) == contents(tmp_path / "here")


def test_a_failed_block_is_retried_alone(
    up: Up, work: dict[str, str], deployed: dict[str, str], tmp_path: Path
) -> None:
    transforms = [entry for entry in entries(deployed).values() if entry.task == "transform"]
    key = max(transforms, key=lambda entry: entry.created).key
    output = str(tmp_path / "out")
    parameters = {**work, "output": output, "store": str(tmp_path / "store")}
    # where the second block's transform would lock its result lies a folder
    in_the_way = tmp_path / "store" / "locks" / f"{key}.lock"
    in_the_way.mkdir(parents=True)

    run = up.submit("quantize/quantize", parameters)
    failed = up.ended(run)
    assert failed["state"]["type"] == "FAILED"
    assert "Is a directory" in failed["state"]["message"]
    of_mlflow = tracked(up, output)
    assert of_mlflow.info.status == "FAILED" and key in of_mlflow.data.tags["failure"]
    first = entries(parameters)
    assert Counter(e.task for e in first.values())["quantize"] == 1

    # still in the way: a retry by the command line gets no further, and makes nothing again
    asked = up.run("flow-run", "retry", run)
    assert asked.returncode == 0, asked.stdout + asked.stderr
    assert up.ended(run, after=1)["state"]["type"] == "FAILED"
    assert {k: e.created for k, e in entries(parameters).items()} == {
        k: e.created for k, e in first.items()
    }

    in_the_way.rmdir()
    # as the page's button does
    state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the UI"}
    up.api("POST", f"flow_runs/{run}/set_state", json={"state": state})
    assert up.ended(run, after=2)["state"]["type"] == "COMPLETED"
    then = entries(parameters)
    kept = {k: e.created for k, e in then.items() if k in first}
    assert {k: kept.get(k) for k in kept} == {k: first[k].created for k in kept}
    made = Counter(e.task for k, e in then.items() if k not in first)
    again = ["transform", "quantize", "pack", "outside", "export", "verify", "evaluate"]
    assert made == Counter(again), made
    finished = tracked(up, output)
    assert finished.info.run_id == of_mlflow.info.run_id
    assert finished.info.status == "FINISHED" and "failure" not in finished.data.tags
    # what blockquant says is read on the run's page
    assert_logged(up, {"id": run}, f"published {output}")
    client = MlflowClient(up.mlflow)
    points = client.get_metric_history(finished.info.run_id, "weight_error.mean")
    assert [point.step for point in points] == [0, 1]


def test_the_schedule_fires_and_works_once(up: Up, work: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "nightly"
    parameters = work | {"output": str(output), "store": str(tmp_path / "store")}
    nightly = up.api("GET", "deployments/name/requantize/nightly")
    schedule = {"schedule": {"interval": 10}, "active": True, "parameters": parameters}
    (made,) = up.api("POST", f"deployments/{nightly['id']}/schedules", json=[schedule])
    try:
        first = eventually(lambda: named(up, nightly, "Completed"), "a run that works", 240)
        before, files = entries(parameters), stamps(output)
        second = eventually(lambda: named(up, nightly, "Skipped"), "a run that does nothing")
    finally:
        up.api("DELETE", f"deployments/{nightly['id']}/schedules/{made['id']}")
    assert first["auto_scheduled"] and second["auto_scheduled"]
    assert_logged(up, first, "nothing is published yet")
    assert_logged(up, second, "nothing to do")
    assert entries(parameters) == before and stamps(output) == files
    assert tracked(up, str(output)).info.status == "FINISHED"


def named(up: Up, deployment: dict[str, Any], state: str) -> dict[str, Any] | None:
    body = {"flow_runs": {"deployment_id": {"any_": [deployment["id"]]}}}
    body["flow_runs"]["state"] = {"name": {"any_": [state]}}
    found = up.api("POST", "flow_runs/filter", json=body)
    return found[0] if found else None


def assert_logged(up: Up, run: dict[str, Any], words: str) -> None:
    """Prefect sends logs in batches, some after the run's end."""
    eventually(lambda: any(words in line for line in up.log(run["id"])), words, 20)


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    marks = {str(p): p.stat() for p in folder.rglob("*")}
    return {name: (mark.st_ino, mark.st_mtime_ns) for name, mark in marks.items()}
