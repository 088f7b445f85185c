"""The gate at the end of real runs: version, tags, artifact, what the commands say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.models import DEMO_MODEL

MODEL = "demo-model-W4A16"
FAST = ("--set", "serving.smoke_test=false", "--set", "eval.windows=2", "--set", "eval.seq_len=32")


@pytest.fixture
def quantized(here, services, home, tmp_path):
    """Run the flow on the demo model."""

    def run(output: str, *overrides: str):
        given = [part for override in overrides for part in ("--set", override)]
        place = ("--model", DEMO_MODEL, "--output", tmp_path / output, "--overwrite")
        return here("quantize", "rtn_w4a16", *place, *FAST, *given, "--json")

    return run


def client_of(home: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{home / 'mlflow.db'}")


def test_a_run_registers_its_checkpoint_and_the_gate_decides(quantized, here, home, tmp_path):
    loose = ("gate.max_nll_increase=9", "gate.max_kl=9", "gate.min_top1_agreement=0")
    outcome = quantized("one", *loose)
    assert outcome.status == 0, outcome.err
    decided = outcome.json["gate"]
    assert (decided["model"], decided["version"], decided["champion"]) == (MODEL, "1", True)
    client = client_of(home)
    version = client.get_model_version_by_alias(MODEL, "champion")
    run = client.get_run(outcome.json["mlflow"]["run"])
    assert version.run_id == run.info.run_id
    assert version.source == (tmp_path / "one").as_uri()
    assert version.tags["blockquant.identity"] == run.data.tags["blockquant.identity"]
    assert version.tags["served"] == run.data.tags["served"] == "no"
    assert version.tags["kl"] == repr(outcome.json["metrics"]["kl"])
    assert version.tags["bytes"] == str(outcome.json["bytes"])
    assert version.tags["gate"] == run.data.tags["gate"] == "champion"
    kept = json.loads(Path(client.download_artifacts(run.info.run_id, "gate.json")).read_text())
    assert kept["figures"]["kl"] == outcome.json["metrics"]["kl"]
    assert kept["limits"]["max_kl"] == 9 and kept["champion"] is True

    # the same work once more is another run of the same version
    again = quantized("one", *loose)
    assert again.status == 0, again.err
    assert again.json["mlflow"]["run"] != run.info.run_id
    assert (again.json["gate"]["version"], again.json["gate"]["champion"]) == ("1", True)
    # the same figures of another output, under a limit that they do not hold
    refused = quantized("two", *loose[:1], "gate.max_kl=0", loose[2])
    assert refused.status == 0, refused.err
    assert all(step["cached"] for step in refused.json["steps"])
    decided = refused.json["gate"]
    assert (decided["version"], decided["champion"]) == ("2", False)
    assert decided["gate"].startswith("refused: KL 0.") and decided["gate"].endswith("than 0")
    assert str(client.get_model_version_by_alias(MODEL, "champion").version) == "1"
    assert len(client.search_model_versions(f"name = '{MODEL}'")) == 2

    shown = here("champion")
    assert shown.status == 0 and f"{MODEL}: {tmp_path / 'one'}" in shown.out
    (one,) = here("champion", MODEL, "--json").json["champions"]
    assert (one["version"], one["run"]) == ("1", again.json["mlflow"]["run"])
    nothing = here("champion", "other")
    assert nothing.status == 2 and "other: no registered model of that name" in nothing.err
