"""The kernels that round against plain torch: the same bits. They need a GPU and its compiler."""

import pytest
import torch

from quantizers import losses, packing, rounding, rounding_losses, scales
from quantizers.number_formats import E4M3, E5M2, int_format
from quantizers.packing import pack_codes, unpack_codes
from quantizers.rounding import dequantize, quantize_weight
from quantizers.rounding_losses import rounding_energies
from quantizers.scales import scales_of, weight_extremes, weight_scales
from quantizers.schemes import Granularity, WeightScheme

pytest.importorskip("triton")
DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

FORMATS = [
    (int_format(4), True),
    (int_format(4), False),
    (int_format(8), True),
    (int_format(8), False),
    (E4M3, True),
    (E5M2, True),
]
SHARED = [
    (Granularity.GROUP, {"group_size": 24}, (37, 96)),
    (Granularity.GROUP, {"group_size": 32}, (5, 2080)),
    (Granularity.CHANNEL, {}, (33, 5000)),
    (Granularity.TENSOR, {}, (7, 130)),
    (Granularity.BLOCK, {"block_shape": (16, 32)}, (37, 100)),
]


def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    draw = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=draw).to(dtype).to(DEVICE)


def factor_like(weight: torch.Tensor, scheme: WeightScheme, seed: int) -> torch.Tensor:
    """Factors on ranges, of the scales' shape."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.rand(scheme.scale_shape(*weight.shape), generator=draw) * 0.5 + 0.5).to(DEVICE)


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (losses, packing, rounding, rounding_losses, scales):
        monkeypatch.setattr(module, "compiles_kernels", lambda *_: False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("granularity", "sizes", "shape"), SHARED)
@pytest.mark.parametrize(("number", "symmetric"), FORMATS)
def test_bits(number, symmetric, granularity, sizes, shape, dtype, monkeypatch):
    stored = torch.float32 if number.is_float else torch.bfloat16
    scheme = WeightScheme(number, symmetric, granularity, scale_dtype=stored, **sizes)
    weight = drawn(*shape, dtype=dtype)
    gram = drawn(shape[1], shape[1], dtype=torch.float32)
    gram, inverse = gram @ gram.T, drawn(shape[1], dtype=torch.float32).abs() + 0.5
    rows = slice(2, shape[0] - 1)
    low, high = (factor_like(weight, scheme, seed) for seed in (1, 2))
    scale, zero = weight_scales(weight, scheme, clip_low=low, clip_high=high)
    found = quantize_weight(weight, scale, zero, scheme)
    back = [dequantize(found, scheme, kind) for kind in (torch.float32, torch.bfloat16)]
    lost = rounding_energies(weight, found, scheme, rows, gram, inverse)

    without_kernels(monkeypatch)
    plain_scale, plain_zero = weight_scales(weight, scheme, clip_low=low, clip_high=high)
    assert torch.equal(scale, plain_scale)
    assert zero is None or torch.equal(zero, plain_zero)
    plain = quantize_weight(weight, scale, zero, scheme)
    assert found.codes.dtype == plain.codes.dtype
    assert torch.equal(found.codes.view(torch.uint8), plain.codes.view(torch.uint8))
    for restored in back:
        assert torch.equal(restored, dequantize(plain, scheme, restored.dtype))
    for energies, wanted in zip(
        lost, rounding_energies(weight, plain, scheme, rows, gram, inverse), strict=True
    ):
        torch.testing.assert_close(energies, wanted, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("number", "symmetric"), FORMATS)
def test_scales_of_several_ranges(number, symmetric, dtype, monkeypatch):
    scheme = WeightScheme(number, symmetric, Granularity.GROUP, group_size=24, scale_dtype=dtype)
    low, high = -drawn(3, 9, 5, dtype=torch.float32).abs(), drawn(3, 9, 6, dtype=torch.float32)
    high = high[..., :5].abs()
    low[0, 0], high[0, 0], low[1, 1], high[1, 1], low[2, 2, 0] = 0, 0, -1e-42, 1e38, torch.nan
    factors = torch.tensor([1.0, 0.7, 0.33], device=DEVICE)[:, None, None]
    one = low[:1].expand(3, -1, -1), high[:1].expand(3, -1, -1)
    for extremes in ((low, high), one):
        for clip in (None, factors.expand(3, 9, 5), factors.expand(3, 9, 5).contiguous()):
            with monkeypatch.context() as patch:
                found = scales_of(extremes, scheme, clip_low=clip, clip_high=clip)
                without_kernels(patch)
                wanted = scales_of(extremes, scheme, clip_low=clip, clip_high=clip)
            for ours, theirs in zip(found, wanted, strict=True):
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 8), (5, 100), (33, 4097)])
def test_packed_codes(rows, columns):
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, generator=draw).to(DEVICE)
    packed = pack_codes(codes, 4)
    assert torch.equal(unpack_codes(packed, 4, columns), codes)
    assert torch.equal(packed.cpu(), pack_codes(codes.cpu(), 4))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_extremes_of_what_is_not_finite(bad, monkeypatch):
    scheme = WeightScheme(int_format(4), True, Granularity.GROUP, group_size=24)
    weight = drawn(6, 48, dtype=torch.bfloat16)
    weight[2, 30] = bad
    found = weight_extremes(weight, scheme)
    scale, _ = weight_scales(weight, scheme)
    assert scale.isnan().sum() == 1 and bool(scale[2, 1].isnan())
    without_kernels(monkeypatch)
    for one, wanted in zip(found, weight_extremes(weight, scheme), strict=True):
        torch.testing.assert_close(one, wanted, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("number", [E4M3, E5M2])
def test_a_float_without_a_number_stays_one(number):
    scheme = WeightScheme(number, True, Granularity.CHANNEL)
    weight = torch.tensor([[torch.nan, 1.0, -1e30, 1e30]], device=DEVICE)
    found = quantize_weight(weight, torch.ones(1, 1, device=DEVICE), None, scheme)
    codes = found.codes.float().tolist()[0]
    assert codes[0] != codes[0] and codes[1:] == [1.0, -number.qmax, number.qmax]
