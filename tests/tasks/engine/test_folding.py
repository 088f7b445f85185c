"""Transforms that are only folded, never followed by rounding, leave a model's logits alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantizers.channel_transform import ChannelTransform
from tasks.engine.architectures import LinearGroup
from tasks.engine.export_format import export_dtype
from tasks.engine.folding import (
    apply_transforms,
    from_tensors,
    head_dim,
    is_norm,
    quantized_groups,
    realizer,
    shares_heads,
    shift_of,
    to_tensors,
)
from tasks.engine.job import Job
from tests.models import GEMMA2, edit_config, make_checkpoint
from tests.tasks.conftest import JobOf, random_tokens

BIASES = {"model_type": "llama", "attention_bias": True, "mlp_bias": True}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama, biases": BIASES,
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "mistral": {"model_type": "mistral"},
    "gemma": {"model_type": "gemma", "tied": True},
    "gemma2": GEMMA2,
}
GROUPS = ("attention_input", "attention_output", "mlp_input", "mlp_output")
TOKENS = random_tokens(2, 24, 256)


def make(folder: Path, model_type: str, **more: Any) -> Path:
    small: dict[str, Any] = {"hidden": 64, "intermediate": 96, "vocabulary": 256}
    # weights large enough for attention and gates to be no straight lines
    return make_checkpoint(folder, model_type, initializer_range=0.15, **small, **more)


def job_for(job_of: JobOf, folder: Path, name: str = "llama", *overrides: str, **more: Any) -> Job:
    model = make(folder / "model", **(MODELS[name] | {"dtype": torch.float32} | more))
    return job_of(model, "smoothquant_w8a8", *overrides)


def group_named(job: Job, name: str) -> LinearGroup:
    return next(group for group in job.plan.architecture.groups if group.name == name)


def random_transforms(job: Job, block: int) -> dict[str, ChannelTransform]:
    """A random transform of each group, as far as its feeder can take it."""
    draw = torch.Generator().manual_seed(block)
    tensors, transforms = job.read_block(block), {}
    for group in quantized_groups(job, block):
        columns = tensors[f"{group.linears[0]}.weight"].shape[1]
        wanted = torch.exp(torch.randn(columns, generator=draw))
        shift = shift_of(job, group, tensors, torch.randn(columns, generator=draw))
        scale = realizer(job, block, group, tensors)(wanted)
        assert float((scale.log() - scale.log().mean()).abs().max()) > 0.3
        transforms[group.name] = ChannelTransform(scale, shift)
    return transforms


def transformed(job: Job, block: int) -> Mapping[str, Tensor]:
    return apply_transforms(
        job.read_block(block),
        random_transforms(job, block),
        job.plan.architecture,
        head_dim(job),
        export_dtype(job.dtype),
    )


@torch.no_grad()
def difference(job: Job) -> float:
    """How far logits move, over the largest, when every block's tensors are transformed."""
    model = AutoModelForCausalLM.from_pretrained(job.source.path, dtype=torch.float32)
    before = model(TOKENS).logits
    for block in job.blocks:
        tensors, layer = transformed(job, block), model.model.layers[block]
        changed = [
            name
            for name, tensor in tensors.items()
            if not torch.equal(tensor, layer.state_dict()[name])
        ]
        assert len(changed) >= 9, "seven linears and two norms"
        layer.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return float((model(TOKENS).logits - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", MODELS)
def test_logits_stay(name: str, kv_heads: int, job_of: JobOf, tmp_path: Path) -> None:
    job = job_for(job_of, tmp_path, name, kv_heads=kv_heads)
    assert difference(job) < 1e-4


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_logits_stay_with_tied_embeddings(name: str, job_of: JobOf, tmp_path: Path) -> None:
    assert difference(job_for(job_of, tmp_path, name, tied=True)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma", "gemma2"])
def test_logits_stay_with_norms_in_few_bits(
    name: str, dtype: torch.dtype, job_of: JobOf, tmp_path: Path
) -> None:
    assert difference(job_for(job_of, tmp_path, name, dtype=dtype)) < 1e-4


def test_logits_stay_where_the_config_leaves_the_head_size_to_transformers(
    job_of: JobOf, tmp_path: Path
) -> None:
    model = make(tmp_path / "model", **GEMMA2, head_dim=256, dtype=torch.float32)
    edit_config(model, head_dim=None)
    job = job_of(model, "smoothquant_w8a8")
    assert head_dim(job) == 256
    assert difference(job) < 1e-4


def test_norms_of_what_a_block_adds_stay_as_they_were(job_of: JobOf, tmp_path: Path) -> None:
    job = job_for(job_of, tmp_path, "gemma2")
    tensors, after = job.read_block(0), transformed(job, 0)
    unchanged = {name for name in tensors if after[name] is tensors[name]}
    assert unchanged == {f"{norm}.weight" for norm in job.plan.architecture.output_norms}


def test_a_wrong_fold_would_be_seen(
    job_of: JobOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, right = job_for(job_of, tmp_path, kv_heads=2), random_transforms

    def one_off(job: Job, block: int) -> dict[str, ChannelTransform]:
        found = right(job, block)
        scale = found["attention_output"].scale.clone()
        scale[0] *= 1.5
        return found | {"attention_output": ChannelTransform(scale)}

    monkeypatch.setitem(globals(), "random_transforms", one_off)
    assert difference(job) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["llama", "gemma", "gemma2"])
def test_a_norm_folds_without_loss(
    name: str, dtype: torch.dtype, job_of: JobOf, tmp_path: Path
) -> None:
    job = job_for(job_of, tmp_path, name, dtype=dtype)
    tensors, after = job.read_block(0), transformed(job, 0)
    offset = job.plan.architecture.norm_offset
    for group_name in ("attention_input", "mlp_input"):
        group = group_named(job, group_name)
        scale = random_transforms(job, 0)[group_name].scale.double()
        norm = f"{group.fed_by}.weight"
        assert after[norm].dtype == export_dtype(dtype)
        restored = (after[norm].double() + offset) * scale
        torch.testing.assert_close(restored, tensors[norm].double() + offset, rtol=3e-7, atol=0)


def test_an_unquantized_feeder_gets_powers_of_two(job_of: JobOf, tmp_path: Path) -> None:
    left_out = "ignored_layers=[q_proj, k_proj, v_proj]"
    job = job_for(job_of, tmp_path, "llama", left_out, dtype=torch.bfloat16)
    transforms = random_transforms(job, 0)
    assert set(transforms) == set(GROUPS[1:])
    exponent = transforms["attention_output"].scale.log2()
    assert torch.equal(exponent, exponent.round())
    exponent = transforms["mlp_output"].scale.log2()
    assert not torch.equal(exponent, exponent.round()), "up_proj is rounded in any case"
    after, name = transformed(job, 0), "self_attn.v_proj.weight"
    assert torch.equal(after[name].bfloat16().float(), after[name])
    assert not torch.equal(after[name], job.read_block(0)[name].float())


@pytest.mark.parametrize("kv_heads, shared", [(4, False), (2, True), (1, True)])
def test_sharing_heads_share_a_factor(
    kv_heads: int, shared: bool, job_of: JobOf, tmp_path: Path
) -> None:
    job = job_for(job_of, tmp_path, "llama, biases", kv_heads=kv_heads)
    group, head = group_named(job, "attention_output"), 16
    assert shares_heads(group, job.read_block(0)) is shared
    wanted = torch.arange(1.0, 65.0)
    heads = wanted.reshape(kv_heads, -1, head)
    ways = {"mean": heads.mean(1), "max": heads.amax(1), "min": heads.amin(1)}
    for how, values in ways.items():
        expected = values[:, None].expand_as(heads).reshape(-1)
        assert torch.equal(realizer(job, 0, group, job.read_block(0), how)(wanted), expected)
    shift = shift_of(job, group, job.read_block(0), wanted)
    assert shift is not None
    assert torch.equal(shift, ways["mean"][:, None].expand_as(heads).reshape(-1))


@pytest.mark.parametrize("name", MODELS)
def test_shifts_go_where_biases_take_them(name: str, job_of: JobOf, tmp_path: Path) -> None:
    job, wanted = job_for(job_of, tmp_path, name), torch.ones(64)
    shifted = {
        group
        for group in GROUPS
        if shift_of(job, group_named(job, group), job.read_block(0), wanted) is not None
    }
    # norms have no biases, Qwen2's output projection neither, and between up and down is a gate
    assert shifted == ({"attention_output"} if name == "llama, biases" else set())


def test_the_tensors_given_stay_as_they_were(job_of: JobOf, tmp_path: Path) -> None:
    job = job_for(job_of, tmp_path, "llama, biases")
    copies = {name: tensor.clone() for name, tensor in job.read_block(0).items()}
    transformed(job, 0)
    assert all(torch.equal(tensor, copies[name]) for name, tensor in job.read_block(0).items())


def test_groups_without_a_transform_stay_as_they_were(job_of: JobOf, tmp_path: Path) -> None:
    job = job_for(job_of, tmp_path)
    one = {"mlp_input": random_transforms(job, 0)["mlp_input"]}
    tensors = job.read_block(0)
    after = apply_transforms(tensors, one, job.plan.architecture, head_dim(job), torch.bfloat16)
    changed = {name for name in tensors if after[name] is not tensors[name]}
    linears = {"mlp.gate_proj.weight", "mlp.up_proj.weight"}
    assert changed == linears | {"post_attention_layernorm.weight"}


def test_what_feeds_a_group(job_of: JobOf, tmp_path: Path) -> None:
    job = job_for(job_of, tmp_path)
    architecture = job.plan.architecture
    fed = {group.name: is_norm(architecture, group) for group in architecture.groups}
    assert fed == dict(zip(GROUPS, (True, False, True, False), strict=True))


def test_transforms_pass_through_a_file(job_of: JobOf, tmp_path: Path) -> None:
    transforms = random_transforms(job_for(job_of, tmp_path, "llama, biases"), 0)
    again = from_tensors(to_tensors(transforms))
    assert list(again) == list(transforms)
    for name, transform in transforms.items():
        assert torch.equal(again[name].scale, transform.scale)
        shift, other = again[name].shift, transform.shift
        assert (shift is None) == (other is None)
        assert shift is None or other is None or torch.equal(shift, other)
