"""MLflow's server dies during a run, and comes back: nothing is lost, nothing doubles."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from mlflow import MlflowClient

from tests.conftest import ROOT, Cli
from tests.operations.services import eventually, lasting_ports

pytestmark = [pytest.mark.ops, pytest.mark.usefixtures("services")]


class Server:
    """An MLflow server on a port of its own, which can be killed and started again."""

    def __init__(self, home: Path) -> None:
        (self._port,) = lasting_ports(1)
        self._home = home
        self._process: subprocess.Popen[bytes] | None = None
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"),
            *("--port", str(self._port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{self._home / 'mlflow.db'}"),
            *("--artifacts-destination", str(self._home / "served")),
        ]
        self._process = subprocess.Popen(
            command,
            cwd=self._home,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        eventually(lambda: self._answers() or self._ended(), "MLflow's server")
        assert not self._ended(), "it is another server that answers"

    def kill(self) -> None:
        """Kill it with all its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _ended(self) -> bool:
        assert self._process is not None
        return self._process.poll() is not None

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.uri}/health").status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture
def server(home: Path) -> Iterator[Server]:
    made = Server(home)
    made.start()
    try:
        yield made
    finally:
        made.kill()


def given(tiny: Path, words: Path, output: Path) -> tuple[object, ...]:
    return (
        *("quantize", "rtn_w4a16", "--model", tiny, "--output", output, "--json"),
        *("--set", "serving.check_kernels=false", "--set", "serving.smoke_test=false"),
        *("--set", "eval.name=text", "--set", f"eval.path={words}"),
        *("--set", "eval.windows=2", "--set", "eval.seq_len=32"),
    )


@contextmanager
def running(arguments: tuple[object, ...], env: dict[str, str], cwd: Path) -> Iterator[Any]:
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def began(store: Path) -> bool:
    """Whether the first block is rounded: the run is in its middle."""
    manifests = (store / "entries").glob("*/*/manifest.json")
    return any('"task": "quantize"' in manifest.read_text() for manifest in manifests)


def require_told_once(server: Server) -> None:
    """One finished run with all its metrics, one point each."""
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("blockquant")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert {"eval.nll", "eval.kl", "eval.top1_agreement"} <= set(run.data.metrics)
    assert "failure" not in run.data.tags
    for name in run.data.metrics:
        points = client.get_metric_history(run.info.run_id, name)
        steps = [point.step for point in points]
        assert sorted(steps) == sorted(set(steps)), name
        if name.startswith("weight_error."):
            assert sorted(steps) == [0, 1], name
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"recipe.yml", "errors.json", "blockquant.json"} <= artifacts


def test_killed_and_brought_back_during_a_run(
    cli: Cli, home: Path, tiny: Path, words: Path, server: Server, tmp_path: Path
) -> None:
    env = {"MLFLOW_TRACKING_URI": server.uri}
    with running(given(tiny, words, tmp_path / "out"), env, tmp_path) as process:
        eventually(lambda: began(home / "store") or process.poll() is not None, "the first block")
        assert process.poll() is None, process.communicate()[1]
        server.kill()
        server.start()
        printed, shown = process.communicate(timeout=240)
    assert process.returncode == 0, shown
    assert "Traceback" not in shown
    assert (tmp_path / "out").is_dir()
    assert '"checkpoint"' in printed

    def synced() -> bool:
        # a server that just began may be too slow for the first try
        return cli("sync", env=env).status == 0

    eventually(synced, "all messages to be sent")
    require_told_once(server)
    assert cli("sync", env=env).out.strip() == "nothing is left to send"
