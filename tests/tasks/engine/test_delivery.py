"""Sending a journal: to slow servers, past refusals, to its own address, beside another sender."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from requests import HTTPError, Response

from tasks.engine import delivery, journal
from tasks.engine.delivery import Away, deliver
from tasks.engine.journal import Sent, send_kept, synchronize, told, told_run
from tasks.engine.messages import Journal, journals
from tasks.engine.settings import Settings
from tests.conftest import ROOT


def runs_of(place: Settings) -> list:
    client = MlflowClient(place.tracking_uri)
    experiment = client.get_experiment_by_name("blockquant")
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])


# a slow server


@contextmanager
def slow_server(seconds: float) -> Iterator[tuple[str, list[str]]]:
    """An MLflow server that takes so long for each answer; its address, and what it was asked."""
    asked: list[str] = []
    run = {"info": {"run_id": "r", "experiment_id": "1", "status": "RUNNING"}, "data": {}}
    answers = {
        "get-by-name": {"experiment": {"experiment_id": "1", "lifecycle_stage": "active"}},
        "create": {"run": run},
        "get": {"run": run},
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append(self.path)
            time.sleep(seconds)
            name = self.path.partition("?")[0].rpartition("/")[2]
            body = json.dumps(answers.get(name, {})).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


SLOWLY = """
import sys, time
from pathlib import Path
import mlflow
from tasks.engine import journal
from tests.places import place_in
journal.END_S = 9.0
began = time.monotonic()
with journal.told_run(place_in(Path(sys.argv[1]), sys.argv[2]), "work") as run:
    run.open("work", "a run", {}, {})
    for number in range(30):
        run.set_tags({"a": str(number)})
    journal.told(run)
