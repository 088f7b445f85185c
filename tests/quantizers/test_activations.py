import math

import numpy as np
import pytest
import torch

from quantizers.activations import quantize_dequantize_activation
from quantizers.number_formats import E4M3, E5M2, int_format
from quantizers.schemes import ActivationScheme, Granularity

INT8_TOKEN = ActivationScheme(int_format(8), True, Granularity.TOKEN, dynamic=True)
E4M3_TOKEN = ActivationScheme(E4M3, True, Granularity.TOKEN, dynamic=True)
E5M2_TOKEN = ActivationScheme(E5M2, True, Granularity.TOKEN, dynamic=True)
E4M3_TENSOR = ActivationScheme(E4M3, True, Granularity.TENSOR, dynamic=True)
E4M3_STATIC = ActivationScheme(E4M3, True, Granularity.TENSOR, dynamic=False)
INT8_STATIC = ActivationScheme(int_format(8), True, Granularity.TENSOR, dynamic=False)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(*shape, seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator)).to(device, dtype)


def float_code(value, mantissa_bits, smallest_exponent, largest):
    """Nearest number with that many mantissa bits, ties to even, saturating."""
    value = max(-largest, min(largest, value))
    if value == 0.0:
        return 0.0
    exponent = max(math.frexp(value)[1] - 1, smallest_exponent)
    step = 2.0 ** (exponent - mantissa_bits)
    return round(value / step) * step  # round() takes ties to even


def row_by_hand(row, name, scale=None):
    """One token as the kernels compute it, value by value, in float32."""
    one = np.float32(1)
    values = [np.float32(value) for value in row]
    absmax = max(abs(value) for value in values)
    largest = np.float32({"int8": 127, "e4m3": 448, "e5m2": 57344}[name])
    if name == "int8":
        absmax = max(absmax, np.float32(1e-10))
        step = absmax / largest if scale is None else np.float32(scale)
        factor = largest / absmax if scale is None else one / step
        codes = []
        for value in values:
            exact = float(value * factor)
            code = math.copysign(math.floor(abs(exact) + 0.5), exact)  # ties away from zero
            codes.append(np.float32(max(-128, min(127, code))))
    else:
        step = absmax / largest if scale is None else np.float32(scale)
        if step == 0:
            return [0.0] * len(values)
        layout = {"e4m3": (3, -6, 448.0), "e5m2": (2, -14, 57344.0)}[name]
        codes = [np.float32(float_code(float(v * (one / step)), *layout)) for v in values]
    return [float(code * step) for code in codes]


def by_hand(x, name, scale=None):
    rows = x.float().cpu().reshape(-1, x.shape[-1]).tolist()
    result = torch.tensor([row_by_hand(row, name, scale) for row in rows])
    return result.reshape(x.shape).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", [INT8_TOKEN, E4M3_TOKEN, E5M2_TOKEN])
@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 16), (1, 1), (7,), (2, 2, 2, 5)])
def test_per_token_equals_a_loop_over_rows(device, dtype, scheme, shape):
    x = inputs(*shape, dtype=dtype, device=device)
    before = x.clone()
    result = quantize_dequantize_activation(x, scheme)
    assert result.dtype == dtype
    assert result.device == x.device
    assert torch.equal(result.cpu(), by_hand(x, scheme.number_format.name))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", [E4M3_STATIC, INT8_STATIC])
@pytest.mark.parametrize("scale", [0.02, 0.001, 1.0])
def test_static_equals_a_loop_and_saturates(device, dtype, scheme, scale):
    x = inputs(6, 40, dtype=dtype, device=device)
    tensor = torch.tensor([scale], device=device)
    result = quantize_dequantize_activation(x, scheme, scale=tensor)
    assert torch.equal(result.cpu(), by_hand(x, scheme.number_format.name, scale))
    limit = max(-scheme.number_format.qmin, scheme.number_format.qmax) * scale
    assert result.abs().max().item() <= limit * 1.01


def test_tensor_dynamic_uses_one_scale(device):
    x = inputs(3, 4, 8, device=device)
    flat = quantize_dequantize_activation(x.reshape(1, -1), E4M3_TOKEN).reshape(x.shape)
    assert torch.equal(quantize_dequantize_activation(x, E4M3_TENSOR), flat)


def test_int8_ties_go_away_from_zero(device):
    x = torch.tensor([[127.0, 0.5, -0.5, 1.5, -2.5, 0.49999997]], device=device)
    result = quantize_dequantize_activation(x, INT8_TOKEN)
    assert result.tolist() == [[127.0, 1.0, -1.0, 2.0, -3.0, 0.0]]


