"""Sweeps for real: in processes of this machine, and on a local Ray cluster of two workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT
from tests.integration.resuming import contents
from tests.models import make_checkpoint, make_text
from tests.places import new_home

pytestmark = [pytest.mark.ops, pytest.mark.timeout(600)]

RECIPE = """
calib: {{name: text, path: {text}, n_samples: 4, seq_len: 64}}
eval: {{name: text, path: {text}, windows: 2, seq_len: 64, report: false}}
quant:
  method: Identity
  weight: {{bit: 8, symmetric: true, granularity: per_channel, need_pack: true}}
serving: {{smoke_test: false, check_kernels: false}}
"""
SWEEP = """
models: [{model}]
recipes: [{recipe}]
overrides:
  - {{name: b8}}
  - {{name: b4, set: [quant.weight.bit=4]}}
  - name: b4-g32
    set: [quant.weight.bit=4, quant.weight.granularity=per_group, quant.weight.group_size=32]
"""
NAMES = ("tiny-recipe-b8", "tiny-recipe-b4", "tiny-recipe-b4-g32")


@dataclass(frozen=True)
class Place:
    """Where the sweeps of these tests find their input, and what the first of them gave."""

    folder: Path
    home: Path
    sweep: Path
    environment: dict[str, str]


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, prepared_home: Path, services: dict[str, str]
) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("sweep")
    model = make_checkpoint(folder / "tiny", blocks=3)
    recipe, sweep = folder / "recipe.yml", folder / "mine.yml"
    recipe.write_text(RECIPE.format(text=make_text(folder / "words.txt", words=3000)))
    sweep.write_text(SWEEP.format(model=model, recipe=recipe))
    home = new_home(folder / "home", prepared_home)
    given = {"BLOCKQUANT_HOME": str(home), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    yield Place(folder, home, sweep, {**services, **given})
    for name, value in before.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="module")
def first(place: Place) -> dict[str, Any]:
    """The sweep from the command line, two children at once in processes of their own."""
    command = [sys.executable, "-m", "flows.cli", "sweep", str(place.sweep), "--json"]
    command += ["--cores", "1", "--at-once", "2", "--output", str(place.folder / "out")]
    done = subprocess.run(
        command,
        env=os.environ | place.environment,
        cwd=place.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def two_workers(place: Place) -> Iterator[None]:
    """A Ray cluster on loopback that the sweeps of these tests share."""
    from flows.ray_cluster import cluster
    from flows.runner import Runner

    with cluster(Runner("ray", cores=1, at_once=2)):
        yield
    assert not [p for p in psutil.Process().children(recursive=True) if "ray" in p.name()]


def swept(place: Place, name: str, **more: Any) -> dict[str, Any]:
    """The sweep in this process, with a store of its own but for more."""
    from flows.sweep import sweep

    given = {"output": str(place.folder / name), "store": str(place.folder / f"store-{name}")}
    result: dict[str, Any] = sweep(**{"sweep": str(place.sweep), "cores": 1, **given, **more})
    return result


def tracked(place: Place, run: str) -> tuple[Any, list[Any]]:
    """A run and those nested in it."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{place.home / 'mlflow.db'}")
    parent = client.get_run(run)
    nested = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run}'")
    return parent, sorted(nested, key=lambda each: each.info.run_name)


def artifact(place: Place, run: Any, name: str) -> Path:
    from mlflow.artifacts import download_artifacts

    uri = f"sqlite:///{place.home / 'mlflow.db'}"
    return Path(download_artifacts(run_id=run.info.run_id, artifact_path=name, tracking_uri=uri))


