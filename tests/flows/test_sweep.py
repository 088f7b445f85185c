"""Sweeps: what their children are, what is refused, and how children are run."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from prefect import flow

from configs.sweep_schema import Sweep, load_sweep
from flows import run_children
from flows.child_run import Surroundings, surrounded
from flows.children import Checked, Child, check_children, checked_sweep, expand
from flows.runner import Runner, check_runner
from flows.sweep import _failure_line, _line
from tasks.engine.errors import InputError
from tasks.engine.publication import REPORT, begin
from tasks.engine.settings import settings
from tasks.report import means_of
from tasks.sweep import Outcome as Ran
from tests.conftest import Outcome
from tests.flows import dying
from tests.flows.conftest import tree

Here = Callable[..., Outcome]

COMMON: dict[str, Any] = {
    "overrides": ["serving.check_kernels=false"],
    "device": "cpu",
    "memory": None,
    "store": None,
    "keep_incompatible": False,
    "overwrite": False,
}


def sweep_file(folder: Path, text: str) -> Path:
    path = folder / "mine.yml"
    path.write_text(text)
    return path


def test_children_are_every_recipe_on_every_model_with_every_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    text = """
models: [here, org/there]
recipes: [rtn_w4a16, fp8/rtn_fp8]
overrides: [eval.windows=1, {name: two, set: eval.windows=2}]
set: [eval.windows=3]
"""
    children = expand(load_sweep(sweep_file(tmp_path, text)), COMMON, "out")
    assert [child.name for child in children] == [
        f"{model}-{recipe}-{overrides}"
        for model in ("here", "there")
        for recipe in ("rtn_w4a16", "fp8-rtn_fp8")
        for overrides in ("windows-1", "two")
    ]
    last = children[-1]
    assert (last.model, last.recipe, last.overrides) == (
        "there",
        "fp8-rtn_fp8",
        ("eval.windows=2",),
    )
    assert last.parameters == {
        **COMMON,
        "recipe": "fp8/rtn_fp8",
        "model": "org/there",
        "output": str(tmp_path / "out" / last.name),
        # the sweep's, the command line's, the child's own
        "overrides": ["eval.windows=3", "serving.check_kernels=false", "eval.windows=2"],
        "name": last.name,
    }
    # a worker may run in another folder
    assert children[0].parameters["model"] == str(tmp_path / "here")


def test_names_without_sets_of_overrides_are_short(tmp_path: Path) -> None:
    sweep = load_sweep(sweep_file(tmp_path, "models: [a]\nrecipes: [rtn_w4a16]"))
    (child,) = expand(sweep, COMMON)
    assert child.name == "a-rtn_w4a16"
    assert child.parameters["output"] == str(Path("exports/mine/a-rtn_w4a16").absolute())


@pytest.fixture
def twice(tiny: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The model at two places of one name."""
    return tiny, Path(shutil.copytree(tiny, tmp_path / "other" / "tiny"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "models: [{0}, {1}]\nrecipes: [rtn_w4a16]",
            "sweep mine: two children would publish at OUT/tiny-rtn_w4a16; give their models, "
            "recipes or overrides names that differ",
        ),
        (
            "models: [{0}, {{name: two, path: {0}}}]\nrecipes: [rtn_w4a16]",
            "sweep mine: children tiny-rtn_w4a16 and two-rtn_w4a16 are the same work; remove one",
        ),
        (
            "models: [{0}]\nrecipes: [rtn_w4a16]\n"
            "overrides: [{{name: a}}, {{name: b, set: quant.weight.bit=4}}]",
            "sweep mine: children tiny-rtn_w4a16-a and tiny-rtn_w4a16-b are the same work; remove",
        ),
        (
            "models: [{0}]\nrecipes: [rtn_w4a16]\noverrides: [quant.weight.bits=4]",
            "child tiny-rtn_w4a16: override 'quant.weight.bits=4': quant.weight.bits: "
            "unknown key; did you mean 'bit'?",
        ),
        (
            "models: [{0}, /nowhere/model]\nrecipes: [rtn_w4a16]",
            "child model-rtn_w4a16: model /nowhere/model",
        ),
    ],
)
def test_what_is_wrong_with_a_child_is_found_before_any_work(
    here: Here, twice: tuple[Path, Path], tmp_path: Path, text: str, says: str
) -> None:
    path = sweep_file(tmp_path, text.format(*twice))
    before = tree(tmp_path)
    refused = here("sweep", path, "--output", tmp_path / "OUT")
    assert (refused.status, refused.out) == (2, "")
    (line,) = refused.err.splitlines()
    assert line.startswith(f"blockquant: {says.replace('OUT', str(tmp_path / 'OUT'))}"), line
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--runner", "dask"), "--runner dask: not a runner; use local or ray"),
        (("--gpus", "1"), "--gpus 1: is for --runner ray; give both or none"),
        (("--address", "h:1"), "--address h:1: is for --runner ray; give both or none"),
        (("--at-once", "0"), "Invalid value for '--at-once'"),
    ],
)
def test_what_is_wrong_with_a_runner(
    here: Here, tiny: Path, tmp_path: Path, options: tuple[str, ...], says: str
) -> None:
    path = sweep_file(tmp_path, f"models: [{tiny}]\nrecipes: [rtn_w4a16]")
    refused = here("sweep", path, *options)
    assert (refused.status, refused.out) == (2, "")
    assert refused.err.startswith(f"blockquant: {says}") and len(refused.err.splitlines()) == 1


