"""What a pass over all blocks asks for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from configs.loading import load_recipe
from flows.block_plan import Pass
from tasks.engine.ahead import keyed
from tasks.engine.job import Job
from tasks.engine.memo import Memo
from tasks.engine.source import open_source
from tasks.engine.store import Store
from tasks.engine.team import ALONE, Team
from tasks.engine.version import SOURCE
from tests.models import make_checkpoint

# recipe and overrides: how often each step is asked for a block that is not the last
ASKED: dict[tuple[str, ...], dict[str, int]] = {
    ("rtn_w4a16",): {"quantize": 1, "pack": 1},
    ("awq_w4a16",): {"transform": 1, "clip": 1, "quantize": 1, "pack": 1, "advance": 1},
    ("gptq_w4a16",): {"quantize": 1, "pack": 1, "advance": 1},
    ("gptq_w4a16", "quant.special.make_up=0.5"): {"quantize": 1, "pack": 1, "advance": 2},
    # nothing tells the two streams apart
    ("gptq_w4a16", "quant.special.make_up=0.5", "quant.quant_out=false"): {
        "quantize": 1,
        "pack": 1,
        "advance": 1,
    },
}


@pytest.mark.parametrize("given", ASKED)
def test_no_result_is_asked_for_twice(given: tuple[str, ...], tmp_path: Path) -> None:
    recipe, *overrides = given
    loaded = load_recipe(recipe, ["serving.check_kernels=false", *overrides])
    model = open_source(make_checkpoint(tmp_path / "model", "llama", blocks=3))
    job = Job(loaded, model, Store(tmp_path / "store"), Memo(), "cpu", 1 << 30)
    tokens = None if job.steps[-1].calib is None else "tokens"
    passed = Pass(len(job.steps) - 1, tokens, SOURCE, (), True)
    found = list(keyed(job, passed.plan(job).calls()))
    assert len({key for _, key in found}) == len(found)
    asked = Counter((call.block, call.step.name) for call, _ in found)
    assert {name: asked[1, name] for block, name in asked if block == 1} == ASKED[given]
    assert not asked[2, "advance"], "nothing comes after the last block"


@pytest.mark.parametrize(
    ("step", "clipped"),
    [
        ("RTN", "ranges"),
        ("OmniQuant, special: {lwc: false, let: true}", None),
        ("OmniQuant, special: {lwc: true, let: true}", "learned"),
        ("OmniQuant, special: {lwc: true, let: false}", "learned"),
        ("Awq, special: {weight_clip: false}", None),
    ],
)
def test_ranges_hold_until_weights_are_scaled_or_others_are_found(
    step: str, clipped: str | None, tmp_path: Path
) -> None:
    weight = "weight: {bit: 4, granularity: per_group, group_size: 32}"
    written = [f"  - quant: {{{weight}, method: {each}}}\n" for each in ("Awq", step)]
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("calib: {name: pileval}\nsteps:\n" + "".join(written))
    model = open_source(make_checkpoint(tmp_path / "model", "llama", blocks=2))
    loaded = load_recipe(str(recipe), ["serving.check_kernels=false"])
    job = Job(loaded, model, Store(tmp_path / "store"), Memo(), "cpu", 1 << 30)
    tokens = None if job.steps[1].calib is None else "tokens"
    plan = Pass(1, tokens, SOURCE, ("ranges", "ranges"), True).plan(job)
    learned = [key for call, key in keyed(job, plan.calls()) if call.step.name == "learn"]
    expected = learned if clipped == "learned" else [clipped, clipped]
    assert [choice.clipped for choice in plan.choices] == expected


@pytest.mark.parametrize(("size", "tokens", "stride"), [(1, None, 1), (3, None, 3), (3, "t", 1)])
def test_a_pass_that_shares_nothing_gives_each_its_own_blocks(
    size: int, tokens: str | None, stride: int, tmp_path: Path
) -> None:
    model = open_source(make_checkpoint(tmp_path / "model", "llama", blocks=2))
    job = Job(load_recipe("rtn_w4a16"), model, Store(tmp_path / "store"), Memo(), "cpu", 1 << 30)
    team = Team(1, size) if size > 1 else ALONE
    own = Pass(0, tokens, SOURCE, (), True).job(replace(job, team=team))
    assert (own.stride, own.team) == (stride, team if tokens else ALONE)
