"""Rounding against literal loops over single entries, and against compressed-tensors."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as ct_dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize

from quantizers.number_formats import E4M3
from quantizers.rounding import (
    QuantizedWeight,
    dequantize,
    expand_scale,
    quantize_dequantize_weight,
    quantize_weight,
    round_group,
    round_to_nearest,
)
from quantizers.scales import weight_scales
from quantizers.schemes import Granularity
from tests.quantizers.rounding_cases import (
    CASES,
    DTYPES,
    IDS,
    INT4,
    INT8,
    codes_by_hand,
    matrix,
    place,
    scales_by_hand,
    scheme,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("how", "shape"), CASES, ids=IDS)
def test_equal_to_a_loop_over_entries(device, dtype, how, shape):
    weight = matrix(*shape, dtype=dtype, device=device)
    before = weight.clone()
    result = round_to_nearest(weight, how)
    scale, zero = scales_by_hand(weight.cpu(), how)
    assert result.scale.dtype == how.scale_dtype
    assert result.codes.dtype == how.number_format.code_dtype
    assert result.codes.device == result.scale.device == weight.device
    assert torch.equal(result.scale.cpu(), scale)
    if zero is None:
        assert result.zero_point is None
    else:
        assert result.zero_point.dtype == torch.int8
        assert torch.equal(result.zero_point.cpu(), zero)
    codes, near_tie = codes_by_hand(weight.cpu(), scale, zero, how)
    differs = result.codes.cpu().float() != codes
    assert not (differs & ~near_tie).any()
    assert near_tie.float().mean() < 0.1
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("how", "shape"), CASES, ids=IDS)
def test_dequantize_equals_a_loop_over_entries(device, dtype, how, shape):
    quantized = round_to_nearest(matrix(*shape, device=device), how)
    restored = dequantize(quantized, how, dtype)
    expected = torch.empty(shape, dtype=torch.float64)
    for row in range(shape[0]):
        for column in range(shape[1]):
            index = place(how, row, column)
            code = quantized.codes[row, column].double().item()
            zero = 0 if how.symmetric else quantized.zero_point[index].item()
            expected[row, column] = (code - zero) * quantized.scale[index].double().item()
    assert restored.dtype == dtype
    assert torch.equal(restored.cpu(), expected.float().to(dtype))


@pytest.mark.parametrize(("how", "shape"), CASES, ids=IDS)
def test_the_error_is_at_most_half_a_step(device, how, shape):
    weight = matrix(*shape, seed=3, device=device)
    quantized = round_to_nearest(weight, how)
    error = (dequantize(quantized, how) - weight).abs()
    scale = expand_scale(quantized.scale, how, *shape).float()
    if how.number_format.is_float:
        relative = {"e4m3": 2**-4, "e5m2": 2**-3}[how.number_format.name]
        assert (error <= 1.001 * torch.maximum(relative * weight.abs(), scale * 2**-9)).all()
    else:
        # The largest positive entry of a symmetric group lies half a code beyond the range,
        # a rounded zero point or scale adds up to half a code and the scale's own rounding.
        reach = 2**how.number_format.bits * torch.finfo(how.scale_dtype).eps
        assert (error <= (0.5001 + (0.5 if not how.symmetric else 0) + reach) * scale).all()


def ct_arguments(how):
    return QuantizationArgs(
        num_bits=how.number_format.bits,
        type="float" if how.number_format.is_float else "int",
        symmetric=how.symmetric,
        strategy=str(how.granularity),
        group_size=how.group_size,
        block_structure=list(how.block_shape) if how.block_shape else None,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("how", "shape"),
    [
        (scheme(INT4, Granularity.GROUP, size=32), (48, 96)),
        (scheme(INT4, Granularity.GROUP, size=32, symmetric=False), (48, 96)),
        (scheme(INT8, Granularity.GROUP, size=32), (48, 96)),
        (scheme(INT8, Granularity.CHANNEL), (33, 47)),
        (scheme(INT4, Granularity.CHANNEL, symmetric=False), (33, 47)),
        (scheme(E4M3, Granularity.CHANNEL), (33, 47)),
        (scheme(E4M3, Granularity.TENSOR), (33, 47)),
        (scheme(E4M3, Granularity.BLOCK, size=(128, 128)), (256, 128)),
        (scheme(E4M3, Granularity.BLOCK, size=(128, 128)), (130, 200)),
    ],
)
def test_equal_to_compressed_tensors(dtype, how, shape):
    weight = matrix(*shape, dtype=dtype)
    quantized, arguments = round_to_nearest(weight, how), ct_arguments(how)
    zero = quantized.zero_point
    restored = ct_dequantize(quantized.codes, quantized.scale, zero, arguments)
    assert torch.equal(dequantize(quantized, how), restored)
    theirs = ct_quantize(weight.float(), quantized.scale, zero, arguments)
    ours = quantized.codes.float()
    if how.symmetric:
        assert torch.equal(ours, theirs.to(how.number_format.code_dtype).float())
    else:
        # They add the zero point before rounding, which moves ties only.
        step = (ours - theirs).abs()
        assert step.max() <= 1
        assert (step > 0).float().mean() < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_half_precision_scales_dequantize_as_compressed_tensors_does(dtype, symmetric):
    how = scheme(INT4, Granularity.GROUP, size=16, symmetric=symmetric, dtype=dtype)
    quantized = round_to_nearest(matrix(32, 64), how)
    theirs = ct_dequantize(
        quantized.codes, quantized.scale, quantized.zero_point, ct_arguments(how)
    )
    assert theirs.dtype == dtype
    assert torch.equal(dequantize(quantized, how, dtype), theirs)


@pytest.mark.parametrize(("how", "shape"), CASES, ids=IDS)
def test_expand_scale(device, how, shape):
    scale, zero = weight_scales(matrix(*shape, device=device), how)
    for parameter in (scale,) if zero is None else (scale, zero):
        expanded = expand_scale(parameter, how, *shape)
        assert expanded.shape == shape
        assert expanded.dtype == parameter.dtype
        for row in range(shape[0]):
            for column in range(shape[1]):
                assert expanded[row, column] == parameter[place(how, row, column)]


@pytest.mark.parametrize(("how", "shape"), CASES, ids=IDS)
def test_clip_factors_shrink_the_extremes(device, how, shape):
    weight = matrix(*shape, device=device)
    scales = how.scale_shape(*shape)
    ones = torch.ones(scales, device=device)
    plain, clipped = (
        weight_scales(weight, how),
        weight_scales(weight, how, clip_low=ones, clip_high=ones),
    )
    assert torch.equal(plain[0], clipped[0])
    half = weight_scales(weight, how, clip_low=ones / 2, clip_high=ones / 2)
    assert torch.equal(half[0], weight_scales(weight / 2, how)[0])
    if not how.symmetric:
        assert torch.equal(plain[1], half[1])


def test_linears_of_one_scale_have_a_copy_each():
    how = scheme(INT8, Granularity.TENSOR, symmetric=False)
    weights = [matrix(4, 16), matrix(6, 16) * 3 + 1]
    whole = round_to_nearest(torch.cat(weights), how)
    first, second = round_group(weights, how, [None, None])
    assert torch.equal(torch.cat((first.codes, second.codes)), whole.codes)
    for name in ("scale", "zero_point"):
        one, other, shared = (getattr(found, name) for found in (first, second, whole))
        assert torch.equal(one, shared) and torch.equal(other, shared)
        assert one.data_ptr() != other.data_ptr()


def test_clip_factors_act_on_their_own_side_and_group():
    how = scheme(INT8, Granularity.GROUP, size=2, symmetric=False)
    weight = torch.tensor([[-1.0, 4.0, -2.0, 6.0]])
    low, high = torch.tensor([[0.5, 1.0]]), torch.tensor([[1.0, 0.5]])
    scale, zero = weight_scales(weight, how, clip_low=low, clip_high=high)
    assert scale.tolist() == torch.tensor([[4.5, 5.0]]).div(255).tolist()
    assert zero.tolist() == [[round(-128 + 0.5 * 255 / 4.5), round(-128 + 2 * 255 / 5)]]
    symmetric = scheme(INT8, Granularity.GROUP, size=2)
    scale, _ = weight_scales(weight, symmetric, clip_low=low, clip_high=high)
    assert scale.tolist() == torch.tensor([[4.0, 3.0]]).div(127).tolist()


def test_clip_factors_receive_gradients():
    how = scheme(INT4, Granularity.GROUP, size=8)
    low = torch.full((3, 2), 0.9, requires_grad=True)
    high = torch.full((3, 2), 0.8, requires_grad=True)
    scale, _ = weight_scales(matrix(3, 16), how, clip_low=low, clip_high=high)
    scale.sum().backward()
    # Each group's scale depends on its larger side alone.
    assert ((low.grad != 0) ^ (high.grad != 0)).all()


def test_parameters_are_accepted_without_gradients():
    weight = torch.nn.Parameter(matrix(4, 16))
    before = weight.detach().clone()
    quantized = round_to_nearest(weight, scheme(INT4, Granularity.GROUP, size=8))
    assert not quantized.scale.requires_grad
    assert torch.equal(weight, before)


@pytest.mark.parametrize("number", [INT4, E4M3])
def test_strided_weights(number):
    how = scheme(number, Granularity.GROUP, size=8)
    weight = matrix(16, 10).t()
    ours, reference = round_to_nearest(weight, how), round_to_nearest(weight.contiguous(), how)
    assert ours.codes.is_contiguous()
    assert torch.equal(ours.codes.float(), reference.codes.float())
    assert torch.equal(ours.scale, reference.scale)
    strided = QuantizedWeight(ours.codes.t().contiguous().t(), ours.scale, None)
    assert torch.equal(dequantize(strided, how), dequantize(ours, how))


@pytest.mark.parametrize(
    "how",
    [
        scheme(INT4, Granularity.GROUP, size=128, symmetric=False, dtype=torch.bfloat16),
        scheme(INT8, Granularity.CHANNEL),
        scheme(E4M3, Granularity.BLOCK, size=(128, 128)),
        scheme(E4M3, Granularity.TENSOR),
    ],
)
def test_many_slices_of_rows_equal_one(monkeypatch, device, how):
    weight = matrix(300, 384, dtype=torch.bfloat16, device=device)
    results = []
    for entries in (1 << 30, 7 * 384, 1):
        monkeypatch.setattr("quantizers.rounding._CPU_ENTRIES", entries)
        monkeypatch.setattr("quantizers.rounding._DEVICE_ENTRIES", entries)
        quantized = round_to_nearest(weight, how)
        results.append((quantized.codes.float(), dequantize(quantized, how)))
    for codes, restored in results[1:]:
        assert torch.equal(codes, results[0][0])
        assert torch.equal(restored, results[0][1])


def test_wrong_arguments_are_refused():
    how = scheme(INT4, Granularity.GROUP, size=8)
    weight = matrix(4, 16)
    scale, _ = weight_scales(weight, how)
    zero = torch.zeros(4, 2, dtype=torch.int8)
    asymmetric = scheme(INT4, Granularity.GROUP, size=8, symmetric=False)
    with pytest.raises(ValueError, match=r"8.*12"):
        weight_scales(matrix(4, 12), how)
    with pytest.raises(ValueError, match=r"\(16,\)"):
        weight_scales(weight[0], how)
    with pytest.raises(ValueError, match="int8"):
        weight_scales(weight.to(torch.int8), how)
    with pytest.raises(ValueError, match=r"clip_high.*\(4,\).*\(4, 2\)"):
        weight_scales(weight, how, clip_high=torch.ones(4))
    with pytest.raises(ValueError, match=r"\(4, 1\).*\(4, 2\)"):
        quantize_weight(weight, scale[:, :1], None, how)
    with pytest.raises(ValueError, match="round it before"):
        quantize_weight(weight, scale.double(), None, how)
    with pytest.raises(ValueError, match="no zero point"):
        quantize_weight(weight, scale, zero, how)
    with pytest.raises(ValueError, match="needs a zero point"):
        quantize_weight(weight, scale, None, asymmetric)
    with pytest.raises(ValueError, match="int32"):
        quantize_weight(weight, scale, zero.to(torch.int32), asymmetric)
    with pytest.raises(ValueError, match=r"\(4, 1\)"):
        dequantize(QuantizedWeight(zero.repeat(1, 8), scale[:, :1], None), how)
    with pytest.raises(ValueError, match=r"\(2,\)"):
        expand_scale(scale[0], how, 4, 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize(("how", "shape"), CASES, ids=IDS)
def test_searches_do_not_wait_for_the_device(how, shape):
    weight = matrix(*shape, device="cuda")
    ones = torch.ones(how.scale_shape(*shape), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        scale, zero = weight_scales(weight, how, clip_low=ones, clip_high=ones)
        quantized = quantize_weight(weight, scale, zero, how)
        dequantize(quantized, how)
        expand_scale(scale, how, *shape)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("how", "shape"), CASES, ids=IDS)
def test_without_codes_it_is_the_same_to_the_bit(device, how, shape):
    weight = matrix(*shape, device=device) * 1.3
    quantized, before = round_to_nearest(weight, how), weight.clone()
    found = quantize_dequantize_weight(weight, quantized.scale, quantized.zero_point, how)
    assert torch.equal(found, dequantize(quantized, how))
    assert torch.equal(weight, before)
