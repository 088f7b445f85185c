"""What a job says of its own model and recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import make_checkpoint
from tests.tasks.conftest import JobOf


@pytest.mark.parametrize(
    ("kind", "tied", "served"),
    [("gemma", False, False), ("gemma", True, True), ("llama", False, True)],
)
def test_a_head_that_a_server_would_not_read(
    kind: str, tied: bool, served: bool, job_of: JobOf, tmp_path: Path
) -> None:
    job = job_of(make_checkpoint(tmp_path / "model", kind, tied=tied), "rtn_w8a8")
    if served:
        assert job.unserved is None
    else:
        assert job.unserved == (
            "model.path: SGLang computes logits of gemma with the embedding, not with the "
            "lm_head.weight that this model has"
        )
