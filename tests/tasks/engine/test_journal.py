"""What MLflow is told gets there once, whether its server is there, away, slow, or dies."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tasks.engine import journal as journals_module
from tasks.engine.journal import Sent, synchronize, told, told_run
from tasks.engine.messages import Journal, journals
from tasks.engine.settings import Settings
from tasks.engine.tracking import Point
from tests.places import place_in
from tests.tasks.engine.test_delivery import slow_server

POINTS = [Point(f"error.{n}", block / 2, block, 1000 + block) for n in "ab" for block in (0, 1)]


@pytest.fixture
def away() -> str:
    """An address where nobody listens."""
    with closing(socket.create_server(("127.0.0.1", 0))) as found:
        return f"http://127.0.0.1:{found.getsockname()[1]}"


def tell(run, tmp_path: Path) -> None:
    """One message of each kind."""
    log = tmp_path / "run.log"
    log.write_text("all went well")
    run.open("work", "a run", {"bit": 4}, {"device": "cpu"})
    run.log_points(POINTS)
    run.log_first_points([Point("seconds.quantize", 1.5, 0, 1000)])
    run.log_file(log)
    log.unlink()
    run.log_table([{"block": 0}], "errors.json")
    run.log_text("quant: RTN", "recipe.yml")
    run.log_json({"a": 1}, "searches.json")
    run.log_input("text", "ab" * 32, {"windows": 4}, "evaluation")
    run.set_tags({"scheme": "W4A16"})
    run.finish()


def require_told_once(place: Settings) -> str:
    client = MlflowClient(place.tracking_uri)
    experiment = client.get_experiment_by_name("blockquant")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "a run"
    assert run.data.params == {"bit": "4"}
    assert {**run.data.tags, "device": "cpu", "scheme": "W4A16"} == run.data.tags
    for name in ("error.a", "error.b"):
        history = client.get_metric_history(run.info.run_id, name)
        assert [(m.step, m.value, m.timestamp) for m in history] == [(0, 0.0, 1000), (1, 0.5, 1001)]
    assert len(client.get_metric_history(run.info.run_id, "seconds.quantize")) == 1
    assert len(run.inputs.dataset_inputs) == 1
    kept = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert kept == {"run.log", "errors.json", "recipe.yml", "searches.json"}
    text = Path(client.download_artifacts(run.info.run_id, "run.log")).read_text()
    assert text == "all went well"
    return run.info.run_id


def test_messages_arrive_and_nothing_stays(place, tmp_path):
    with told_run(place, "work") as run:
        tell(run, tmp_path)
        found = told(run)
    assert found == {"uri": place.tracking_uri, "run": require_told_once(place), "left": 0}
    assert journals(place.store) == []
    assert list((place.store / "journal").glob("*.files")) == []


def test_what_is_told_together_is_written_at_once_and_in_order(place, home, away, tmp_path):
    with told_run(place_in(home, away), "work") as run:
        run.open("work", "a run", {"bit": 4}, {"device": "cpu"})
        with run.together():
            run.log_points(POINTS)
            run.set_tags({"scheme": "W4A16"})
            # a process that is killed here has told none of it
            assert run.journal.count() == 1
        assert run.journal.count() == 3
        # what was told before a failure is told
        with pytest.raises(ZeroDivisionError), run.together():
            run.finish()
            _ = 1 / 0
    (kept,) = journals(place.store)
    kinds = []
    while (message := kept.first()) is not None:
        kinds.append(message.kind)
        kept.sent(message)
    assert kinds == ["open", "log_points", "set_tags", "finish"]


def test_what_is_told_beside_waits_for_no_disk(place, home, away, monkeypatch):
    written, go_on = [], threading.Event()
    add_all = Journal.add_all

    def slowly(self, messages):
        assert go_on.wait(30)
        add_all(self, messages)
        written.extend(kind for kind, _ in messages)

    with told_run(place_in(home, away), "work") as run:
        run.open("work", "a run", {"bit": 4}, {"device": "cpu"})
        monkeypatch.setattr(Journal, "add_all", slowly)
        with run.beside():
            run.log_points(POINTS)
            with run.together():
                run.set_tags({"scheme": "W4A16"})
                run.log_points(POINTS)
            assert not written
            go_on.set()
        assert written == ["log_points", "set_tags", "log_points"]
        go_on.clear()
        # and from then on who tells waits
        asked = threading.Timer(0.1, go_on.set)
        asked.start()
        run.finish()
        assert written[3:] == ["finish"]
    (kept,) = journals(place.store)
    assert kept.count() == 5


def test_what_cannot_be_written_beside_is_raised(place, home, away, monkeypatch):
    def full(self, messages):
        raise OSError(28, "No space left on device")

    with told_run(place_in(home, away), "work") as run:
        run.open("work", "a run", {"bit": 4}, {"device": "cpu"})
        with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
            patched.setattr(Journal, "add_all", full)
            with run.beside():
                run.log_points(POINTS)
        with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
            patched.setattr(Journal, "add_all", full)
            with run.beside():
                # before its end, by who tells next
                for _ in range(1000):
                    run.log_points(POINTS)
                    time.sleep(0.01)
                raise AssertionError("it was told a thousand times")
        with pytest.raises(ZeroDivisionError), run.beside():
            run.log_points(POINTS)
            _ = 1 / 0
        # a failure of what is done meanwhile loses nothing
        assert run.journal.count() == 2


def test_a_server_that_is_away_is_told_later(place, home, away, tmp_path, caplog):
    elsewhere = place_in(home, away)
    began = time.monotonic()
    with told_run(elsewhere, "work") as run:
        tell(run, tmp_path)
        found = told(run)
    assert time.monotonic() - began < 10
    assert found == {"uri": away, "run": None, "left": 10}
    assert caplog.text.count("MLflow does not answer") == 1
    assert "10 messages to MLflow are kept; send them with: blockquant sync" in caplog.text
    (kept,) = journals(place.store)
    assert synchronize(kept, elsewhere).reason is not None and kept.count() == 10
    # no server was heard yet: any may take it
    assert synchronize(kept, place) == Sent(None)
    require_told_once(place)
    assert journals(place.store) == []


def test_telling_again_after_a_kill_doubles_nothing(place, tmp_path):
    for _ in range(2):
        with told_run(place, "work") as run:
            tell(run, tmp_path)
            # as if the process had died before the end was heard
            if not _:
                run.journal.add_all([("log_points", {"points": [vars(point) for point in POINTS]})])
        client = MlflowClient(place.tracking_uri)
        experiment = client.get_experiment_by_name("blockquant")
        for found in client.search_runs([experiment.experiment_id]):
            client.update_run(found.info.run_id, status="RUNNING")
            client.set_terminated(found.info.run_id, "FINISHED" if _ else "KILLED")
    require_told_once(place)


def test_a_slow_server_does_not_stall(home, tmp_path, monkeypatch):
    monkeypatch.setattr(journals_module, "END_S", 4.0)
    with slow_server(0.5) as (uri, asked):
        elsewhere = place_in(home, uri)
        began = time.monotonic()
        with told_run(elsewhere, "work") as run:
            tell(run, tmp_path)
            assert time.monotonic() - began < 1
            for block in range(20):
                run.set_tags({"block": str(block)})
            # the second time is not waited for again
            assert told(run)["left"] > 0
        assert time.monotonic() - began < 4 + 2
        # it answers, and had some of it
        assert len(asked) > 3 and 0 < run.journal.count() < 30


def test_a_silent_server_does_not_stall(home, tmp_path, monkeypatch):
    monkeypatch.setattr(journals_module, "END_S", 1.0)
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        elsewhere = place_in(home, f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with told_run(elsewhere, "work") as run:
            tell(run, tmp_path)
            assert time.monotonic() - began < 1
        # the end waits as long as it may, and no longer
        assert time.monotonic() - began < 5
    assert journals(elsewhere.store)[0].count() == 10


def test_a_message_that_is_refused_stops_no_other(place, tmp_path, caplog):
    with told_run(place, "work") as run:
        run.open("work", "a run", {}, {})
        run.log_points([Point("no/such\nname", 1.0, 0, 1)])
        run.set_tags({"after": "yes"})
        assert told(run)["left"] == 0
    assert "MLflow refuses a message (log_points)" in caplog.text
    client = MlflowClient(place.tracking_uri)
    experiment = client.get_experiment_by_name("blockquant")
    assert client.search_runs([experiment.experiment_id])[0].data.tags["after"] == "yes"


def test_a_journal_of_another_server_is_not_sent_here(place, home, tmp_path):
    with told_run(place, "work") as run:
        run.open("work", "a run", {}, {})
        told(run)
        run.journal.add_all([("set_tags", {"tags": {"later": "yes"}})])
        kept = run.journal
        other = replace(place, tracking_uri=f"sqlite:///{home}/other.db")
        with pytest.raises(journals_module.Away, match="belongs to another tracking server"):
            journals_module.deliver(kept, other)
        assert kept.count() == 1


def test_a_journal_that_is_being_sent_is_left_alone(place, tmp_path):
    with told_run(place, "work") as run:
        run.open("work", "a run", {}, {})
        told(run)
        run.journal.add_all([("set_tags", {"tags": {"later": "yes"}})])
        assert synchronize(Journal(run.journal.path), place).reason == "a run sends it right now"


def test_messages_outlive_a_killed_process(place, home, away, tmp_path):
    script = """