def test_ray_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"Ray is not installed: pip install 'blockquant\[ray\]'"):
        check_runner(Runner("ray"))


def test_the_same_children_are_the_same_work_in_any_order(tiny: Path, tmp_path: Path) -> None:
    def identity(recipes: str) -> str:
        path = sweep_file(tmp_path, f"models: [{tiny}]\nrecipes: {recipes}")
        children = expand(load_sweep(path), COMMON, str(tmp_path / "out"))
        return check_children("mine", children).identity

    one, other = identity("[rtn_w4a16, rtn_w8a16]"), identity("[rtn_w8a16, rtn_w4a16]")
    assert one == other != identity("[rtn_w4a16]")


def test_cores_are_shared_among_children_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert Runner().threads is None
    assert Runner(at_once=3).threads == 2
    assert Runner(at_once=20).threads == 1
    assert Runner("ray").threads == 8
    assert Runner("ray", at_once=4, cores=3).threads == 3
    assert Runner("ray").gpus_of_child == 0
    with monkeypatch.context() as two_gpus:
        two_gpus.setattr(torch.cuda, "device_count", lambda: 2)
        assert Runner(device="cuda").threads == 4
        assert Runner(device="cuda:1").threads is None
    assert Runner("ray", device="cuda").gpus_of_child == 1
    assert Runner("ray", device="cuda", gpus=2).gpus_of_child == 2


def test_outputs_of_other_threads_are_refused_before_any_work(
    home: Path, tiny: Path, tmp_path: Path
) -> None:
    path = sweep_file(tmp_path, f"models: [{tiny}]\nrecipes: [rtn_w4a16]")

    def checked(threads: int | None, kind: str = "local", **more: Any) -> Checked:
        runner = Runner(kind, cores=threads)
        return checked_sweep(str(path), str(tmp_path / "out"), COMMON | more, runner)[1]

    threads = torch.get_num_threads()
    first = checked(None)
    ((child,), (job,)) = first.children, first.jobs
    output = Path(child.parameters["output"])
    output.mkdir(parents=True)
    (output / REPORT).write_text(json.dumps({"versions": means_of(job)}))
    begin(settings().store, output, first.works[child.name])
    assert checked(threads).works == first.works
    with pytest.raises(InputError) as refused:
        checked(threads + 1)
    assert f"child {child.name}: --output {output}: exists already" in str(refused.value)
    for part in (f"threads={threads}, now", f"threads={threads + 1})", "--cores", "--overwrite"):
        assert part in str(refused.value)
    assert torch.get_num_threads() == threads
    checked(threads + 1, overwrite=True)
    # its workers may be on other machines: they check it themselves
    checked(threads + 1, "ray")


def test_what_failed_is_named_and_others_are_only_said_done_where_they_are() -> None:
    loaded = Sweep(name="mine", models=("a",), recipes=("r",))
    done = Ran("b", "m", "r", result={"bytes": 1, "steps": [], "metrics": {"kl": 0.1}})
    failed = Ran("a", "m", "r", reason="a reason")
    said = "sweep mine: 1 of {} children failed (a); {}the same command goes on with these"
    assert _failure_line(loaded, [failed]) == said.format(1, "")
    both = said.format(2, "the others are done, and ")
    assert _failure_line(loaded, [done, failed]) == both
    # the reason is in the table, once
    assert _line(failed) == "a failed"


