"""Versions and champions in a real registry: a database, and a server over HTTP."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos import databricks_pb2

from tasks.engine import registry
from tasks.engine.gate import FAILED, NO, YES
from tasks.engine.journal import synchronize, told, told_run
from tasks.engine.messages import journals
from tasks.engine.offer import Offer
from tasks.engine.output import content_of
from tasks.engine.publication import REPORT
from tasks.engine.registry import (
    champion_of,
    champions,
    is_champions,
    offer,
    served_later,
)
from tasks.engine.settings import Settings
from tasks.engine.tracking import open_run
from tests.places import place_in

FIGURES = {
    "nll_increase": 0.03,
    "kl": 0.04,
    "top1_agreement": 0.9,
    "served": NO,
    "served_reason": "no GPU",
    "server_nll": None,
    "server_nll_gap": None,
    "unserved": None,
    "evaluation": "books",
    "windows": "abc",
    "scored": None,
}
TOLERANCES = {
    "nll_increase": 0.0,
    "kl": 0.0,
    "top1_agreement": 0.0,
    "server_nll": 0.0,
    "same_evaluation": True,
}
LIMITS = {
    "max_nll_increase": 0.1,
    "max_kl": 0.1,
    "min_top1_agreement": 0.8,
    "max_server_nll_gap": 0.005,
    "require_served": False,
    "against_champion": TOLERANCES,
}


def offered(content: str, model: str = "tiny-W4A16", **figures) -> Offer:
    return Offer(
        model=model,
        content=content,
        identity=f"work-{content}",
        location=f"/exports/{content}",
        facts={"scheme": "W4A16", "bytes": "1000"},
        figures=FIGURES | figures,
        limits=LIMITS,
    )


def lying(folder: Path, one: Offer) -> Offer:
    """The offer of what then lies in a folder, as a stand-in for a checkpoint."""
    folder.mkdir(exist_ok=True)
    (folder / REPORT).write_text(one.content)
    content = content_of(one.identity, one.content)
    return replace(one, content=content, location=str(folder))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, prepared_home: Path):
    """A tracking server with artifacts and registry, as a process; its address."""
    folder = tmp_path_factory.mktemp("mlflow")
    database = folder / "mlflow.db"
    database.write_bytes((prepared_home / "mlflow.db").read_bytes())
    with closing(socket.create_server(("127.0.0.1", 0))) as found:
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{database}", "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            # its background jobs take seconds to start, and nothing here has any
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        for _ in range(1800):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.fixture(params=["database", "server"])
def place(request: pytest.FixtureRequest, home: Path) -> Settings:
    """Where MLflow is; a server is one for all tests here, so each has models of its own."""
    return place_in(home, request.getfixturevalue("server") if request.param == "server" else None)


def present(place: Settings, model: str) -> str | None:
    champion = champion_of(MlflowClient(place.tracking_uri), model)
    return None if champion is None else str(champion.version)


def test_the_first_that_holds_is_champion_and_only_a_better_one_follows(place, request):
    model = f"course-{request.node.name}"
    client = MlflowClient(place.tracking_uri)

    def made(content: str, **figures):
        run = open_run(place, f"{model} {content}", content, {}, {})
        return run, offer(run, place, offered(content, model, **figures))

    _, beyond = made("beyond", kl=0.2)
    assert beyond["champion"] is False and present(place, model) is None
    first_run, first = made("first")
    assert first["champion"] is True and present(place, model) == first["version"] == "2"
    worse_run, worse = made("worse", kl=0.05)
    assert (
        worse["gate"] == "refused: KL 0.05 is more than 0.04 (champion version 2 and what is "
        "tolerated)"
    )
    assert present(place, model) == "2"
    _, failed = made("failed", kl=0.01, served=FAILED, served_reason="it died")
    assert failed["champion"] is False and present(place, model) == "2"
    _, better = made("better", kl=0.01)
    assert better["champion"] is True and present(place, model) == better["version"] == "5"

    # what each leaves in its run and its version
    version = client.get_model_version(model, worse["version"])
    assert version.run_id == worse_run.id
    wanted = {
        "blockquant.identity": "work-worse",
        "location": "/exports/worse",
        "scheme": "W4A16",
        "bytes": "1000",
        "kl": "0.05",
        "served": "no",
        "served.reason": "no GPU",
        "gate": worse["gate"],
    }
    assert {**version.tags, **wanted} == version.tags
    tags = client.get_run(worse_run.id).data.tags
    assert tags["gate"] == worse["gate"]
    assert (tags["model.name"], tags["model.version"]) == (model, worse["version"])
    assert client.get_run(first_run.id).data.tags["gate"] == "champion"
    assert client.get_model_version(model, failed["version"]).tags["served"] == "failed"
    kept = json.loads(Path(client.download_artifacts(worse_run.id, "gate.json")).read_text())
    assert kept["figures"]["kl"] == 0.05 and kept["limits"] == LIMITS
    assert kept["compared_with"]["version"] == "2"
    assert kept["compared_with"]["figures"]["kl"] == 0.04
    assert {"holds": True, "line": "KL 0.05 is at most 0.1"} in kept["reasons"]
    (shown,) = [found for found in champions(client) if found["model"] == model]
    assert (shown["version"], shown["kl"], shown["location"]) == ("5", 0.01, "/exports/better")


def test_a_version_says_where_its_files_are(place, request):
    model = f"where-{request.node.name}"
    client = MlflowClient(place.tracking_uri)
    run = open_run(place, model, model, {}, {})
    number = offer(run, place, offered("one", model))["version"]
    source = client.get_model_version(model, number).source
    if place.tracking_uri.startswith("http"):
        assert source == f"runs:/{run.id}/checkpoint"
        where = client.download_artifacts(run.id, "checkpoint/location.json")
        assert json.loads(Path(where).read_text())["location"] == "/exports/one"
    else:
        assert source == "file:///exports/one"
    uploaded = replace(offered("two", model), location="s3://bucket/two")
    number = offer(run, place, uploaded)["version"]
    assert client.get_model_version(model, number).source == "s3://bucket/two"


def test_the_same_again_is_the_same_version(place, request):
    model = f"again-{request.node.name}"
    client = MlflowClient(place.tracking_uri)
    run = open_run(place, model, model, {}, {})
    first = offer(run, place, offered("one", model))
    again = offer(run, place, offered("one", model))
    assert (again["version"], again["champion"], again["gate"]) == ("1", True, "champion")
    # the same work in another run, and with another limit: another decision about one version
    other = open_run(place, f"{model} other", model, {}, {})
    assert offer(other, place, offered("one", model))["version"] == first["version"]
    strict = replace(offered("one", model), limits=LIMITS | {"max_kl": 0.001})
    refused = offer(other, place, strict)
    assert refused["gate"].startswith("refused: KL 0.04 is more than 0.001")
    # nothing better is there
    assert refused["champion"] is True and present(place, model) == "1"
    assert len(client.search_model_versions(f"name = '{model}'")) == 1


def test_a_decision_that_was_made_stays_when_its_message_comes_again(home):
    place = place_in(home)
    runs = [open_run(place, name, name, {}, {}) for name in "ab"]
    offer(runs[0], place, offered("a"))
    offer(runs[1], place, offered("b", kl=0.01))
    again = offer(runs[0], place, offered("a"))
    # it was champion, and is no longer: not decided once more
    assert (again["gate"], again["champion"]) == ("champion", False)
    assert present(place, "tiny-W4A16") == "2"


@pytest.mark.parametrize("dies_at", ["set_registered_model_alias", "log_dict", "log_batch"])
def test_a_message_whose_sending_was_cut_short_is_sent_again(home, monkeypatch, dies_at):
    place = place_in(home)
    run = open_run(place, "a", "a", {}, {})
    with monkeypatch.context() as cut:
        cut.setattr(MlflowClient, dies_at, lambda *_, **__: (_ for _ in ()).throw(OSError("cut")))
        with pytest.raises(OSError, match="cut"):
            offer(run, place, offered("a"))
    found = offer(run, place, offered("a"))
    assert found["version"] == "1" and found["gate"] == "champion"
    assert present(place, "tiny-W4A16") == "1"
    client = MlflowClient(place.tracking_uri)
    assert client.get_run(run.id).data.tags["gate"] == "champion"
    assert client.get_model_version("tiny-W4A16", "1").tags["gate"] == "champion"


def test_a_champion_that_somebody_named_by_hand_is_not_replaced(home):
    place = place_in(home)
    client = MlflowClient(place.tracking_uri)
    client.create_registered_model("tiny-W4A16")
    client.create_model_version("tiny-W4A16", "file:///elsewhere", await_creation_for=0)
    client.set_registered_model_alias("tiny-W4A16", "champion", "1")
    found = offer(open_run(place, "a", "a", {}, {}), place, offered("a"))
    assert "champion version 1 has no KL to compare with" in found["gate"]
    assert present(place, "tiny-W4A16") == "1"
    client.delete_registered_model_alias("tiny-W4A16", "champion")
    assert champions(client) == []


def test_two_at_once_leave_one_champion_the_better(home):
    place = place_in(home)
    script = """
