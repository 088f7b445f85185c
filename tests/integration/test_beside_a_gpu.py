"""What a process computes for the flow beside a GPU: in memory, and ahead of it; the same bytes.

Where there is no GPU the CPU takes its place, and all that depends on there being one is done.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import flows.quantize_model
from flows.quantize_model import quantize_model
from tasks.engine.phases import AHEAD, IN_TASK
from tasks.engine.store import Store
from tests.crews import beside_a_gpu, left_running
from tests.integration.resuming import contents

pytestmark = pytest.mark.usefixtures("services")
SETTINGS = ["serving.smoke_test=false", "serving.check_kernels=false", "eval.report=false"]
RECIPES = {
    "rtn_w4a16": [],
    "awq_w4a16": ["calib", "quant.special.ratios=4"],
    "fp8/awq_fp8_static": ["calib", "quant.special.ratios=4"],
    "gptq_w4a16": ["calib"],
    "tuned/best_w4a16": ["steps.0.calib", "steps.1.calib", "steps.0.quant.special.ratios=4"],
    "w4a16_combin": ["steps.0.calib", "steps.1.calib", "steps.1.quant.special.epochs=1"],
}

STEPS = ("tuned/best_w4a16", "w4a16_combin")


def quantized(
    home: Path, model: Path, text: Path, name: str, recipe: str, device: str = "cpu"
) -> dict[str, Any]:
    source = f"{{name: text, path: {text}, n_samples: 4, seq_len: 32}}"
    given = [f"{key}={source}" if key.endswith("calib") else key for key in RECIPES[recipe]]
    evaluated = f"eval={{name: text, path: {text}, windows: 2, seq_len: 32}}"
    store = str(home / f"store-{name}")
    overrides = [*given, evaluated, *SETTINGS]
    result: dict[str, Any] = quantize_model(
        recipe, str(model), str(home / name), overrides, store=store, device=device
    )
    return result


# a process that pretends to have a GPU says what it reads back, and which boundaries it writes
LOOKING = """
import logging
import tasks.engine.job
import tasks.engine.streams

log = logging.getLogger("blockquant")
read, write = tasks.engine.job._read_result, tasks.engine.streams._write_boundary

def reading(job, key, file):
    log.warning("%s was read back", file)
    return read(job, key, file)

def writing(job, stream, hidden):
    log.warning("boundary %d is written", stream.block)
    write(job, stream, hidden)

tasks.engine.job._read_result = reading
tasks.engine.streams._write_boundary = writing
"""


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_bytes_and_no_block_read_back(
    home: Path,
    tiny: Path,
    words: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    recipe: str,
) -> None:
    quantized(home, tiny, words, "plain", recipe)
    beside_a_gpu(LOOKING, home / "looking", monkeypatch)
    with caplog.at_level("WARNING", "blockquant"):
        phases = quantized(home, tiny, words, "beside", recipe)["phases"]
    assert contents(home / "beside") == contents(home / "plain")
    assert phases[AHEAD] > 0 and phases[IN_TASK] == 0
    said = [record.getMessage() for record in caplog.records]
    read = {line for line in said if line.endswith("was read back")}
    # a step begins with what the one before decided about all blocks
    assert read <= ({"transform.safetensors was read back"} if recipe in STEPS else set())
    # of two blocks, one boundary for each stream of each step, if the one before was written
    assert any(line.startswith("boundary") for line in said) is (RECIPES[recipe] != [])
    left = [entry.task for entry in Store(home / "store-beside").entries()]
    assert "boundary" not in left
    assert left_running() == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gpu_gives_the_same_bytes_whoever_asks_it(
    home: Path, tiny: Path, words: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    apart = quantized(home, tiny, words, "apart", recipe, "cuda")["phases"]
    assert apart[AHEAD] > 0 and apart[IN_TASK] == 0
    # what no other process makes is made by the tasks
    monkeypatch.setattr(flows.quantize_model, "crew_of", lambda *_: nullcontext())
    in_tasks = quantized(home, tiny, words, "in-tasks", recipe, "cuda")["phases"]
    assert in_tasks[AHEAD] == 0 and in_tasks[IN_TASK] > 0
    assert contents(home / "apart") == contents(home / "in-tasks")
