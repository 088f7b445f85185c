"""SIGKILL for a run's process, its worker, Prefect's server and MLflow's, at random moments.

With those of the command in ``tests/integration/test_random_kills.py`` these are thirty where all
are run.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest
from mlflow import MlflowClient

from tests.integration.resuming import contents
from tests.operations.services import Up, eventually
from tests.operations.test_deployments import work_in

pytestmark = [pytest.mark.ops, pytest.mark.timeout(1500), pytest.mark.xdist_group("services")]

BLOCKS = 2
# how a process of each kind is known by its command; a run's by its environment
COMMANDS = {
    "worker": "flows.local_worker",
    "prefect": "flows.local_servers prefect",
    "mlflow": "flows.local_servers mlflow",
}
KINDS = ("run", *COMMANDS)
# a worker that took a run has begun a process for it by then
IDLE_S = 15.0


@dataclass
class Round:
    """One run of the deployment, with whoever looks after it."""

    up: Up
    parameters: dict[str, str]
    run: str
    idle_since: float | None = field(default=None)

    def victims(self, kind: str) -> list[psutil.Process]:
        """Processes of a kind that live."""
        found = []
        for process in self.up.processes():
            try:
                of_run = process.environ().get("PREFECT__FLOW_RUN_ID") == self.run
                command = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if of_run if kind == "run" else not of_run and COMMANDS[kind] in command:
                found.append(process)
        return found

    def over(self) -> bool:
        """Look, as an operator does: whether all is done; retry what failed or was abandoned."""
        try:
            state = self.up.api("GET", f"flow_runs/{self.run}")["state"]["type"]
            if self.victims("run") or state in ("SCHEDULED", "PAUSED"):
                self.idle_since = None
            elif state == "COMPLETED":
                return True
            elif state in ("FAILED", "CRASHED") or self._idle():
                self.idle_since = None
                # as the page's button does
                retry = {"type": "SCHEDULED", "name": "AwaitingRetry"}
                asked = {"state": retry, "force": True}
                self.up.api("POST", f"flow_runs/{self.run}/set_state", json=asked)
        except httpx.HTTPError:
            # supervisor starts the server again
            pass
        return False

    def _idle(self) -> bool:
        """Whether nobody has worked at the run for long enough."""
        now = time.monotonic()
        self.idle_since = self.idle_since or now
        return now - self.idle_since > IDLE_S

    def works(self) -> bool:
        """Wait until a process works at the run; false where it was over before."""

        def looked() -> str | None:
            return "at work" if self.victims("run") else "over" if self.over() else None

        return eventually(looked, "a process of the run", 240) == "at work"

    def kill(self, kind: str) -> bool:
        """Kill what there is of a kind; whether there was anything that had not ended by itself."""
        found = self.victims(kind)
        killed = 0
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
                killed += 1
        psutil.wait_procs(found, timeout=20)
        return killed > 0


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The recipe and the model of all runs."""
    return work_in(tmp_path_factory.mktemp("killed"), blocks=BLOCKS)


def begin(up: Up, given: dict[str, str], folder: Path) -> Round:
    """Have a worker run the deployment, with a store and an output of the round's own."""
    parameters = given | {"output": str(folder / "out"), "store": str(folder / "store")}
    # asked again while the server is being started
    run = eventually(lambda: submitted(up, parameters), "a server that takes a run", 240)
    return Round(up, parameters, run)


def submitted(up: Up, parameters: dict[str, str]) -> str | None:
    try:
        return up.submit("quantize/quantize", parameters)
    except httpx.HTTPError:
        return None


def require_told_once(up: Up, parameters: dict[str, str]) -> None:
    """One finished run, each metric with one point for each step."""

    def synced() -> bool:
        asked = ("sync", "--store", parameters["store"])
        return up.run(*asked, module="flows.cli").returncode == 0

    eventually(synced, "MLflow to be told of all", 240)
    client = MlflowClient(up.mlflow)
    experiment = client.get_experiment_by_name("blockquant")
    asked = f"params.output = '{parameters['output']}'"
    (tracked,) = client.search_runs([experiment.experiment_id], asked)
    assert tracked.info.status == "FINISHED" and "failure" not in tracked.data.tags
    assert {"eval.nll", "eval.kl", "weight_error.mean"} <= set(tracked.data.metrics)
    for name in tracked.data.metrics:
        steps = [point.step for point in client.get_metric_history(tracked.info.run_id, name)]
        several = name.startswith(("weight_error.", "output_error."))
        assert sorted(steps) == list(range(BLOCKS if several else 1)), name


@pytest.mark.parametrize("of_each", [1, pytest.param(5, marks=pytest.mark.long)])
def test_kills_of_runs_workers_and_servers(
    up: Up, given: dict[str, str], tmp_path: Path, of_each: int
) -> None:
    calm = begin(up, given, tmp_path / "calm")
    assert calm.works()
    started = time.monotonic()
    assert up.ended(calm.run)["state"]["type"] == "COMPLETED"
    duration = time.monotonic() - started
    expected = contents(tmp_path / "calm" / "out")

    draw = random.Random(20261126)
    deck = list(KINDS) * of_each
    draw.shuffle(deck)
    killed: Counter[str] = Counter()
    rounds = 0
    while deck:
        rounds += 1
        folder = tmp_path / f"round-{rounds}"
        killing = begin(up, given, folder)
        # several in a round, and several rounds: each has to end
        for _ in KINDS:
            if deck and killing.works():
                time.sleep(draw.uniform(0, duration / 2))
                if killing.kill(deck[-1]):
                    killed[deck.pop()] += 1
        eventually(killing.over, f"the end of round {rounds}, {killed}", 400)
        made = contents(folder / "out")
        assert sorted(made) == sorted(expected)
        assert [name for name in made if made[name] != expected[name]] == []
        assert sorted(path.name for path in folder.iterdir()) == ["out", "store"]
        require_told_once(up, killing.parameters)
        # supervisor, two servers, a worker: nothing else is left running
        eventually(lambda: len(up.processes()) == 4, "the services, and no more", 60)
    assert killed == dict.fromkeys(KINDS, of_each)
    print(f"{killed.total()} kills in {rounds} rounds, {duration:.1f} s undisturbed")