import json, sys
from pathlib import Path
from tests.places import place_in
from tests.tasks.engine.test_registry import offered
from tasks.engine.registry import offer
from tasks.engine.tracking import open_run
place, name = place_in(Path(sys.argv[1])), sys.argv[2]
run = open_run(place, name, name, {}, {})
print("ready", flush=True)
sys.stdin.readline()
print(json.dumps(offer(run, place, offered(name, kl=float(sys.argv[3])))))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(home), name, kl],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, kl in (("better", "0.01"), ("worse", "0.02"))
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    with ThreadPoolExecutor(2) as both:
        said = [text for text, _ in both.map(lambda p: p.communicate("go\n"), processes)]
    better, _ = (json.loads(text) for text in said)
    assert better["champion"] is True
    assert present(place, "tiny-W4A16") == better["version"]
    client = MlflowClient(place.tracking_uri)
    assert len(client.search_model_versions("name = 'tiny-W4A16'")) == 2


def test_what_was_served_elsewhere_later_is_decided_again(home):
    place = place_in(home)
    run = open_run(place, "a", "a", {}, {})
    served = {"served": YES, "served_reason": "", "server_nll": 3.5, "server_nll_gap": 0.001}
    assert served_later(run, place, served) is None
    asked = replace(offered("a"), limits=LIMITS | {"require_served": True})
    assert offer(run, place, asked)["champion"] is False
    found = served_later(run, place, served)
    assert found["champion"] is True and present(place, "tiny-W4A16") == "1"
    version = MlflowClient(place.tracking_uri).get_model_version("tiny-W4A16", "1")
    assert (version.tags["served"], version.tags["server_nll"]) == ("yes", "3.5")
    # a champion that fails later is said so, and stays until another holds
    found = served_later(run, place, {"served": FAILED, "served_reason": "it died"})
    assert found["gate"].startswith("refused: it was not served as measured")
    version = MlflowClient(place.tracking_uri).get_model_version("tiny-W4A16", "1")
    assert version.tags["served"] == "failed" and present(place, "tiny-W4A16") == "1"


