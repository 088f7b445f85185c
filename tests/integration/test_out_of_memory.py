"""A device that is full: the block is tried again with less on it, and the bytes are the same.

There is no GPU where the tests run: its error is raised where a GPU would raise it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tasks.quantize
from flows.quantize_model import quantize_model
from tasks.engine.job import Job
from tasks.engine.residency import DeviceMemoryError
from tests.integration.resuming import contents

pytestmark = pytest.mark.usefixtures("services")
SETTINGS = [
    *("serving.smoke_test=false", "calib.name=text", "calib.n_samples=4", "calib.seq_len=32"),
    *("eval.name=text", "eval.windows=2", "eval.seq_len=32", "serving.check_kernels=false"),
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


@pytest.mark.parametrize(
    ("recipe", "ahead"), [("awq_w4a16", False), ("awq_w4a16", True), ("gptq_w4a16", False)]
)
def test_the_same_bytes_where_a_gpu_would_be_full_once(
    home: Path, tiny: Path, words: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, ahead: bool
) -> None:
    undisturbed = quantized(home, tiny, words, "roomy", recipe)
    # beside a GPU, blocks are computed ahead of their tasks
    monkeypatch.setattr(Job, "on_gpu", property(lambda job: ahead))
    leans: list[bool] = []
    threads: list[str] = []
    # full while the first block is rounded
    rounded = fails(tasks.quantize.rounded_block, [0])

    def seen(job: Any, *args: Any, **kwargs: Any) -> Any:
        leans.append(job.lean)
        threads.append(threading.current_thread().name)
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
    assert threads[0].startswith("blockquant-ahead") is ahead
    assert set(threads[1:]) == {threading.main_thread().name}


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
