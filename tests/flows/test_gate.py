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

    def run(output: str, *overrides: str, more: tuple[str, ...] = ()):
        given = [part for override in overrides for part in ("--set", override)]
        place = ("--model", DEMO_MODEL, "--output", tmp_path / output, "--overwrite")
        return here("quantize", "rtn_w4a16", *place, *FAST, *given, *more, "--json")

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


def client_and(home: Path, model: str = MODEL):
    client = client_of(home)
    return client, client.get_model_version_by_alias(model, "champion")


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_refused_checkpoint_does_not_replace_the_champions_folder(
    quantized, here, home, tmp_path
):
    loose = ("gate.max_nll_increase=9", "gate.max_kl=9", "gate.min_top1_agreement=0")
    out, kept = tmp_path / "out", tmp_path / "uploaded"
    assert quantized("out", *loose).json["gate"]["champion"] is True
    champion = contents_of(out)

    worse = ("quant.weight.group_size=64", "gate.max_kl=0")
    upload = ("--upload", f"file://{kept}")
    refused = quantized("out", *worse, more=upload)
    assert refused.status == 0, refused.err
    assert refused.json["gate"]["champion"] is False
    # it is beside the output, and what is champion is where its version says
    waiting = Path(refused.json["checkpoint"])
    assert waiting.parent == tmp_path and waiting.name.startswith("out.")
    assert refused.json["gate"]["location"] == str(waiting)
    assert f"{waiting}: stays there, and {out} as it was: refused" in " ".join(refused.err.split())
    assert contents_of(out) == champion and "blockquant.json" in contents_of(waiting)
    client, version = client_and(home)
    assert (str(version.version), version.tags["location"]) == ("1", str(out))
    second = client.get_model_version(MODEL, "2")
    assert (second.tags["location"], second.source) == (str(waiting), waiting.as_uri())
    # nor does it replace what was uploaded
    assert refused.json["uploaded"] is None and not kept.exists()
    # the very same again changes nothing
    assert quantized("out", *worse).json["checkpoint"] == str(waiting)
    assert contents_of(out) == champion

    # once the gate accepts it, it takes the place, and is uploaded
    tolerant = [f"gate.against_champion.{name}=9" for name in ("kl", "nll_increase")]
    tolerant.append("gate.against_champion.top1_agreement=1")
    accepted = quantized("out", worse[0], *loose, *tolerant, more=upload)
    assert accepted.status == 0, accepted.err
    assert accepted.json["checkpoint"] == str(out) == accepted.json["gate"]["location"]
    assert contents_of(out) != champion and not waiting.exists()
    client, version = client_and(home)
    assert (str(version.version), version.tags["location"]) == ("2", str(out))
    assert client.get_model_version(MODEL, "1").tags["location"] == "replaced by version 2"
    (shown,) = here("champion", "--json").json["champions"]
    assert (shown["version"], shown["location"]) == ("2", str(out))
    assert set(contents_of(kept)) == {*contents_of(out), "blockquant-upload.json"}
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith((".out", "out"))} == {
        "out"
    }


def test_a_checkpoint_of_another_scheme_does_not_replace_a_champions_folder(
    quantized, here, home, tmp_path
):
    loose = ("gate.max_nll_increase=9", "gate.max_kl=9", "gate.min_top1_agreement=0")
    out, other = tmp_path / "out", ("quant.weight.bit=8", *loose)
    assert quantized("out", *loose).json["gate"]["champion"] is True
    champion = contents_of(out)
    refused = quantized("out", *other)
    assert refused.status == 0, refused.err
    decided = refused.json["gate"]
    assert (decided["model"], decided["champion"]) == ("demo-model-W8A16", False)
    assert f"{out} holds the champion of {MODEL}, version 1; give another" in decided["gate"]
    waiting = Path(refused.json["checkpoint"])
    assert waiting.name.startswith("out.") and waiting.is_dir() and contents_of(out) == champion
    (shown,) = here("champion", "--json").json["champions"]
    assert (shown["model"], shown["location"]) == (MODEL, str(out))
    # in a folder of its own it is one too
    assert quantized("other", *other).json["gate"]["champion"] is True


def test_without_a_registry_an_output_is_replaced_as_ever(quantized, home, tmp_path):
    assert quantized("out").status == 0
    again = quantized("out", "quant.weight.group_size=64", "gate.registry=false")
    assert again.status == 0, again.err
    assert again.json["checkpoint"] == str(tmp_path / "out")
    assert not list(tmp_path.glob("out.*"))


def test_the_nightly_keeps_a_champion_and_does_not_make_a_refused_one_again(
    services, home, tmp_path, demo_model, monkeypatch
):
    from flows.requantize import requantize

    fast = [word for word in FAST if word != "--set"]
    loose = ["gate.max_nll_increase=9", "gate.max_kl=9", "gate.min_top1_agreement=0"]
    given = {"recipe": "rtn_w4a16", "model": str(demo_model), "output": str(tmp_path / "out")}
    first = requantize(**given, overrides=[*fast, *loose])
    assert first["gate"]["champion"] is True
    champion = contents_of(tmp_path / "out")
    changed = [*fast, "quant.weight.group_size=64", "gate.max_kl=0"]
    refused = requantize(**given, overrides=changed)
    assert refused["gate"]["champion"] is False
    assert contents_of(tmp_path / "out") == champion
    # a night without news takes no room
    monkeypatch.setattr("tasks.engine.places.free_bytes", lambda place: 0)
    state = requantize(**given, overrides=changed, return_state=True)
    assert state.name == "Skipped" and state.result()["checkpoint"] == refused["checkpoint"]
    assert "the gate did not let it take the place of" in state.message


def test_an_upload_that_fails_leaves_the_decision(quantized, home, tmp_path):
    # a place that can be read, and not be written to
    (tmp_path / "link").symlink_to(tmp_path / "away")
    failed = quantized("out", more=("--upload", f"file://{tmp_path}/link/place"))
    assert failed.status == 1 and "--upload" in failed.err
    client = client_of(home)
    (version,) = client.search_model_versions(f"name = '{MODEL}'")
    run = client.get_run(version.run_id)
    assert run.info.status == "FAILED" and "--upload" in run.data.tags["failure"]
    assert run.data.tags["gate"] == version.tags["gate"]
    assert run.data.tags["served"] == version.tags["served"] == "no"
    assert version.tags["location"] == str(tmp_path / "out")
    assert "report.html" in {file.path for file in client.list_artifacts(version.run_id)}
    (tmp_path / "away").mkdir()
    done = quantized("out", more=("--upload", f"file://{tmp_path}/link/place"))
    assert done.status == 0, done.err
    assert done.json["uploaded"]["sent"] > 0 and done.json["gate"]["version"] == "1"
