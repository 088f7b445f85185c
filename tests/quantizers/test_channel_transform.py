"""Channel transforms: statistics as those of inputs that were really transformed, exact folds."""

import pytest
import torch
from transformers.models.llama.modeling_llama import repeat_kv

from quantizers.channel_transform import (
    ChannelTransform,
    absorbed_shift,
    expand_to_heads,
    fold_into_bias,
    fold_into_linear,
    fold_into_norm,
    nearest_power_of_two,
    norm_scale,
    scale_columns,
    share_between_heads,
    transformed_absmax,
    transformed_gram,
    transformed_gram_blocks,
    transformed_sample,
)
from tests.quantizers.search_cases import inputs, statistics_of

BF16, FP16 = torch.bfloat16, torch.float16
WIDE = torch.logspace(-2, 2, 64)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def transform_of(columns, shifted, device="cpu"):
    scale = torch.exp(draw(columns)).to(device)
    return ChannelTransform(scale, 3 * draw(columns, seed=1).to(device) if shifted else None)


@pytest.mark.parametrize("shifted", [False, True])
def test_statistics_of_transformed_inputs(device, shifted):
    x = inputs(300, 24).to(device)
    transform, statistics = transform_of(24, shifted, device), statistics_of(x, kept=40, windows=5)
    moved = (x.double() - (transform.shift if shifted else 0)) / transform.scale
    gram = transformed_gram(statistics, transform)
    wanted = moved.T @ moved / 300
    torch.testing.assert_close(gram.double(), wanted, rtol=0, atol=1e-5 * float(wanted.max()))
    size = wanted.diagonal().sqrt()
    relative = (gram.double() - wanted).abs() / torch.outer(size, size)
    assert float(relative.max()) < 1e-4, "small channels are right beside large ones"
    blocks = transformed_gram_blocks(statistics, transform, 8)
    assert torch.equal(blocks, torch.stack([gram[i : i + 8, i : i + 8] for i in (0, 8, 16)]))

    sampled = transformed_sample(statistics, transform).double()
    nearest = (sampled[:, None, :] - moved[None]).abs().amax(-1).amin(1)
    assert len(sampled) == 40
    assert float(nearest.max()) < 1e-4

    absmax = transformed_absmax(statistics, transform)
    windows = torch.stack([part.abs().amax(0) for part in moved.tensor_split(5)])
    torch.testing.assert_close(absmax.double(), windows, rtol=1e-5, atol=1e-5)


def test_inputs_all_below_zero_are_no_larger_than_they_are():
    x = -1 - inputs(20, 4).abs()
    absmax = transformed_absmax(statistics_of(x, windows=1), ChannelTransform(torch.ones(4)))
    assert torch.equal(absmax[0], x.abs().amax(0))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32])
def test_a_folded_norm_loses_nothing(device, dtype, offset):
    weight = (1 + 0.3 * draw(64) - offset).to(device, dtype)
    wanted = WIDE.to(device) if offset == 0 else torch.logspace(-2, 1.5, 64, device=device)
    scale = norm_scale(wanted, weight, dtype, offset)
    folded = fold_into_norm(weight, ChannelTransform(scale), dtype, offset)
    assert folded.dtype == dtype
    assert scale.dtype == torch.float32
    restored = (folded.double() + offset) * scale.double()
    torch.testing.assert_close(restored, weight.double() + offset, rtol=2e-7, atol=0)
    # and it is about what was asked: to the bits that the folded weight has
    step = torch.finfo(dtype).eps * (1 if offset == 0 else float(wanted.max()) * 2)
    torch.testing.assert_close(scale, wanted, rtol=step + 1e-6, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_what_a_linear_behind_a_folded_norm_computes_stays(offset):
    x, weight = draw(50, 64), (1 + 0.3 * draw(64, seed=1) - offset).to(BF16)
    linear = draw(16, 64, seed=2)
    transform = ChannelTransform(norm_scale(WIDE, weight, BF16, offset))
    folded = fold_into_norm(weight, transform, BF16, offset).double() + offset
    before = (x.double() * (weight.double() + offset)) @ linear.double().T
    after = (x.double() * folded) @ scale_columns(linear, transform).double().T
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6 * float(before.abs().max()))


