"""A device that is full: the block is tried again with less on it, and the bytes are the same.

There is no GPU where the tests run: its error is raised where a GPU would raise it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import flows.crew
import tasks.quantize
from flows.quantize_model import quantize_model
from flows.shift import Shift
from tasks.engine.residency import DeviceMemoryError
from tests.crews import beside_a_gpu, left_running
from tests.integration.resuming import contents

pytestmark = pytest.mark.usefixtures("services")
SETTINGS = [
    *("serving.smoke_test=false", "calib.name=text", "calib.n_samples=4", "calib.seq_len=32"),
    *("eval.name=text", "eval.windows=2", "eval.seq_len=32", "eval.report=false"),
    "serving.check_kernels=false",
]


def quantized(home: Path, model: Path, text: Path, name: str, recipe: str) -> dict[str, Any]:
    overrides = [*SETTINGS, f"calib.path={text}", f"eval.path={text}"]
    if recipe == "awq_w4a16":
        overrides.append("quant.special.ratios=4")
    result: dict[str, Any] = quantize_model(
        recipe,
        str(model),
        str(home / name),
        overrides,
        store=str(home / f"store-{name}"),
    )
    return result


def fails(function: Callable[..., Any], times: list[int]) -> Callable[..., Any]:
    """The function, which finds the device full in the calls of these numbers."""
    calls = iter(range(1 << 30))

    def called(*args: Any, **kwargs: Any) -> Any:
        if next(calls) in times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return function(*args, **kwargs)

    return called


@pytest.mark.parametrize("recipe", ["awq_w4a16", "gptq_w4a16"])
def test_the_same_bytes_where_a_device_would_be_full_once(
    home: Path, tiny: Path, words: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    undisturbed = quantized(home, tiny, words, "roomy", recipe)
    leans: list[bool] = []
    # full while the first block is rounded
    rounded = fails(tasks.quantize.rounded_block, [0])

    def seen(job: Any, *args: Any, **kwargs: Any) -> Any:
        leans.append(job.lean)
        return rounded(job, *args, **kwargs)

    monkeypatch.setattr(tasks.quantize, "rounded_block", seen)
    disturbed = quantized(home, tiny, words, "full", recipe)
    assert contents(home / "full") == contents(home / "roomy")
    made = [step["step"] for step in disturbed["steps"]]
    assert made == [step["step"] for step in undisturbed["steps"]]
    # what follows stays lean
    assert leans[0] is False
    assert len(leans) > 2
    assert all(leans[1:])


# a process of its own whose device is full as it rounds the first block, once
FULL_ONCE = """
import logging
from pathlib import Path

import torch
import tasks.quantize

rounded = tasks.quantize.rounded_block

def seen(job, *args):
    logging.getLogger("blockquant").warning("rounds, lean: %s", job.lean)
    once = Path("{once}")
    if not once.exists():
        once.touch()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return rounded(job, *args)

tasks.quantize.rounded_block = seen
"""


def test_the_same_bytes_where_the_device_of_another_process_is_full_once(
    home: Path,
    tiny: Path,
    words: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    undisturbed = quantized(home, tiny, words, "roomy", "awq_w4a16")
    # what comes after the one that fails is planned when that failed
    monkeypatch.setattr(flows.crew, "DEPTH", 2)
    started: list[Shift] = []
    shift = flows.crew.Shift
    monkeypatch.setattr(
        flows.crew, "Shift", lambda *given: started.append(shift(*given)) or started[-1]
    )
    beside_a_gpu(FULL_ONCE.format(once=home / "was-full"), home / "pretended", monkeypatch)
    with caplog.at_level("WARNING", "blockquant"):
        disturbed = quantized(home, tiny, words, "full", "awq_w4a16")
    assert contents(home / "full") == contents(home / "roomy")
    assert disturbed["steps"] == undisturbed["steps"]
    said = [record.getMessage() for record in caplog.records]
    leans = [line.endswith("True") for line in said if line.startswith("rounds, lean")]
    assert leans[0] is False and len(leans) > 2 and all(leans[1:])
    assert any("is full; tried again with less kept on it" in line for line in said)
    assert len(started) == 2, "those that keep less failed at what the flow had not stored"
    assert left_running() == []


def test_one_line_where_a_gpu_is_full_with_the_least_on_it(
    home: Path, tiny: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    always = fails(tasks.quantize.rounded_block, list(range(9)))
    with monkeypatch.context() as patched:
        patched.setattr(tasks.quantize, "rounded_block", always)
        with pytest.raises(DeviceMemoryError, match=r"^quantize\[block 0\]: cpu has too little"):
            quantized(home, tiny, words, "out", "rtn_w4a16")
    assert not (home / "out").exists()
    assert Path(quantized(home, tiny, words, "out", "rtn_w4a16")["checkpoint"]).is_dir()
