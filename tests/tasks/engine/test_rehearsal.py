"""A rehearsal does what the steps do, and leaves nothing behind."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.engine import rehearsal
from tasks.engine.rehearsal import rehearse
from tests.models import make_checkpoint
from tests.tasks.conftest import JobOf

ROUNDED = {"round_group", "rounding_energies", "dequantize", "compress", "restore"}
# what a rehearsal of each recipe has to reach, beside what rounds
REACHED = {
    "rtn_w4a16": set(),
    "fp8/rtn_fp8": set(),
    "awq_w4a16": {"run_block", "add_batch", "output_errors", "search_clip_curve"},
    "awq_w8a8": {"run_block", "add_batch", "output_errors", "search_clip_curve"},
    "gptq_w4a16": {"run_block", "add_batch", "factorize", "gptq"},
    "tuned/best_w4a16": {"run_block", "add_batch", "output_errors", "factorize", "gptq"},
}


@pytest.mark.parametrize("recipe", REACHED)
def test_what_is_reached(
    recipe: str, job_of: JobOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: Counter[str] = Counter()

    def counted(name: str) -> Any:
        real = getattr(rehearsal, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            reached[name] += 1
            return real(*args, **kwargs)

        return call

    for name in set().union(ROUNDED, *REACHED.values()):
        monkeypatch.setattr(rehearsal, name, counted(name))
    job = job_of(make_checkpoint(tmp_path / "model", "llama"), recipe)
    before = torch.get_float32_matmul_precision(), torch.get_rng_state()
    rehearse(job)
    assert set(reached) == ROUNDED | REACHED[recipe]
    assert torch.get_float32_matmul_precision() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert not job.memo._values and not job.held and job.doubts.take() == ()
    assert not job.store.entries()