print(run.journal.count(), time.monotonic() - began, time.time(), flush=True)
"""


def test_what_a_slow_server_is_not_told_is_kept_and_the_process_ends(home: Path) -> None:
    with slow_server(1.0) as (uri, asked):
        done = subprocess.run(
            [sys.executable, "-c", SLOWLY, str(home), uri],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        ended = time.time()
        said, took, left = done.stdout.split()
        sent = len(asked)
    assert 20 < int(said) < 31 and sent > 3
    # waited for once, and for nothing after that
    assert float(took) < 9 + 3 and ended - float(left) < 5
    (kept,) = journals(home / "store")
    assert kept.count() == int(said)
    assert f"{said} messages to MLflow are kept" in done.stderr


def test_nobody_else_sends_until_a_message_on_its_way_has_ended(
    place: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "END_S", 0.1)
    goes_on, began = threading.Event(), threading.Event()

    def hang(*_: object) -> dict[str, str]:
        began.set()
        goes_on.wait(30)
        return {}

    send = delivery._send
    monkeypatch.setattr(delivery, "_send", hang)
    with told_run(place, "work") as run:
        run.open("work", "a run", {}, {})
        run.finish()
        assert began.wait(30)
    assert run.journal.count() == 2
    assert synchronize(run.journal, place).reason == "a run sends it right now"
    monkeypatch.setattr(delivery, "_send", send)
    goes_on.set()
    run._sender._thread.join(30)
    # what came of it was not struck out: it had been counted as kept
    assert run.journal.count() == 2
    assert synchronize(run.journal, place) == Sent(None)
    (found,) = runs_of(place)
    assert found.info.status == "FINISHED"


# refusals


def test_an_experiment_that_was_deleted_is_restored(
    place: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    client = MlflowClient(place.tracking_uri)
    for number in range(2):
        with told_run(place, f"work {number}") as run:
            run.open(f"work {number}", "a run", {}, {})
            run.flush()
            # at the first turn between two messages, at the second before all
            experiment = client.get_experiment_by_name("blockquant")
            client.delete_experiment(experiment.experiment_id)
            if number == 0:
                run.set_tags({"told": "yes"})
                run.finish()
                assert told(run)["left"] == 0
                client.delete_experiment(experiment.experiment_id)
            else:
                run.open(f"work {number}", "a run", {}, {})
                run.set_tags({"told": "yes"})
                run.finish()
                assert told(run)["left"] == 0
    found = runs_of(place)
    assert [run.data.tags["told"] for run in found] == ["yes", "yes"]
    assert caplog.text.count("was deleted in MLflow: it is restored") >= 2
    assert "refuses" not in caplog.text


def test_a_refused_open_keeps_all(
    place: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

    def refuse(*_: object, **__: object) -> None:
        raise MlflowException("it must be active", error_code=INVALID_PARAMETER_VALUE)

    with monkeypatch.context() as patched:
        patched.setattr(delivery, "open_run", refuse)
        with told_run(place, "work") as run:
            run.open("work", "a run", {}, {})
            run.set_tags({"told": "yes"})
            run.finish()
            assert told(run)["left"] == 3
    assert "it must be active; mend that in MLflow, such as by restoring the" in caplog.text
    (kept,) = journals(place.store)
    assert kept.count() == 3
    assert synchronize(kept, place) == Sent(None)
    (found,) = runs_of(place)
    assert (found.data.tags["told"], found.info.status) == ("yes", "FINISHED")


@pytest.mark.parametrize(("status", "left"), [(413, 0), (422, 0), (401, 3), (429, 3), (503, 3)])
def test_what_a_proxy_never_takes_is_set_aside(
    place: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    status: int,
    left: int,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        answer = Response()
        answer.status_code = status
        raise HTTPError(f"{status} for url", response=answer)

    monkeypatch.setattr(MlflowClient, "log_artifact", refuse)
    large = tmp_path / "large.bin"
    large.write_bytes(b"large")
    with told_run(place, "work") as run:
        run.open("work", "a run", {}, {})
        assert run.flush() == 0
        run.log_file(large)
        run.set_tags({"told": "yes"})
        run.finish()
        assert told(run)["left"] == left
    if not left:
        (aside,) = (place.store / "logs").glob("mlflow-refused-*.jsonl")
        line = json.loads(aside.read_text())
        assert line["kind"] == "log_file" and f"{status} for url" in line["reason"]
        assert f"set aside in {aside}" in caplog.text
        (found,) = runs_of(place)
        assert (found.data.tags["told"], found.info.status) == ("yes", "FINISHED")


def test_why_nothing_is_taken_is_said_in_one_line(
    place: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MlflowException("not at\nhttp://me:word@127.0.0.1/ here " + "x" * 400)

    monkeypatch.setattr(MlflowClient, "log_artifact", refuse)
    with told_run(place, "work") as run:
        run.open("work", "a run", {}, {})
        run.log_text("text", "file.txt")
        assert told(run)["left"]
    (line,) = [one for one in caplog.messages if "does not answer" in one]
    assert "MlflowException: not at http://***@127.0.0.1/ here xxx" in line
    assert "word" not in line and "\n" not in line and len(line) < 450


def test_an_answer_of_a_proxy_to_mlflows_client_is_told_apart() -> None:
    def said(status: int) -> MlflowException:
        return MlflowException(
            f"API request to endpoint /api failed with error code {status} != 200. Response: ''"
        )

    message = delivery.Message(1, "log_points", {})
    assert delivery.is_refusal(said(413), message)
    assert not any(delivery.is_refusal(said(status), message) for status in (404, 403, 502))


def test_a_file_that_is_gone_stops_no_other(place: Settings, tmp_path: Path) -> None:
    with told_run(place, "work") as run:
        run.open("work", "a run", {}, {})
        run.flush()
        run.journal.add_all([("log_file", {"path": str(tmp_path / "gone"), "folder": None})])
        run.finish()
        assert told(run)["left"] == 0


# addresses


def left_by_a_kill(place: Settings) -> Journal:
    """A journal whose first message its server had."""
    with told_run(place, "work") as run:
        run.open("work", "a run", {}, {})
        run.flush()
        kept = run.journal.path.read_bytes()
    run.journal.path.write_bytes(kept)
    run.journal.add_all([("set_tags", {"tags": {"later": "yes"}})])
    return run.journal


def test_another_address_has_a_journal_of_its_own(place: Settings, home: Path) -> None:
    kept = left_by_a_kill(place)
    other = replace(place, tracking_uri=f"sqlite:///{home}/other.db")
    with told_run(other, "work") as run:
        run.open("work", "elsewhere", {}, {})
        run.finish()
        assert told(run)["left"] == 0
    assert [run.info.run_name for run in runs_of(other)] == ["elsewhere"]
    assert [run.data.tags.get("later") for run in runs_of(place)] == [None]
    assert [journal.path for journal in journals(place.store)] == [kept.path]
    assert kept.identity == run.journal.identity == "work"
    # from anywhere it is sent to its own
    assert synchronize(kept, other) == Sent(None)
    assert [run.data.tags.get("later") for run in runs_of(place)] == ["yes"]
    assert len(runs_of(other)) == 1 and journals(place.store) == []


def test_a_database_that_is_gone_is_not_made_anew(place: Settings, home: Path) -> None:
    kept = left_by_a_kill(place)
    (home / "mlflow.db").unlink()
    other = replace(place, tracking_uri=f"sqlite:///{home}/other.db")
    reason = synchronize(kept, other).reason
    assert reason == f"it belongs to {place.tracking_uri}: that database is gone"
    assert kept.count() == 1 and not (home / "mlflow.db").exists()


def test_an_address_with_a_password_is_not_written_down(place: Settings, home: Path) -> None:
    kept = Journal(home / "store" / "journal" / "work.sqlite")
    kept.add_all([("finish", {})])
    secret = "http://me:pass@127.0.0.1:9"
    kept.sent(kept.first(), delivery.facts_of_server(secret))
    assert b"pass" not in kept.path.read_bytes()
    assert kept.is_for(secret) and not kept.is_for(place.tracking_uri)
    kept.add_all([("finish", {})])
    with pytest.raises(Away, match="set MLFLOW_TRACKING_URI to that"):
        deliver(kept, place)


# other senders


def test_a_run_goes_on_while_another_process_sends(
    place: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal, "END_S", 0.2)
    kept = Journal(place.store / "journal" / "work.sqlite")
    held = kept.lock()
    with held.acquire():
        with told_run(place, "work") as run:
            run.open("work", "a run", {}, {})
            run.finish()
            assert told(run)["left"] == 2
        assert "2 messages to MLflow are kept" in caplog.text
    assert synchronize(kept, place) == Sent(None)
    assert [run.info.status for run in runs_of(place)] == ["FINISHED"]


def test_what_another_process_sends_is_not_taken_from_a_run(place: Settings) -> None:
    held = Journal(place.store / "journal" / "work.sqlite").lock()
    with told_run(place, "work") as run:
        with held.acquire():
            run.journal.add_all([("open", open_body())])
            # as ``blockquant sync`` does to the end: the run's id must stay known
            deliver(run.journal, place)
            assert not journal._end(run.journal, place, None) or run.journal.fact("run") is not None
        assert run.id is not None
        run.set_tags({"later": "yes"})
        run.finish()
        assert told(run)["left"] == 0
    (found,) = runs_of(place)
    assert found.data.tags["later"] == "yes"
    assert journals(place.store) == []


def open_body() -> dict[str, object]:
    return {"identity": "work", "name": "a run", "parameters": {}, "tags": {}}


def test_all_that_earlier_runs_left_is_sent(place: Settings) -> None:
    for name in ("one", "two"):
        left = Journal(place.store / "journal" / f"{name}.sqlite")
        left.add_all([("open", open_body() | {"identity": name, "name": name})])
        left.add_all([("finish", {"time_ms": 2})])
    send_kept(place)
    assert journals(place.store) == []
    assert {run.info.run_name for run in runs_of(place)} == {"one", "two"}


def test_sending_what_is_left_is_bounded_and_never_fails(
    place: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_kept(place)
    left = Journal(place.store / "journal" / "work.sqlite")
    left.add_all([("open", open_body())])
    goes_on = threading.Event()
    monkeypatch.setattr(delivery, "_send", lambda *_: goes_on.wait(30) and {})
    began = time.monotonic()
    send_kept(place, within_s=0.2)
    assert time.monotonic() - began < 5
    goes_on.set()
    with left.lock().acquire(timeout=30):
        assert left.count() == 1
    monkeypatch.setattr(journal, "synchronize", lambda *_: 1 / 0)
    send_kept(place)