import os, signal, sys
from pathlib import Path
from tests.places import place_in
from tests.tasks.engine.test_journal import tell
from tasks.engine.journal import told_run
with told_run(place_in(Path(sys.argv[1]), sys.argv[2]), "work") as run:
    tell(run, Path(sys.argv[3]))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", script, str(home), away, str(tmp_path)]
    root = str(Path(__file__).parents[3])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": root}, check=False)
    assert done.returncode == -9
    (kept,) = journals(place.store)
    assert kept.count() == 10
    assert synchronize(kept, place) == Sent(None)
    require_told_once(place)


def test_a_run_whose_process_is_gone_has_failed_until_it_goes_on(place: Settings) -> None:
    def tracked() -> Any:
        client = MlflowClient(place.tracking_uri)
        experiment = client.get_experiment_by_name("blockquant")
        (run,) = client.search_runs([experiment.experiment_id])
        return run

    with told_run(place, "work") as run:
        run.open("work", "a run", {}, {})
        told(run)
        # as a process leaves it that is killed
        left = shutil.copy(run.journal.path, run.journal.path.with_name("left.sqlite"))
        assert synchronize(run.journal, place).reason is not None
        assert tracked().info.status == "RUNNING"
    os.replace(left, run.journal.path)
    assert synchronize(run.journal, place) == Sent(None)
    assert tracked().info.status == "FAILED"
    assert tracked().data.tags["failure"].startswith("its process ended")
    assert journals(place.store) == []
    with told_run(place, "work") as run:
        run.open("work", "a run", {}, {})
        run.finish()
    assert tracked().info.status == "FINISHED" and "failure" not in tracked().data.tags


def test_messages_are_plain_json(place, away, home, tmp_path):
    with told_run(place_in(home, away), "work") as run:
        run.log_points(POINTS)
    message = journals(place.store)[0].first()
    assert message.kind == "log_points" and json.loads(json.dumps(message.body)) == message.body


def test_a_journal_that_is_gone_is_not_made_by_who_reads(place: Settings) -> None:
    with told_run(place, "work") as run:
        journal = run.journal
    assert journals(place.store) == []
    assert (journal.count(), journal.first(), journal.fact("run")) == (0, None, None)
    assert journals(place.store) == [] and not journal.path.exists()


def test_a_journal_that_goes_while_they_are_listed(place: Settings) -> None:
    (place.store / "journal").mkdir(parents=True)
    # is found, and has no age
    (place.store / "journal" / "gone.sqlite").symlink_to(place.store / "nowhere")
    assert journals(place.store) == []