def test_surroundings_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    import torch

    monkeypatch.setenv("ONE", "before")
    monkeypatch.delenv("TWO", raising=False)
    before = (Path.cwd(), torch.get_num_threads())
    place = Surroundings(str(tmp_path), "logs", 1, {"ONE": "secret", "TWO": "2"})
    assert "secret" not in repr(place)
    with surrounded(place):
        assert (Path.cwd(), torch.get_num_threads()) == (tmp_path, 1)
        assert (os.environ["ONE"], os.environ["TWO"]) == ("secret", "2")
    assert (Path.cwd(), torch.get_num_threads()) == before
    assert (os.environ["ONE"], os.environ.get("TWO")) == ("before", None)


def test_a_child_that_died_is_kept_as_failed(home: Path) -> None:
    from flows.sweep import _end_lost
    from tasks.engine.journal import told_run
    from tasks.engine.settings import settings

    place = settings()
    # nothing was told of it, or its journal was sent to the end
    _end_lost(place, "work", "its worker died")
    assert not (place.store / "journal" / "work.sqlite").exists()
    with told_run(place, "work") as run:
        run.open("work", "a run", {}, {})
        run.flush()
        # what a killed process leaves
        journal = run.journal.path
        left = journal.read_bytes()
        known = run.id
    journal.write_bytes(left)
    _end_lost(place, "work", "its worker died")
    from mlflow import MlflowClient

    found = MlflowClient(place.tracking_uri).get_run(known)
    assert (found.info.status, found.data.tags["failure"]) == ("FAILED", "its worker died")


@pytest.mark.ops
@pytest.mark.timeout(600)
def test_a_child_that_kills_its_process_stops_no_other_one(
    services: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    monkeypatch.setattr(run_children, "run_child", dying.child)
    monkeypatch.setattr(run_children, "end_lost_runs", ended.append)
    # each pool takes seconds to begin
    monkeypatch.setattr(run_children, "AGAIN", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    runner = Runner("local", at_once=2, device="cuda")

    @flow
    def all_of(*names: str) -> dict[str, Any]:
        children = [Child(name, "m", "r", (), {}) for name in names]
        place = Surroundings(str(tmp_path), str(tmp_path))
        ran = run_children.run_children(children, runner, place)
        return {child.name: value or reason for child, value, reason in ran}

    found = all_of("killer", "a", "b", "c")
    died = "its process died 2 times; is there memory enough?"
    assert set((tmp_path / "devices").read_text().split()) == {"cuda:0", "cuda:1"}
    assert found == {"killer": died, **{name: {"ran": name} for name in "abc"}}
    assert ended == ["killer"]
    ran = Counter((tmp_path / "ran").read_text().split())
    # of the others, only the one beside it was begun again
    assert ran["killer"] == 2 and sum(ran.values()) <= 2 + 3 + 1
    # what children tell of themselves goes to the server that there is
    others = [process.cmdline() for process in psutil.Process().children()]
    assert not [command for command in others if "prefect.server.api.server:create_app" in command]


@pytest.mark.ops
def test_children_end_where_what_waits_for_them_is_interrupted(
    services: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_children, "run_child", dying.child)

    @flow
    def one_of(*names: str) -> str:
        children = [Child(name, "m", "r", (), {}) for name in names]
        place = Surroundings(str(tmp_path), str(tmp_path))
        with closing(run_children.run_children(children, Runner(at_once=2), place)) as ran:
            return next(ran)[0].name

    begun = time.monotonic()
    assert one_of("a", "waiter") == "a"
    assert time.monotonic() - begun < 40 and not active_children()
    ran, ended = ((tmp_path / name).read_text().split() for name in ("ran", "ended"))
    assert sorted(ran) == sorted(ended)


@pytest.mark.parametrize(
    ("kind", "device", "count", "devices"),
    [
        ("local", "cuda", 2, ("cuda:0", "cuda:1")),
        ("local", "cuda", 1, ("cuda:0",)),
        ("local", "cuda:1", 2, ("cuda:1",)),
        ("local", "cpu", 2, ("cpu",)),
        ("local", "cuda", 0, ("cuda",)),
        # Ray shows each worker its own
        ("ray", "cuda", 2, ("cuda",)),
    ],
)
def test_children_on_this_machine_share_its_gpus(
    kind: str, device: str, count: int, devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    runner = Runner(kind, device=device)
    assert runner.devices == devices
    assert runner.children_at_once == (None if kind == "ray" else len(devices))
    assert Runner(kind, device=device, at_once=5).children_at_once == 5
