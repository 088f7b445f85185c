"""How far a process of a crew asks its device ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs.loading import load_recipe
from flows.block_plan import Pass
from flows.crew_member import AHEAD_OF_PASS, AHEAD_STEPS, Work
from tasks.engine.ahead import keyed
from tasks.engine.job import Job
from tasks.engine.memo import Memo
from tasks.engine.source import open_source
from tasks.engine.step import Step
from tasks.engine.store import Store
from tasks.engine.version import SOURCE
from tests.models import make_checkpoint

BLOCKS = 3


@pytest.mark.parametrize(
    ("recipe", "tokens", "passes"),
    [
        ("awq_w4a16", "tokens", ["transform"] * 2),
        ("gptq_w4a16", "tokens", ["quantize"] * 2),
        ("rtn_w4a16", None, []),
    ],
)
def test_a_pass_through_a_block_waits_for_more(
    recipe: str,
    tokens: str | None,
    passes: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = open_source(make_checkpoint(tmp_path / "model", blocks=BLOCKS))
    given = load_recipe(recipe, ["serving.check_kernels=false"])
    job = Job(given, model, Store(tmp_path / "store"), Memo(), "cpu", 1 << 30)
    passed = Pass(0, tokens, SOURCE, (), True)
    monkeypatch.setattr(Step, "make", lambda *_, **__: made)
    made: Any = object()
    work = Work(job, passed)
    seen = []
    for call, key in keyed(job, passed.plan(job).calls()):
        seen.append((call.step.name, work.ahead))
        work.make([(call.step.label(call.block), key)], lean=False)
    assert {ahead for _, ahead in seen} <= {AHEAD_OF_PASS, AHEAD_STEPS}
    # that of the first block has nothing before it
    assert [name for name, ahead in seen if ahead == AHEAD_OF_PASS] == passes
    assert len(seen) >= 2 * BLOCKS
