"""OS+ against a search that runs all tokens through the linears for every threshold."""

import math
import statistics as plain_statistics

import pytest
import torch

from quantizers import os_plus
from quantizers.channel_transform import ChannelTransform, nearest_power_of_two
from quantizers.output_error import GroupProblem, output_error
from tests.quantizers.literal import output_loss, rounded_weight
from tests.quantizers.search_cases import (
    ACTIVATIONS,
    heavy_tailed,
    inputs,
    statistics_of,
    weight_scheme,
    weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")

INT8_CHANNEL = weight_scheme("int8", "channel")


def as_it_is(scale):
    return scale


def lopsided(seed, tokens=4096, columns=64):
    """Inputs whose channels lie to one side of zero, as OS+ found them."""
    x = heavy_tailed("lognormal", tokens, columns, seed)
    return x + 20 * torch.randn(columns, generator=torch.Generator().manual_seed(seed))


def literal_thresholds(x, shift):
    """From the largest channel down to half of the middle one, in 32 equal ratios."""
    sizes = (x - shift).abs().amax(0).tolist()
    largest, least = max(sizes), plain_statistics.median_low(sizes) / 2
    return sizes, [largest * (least / largest) ** (step / 31) for step in range(32)]


def literal_search(x, group, shift, act, name="int8"):
    sizes, thresholds = literal_thresholds(x, shift)
    losses = []
    for threshold in thresholds:
        scale = torch.tensor([max(1.0, size / threshold) for size in sizes]).double()
        losses.append(
            output_loss(
                x, group, lambda w: rounded_weight(w, name), act, shift=shift.double(), scale=scale
            )
        )
    return thresholds, losses


def test_the_middle_is_that_of_signed_extremes_over_all_batches():
    x = lopsided(0)
    x[-1, 3] = 1e3
    x[5, 4] = -2e3
    middle = os_plus.middle(statistics_of(x))
    wanted = [(max(column) + min(column)) / 2 for column in x.T.tolist()]
    assert middle.tolist() == pytest.approx(wanted, rel=1e-6)


def test_scales_of_a_threshold():
    scale = os_plus.threshold_scale(torch.tensor([0.0, 1.0, 4.0, 10.0]), 4.0)
    assert scale.tolist() == [1.0, 1.0, 1.0, 2.5]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("act", ["int8 token", "e4m3 token"])
def test_the_threshold_is_as_good_as_the_literal_best(act, shifted):
    worse = {}
    for seed in range(3):
        x, group = lopsided(seed), weights((24, 12), 64, seed)
        shift = (x.amax(0) + x.amin(0)) / 2 * shifted
        problem = GroupProblem(group, statistics_of(x), INT8_CHANNEL, ACTIVATIONS[act])
        given = os_plus.middle(problem.statistics) if shifted else None
        found, trials = os_plus.search(problem, as_it_is, shift=given)
        thresholds, losses = literal_search(x, group, shift, act)
        assert [trial.threshold for trial in trials] == pytest.approx(thresholds, rel=1e-4)
        chosen = min(range(32), key=lambda number: trials[number].error)
        worse[seed] = losses[chosen] / min(losses)
        sizes = (x - shift).abs().amax(0)
        wanted = (sizes / thresholds[chosen]).clamp(min=1.0)
        torch.testing.assert_close(found.scale, wanted, rtol=1e-4, atol=0)
        assert (found.shift is None) != shifted
        assert losses[chosen] < losses[0], "the case has something to win"
    assert max(worse.values()) <= 1.02, worse


@pytest.mark.parametrize("shifted", [False, True])
def test_with_all_rows_kept_the_losses_are_the_literal_ones(shifted):
    x, group = lopsided(1, tokens=400), weights((24, 12), 64)
    statistics = statistics_of(x, kept=400)
    shift = os_plus.middle(statistics) * shifted
    problem = GroupProblem(group, statistics, INT8_CHANNEL, ACTIVATIONS["int8 token"])
    _, trials = os_plus.search(problem, as_it_is, shift=shift)
    _, losses = literal_search(x, group, shift, "int8 token")
    assert [trial.error for trial in trials] == pytest.approx(losses, rel=2e-3)


def test_a_shift_wins_where_channels_are_lopsided():
    x, group = lopsided(2), weights((24,), 64)
    problem = GroupProblem(group, statistics_of(x), INT8_CHANNEL, ACTIVATIONS["int8 token"])
    _, without = os_plus.search(problem, as_it_is)
    _, shifted = os_plus.search(problem, as_it_is, shift=os_plus.middle(problem.statistics))
    assert min(t.error for t in shifted) < 0.7 * min(t.error for t in without)


def test_what_is_tried_is_what_can_be_folded():
    x, group = inputs(300, 64), weights((24,), 64)
    problem = GroupProblem(group, statistics_of(x), INT8_CHANNEL, ACTIVATIONS["int8 token"])
    found, trials = os_plus.search(problem, nearest_power_of_two)
    exponent = torch.log2(found.scale)
    assert torch.equal(exponent, exponent.round())
    assert float(output_error(problem, found)) == min(trial.error for trial in trials)


def test_so_many_thresholds():
    problem = GroupProblem(weights((8,), 64), statistics_of(inputs(50, 64)), INT8_CHANNEL)
    _, trials = os_plus.search(problem, as_it_is, thresholds=2)
    assert len(trials) == 2


@pytest.mark.parametrize("x", [torch.zeros(20, 8), torch.zeros(1, 8)], ids=["zeros", "one row"])
def test_nothing_to_scale(x):
    problem = GroupProblem(weights((8,), 8), statistics_of(x), INT8_CHANNEL)
    found, trials = os_plus.search(problem, as_it_is)
    assert trials == []
    assert found.scale.tolist() == [1.0] * 8


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_single_sample_and_its_shift(tokens):
    # of one sample all minima are maxima: shifted, nothing is left of it
    x, group = inputs(tokens, 8), weights((8,), 8)
    problem = GroupProblem(group, statistics_of(x, windows=1), INT8_CHANNEL)
    shift = os_plus.middle(problem.statistics)
    found, _ = os_plus.search(problem, as_it_is, shift=shift)
    assert isinstance(found, ChannelTransform)
    assert bool(found.scale.isfinite().all()) and bool((found.scale >= 1).all())
    assert found.shift is not None
    assert torch.equal(found.shift, shift)


def test_where_no_error_is_a_number_nothing_is_scaled() -> None:
    problem = GroupProblem(
        weights((8,), 16), statistics_of(lopsided(9, 64, 16)), weight_scheme("int8", "channel")
    )

    def lost(_, candidates):
        return torch.full((len(candidates),), torch.nan, dtype=torch.float64)

    found, trials = os_plus.search(problem, as_it_is, errors_of=lost)
    assert torch.equal(found.scale, torch.ones(16))
    assert trials and all(math.isnan(trial.error) for trial in trials)
