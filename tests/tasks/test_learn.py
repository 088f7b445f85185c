"""Learned clipping and channels of a block: what is kept is what was learned."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantizers.omniquant import fake_quantize
from quantizers.rounding import dequantize
from tasks import learn as module
from tasks.clip import LEARNED, block_clip
from tasks.engine.job import Job
from tasks.engine.store import Entry
from tasks.engine.streams import Streams, start_stream
from tasks.engine.version import DECISION, block_transforms, transformed_block
from tasks.learn import learn
from tasks.quantize import Origin, block_codes
from tests.models import make_checkpoint
from tests.tasks.conftest import JobOf, make_entry, put_tokens, random_tokens

TOKENS = random_tokens(8, 48, 256)
WEIGHT = "weight: {bit: 3, granularity: per_group, group_size: 32, need_pack: true}"


def omniquant(**special: Any) -> str:
    keys = ", ".join(f"{key}: {str(value).lower()}" for key, value in special.items())
    return f"quant={{method: OmniQuant, {WEIGHT}, special: {{{keys}}}, quant_out: true}}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("learn")
    small: dict[str, Any] = {
        "hidden": 64,
        "intermediate": 96,
        "vocabulary": 256,
        "initializer_range": 0.15,
        "dtype": torch.float32,
    }
    return {
        "llama": make_checkpoint(folder / "llama", **small),
        "biases": make_checkpoint(folder / "biases", attention_bias=True, **small),
    }


def learned(job: Job) -> tuple[Entry, Origin]:
    stream = start_stream(job, put_tokens(job.store, TOKENS).key)
    step = job.steps[-1]
    entry = make_entry(learn, job, step, Streams(stream, stream), block=0)
    special = step.quant.special
    decision = entry.key if special.let else None  # type: ignore[union-attr]
    clipped = entry.key if special.lwc else None  # type: ignore[union-attr]
    return entry, Origin(step, stream, decision, clipped)


@pytest.fixture
def job(job_of: JobOf, models: dict[str, Path]) -> Any:
    def make(model: str = "llama", **special: Any) -> Job:
        return job_of(models[model], "awq_w4a16", omniquant(**({"epochs": 8} | special)))

    return make


@pytest.mark.parametrize(
    ("special", "below"),
    [
        ({"lwc_lr": 0.03}, 0.97),
        ({"lwc_lr": 0.03, "aug_loss": True}, 0.97),
        # a search has found most of it
        ({"lwc_lr": 0.003, "search_clip_init": True}, 1.0),
    ],
)
def test_the_loss_falls(special: dict[str, Any], below: float, job: Any) -> None:
    entry, _ = learned(job(epochs=40, **special))
    losses = entry.value["loss"]
    assert len(losses) == 41 and not entry.value["fell_back"]
    assert min(losses) <= below * losses[0]


def test_what_is_rounded_is_what_was_learned(job: Any) -> None:
    made = job()
    entry, origin = learned(made)
    tensors = load_file(entry.file(LEARNED))
    codes = block_codes(made, origin, 0)
    weights = made.read_block(0)
    moved = 0.0
    for linear in made.plan.architecture.linears:
        low, high = tensors[f"{linear}.low"], tensors[f"{linear}.high"]
        moved = max(moved, float((low - torch.sigmoid(torch.tensor(4.0))).abs().max()))
        assert ((low > 0) & (low < 1) & (high > 0) & (high < 1)).all()
        wanted = fake_quantize(weights[f"{linear}.weight"], made.scheme.weight, low, high)
        assert torch.equal(dequantize(codes[linear], made.scheme.weight), wanted)
    assert moved > 0.001
    found = block_clip(made, entry.key)
    assert torch.equal(found["mlp.up_proj"][1], tensors["mlp.up_proj.high"])


def test_linears_that_share_a_scale_share_their_clip(
    job_of: JobOf, models: dict[str, Path]
) -> None:
    weight = "weight: {bit: e4m3, symmetric: true, granularity: per_tensor}"
    special = "special: {epochs: 4, lwc_lr: 0.1}"
    quant = f"quant={{method: OmniQuant, {weight}, {special}, quant_out: true}}"
    made = job_of(models["llama"], "fp8/awq_fp8", quant)
    entry, origin = learned(made)
    tensors, codes, weights = load_file(entry.file(LEARNED)), block_codes(made, origin, 0), None
    moved = 0.0
    for group in made.plan.architecture.groups:
        low, high = (tensors[f"{group.linears[0]}.{end}"] for end in ("low", "high"))
        moved = max(moved, float((low - torch.sigmoid(torch.tensor(4.0))).abs().max()))
        weights = [made.read_block(0)[f"{linear}.weight"] for linear in group.linears]
        wanted = fake_quantize(torch.cat(weights), made.scheme.weight, low, high)
        parts = wanted.split([len(each) for each in weights])
        for linear, part in zip(group.linears, parts, strict=True):
            assert torch.equal(tensors[f"{linear}.low"], low)
            assert torch.equal(dequantize(codes[linear], made.scheme.weight), part)
    assert moved > 0.001


@pytest.mark.parametrize(
    "special", [{"lwc": True}, {"lwc": False}, {"lwc": False, "search_scale_init": True}]
)
def test_learned_channels(special: dict[str, Any], job: Any) -> None:
    made = job(let=True, **special)
    entry, origin = learned(made)
    assert min(entry.value["loss"]) < entry.value["loss"][0]
    transforms = block_transforms(made, origin.decision)
    assert set(transforms) == {"attention_input", "attention_output", "mlp_input"}
    # folded, they leave what the block computes
    before, after = made.read_block(0), transformed_block(made, 0, origin.decision)
    norm, scale = "input_layernorm.weight", transforms["attention_input"].scale
    assert torch.allclose(after[norm].float() * scale, before[norm].float(), rtol=1e-5)
    weight = "self_attn.q_proj.weight"
    assert torch.allclose(after[weight], before[weight] * scale, rtol=1e-5)
    assert (LEARNED in entry.files) is special["lwc"] and DECISION in entry.files


def test_shifts_are_learned_where_biases_take_them(job: Any) -> None:
    made = job("biases", let=True, use_shift=True)
    transforms = block_transforms(made, learned(made)[1].decision)
    assert transforms["attention_output"].shift is not None
    assert transforms["attention_input"].shift is None
    plain = job("llama", let=True, use_shift=True)
    found = block_transforms(plain, learned(plain)[1].decision)
    assert all(transform.shift is None for transform in found.values())


def test_a_loss_that_is_no_number_leaves_the_start(
    job: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_block, calls = module.run_block, []

    def broken(*args: Any, **more: Any) -> Any:
        calls.append(1)
        out = run_block(*args, **more)
        return out * float("nan") if len(calls) > 2 else out

    monkeypatch.setattr(module, "run_block", broken)
    monkeypatch.setattr("tasks.engine.decoder.MICRO_BATCH_TOKENS", {"cpu": 96})
    with caplog.at_level(logging.WARNING, "blockquant"):
        entry, _ = learned(job())
    assert entry.value["fell_back"] and entry.value["loss"] == []
    assert "block 0: the loss is nan in epoch 1; it keeps what was best before" in caplog.text
    tensors = load_file(entry.file(LEARNED))
    start = torch.sigmoid(torch.tensor(4.0))
    assert all(torch.allclose(tensor, start) for tensor in tensors.values())


def test_learning_twice_gives_the_same_bytes(job: Any, tmp_path: Path) -> None:
    first = learned(job(let=True))[0]
    bits = {name: first.file(name).read_bytes() for name in first.files}
    made = job(let=True)
    made.store.remove(first.key)
    again = learned(made)[0]
    assert {name: again.file(name).read_bytes() for name in again.files} == bits
