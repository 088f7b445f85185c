"""Recipes of several steps, and of methods that follow others, through the whole flow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import Outcome

Here = Callable[..., Outcome]


@pytest.fixture
def quantized(
    here: Here, home: Path, services: object, tmp_path: Path, tiny: Path, words: Path
) -> Callable[..., dict[str, Any]]:
    """Quantize the tiny model with short texts; what the command prints as JSON."""
    del home, services

    def run(recipe: str, output: str, *overrides: str, steps: int = 1) -> dict[str, Any]:
        text = f"{{name: text, path: {words}, n_samples: 4, seq_len: 64}}"
        places = [f"steps.{n}.calib" for n in range(steps)] if steps > 1 else ["calib"]
        if recipe == "w8a8_combin":
            places = ["steps.1.calib"]
        given = [f"{place}={text}" for place in places]
        given += [
            f"eval={{name: text, path: {words}, windows: 2, seq_len: 128, report: false}}",
            *overrides,
        ]
        more = [part for override in given for part in ("--set", override)]
        arguments = ["quantize", recipe, "--model", tiny, "--output", tmp_path / output, "--json"]
        outcome = here(*arguments, *more)
        assert outcome.status == 0, outcome.err
        found: dict[str, Any] = json.loads(outcome.out)
        return found

    return run


def made(result: dict[str, Any]) -> list[str]:
    return [step["step"] for step in result["steps"] if not step["cached"]]


CASES = [("gptq_w4a16", 1), ("fp8/gptq_fp8", 1), ("w8a8_combin", 2), ("w4a16_combin", 2)]


@pytest.mark.parametrize(("recipe", "steps"), [*CASES, ("tuned/best_w4a16", 2)])
def test_the_checkpoint_is_whole_and_near_its_source(
    recipe: str, steps: int, quantized: Callable[..., dict[str, Any]]
) -> None:
    result = quantized(recipe, "out", steps=steps)
    # a second time everything is found, and what is found is the same
    again = quantized(recipe, "again", steps=steps)
    assert made(again) == []
    assert again["metrics"] == result["metrics"]
    assert result["metrics"]["kl"] < 0.01
    first, second = (
        {p.name: p.read_bytes() for p in Path(r["checkpoint"]).glob("*.safetensors")}
        for r in (result, again)
    )
    assert first == second


def test_a_rotated_checkpoint_is_untied_and_its_norms_are_one(
    quantized: Callable[..., dict[str, Any]],
) -> None:
    folder = Path(quantized("w8a8_combin", "out")["checkpoint"])
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    tensors: dict[str, Any] = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
    norms = [t for name, t in tensors.items() if name.endswith("norm.weight")]
    assert len(norms) == 5 and all((norm == 1).all() for norm in norms)
    assert "lm_head.weight" in tensors


def test_steps_that_two_recipes_share_are_computed_once(
    quantized: Callable[..., dict[str, Any]],
) -> None:
    quantized("tuned/best_w4a16", "first", steps=2)
    result = quantized("tuned/best_w4a16", "second", "steps.1.quant.special.percdamp=0.05", steps=2)
    ran = made(result)
    assert "transform[block 0]" not in ran and "transform[block 1]" not in ran
    assert "quantize[block 0]" in ran and "quantize[block 1]" in ran


def test_the_loss_of_learning_is_tracked(
    quantized: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    result = quantized("w4a16_combin", "out", "steps.1.quant.special.epochs=3", steps=2)
    lines = [line for line in caplog.messages if line.startswith("block") and " done" in line]
    assert [line.split(" done")[0] for line in lines] == [f"block {n} of 4" for n in range(1, 5)]
    client = MlflowClient(result["mlflow"]["uri"])
    run = result["mlflow"]["run"]
    for block in range(2):
        curve = client.get_metric_history(run, f"loss.block-{block}")
        assert [point.step for point in curve] == [0, 1, 2, 3]
        assert all(0 < point.value < 1 for point in curve)
    names = {a.path for a in client.list_artifacts(run, "decisions")}
    assert {"decisions/transform", "decisions/learn"} <= names


def test_a_rotation_after_another_step_is_refused(here: Here, tiny: Path, words: Path) -> None:
    weight = "weight: {bit: 4, granularity: per_channel, need_pack: true}"
    swap = f"steps=[{{quant: {{method: Awq, {weight}}}}}, {{quant: {{method: Quarot, {weight}}}}}]"
    outcome = here(
        *("quantize", "tuned/best_w4a16", "--model", tiny, "--set", swap),
        *("--set", f"calib={{name: text, path: {words}}}"),
    )
    assert outcome.status == 2
    assert "steps.1.quant.method" in outcome.err and "first step" in outcome.err


def test_codes_that_are_not_packed_are_for_transformers(
    quantized: Callable[..., dict[str, Any]], tiny: Path
) -> None:
    packed = quantized("gptq_w4a16", "packed")
    result = quantized("gptq_w4a16", "unpacked", "quant.weight.need_pack=false")
    assert result["launch"] is None and "need_pack" in result["unserved"]
    # the same codes, so the same figures
    assert result["metrics"] == packed["metrics"]
    folder = Path(result["checkpoint"])
    described = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert described["format"] == "int-quantized"
    assert described["config_groups"]["group_0"]["input_activations"] is None
    tensors: dict[str, Any] = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
    codes = tensors["model.layers.0.mlp.up_proj.weight"]
    assert codes.dtype == torch.int8 and int(codes.min()) >= -8 and int(codes.max()) <= 7
    assert "sglang" not in (folder / "README.md").read_text()


def test_zero_points_that_are_not_packed_are_read_back(
    quantized: Callable[..., dict[str, Any]],
) -> None:
    # verify compares with compressed-tensors' own reader and transformers' whole model
    asymmetric = ["quant.weight.need_pack=false", "quant.weight.symmetric=false"]
    result = quantized("gptq_w4a16", "unpacked", *asymmetric)
    assert 0 < result["metrics"]["kl"] < 0.01


def test_a_run_that_only_measures_publishes_nothing(
    quantized: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    result = quantized("gptq_w4a16", "out", "save.save_sgl=false")
    assert result["checkpoint"] is None and result["launch"] is None
    assert not (tmp_path / "out").exists() and result["metrics"]["kl"] > 0
    client = MlflowClient(result["mlflow"]["uri"])
    run = client.get_run(result["mlflow"]["run"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["checkpoint"] == "not published"
    assert run.data.metrics["eval.kl"] == result["metrics"]["kl"]
    assert "blockquant.json" in {a.path for a in client.list_artifacts(run.info.run_id)}
    # what was made is found by a run that publishes
    again = quantized("gptq_w4a16", "out")
    assert made(again) == [] and again["metrics"] == result["metrics"]


def test_the_model_before_rounding_beside_the_export(
    quantized: Callable[..., dict[str, Any]], tiny: Path
) -> None:
    both = ["save.save_trans=true", "save.save_sgl=true"]
    special = "steps.0.quant.special.weight_clip=true"
    result = quantized("w4a16_combin", "out", *both, special, steps=2)
    folder = Path(result["checkpoint"])
    report = json.loads((folder / "blockquant.json").read_text())
    assert report["transformed_model"]["metrics"]["kl"] < report["metrics"]["kl"]
    assert (
        AutoModelForCausalLM.from_pretrained(folder / "transformed_model").dtype == torch.bfloat16
    )
    source, kept = load_file(tiny / "model.safetensors"), dict[str, torch.Tensor]()
    for shard in (folder / "transformed_model").glob("*.safetensors"):
        kept |= load_file(shard)
    assert kept.keys() == source.keys()
    # learned ranges are narrower than the weights' own
    name = "model.layers.0.mlp.down_proj.weight"
    assert kept[name].abs().max() < source[name].abs().max()
