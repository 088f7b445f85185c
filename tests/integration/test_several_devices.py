"""A run on several devices: one result, whatever happens to the processes that compute it.

Where there is no GPU, each process computes on the CPU: ``--device cpu,cpu``.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from flows.block_plan import Pass
from flows.crew import Crew, Shift
from flows.crew_process import Failure
from flows.quantize_model import quantize_model
from tasks.engine.disk import DiskFullError
from tasks.engine.errors import InputError
from tasks.engine.phases import AHEAD, IN_TASK
from tasks.engine.store import Store
from tests.integration.crashing import Work, run
from tests.integration.resuming import contents
from tests.operations.services import eventually

pytestmark = pytest.mark.usefixtures("services")
ROOT = Path(__file__).parent.parent.parent
SAMPLES = 5
# one that takes windows' shares of each kind: extremes, drawn rows, rows that are kept, gaps
RECIPES = {
    "awq_w4a16": ["quant.special.ratios=4"],
    "gptq_w4a16": [],
    "fp8/awq_fp8_static": ["quant.special.ratios=4"],
    "os_plus_w8a8": [],
    "smoothquant_w8a8": [],
    "tuned/best_w4a16": ["steps.0.quant.special.ratios=4"],
}
STEPS = ("tuned/best_w4a16",)


def overrides(recipe: str, text: Path, samples: int = SAMPLES) -> list[str]:
    sections = ["steps.0.calib", "steps.1.calib"] if recipe in STEPS else ["calib"]
    source = f"{{name: text, path: {text}, n_samples: {samples}, seq_len: 32}}"
    return [
        *(f"{section}={source}" for section in sections),
        f"eval={{name: text, path: {text}, windows: 2, seq_len: 32}}",
        *("serving.smoke_test=false", "serving.check_kernels=false", "eval.report=false"),
        *RECIPES[recipe],
    ]


def quantized(
    home: Path, model: Path, text: Path, name: str, recipe: str, device: str = "cpu,cpu"
) -> dict[str, Any]:
    result: dict[str, Any] = quantize_model(
        recipe,
        str(model),
        str(home / name),
        overrides(recipe, text),
        store=str(home / f"store-{name}"),
        device=device,
        overwrite=True,
    )
    return result


def kill_last(shift: Shift) -> None:
    """As the kernel ends a process, when memory runs out."""
    os.kill(shift.processes[-1].pid, signal.SIGKILL)


def left_running() -> list[psutil.Process]:
    """Processes of a crew that live."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "flows.crew_member" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def of_store(home: Path) -> list[psutil.Process]:
    """Processes of any crew whose assignment names a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if "flows.crew_member" in (said := " ".join(process.cmdline())) and str(home) in said:
                found.append(process)
        except psutil.Error:
            continue
    return found


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, at: int, act: Any) -> Iterator[list[tuple[str, bool]]]:
    """Act on the processes as result number ``at`` is asked of them; all that was asked."""
    ask, asked = Shift.ask, []

    def asking(shift: Shift, passed: Pass, place: Path, key: str, lean: bool) -> Any:
        promised = ask(shift, passed, place, key, lean)
        asked.append((key, lean))
        if len(asked) == at + 1:
            act(shift)
        return promised

    monkeypatch.setattr(Shift, "ask", asking)
    yield asked


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(
            recipe,
            marks=[pytest.mark.xdist_group(f"devices {recipe}"), *[pytest.mark.ops] * (number > 1)],
        )
        for number, recipe in enumerate(RECIPES)
    ],
)
def test_the_same_bytes_each_time_and_what_one_device_finds(
    home: Path, tiny: Path, words: Path, recipe: str
) -> None:
    first = quantized(home, tiny, words, "first", recipe)
    again = quantized(home, tiny, words, "again", recipe)
    assert contents(home / "again") == contents(home / "first")
    assert again["steps"] == first["steps"]
    alone = quantized(home, tiny, words, "alone", recipe, "cpu")
    # sums are added in another order, so a code may differ; what they cost does not
    for name in ("nll", "kl"):
        assert first["metrics"][name] == pytest.approx(alone["metrics"][name], rel=0.02, abs=2e-4)
    assert left_running() == []
    entries = Store(home / "store-first").entries()
    assert "boundary" not in {entry.task for entry in entries}
    # nothing that one device made is taken for what two make
    assert quantized(home, tiny, words, "first", recipe)["steps"] == [
        step | {"cached": True} for step in first["steps"]
    ]


def test_a_process_that_is_killed_costs_the_step_it_was_at(
    home: Path, tiny: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = quantized(home, tiny, words, "undisturbed", "awq_w4a16")

    with watched(monkeypatch, 6, kill_last) as asked:
        disturbed = quantized(home, tiny, words, "disturbed", "awq_w4a16")
    assert contents(home / "disturbed") == contents(home / "undisturbed")
    assert asked[7] == asked[6] and len(set(asked)) == len(asked) - 1, "one step was made twice"
    assert disturbed["steps"] == undisturbed["steps"]
    assert left_running() == []


# what a process of a crew is made to believe where there is no GPU: results stay in its memory
PRETENDED = """
from tasks.engine.job import Job
Job.on_gpu = property(lambda job: True)
"""


@pytest.mark.parametrize("recipe", ["awq_w4a16", pytest.param(STEPS[0], marks=pytest.mark.ops)])
def test_results_that_are_asked_for_before_they_are_needed(
    home: Path, tiny: Path, words: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    quantized(home, tiny, words, "in-turn", recipe)
    (home / "pretended").mkdir()
    (home / "pretended" / "sitecustomize.py").write_text(PRETENDED)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(home / "pretended"), str(ROOT)]))
    monkeypatch.setattr(Crew, "ahead", True)
    with watched(monkeypatch, 1 << 30, kill_last) as asked:
        ahead = quantized(home, tiny, words, "ahead", recipe)
    assert contents(home / "ahead") == contents(home / "in-turn")
    assert len(asked) == len(set(asked)), "a result was asked for twice"
    assert ahead["phases"][AHEAD] > 0 and ahead["phases"][IN_TASK] == 0
    # one is killed while others wait to be made: what was made stays, the rest is made by new ones
    with watched(monkeypatch, 4, kill_last) as asked:
        quantized(home, tiny, words, "killed", recipe)
    assert contents(home / "killed") == contents(home / "in-turn")
    assert len(asked) > len(set(asked))
    assert left_running() == []


def test_a_device_that_is_full_keeps_less_from_then_on(
    home: Path, tiny: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized(home, tiny, words, "roomy", "awq_w4a16")

    def fill(shift: Shift) -> None:
        # as a process says whose device is full
        shift._heard(Failure.of(torch.OutOfMemoryError("CUDA out of memory.")))

    with watched(monkeypatch, 2, fill) as asked:
        quantized(home, tiny, words, "full", "awq_w4a16")
    assert contents(home / "full") == contents(home / "roomy")
    leans = [lean for _, lean in asked]
    assert leans[:3] == [False] * 3 and all(leans[3:]) and leans[3:]


# a disk that is full where results are written; what else is written has room
FULL_DISK = """
import errno
import tasks.engine.store