def test_a_lost_connection_is_not_a_run_without_a_version(home, monkeypatch):
    place = place_in(home)
    run = open_run(place, "a", "a", {}, {})
    offer(run, place, offered("a"))
    served = {"served": YES, "served_reason": "", "server_nll": 3.5, "server_nll_gap": 0.001}

    def lost(*_, **__):
        raise MlflowException("API request failed: connection refused")

    monkeypatch.setattr(MlflowClient, "get_model_version", lost)
    with pytest.raises(MlflowException, match="connection refused"):
        served_later(run, place, served)


def test_two_models_of_one_name_are_not_compared(place, request):
    model = f"named-{request.node.name}"

    def made(content: str, path: str, digest: str, **more):
        facts = {"source.path": path, "source.digest": digest}
        one = replace(offered(content, model, kl=0.01), facts=facts, **more)
        return offer(open_run(place, f"{model} {content}", content, {}, {}), place, one)

    assert made("first", "/a/model", "d1")["champion"] is True
    refused = made("other", "/b/model", "d2")
    assert refused["champion"] is False and present(place, model) == "1"
    assert refused["gate"] == (
        "refused: champion version 1 is of another model of this name (/a/model); set "
        "gate.model_name"
    )
    # new weights of one place, and the same weights elsewhere, are the model still
    assert made("next", "/a/model", "d3")["champion"] is True
    assert made("moved", "/c/model", "d3")["champion"] is True
    # so is whatever the recipe gives this name
    assert made("named", "/b/model", "d2", named=True)["champion"] is True


def test_a_champions_folder_is_known(place, tmp_path, request):
    model = f"folder-{request.node.name}"
    where = tmp_path / "it's out"
    run = open_run(place, model, model, {}, {})
    assert is_champions(place, where) is False
    offer(run, place, replace(offered("one", model, kl=0.9), location=str(where)))
    assert is_champions(place, where) is False
    offer(run, place, lying(where, offered("two", model)))
    assert is_champions(place, where) is True
    assert is_champions(place, tmp_path / "elsewhere") is False
    with closing(socket.create_server(("127.0.0.1", 0))) as found:
        port = found.getsockname()[1]
    # what cannot be asked may be one
    assert is_champions(replace(place, tracking_uri=f"http://127.0.0.1:{port}"), where) is True


