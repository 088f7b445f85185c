"""The clip search against one that runs all tokens through every row and group."""

import pytest
import torch

from quantizers import clipping
from quantizers.channel_transform import gram_blocks
from quantizers.clipping import (
    clamp_to_range,
    clip_factors,
    range_factors,
    search_clip,
    search_clip_curve,
)
from quantizers.number_formats import E4M3, int_format
from quantizers.rounding import dequantize, round_to_nearest
from quantizers.schemes import Granularity, WeightScheme
from tests.quantizers.literal import rounded
from tests.quantizers.search_cases import allowed, inputs, weight_scheme, weights

BF16 = torch.bfloat16
FACTORS = clip_factors(10, 0.5)
# format, granularity, symmetric; with bf16 scales no weight lies just between two codes
CASES = [
    ("int4", "group", True),
    ("int4", "group", False),
    ("int8", "group", True),
    ("int4", "channel", True),
    ("int4", "channel", False),
    ("e4m3", "channel", True),
    ("int4", "tensor", True),
    ("int4", "tensor", False),
    ("int4", "block", True),
]


def gram_of(x):
    return x.T @ x / len(x)


def tiles(granularity, rows, columns):
    """The rows and columns of the entries that share one scale, in the order of the scales."""
    height, width = {
        "group": (1, 16),
        "channel": (1, columns),
        "tensor": (rows, columns),
        "block": (16, 32),
    }[granularity]
    return [
        [(slice(r, r + height), slice(c, c + width)) for c in range(0, columns, width)]
        for r in range(0, rows, height)
    ]


def literal_errors(x, weight, name, granularity, symmetric):
    """Of every scale and factor, the mean squared error of the outputs: (scales..., factors).

    Each row's outputs come from the columns of one scale alone; of all rows that share the scale
    the errors are added up.
    """
    x, errors = x.double(), []
    for line in tiles(granularity, *weight.shape):
        of_line = []
        for rows, columns in line:
            entries, seen = weight[rows, columns], x[:, columns]
            shared = granularity in ("tensor", "block")
            of_tile = []
            for factor in FACTORS.tolist():
                lossy = rounded(
                    entries, name, symmetric=symmetric, clip=factor, whole=shared, scale_dtype=BF16
                )
                lost = seen @ (lossy - entries.double()).T
                of_tile.append(lost.square().mean(0).sum())
            of_line.append(torch.stack(of_tile))
        errors.append(torch.stack(of_line))
    return torch.stack(errors)


def correlated(tokens, columns):
    mix = torch.randn(columns, columns, generator=torch.Generator().manual_seed(7))
    return inputs(tokens, columns) @ (torch.eye(columns) + 0.2 * mix)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_literal_choice(device, case):
    name, granularity, symmetric = case
    x, weight = correlated(250, 80), weights((40,), 80)[0]
    if granularity == "block":
        # the last blocks are not whole
        assert (weight.shape[0] % 16, weight.shape[1] % 32) == (8, 16)
    scheme = weight_scheme(name, granularity, symmetric=symmetric, dtype=BF16)
    chosen = search_clip(weight.to(device), gram_of(x).to(device), scheme, FACTORS.to(device))
    assert chosen.dtype == torch.uint8
    assert tuple(chosen.shape) == scheme.scale_shape(40, 80)
    if granularity == "group":
        blocks = gram_blocks(gram_of(x).to(device), 16)
        other = search_clip(weight.to(device), blocks, scheme, FACTORS.to(device))
        assert torch.equal(chosen, other), "nothing else is read of the matrix"
    errors = literal_errors(x, weight, name, granularity, symmetric)
    assert torch.equal(chosen.cpu().flatten().long(), errors.argmin(-1).flatten())
    if granularity in ("group", "channel") and name == "int4":
        assert len(chosen.unique()) > 3, "the case tells factors apart"


def test_other_groups_of_a_row_say_nothing_but_one_scale_hears_all_of_it():
    # channels carry nearly one signal, so that a row's errors cancel between groups
    x = 0.2 * inputs(200, 32) + torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    weight = weights((64,), 32)[0]
    for granularity in ("group", "channel"):
        scheme = weight_scheme("int4", granularity, dtype=BF16)
        found = search_clip(weight, gram_of(x), scheme, FACTORS)
        errors = literal_errors(x, weight, "int4", granularity, True)
        assert torch.equal(found.flatten().long(), errors.argmin(-1).flatten())


def test_both_ends_are_clipped():
    # two far ends that carry nothing: 4 bits serve the rest better without them
    weight = torch.linspace(-1, 1, 64).reshape(1, 64).clone()
    weight[0, 0], weight[0, -1] = -1.8, 1.8
    x = torch.eye(64)
    x[0], x[-1] = 0, 0
    scheme = weight_scheme("int4", "channel", symmetric=False)
    factor = FACTORS[int(search_clip(weight, gram_of(x), scheme, FACTORS))]
    assert float(factor) == pytest.approx(0.55)


def test_the_first_of_equals_wins():
    scheme = weight_scheme("int4", "group", dtype=BF16)
    weight, x = weights((8,), 32)[0], inputs(50, 32)
    zeros = search_clip(weight * 0, gram_of(x), scheme, FACTORS)
    assert not zeros.any()
    x[:, :16] = 0
    dead = search_clip(weight, gram_of(x), scheme, FACTORS)
    assert not dead[:, 0].any()
    assert dead[:, 1].any()
    same = search_clip(weight, gram_of(x), scheme, torch.full((5,), 0.8))
    assert not same.any()


