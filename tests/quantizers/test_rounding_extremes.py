"""Zero, tiny, huge and non-finite weights."""

import pytest
import torch

from quantizers.errors import NonFiniteError
from quantizers.number_formats import E4M3
from quantizers.rounding import dequantize, quantize_weight, round_to_nearest
from quantizers.scales import weight_scales
from quantizers.schemes import Granularity
from tests.quantizers.rounding_cases import (
    CASES,
    DTYPES,
    IDS,
    INT4,
    INT8,
    matrix,
    place,
    scheme,
)


@pytest.mark.parametrize(("how", "shape"), CASES, ids=IDS)
def test_zero_weights(device, how, shape):
    quantized = round_to_nearest(torch.zeros(shape, device=device), how)
    assert (quantized.scale == 1).all()
    assert (quantized.codes.float() == 0).all()
    assert quantized.zero_point is None or (quantized.zero_point == 0).all()
    assert (dequantize(quantized, how) == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_zero_group_among_others(symmetric):
    how = scheme(INT4, Granularity.GROUP, size=8, symmetric=symmetric)
    weight = matrix(4, 24)
    weight[2, 8:16] = 0
    quantized = round_to_nearest(weight, how)
    assert quantized.scale[2, 1] == 1
    assert (quantized.codes[2, 8:16] == 0).all()
    others = torch.ones(4, 3, dtype=torch.bool)
    others[2, 1] = False
    assert (quantized.scale[others] != 1).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_asymmetric_ranges_include_zero(sign):
    how = scheme(INT4, Granularity.CHANNEL, symmetric=False)
    weight = sign * torch.linspace(10, 11, 16).reshape(1, 16)
    quantized = round_to_nearest(weight, how)
    assert quantized.scale.item() == pytest.approx(11 / 15)
    assert quantized.zero_point.item() == (-8 if sign > 0 else 7)
    assert quantized.codes.abs().min() >= 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-36, 1e-9, 1e-6])
@pytest.mark.parametrize("symmetric", [True, False])
def test_small_scales_are_raised_to_the_smallest_normal(device, dtype, size, symmetric):
    how = scheme(INT8, Granularity.CHANNEL, symmetric=symmetric, dtype=dtype)
    weight = torch.tensor([[size, -size, 0.0], [1.0, -1.0, 0.0]], device=device)
    quantized = round_to_nearest(weight, how)
    tiny = torch.finfo(dtype).smallest_normal
    ideal = size / 127
    assert quantized.scale[0].item() == pytest.approx(max(ideal, tiny), rel=0.01)
    assert quantized.scale[0].item() >= tiny
    restored = dequantize(quantized, how)
    assert restored.isfinite().all()
    assert (restored - weight).abs()[0].max().item() <= 1.01 * max(ideal, tiny)


def test_large_scales_are_clamped_to_the_largest(device):
    how = scheme(INT4, Granularity.CHANNEL, dtype=torch.float16)
    weight = torch.tensor([[1e6, -2e5, 0.0]], device=device)
    quantized = round_to_nearest(weight, how)
    assert quantized.scale.item() == 65504.0
    assert quantized.codes.tolist() == [[7, -3, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("how", "shape"), CASES, ids=IDS)
def test_non_finite_weights_are_refused(device, dtype, value, how, shape):
    weight = matrix(*shape, dtype=dtype, device=device)
    row, column = shape[0] - 1, shape[1] - 1
    weight[row, column] = value
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        round_to_nearest(weight, how)
    scale, _ = weight_scales(weight, how)
    bad = scale.isnan()
    assert bad[place(how, row, column)]
    assert bad.sum() == 1


def test_ranges_beyond_float32_are_refused():
    how = scheme(INT8, Granularity.CHANNEL, symmetric=False)
    with pytest.raises(NonFiniteError):
        round_to_nearest(torch.tensor([[3e38, -3e38]]), how)


def test_saturation_under_given_scales(device):
    weight = torch.tensor([[1000.0, -1000.0, 3.0]], device=device)
    one = torch.ones(1, 1, device=device)
    how = scheme(INT4, Granularity.CHANNEL)
    assert quantize_weight(weight, one, None, how).codes.tolist() == [[7, -8, 3]]
    how = scheme(INT4, Granularity.CHANNEL, symmetric=False)
    zero = torch.full((1, 1), 3, dtype=torch.int8, device=device)
    assert quantize_weight(weight, one, zero, how).codes.tolist() == [[7, -8, 6]]
    how = scheme(E4M3, Granularity.CHANNEL)
    codes = quantize_weight(weight, one, None, how).codes
    assert codes.float().tolist() == [[448.0, -448.0, 3.0]]


def test_symmetric_convention_uses_half_codes(device):
    how = scheme(INT4, Granularity.CHANNEL)
    quantized = round_to_nearest(torch.tensor([[7.5, -7.5, 0.4, 1.6]], device=device), how)
    assert quantized.scale.item() == 1.0
    assert quantized.codes.tolist() == [[7, -8, 0, 2]]
