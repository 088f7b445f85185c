"""Refitted scales against gradient descent's optimum and plain least squares on activations."""

import pytest
import torch

from quantizers.rounding import QuantizedWeight, dequantize, round_to_nearest
from quantizers.scale_refit import refit_scales
from tests.quantizers.search_cases import inputs, weight_scheme, weights


def gram_of(x):
    return x.T @ x / len(x)


def loss(x, weight, quantized, scheme):
    return (x @ (dequantize(quantized, scheme) - weight).T).double().square().mean(0)


CASES = [("int4", "group", True), ("int4", "group", False), ("int4", "channel", True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_least_squares_over_all_tokens(device, case):
    scheme = weight_scheme(case[0], case[1], symmetric=case[2])
    x, weight = inputs(300, 64).to(device), weights((24,), 64)[0].to(device)
    quantized = round_to_nearest(weight, scheme)
    found = refit_scales(weight, quantized, gram_of(x), scheme)
    zero = 0 if quantized.zero_point is None else quantized.zero_point.double()
    width = min(scheme.width(64), 64)
    levels = quantized.codes.double().unflatten(1, (-1, width))
    levels = levels - (zero[..., None] if case[2] is False else 0)
    for row in range(24):
        columns = torch.stack(
            [
                x[:, g * width : (g + 1) * width].double() @ part
                for g, part in enumerate(levels[row])
            ],
            1,
        )
        target = x.double() @ weight[row].double()
        wanted = torch.linalg.lstsq(columns, target[:, None]).solution[:, 0]
        assert torch.allclose(found[row].double(), wanted, rtol=1e-2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_row_loses(device, case):
    scheme = weight_scheme(case[0], case[1], symmetric=case[2], dtype=torch.bfloat16)
    x, weight = inputs(300, 64).to(device), weights((24,), 64)[0].to(device)
    quantized = round_to_nearest(weight, scheme)
    found = refit_scales(weight, quantized, gram_of(x), scheme)
    assert found.dtype == torch.bfloat16
    refitted = QuantizedWeight(quantized.codes, found, quantized.zero_point)
    before, after = (loss(x, weight, q, scheme) for q in (quantized, refitted))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < before.sum()


def test_groups_that_see_no_inputs_keep_their_scales(device):
    scheme = weight_scheme("int4", "group", dtype=torch.bfloat16)
    x, weight = inputs(300, 64).to(device), weights((24,), 64)[0].to(device)
    x[:, 16:32] = 0
    quantized = round_to_nearest(weight, scheme)
    found = refit_scales(weight, quantized, gram_of(x), scheme)
    assert torch.equal(found[:, 1], quantized.scale[:, 1])
    nothing = refit_scales(weight, quantized, torch.zeros(64, 64, device=device), scheme)
    assert torch.equal(nothing, quantized.scale)


@pytest.mark.parametrize("granularity", ["tensor", "block"])
def test_scales_that_rows_share(granularity):
    scheme = weight_scheme("int4", granularity)
    weight = weights((32,), 64)[0]
    with pytest.raises(ValueError, match="shared by rows"):
        refit_scales(weight, round_to_nearest(weight, scheme), torch.eye(64), scheme)
