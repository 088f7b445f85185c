"""GPTQ against the paper's algorithm, column by column, in float64."""

import pytest
import torch

from quantizers.gptq import factorize, gptq, made_up_target
from quantizers.rounding import dequantize, quantize_weight, round_to_nearest
from quantizers.scales import weight_scales
from tests.quantizers.literal import to_e4m3
from tests.quantizers.search_cases import inputs, weight_scheme, weights

BF16 = torch.bfloat16
# format, granularity, symmetric
CASES = [
    ("int4", "group", True),
    ("int4", "group", False),
    ("int8", "group", True),
    ("int4", "channel", True),
    ("int4", "channel", False),
    ("int8", "channel", True),
    ("e4m3", "channel", True),
    ("e4m3", "tensor", True),
    ("e4m3", "block", True),
]


def gram_of(x):
    return x.T @ x / len(x)


def correlated(tokens, columns, seed=0):
    mix = torch.randn(columns, columns, generator=torch.Generator().manual_seed(7))
    return inputs(tokens, columns, seed) @ (torch.eye(columns) + 0.2 * mix)


def one_column(entries, scale, zero, number):
    """Codes of one column of a weight."""
    if number.is_float:
        return to_e4m3(entries / scale)
    return (torch.round(entries / scale) + zero).clamp(number.qmin, number.qmax)


def literal(weight, gram, scheme, *, percdamp, actorder, on_the_way):
    """Algorithm 1 with B = 1: the inverse's Cholesky factor, each error handed on at once."""
    rows, columns = weight.shape
    gram, work = gram.double().clone(), weight.double().clone()
    dead = gram.diagonal() == 0
    mean = gram.diagonal()[~dead].mean()
    gram.diagonal()[dead] = 1
    gram.diagonal()[~dead] += percdamp * mean
    order = torch.arange(columns)
    if actorder:
        order = torch.where(dead, 0, gram.diagonal()).argsort(descending=True, stable=True)
    inverse = torch.linalg.inv(gram[order][:, order])
    factor = torch.linalg.cholesky(inverse, upper=True)
    work = work[:, order]
    scale, zero = weight_scales(weight, scheme)
    width = min(scheme.width(columns), columns)
    codes = torch.empty_like(work)
    for j in range(columns):
        group = int(order[j]) // width
        if on_the_way and j % width == 0:
            found, found_zero = weight_scales(work[:, j : j + width].float(), scheme)
            scale[:, group] = found[:, 0]
            if zero is not None:
                zero[:, group] = found_zero[:, 0]
        per_row = spread(scale, scheme, rows)[:, group].double()
        offset = 0.0 if zero is None else spread(zero, scheme, rows)[:, group].double()
        codes[:, j] = one_column(work[:, j], per_row, offset, scheme.number_format)
        error = (work[:, j] - (codes[:, j] - offset) * per_row) / factor[j, j]
        work[:, j:] -= torch.outer(error, factor[j, j:])
    return codes[:, order.argsort()], scale, zero


def spread(parameter, scheme, rows):
    """A row of parameters for each row of the weight."""
    if scheme.granularity == "tensor":
        return parameter.reshape(1, 1).expand(rows, 1)
    if scheme.granularity == "block":
        return parameter.repeat_interleave(scheme.block_shape[0], dim=0)[:rows]
    return parameter


def loss(x, weight, quantized, scheme):
    """Mean squared error of the outputs over all tokens."""
    lost = x.double() @ (dequantize(quantized, scheme).double() - weight.double()).T
    return float(lost.square().sum(1).mean())


def same_codes(first, second):
    return float((first.double() == second.double()).double().mean())


