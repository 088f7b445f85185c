"""A real ``blockquant quantize`` with its own Prefect server, killed at random moments."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.engine.publication import REPORT, begun
from tasks.engine.store import Store
from tests.integration.resuming import assert_tracked, contents
from tests.models import make_checkpoint, make_text
from tests.operations.services import eventually
from tests.places import new_home

BLOCKS = 2
ROOT = Path(__file__).parent.parent.parent
# a server that migrates its new database finishes that first
LAST_SECONDS = 60
RECIPE = """
calib: {{name: text, path: {text}, n_samples: 4, seq_len: 64}}
eval: {{name: text, path: {text}, windows: 2, seq_len: 64, report: false}}
quant:
  method: Identity
  quant_out: true
  weight: {{bit: 8, symmetric: true, granularity: per_channel}}
  act: {{bit: 8, symmetric: true, granularity: per_token}}
"""


def command(recipe: Path, model: Path, output: Path) -> list[str]:
    options = ["--model", str(model), "--output", str(output), "--json"]
    # what a shell begins in the background ignores an interrupt, and so do its children
    heard = ["env", "--default-signal=INT"]
    return [*heard, sys.executable, "-m", "flows.cli", "quantize", str(recipe), *options]


def environment(home: Path) -> dict[str, str]:
    # nothing of the session's own server: the command starts one
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "BLOCKQUANT_"))}
    more = {"PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    return kept | {"BLOCKQUANT_HOME": str(home)} | more


def given(folder: Path) -> tuple[Path, Path]:
    """A recipe and a model to quantize with it."""
    recipe = folder / "recipe.yml"
    recipe.write_text(RECIPE.format(text=make_text(folder / "words.txt", words=3000)))
    return recipe, make_checkpoint(folder / "tiny", blocks=BLOCKS)


def servers(home: Path) -> list[int]:
    """Prefect servers of this home that still live."""
    found = []
    for process in psutil.process_iter():
        try:
            if "flows.prefect_api" not in " ".join(process.cmdline()):
                continue
            if process.environ().get("BLOCKQUANT_HOME") == str(home):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def wait_until_gone(home: Path) -> float:
    """Wait until no server of this home lives; return how long that took."""
    start = time.monotonic()
    while servers(home):
        assert time.monotonic() - start < LAST_SECONDS, "a Prefect server outlives its command"
        time.sleep(0.2)
    return time.monotonic() - start


def launch(arguments: list[str], home: Path) -> subprocess.Popen[str]:
    pipe: Any = subprocess.PIPE
    return subprocess.Popen(
        arguments,
        env=environment(home),
        stdout=pipe,
        stderr=pipe,
        text=True,
        cwd=home,
        start_new_session=True,
    )


@pytest.mark.ops
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.long)])
def test_kills_at_random_moments(prepared_home: Path, tmp_path: Path, kills: int) -> None:
    recipe, model = given(tmp_path)

    calm = tmp_path / "calm"
    calm.mkdir()
    start = time.monotonic()
    undisturbed = launch(command(recipe, model, tmp_path / "published" / "out"), calm)
    _, complaint = undisturbed.communicate()
    duration = time.monotonic() - start
    assert undisturbed.returncode == 0, complaint
    expected = contents(tmp_path / "published" / "out")

    draw = random.Random(20240917)
    killed = rounds = 0
    while killed < kills:
        # a round begins with nothing, not even databases, and ends with a published checkpoint
        rounds += 1
        home = tmp_path / f"home-{rounds}"
        home.mkdir()
        output = tmp_path / f"killed-{rounds}" / "out"
        while not ended(home, output):
            found = whole(home)
            # of the others the codes are packed: no block but this one is searched or rounded again
            assert found["transform"] - found["pack"] in (0, 1), found
            process = launch(command(recipe, model, output), home)
            moment = draw.uniform(0, duration) if killed < kills else None
            try:
                said, complaint = process.communicate(timeout=moment)
                assert process.returncode == 0, complaint
                assert_only_the_rest_was_made(json.loads(said)["steps"], found)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                # it may have ended by itself in that very moment
                assert process.returncode in (0, -signal.SIGKILL)
                killed += process.returncode != 0
        made = contents(output)
        assert sorted(made) == sorted(expected)
        assert [name for name in made if made[name] != expected[name]] == []
        assert os.listdir(output.parent) == ["out"]
        assert_tracked(home)
        wait_until_gone(home)
    print(f"{killed} kills in {rounds} rounds, {duration:.1f} s undisturbed")


def begun_run(folder: Path, prepared: Path) -> tuple[subprocess.Popen[str], Path, Path]:
    """A run that has its first result, its home, and where it will publish."""
    recipe, model = given(folder)
    home, output = new_home(folder / "home", prepared), folder / "published" / "out"
    process = launch(command(recipe, model, output), home)
    eventually(lambda: whole(home)["load_model"], "the first result")
    return process, home, output


@pytest.mark.long
@pytest.mark.timeout(600)
def test_an_interrupted_run_ends_and_says_so(prepared_home: Path, tmp_path: Path) -> None:
    process, home, output = begun_run(tmp_path, prepared_home)
    # as a terminal does: all that belong to the command hear it
    os.killpg(process.pid, signal.SIGINT)
    try:
        said, complaint = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        # it says where its threads are
        process.send_signal(signal.SIGABRT)
        pytest.fail(process.communicate()[1])
    assert process.returncode == 130
    assert said == "" and "server" not in complaint
    line = "interrupted; the same command goes on from what is done"
    assert complaint.splitlines()[-1].endswith(line)
    assert not output.exists()
    wait_until_gone(home)
    with closing(sqlite3.connect(home / "prefect" / "prefect.db")) as database:
        assert database.execute("SELECT state_type FROM flow_run").fetchall() == [("CRASHED",)]


@pytest.mark.ops
@pytest.mark.timeout(600)
def test_a_run_outlives_its_local_server(prepared_home: Path, tmp_path: Path) -> None:
    process, home, output = begun_run(tmp_path, prepared_home)
    (server,) = servers(home)
    os.kill(server, signal.SIGKILL)
    said, complaint = process.communicate(timeout=240)
    assert process.returncode == 0, complaint
    assert "the local Prefect server died (-9) and is started again" in complaint
    assert not any(step["cached"] for step in json.loads(said)["steps"])
    assert (output / REPORT).is_file()
    wait_until_gone(home)


def whole(home: Path) -> Counter[str]:
    """How many results of each kind of step are whole in the store."""
    store = Store(home / "store")
    return Counter(e.task for e in store.entries() if store.get(e.key) is not None)


def assert_only_the_rest_was_made(steps: list[dict[str, Any]], found: Counter[str]) -> None:
    """A step was found exactly if its result was whole; a kind's come in the order of blocks."""
    kinds = [(step["step"].split("[")[0], step["cached"]) for step in steps]
    for kind, members in groupby(sorted(kinds, key=lambda each: each[0]), lambda each: each[0]):
        cached = [each for _, each in members]
        rest = len(cached) - found[kind]
        assert cached == [True] * found[kind] + [False] * rest, (kind, steps, found)


def ended(home: Path, output: Path) -> bool:
    """Published, and MLflow told so: a kill after that leaves nothing to be done."""
    return output.exists() and begun(home / "store", output) is None