def flow_runs(name: str, parent: str) -> list[str]:
    """Names of the states of a child's flow runs, in the flow run of a sweep."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterName,
        FlowRunFilterParentFlowRunId,
    )

    wanted = FlowRunFilter(
        name=FlowRunFilterName(any_=[name]),
        parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[parent]),
    )
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(flow_run_filter=wanted)
    return sorted(str(run.state.name) for run in found if run.state is not None)


def checkpoints(result: dict[str, Any]) -> dict[str, dict[str, bytes]]:
    return {row["child"]: contents(Path(row["checkpoint"])) for row in result["children"]}


def assert_same(result: dict[str, Any], first: dict[str, Any]) -> None:
    ours, theirs = checkpoints(result), checkpoints(first)
    assert sorted(ours) == sorted(theirs) == sorted(NAMES)
    for name in NAMES:
        assert sorted(ours[name]) == sorted(theirs[name])
        assert [f for f in ours[name] if ours[name][f] != theirs[name][f]] == [], name


def test_a_sweep_is_a_run_with_its_children_nested(place: Place, first: dict[str, Any]) -> None:
    rows = first["children"]
    assert [row["rank"] for row in rows] == [1, 2, 3]
    assert sorted(row["child"] for row in rows) == sorted(NAMES)
    assert rows[0]["child"] == "tiny-recipe-b8"
    assert [row["kl"] for row in rows] == sorted(row["kl"] for row in rows)
    assert first["failed"] == []
    parent, children = tracked(place, first["mlflow"]["run"])
    assert [parent.info.status, *(c.info.status for c in children)] == ["FINISHED"] * 4
    assert [c.info.run_name for c in children] == sorted(NAMES)
    assert {c.info.run_id for c in children} == {row["run"] for row in rows}
    assert parent.data.metrics["best.kl"] == rows[0]["kl"]
    assert parent.data.metrics["children"] == 3
    table = json.loads(artifact(place, parent, "sweep.json").read_text())
    assert table["columns"] == list(rows[0])
    kept = [dict(zip(table["columns"], values, strict=True)) for values in table["data"]]
    assert kept == rows
    assert "tiny-recipe-b4-g32" in artifact(place, parent, "pareto.svg").read_text()
    assert "group_size=32" in artifact(place, parent, "sweep.yml").read_text()


def test_what_children_share_is_computed_once(place: Place, first: dict[str, Any]) -> None:
    from tasks.engine.store import Store

    kinds = [entry.task for entry in Store(place.home / "store").entries()]
    # one for each of the model's blocks, not for each of the children's
    assert {kind: kinds.count(kind) for kind in ("calibration_set", "evaluation_set")} == {
        "calibration_set": 1,
        "evaluation_set": 1,
    }
    assert kinds.count("quantize") == 3 * len(NAMES)
    assert 0 < first["found"] < first["steps"]


def test_run_again_it_goes_on_in_the_same_runs(place: Place, first: dict[str, Any]) -> None:
    before = checkpoints(first)
    again = swept(place, "out", store=str(place.home / "store"))
    assert again["found"] == again["steps"] == first["steps"]
    assert again["mlflow"]["run"] == first["mlflow"]["run"]
    assert checkpoints(again) == before
    parent, children = tracked(place, again["mlflow"]["run"])
    assert {c.info.run_id for c in children} == {row["run"] for row in first["children"]}
    assert [parent.info.status, *(c.info.status for c in children)] == ["FINISHED"] * 4


def test_a_child_that_fails_stops_no_other_one(place: Place) -> None:
    from flows.sweep import SweepError

    bad = make_checkpoint(place.folder / "bad", blocks=1)
    weights = bad / "model.safetensors"
    whole = weights.read_bytes()
    tensors = load_file(weights)
    broken = next(name for name in sorted(tensors) if "mlp.down_proj" in name)
    tensors[broken][0, 0] = torch.nan
    save_file(tensors, weights, {"format": "pt"})
    sweep = place.folder / "failing.yml"
    sweep.write_text(
        f"models: [{bad}, {place.folder / 'tiny'}]\nrecipes: [{place.folder / 'recipe.yml'}]"
    )
    with pytest.raises(SweepError) as caught:
        swept(place, "failing", sweep=str(sweep))
    assert "sweep failing: 1 of 2 children failed (bad-recipe); the others are done" in str(
        caught.value
    )
    result = caught.value.result
    assert [row["child"] for row in result["children"]] == ["tiny-recipe", "bad-recipe"]
    assert broken in result["children"][1]["failed"]
    parent, children = tracked(place, result["mlflow"]["run"])
    assert [parent.info.status, *(c.info.status for c in children)] == [
        "FAILED",
        "FAILED",
        "FINISHED",
    ]
    weights.write_bytes(whole)
    mended = swept(place, "failing", sweep=str(sweep))
    assert mended["failed"] == [] and mended["mlflow"]["run"] == parent.info.run_id
    found = {row["child"]: (row["found"], row["steps"]) for row in mended["children"]}
    assert found["tiny-recipe"][0] == found["tiny-recipe"][1]
    parent, children = tracked(place, mended["mlflow"]["run"])
    # mended weights are another source: their run is their own, and the failed one stays
    assert parent.info.status == "FINISHED"
    assert sorted(c.info.status for c in children) == ["FAILED", "FINISHED", "FINISHED"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")
def test_children_use_two_gpus_and_find_what_one_does(place: Place) -> None:
    two = swept(place, "two-gpus", device="cuda")
    _, children = tracked(place, two["mlflow"]["run"])
    assert [child.info.status for child in children] == ["FINISHED"] * 3
    assert {child.data.tags["device"] for child in children} == {"cuda:0", "cuda:1"}
    first, second, _ = sorted((child.info.start_time, child.info.end_time) for child in children)
    assert second[0] < first[1], "one beside the other"
    one = swept(place, "one-gpu", device="cuda:1")
    assert checkpoints(two) == checkpoints(one)


def test_on_ray_it_gives_the_same_bytes(
    place: Place, first: dict[str, Any], two_workers: None
) -> None:
    result = swept(place, "ray", runner="ray", at_once=2)
    assert_same(result, first)
    _, children = tracked(place, result["mlflow"]["run"])
    assert [c.info.run_name for c in children] == sorted(NAMES)


def running() -> set[str]:
    """Names of the children whose flow runs are Running."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterName,
        FlowRunFilterState,
        FlowRunFilterStateName,
    )

    wanted = FlowRunFilter(
        name=FlowRunFilterName(any_=list(NAMES)),
        state=FlowRunFilterState(name=FlowRunFilterStateName(any_=["Running"])),
    )
    with get_client(sync_client=True) as client:
        return {run.name for run in client.read_flow_runs(flow_run_filter=wanted)}


