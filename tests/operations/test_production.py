"""PostgreSQL behind both servers, objects for artifacts and checkpoints, two workers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import boto3
import psycopg2
import pytest
from mlflow import MlflowClient
from moto.server import ThreadedMotoServer

from tasks.upload import MANIFEST
from tests.integration.resuming import contents
from tests.models import make_checkpoint
from tests.operations.postgres import PASSWORD, postgres
from tests.operations.services import Up, brought_up, eventually, telling
from tests.operations.test_deployments import recipe_in

pytestmark = [pytest.mark.ops, pytest.mark.timeout(600)]

RUNS, BLOCKS = 4, 2
KEYS = {"AWS_ACCESS_KEY_ID": "of-the-test", "AWS_SECRET_ACCESS_KEY": "secret-of-the-test"}


@pytest.fixture(scope="module")
def objects() -> Iterator[dict[str, str]]:
    """A server of objects with one bucket; the environment that leads to it."""
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    # MLflow and s3fs each have a name of their own for it
    places = {name: address for name in ("MLFLOW_S3_ENDPOINT_URL", "FSSPEC_S3_ENDPOINT_URL")}
    yield {**KEYS, **places, "AWS_DEFAULT_REGION": "us-east-1"}
    server.stop()


@pytest.fixture(scope="module")
def bucket(objects: dict[str, str]) -> Any:
    keys = {name.lower(): value for name, value in KEYS.items()}
    address, region = objects["MLFLOW_S3_ENDPOINT_URL"], objects["AWS_DEFAULT_REGION"]
    made = boto3.resource("s3", endpoint_url=address, region_name=region, **keys).Bucket("models")
    made.create()
    return made


@pytest.fixture(scope="module")
def databases() -> Iterator[str]:
    with postgres("prefect", "mlflow") as address:
        yield address


@pytest.fixture(scope="module")
def up(
    databases: str,
    objects: dict[str, str],
    bucket: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Up]:
    settings = {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://{databases}/prefect",
        "MLFLOW_BACKEND_STORE_URI": f"postgresql+psycopg2://{databases}/mlflow",
        "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{bucket.name}/artifacts",
        "BLOCKQUANT_WORKERS": "2",
        "BLOCKQUANT_WORKER_RUNS": "2",
    }
    with brought_up(tmp_path_factory.mktemp("up") / "home", **settings, **objects) as services:
        yield services


@pytest.fixture(scope="module")
def four(up: Up, bucket: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Parameters of four runs, which begin at once and share a store; all have ended."""
    folder = tmp_path_factory.mktemp("work")
    recipe = recipe_in(folder)
    asked = [
        {
            "recipe": str(recipe),
            "model": str(make_checkpoint(folder / f"model-{seed}", blocks=BLOCKS, seed=seed)),
            "output": str(folder / f"out-{seed}"),
            "store": str(folder / "store"),
            "upload": f"s3://{bucket.name}/checkpoints/{seed}",
        }
        for seed in range(RUNS)
    ]
    runs = [up.submit("quantize/quantize", parameters) for parameters in asked]
    ended = [up.ended(run) for run in runs]
    states = [run["state"] for run in ended]
    assert [state["type"] for state in states] == ["COMPLETED"] * RUNS, states
    assert_at_once(up, ended)
    return asked


def assert_at_once(up: Up, ended: list[dict[str, Any]]) -> None:
    """Both workers took runs, and runs of both were under way at one time."""
    workers = {worker_of(up, run) for run in ended}
    assert len(workers) == 2, workers
    times = [
        (datetime.fromisoformat(run["start_time"]), datetime.fromisoformat(run["end_time"]))
        for run in ended
    ]
    overlapping = [
        (one, other)
        for one, other in combinations(range(len(ended)), 2)
        if max(times[one][0], times[other][0]) < min(times[one][1], times[other][1])
        and worker_of(up, ended[one]) != worker_of(up, ended[other])
    ]
    assert overlapping, times


def worker_of(up: Up, run: dict[str, Any]) -> str:
    """Name of the worker that took a run, as the run's log says."""

    def named() -> str | None:
        said = [line for line in up.log(run["id"]) if line.startswith("Worker '")]
        return said[0].split("'")[1] if said else None

    # logs are sent in batches, some after the run's end
    return eventually(named, "the worker of a run", 60)


def test_four_checkpoints_are_right(up: Up, four: list[dict[str, str]], tmp_path: Path) -> None:
    """Each has the bytes of a run of this process, alone, with a store of its own."""
    from flows.quantize_model import quantize_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOCKQUANT_HOME", str(tmp_path / "home"))
        patch.setenv("MLFLOW_TRACKING_URI", up.mlflow)
        with telling(up):
            for number, given in enumerate(four):
                own = {"output": str(tmp_path / f"{number}"), "store": str(tmp_path / "store")}
                quantize_model(**(given | own | {"upload": None}))
                assert contents(Path(given["output"])) == contents(Path(own["output"]))


def test_mlflow_was_told_each_thing_once(up: Up, four: list[dict[str, str]]) -> None:
    client = MlflowClient(up.mlflow)
    experiment = client.get_experiment_by_name("blockquant")
    for given in four:
        asked = f"params.output = '{given['output']}'"
        (found,) = client.search_runs([experiment.experiment_id], asked)
        assert found.info.status == "FINISHED" and "failure" not in found.data.tags
        assert found.data.tags["uploaded"] == given["upload"]
        assert {"eval.nll", "eval.kl", "weight_error.mean"} <= set(found.data.metrics)
        for name in found.data.metrics:
            steps = [p.step for p in client.get_metric_history(found.info.run_id, name)]
            several = name.startswith(("weight_error.", "output_error."))
            assert sorted(steps) == list(range(BLOCKS if several else 1)), name
    assert not list((Path(four[0]["store"]) / "journal").glob("*.sqlite"))


def test_checkpoints_and_artifacts_are_objects(
    up: Up, four: list[dict[str, str]], bucket: Any
) -> None:
    objects = {item.key: item.get()["Body"].read() for item in bucket.objects.all()}
    for number, given in enumerate(four):
        prefix = f"checkpoints/{number}/"
        there = {k.removeprefix(prefix): v for k, v in objects.items() if k.startswith(prefix)}
        assert json.loads(there.pop(MANIFEST))["complete"] is True
        assert there == contents(Path(given["output"]))
    assert sum(key.endswith("artifacts/recipe.yml") for key in objects) >= RUNS
    # and none beside the servers
    assert not (up.home / "mlartifacts").exists()


@pytest.mark.usefixtures("four")
def test_both_servers_keep_all_in_postgresql(up: Up, databases: str) -> None:
    for database, table in {"prefect": "flow_run", "mlflow": "runs"}.items():
        address = f"postgresql://{databases}/{database}"
        with psycopg2.connect(address) as connection, connection.cursor() as cursor:
            cursor.execute(f"SELECT count(*) FROM {table}")
            assert cursor.fetchone()[0] >= RUNS
    assert not list(up.home.rglob("*.db"))
    # no file of the services holds a password
    secrets = [PASSWORD.encode(), KEYS["AWS_SECRET_ACCESS_KEY"].encode()]
    files = [path for path in up.home.rglob("*") if path.is_file()]
    assert [p for p in files for secret in secrets if secret in p.read_bytes()] == []
