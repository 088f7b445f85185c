"""How results move where a GPU computes: in memory, and behind the computation; the same bytes.

Where there is no GPU the CPU takes its place, and all that depends on there being one is done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tasks.engine.job
import tasks.engine.streams
from flows.quantize_model import quantize_model
from tasks.engine.ahead import Lane
from tasks.engine.job import Job
from tasks.engine.phases import AHEAD, IN_TASK
from tasks.engine.store import Store
from tests.integration.resuming import contents

pytestmark = pytest.mark.usefixtures("services")
SETTINGS = ["serving.smoke_test=false", "serving.check_kernels=false", "eval.report=false"]
RECIPES = {
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


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_bytes_and_no_block_read_back(
    home: Path, tiny: Path, words: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    quantized(home, tiny, words, "plain", recipe)
    written: list[int] = []
    write = tasks.engine.streams._write_boundary

    def watched(job: Job, stream: Any, hidden: Any) -> None:
        written.append(stream.block)
        write(job, stream, hidden)

    read = tasks.engine.job._read_result

    def seldom(job: Job, key: str, file: str) -> Any:
        # a step begins with what the one before decided about all blocks
        assert file == "transform.safetensors" and recipe in STEPS, f"{file} was read back"
        return read(job, key, file)

    monkeypatch.setattr(Job, "on_gpu", property(lambda job: True))
    monkeypatch.setattr(tasks.engine.streams, "_write_boundary", watched)
    monkeypatch.setattr(tasks.engine.job, "_read_result", seldom)
    quantized(home, tiny, words, "beside", recipe)
    assert contents(home / "beside") == contents(home / "plain")
    # of two blocks, one boundary for each stream of each step, if the one before was written
    assert written
    left = [entry.task for entry in Store(home / "store-beside").entries()]
    assert "boundary" not in left


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gpu_gives_the_same_bytes_whether_or_not_it_computes_ahead(
    home: Path, tiny: Path, words: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    ahead = quantized(home, tiny, words, "ahead", recipe, "cuda")["phases"]
    assert ahead[AHEAD] > 0 and ahead[IN_TASK] == 0
    # what is not made ahead is made by the tasks
    monkeypatch.setattr(Lane, "_make", lambda lane, call, key: None)
    in_tasks = quantized(home, tiny, words, "in-tasks", recipe, "cuda")["phases"]
    assert in_tasks[AHEAD] == 0 and in_tasks[IN_TASK] > 0
    assert contents(home / "ahead") == contents(home / "in-tasks")