class Killer(threading.Thread):
    """Kills a Ray worker as soon as a block is quantized; most of its child is to come."""

    def __init__(self, store: Path) -> None:
        super().__init__(daemon=True)
        self.store = store
        self.killed: psutil.Process | None = None

    def run(self) -> None:
        limit = time.monotonic() + 200
        while time.monotonic() < limit and self.killed is None:
            if self._quantized():
                self.killed = self._worker()
                if self.killed is not None:
                    self.killed.send_signal(signal.SIGKILL)
            time.sleep(0.01)

    def _quantized(self) -> bool:
        for manifest in (self.store / "entries").glob("*/*/manifest.json"):
            try:
                if json.loads(manifest.read_text())["record"]["task"] == "quantize":
                    return True
            except OSError:
                continue
        return False

    def _worker(self) -> psutil.Process | None:
        """A worker whose child is Running: the other one may not have begun its flow run yet."""
        logs = {f"{name}.log" for name in running()}
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "ray::child" in " ".join(process.cmdline()) and any(
                    Path(file.path).name in logs for file in process.open_files()
                ):
                    return process
        return None


def test_a_ray_worker_that_is_killed_is_made_up_for(
    place: Place, first: dict[str, Any], two_workers: None
) -> None:
    killer = Killer(place.folder / "store-killed")
    killer.start()
    result = swept(place, "killed", runner="ray", at_once=2)
    killer.join()
    assert killer.killed is not None
    assert_same(result, first)
    parent, children = tracked(place, result["mlflow"]["run"])
    assert [parent.info.status, *(c.info.status for c in children)] == ["FINISHED"] * 4
    states = [flow_runs(name, parent.data.tags["prefect.flow_run"]) for name in NAMES]
    assert sorted(states) == [["Completed"], ["Completed"], ["Completed", "Crashed"]]
