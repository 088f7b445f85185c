"""GPTQ on a block: what each group sees, and what it does where its inputs say too little."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.special_keys import GptqSpecial
from quantizers.gptq import GramFactor, factorize, gptq
from quantizers.rounding import dequantize
from quantizers.scales import weight_scales
from tasks.advance import advance
from tasks.engine import feedback
from tasks.engine.collect import block_statistics
from tasks.engine.decoder import run_block
from tasks.engine.doubts import Doubt
from tasks.engine.errors import RunError
from tasks.engine.feedback import Holds, RoundedBlock, asked_once, feed_back
from tasks.engine.job import Job
from tasks.engine.streams import (
    Streams,
    block_arguments,
    hidden_states,
    pass_block,
    start_stream,
)
from tasks.pack import pack
from tasks.quantize import Origin, quantize, rounded_block
from tests.models import make_checkpoint
from tests.tasks.conftest import JobOf, make_entry, put_tokens, random_tokens

TOKENS = random_tokens(8, 48, 256)
GROUPS = "quant.weight.group_size=32"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("feedback") / "model"
    small: dict[str, Any] = {"hidden": 64, "intermediate": 96, "vocabulary": 256}
    return make_checkpoint(folder, initializer_range=0.15, dtype=torch.float32, **small)


def origin_of(job: Job, tokens: Tensor = TOKENS) -> Origin:
    stream = start_stream(job, put_tokens(job.store, tokens).key)
    return Origin(job.steps[-1], stream, None)


def fed_back_of(job: Job) -> Callable[[Holds], RoundedBlock]:
    """Rounds the first block, given what says whether a factor is one."""
    stream, special = origin_of(job).stream, job.steps[-1].quant.special
    assert isinstance(special, GptqSpecial) and stream is not None
    tensors = {name: tensor.float() for name, tensor in job.read_block(0).items()}
    return partial(feed_back, job, special, Streams(stream, stream), 0, tensors, {})


def literal_inputs(job: Job, origin: Origin, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs (T, K) of every linear of the first block under given weights."""
    seen: dict[str, Tensor] = {}

    def see(linear: str, x: Tensor) -> Tensor:
        seen[linear] = x.reshape(-1, x.shape[-1])
        return x

    assert origin.stream is not None
    hidden = hidden_states(job, origin.stream)
    arguments = block_arguments(job, *hidden.shape[:2])[0]
    linears = job.plan.architecture.linears
    run_block(job.decoder.blocks[0], weights, hidden, arguments, linears, see)
    return seen


def restored(job: Job, rounded: RoundedBlock, linear: str) -> Tensor:
    return dequantize(rounded.codes[linear], job.scheme.weight)


@pytest.mark.parametrize("sequential", [True, False])
def test_each_group_sees_what_those_before_became(
    sequential: bool, model: Path, job_of: JobOf
) -> None:
    asked = f"quant.special.true_sequential={str(sequential).lower()}"
    job = job_of(model, "gptq_w4a16", GROUPS, asked)
    origin = origin_of(job)
    rounded = rounded_block(job, origin, 0)
    weights = {name: t.float() for name, t in job.read_block(0).items()}
    current = dict(weights)
    for group in job.plan.architecture.groups:
        x = literal_inputs(job, origin, current if sequential else weights)[group.linears[0]]
        factor = factorize(x.T @ x / len(x), percdamp=0.01, actorder=True)
        assert factor is not None
        for linear in group.linears:
            weight = weights[f"{linear}.weight"]
            scales = weight_scales(weight, job.scheme.weight)
            wanted = dequantize(gptq(weight, factor, job.scheme.weight, scales), job.scheme.weight)
            found = restored(job, rounded, linear)
            # another order of summation moves a weight that lies between two codes
            assert (found != wanted).float().mean() < 0.005
            current[f"{linear}.weight"] = found


