"""The kernels of the searches against plain torch; they need a GPU and its compiler."""

import pytest
import torch

from quantizers import clipping, losses, output_error, rounding, scales, statistics
from quantizers.channel_transform import ChannelTransform
from quantizers.clipping import clip_factors, search_clip_curve
from quantizers.number_formats import E4M3, E5M2, int_format
from quantizers.output_error import GroupProblem
from quantizers.rounding import quantize_dequantize_weight
from quantizers.scales import scales_of, weight_extremes
from quantizers.schemes import Granularity, WeightScheme
from quantizers.statistics import add_batch, empty_statistics

pytest.importorskip("triton")
DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

FORMATS = [
    (int_format(4), True),
    (int_format(4), False),
    (int_format(8), True),
    (E4M3, True),
    (E5M2, True),
]
# rows, columns, group size; None: a scale per row
SHAPES = [(37, 96, 24), (64, 256, 128), (5, 1920, 32), (33, 96, None), (3, 5000, None)]


def schemes(number, symmetric, group):
    granularity = Granularity.CHANNEL if group is None else Granularity.GROUP
    dtype = torch.float32 if number.is_float else torch.bfloat16
    return WeightScheme(number, symmetric, granularity, group_size=group, scale_dtype=dtype)


def drawn(*shape, dtype=torch.bfloat16, seed=0):
    draw = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=draw).to(dtype).to(DEVICE)


def without_kernels(monkeypatch):
    for module in (clipping, losses, output_error, rounding, scales, statistics):
        monkeypatch.setattr(module, "compiles_kernels", lambda *_: False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("number", "symmetric"), FORMATS)
def test_extremes_and_losses(number, symmetric, shape):
    from quantizers.scales_kernel import group_extremes
    from quantizers.search_kernel import rounding_loss

    rows, columns, group = shape
    scheme = schemes(number, symmetric, group)
    weight, factors = drawn(rows, columns), drawn(3, columns, dtype=torch.float32).abs() + 0.5
    width = scheme.width(columns)
    low, high = group_extremes(weight, factors, width)
    scale, zero = scales_of((low, high), scheme)
    lost = rounding_loss(weight, factors, scale, zero, width, number)
    for time, factor in enumerate(factors):
        scaled = weight.float() * factor
        wanted = weight_extremes(scaled, scheme)
        assert torch.equal(low[time], wanted[0]) and torch.equal(high[time], wanted[1])
        zeros = None if zero is None else zero[time]
        restored = quantize_dequantize_weight(scaled, scale[time], zeros, scheme)
        # the kernel rounds once where two operations round twice
        torch.testing.assert_close(
            lost[time].float(), (restored - scaled) / factor, rtol=2**-8, atol=1e-6
        )
    low, high = group_extremes(weight, None, width)
    wanted = weight_extremes(weight, scheme)
    assert torch.equal(low[0], wanted[0]) and torch.equal(high[0], wanted[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("single", [None, 0, 60])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 100), (129, 3000)])
def test_dots_of_rows_that_lie_apart(rows, columns, single, dtype):
    from quantizers.search_kernel import add_row_dots_

    left = drawn(rows, columns + 5, dtype=torch.float32)[:, 5:]
    right = drawn(rows, columns + 3, dtype=dtype)[:, 3:]
    products = left.double() * right.double()
    if single is not None:
        products[:, single:] *= 2
    found, again = torch.ones(2, rows, device=DEVICE)
    add_row_dots_(found, left, right, single)
    torch.testing.assert_close(found.double(), 1 + products.sum(1), rtol=1e-5, atol=2e-4)
    add_row_dots_(again, left, right, single)
    assert torch.equal(found, again)


@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (33, 130), (7, 2048), (5, 4500)])
def test_the_errors_of_rows(rows, columns, monkeypatch):
    difference = drawn(rows, columns, dtype=torch.float32)
    inputs = drawn(200, columns, dtype=torch.float32)
    gram = inputs.t() @ inputs
    found = losses.row_errors(difference, gram)
    wanted = (difference.double() @ gram.double() * difference.double()).sum(1)
    # products of TF32 or float32, as is set
    torch.testing.assert_close(found.double(), wanted, rtol=5e-3, atol=1e-3)
    assert torch.equal(found, losses.row_errors(difference, gram))
    without_kernels(monkeypatch)
    torch.testing.assert_close(found, losses.row_errors(difference, gram), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("number", "symmetric"), FORMATS)
def test_the_output_error(number, symmetric, shape, monkeypatch):
    rows, columns, group = shape
    collected = add_batch(empty_statistics(columns, DEVICE), drawn(2, 100, columns))
    weights = [drawn(rows, columns), drawn(rows + 1, columns)]
    problem = GroupProblem(weights, collected, schemes(number, symmetric, group))
    drawn_scales = [drawn(columns, dtype=torch.float32).abs() + 0.5 for _ in range(3)]
    transforms = [ChannelTransform(scale) for scale in drawn_scales]
    found = output_error.output_errors(problem, transforms)
    assert torch.equal(found, output_error.output_errors(problem, transforms))
    # rows and factors in parts
    monkeypatch.setattr(output_error, "DEVICE_ENTRIES", 2 * columns * rows)
    in_parts = output_error.output_errors(problem, transforms)
    torch.testing.assert_close(in_parts, found, rtol=1e-4, atol=0)
    without_kernels(monkeypatch)
    wanted = output_error.output_errors(problem, transforms)
    torch.testing.assert_close(found, wanted, rtol=5e-3, atol=0)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2] is not None])
@pytest.mark.parametrize(("number", "symmetric"), FORMATS)
def test_the_clip_search(number, symmetric, shape, monkeypatch):
    rows, columns, group = shape
    inputs = drawn(200, columns, dtype=torch.float32)
    given = (drawn(rows, columns), inputs.T @ inputs, schemes(number, symmetric, group))
    factors = clip_factors(10)
    chosen, curve = search_clip_curve(*given, factors)
    again, same = search_clip_curve(*given, factors)
    assert torch.equal(chosen, again) and torch.equal(curve, same)
    without_kernels(monkeypatch)
    wanted, errors = search_clip_curve(*given, factors)
    torch.testing.assert_close(curve, errors, rtol=2e-3, atol=0)
    # factors that lose the same but for a last bit
    assert (chosen == wanted).float().mean() > 0.98


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("windows", "length", "columns"), [(1, 1, 16), (3, 70, 200), (2, 300, 72)])
def test_statistics(windows, length, columns, dtype, monkeypatch):
    x = drawn(windows, length, columns, dtype=dtype)
    found = add_batch(add_batch(empty_statistics(columns, DEVICE), x), x)
    without_kernels(monkeypatch)
    wanted = add_batch(add_batch(empty_statistics(columns, DEVICE), x), x)
    for name in ("window_minimum", "window_maximum"):
        assert torch.equal(getattr(found, name), getattr(wanted, name))
    for name in ("total", "mean_abs_sum", "gram"):
        torch.testing.assert_close(
            getattr(found, name), getattr(wanted, name), rtol=1e-4, atol=1e-3
        )
    assert torch.equal(found.gram, found.gram.T)
