"""Coordinate descent against a plain loop over the columns, in float64."""

import pytest
import torch

from quantizers import coordinate_descent
from quantizers.coordinate_descent import descend
from quantizers.gptq import factorize, gptq
from quantizers.number_formats import E5M2
from quantizers.rounding import QuantizedWeight, dequantize, expand_scale, round_to_nearest
from quantizers.scales import weight_scales
from quantizers.schemes import Granularity, WeightScheme
from tests.quantizers.search_cases import inputs, weight_scheme, weights

BF16 = torch.bfloat16
# format, granularity, symmetric
CASES = [
    ("int4", "group", True),
    ("int4", "group", False),
    ("int8", "group", True),
    ("int8", "channel", False),
    ("int4", "channel", True),
    ("e4m3", "channel", True),
    ("e4m3", "tensor", True),
    ("e4m3", "block", True),
    ("e5m2", "channel", True),
]


def scheme_of(case):
    name, granularity, symmetric = case
    if name == "e5m2":
        return WeightScheme(E5M2, True, Granularity(granularity), scale_dtype=BF16)
    return weight_scheme(name, granularity, symmetric=symmetric, dtype=BF16)


def gram_of(x):
    return x.T @ x / len(x)


def correlated(tokens, columns, seed=0):
    mix = torch.randn(columns, columns, generator=torch.Generator().manual_seed(7))
    return inputs(tokens, columns, seed) @ (torch.eye(columns) + 0.2 * mix)


def levels_of(number):
    """Every value of a format, in float64."""
    if not number.is_float:
        return torch.arange(number.qmin, number.qmax + 1, dtype=torch.float64)
    every = torch.arange(256, dtype=torch.uint8).view(number.code_dtype).double()
    return every[every.isfinite()].unique()


def literal(weight, quantized, gram, scheme, sweeps):
    """One column after the other, all others as they are: the nearest value of the grid."""
    rows, columns = weight.shape
    scale = expand_scale(quantized.scale.double(), scheme, rows, columns)
    zero = torch.zeros(rows, columns, dtype=torch.float64)
    if quantized.zero_point is not None:
        zero = expand_scale(quantized.zero_point.double(), scheme, rows, columns)
    weight, gram, codes = weight.double(), gram.double(), quantized.codes.double().clone()
    grid = levels_of(scheme.number_format)
    for _ in range(sweeps):
        for j in range(columns):
            error = weight - (codes - zero) * scale
            error[:, j] = 0
            diagonal = gram[j, j] if gram[j, j] > 0 else 1.0
            wanted = (weight[:, j] + error @ gram[:, j] / diagonal) / scale[:, j] + zero[:, j]
            codes[:, j] = grid[(wanted[:, None] - grid).abs().argmin(1)]
    return codes


def losses(weight, quantized, gram, scheme):
    """The error of each row, float64."""
    lost = weight.double() - dequantize(quantized, scheme).double()
    return (lost @ gram.double() * lost).sum(1)


def as_on(quantized, device):
    zero = quantized.zero_point
    return QuantizedWeight(
        quantized.codes.to(device),
        quantized.scale.to(device),
        None if zero is None else zero.to(device),
    )


@pytest.mark.parametrize("sweeps", [1, 3])
@pytest.mark.parametrize("block_size", [13, 128])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_literal_codes(device, case, block_size, sweeps):
    scheme = scheme_of(case)
    # a number of rows and columns that no block divides
    columns = 112 if case[1] == "group" else 101
    weight, gram = weights((37,), columns)[0], gram_of(correlated(400, columns))
    start = round_to_nearest(weight, scheme)
    wanted = literal(weight, start, gram, scheme, sweeps)
    found = descend(
        weight.to(device),
        as_on(start, device),
        gram.to(device),
        scheme,
        sweeps=sweeps,
        block_size=block_size,
    )
    # a weight between two codes may fall to either side, and what comes after it with it
    assert (found.codes.cpu().double() == wanted).double().mean() >= 0.995
    literally = QuantizedWeight(wanted.to(start.codes.dtype), start.scale, start.zero_point)
    reached, best = (losses(weight, as_on(q, "cpu"), gram, scheme) for q in (found, literally))
    assert float(reached.sum()) == pytest.approx(float(best.sum()), rel=2e-3)
    assert found.codes.dtype == start.codes.dtype
    assert torch.equal(found.scale.cpu(), start.scale)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_row_loses_and_all_together_gain(device, case):
    scheme = scheme_of(case)
    columns = 112 if case[1] == "group" else 101
    weight, gram = weights((37,), columns)[0].to(device), gram_of(correlated(400, columns))
    gram = gram.to(device)
    factor = factorize(gram, percdamp=0.01, actorder=True)
    start = gptq(weight, factor, scheme, weight_scales(weight, scheme))
    before = losses(weight, start, gram, scheme)
    once, often = (
        losses(weight, descend(weight, start, gram, scheme, sweeps=sweeps), gram, scheme)
        for sweeps in (1, 4)
    )
    assert (once <= before * (1 + 1e-5)).all()
    assert (often <= once * (1 + 1e-5)).all()
    assert once.sum() < before.sum()


def test_codes_that_no_column_would_change_stay(device):
    scheme = weight_scheme("int4", "group", dtype=BF16)
    weight, gram = weights((37,), 112)[0].to(device), gram_of(correlated(400, 112)).to(device)
    settled = descend(weight, round_to_nearest(weight, scheme), gram, scheme, sweeps=60)
    again = descend(weight, settled, gram, scheme, sweeps=1)
    assert torch.equal(settled.codes, again.codes)
    none = descend(weight, settled, gram, scheme, sweeps=0)
    assert torch.equal(settled.codes, none.codes)


def test_a_row_that_would_lose_keeps_its_codes(monkeypatch):
    scheme = weight_scheme("int4", "channel", dtype=BF16)
    weight, gram = weights((37,), 101)[0], gram_of(correlated(400, 101))
    start = round_to_nearest(weight, scheme)
    rounded = coordinate_descent.round_columns

    def spoilt(*args):
        codes, error = rounded(*args)
        codes[:, :5] = 7
        return codes, error

    monkeypatch.setattr(coordinate_descent, "round_columns", spoilt)
    found = descend(weight, start, gram, scheme, sweeps=1)
    assert torch.equal(found.codes[:5], start.codes[:5])
    assert not torch.equal(found.codes[5:], start.codes[5:])


def test_the_same_bytes_again_and_arguments_as_they_were(device):
    scheme = weight_scheme("int4", "group", symmetric=False, dtype=BF16)
    weight, gram = weights((37,), 112)[0].to(device), gram_of(correlated(400, 112)).to(device)
    start = round_to_nearest(weight, scheme)
    kept = [t.clone() for t in (weight, gram, start.codes, start.scale)]
    first, second = (descend(weight, start, gram, scheme, sweeps=3) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    for tensor, copy in zip((weight, gram, start.codes, start.scale), kept, strict=True):
        assert torch.equal(tensor, copy)


def test_channels_that_were_always_zero_are_rounded_to_nearest(device):
    scheme = weight_scheme("int4", "channel", dtype=BF16)
    x, weight = correlated(400, 64), weights((32,), 64)[0].to(device)
    x[:, [3, 40]] = 0
    nearest = round_to_nearest(weight, scheme)
    found = descend(weight, nearest, gram_of(x).to(device), scheme, sweeps=2)
    assert torch.equal(found.codes[:, [3, 40]], nearest.codes[:, [3, 40]])
    nothing = descend(weight, nearest, torch.zeros(64, 64, device=device), scheme, sweeps=2)
    assert torch.equal(nothing.codes, nearest.codes)
