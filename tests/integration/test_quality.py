"""What quantization costs on a real model, measured on the reopened checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.loading import load_recipe
from flows.quantize_model import quantize_model
from tasks import evaluate
from tasks.engine.checkpoint import Checkpoint, open_checkpoint
from tasks.engine.decoder import Decoder
from tasks.engine.text import TextSource
from tasks.engine.weights import Weights
from tasks.engine.windows import evaluation_windows

pytestmark = pytest.mark.shared


class Bound(NamedTuple):
    """What quantizing costs at most: increase of NLL, and KL from the source; nats per token."""

    nll: float
    kl: float


# windows of 2048 tokens of heldout.txt: all that bounds are known for, and the first of them,
# which take as many minutes as a check of every change has
ALL, FIRST = 32, 8
# windows of 512 tokens of calibration.txt beside them
CALIBRATED = {ALL: 64, FIRST: 16}
SOURCE_NLL = {ALL: 3.5105, FIRST: 3.4475}
# increase of NLL, at most; of the first windows .0004 more than was measured on any CPU: FP8 lost
# .0031 on one and .0042 on another, whose float32 products end in other bits
BOUNDS = {
    ALL: {"rtn_w4a16": 0.0316, "rtn_w8a16": 0.001, "rtn_w8a8": 0.0018, "fp8/rtn_fp8": 0.0045},
    FIRST: {"rtn_w4a16": 0.0318, "fp8/rtn_fp8": 0.0046},
}
# NLL: what llm-compressor's AWQ loses, plus
# .0003; GPTQ's is llm-compressor's own, the best recipe's below a prototype of AWQ, clip and GPTQ.
# KL: the most that was measured on a CPU with or without AMX or on a GPU, plus 5 %; from last bits
# alone it moves by a quarter of what NLL moves by
SEARCHED = {
    ALL: {
        "gptq_w4a16": Bound(0.0196, 0.0241),
        "tuned/best_w4a16": Bound(0.0115, 0.0193),
        "awq_w4a16": Bound(0.0274, 0.0315),
        "tuned/awq_w4a16": Bound(0.0185, 0.0300),
        # KL carries the bound: NLL moves by .0003, so its own is llm-compressor's .0006 plus twice
        "tuned/awq_w8a8": Bound(0.0012, 0.0016),
        "fp8/awq_fp8": Bound(0.0044, 0.0045),
    },
    # the most that was measured, with hidden states in float32 or bfloat16, and .0004 and 5 % more
    FIRST: {
        "gptq_w4a16": Bound(0.0201, 0.0257),
        "awq_w4a16": Bound(0.0198, 0.0295),
    },
}


def cases(bounds: Mapping[int, Iterable[str]]) -> list[Any]:
    """Numbers of windows, and the recipes that have bounds on them; any worker may take any."""
    return [
        pytest.param(
            count,
            recipe,
            marks=[
                *[pytest.mark.long] * (count == ALL),
                pytest.mark.xdist_group(f"{recipe} {count}"),
            ],
        )
        for count in bounds
        for recipe in bounds[count]
    ]


@pytest.fixture(scope="module")
def source(shared: Path) -> Checkpoint:
    return open_checkpoint(shared / "models" / "llama-26m")


@pytest.fixture(scope="module")
def count(request: pytest.FixtureRequest) -> int:
    """How many windows are measured on."""
    found: int = request.param
    return found


@pytest.fixture(scope="module")
def windows(shared: Path, source: Checkpoint, count: int) -> Tensor:
    path = str(shared / "text" / "heldout.txt")
    text = TextSource("--text", "text", path, evaluation=True)
    return evaluation_windows(source.source, text, 2048, count)


@pytest.fixture(autouse=True)
def source_run_once(source: Checkpoint, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source's hidden states on the same windows are the same: they are computed once."""
    computed = evaluate.final_hidden

    def final_hidden(weights: Weights, decoder: Decoder, windows: Tensor) -> Tensor:
        if weights.checkpoint is not source:
            return computed(weights, decoder, windows)
        asked = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
        kept = run_folder / f"source-{asked}.safetensors"
        with FileLock(kept.with_suffix(".lock")):
            if not kept.exists():
                save_file({"hidden": computed(weights, decoder, windows)}, kept)
            return load_file(kept)["hidden"]

    monkeypatch.setattr(evaluate, "final_hidden", final_hidden)


def published(recipe: str, overrides: list[str], shared: Path, output: Path) -> Checkpoint:
    """The real model, quantized."""
    text = shared / "text" / "heldout.txt"
    short = ["eval.name=text", f"eval.path={text}", "eval.windows=1", "eval.seq_len=256"]
    short += ["eval.report=false"]
    quantize_model(
        f"configs/{recipe}.yml",
        model=str(shared / "models" / "llama-26m"),
        output=str(output),
        overrides=[*overrides, *short],
    )
    return open_checkpoint(output)


@pytest.fixture(scope="module")
def source_nll(source: Checkpoint, windows: Tensor) -> float:
    return float(evaluate.measure(source, windows)["nll"])


@pytest.mark.parametrize("count", [pytest.param(ALL, marks=pytest.mark.long), FIRST], indirect=True)
def test_the_source_has_its_published_likelihood(source_nll: float, count: int) -> None:
    assert source_nll == pytest.approx(SOURCE_NLL[count], abs=0.0005)


@pytest.mark.parametrize(("count", "recipe"), cases(BOUNDS), indirect=["count"])
@pytest.mark.usefixtures("home", "services")
def test_round_to_nearest_costs_no_more_than_its_bound(
    recipe: str, shared: Path, tmp_path: Path, windows: Tensor, source_nll: float, count: int
) -> None:
    quantized = published(recipe, [], shared, tmp_path / "out")
    measured = evaluate.measure(quantized, windows)
    assert measured["tokens"] == count * 2047
    print(f"{recipe}: NLL {measured['nll'] - source_nll:+.5f}")
    assert measured["nll"] - source_nll <= BOUNDS[count][recipe]


@pytest.mark.ops
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("count", "recipe"), cases(SEARCHED), indirect=["count"])
@pytest.mark.usefixtures("home", "services")
def test_searches_cost_no_more_than_their_bound(
    recipe: str,
    shared: Path,
    tmp_path: Path,
    source: Checkpoint,
    windows: Tensor,
    count: int,
) -> None:
    text = shared / "text" / "calibration.txt"
    calib = f"{{name: text, path: {text}, n_samples: {CALIBRATED[count]}, seq_len: 512}}"
    steps = load_recipe(recipe).steps
    places = ["calib"] if steps is None else [f"steps.{n}.calib" for n in range(len(steps))]
    calibrated = [f"{place}={calib}" for place in places]
    quantized = published(recipe, calibrated, shared, tmp_path / "out")
    measured = evaluate.measure(quantized, windows, source)
    found = Bound(measured["nll_increase"], measured["kl"])
    print(f"{recipe}: NLL {found.nll:+.5f}, KL {found.kl:.5f}")
    assert found.nll <= SEARCHED[count][recipe].nll
    assert found.kl <= SEARCHED[count][recipe].kl
