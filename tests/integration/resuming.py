"""A run of a small model, left alone or killed, and what has to hold after the next run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.engine.publication import REPORT
from tests.integration.crashing import Ran, Work, run
from tests.models import make_checkpoint, make_text
from tests.places import new_home

BLOCKS = 2
LINEARS = 7
EPOCHS = 3
KILLED = -9
# how often each is computed for a block: a loss before the first epoch, two in each
ONCE = {"decide": 1, "clip": 1, "learn": 1, "loss": 1 + 2 * EPOCHS, "round": LINEARS}
Curves = dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class Case:
    """A recipe with its model, and what an undisturbed run of it did and gave."""

    folder: Path
    prepared: Path
    recipe: Path
    model: Path
    undisturbed: Ran
    files: dict[str, bytes]
    curves: Curves

    def parameters(self, output: Path, **more: Any) -> dict[str, Any]:
        given = {"recipe": str(self.recipe), "model": str(self.model), "output": str(output)}
        return given | more


def make_case(
    folder: Path, body: str, prepared: Path, steps: Sequence[str], passes: dict[str, int]
) -> Case:
    """Run a recipe undisturbed.

    Args:
        folder: of everything that the case needs.
        body: the recipe but its evaluation; TEXT stands for the path of the text.
        prepared: a home with a migrated database.
        steps: what has to be computed, in this order.
        passes: how often it takes every block through each kind of computation.
    """
    model = make_checkpoint(folder / "tiny", blocks=BLOCKS)
    text = make_text(folder / "words.txt", words=3000)
    recipe = folder / "recipe.yml"
    evaluation = "eval: {name: text, path: TEXT, windows: 2, seq_len: 64, report: false}\n"
    recipe.write_text((evaluation + body).replace("TEXT", str(text)))
    empty = Case(folder, prepared, recipe, model, Ran(0, [], {}, {}), {}, {})
    output = folder / "undisturbed" / "out"
    home = case_home(empty, "undisturbed")
    ran = run(Work(home, empty.parameters(output), folder / "trace"))
    assert ran.exitcode == 0, ran.result
    assert ran.made == ran.committed == list(steps)
    assert ran.counts == {what: n * BLOCKS * ONCE[what] for what, n in passes.items()}
    (curves,) = assert_tracked(home)
    return Case(folder, prepared, recipe, model, ran, contents(output), curves)


def case_home(case: Case, name: str) -> Path:
    return new_home(case.folder / name / "home", case.prepared)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_published(case: Case, output: Path) -> None:
    found = contents(output)
    assert sorted(found) == sorted(case.files)
    assert [name for name in found if found[name] != case.files[name]] == []
    assert os.listdir(output.parent) == [output.name], "something is left beside the output"


def assert_tracked(home: Path, runs: int = 1) -> list[Curves]:
    """Every run finished, with one point per metric and step; the points but those of times."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("blockquant")
    found = client.search_runs([experiment.experiment_id])
    assert [r.info.status for r in found] == ["FINISHED"] * runs
    versions = client.search_model_versions()
    assert sorted(v.run_id for v in versions) == sorted(r.info.run_id for r in found)
    for version in versions:
        (run,) = [r for r in found if r.info.run_id == version.run_id]
        assert run.data.tags["gate"] == version.tags["gate"] != ""
    curves: list[Curves] = []
    for tracked in found:
        assert "failure" not in tracked.data.tags
        assert {f"eval.{n}" for n in ("nll", "kl", "top1_agreement")} <= set(tracked.data.metrics)
        curves.append({})
        for name in tracked.data.metrics:
            history = client.get_metric_history(tracked.info.run_id, name)
            points = sorted((point.step, point.value) for point in history)
            several = name.startswith(("weight_error.", "output_error."))
            length = 1 + EPOCHS if name.startswith("loss.") else BLOCKS if several else 1
            assert [step for step, _ in points] == list(range(length)), name
            if not name.startswith("seconds."):
                curves[-1][name] = points
    return curves


def assert_store_clean(home: Path) -> None:
    """Nothing half-written, and no hidden states: they served while blocks were quantized."""
    assert list((home / "store" / "staging").iterdir()) == []
    assert entries(home, "boundary") == []


def entries(home: Path, task: str) -> list[Path]:
    """Folders of a task's entries, oldest first."""
    found = []
    for manifest in (home / "store" / "entries").glob("*/*/manifest.json"):
        record = json.loads(manifest.read_text())["record"]
        if record["task"] == task:
            found.append((record["created"], manifest.parent))
    return [folder for _, folder in sorted(found)]


def kill_and_resume(
    case: Case, at: int | str, place: str, old: bool = False, **more: Any
) -> list[str]:
    """Kill at one event, run the same again, check all; return the events up to the kill."""
    home = case_home(case, place)
    output = case.folder / place / "published" / "out"
    if old:
        output.mkdir(parents=True)
        (output / "old.txt").write_text("what was published before")
        (output / REPORT).write_text("{}")
    parameters = case.parameters(output, **more)
    killed = run(Work(home, parameters, home.parent / "killed", kill_at=at))
    assert killed.exitcode == KILLED, killed.result
    if output.exists() and not (output / "old.txt").exists():
        assert contents(output) == case.files, "published, but not whole"
    resumed = run(Work(home, parameters, home.parent / "resumed"))
    assert resumed.exitcode == 0, resumed.result
    assert_published(case, output)
    assert [*killed.committed, *resumed.made] == case.undisturbed.made
    for what, once in ONCE.items():
        computed = killed.counts.get(what, 0) + resumed.counts.get(what, 0)
        again = computed - case.undisturbed.counts.get(what, 0)
        assert again <= once, f"more than one block again: {again} {what}"
    assert assert_tracked(home) == [case.curves]
    assert_store_clean(home)
    return killed.events


def boundaries(case: Case) -> list[int]:
    """Where an entry is there but Prefect has no record of it; names come twice in two passes.

    That a step's lock is held and nothing computed yet is among what ``w8a8`` is killed at.
    """
    return [n for n, event in enumerate(case.undisturbed.events) if event.endswith(": committed")]


def kill_each(case: Case, points: Iterable[int | str], name: str, **more: Any) -> None:
    """Kill at each of these events, two at a time; report every one that fails."""

    def attempt(point: int | str) -> str | None:
        place = f"{name}-{str(point).replace(': ', '-').replace(' ', '-').replace('/', '-')}"
        try:
            events = kill_and_resume(case, point, place, **more)
            if isinstance(point, int):
                assert events == case.undisturbed.events[: point + 1]
            else:
                # what another thread does may be followed by one event more
                assert point in events[-2:]
        except Exception as error:
            named = case.undisturbed.events[point] if isinstance(point, int) else point
            return f"{named}: {type(error).__name__}: {error}"
        # a failed one is kept to be looked at
        shutil.rmtree(case.folder / place)
        return None

    with ThreadPoolExecutor(2) as pool:
        failures = [failure for failure in pool.map(attempt, points) if failure]
    assert not failures, "\n\n".join(failures)