def test_e4m3_ties_go_to_even(device):
    # At scale 1, neighbours of 17 are 16 and 18, of 19 they are 18 and 20.
    x = torch.tensor([[448.0, 17.0, 19.0, -17.0]], device=device)
    assert quantize_dequantize_activation(x, E4M3_TOKEN).tolist() == [[448.0, 16.0, 20.0, -16.0]]


def test_every_e4m3_number_stays(device):
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    x = codes.float()
    x = x[x.isfinite()].reshape(1, -1)
    scale = torch.ones(1, device=device)
    assert torch.equal(quantize_dequantize_activation(x, E4M3_STATIC, scale=scale), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", [INT8_TOKEN, E4M3_TOKEN, E5M2_TOKEN, E4M3_TENSOR])
def test_zero_tokens_stay_zero(device, dtype, scheme):
    x = inputs(3, 16, dtype=dtype, device=device)
    x[1] = 0
    result = quantize_dequantize_activation(x, scheme)
    assert torch.equal(result[1], torch.zeros_like(result[1]))
    zeros = torch.zeros_like(x)
    assert torch.equal(quantize_dequantize_activation(zeros, scheme), zeros)


@pytest.mark.parametrize("scheme", [INT8_TOKEN, E4M3_TOKEN, E5M2_TOKEN])
@pytest.mark.parametrize("size", [1e-45, 1e-41, 1e-37, 1e-20, 1e30, 3e38])
def test_extreme_sizes_stay_finite(device, scheme, size):
    x = torch.tensor([[size, -size / 2, 0.0]], device=device)
    result = quantize_dequantize_activation(x, scheme)
    assert result.isfinite().all()
    assert (result - x).abs().max() <= x.abs().max()
    assert result[0, 2].item() == 0.0


@pytest.mark.parametrize("scheme", [INT8_TOKEN, E4M3_TOKEN])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_tokens_come_back_as_nan_and_leave_the_others(device, scheme, value):
    x = inputs(3, 8, device=device)
    clean = quantize_dequantize_activation(x, scheme)
    x[1, 4] = value
    result = quantize_dequantize_activation(x, scheme)
    assert result[1, 4].isnan()
    assert torch.equal(result[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("shape", [(0, 8), (2, 0), (0,)])
@pytest.mark.parametrize("scheme", [INT8_TOKEN, E4M3_TENSOR])
def test_nothing_in_nothing_out(shape, scheme):
    x = torch.empty(shape, dtype=torch.bfloat16)
    result = quantize_dequantize_activation(x, scheme)
    assert result.shape == x.shape
    assert result.dtype == x.dtype


def test_strided_inputs_and_gradients():
    x = inputs(12, 6).t().requires_grad_()
    result = quantize_dequantize_activation(x, INT8_TOKEN)
    assert not result.requires_grad
    assert torch.equal(result, quantize_dequantize_activation(x.detach().contiguous(), INT8_TOKEN))


def test_scales_must_suit_the_scheme():
    x = inputs(2, 4)
    with pytest.raises(ValueError, match="dynamic"):
        quantize_dequantize_activation(x, INT8_TOKEN, scale=torch.ones(1))
    with pytest.raises(ValueError, match="calibrated"):
        quantize_dequantize_activation(x, E4M3_STATIC)
    for scale in (torch.ones(()), torch.ones(2), torch.ones(1, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"shape \(1,\)"):
            quantize_dequantize_activation(x, E4M3_STATIC, scale=scale)
    with pytest.raises(ValueError, match="int64"):
        quantize_dequantize_activation(torch.ones(2, 2, dtype=torch.int64), INT8_TOKEN)


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_are_rounded_each_by_its_own_largest_value(dtype):
    scheme = ActivationScheme(E4M3, True, Granularity.GROUP, True, group_size=4)
    x = inputs(3, 8, dtype=dtype) * torch.tensor([1.0] * 4 + [1000.0] * 4).to(dtype)
    rounded = quantize_dequantize_activation(x, scheme)
    assert rounded.shape == x.shape
    assert rounded.dtype == x.dtype
    for row, whole in zip(x.float().tolist(), rounded, strict=True):
        by_hand = [*row_by_hand(row[:4], "e4m3"), *row_by_hand(row[4:], "e4m3")]
        assert torch.equal(torch.tensor(np.array(by_hand)).to(dtype), whole)


def test_group_sizes_must_divide_the_channels():
    scheme = ActivationScheme(E4M3, True, Granularity.GROUP, True, group_size=3)
    with pytest.raises(ValueError, match=r"3 does not divide 8"):
        quantize_dequantize_activation(inputs(2, 8), scheme)