@pytest.mark.parametrize(
    "dtype, offset, weight, wanted",
    [
        (BF16, 0.0, 0.0, 3.0),
        (BF16, 1.0, -1.0, 3.0),
        # what is left of 1 + weight is less than half a step of bf16 below one
        (BF16, 1.0, -0.98, 100.0),
        (BF16, 1.0, 0.5, 5000.0),
        # larger than fp16's largest number, smaller than its smallest
        (FP16, 0.0, 2.0, 1e-5),
        (FP16, 0.0, 1e-3, 1e6),
    ],
)
def test_a_channel_that_a_norm_cannot_hold_keeps_its_function(dtype, offset, weight, wanted):
    stored = torch.tensor([weight]).to(dtype)
    scale = norm_scale(torch.tensor([wanted]), stored, dtype, offset)
    assert bool(scale.isfinite().all()) and float(scale) > 0
    folded = fold_into_norm(stored, ChannelTransform(scale), dtype, offset)
    factor = float(stored) + offset
    assert (float(folded) + offset) * float(scale) == pytest.approx(factor, rel=1e-6)


def test_a_linear_that_feeds_another(device):
    x = draw(30, 8).to(device)
    first, bias = draw(6, 8, seed=1).to(device), draw(6, seed=2).to(device)
    second, its_bias = draw(5, 6, seed=3).to(device), draw(5, seed=4).to(device)
    transform = transform_of(6, True, device)
    before = (x @ first.T + bias) @ second.T + its_bias
    hidden = x @ fold_into_linear(first, transform).T + fold_into_bias(bias, transform)
    after = hidden @ scale_columns(second, transform).T
    after = after + its_bias + absorbed_shift(second, transform)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    unshifted = ChannelTransform(transform.scale)
    torch.testing.assert_close(fold_into_bias(bias, unshifted), bias / transform.scale)


def test_without_a_shift_nothing_is_absorbed():
    with pytest.raises(ValueError, match="no shift"):
        absorbed_shift(torch.ones(2, 3), ChannelTransform(torch.ones(3)))


def test_arguments_stay_as_they_were():
    weight, transform = draw(6, 8).bfloat16(), transform_of(8, True)
    copies = weight.clone(), transform.scale.clone()
    scale_columns(weight, transform)
    fold_into_linear(weight.t(), transform)
    absorbed_shift(weight, transform)
    assert torch.equal(weight, copies[0])
    assert torch.equal(transform.scale, copies[1])


@pytest.mark.parametrize("kv_heads, repeats, head", [(2, 3, 4), (1, 4, 8), (4, 1, 2), (3, 2, 1)])
def test_sharing_is_that_of_transformers(kv_heads, repeats, head):
    shared = draw(kv_heads * head)
    states = shared.reshape(1, kv_heads, 1, head)
    # (batch, heads, tokens, head) as the output projection's channels lie
    theirs = repeat_kv(states, repeats).transpose(1, 2).reshape(-1)
    assert torch.equal(expand_to_heads(shared, len(theirs), head), theirs)

    wanted = draw(kv_heads * repeats * head, seed=1)
    ways = {"mean": lambda v: sum(v) / len(v), "max": max, "min": min}
    for how, way in ways.items():
        for number, value in enumerate(share_between_heads(wanted, len(shared), head, how)):
            # a channel's readers are where repeat_kv puts its number
            numbers = torch.arange(len(shared)).reshape(1, kv_heads, 1, head)
            readers = repeat_kv(numbers, repeats).transpose(1, 2).reshape(-1) == number
            assert float(value) == pytest.approx(way(wanted[readers].tolist()), rel=1e-5)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="heads of 4"):
        share_between_heads(torch.ones(16), 6, 4, "max")
    with pytest.raises(ValueError, match="16 channels"):
        share_between_heads(torch.ones(16), 12, 4, "max")
    with pytest.raises(ValueError, match="median"):
        share_between_heads(torch.ones(16), 8, 4, "median")


def test_powers_of_two_divide_exactly():
    scale = torch.exp(2 * draw(200))
    found = nearest_power_of_two(scale)
    exponent = torch.log2(found)
    assert torch.equal(exponent, exponent.round())
    assert float((found / scale).log2().abs().max()) <= 0.5 + 1e-6
    weight = draw(7, 200, seed=1).bfloat16()
    divided = fold_into_linear(weight.t(), ChannelTransform(found)).bfloat16()
    assert torch.equal(divided.float() * found[:, None], weight.t().float())
