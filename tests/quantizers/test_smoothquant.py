import pytest
import torch

from quantizers.smoothquant import smoothing_scale
from tests.quantizers.search_cases import inputs, statistics_of, weights


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equation_4_channel_by_channel(device, dtype, alpha):
    x, group = inputs(200, 16), [w.to(dtype) for w in weights((7, 5), 16)]
    absmax = statistics_of(x.to(device)).absmax
    scale = smoothing_scale(absmax, [w.to(device) for w in group], alpha)
    wanted = []
    for channel in range(16):
        largest = max(abs(value) for value in x[:, channel].tolist())
        weight = max(abs(value) for w in group for value in w[:, channel].tolist())
        wanted.append(largest**alpha / weight ** (1 - alpha))
    assert scale.dtype == torch.float32
    assert scale.tolist() == pytest.approx(wanted, rel=1e-5)


def test_half_is_the_default_and_makes_both_sides_equal():
    x, group = inputs(200, 16), weights((7, 5), 16)
    scale = smoothing_scale(x.abs().amax(0), group)
    smoothed, scaled = x / scale, torch.cat(group) * scale
    torch.testing.assert_close(smoothed.abs().amax(0), scaled.abs().amax(0))


def test_all_batches_and_all_linears_count():
    x, group = inputs(200, 16), weights((7, 5), 16)
    x[-1, 3], group[1][4, 5] = 1e4, 100.0
    scale = smoothing_scale(statistics_of(x).absmax, group)
    less = smoothing_scale(statistics_of(x[:-1]).absmax, group[:1])
    changed = (scale != less).nonzero().flatten().tolist()
    assert {3, 5} <= set(changed)
    assert scale[3] > 10 * less[3]
    assert scale[5] < less[5] / 10


def test_channels_without_inputs_or_weights_are_left_alone():
    absmax, weight = torch.tensor([0.0, 4.0, 0.0, 4.0]), torch.tensor([[1.0, 0.0, 0.0, 0.25]])
    assert smoothing_scale(absmax, [weight]).tolist() == [1.0, 1.0, 1.0, 4.0]


def test_factors_are_no_smaller_than_the_least():
    tiny, huge = torch.tensor([1e-30, 1e-7]), torch.tensor([[1e30, 1e4]])
    scale = smoothing_scale(tiny, [huge], 0.5)
    assert scale.tolist() == pytest.approx([1e-5, 3.1623e-5], rel=1e-4)
    assert smoothing_scale(torch.tensor([1e-30]), [torch.ones(1, 1)], 1.0).item() > 0


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        smoothing_scale(torch.ones(2), [torch.ones(1, 2)], alpha)