def write(path, saved):
    raise OSError(errno.ENOSPC, "No space left on device")

tasks.engine.store._write = write
"""


def test_a_full_disk_is_told_by_the_process_that_finds_it(
    home: Path, tiny: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "full").mkdir()
    (home / "full" / "sitecustomize.py").write_text(FULL_DISK)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(home / "full"), str(ROOT)]))
    with pytest.raises(DiskFullError, match="no room is left"):
        quantized(home, tiny, words, "out", "awq_w4a16")
    assert left_running() == []


def test_a_failure_of_the_run_ends_all(
    home: Path, tiny: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(shift: Shift) -> None:
        raise ValueError("made to fail")

    with watched(monkeypatch, 3, fail), pytest.raises(ValueError, match="made to fail"):
        quantized(home, tiny, words, "failed", "awq_w4a16")
    assert left_running() == []
    # and the same command goes on
    result = quantized(home, tiny, words, "failed", "awq_w4a16")
    assert any(step["cached"] for step in result["steps"])


def test_a_killed_run_goes_on_to_the_same_bytes(home: Path, tiny: Path, words: Path) -> None:
    def work(name: str, kill_at: str | None) -> Work:
        output = home / name / "published" / "out"
        parameters = {
            "recipe": "awq_w4a16",
            "model": str(tiny),
            "output": str(output),
            "overrides": overrides("awq_w4a16", words),
            "device": "cpu,cpu",
        }
        (home / name).mkdir(exist_ok=True)
        return Work(home / name, parameters, home / f"{name}-{kill_at}.trace", kill_at)

    undisturbed = run(work("undisturbed", None))
    assert undisturbed.exitcode == 0, undisturbed.result
    assert run(work("killed", "clip[block 1]: committed")).exitcode == -signal.SIGKILL
    # they end with the flow's process, whatever they are at
    eventually(lambda: not of_store(home / "killed") or None, "the end of the others", 20)
    resumed = run(work("killed", None))
    assert resumed.exitcode == 0, resumed.result
    assert resumed.made[0] == "quantize[block 1]"
    published = Path("published") / "out"
    assert contents(home / "killed" / published) == contents(home / "undisturbed" / published)


@pytest.mark.parametrize(
    ("recipe", "device", "more", "said"),
    [
        ("awq_w4a16", "cpu,meta", [], "--device meta: not supported"),
        ("awq_w4a16", "cpu,", [], "--device : not a device"),
        ("rtn_w4a16", "cpu,cpu", [], "only calibration is shared"),
        ("w4a16_combin", "cpu,cpu", [], "OmniQuant learns on one device"),
        ("awq_w4a16", "cpu,cpu", ["calib.n_samples=1"], "calib.n_samples is 1"),
    ],
)
def test_what_cannot_be_shared_is_one_line(
    home: Path, tiny: Path, words: Path, recipe: str, device: str, more: list[str], said: str
) -> None:
    given = [f"eval={{name: text, path: {words}, windows: 2, seq_len: 32}}", *more]
    if recipe == "awq_w4a16":
        given = [*overrides(recipe, words), *more]
    with pytest.raises(InputError, match=said) as raised:
        quantize_model(recipe, str(tiny), str(home / "out"), given, device=device)
    assert "\n" not in str(raised.value)
    assert left_running() == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_gpus_give_the_same_bytes_each_time(
    home: Path, tiny: Path, words: Path, recipe: str
) -> None:
    first = quantized(home, tiny, words, "first", recipe, "cuda:0,cuda:1")
    quantized(home, tiny, words, "again", recipe, "cuda:0,cuda:1")
    assert contents(home / "again") == contents(home / "first")
    alone = quantized(home, tiny, words, "alone", recipe, "cuda:0")
    assert first["metrics"]["nll"] == pytest.approx(alone["metrics"]["nll"], rel=0.02)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")
def test_a_process_on_a_gpu_that_is_killed_costs_no_more_than_time(
    home: Path, tiny: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized(home, tiny, words, "undisturbed", "awq_w4a16", "cuda:0,cuda:1")

    with watched(monkeypatch, 6, kill_last):
        quantized(home, tiny, words, "disturbed", "awq_w4a16", "cuda:0,cuda:1")
    assert contents(home / "disturbed") == contents(home / "undisturbed")
    assert left_running() == []
