"""Learned clipping: values against plain rounding, gradients against differences, and descent."""

import pytest
import torch

from quantizers.errors import NonFiniteError
from quantizers.omniquant import Learnable, clip_of, fake_quantize, learn, starting_logits
from quantizers.rounding import dequantize, quantize_weight
from quantizers.scales import weight_scales
from tests.quantizers.search_cases import inputs, weight_scheme, weights

CASES = [
    ("int4", "group", True),
    ("int4", "group", False),
    ("int8", "channel", True),
    ("e4m3", "channel", True),
    ("e4m3", "tensor", True),
    ("int4", "block", True),
]


def scheme_of(case, dtype=torch.bfloat16):
    return weight_scheme(case[0], case[1], symmetric=case[2], dtype=dtype)


def factors(scheme, shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return 0.6 + 0.4 * torch.rand(scheme.scale_shape(*shape), generator=draw)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_are_those_of_rounding(device, case):
    scheme, weight = scheme_of(case), weights((40,), 64)[0].to(device)
    low, high = (factors(scheme, (40, 64), seed).to(device) for seed in (0, 1))
    scale, zero = weight_scales(weight, scheme, clip_low=low, clip_high=high)
    wanted = dequantize(quantize_weight(weight, scale, zero, scheme), scheme)
    assert torch.equal(fake_quantize(weight, scheme, low, high), wanted)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_factor_has_a_gradient(device, case):
    scheme, weight = scheme_of(case, torch.float32), weights((40,), 64)[0].to(device)
    low, high = (factors(scheme, (40, 64), s).to(device).requires_grad_() for s in (0, 1))
    (fake_quantize(weight, scheme, low, high) - weight).square().sum().backward()
    gradient = low.grad.abs() + high.grad.abs()
    assert gradient.isfinite().all() and (gradient > 0).all()


def test_what_is_clipped_moves_with_the_scale():
    # 7 and -8 times the scale: a factor 1 % larger moves the largest entry 1 % outwards
    scheme = weight_scheme("int4", "channel")
    weight = torch.tensor([[1.0, 0.5, 0.1, -0.3]])
    high = torch.tensor([[0.5]], requires_grad=True)
    found = fake_quantize(weight, scheme, torch.tensor([[0.5]]), high)
    (gradient,) = torch.autograd.grad(found[0, 0], high)
    assert found[0, 0].item() == pytest.approx(7 * 0.5 / 7.5)
    assert gradient.item() == pytest.approx(7 / 7.5)


def test_rounding_passes_gradients_to_the_weight():
    scheme = weight_scheme("int4", "channel")
    weight = torch.tensor([[1.0, 0.5, 0.1, -0.3]], requires_grad=True)
    ones = torch.ones(1, 1)
    # through its own value; the largest entry moves the scale of all
    (gradient,) = torch.autograd.grad(fake_quantize(weight, scheme, ones, ones)[0, 1], weight)
    assert gradient[0, 1].item() == 1.0
    assert gradient[0, 2].item() == gradient[0, 3].item() == 0.0


def test_a_group_whose_search_did_not_win_still_trains():
    logits = starting_logits(torch.tensor([1.0, 0.99, 0.9, 0.5]))
    assert clip_of(logits)[0].item() == pytest.approx(0.982, abs=1e-3)
    assert torch.allclose(clip_of(logits)[2:], torch.tensor([0.9, 0.5]))
    clip_of(logits).sum().backward()
    assert (logits.grad > 0.01).all()


def toy(seed=0):
    """A linear's weight, its inputs in batches, and logits that start from nothing."""
    scheme = weight_scheme("int4", "group", dtype=torch.bfloat16)
    x, weight = inputs(256, 64, seed), weights((32,), 64, seed)[0]
    low, high = (starting_logits(torch.ones(scheme.scale_shape(32, 64))) for _ in range(2))

    def loss(batch):
        rows = x[64 * batch : 64 * batch + 64]
        restored = fake_quantize(weight, scheme, clip_of(low), clip_of(high))
        return (rows @ (restored - weight).T).square().mean()

    return low, high, loss


def test_the_loss_falls_and_is_reported_per_epoch():
    low, high, loss = toy()
    before = sum(float(loss(batch).detach()) for batch in range(4)) / 4
    losses = learn([Learnable([low, high], 0.01)], loss, 4, epochs=10)
    after = sum(float(loss(batch).detach()) for batch in range(4)) / 4
    assert len(losses) == 11
    assert losses[0] == pytest.approx(before)
    assert after == pytest.approx(min(losses))
    assert after < 0.95 * before


def test_what_was_best_is_kept():
    parameter = torch.tensor([1.0], requires_grad=True)

    def loss(batch):
        # steps lead over the least and up again
        return (parameter - 0.9).square().sum()

    losses = learn([Learnable([parameter], 0.09)], loss, 1, epochs=4)
    assert losses[0] == pytest.approx(0.01)
    assert losses[1] < 0.001 < losses[3]
    assert (parameter.detach() - 0.9).square().item() == pytest.approx(min(losses))


def test_a_good_start_stays():
    parameter = torch.tensor([0.5], requires_grad=True)
    # the slope points away from what is least, as rounding's may
    losses = learn([Learnable([parameter], 0.1)], lambda _: _valley(parameter), 1, epochs=3)
    assert min(losses) == losses[0]
    assert parameter.item() == 0.5


def _valley(parameter):
    value = parameter.detach()
    return (value - 0.5).abs().sum() + (parameter - value).sum()


def test_learning_gives_the_same_bits_each_time():
    runs = []
    for _ in range(2):
        low, high, loss = toy()
        learn([Learnable([low], 0.01), Learnable([high], 0.02)], loss, 4, epochs=3)
        runs.append((low.detach().clone(), high.detach().clone()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_each_part_learns_at_its_own_rate():
    low, high, loss = toy()
    start = low.detach().clone(), high.detach().clone()
    learn([Learnable([low], 0.001), Learnable([high], 0.1)], loss, 1, epochs=1)
    moved = [(now.detach() - was).abs().max() for now, was in zip((low, high), start, strict=True)]
    assert moved[0] < 0.002 < 0.05 < moved[1]


def test_a_loss_that_is_no_number_ends_it():
    parameter = torch.zeros(1, requires_grad=True)

    def loss(batch):
        return (parameter / (0.0 if batch else 1.0)).sum()

    with pytest.raises(NonFiniteError, match="nan in epoch 1"):
        learn([Learnable([parameter], 0.0)], loss, 2, epochs=2)
