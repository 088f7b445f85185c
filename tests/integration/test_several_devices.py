"""A run on several devices: one result, whatever happens to the processes that compute it.

Where there is no GPU, each process computes on the CPU: ``--device cpu,cpu``.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import flows.cli
import flows.crew
import flows.crew_start
import flows.shift
from flows.crew import Crew
from flows.crew_process import Failure
from flows.quantize_model import quantize_model
from flows.shift import Round, Shift
from tasks.engine.disk import DiskFullError
from tasks.engine.errors import InputError
from tasks.engine.phases import AHEAD, IN_TASK
from tasks.engine.store import Store
from tests.crews import PRETENDED, left_running, made_to_run
from tests.integration.crashing import Work, run
from tests.integration.resuming import contents
from tests.operations.services import eventually
from tests.places import new_home

pytestmark = pytest.mark.usefixtures("services")
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
# those that read no text
IN_TURN = ("rtn_w4a16", "fp8/rtn_fp8")
# the check of every change runs those that take shares of most kinds
MARKS = {"awq_w4a16": [], "gptq_w4a16": [], "tuned/best_w4a16": [pytest.mark.ops]}


def overrides(recipe: str, text: Path, samples: int = SAMPLES) -> list[str]:
    sections = ["steps.0.calib", "steps.1.calib"] if recipe in STEPS else ["calib"]
    if recipe in IN_TURN:
        sections = []
    source = f"{{name: text, path: {text}, n_samples: {samples}, seq_len: 32}}"
    return [
        *(f"{section}={source}" for section in sections),
        f"eval={{name: text, path: {text}, windows: 2, seq_len: 32}}",
        *("serving.smoke_test=false", "serving.check_kernels=false", "eval.report=false"),
        *RECIPES.get(recipe, []),
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


@dataclass(frozen=True)
class Undisturbed:
    """What a run gave that nothing happened to."""

    files: dict[str, bytes]
    steps: list[dict[str, Any]]


@pytest.fixture(scope="module")
def undisturbed(
    services: object,
    prepared_home: Path,
    tiny: Path,
    words: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Undisturbed:
    """``awq_w4a16`` on two devices."""
    home = new_home(tmp_path_factory.mktemp("undisturbed") / "home", prepared_home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOCKQUANT_HOME", str(home))
        result = quantized(home, tiny, words, "out", "awq_w4a16")
    return Undisturbed(contents(home / "out"), result["steps"])


def kill_last(shift: Shift) -> None:
    """As the kernel ends a process, when memory runs out."""
    os.kill(shift.processes[-1].pid, signal.SIGKILL)


def of_home(home: Path) -> list[psutil.Process]:
    """Processes of any crew whose run has its files in a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if "flows.crew_member" not in " ".join(process.cmdline()):
                continue
            if process.environ().get("BLOCKQUANT_HOME", "").startswith(str(home)):
                found.append(process)
        except psutil.Error:
            continue
    return found


@contextmanager
def watched(
    monkeypatch: pytest.MonkeyPatch, at: int, act: Any, before: bool = False
) -> Iterator[list[tuple[str, bool]]]:
    """Act on the processes as result number ``at`` is asked of them; all that was asked.

    Right after it was asked, which they may be through with by then, or right before.
    """
    ask, asked = Shift.ask, []

    def asking(shift: Shift, now: Round, number: int, block: int, lean: bool) -> Any:
        asked.append((now.calls[number][1], lean))
        acts = len(asked) == at + 1
        if acts and before:
            act(shift)
        promised = ask(shift, now, number, block, lean)
        if acts and not before:
            act(shift)
        return promised

    monkeypatch.setattr(Shift, "ask", asking)
    yield asked


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(
            recipe,
            marks=[
                pytest.mark.xdist_group(f"devices {recipe}"),
                *MARKS.get(recipe, [pytest.mark.long]),
            ],
        )
        for recipe in RECIPES
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
    home: Path,
    tiny: Path,
    words: Path,
    undisturbed: Undisturbed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with watched(monkeypatch, 6, kill_last, before=True) as asked:
        disturbed = quantized(home, tiny, words, "disturbed", "awq_w4a16")
    assert contents(home / "disturbed") == undisturbed.files
    assert asked[7] == asked[6] and len(set(asked)) == len(asked) - 1, "one step was made twice"
    assert disturbed["steps"] == undisturbed.steps
    assert left_running() == []


@pytest.mark.parametrize("recipe", ["awq_w4a16", pytest.param(STEPS[0], marks=pytest.mark.long)])
def test_results_that_are_asked_for_before_they_are_needed(
    home: Path,
    tiny: Path,
    words: Path,
    undisturbed: Undisturbed,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
) -> None:
    in_turn = undisturbed.files
    if recipe != "awq_w4a16":
        quantized(home, tiny, words, "in-turn", recipe)
        in_turn = contents(home / "in-turn")
    made_to_run(PRETENDED, home / "pretended", monkeypatch)
    monkeypatch.setattr(Crew, "ahead", True)
    with watched(monkeypatch, 1 << 30, kill_last) as asked:
        ahead = quantized(home, tiny, words, "ahead", recipe)
    assert contents(home / "ahead") == in_turn
    assert len(asked) == len(set(asked)), "a result was asked for twice"
    assert ahead["phases"][AHEAD] > 0 and ahead["phases"][IN_TASK] == 0
    # of what is found, a damaged result and one that is gone are made again, and no other
    entries = Store(home / "store-ahead").entries()
    packed, *_ = [entry for entry in entries if entry.task == "pack"]
    *_, rounded = [entry for entry in entries if entry.task == "quantize"]
    shard = packed.folder / "block.safetensors"
    data = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(bytes([*data[:-1], data[-1] ^ 1]))
    shutil.rmtree(rounded.folder)
    # what is gone is planned when it was already the damaged one's turn
    monkeypatch.setattr(flows.crew, "DEPTH", 2)
    mended = quantized(home, tiny, words, "ahead", recipe)
    assert contents(home / "ahead") == in_turn
    made = [step["step"] for step in mended["steps"] if not step["cached"]]
    assert made == ["pack[block 0]", "quantize[block 1]"]
    # one is killed while others wait to be made: what was made stays, the rest is made by new ones
    with watched(monkeypatch, 4, kill_last, before=True) as asked:
        quantized(home, tiny, words, "killed", recipe)
    assert contents(home / "killed") == in_turn
    assert len(asked) > len(set(asked))
    assert left_running() == []


