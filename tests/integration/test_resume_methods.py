"""Kills inside GPTQ's blocks, inside learning, and between the steps of a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.clip import LEARNED
from tasks.engine.version import ROTATION
from tests.integration.resuming import BLOCKS, EPOCHS, Case, boundaries, kill_each, make_case

INT4 = "{bit: 4, symmetric: true, granularity: per_group, group_size: 64, need_pack: true}"
INT8 = "{bit: 8, symmetric: true, granularity: per_channel}"
TOKENS = "{bit: 8, symmetric: true, granularity: per_token}"
FEEDBACK = "special: {actorder: true, static_groups: true, true_sequential: true}"
GPTQ = f"""
calib: {{name: text, path: TEXT, n_samples: 8, seq_len: 64}}
quant: {{method: GPTQ, weight: {INT4}, {FEEDBACK}, quant_out: true}}
"""
LEARNING = f"""
steps:
  - calib: {{name: text, path: TEXT, n_samples: 4, seq_len: 64}}
    quant:
      method: Awq
      weight: {INT4}
      special: {{trans_version: v1, weight_clip: false}}
      quant_out: true
  - calib: {{name: text, path: TEXT, n_samples: 4, seq_len: 32}}
    quant:
      method: OmniQuant
      weight: {INT4}
      special: {{lwc: true, epochs: {EPOCHS}, lwc_lr: 0.2}}
      quant_out: true
"""
ROTATED = f"""
steps:
  - quant: {{method: Quarot, weight: {INT8}, act: {TOKENS}}}
  - calib: {{name: text, path: TEXT, n_samples: 8, seq_len: 64}}
    quant: {{method: GPTQ, weight: {INT8}, act: {TOKENS}, {FEEDBACK}, quant_out: true}}
"""
TEXTS = ["load_model", "evaluation_set", "calibration_set"]
MEASURED = ["outside", "export", "verify", "evaluate"]
ROUNDED = [
    "quantize[block 0]",
    "pack[block 0]",
    "advance[block 0]",
    "quantize[block 1]",
    "pack[block 1]",
]
SCALED = ["transform[block 0]", *ROUNDED[:3], "transform[block 1]", *ROUNDED[3:]]
# quantized and unquantized hidden states pass side by side
LEARNED_BLOCKS = [
    "learn[block 0]",
    *ROUNDED[:3],
    "advance[block 0]",
    "learn[block 1]",
    *ROUNDED[3:],
]


@pytest.fixture(scope="module")
def gptq(
    services: dict[str, str], prepared_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    folder, steps = tmp_path_factory.mktemp("gptq"), [*TEXTS, *ROUNDED, *MEASURED]
    return make_case(folder, GPTQ, prepared_home, steps, {"round": 1})


@pytest.fixture(scope="module")
def learned(
    services: dict[str, str], prepared_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    folder = tmp_path_factory.mktemp("learned")
    steps = [*TEXTS, "calibration_set", *SCALED, *LEARNED_BLOCKS, *MEASURED]
    passes = {"decide": 1, "learn": 1, "loss": 1, "round": 2}
    case = make_case(folder, LEARNING, prepared_home, steps, passes)
    for block in range(BLOCKS):
        losses = [loss for _, loss in case.curves[f"loss.block-{block}"]]
        assert len(losses) == 1 + EPOCHS
        assert min(losses) < losses[0], "a kill could not lose what was learned"
    return case


@pytest.fixture(scope="module")
def rotated(
    services: dict[str, str], prepared_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    folder, steps = tmp_path_factory.mktemp("rotated"), [*TEXTS, "rotate", *ROUNDED, *MEASURED]
    return make_case(folder, ROTATED, prepared_home, steps, {"round": 1})


def test_kills_inside_gptq_blocks(gptq: Case) -> None:
    points = (
        # the first group, which shares one Gram matrix, is rounded
        "quantize[block 0]: rounded 3",
        "advance[block 0]: committed",
        "quantize[block 1]: rounded 4",
        # its codes were in memory only
        "quantize[block 1]: committed",
    )
    kill_each(gptq, points, "gptq")


def test_kills_inside_learning(learned: Case) -> None:
    points = (
        # before the first epoch, inside the second, after it
        "learn[block 0]: loss 1",
        "learn[block 1]: loss 4",
        "learn[block 1]: loss 5",
        f"learn[block 1]: {LEARNED} torn",
        # the first curve: those of the errors come after it
        "flow: log_points told",
        "learn[block 1]: committed",
    )
    kill_each(learned, points, "learning")


def test_kills_after_a_rotation(rotated: Case) -> None:
    points = (
        f"rotate: {ROTATION} torn",
        "rotate: committed",
        "quantize[block 1]: rounded 3",
    )
    kill_each(rotated, points, "rotated")


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", ["gptq", "learned", "rotated"])
def test_a_kill_at_every_task_boundary(method: str, request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue(method)
    kill_each(case, boundaries(case), "boundary")
