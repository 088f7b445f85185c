"""serve, serve-check, and the smoke test of a whole flow; the server is a replayed one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from mlflow import MlflowClient

from tasks.engine.serving.server import free_port
from tests.conftest import ROOT
from tests.models import DEMO_MODEL, make_text


def served_by(python: str, *more: str) -> list[str]:
    """Overrides: a server, and a bound for the few tokens that were recorded."""
    pairs = (f"serving.python={python}", "serving.max_nll_gap=0.05", *more)
    return [part for pair in pairs for part in ("--set", pair)]


@pytest.fixture
def quantized(here, services, home, tmp_path):
    """Run the flow that the recorded checkpoint came from, with a server."""
    text = make_text(tmp_path / "words.txt", words=2000)
    evaluated = f"eval={{name: text, path: {text}, windows: 2, seq_len: 48, dtype: float32}}"

    def run(*arguments: str):
        places = ("--model", DEMO_MODEL, "--output", tmp_path / "out")
        return here(*("quantize", "rtn_w4a16", *places, "--set", evaluated, "--json"), *arguments)

    return run


def newest_run(home: Path):
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("blockquant")
    (run, *_) = client.search_runs([experiment.experiment_id])
    return client, run


def version_of(client: MlflowClient, run):
    """The model version that a run registered."""
    return client.get_model_version(run.data.tags["model.name"], run.data.tags["model.version"])


def server_logs(client: MlflowClient, run) -> list[str]:
    """Names of the server's logs among a run's artifacts."""
    kept = [file.path for file in client.list_artifacts(run.info.run_id)]
    return [name for name in kept if name.startswith("server-")]


def test_a_flow_serves_what_it_published_replayed(quantized, replayed, recording, home):
    outcome = quantized(*served_by(replayed()))
    assert outcome.status == 0, outcome.err
    served = outcome.json["served"]
    assert served["served"] is True and served["nll"] == recording["found"]["nll"]
    client, run = newest_run(home)
    assert run.data.tags["served"] == "yes"
    assert run.data.tags["served.by"] == f"SGLang {recording['found']['sglang']}"
    for name in ("nll", "measured_nll", "nll_gap", "greedy_agreement", "start_s"):
        assert run.data.metrics[f"served.{name}"] == served[name]
    assert server_logs(client, run)


def test_a_flow_whose_replayed_server_computes_something_else_fails(
    quantized, replayed, home, tmp_path
):
    outcome = quantized(*served_by(replayed("wrong")))
    assert outcome.status == 1
    last = outcome.err.strip().splitlines()[-1]
    assert last.startswith(f"blockquant: {tmp_path / 'out'}: the server's NLL is 8.1")
    client, run = newest_run(home)
    assert (run.info.status, run.data.tags["served"]) == ("FAILED", "failed")
    assert "of the published report" in run.data.tags["failure"]
    assert "of the published report" in run.data.tags["served.reason"]
    assert run.data.metrics["served.nll_gap"] == pytest.approx(0.1967, abs=1e-3)
    assert run.data.metrics["eval.kl"] > 0
    assert server_logs(client, run)
    page = Path(client.download_artifacts(run.info.run_id, "report.html", str(tmp_path)))
    assert "failed: " in page.read_text() and "served by SGLang" not in page.read_text()
    # it is registered as what it is
    version = version_of(client, run)
    assert version.tags["served"] == "failed"
    assert "it was not served as measured: " in version.tags["gate"] == run.data.tags["gate"]
    # with the server mended it goes on: in the same run, with nothing computed again
    again = quantized(*served_by(replayed()))
    assert again.status == 0, again.err
    assert all(step["cached"] for step in again.json["steps"])
    assert again.json["mlflow"]["run"] == run.info.run_id
    _, mended = newest_run(home)
    assert (mended.info.status, mended.data.tags["served"]) == ("FINISHED", "yes")
    assert "failure" not in mended.data.tags
    assert mended.data.tags["served.reason"] == ""
    # the figures of each attempt at a step of their own, the last ones are the run's
    history = client.get_metric_history(run.info.run_id, "served.nll")
    assert [m.step for m in history] == [0, 1]
    assert mended.data.metrics["served.nll"] == again.json["served"]["nll"] == history[1].value
    assert version_of(client, mended).version == version.version
    assert version_of(client, mended).tags["served"] == "yes"
    assert "not served" not in mended.data.tags["gate"]
    page = Path(client.download_artifacts(run.info.run_id, "report.html", str(tmp_path)))
    assert "failed: " not in page.read_text() and "served by SGLang" in page.read_text()


def test_a_flow_whose_replayed_server_does_not_start_shows_why(quantized, replayed, recording):
    outcome = quantized(*served_by(replayed("refuses")))
    assert outcome.status == 1
    *before, last = outcome.err.strip().splitlines()
    assert "ImportError: Other method (CompressedTensorsW4A16Sparse24)" in last
    shown = [line.removeprefix("server: ") for line in before if line.startswith("server: ")]
    assert shown == [line for line in recording["refused"]["log"] if line.strip()][-20:]
    # it is still there to be read
    log = Path(last.rpartition("; its log is ")[2])
    assert "CompressedTensorsW4A16Sparse24" in log.read_text()


def test_a_flow_that_publishes_no_windows(quantized, replayed, home, tmp_path):
    outcome = quantized(*served_by(replayed(), "serving.windows=0"))
    assert outcome.status == 0, outcome.err
    reason = "no evaluation windows are published to compare with"
    assert outcome.json["served"] == {"served": False, "reason": reason}
    assert not (tmp_path / "out" / "blockquant_windows.json").exists()


def test_a_flow_that_is_not_to_be_served(quantized, replayed, home):
    outcome = quantized(*served_by(replayed(), "serving.smoke_test=false"))
    assert outcome.json["served"] == {"served": False, "reason": "serving.smoke_test is false"}
    _, run = newest_run(home)
    assert run.data.tags["served"] == "no"
    assert run.data.tags["served.reason"] == "serving.smoke_test is false"


def test_serve_check_of_a_replayed_server(here, home, recorded_checkpoint, replayed, recording):
    bound = ("--max-nll-gap", "0.05")
    arguments = ("serve-check", recorded_checkpoint, "--python", replayed(), *bound)
    outcome = here(*arguments, "--json", "--", "--dtype", "bfloat16")
    assert outcome.status == 0, outcome.err
    assert outcome.json["nll"] == recording["found"]["nll"]
    shown = here(*arguments)
    assert shown.status == 0
    assert shown.out.startswith(f"served by SGLang {recording['found']['sglang']}: NLL 7.98")
    assert "from what was measured (at most 0.05)" in shown.out
    assert "97.9% of its greedy tokens are transformers' too" in shown.out


def test_serve_check_that_fails_says_why_in_a_line(here, home, recorded_checkpoint, replayed):
    outcome = here("serve-check", recorded_checkpoint, "--python", replayed("wrong"))
    assert outcome.status == 1
    (line,) = [one for one in outcome.err.splitlines() if one.startswith("blockquant: ")]
    assert "of the published report (at most 0.005 is allowed)" in line
    outcome = here("serve-check", recorded_checkpoint)
    assert outcome.status == 1
    assert f"no SGLang in {sys.executable}; name an interpreter" in outcome.err


def test_serve_check_tells_a_run(quantized, here, replayed, recorded_checkpoint, home, tmp_path):
    run_id = quantized("--set", "serving.smoke_test=false").json["mlflow"]["run"]
    bound = ("--max-nll-gap", "0.05", "--run", run_id)
    outcome = here("serve-check", recorded_checkpoint, "--python", replayed(), *bound, "--json")
    assert outcome.status == 0, outcome.err
    client, run = newest_run(home)
    assert run.info.run_id == run_id
    assert run.data.tags["served"] == "yes"
    assert run.data.metrics["served.nll"] == outcome.json["nll"]
    assert run.data.tags["served.reason"] == ""
    assert outcome.json["gate"]["model"] == run.data.tags["model.name"]
    assert version_of(client, run).tags["served"] == "yes"
    assert version_of(client, run).tags["server_nll"] == repr(outcome.json["nll"])
    failed = here("serve-check", recorded_checkpoint, "--python", replayed("wrong"), *bound)
    assert failed.status == 1
    _, run = newest_run(home)
    assert run.data.tags["served"] == "failed"
    assert version_of(client, run).tags["served"] == "failed"
    logs = [file.path for file in client.list_artifacts(run_id) if file.path.startswith("serve-")]
    assert len(logs) == 2
    # a run is told of its own checkpoint only
    other = shutil.copytree(recorded_checkpoint, tmp_path / "other")
    report = json.loads((other / "blockquant.json").read_text())
    (other / "blockquant.json").write_text(json.dumps(report | {"bytes": 1}))
    refused = here("serve-check", other, "--python", replayed(), *bound)
    assert refused.status == 2
    assert f"--run {run_id}: published another checkpoint than {other}; give" in refused.err
    assert newest_run(home)[1].data.tags["served"] == "failed"
    said = "--run 0123: the tracking server has no such run"
    assert said in here("serve-check", recorded_checkpoint, "--run", "0123").err


def test_serve_check_with_mlflow_away_says_so(
    quantized, here, replayed, recorded_checkpoint, monkeypatch
):
    run_id = quantized("--set", "serving.smoke_test=false").json["mlflow"]["run"]
    bound = ("--max-nll-gap", "0.05", "--run", run_id)

    def lost(*_, **__):
        raise OSError("connection refused")

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "log_artifact", lost)
        outcome = here("serve-check", recorded_checkpoint, "--python", replayed(), *bound)
        assert outcome.status == 1
        assert "is not told what came of serving (OSError); run serve-check" in outcome.err
        wrong = here("serve-check", recorded_checkpoint, "--python", replayed("wrong"), *bound)
        assert wrong.status == 1
        assert "the server's NLL is" in wrong.err.strip().splitlines()[-1]
        assert "is not told what came of serving" in wrong.err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    outcome = here("serve-check", recorded_checkpoint, "--python", replayed(), *bound)
    assert outcome.status == 1
    assert "MLflow at http://127.0.0.1:9 does not answer" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--server-url", "here"], "--server-url here: no address; write http://HOST:PORT"),
        (["--server-url", "http://u:pass@host:1"], "--server-url: has more than an address; write"),
        (["--source", "x"], "--source: is for --speed"),
        (["--speed", "--source", "x", "--server-url", "http://h:1"], "--source: needs a server of"),
        (["--", "--trust-remote"], "no code of a checkpoint is run"),
        (["--", "--hos", "0.0.0.0"], "servers of a run listen on 127.0.0.1"),
        (["--", "--api-key", "secret"], "a server of a run is asked by that run only"),
        (["--tensor-parallel", "3"], "3 GPUs cannot share 4 attention heads"),
        (["--", "--port", "1"], "server_args: --port cannot be given: a free port is taken"),
        (["--", "--host=0.0.0.0"], "servers of a run listen on 127.0.0.1"),
        (["--", "--trust-remote-code"], "no code of a checkpoint is run"),
        (["--max-nll-gap", "-1"], "max_nll_gap: Input should be greater than 0"),
        (["--device", "tpu"], "--device tpu: not a device"),
    ],
)
def test_bad_options_of_serve_check(here, home, recorded_checkpoint, arguments, said):
    outcome = here("serve-check", recorded_checkpoint, *arguments)
    assert outcome.status == 2
    assert said in outcome.err


def test_serve_check_of_a_folder_that_is_none(here, home, tmp_path):
    outcome = here("serve-check", tmp_path / "nothing")
    assert outcome.status == 2
    assert str(tmp_path / "nothing") in outcome.err
    outcome = here("serve-check", DEMO_MODEL)
    assert outcome.status == 2
    assert "give a folder that blockquant published" in outcome.err


def test_serve_prints_its_command(here, home, recorded_checkpoint):
    more = ("--port", "30001", "--tensor-parallel", "2", "--print", "--", "--dtype", "half")
    outcome = here("serve", recorded_checkpoint, *more)
    assert outcome.status == 0, outcome.err
    assert outcome.out.split() == [
        *(sys.executable, "-m", "sglang.launch_server"),
        *("--model-path", str(recorded_checkpoint), "--host", "127.0.0.1", "--port", "30001"),
        *("--tp-size", "2", "--dtype", "half"),
    ]
    refused = here("serve", recorded_checkpoint)
    assert refused.status == 1 and "no SGLang in" in refused.err
    assert here("serve", recorded_checkpoint / "nowhere", "--print").status == 2


def test_serve_becomes_the_replayed_server(home, recorded_checkpoint, replayed, tmp_path):
    copied = shutil.copytree(recorded_checkpoint, tmp_path / "checkpoint")
    port = free_port()
    asked = ["serve", str(copied), "--python", replayed(), "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *asked],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        for _ in range(200):
            try:
                answer = httpx.get(f"http://127.0.0.1:{port}/model_info", trust_env=False)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        assert json.loads(answer.text)["model_path"] == str(copied)
    finally:
        group = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        os.killpg(process.pid, 9)
        psutil.wait_procs(group, timeout=20)
    assert process.stdout is not None
    assert process.stdout.readline().split()[1:3] == ["-m", "sglang.launch_server"]


def test_verify_checks_the_kernels_for_several_gpus(here, home, recorded_checkpoint, tmp_path):
    found = here("verify", recorded_checkpoint, "--json")
    assert found.json["tensor_parallel"] == 1
    assert here("verify", recorded_checkpoint, "--tensor-parallel", "2").status == 0
    refused = here("verify", recorded_checkpoint, "--tensor-parallel", "4")
    assert refused.status == 1
    said = "model.layers.0.self_attn.o_proj has 64 input features on each of 4 GPUs, Marlin takes"
    assert said in refused.err and "numbers of GPUs that fit: 1, 2" in refused.err
    refused = here("verify", recorded_checkpoint, "--tensor-parallel", "3")
    assert refused.status == 2
    assert "--tensor-parallel: 3 GPUs cannot share 4 attention heads and 2 key heads" in refused.err
    # an export that says itself that it is not for SGLang is asked for nothing
    copied = shutil.copytree(recorded_checkpoint, tmp_path / "copied")
    report = json.loads((copied / "blockquant.json").read_text())
    (copied / "blockquant.json").write_text(
        json.dumps(report | {"unserved": "why", "tensor_parallel": 4})
    )
    assert here("verify", copied).status == 0
