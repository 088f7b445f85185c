"""What `make up` starts, and how it ends: who may ask, and what is left of runs under way."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from mlflow import MlflowClient

from flows.local_runs import LOST
from tests.operations.services import Up, eventually
from tests.operations.test_deployments import work_in

pytestmark = [pytest.mark.ops, pytest.mark.timeout(600), pytest.mark.xdist_group("services")]

# of a run that is still under way when it is ended
BLOCKS = 200


@pytest.fixture(scope="module")
def long_work(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A recipe with a model of many blocks."""
    return work_in(tmp_path_factory.mktemp("long"), blocks=BLOCKS)


def under_way(up: Up, work: dict[str, str], folder: Path) -> tuple[str, str]:
    """Have the nightly work; the ids of its run in Prefect and in MLflow."""
    output = str(folder / "out")
    parameters = work | {"output": output, "store": str(folder / "store")}
    run = up.submit("requantize/nightly", parameters)
    client = MlflowClient(up.mlflow)

    def found() -> str | None:
        experiment = client.get_experiment_by_name("blockquant")
        if experiment is None:
            return None
        runs = client.search_runs([experiment.experiment_id], f"params.output = '{output}'")
        return runs[0].info.run_id if runs else None

    return run, eventually(found, "the run in MLflow")


def slots(up: Up) -> int:
    """How many slots of the nightly's limit are taken."""
    nightly = up.api("GET", "deployments/name/requantize/nightly")
    taken = nightly["global_concurrency_limit"]["active_slots"]
    assert isinstance(taken, int)
    return taken


def answered(up: Up) -> int | None:
    """How many slots are taken, None where the server does not answer yet."""
    with suppress(httpx.HTTPError):
        return slots(up)
    return None


def up_again(up: Up) -> None:
    again = up.run("up", module="flows.local_services")
    assert again.stdout == f"Prefect: {up.prefect}\nMLflow: {up.mlflow}\n", again.stderr


def expire(leases: Path) -> None:
    """Let every lease end now: five minutes are long for a test."""
    past = datetime(2000, 1, 1, tzinfo=UTC).isoformat()
    index = leases / "expirations.json"
    for lease in json.loads(index.read_text()):
        path = leases / f"{lease}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"expiration": past}))
    index.write_text(json.dumps(dict.fromkeys(json.loads(index.read_text()), past)))


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=20)


def test_after_all_was_killed_a_run_under_way_has_crashed(
    up: Up, long_work: dict[str, str], tmp_path: Path
) -> None:
    run, tracked = under_way(up, long_work, tmp_path)
    assert slots(up) == 1
    kill(up.processes())
    up_again(up)
    state = up.api("GET", f"flow_runs/{run}")["state"]
    assert (state["type"], state["message"]) == ("CRASHED", LOST)
    assert slots(up) == 0
    client = MlflowClient(up.mlflow)
    assert client.get_run(tracked).info.status == "RUNNING"
    assert up.run("sync", "--store", tmp_path / "store", module="flows.cli").returncode == 0
    assert client.get_run(tracked).info.status == "FAILED"


def test_a_slot_is_free_again_after_a_run_its_worker_and_the_server_were_killed(
    up: Up, long_work: dict[str, str], tmp_path: Path
) -> None:
    under_way(up, long_work, tmp_path)
    kill([p for p in up.processes() if "supervisord" not in " ".join(p.cmdline())])
    # the new server knows who had it
    assert eventually(lambda: answered(up), "the server", 60) == 1
    expire(up.home / "prefect" / "concurrency_leases")
    eventually(lambda: answered(up) == 0, "a slot that is free", 60)


def test_runs_under_way_end_before_the_servers(
    up: Up, long_work: dict[str, str], tmp_path: Path
) -> None:
    run, tracked = under_way(up, long_work, tmp_path)
    assert up.run("down", module="flows.local_services").stdout == "ended\n"
    assert up.processes() == []
    up_again(up)
    assert up.api("GET", f"flow_runs/{run}")["state"]["type"] == "CRASHED"
    assert MlflowClient(up.mlflow).get_run(tracked).info.status == "FAILED"
    assert slots(up) == 0


def test_a_run_beside_the_servers_keeps_its_artifacts(up: Up, tmp_path: Path) -> None:
    # a home that servers made, and a command that is told of none
    alone = {k: v for k, v in up.env.items() if k not in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL")}
    work = work_in(tmp_path)
    asked = ("quantize", work["recipe"], "--model", work["model"], "--json")
    beside = replace(up, env=alone)
    done = beside.run(*asked, "--output", tmp_path / "out", module="flows.cli")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["mlflow"]
    assert told["uri"].startswith("sqlite:") and told["left"] == 0
    client = MlflowClient(up.mlflow)
    assert client.get_run(told["run"]).info.status == "FINISHED"
    assert "recipe.yml" in {file.path for file in client.list_artifacts(told["run"])}
    # as MLflow's page asks for it
    shown = {"path": "recipe.yml", "run_uuid": told["run"]}
    assert "Identity" in httpx.get(f"{up.mlflow}/get-artifact", params=shown).text


def test_no_page_but_prefect_s_own_may_ask_its_api(up: Up) -> None:
    def allowed(origin: str) -> str | None:
        return preflight(up.prefect, origin).headers.get("access-control-allow-origin")

    port = httpx.URL(up.prefect).port
    for own in (f"http://127.0.0.1:{port}", f"http://localhost:{port}"):
        assert allowed(own) == own
    for other in ("http://example.org", "http://127.0.0.1:1", "null"):
        assert allowed(other) is None
    # what needs no preflight is not read as JSON
    plain = {"Origin": "http://example.org", "Content-Type": "text/plain"}
    answer = httpx.post(f"{up.prefect}/api/flows/", headers=plain, content='{"name": "other"}')
    assert answer.status_code == 422


def preflight(server: str, origin: str) -> httpx.Response:
    asked: dict[str, Any] = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    return httpx.options(f"{server}/api/flow_runs/filter", headers=asked)