def test_it_loses_less_than_rounding_to_nearest(model: Path, job_of: JobOf) -> None:
    gptq_job, rtn_job = job_of(model, "gptq_w4a16", GROUPS), job_of(model, "rtn_w4a16", GROUPS)
    x = literal_inputs(
        gptq_job, origin_of(gptq_job), {n: t.float() for n, t in gptq_job.read_block(0).items()}
    )
    fed_back = rounded_block(gptq_job, origin_of(gptq_job), 0)
    nearest = rounded_block(rtn_job, Origin(rtn_job.steps[-1], None, None), 0)
    for linear in ("self_attn.q_proj", "self_attn.v_proj"):
        weight = gptq_job.read_block(0)[f"{linear}.weight"].float()
        lost = [
            float((x[linear] @ (restored(job, found, linear) - weight).T).square().sum())
            for job, found in ((gptq_job, fed_back), (rtn_job, nearest))
        ]
        assert lost[0] < 0.85 * lost[1]


@pytest.mark.parametrize("refits", [0, 2])
def test_refitted_scales_lose_no_more(refits: int, model: Path, job_of: JobOf) -> None:
    more = ["quant.special.weight_clip=true", "quant.special.true_sequential=false"]
    jobs = [
        job_of(model, "gptq_w4a16", GROUPS, *more, f"quant.special.refit_scales={n}")
        for n in (0, refits)
    ]
    errors = []
    for job in jobs:
        entry = make_entry(quantize, job, origin_of(job), block=0)
        errors.append({n: linear["output_error"] for n, linear in entry.value["linears"].items()})
    for linear, error in errors[1].items():
        assert error <= errors[0][linear] * (1 + 1e-4)
        assert refits == 0 or error < errors[0][linear]


@pytest.mark.parametrize("refits", [0, 2])
def test_descent_loses_less(refits: int, model: Path, job_of: JobOf) -> None:
    more = ["quant.special.true_sequential=false", f"quant.special.refit_scales={refits}"]
    jobs = [
        job_of(model, "gptq_w4a16", GROUPS, *more, f"quant.special.descend={n}") for n in (0, 1, 4)
    ]
    errors, scales = [], []
    for job in jobs:
        value = make_entry(quantize, job, origin_of(job), block=0).value
        errors.append({n: linear["output_error"] for n, linear in value["linears"].items()})
        codes = rounded_block(job, origin_of(job), 0).codes
        scales.append({n: linear.scale for n, linear in codes.items()})
    for linear in errors[0]:
        never, once, often = (found[linear] for found in errors)
        assert often <= once * (1 + 1e-4) and once < never
        # with fixed scales the codes alone change
        assert torch.equal(scales[0][linear], scales[2][linear]) == (refits == 0)


def test_keys_know_of_descent_only_where_it_is_asked_for(model: Path, job_of: JobOf) -> None:
    jobs = [
        job_of(model, "gptq_w4a16", GROUPS, *more)
        for more in ([], ["quant.special.descend=0"], ["quant.special.descend=1"])
    ]
    read = [quantize.depends_on(job, origin_of(job), block=0)["special"] for job in jobs]
    keys = [quantize.key(job, origin_of(job), block=0) for job in jobs]
    assert read[0] == read[1] and "descend" not in read[0] and "code" not in read[0]
    assert keys[0] == keys[1] != keys[2]
    # the code of the descent is a part of what it makes
    assert read[2]["descend"] == 1 and len(read[2]["code"]) == 64


def test_what_is_reported(model: Path, job_of: JobOf) -> None:
    job = job_of(model, "gptq_w4a16", GROUPS)
    value = make_entry(quantize, job, origin_of(job), block=0).value
    for linear in value["linears"].values():
        assert linear["tokens"] == TOKENS.numel()
        assert linear["damping"] == pytest.approx(0.01)
        assert 0 < linear["output_error"] < linear["weight_error"] < 1


