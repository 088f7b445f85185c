"""Which linears of a block are clipped, and that what was chosen is what is rounded with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.methods import has_clip
from quantizers.clipping import clip_factors
from quantizers.rounding import dequantize, round_to_nearest
from tasks.clip import CLIP, FACTORS, block_clip, clip, rounding_ranges
from tasks.engine.job import Job
from tasks.engine.store import Entry
from tasks.engine.streams import start_stream
from tasks.engine.version import transformed_block
from tasks.quantize import Origin, block_codes, quantize
from tasks.transform import transform
from tests.models import make_checkpoint
from tests.quantizers.literal import rounded_weight
from tests.tasks.conftest import JobOf, make_entry, put_tokens, random_tokens

QUERY_KEY = {"self_attn.q_proj", "self_attn.k_proj"}
ATTENTION_INPUT = QUERY_KEY | {"self_attn.v_proj"}
ALL = {
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
GROUPS = "quant.weight.group_size=32"
TOKENS = random_tokens(3, 24, 256)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "model"
    small: dict[str, Any] = {"hidden": 64, "intermediate": 96, "vocabulary": 256}
    return make_checkpoint(folder, initializer_range=0.15, **small)


def clipped(job: Job, *, transformed: bool = True) -> tuple[Entry, Origin]:
    stream = start_stream(job, put_tokens(job.store, TOKENS).key)
    step = job.steps[-1]
    decision = make_entry(transform, job, step, stream, block=0).key if transformed else None
    entry = make_entry(clip, job, step, stream, decision, block=0)
    return entry, Origin(step, stream, decision, entry.key)


def linears_of(entry: Entry) -> set[str]:
    return set(load_file(entry.file(CLIP))) - {FACTORS}


@pytest.mark.parametrize("asked, left_out", [("false", QUERY_KEY), ("true", set())])
def test_query_and_key_are_left_out_unless_asked_for(
    asked: str, left_out: set[str], model: Path, job_of: JobOf
) -> None:
    job = job_of(model, "awq_w4a16", GROUPS, f"quant.special.clip_query_key={asked}")
    assert has_clip(job.steps[-1].quant)
    entry, origin = clipped(job)
    assert linears_of(entry) == set(entry.value["chosen"]) == ALL - left_out
    assert set(block_clip(job, origin.clipped)) == ALL - left_out


@pytest.mark.parametrize("asked, left_out", [("false", ATTENTION_INPUT), ("true", set())])
def test_what_shares_one_scale_is_clipped_as_a_whole_or_not_at_all(
    asked: str, left_out: set[str], model: Path, job_of: JobOf
) -> None:
    entry, origin = clipped(
        job := job_of(model, "fp8/awq_fp8_static", f"quant.special.clip_query_key={asked}")
    )
    assert linears_of(entry) == ALL - left_out
    factors = block_clip(job, origin.clipped)
    codes = block_codes(job, origin, 0)
    for group in job.plan.architecture.groups:
        of_scales = {float(codes[linear].scale) for linear in group.linears}
        of_factors = {float(end) for n in group.linears if n in factors for end in factors[n]}
        assert len(of_scales) == 1
        assert len(of_factors) == (0 if left_out.issuperset(group.linears) else 1)


@pytest.mark.parametrize("symmetric", ["true", "false"])
@pytest.mark.parametrize("transformed", [True, False])
def test_codes_come_from_the_ranges_that_were_chosen(
    transformed: bool, symmetric: str, model: Path, job_of: JobOf
) -> None:
    more = [GROUPS, f"quant.weight.symmetric={symmetric}", "quant.special.clip_shrink=0.8"]
    job = job_of(model, "awq_w4a16", *more)
    entry, origin = clipped(job, transformed=transformed)
    tensors, factors = transformed_block(job, 0, origin.decision), block_clip(job, origin.clipped)
    codes = block_codes(job, origin, 0)
    some = False
    for linear in ALL:
        weight, made = tensors[f"{linear}.weight"].float(), codes[linear]
        restored = made.codes.float().unflatten(1, (-1, 32))
        zero = 0 if made.zero_point is None else made.zero_point.float()[..., None]
        restored = ((restored - zero) * made.scale.float()[..., None]).flatten(1)
        ends = factors.get(linear, (torch.ones(made.scale.shape),) * 2)
        assert torch.equal(*ends), "a searched factor moves both ends"
        clip_of = ends[0]
        some |= bool((clip_of < 1).any())
        wanted = torch.cat(
            [
                rounded_weight(
                    part,
                    "int4",
                    symmetric=symmetric == "true",
                    clip=ratio[:, None],
                    scale_dtype=torch.bfloat16,
                )
                for part, ratio in zip(weight.split(32, 1), clip_of.unbind(1), strict=True)
            ],
            1,
        )
        torch.testing.assert_close(restored.double(), wanted, rtol=1e-5, atol=1e-6)
    assert some, "the case clips something"
    assert entry.value["factors"] == pytest.approx(clip_factors(10, 0.8).tolist())
    for linear, counts in entry.value["chosen"].items():
        assert sum(counts) == factors[linear][0].numel()
        curve = entry.value["errors"][linear]
        assert len(curve) == len(entry.value["factors"])
        assert 0 < min(curve) < max(curve)
        taken = [int((factors[linear][0] == f).sum()) for f in entry.value["factors"]]
        assert counts == taken


def test_without_weight_clip_nothing_is_clipped(model: Path, job_of: JobOf) -> None:
    assert not has_clip(
        job_of(model, "awq_w4a16", "quant.special.weight_clip=false").steps[-1].quant
    )
    assert not has_clip(job_of(model, "smoothquant_w8a8").steps[-1].quant)


def test_the_clip_is_of_the_transformed_weights(model: Path, job_of: JobOf, tmp_path: Path) -> None:
    # one input channel is far larger: only its transform makes the others' ranges matter
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.post_attention_layernorm.weight"][5] *= 50
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    job = job_of(folder, "awq_w4a16", GROUPS)
    with_it, without = clipped(job)[0], clipped(job, transformed=False)[0]
    assert with_it.key != without.key
    assert with_it.value["chosen"]["mlp.up_proj"] != without.value["chosen"]["mlp.up_proj"]


@pytest.mark.parametrize("recipe", ["rtn_w4a16", "rtn_w8a8", "fp8/rtn_fp8"])
def test_ranges_with_the_least_squared_error(recipe: str, model: Path, job_of: JobOf) -> None:
    more = [GROUPS] if recipe == "rtn_w4a16" else []
    jobs = [job_of(model, recipe, *more, f"quant.weight.calib_algo={a}") for a in ("minmax", "mse")]
    plain, found = (block_codes(job, Origin(job.steps[-1], None, None), 0) for job in jobs)
    gained = []
    for linear in ALL:
        weight = jobs[0].read_block(0)[f"{linear}.weight"].float()
        scheme = jobs[0].scheme.weight
        lost = [(dequantize(q[linear], scheme) - weight).square().sum() for q in (plain, found)]
        assert lost[1] <= lost[0]
        gained.append(float(lost[1] / lost[0]))
        # no other factor of the grid would have lost less
        for factor in (1.0, 0.9, 0.7):
            ends = torch.full(scheme.scale_shape(*weight.shape), factor)
            if not scheme.number_format.is_float:
                other = dequantize(round_to_nearest(weight, scheme, ends), scheme)
                assert lost[1] <= (other - weight).square().sum() * (1 + 1e-6)
    assert min(gained) < 0.97
    keys = [quantize.key(j, Origin(j.steps[-1], None, None), block=0) for j in jobs]
    assert keys[0] != keys[1]


def test_a_searched_clip_goes_before_squared_error(model: Path, job_of: JobOf) -> None:
    job = job_of(model, "awq_w4a16", GROUPS, "quant.weight.calib_algo=mse")
    _, origin = clipped(job)
    tensors = transformed_block(job, 0, origin.decision)
    searched = block_clip(job, origin.clipped)
    ranges = rounding_ranges(job, job.steps[-1].quant, 0, tensors, origin.clipped)
    assert set(ranges) == ALL and set(searched) == ALL - ATTENTION_INPUT | {"self_attn.v_proj"}
    assert all(torch.equal(ranges[n][0], searched[n][0]) for n in searched)
