"""A rotated model computes what it did, and its norms, head and embedding are as said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quantizers import rotation as rotations
from quantizers.rotation import RotationKind, draw_rotation
from tasks.engine.architectures import ARCHITECTURES
from tasks.engine.job import Job
from tasks.engine.rotating import (
    rotated_block,
    rotated_outside,
    rotation_from,
    rotation_tensors,
)
from tasks.engine.streams import hidden_states, start_stream
from tasks.engine.version import Version, outside_tensors, version_block
from tasks.rotate import rotate
from tests.tasks.conftest import JobOf, make_entry, put_tokens, random_tokens
from tests.tasks.engine.test_folding import MODELS, job_for

TOKENS = random_tokens(2, 24, 256)
ROTATABLE = [
    name for name, given in MODELS.items() if not ARCHITECTURES[given["model_type"]].output_norms
]


@torch.no_grad()
def difference(job: Job, kind: RotationKind = RotationKind.HADAMARD) -> float:
    """How far logits move, over the largest, when all of a model is rotated."""
    model = AutoModelForCausalLM.from_pretrained(job.source.path, dtype=torch.float32)
    before = model(TOKENS).logits
    rotation, architecture = draw_rotation(64, 0, kind), job.plan.architecture
    state = dict(model.state_dict())
    for block in job.blocks:
        tensors = rotated_block(job.read_block(block), architecture, rotation)
        state |= {job.plan.blocks[block].prefix + n: t.float() for n, t in tensors.items()}
    stored = job.source.read(job.plan.outside)
    outside = rotated_outside(stored, architecture, rotation, torch.float32)
    state |= {n: t.float() for n, t in outside.items()}
    config = AutoConfig.from_pretrained(job.source.path)
    config.tie_word_embeddings = False
    rotated = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    rotated.load_state_dict(state)
    return float((rotated(TOKENS).logits - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("kind", RotationKind)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", ROTATABLE)
def test_logits_stay(
    name: str, kv_heads: int, kind: RotationKind, job_of: JobOf, tmp_path: Path
) -> None:
    assert difference(job_for(job_of, tmp_path, name, kv_heads=kv_heads), kind) < 1e-4


def test_a_rotation_does_not_pass_norms_of_what_a_block_adds(job_of: JobOf, tmp_path: Path) -> None:
    assert set(MODELS) - set(ROTATABLE) == {"gemma2"}
    assert difference(job_for(job_of, tmp_path, "gemma2")) > 1e-2


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_logits_stay_with_tied_embeddings(name: str, job_of: JobOf, tmp_path: Path) -> None:
    assert difference(job_for(job_of, tmp_path, name, tied=True)) < 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_what_lies_outside_is_rotated_in_parts(
    name: str, job_of: JobOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_for(job_of, tmp_path, name)
    architecture, rotation = job.plan.architecture, draw_rotation(64, 0)
    stored = job.source.read(job.plan.outside)
    monkeypatch.setattr("tasks.engine.rotating.PART_ENTRIES", 100 * 64 + 1)
    found = rotated_outside(stored, architecture, rotation, torch.bfloat16)
    embedding, norm = stored[architecture.embedding], stored[architecture.final_norm]
    head = stored.get(architecture.head, embedding).double()
    folded = head * (norm.double() + architecture.norm_offset)
    for name, before in ((architecture.embedding, embedding), (architecture.head, folded)):
        assert torch.equal(found[name], rotations.rotate(before, rotation).float().bfloat16())
    alone = {architecture.embedding: embedding}
    again = rotated_outside(alone, architecture, rotation, torch.bfloat16)
    assert set(again) == set(alone)
    assert torch.equal(again[architecture.embedding], found[architecture.embedding])


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_norms_multiply_by_one(name: str, job_of: JobOf, tmp_path: Path) -> None:
    job = job_for(job_of, tmp_path, name)
    tensors = rotated_block(job.read_block(0), job.plan.architecture, draw_rotation(64, 0))
    offset = job.plan.architecture.norm_offset
    for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        assert torch.equal(tensors[norm] + offset, torch.ones(64))


def test_a_rotation_comes_back_from_its_file() -> None:
    rotation = draw_rotation(96, 5)
    again = rotation_from({n: t.clone() for n, t in rotation_tensors(rotation).items()})
    assert torch.equal(again.signs, rotation.signs) and torch.equal(again.core, rotation.core)


def rotated_version(job: Job) -> Version:
    return Version(rotation=make_entry(rotate, job, job.steps[0]).key)


def test_the_stream_starts_rotated_and_ends_where_the_source_does(
    job_of: JobOf, tmp_path: Path
) -> None:
    model = job_for(job_of, tmp_path).source.path
    job = job_of(model, "w8a8_combin")
    version = rotated_version(job)
    tokens = put_tokens(job.store, TOKENS).key
    plain, turned = start_stream(job, tokens), start_stream(job, tokens, version)
    assert plain.key != turned.key
    before, after = hidden_states(job, plain), hidden_states(job, turned)
    assert not torch.allclose(before, after)
    norms = [states.double().norm(dim=-1) for states in (before, after)]
    assert torch.allclose(norms[0], norms[1], rtol=2e-2), "a rotation keeps lengths"
    names = set(outside_tensors(job, version))
    assert names == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    block = version_block(job, version, 0)
    assert block["mlp.down_proj.weight"].dtype == torch.float32


def test_seed_and_kind_decide_the_rotation(job_of: JobOf, tmp_path: Path) -> None:
    model = job_for(job_of, tmp_path).source.path
    job = job_of(model, "w8a8_combin")
    keys = {
        rotate.key(other, other.steps[0])
        for other in (
            job,
            job_of(model, "w8a8_combin", "base.seed=1"),
            job_of(model, "w8a8_combin", "steps.0.quant.special.rotate_mode=random"),
        )
    }
    assert len(keys) == 3
    # what rounds afterwards does not change it
    other = job_of(model, "w8a8_combin", "steps.1.quant.special.percdamp=0.1")
    assert rotate.key(other, other.steps[0]) == rotate.key(job, job.steps[0])