@pytest.mark.parametrize(
    ("tokens", "warned"), [(40, "and 13 more linears"), (80, "and 1 more linear)"), (96, "")]
)
def test_fewer_tokens_than_channels_are_warned_of(
    tokens: int, warned: str, model: Path, job_of: JobOf, caplog: pytest.LogCaptureFixture
) -> None:
    job = job_of(model, "gptq_w4a16", GROUPS)
    with caplog.at_level(logging.WARNING, "blockquant"):
        feedback.warn_of_rank(job, tokens)
    lines = [record.message for record in caplog.records]
    assert len(lines) == bool(warned)
    for line in lines:
        named = f"{tokens} tokens for the 96 input features of model.layers.0.mlp.down_proj"
        assert named in line and warned in line and f"rank {tokens}" in line


def test_a_matrix_that_cannot_be_mended_leaves_rounding_to_nearest(
    model: Path, job_of: JobOf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(feedback, "factorize", lambda gram, **_: None)
    job, rtn_job = job_of(model, "gptq_w4a16", GROUPS), job_of(model, "rtn_w4a16", GROUPS)
    with caplog.at_level(logging.WARNING, "blockquant"):
        rounded = rounded_block(job, origin_of(job), 0)
    nearest = rounded_block(rtn_job, Origin(rtn_job.steps[-1], None, None), 0)
    for linear, codes in rounded.codes.items():
        assert torch.equal(codes.codes, nearest.codes[linear].codes)
        assert rounded.notes[linear]["damping"] is None
    assert sum("rounded to nearest" in record.message for record in caplog.records) == 4


@pytest.mark.parametrize("sequential", ["true", "false"])
@pytest.mark.parametrize(("taken_off", "damping"), [(0.0, 0.01), (0.05, 0.1), (math.nan, None)])
def test_hope_changes_nothing(
    taken_off: float,
    damping: float | None,
    sequential: str,
    model: Path,
    job_of: JobOf,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def less_regular(gram: Tensor, **keys: Any) -> GramFactor | None:
        # by so much its least eigenvalue is below zero
        less = torch.linalg.eigvalsh(gram)[0] + taken_off * gram.diagonal().mean()
        return factorize(gram - less * torch.eye(len(gram)) if taken_off else gram, **keys)

    monkeypatch.setattr(feedback, "factorize", less_regular)
    job = job_of(model, "gptq_w4a16", GROUPS, f"quant.special.true_sequential={sequential}")
    fed_back = fed_back_of(job)
    with caplog.at_level(logging.WARNING, "blockquant"):
        sure, hoped = (asked_once(job, fed_back, hopes=hopes) for hopes in (False, True))
    # told once by each, not by what was hoped
    assert len(caplog.records) == (0 if damping == 0.01 else 2 * 4)
    for linear, codes in sure.codes.items():
        assert torch.equal(codes.codes, hoped.codes[linear].codes)
        assert torch.equal(codes.scale, hoped.codes[linear].scale)
        found = [of.notes[linear]["damping"] for of in (sure, hoped)]
        assert found == [damping and pytest.approx(damping)] * 2


@pytest.mark.parametrize("before", [True, False])
def test_doubts_that_came_of_a_factor_that_is_none_are_dropped(
    before: bool, model: Path, job_of: JobOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(model, "gptq_w4a16", GROUPS)
    doubt = Doubt(torch.tensor([math.nan]), lambda: RunError("its inputs hold NaN"))
    calls: list[int] = []

    def fails_once(gram: Tensor, **keys: Any) -> GramFactor | None:
        calls.append(len(gram))
        if len(calls) > 1:
            return factorize(gram, **keys)
        if before:
            job.doubts.put_back([doubt])
        keys["holds"](torch.tensor(False))
        if not before:
            job.doubts.put_back([doubt])
        return factorize(gram, **keys | {"holds": bool})

    monkeypatch.setattr(feedback, "factorize", fails_once)
    fed_back = fed_back_of(job)
    if before:
        with pytest.raises(RunError, match="its inputs hold NaN"):
            asked_once(job, fed_back, hopes=True)
    else:
        asked_once(job, fed_back, hopes=True)
        assert len(calls) == 2 * len(job.plan.architecture.groups) and not job.doubts.take()


@pytest.mark.parametrize("kept", [True, False])
def test_hope_keeps_what_is_doubted(kept: bool, model: Path, job_of: JobOf) -> None:
    job = job_of(model, "gptq_w4a16", GROUPS)
    fed_back = fed_back_of(job)
    doubt = Doubt(torch.ones(1), lambda: RunError("no number"))
    job.doubts.put_back([doubt])
    asked_once(job, fed_back, hopes=kept)
    # settled before where it is not hoped
    assert job.doubts.take() == ((doubt,) if kept else ())


@pytest.mark.parametrize("recipe", ["fp8/gptq_fp8", "w8a8_gptq", "fp8_static"])
def test_schemes_that_round_activations(recipe: str, model: Path, job_of: JobOf) -> None:
    special = {"actorder": True, "static_groups": True}
    overrides = [f"quant.special={special}"]
    names = {
        "fp8/gptq_fp8": ("fp8/gptq_fp8", []),
        "w8a8_gptq": ("awq_w8a8", ["quant.method=GPTQ", *overrides]),
        "fp8_static": ("fp8/awq_fp8_static", ["quant.method=GPTQ", *overrides]),
    }
    name, more = names[recipe]
    job = job_of(model, name, *more)
    rounded = rounded_block(job, origin_of(job), 0)
    assert set(rounded.codes) == set(job.plan.architecture.linears)
    for group in job.plan.architecture.groups:
        scales = {float(rounded.codes[n].scale.flatten()[0]) for n in group.linears}
        if recipe == "fp8_static":
            assert len(scales) == 1
    statistics = block_statistics(job, origin_of(job).stream, 0)  # type: ignore[arg-type]
    weight = job.read_block(0)["mlp.up_proj.weight"].float()
    gram = statistics["mlp_input"].gram_mean()
    lost = restored(job, rounded, "mlp.up_proj") - weight
    share = (lost @ gram * lost).sum() / (weight @ gram * weight).sum()
    assert share < 0.002


@pytest.mark.parametrize("sequential", ["true", "false"])
def test_errors_of_what_was_rounded_before_are_made_up_for(
    sequential: str, model: Path, job_of: JobOf
) -> None:
    keys = [f"quant.special.true_sequential={sequential}", "quant.special.percdamp=0.001"]
    jobs = [
        job_of(model, "gptq_w4a16", GROUPS, *keys, f"quant.special.make_up={share}")
        for share in (0, 1)
    ]
    losses, keys_found = [], []
    for job in jobs:
        # the second block is fed what the first one gives, rounded and not
        first = origin_of(job)
        floats = first.stream
        assert first.stream is not None and floats is not None
        makes = job.steps[-1].quant.special.make_up > 0  # type: ignore[union-attr]
        first = replace(first, floats=floats if makes else None)
        make_entry(quantize, job, first, block=0)
        packed = make_entry(pack, job, first, block=0)
        rounded = first.stream.after(
            make_entry(advance, job, first.stream, packed.key, block=0).key, packed.key
        )
        floats = floats.after(make_entry(advance, job, floats, None, block=0).key, None)
        origin = replace(first, stream=rounded, floats=floats if makes else None)
        keys_found.append(quantize.key(job, origin, block=1))
        entry = make_entry(quantize, job, origin, block=1)
        packed = make_entry(pack, job, origin, block=1)
        given = pass_block(job, rounded, hidden_states(job, rounded), packed.key)
        wanted = pass_block(job, floats, hidden_states(job, floats), None)
        losses.append(float((given.float() - wanted.float()).square().sum()))
        assert entry.value["linears"]["mlp.up_proj"]["damping"] == pytest.approx(0.001)
    assert losses[1] < 0.97 * losses[0]
    assert keys_found[0] != keys_found[1]