@pytest.mark.parametrize("rows", [1, 3, 7, 40])
@pytest.mark.parametrize("granularity", ["group", "channel"])
def test_chunks_do_not_matter(granularity, rows, monkeypatch):
    weight, gram = weights((40,), 80)[0], gram_of(correlated(250, 80))
    scheme = weight_scheme("int4", granularity, dtype=BF16)
    whole = search_clip(weight, gram, scheme, FACTORS)
    monkeypatch.setattr(clipping, "_CPU_ENTRIES", rows * 80)
    assert torch.equal(search_clip(weight, gram, scheme, FACTORS), whole)


@pytest.mark.parametrize("granularity", ["tensor", "block"])
def test_what_shares_a_scale_is_never_cut(granularity, monkeypatch):
    weight, gram = weights((40,), 80)[0], gram_of(correlated(250, 80))
    scheme = weight_scheme("int4", granularity, dtype=BF16)
    whole = search_clip(weight, gram, scheme, FACTORS)
    monkeypatch.setattr(clipping, "_CPU_ENTRIES", 80)
    assert torch.equal(search_clip(weight, gram, scheme, FACTORS), whole)


def test_half_precision_weights_are_searched_as_they_are():
    weight, gram = weights((8,), 32)[0].bfloat16(), gram_of(inputs(50, 32))
    scheme, before = weight_scheme("int4", "group", dtype=BF16), weight.clone()
    found = search_clip(weight, gram, scheme, FACTORS)
    assert torch.equal(found, search_clip(weight.float(), gram, scheme, FACTORS))
    assert torch.equal(weight, before)


def test_factors_fall_from_one():
    assert FACTORS.tolist() == pytest.approx([1 - step / 20 for step in range(10)])
    assert clip_factors(1, 1.0).tolist() == [1.0]
    assert clip_factors(20, 0.5)[-1].item() == pytest.approx(0.525)
    assert len(clip_factors(256, 0.5)) == 256


@pytest.mark.parametrize("steps, shrink", [(0, 0.5), (257, 0.5), (10, 0.0), (10, 1.5), (10, -0.1)])
def test_factors_that_make_no_sense_are_refused(steps, shrink):
    with pytest.raises(ValueError, match=f"{steps} clip steps"):
        clip_factors(steps, shrink)


def test_shapes_that_do_not_fit_are_refused():
    scheme = WeightScheme(int_format(4), True, Granularity.CHANNEL)
    with pytest.raises(ValueError, match=r"\(3, 3\), not \(4, 4\)"):
        search_clip(torch.ones(2, 4), torch.eye(3), scheme, FACTORS)
    with pytest.raises(ValueError, match="257 clip factors"):
        search_clip(torch.ones(2, 4), torch.eye(4), scheme, torch.ones(257))


def test_ranges_of_integers_shrink_and_those_of_floats_widen_by_less_than_an_octave():
    assert torch.equal(range_factors(int_format(4), 20, 0.4), clip_factors(20, 0.4))
    factors = range_factors(E4M3, 4)
    assert factors.tolist() == pytest.approx([1.0, 2**0.25, 2**0.5, 2**0.75])
    with pytest.raises(ValueError, match="0 clip steps"):
        range_factors(E4M3, 0)


def test_a_wider_range_of_floats_saturates_nothing_and_loses_less(device):
    scheme = weight_scheme("e4m3", "channel")
    x, weight = correlated(400, 96).to(device), weights((48,), 96)[0].to(device)
    factors = range_factors(E4M3, 10).to(device)
    gram = gram_of(x)

    def lost(clip):
        restored = dequantize(round_to_nearest(weight, scheme, clip), scheme)
        assert (restored.abs().amax(1) >= 0.93 * weight.abs().amax(1)).all()
        return ((restored - weight) @ gram * (restored - weight)).sum()

    chosen = search_clip(weight, gram, scheme, factors)
    assert lost(factors[chosen.int()]) < 0.95 * lost(None)


@pytest.mark.parametrize("granularity", ["group", "channel", "tensor", "block"])
def test_the_curve_is_the_error_of_the_whole_weight(device, granularity, monkeypatch):
    scheme = weight_scheme("int4", granularity, dtype=BF16)
    x, weight = correlated(250, 96), weights((48,), 96)[0]
    monkeypatch.setattr(clipping, "_CPU_ENTRIES", 10 * 96)
    given = (weight.to(device), gram_of(x).to(device), scheme, FACTORS.to(device))
    chosen, curve = search_clip_curve(*given)
    assert torch.equal(chosen, search_clip(*given))
    assert curve.dtype == torch.float64
    wanted = literal_errors(x, weight, "int4", granularity, True).flatten(0, -2).sum(0)
    assert torch.allclose(curve.cpu(), wanted, rtol=allowed(1e-4, given[0]))


@pytest.mark.parametrize(("name", "granularity", "symmetric"), CASES)
def test_a_clamped_weight_has_the_range_of_its_clip(name, granularity, symmetric):
    scheme = weight_scheme(name, granularity, symmetric=symmetric)
    (weight,) = weights((48,), 64)
    draw = torch.Generator().manual_seed(1)
    ends = tuple(0.5 + 0.5 * torch.rand(scheme.scale_shape(48, 64), generator=draw) for _ in "lh")
    clamped = clamp_to_range(weight, scheme, ends)
    wanted = round_to_nearest(weight, scheme, ends)
    found = round_to_nearest(clamped, scheme)
    torch.testing.assert_close(found.scale, wanted.scale, rtol=1e-6, atol=0)
    inside = (clamped == weight).float().mean()
    assert 0.5 < inside < 1
