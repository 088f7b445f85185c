"""Which groups of a block are transformed, by what, and what an Inf in their inputs says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from configs.methods import has_transform
from quantizers.channel_transform import ChannelTransform
from tasks.engine.collect import SAMPLE_ROWS, block_statistics, sampled_rows
from tasks.engine.errors import RunError
from tasks.engine.job import Job
from tasks.engine.store import Entry
from tasks.engine.streams import Stream, start_stream
from tasks.engine.version import DECISION, block_transforms, transformed_block
from tasks.quantize import INPUT_SCALES, Origin, block_codes, quantize
from tasks.transform import transform
from tests.models import make_checkpoint
from tests.tasks.conftest import JobOf, make_entry, put_tokens, random_tokens

NORM_FED = {"attention_input", "mlp_input"}
ALL = NORM_FED | {"attention_output", "mlp_output"}
TOKENS = random_tokens(3, 24, 256)


def make(folder: Path, **more: Any) -> Path:
    small: dict[str, Any] = {"hidden": 64, "intermediate": 96, "vocabulary": 256}
    given = small | {"initializer_range": 0.15, "dtype": torch.float32} | more
    return make_checkpoint(folder / "model", given.pop("model_type", "llama"), **given)


def decided(job: Job, block: int = 0) -> tuple[Entry, Stream]:
    stream = start_stream(job, put_tokens(job.store, TOKENS).key)
    return make_entry(transform, job, job.steps[-1], stream, block=block), stream


def transforms_of(job: Job) -> dict[str, ChannelTransform]:
    return dict(block_transforms(job, decided(job)[0].key))


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize(
    "recipe, groups",
    [("smoothquant_w8a8", NORM_FED), ("awq_w8a8", ALL), ("os_plus_w8a8", ALL)],
)
def test_groups_of_each_method(
    recipe: str, groups: set[str], kv_heads: int, job_of: JobOf, tmp_path: Path
) -> None:
    job = job_of(make(tmp_path, kv_heads=kv_heads), recipe)
    assert has_transform(job.steps[-1].quant)
    found = transforms_of(job)
    assert set(found) == groups
    for transform_found in found.values():
        assert bool((transform_found.scale > 0).all())
    assert len(found["attention_input"].scale.unique()) > 1


@pytest.mark.parametrize("kv_heads, groups", [(2, ALL - {"attention_output"}), (4, ALL)])
def test_shared_heads_are_left_alone_if_so_asked(
    kv_heads: int, groups: set[str], job_of: JobOf, tmp_path: Path
) -> None:
    job = job_of(make(tmp_path, kv_heads=kv_heads), "awq_w8a8", "quant.special.do_gqa_trans=false")
    assert set(transforms_of(job)) == groups


def test_without_trans_nothing_is_transformed(job_of: JobOf, tmp_path: Path) -> None:
    job = job_of(make(tmp_path), "awq_w8a8", "quant.special.trans=false")
    assert not has_transform(job.steps[-1].quant)


@pytest.mark.parametrize("recipe", ["awq_w8a8", "os_plus_w8a8"])
def test_what_is_tried_is_told(recipe: str, job_of: JobOf, tmp_path: Path) -> None:
    job = job_of(make(tmp_path), recipe)
    value = decided(job)[0].value
    assert value["tokens"] == TOKENS.numel()
    assert set(value["absmax"]) == set(value["search"]) == ALL
    for trials in value["search"].values():
        assert len(trials) == (20 if recipe == "awq_w8a8" else 32)
        assert min(trial["error"] for trial in trials) < trials[0]["error"] * 1.0001


def test_shifts_are_kept_where_biases_take_them(job_of: JobOf, tmp_path: Path) -> None:
    found = transforms_of(job_of(make(tmp_path, attention_bias=True), "os_plus_w8a8"))
    assert {name for name, made in found.items() if made.shift is not None} == {"attention_output"}


def test_the_same_twice(job_of: JobOf, tmp_path: Path) -> None:
    model = make(tmp_path)
    first = load_file(decided(job_of(model, "awq_w8a8"))[0].file(DECISION))
    again = load_file(decided(job_of(model, "awq_w8a8"))[0].file(DECISION))
    assert all(torch.equal(first[name], again[name]) for name in first)


@torch.no_grad()
def test_statistics_are_those_of_what_transformers_feeds_its_linears(
    job_of: JobOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.engine import decoder

    # three windows pass in two batches
    monkeypatch.setitem(decoder.MICRO_BATCH_TOKENS, "cpu", 48)
    job = job_of(make(tmp_path), "awq_w8a8")
    stream = start_stream(job, put_tokens(job.store, TOKENS).key)
    found = block_statistics(job, stream, 0)
    model = AutoModelForCausalLM.from_pretrained(job.source.path, dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    for group in job.plan.architecture.groups:
        for linear in group.linears:
            model.model.layers[0].get_submodule(linear).register_forward_pre_hook(
                lambda _, given, name=linear: seen.__setitem__(name, given[0].flatten(0, -2))
            )
    model(TOKENS)
    for group in job.plan.architecture.groups:
        x, statistics = seen[group.linears[0]], found[group.name]
        assert all(torch.equal(seen[linear], x) for linear in group.linears)
        assert statistics.tokens == len(x)
        torch.testing.assert_close(statistics.gram, x.T @ x, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(statistics.absmax, x.abs().amax(0), rtol=1e-4, atol=1e-5)
        windows = x.unflatten(0, (len(TOKENS), -1)).amax(1)
        torch.testing.assert_close(statistics.window_maximum, windows, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(statistics.sample, x[sampled_rows(len(x))], rtol=1e-4, atol=1e-5)


def test_the_rows_that_are_kept() -> None:
    few, many = sampled_rows(100), sampled_rows(20000)
    assert torch.equal(few, torch.arange(100))
    assert len(many) == len(many.unique()) == SAMPLE_ROWS
    assert torch.equal(many, sampled_rows(20000))
    assert torch.equal(many, many.sort().values)
    # from everywhere: no eighth of the tokens is without a fair share
    counts = torch.histc(many.float(), 8, 0, 20000)
    assert float(counts.min()) > SAMPLE_ROWS / 8 * 0.6


@pytest.mark.parametrize("recipe", ["awq_w8a8", "smoothquant_w8a8", "os_plus_w8a8"])
@pytest.mark.parametrize("linear", ["mlp.gate_proj", "mlp.down_proj"])
def test_an_overflow_names_block_and_linear(
    linear: str, recipe: str, job_of: JobOf, tmp_path: Path
) -> None:
    folder = make(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    if linear == "mlp.gate_proj":
        tensors["model.layers.0.post_attention_layernorm.weight"][3] = 3e38
        tensors["model.layers.0.post_attention_layernorm.weight"][4] = -3e38
    else:
        for name in ("gate", "up"):
            tensors[f"model.layers.0.mlp.{name}_proj.weight"] *= 1e25
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    place = f"model.layers.0.{linear}"
    message = re.escape(f"block 0: the inputs of {place} hold NaN or Inf")
    with pytest.raises(RunError, match=message):
        decided(job_of(folder, recipe))


STATIC = ("minmax", "static_minmax", "static_percentile")


@pytest.mark.parametrize("algorithm", STATIC)
def test_static_fp8_has_one_input_scale_and_one_weight_scale_per_group(
    algorithm: str, job_of: JobOf, tmp_path: Path
) -> None:
    more = [f"quant.act.calib_algo={algorithm}", "quant.act.percentile=99"]
    job = job_of(make(tmp_path), "fp8/awq_fp8_static", *more)
    entry, stream = decided(job)
    origin = Origin(job.steps[-1], stream, entry.key)
    made = make_entry(quantize, job, origin, block=0)
    scales = load_file(made.file(INPUT_SCALES))
    codes = block_codes(job, origin, 0)
    weights = transformed_block(job, 0, entry.key)
    statistics, transforms = block_statistics(job, stream, 0), block_transforms(job, entry.key)
    for group in job.plan.architecture.groups:
        of_inputs = {float(scales[linear]) for linear in group.linears}
        of_weights = {float(codes[linear].scale) for linear in group.linears}
        assert len(of_inputs) == len(of_weights) == 1
        largest = max(float(weights[f"{linear}.weight"].abs().max()) for linear in group.linears)
        assert of_weights.pop() == pytest.approx(largest / 448, rel=1e-6)
        # these few rows are all kept, so that what was seen is known
        x = statistics[group.name].sample.float() / transforms[group.name].scale
        assert len(x) == TOKENS.numel()
        windows = [float(part.abs().max()) for part in x.split(TOKENS.shape[1])]
        values = sorted(x.abs().flatten().tolist())
        covered = {
            "minmax": max(windows),
            "static_minmax": sum(windows) / len(windows),
            "static_percentile": values[-(-len(values) * 99 // 100) - 1],
        }[algorithm]
        assert of_inputs.pop() == pytest.approx(covered / 448, rel=1e-5)
    assert len({float(scale) for scale in scales.values()}) == 4