def test_a_device_that_is_full_keeps_less_from_then_on(
    home: Path,
    tiny: Path,
    words: Path,
    undisturbed: Undisturbed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fill(shift: Shift) -> None:
        # as a process says whose device is full
        shift._heard(Failure.of(torch.OutOfMemoryError("CUDA out of memory.")))

    with watched(monkeypatch, 2, fill) as asked:
        quantized(home, tiny, words, "full", "awq_w4a16")
    assert contents(home / "full") == undisturbed.files
    leans = [lean for _, lean in asked]
    assert leans[:3] == [False] * 3 and all(leans[3:]) and leans[3:]


# a disk that is full where results are written; what else is written has room
FULL_DISK = """
import errno
import tasks.engine.draft

def write(path, saved):
    raise OSError(errno.ENOSPC, "No space left on device")

tasks.engine.draft._write = write
"""


def test_a_full_disk_is_told_by_the_process_that_finds_it(
    home: Path, tiny: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_to_run(FULL_DISK, home / "full", monkeypatch)
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
    eventually(lambda: not of_home(home / "killed"), "the end of the others", 20)
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


# what processes say of themselves as they compute a block's codes
TELLING = """
import logging
import os
import tasks.quantize

rounded = tasks.quantize.rounded_block

def telling(*args):
    logging.getLogger("blockquant").warning("a block is rounded by process %d", os.getpid())
    return rounded(*args)

tasks.quantize.rounded_block = telling
"""


def test_without_calibration_each_block_is_one_device_s(
    home: Path,
    tiny: Path,
    words: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    quantized(home, tiny, words, "alone", "rtn_w4a16", "cpu")
    made_to_run(TELLING, home / "telling", monkeypatch)
    started = []
    start = flows.shift.take_started
    monkeypatch.setattr(
        flows.shift, "take_started", lambda *args: started.append(start(*args)) or started[-1]
    )
    with caplog.at_level("WARNING", "blockquant"):
        result = quantized(home, tiny, words, "two", "rtn_w4a16")
    assert not any(member.seat.calibrated for member in started[0].members)
    assert contents(home / "two") == contents(home / "alone")
    assert result["phases"][AHEAD] > 0 and result["phases"][IN_TASK] == 0
    pids = [str(member.process.pid) for member in started[0].members]
    said = [r.getMessage() for r in caplog.records if "is rounded by process" in r.getMessage()]
    assert list(dict.fromkeys(line.split()[-1] for line in said)) == pids, "a block each, of two"
    # they are what one device would find: their keys do not tell how many there were
    again = quantized(home, tiny, words, "alone", "rtn_w4a16")
    blocks = [step for step in again["steps"] if "block" in step["step"]]
    assert blocks and all(step["cached"] for step in blocks)
    assert left_running() == []


def test_a_command_s_processes_start_before_its_input_is_checked(
    home: Path, tiny: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[flows.crew_start.Started] = []
    start = flows.crew_start.Started

    def starting(devices: Any, calibrated: bool) -> flows.crew_start.Started:
        assert calibrated
        started.append(start(devices, calibrated))
        return started[-1]

    monkeypatch.setattr(flows.crew_start, "Started", starting)
    parameters = {
        "recipe": "awq_w4a16",
        "model": str(tiny),
        "output": str(home / "out"),
        "overrides": overrides("awq_w4a16", words),
        "device": "cpu,cpu",
        "memory": None,
        "store": str(home / "store"),
        "keep_incompatible": False,
        "overwrite": False,
        "upload": None,
    }

    def refused(checked: dict[str, Any]) -> None:
        assert len(started) == 1
        assert all(member.process.poll() is None for member in started[0].members)
        raise InputError("a line")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="a line"):
        patch.setattr(flows.cli, "_check", refused)
        flows.cli.run_quantization(parameters)
    assert left_running() == [] and not (home / "store").exists()
    flows.cli.run_quantization(parameters)
    assert len(started) == 2 and started[1].taken, "the flow takes those of the command"
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
@pytest.mark.parametrize("recipe", IN_TURN)
def test_two_gpus_that_take_blocks_in_turn_find_what_one_does(
    home: Path, tiny: Path, words: Path, recipe: str
) -> None:
    quantized(home, tiny, words, "two", recipe, "cuda:0,cuda:1")
    quantized(home, tiny, words, "alone", recipe, "cuda:0")
    assert contents(home / "two") == contents(home / "alone")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")
def test_a_process_on_a_gpu_that_is_killed_costs_no_more_than_time(
    home: Path, tiny: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized(home, tiny, words, "undisturbed", "awq_w4a16", "cuda:0,cuda:1")

    with watched(monkeypatch, 6, kill_last):
        quantized(home, tiny, words, "disturbed", "awq_w4a16", "cuda:0,cuda:1")
    assert contents(home / "disturbed") == contents(home / "undisturbed")
    assert left_running() == []