@pytest.mark.parametrize("dies_at", ["set_registered_model_alias", "log_batch"])
def test_a_champion_that_waited_takes_its_place_though_the_message_is_cut_short(
    home, tmp_path, monkeypatch, dies_at
):
    place = place_in(home)
    run = open_run(place, "a", "a", {}, {})
    out, waiting = tmp_path / "out", tmp_path / "out.12345678"
    out.mkdir()
    (out / REPORT).write_text("old")
    one = replace(lying(waiting, offered("new")), place=str(out))
    strict = replace(one, limits=LIMITS | {"max_kl": 0.001})
    assert offer(run, place, strict)["location"] == str(waiting)
    assert (out / REPORT).read_text() == "old"
    with monkeypatch.context() as cut:
        cut.setattr(MlflowClient, dies_at, lambda *_, **__: (_ for _ in ()).throw(OSError("cut")))
        with pytest.raises(OSError, match="cut"):
            offer(run, place, one)
    found = offer(run, place, one)
    assert (found["champion"], found["location"]) == (True, str(out))
    assert (out / REPORT).read_text() == "new" and not waiting.exists()
    version = MlflowClient(place.tracking_uri).get_model_version("tiny-W4A16", "1")
    assert version.tags["location"] == str(out)
    assert offer(run, place, one)["location"] == str(out)


def test_one_that_lies_nowhere_any_more_is_not_champion(place, tmp_path, request):
    model = f"gone-{request.node.name}"
    out, waiting = tmp_path / "out", tmp_path / "out.12345678"
    run = open_run(place, model, model, {}, {})
    offer(run, place, lying(out, offered("first", model)))
    removed = lying(waiting, offered("second", model, kl=0.01))
    shutil.rmtree(waiting)
    found = offer(run, place, removed)
    assert (found["champion"], found["gate"]) == (
        False,
        f"refused: {waiting} is no longer there",
    )
    # nor one that was to take the champion's place
    found = offer(run, place, replace(removed, place=str(out)))
    assert found["gate"] == f"refused: another checkpoint lies at {out} by now"
    assert present(place, model) == "1" and (out / REPORT).read_text() == "first"


def test_a_champion_of_another_name_keeps_its_folder(place, tmp_path, request):
    four, eight = (f"{name}-{request.node.name}" for name in ("W4A16", "W8A8"))
    client, out, waiting = MlflowClient(place.tracking_uri), tmp_path / "out", tmp_path / "out.1"
    run = open_run(place, four, four, {}, {})
    assert offer(run, place, lying(out, offered("first", four)))["champion"] is True
    one = replace(lying(waiting, offered("second", eight, kl=0.01)), place=str(out))
    found = offer(run, place, one)
    assert (found["champion"], found["location"]) == (False, str(waiting))
    assert found["gate"] == (
        f"refused: {out} holds the champion of {four}, version 1; give another output, or remove "
        f"the alias champion of {four} in MLflow"
    )
    assert (out / REPORT).read_text() == "first" and (waiting / REPORT).read_text() == "second"
    assert present(place, four) == "1" and present(place, eight) is None
    # once nobody calls that a champion, it takes the place
    client.delete_registered_model_alias(four, "champion")
    again = open_run(place, eight, eight, {}, {})
    found = offer(again, place, one)
    assert (found["champion"], found["location"]) == (True, str(out))
    assert (out / REPORT).read_text() == "second" and not waiting.exists()


def test_a_champion_of_another_name_whose_folder_was_replaced_is_not_in_the_way(home, tmp_path):
    place, out = place_in(home), tmp_path / "out"
    run = open_run(place, "a", "a", {}, {})
    offer(run, place, lying(out, offered("first", "four")))
    (out / REPORT).write_text("of a run without a registry")
    one = replace(lying(tmp_path / "out.1", offered("second", "eight")), place=str(out))
    assert offer(run, place, one)["champion"] is True
    assert (out / REPORT).read_text() == "second"


def test_what_was_served_elsewhere_does_not_take_a_folder_that_holds_another(home, tmp_path):
    place, out = place_in(home), tmp_path / "out"
    run = open_run(place, "a", "a", {}, {})
    asked = replace(lying(out, offered("a")), limits=LIMITS | {"require_served": True})
    assert offer(run, place, asked)["champion"] is False
    served = {"served": YES, "served_reason": "", "server_nll": 3.5, "server_nll_gap": 0.001}
    lying(out, offered("b"))
    found = served_later(run, place, served)
    assert found["gate"] == f"refused: another checkpoint lies at {out} by now"
    assert present(place, "tiny-W4A16") is None
    # a machine that never had the folder says nothing of it
    shutil.rmtree(out)
    served |= {"server_nll": 3.4}
    assert served_later(run, place, served)["champion"] is True