@pytest.mark.parametrize("block_size", [16, 24, 128])
@pytest.mark.parametrize("actorder", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_literal_codes(device, case, actorder, block_size):
    scheme = weight_scheme(*case[:2], symmetric=case[2], dtype=BF16)
    x, weight = correlated(400, 96), weights((48,), 96)[0]
    gram = gram_of(x)
    factor = factorize(gram.to(device), percdamp=0.01, actorder=actorder)
    scale, zero = weight_scales(weight.to(device), scheme)
    found = gptq(weight.to(device), factor, scheme, (scale, zero), block_size=block_size)
    codes, *_ = literal(weight, gram, scheme, percdamp=0.01, actorder=actorder, on_the_way=False)
    assert same_codes(found.codes.cpu(), codes) >= 0.999
    assert torch.equal(found.scale, scale)
    wanted = type(found)(
        codes.to(found.codes.dtype), found.scale.cpu(), weight_scales(weight, scheme)[1]
    )
    found = type(found)(found.codes.cpu(), found.scale.cpu(), wanted.zero_point)
    assert loss(x, weight, found, scheme) == pytest.approx(
        loss(x, weight, wanted, scheme), rel=1e-4
    )


@pytest.mark.parametrize("block_size", [8, 24, 128])
# last bits decide where a scale lies between two bf16 numbers, and where symmetric int4 puts the
# largest entry, half a step off: whole groups go with them
@pytest.mark.parametrize(
    ("symmetric", "dtype", "alike", "within"),
    [(False, torch.float32, 0.999, 1e-4), (False, BF16, 0.99, 1e-2), (True, BF16, 0.99, 1e-2)],
)
def test_scales_found_on_the_way(device, dtype, alike, within, symmetric, block_size):
    scheme = weight_scheme("int4", "group", symmetric=symmetric, dtype=dtype)
    x, weight = correlated(400, 96), weights((48,), 96)[0]
    gram = gram_of(x)
    factor = factorize(gram.to(device))
    found = gptq(weight.to(device), factor, scheme, block_size=block_size)
    codes, scale, zero = literal(
        weight, gram, scheme, percdamp=0.01, actorder=False, on_the_way=True
    )
    near = torch.isclose(found.scale.cpu().float(), scale.float(), rtol=1e-5, atol=0)
    assert near.float().mean() >= alike
    assert same_codes(found.codes.cpu(), codes) >= alike
    wanted = type(found)(codes.to(torch.int8), scale, zero)
    found = type(found)(
        found.codes.cpu(), found.scale.cpu(), None if zero is None else found.zero_point.cpu()
    )
    assert loss(x, weight, found, scheme) == pytest.approx(
        loss(x, weight, wanted, scheme), rel=within
    )


def test_the_factor_gives_the_damped_matrix_back(device):
    gram = gram_of(correlated(400, 64)).to(device)
    for actorder in (False, True):
        factor = factorize(gram, percdamp=0.05, actorder=actorder)
        wanted = gram.double() + 0.05 * gram.double().diagonal().mean() * torch.eye(64).to(device)
        wanted = wanted[factor.order][:, factor.order]
        upper = factor.upper.double()
        assert torch.equal(upper, upper.triu())
        assert (upper @ upper.T - wanted).abs().max() < 1e-6 * wanted.abs().max()
        assert factor.damping == 0.05


def test_largest_columns_come_first_and_equals_in_their_order():
    gram = torch.diag(torch.tensor([1.0, 4.0, 4.0, 0.0, 9.0]))
    assert factorize(gram, actorder=True).order.tolist() == [4, 1, 2, 0, 3]
    assert factorize(gram).order.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("actorder", [False, True])
def test_channels_that_were_always_zero_are_rounded_to_nearest(device, actorder):
    scheme = weight_scheme("int4", "channel", dtype=BF16)
    x, weight = correlated(400, 64), weights((32,), 64)[0].to(device)
    x[:, [3, 40]] = 0
    gram, scale = gram_of(x).to(device), weight_scales(weight, scheme)
    codes = gptq(weight, factorize(gram, actorder=actorder), scheme, scale).codes
    nearest = quantize_weight(weight, *scale, scheme).codes
    assert torch.equal(codes[:, [3, 40]], nearest[:, [3, 40]])
    # nor do they hand anything on: the other columns are as without them
    others = [c for c in range(64) if c not in (3, 40)]
    without = factorize(gram[others][:, others], actorder=actorder)
    assert torch.equal(codes[:, others], gptq(weight[:, others], without, scheme, scale).codes)


def test_damping_is_raised_until_the_matrix_is_positive_definite():
    # one direction is negative: more than .01, less than .1 of the mean diagonal
    gram = torch.diag(torch.ones(4))
    gram[0, 1] = gram[1, 0] = 1.05
    factor = factorize(gram, percdamp=0.01)
    assert factor.damping == pytest.approx(0.1)
    gram[0, 1] = gram[1, 0] = 1.5
    assert factorize(gram, percdamp=0.01).damping == pytest.approx(1.0)
    gram[0, 1] = gram[1, 0] = 3.0
    assert factorize(gram, percdamp=0.01) is None
    assert factorize(torch.full((4, 4), torch.nan)) is None


def test_a_factor_is_used_before_it_is_known_to_hold(device):
    asked = []

    def hope(whole):
        asked.append(whole)
        return True

    gram = gram_of(correlated(400, 64)).to(device)
    hoped, sure = (factorize(gram, actorder=True, holds=holds) for holds in (hope, bool))
    assert torch.equal(hoped.upper, sure.upper) and torch.equal(hoped.order, sure.order)
    gram[0, 1] = gram[1, 0] = 9 * gram.diagonal().max()
    assert factorize(gram, holds=hope).damping == 0.01
    assert [(whole.shape, whole.dtype, bool(whole)) for whole in asked] == [
        ((), torch.bool, True),
        ((), torch.bool, False),
    ]


def test_a_singular_matrix_needs_no_more_than_its_damping():
    x = torch.ones(50, 8)
    assert factorize(gram_of(x)).damping == 0.01


def test_no_inputs_at_all_round_to_nearest(device):
    scheme = weight_scheme("int4", "group", dtype=BF16)
    weight = weights((32,), 64)[0].to(device)
    found = gptq(weight, factorize(torch.zeros(64, 64, device=device)), scheme)
    assert torch.equal(found.codes, round_to_nearest(weight, scheme).codes)


def test_stacked_linears_are_each_on_their_own(device):
    scheme = weight_scheme("int4", "group", dtype=BF16)
    first, second = (w.to(device) for w in weights((32, 48), 64))
    factor = factorize(gram_of(correlated(400, 64)).to(device), actorder=True)

    def codes(weight):
        return gptq(weight, factor, scheme, weight_scales(weight, scheme)).codes

    assert torch.equal(codes(torch.cat([first, second])), torch.cat([codes(first), codes(second)]))


def test_groups_out_of_order_need_their_scales_before():
    scheme = weight_scheme("int4", "group")
    factor = factorize(gram_of(correlated(400, 64)), actorder=True)
    with pytest.raises(ValueError, match="scales that are found before"):
        gptq(weights((32,), 64)[0], factor, scheme)


def test_error_feedback_helps():
    scheme = weight_scheme("int4", "group", dtype=BF16)
    x, weight = correlated(400, 96), weights((48,), 96)[0]
    nearest = loss(x, weight, round_to_nearest(weight, scheme), scheme)
    scales = weight_scales(weight, scheme)
    fed_back = gptq(weight, factorize(gram_of(x), actorder=True), scheme, scales)
    assert loss(x, weight, fed_back, scheme) < 0.6 * nearest


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_target_that_makes_up_for_errors_of_the_inputs(share):
    draw = torch.Generator().manual_seed(5)
    wanted = torch.randn(300, 24, generator=draw, dtype=torch.float64)
    given = wanted + 0.2 * torch.randn(300, 24, generator=draw, dtype=torch.float64)
    weight = torch.randn(10, 24, generator=draw)
    gram, gap = given.T @ given / 300, given.T @ (wanted - given) / 300
    found = made_up_target(weight, gram.float(), gap.float(), percdamp=1e-9, share=share)
    # literal least squares: inputs that carry errors, outputs of those that do not
    best = torch.linalg.lstsq(given, wanted @ weight.double().T).solution.T
    torch.testing.assert_close(found.double(), weight + share * (best - weight), rtol=0, atol=1e-4)

    def lost(target):
        return float((given @ target.double().T - wanted @ weight.double().T).square().sum())

    assert share == 0 or lost(found) < lost(weight)


def test_there_is_no_target_where_calibration_tells_nothing():
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert made_up_target(weight, torch.zeros(8, 8), torch.ones(8, 8)) is None
