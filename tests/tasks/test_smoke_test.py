"""The smoke test against a replayed server: a real SGLang gave these answers for its checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.serving_schema import Serving
from quantizers.number_formats import E4M3
from quantizers.schemes import ActivationScheme, Granularity
from tasks.engine.checkpoint import open_checkpoint
from tasks.engine.errors import InputError, RunError
from tasks.engine.publication import REPORT
from tasks.engine.served_windows import WINDOWS, read_windows
from tasks.engine.serving import gpus
from tasks.engine.serving.client import AnswerError, Client
from tasks.engine.serving.server import ServerError, free_port, launch_command, running_server
from tasks.smoke_test import (
    GapError,
    NotServedError,
    can_serve,
    largest_gap,
    serve_and_compare,
    smoke_test,
)

# ninety-four tokens in bf16 and in float32 differ by more than whole texts do
GAP = 0.05


def check(checkpoint, python, log, server_url=None, **keys):
    serving = Serving(python=python, max_nll_gap=GAP, **keys)
    return serve_and_compare(checkpoint, serving, "cpu", log, None, server_url)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "server.log"


def test_a_replayed_server_agrees_with_what_was_measured(
    recorded_checkpoint, replayed, recording, log
):
    found = check(recorded_checkpoint, replayed(), log)
    then = recording["found"]
    assert found["served"] is True and found["sglang"] == then["sglang"]
    # of the server: the very same; of this machine: float32 here and there
    assert found["nll"] == then["nll"]
    assert found["measured_nll"] == pytest.approx(then["measured_nll"], abs=1e-5)
    assert found["nll_gap"] == found["nll"] - found["measured_nll"]
    for name in ("windows", "tokens", "prompts", "greedy_agreement", "same_continuations"):
        assert found[name] == then[name], name
    assert "GET /model_info" in log.read_text()


def test_the_mean_is_over_the_recorded_tokens(recorded_checkpoint, replayed, recording, log):
    scores = [
        entry[0]
        for exchange in recording["exchanges"]
        if (exchange["body"] or {}).get("return_logprob")
        for entry in json.loads(exchange["answer"])["meta_info"]["input_token_logprobs"][1:]
    ]
    found = check(recorded_checkpoint, replayed(), log)
    assert found["nll"] == pytest.approx(-sum(scores) / len(scores), abs=1e-12)
    assert found["tokens"] == len(scores) == 2 * 47


def test_a_replayed_server_that_computes_something_else(recorded_checkpoint, replayed, log):
    said = r"the server's NLL is 8\.1\d+, \+0\.19\d+ from the 7\.9\d+ of the published report"
    with pytest.raises(GapError, match=said):
        check(recorded_checkpoint, replayed("wrong"), log)


def test_a_checkpoint_whose_report_says_less(recorded_checkpoint, replayed, log, tmp_path):
    copied = shutil.copytree(recorded_checkpoint, tmp_path / "copied")
    stored = json.loads((copied / WINDOWS).read_text())
    stored["nll"] = [nll - 0.2 for nll in stored["nll"]]
    (copied / WINDOWS).write_text(json.dumps(stored))
    with pytest.raises(GapError, match=r"at most 0\.05 is allowed"):
        check(copied, replayed(), log)


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ("malformed", AnswerError, "answers what is not SGLang's"),
        ("nan", AnswerError, "the model gives NaN"),
        ("dies", ServerError, "device-side assert triggered"),
        ("refuses", ServerError, "is not supported now"),
        ("another", ServerError, "another server answers there"),
    ],
)
def test_what_goes_wrong_with_a_replayed_server(
    recorded_checkpoint, replayed, log, how, error, said, processes_of
):
    with pytest.raises(error, match=said):
        check(recorded_checkpoint, replayed(how), log)
    assert processes_of(recorded_checkpoint) == []


def test_its_speed_is_measured_where_that_is_asked(recorded_checkpoint, replayed, log, monkeypatch):
    from tasks.engine.serving import speed

    # the recorded stream has four tokens, whatever is asked for
    monkeypatch.setattr(speed.measure_speed, "__defaults__", (4,))
    found = check(recorded_checkpoint, replayed(), log, speed=True)
    assert found["speed"]["loaded_tokens_per_s"] > 0 and found["speed"]["tokens_per_s"] > 0
    assert found["speed"]["at_once"] == speed.AT_ONCE
    assert found["speed"]["new_tokens"] == 4
    assert "source_speed" not in found


def test_a_source_that_does_not_fit_leaves_the_figures_of_the_checkpoint(
    recorded_checkpoint, replayed, log, monkeypatch, tmp_path
):
    from tasks.engine.serving import speed

    monkeypatch.setattr(speed.measure_speed, "__defaults__", (4,))
    # a stand-in that ends where it is to serve another folder than the recorded one
    source, python = tmp_path / "source", Path(replayed())
    script = python.read_text().replace(
        "exec ",
        f'case "$*" in *{source}*) '
        'echo "torch.OutOfMemoryError: CUDA out of memory" >&2; exit 1;; esac\nexec ',
    )
    python.write_text(script)
    serving = Serving(python=str(python), max_nll_gap=GAP, speed=True)
    found = serve_and_compare(recorded_checkpoint, serving, "cpu", log, source)
    assert found["served"] is True and found["speed"]["tokens_per_s"] > 0
    assert "source_speed" not in found
    assert "CUDA out of memory" in found["source_unserved"]


def test_two_servers_on_one_gpu_run_one_after_the_other(
    recorded_checkpoint, replayed, log, monkeypatch
):
    python = replayed()
    with gpus.alone_on(["0"], 1.0):
        said = rf"GPU 0: process {os.getpid()} still serves on it after 1 s \(serving.start_timeout"
        # which says nothing of the checkpoint
        with pytest.raises(NotServedError, match=said):
            check(recorded_checkpoint, python, log, start_timeout=1)
        assert not log.exists()
        # another GPU is free
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        assert check(recorded_checkpoint, python, log)["served"] is True
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert check(recorded_checkpoint, python, log)["served"] is True


def test_which_gpus_a_server_takes(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus.gpus_of(2) == ["0", "1"]
    assert gpus.gpus_of(1, ["--dtype", "half", "--base-gpu-id", "3"]) == ["3"]
    more = ["--dp-size", "2", "--pp-size=2", "--base-gpu-id", "1"]
    assert gpus.gpus_of(1, more) == ["1", "2", "3", "4"]
    # copies of the attention only share the GPUs that each weight is split over
    assert gpus.gpus_of(2, ["--data-parallel-size=2", "--enable-dp-attention"]) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a1,GPU-b2, 7")
    assert gpus.gpus_of(2, ["--base-gpu-id=1"]) == ["GPU-b2", "7"]


def test_a_running_server_is_asked_instead(recorded_checkpoint, replayed, log, tmp_path):
    client = Client(f"http://127.0.0.1:{free_port()}", 20.0)
    command = launch_command(replayed(), recorded_checkpoint, int(client.url.rpartition(":")[2]))
    with running_server(command, client, recorded_checkpoint, tmp_path / "other.log", 20.0):
        found = check(recorded_checkpoint, None, log, server_url=client.url)
        assert found["served"] is True and found["gpu"] == "unknown"
        # it is not ours to end
        assert client.model_path() == str(recorded_checkpoint)
    assert not log.exists()


def test_bounds_follow_the_activations(recorded_checkpoint, replayed, log):
    with pytest.raises(GapError, match=r"at most 0\.005 is allowed"):
        serve_and_compare(recorded_checkpoint, Serving(python=replayed("wrong")), "cpu", log)
    opened = open_checkpoint(recorded_checkpoint)
    inputs = ActivationScheme(E4M3, True, Granularity.TOKEN, dynamic=True)
    assert largest_gap(opened) == 0.005
    assert largest_gap(replace(opened, scheme=replace(opened.scheme, activation=inputs))) == 0.01
    assert largest_gap(replace(opened, scheme=None)) == 0.005


def test_without_sglang_it_is_not_served(recorded_checkpoint, log):
    with pytest.raises(NotServedError, match=f"no SGLang in {sys.executable}; name an interpreter"):
        check(recorded_checkpoint, None, log)
    state = smoke_test(recorded_checkpoint, Serving(), "cpu", log)
    assert state.name == "Skipped" and state.is_completed()
    assert state.message.startswith("no SGLang in ")
    assert not log.exists()


def test_without_a_gpu_it_is_not_served(tmp_path):
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho a warning\necho \'{"sglang": "0.5.15", "gpu": null}\'\n')
    script.chmod(0o755)
    with pytest.raises(NotServedError, match=f"no GPU that {script} can use"):
        can_serve(str(script))


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            "echo 'OSError: libcudart.so.13: cannot open' >&2; exit 1",
            "libcudart.so.13: cannot open",
        ),
        ("exit 3", "(status 3)"),
        ("echo nothing", "Expecting value"),
        ("", "list index out of range"),
        (None, "No such file or directory"),
    ],
)
def test_an_interpreter_that_does_not_run_is_no_reason_to_skip(tmp_path, script, said):
    path = tmp_path / "python"
    if script is not None:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    with pytest.raises(RunError, match="cannot say whether it has SGLang") as raised:
        can_serve(str(path))
    assert said in str(raised.value) and not isinstance(raised.value, NotServedError)


def test_a_running_server_of_something_else(recorded_checkpoint, replayed, log, tmp_path):
    other = shutil.copytree(recorded_checkpoint, tmp_path / "other")
    client = Client(f"http://127.0.0.1:{free_port()}", 20.0)
    command = launch_command(replayed(), other, int(client.url.rpartition(":")[2]))
    with running_server(command, client, other, tmp_path / "other.log", 20.0):
        with pytest.raises(ServerError, match=f"serves {other}, not {recorded_checkpoint}; start"):
            check(recorded_checkpoint, None, log, server_url=client.url)
        assert check(other, None, log, server_url=client.url + "/")["served"] is True


def test_an_export_that_is_not_for_sglang(recorded_checkpoint, replayed, log, tmp_path):
    copied = shutil.copytree(recorded_checkpoint, tmp_path / "copied")
    report = json.loads((copied / REPORT).read_text()) | {"unserved": "unpacked codes"}
    (copied / REPORT).write_text(json.dumps(report))
    with pytest.raises(NotServedError, match="unpacked codes"):
        check(copied, replayed(), log)


def test_folders_that_were_not_published_by_blockquant(demo_model, replayed, log, tmp_path):
    with pytest.raises(InputError, match=f"no {REPORT} that can be read in it"):
        check(demo_model, replayed(), log)


def test_windows_of_the_checkpoint_are_what_was_evaluated(recorded_checkpoint):
    report = json.loads((recorded_checkpoint / REPORT).read_text())
    windows = read_windows(recorded_checkpoint)
    assert windows.tokens.shape == (2, 48) and windows.tokens.dtype == torch.int64
    assert windows.mean == pytest.approx(report["metrics"]["nll"], abs=1e-6)