# through the journal


def test_a_late_offer_does_not_take_a_folder_that_holds_another(home, tmp_path):
    with closing(socket.create_server(("127.0.0.1", 0))) as found:
        away = place_in(home, f"http://127.0.0.1:{found.getsockname()[1]}")
    out, back = tmp_path / "out", place_in(home)
    with told_run(away, "work") as run:
        run.open("work", "a run", {}, {})
        run.offer(lying(out, offered("a", kl=0.01)))
        run.finish()
        assert told(run)["left"] == 3
    # MLflow is back, and knows of no champion there: another replaces the folder
    other = lying(out, offered("b"))
    assert offer(open_run(back, "other", "other", {}, {}), back, other)["champion"] is True
    (kept,) = journals(away.store)
    sent = synchronize(kept, back)
    assert (sent.reason, sent.decision["champion"]) == (None, False)
    assert sent.decision["gate"] == f"refused: another checkpoint lies at {out} by now"
    (shown,) = champions(MlflowClient(back.tracking_uri))
    assert (shown["version"], shown["kl"], shown["location"]) == ("1", 0.04, str(out))


def test_the_decision_is_made_when_the_server_is_back(home, server, caplog):
    with closing(socket.create_server(("127.0.0.1", 0))) as found:
        away = place_in(home, f"http://127.0.0.1:{found.getsockname()[1]}")
    model = "journal-away"
    with told_run(away, "work") as run:
        run.open("work", "a run", {}, {})
        run.offer(offered("a", model))
        run.finish()
        assert told(run)["left"] == 3 and run.decision is None
    # another became champion meanwhile: it is the one that is compared with
    back = place_in(home, server)
    offer(open_run(back, "other", "other", {}, {}), back, offered("b", model, kl=0.01))
    (kept,) = journals(away.store)
    caplog.set_level("INFO")
    sent = synchronize(kept, back)
    assert sent.reason is None
    assert (sent.decision["version"], sent.decision["champion"]) == ("2", False)
    assert f"{model} version 2: refused: KL 0.04 is more than 0.01" in caplog.text
    assert present(back, model) == "1"
    client = MlflowClient(server)
    (run,) = [r for r in client.search_runs(["1"]) if r.info.run_name == "a run"]
    assert run.info.status == "FINISHED"
    assert run.data.tags["gate"].startswith("refused: KL 0.04")


@pytest.mark.parametrize("code", ["ENDPOINT_NOT_FOUND", "PERMISSION_DENIED"])
def test_a_server_without_a_registry_is_told_of_the_run(home, monkeypatch, code):
    def refuse(*_, **__):
        raise MlflowException("no registry", error_code=getattr(databricks_pb2, code))

    monkeypatch.setattr(MlflowClient, "create_registered_model", refuse)
    with told_run(place_in(home), "work") as run:
        run.open("work", "a run", {}, {})
        run.offer(offered("a"))
        run.finish()
        assert told(run)["left"] == 0 and run.decision is None


def test_a_registry_that_refuses_stops_nothing(home, caplog):
    place = place_in(home)
    with told_run(place, "work") as run:
        run.open("work", "a run", {}, {})
        run.offer(replace(offered("a"), model="no/name"))
        run.finish()
        assert told(run)["left"] == 0 and run.decision is None
    assert "MLflow refuses a message (offer)" in caplog.text


def test_the_decision_is_known_to_the_run(home, capfd):
    place = place_in(home)
    with told_run(place, "work") as run:
        run.open("work", "a run", {}, {})
        run.offer(offered("a"))
        run.finish()
        assert told(run)["left"] == 0
        assert run.decision["champion"] is True and run.decision["version"] == "1"
    assert capfd.readouterr().out == ""


def test_who_waits_too_long_for_another_keeps_its_message(home, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr(registry, "LOCK_S", 0.05)
    place = place_in(home)
    with told_run(place, "work") as run:
        run.open("work", "a run", {}, {})
        told(run)
        with FileLock(place.store / "journal" / "registry.lock"):
            run.offer(offered("a"))
            assert told(run)["left"] == 1
        assert told(run)["left"] == 0
    assert journals(place.store) == []
