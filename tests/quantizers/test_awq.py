"""AWQ's search against one that runs all tokens through the linears for every ratio."""

from typing import Any

import pytest
import torch

from quantizers import awq
from quantizers.awq import AwqVersion, ImportanceMeasure
from quantizers.channel_transform import ChannelTransform, nearest_power_of_two
from quantizers.output_error import GroupProblem, output_error
from tests.quantizers.literal import awq_scale, output_loss, rounded_weight
from tests.quantizers.search_cases import (
    ACTIVATIONS,
    allowed,
    heavy_tailed,
    inputs,
    statistics_of,
    weight_scheme,
    weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# with bf16 scales no weight lies just between two codes, where the last bit of a factor decides
BF16 = torch.bfloat16
GRID = [step / 20 for step in range(20)]
# format, granularity, symmetric, dtype of scales
WEIGHT_ONLY = [
    ("int4", "group", True, BF16),
    ("int4", "group", False, BF16),
    ("int4", "channel", True, BF16),
    ("int4", "channel", False, BF16),
    ("int8", "group", True, torch.float32),
    ("int8", "channel", False, torch.float32),
    ("e4m3", "channel", True, torch.float32),
    ("e4m3", "tensor", True, torch.float32),
]


def searched(*args: Any, **kwargs: Any) -> tuple[ChannelTransform, list[awq.Trial]]:
    found, tried = awq.search(*args, **kwargs)
    return found, tried.trials()


def as_it_is(scale):
    return scale


def literal_losses(x, group, name, granularity, how, version, inputs_as=None):
    width = 16 if granularity == "group" else None

    def rounding(weight):
        return rounded_weight(weight, name, width, whole=granularity == "tensor", **how)

    return [
        output_loss(
            x,
            group,
            rounding,
            inputs_as,
            scale=awq_scale(x, group, version, ratio, width),
        )
        for ratio in GRID
    ]


@pytest.mark.parametrize("version", list(AwqVersion))
@pytest.mark.parametrize("case", WEIGHT_ONLY, ids=str)
def test_weight_only_is_the_literal_search(device, case, version):
    name, granularity, symmetric, dtype = case
    x, group = inputs(300, 64), weights((24, 12), 64)
    scheme = weight_scheme(name, granularity, symmetric=symmetric, dtype=dtype)
    problem = GroupProblem([w.to(device) for w in group], statistics_of(x.to(device)), scheme)
    found, trials = searched(problem, as_it_is, versions=(version,))
    how = {"symmetric": symmetric, "scale_dtype": dtype}
    losses = literal_losses(x, group, name, granularity, how, version)
    assert [trial.ratio for trial in trials] == GRID
    assert [trial.version for trial in trials] == [version] * 20
    rel = allowed(1e-4, problem.weights[0])
    assert [trial.error for trial in trials] == pytest.approx(losses, rel=rel)
    best = min(range(20), key=lambda number: trials[number].error)
    assert losses[best] <= min(losses) * (1 + 2 * rel)
    width = 16 if granularity == "group" else None
    wanted = awq_scale(x, group, version, GRID[best], width)
    torch.testing.assert_close(found.scale.cpu().double(), wanted, rtol=1e-4, atol=0)
    assert found.shift is None


@pytest.mark.parametrize("kind", ["even", "lognormal", "massive", "spikes"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_with_quantized_activations_the_choice_is_as_good_as_the_literal_best(act, kind):
    whole = act == "e4m3 static"
    name, granularity = act.split()[0], "tensor" if whole else "channel"
    worse = {}
    for seed in range(5):
        x, group = heavy_tailed(kind, 4096, 64, seed), weights((48, 24), 64, seed)
        problem = GroupProblem(
            group, statistics_of(x), weight_scheme(name, granularity), ACTIVATIONS[act]
        )
        _, trials = searched(problem, as_it_is)
        losses = literal_losses(x, group, name, granularity, {}, "v2", act)
        chosen = min(range(20), key=lambda number: trials[number].error)
        worse[seed] = losses[chosen] / min(losses)
    assert max(worse.values()) <= 1.02, worse


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_with_all_rows_kept_the_loss_is_the_literal_one(act):
    whole = act == "e4m3 static"
    name, granularity = act.split()[0], "tensor" if whole else "channel"
    x, group = heavy_tailed("massive", 512, 64, 3), weights((24, 12), 64)
    problem = GroupProblem(
        group, statistics_of(x, kept=512), weight_scheme(name, granularity), ACTIVATIONS[act]
    )
    _, trials = searched(problem, as_it_is)
    losses = literal_losses(x, group, name, granularity, {}, "v2", act)
    assert [trial.error for trial in trials] == pytest.approx(losses, rel=1e-3)


def problem_of(x, group=None, act=None):
    group = group or weights((16,), x.shape[1])
    return GroupProblem(group, statistics_of(x), weight_scheme("int4", "group", dtype=BF16), act)


def test_all_batches_decide():
    # of channel sizes the first batch shows nothing
    x = torch.cat([torch.ones(64, 32), inputs(448, 32)])
    group = weights((16,), 32)
    _, trials = searched(problem_of(x, group), as_it_is)
    how = {"scale_dtype": BF16}
    losses = literal_losses(x, group, "int4", "group", how, "v2")
    assert [trial.error for trial in trials] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("act", [None, *ACTIVATIONS.values()], ids=str)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x.index_fill(1, torch.tensor([0, 5]), 0.0),
        lambda x: x.index_fill(1, torch.tensor([3]), 2.5),
        lambda x: x[:1],
        lambda x: x * 0,
        lambda x: x.index_fill(1, torch.arange(1, 32), 0.0),
    ],
    ids=["dead channels", "constant channel", "single sample", "all zero", "one channel alive"],
)
@pytest.mark.parametrize("version", list(AwqVersion))
def test_poor_calibration_gives_finite_scales(spoil, act, version):
    x = spoil(inputs(200, 32))
    found, trials = searched(problem_of(x, act=act), as_it_is, versions=(version,))
    assert len(trials) == 20
    assert all(0 <= trial.error < float("inf") for trial in trials)
    assert bool(found.scale.isfinite().all()) and bool((found.scale > 0).all())


def test_a_dead_channel_is_taken_as_the_smallest_that_was_seen():
    x = inputs(200, 32)
    x[:, [0, 5]] = 0
    scale = awq.candidate_scales(x.abs().mean(0), torch.ones(32), AwqVersion.V2, [0.7])[0]
    assert scale[0] == scale[5] == scale.min()
    assert (scale == scale.min()).sum() == 3
    torch.testing.assert_close(scale.double(), awq_scale(x, [], "v2", 0.7, None), rtol=1e-5, atol=0)
    zeros = awq.candidate_scales(torch.zeros(4), torch.ones(4), AwqVersion.V2, [0.5])[0]
    assert zeros.tolist() == [1.0] * 4


def test_sizes_of_inputs():
    x = inputs(100, 8)
    statistics = statistics_of(x)
    mean = awq.importance(statistics, ImportanceMeasure.MEAN_ABS)
    root = awq.importance(statistics, ImportanceMeasure.ROOT_MEAN_SQUARE)
    torch.testing.assert_close(mean, x.abs().mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(root, x.square().mean(0).sqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("measure", list(ImportanceMeasure))
@pytest.mark.parametrize("seed", range(4))
def test_refining_is_never_worse_than_the_grid(measure, seed):
    problem = problem_of(inputs(200, 32, seed), weights((16, 8), 32, seed))
    both = tuple(AwqVersion)
    _, coarse = searched(problem, as_it_is, versions=both, measure=measure)
    found, fine = searched(problem, as_it_is, versions=both, measure=measure, refine=True)
    best = min(trial.error for trial in fine)
    assert best <= min(trial.error for trial in coarse)
    for version in both:
        of_grid = [t for t in coarse if t.version == version]
        of_fine = [t for t in fine if t.version == version]
        assert of_fine[:20] == of_grid
        ratios = [trial.ratio for trial in of_fine]
        assert len(set(ratios)) == len(ratios) <= 24
        assert all(0 <= ratio <= 1 for ratio in ratios)
        nearest = min(of_grid, key=lambda trial: trial.error).ratio
        assert all(0 < abs(r - nearest) < 0.05 for r in ratios[20:])
    # what is returned is what was best, and not what was tried last
    again = output_error(problem, found)
    assert float(again) == best


def test_the_best_version_wins():
    problem = problem_of(inputs(200, 32))
    _, alone = searched(problem, as_it_is, versions=(AwqVersion.V1,))
    _, other = searched(problem, as_it_is, versions=(AwqVersion.V2,))
    found, both = searched(problem, as_it_is, versions=tuple(AwqVersion))
    assert both == alone + other
    assert float(output_error(problem, found)) == min(trial.error for trial in both)


def test_what_is_tried_is_what_can_be_folded():
    problem = problem_of(inputs(200, 32))
    found, trials = searched(problem, nearest_power_of_two)
    exponent = torch.log2(found.scale)
    assert torch.equal(exponent, exponent.round())
    assert float(output_error(problem, found)) == min(trial.error for trial in trials)
    _, others = searched(problem, as_it_is)
    assert trials != others


def test_so_many_ratios():
    _, trials = searched(problem_of(inputs(50, 32)), as_it_is, ratios=7)
    assert [trial.ratio for trial in trials] == [step / 7 for step in range(7)]


def test_the_first_of_equals_wins_and_what_is_no_number_does_not() -> None:
    problem = problem_of(inputs(30, 16))

    def errors(_, candidates):
        found = torch.full((len(candidates),), 2.0, dtype=torch.float64)
        found[[0, 5, 9]] = torch.tensor([torch.nan, 1.0, 1.0], dtype=torch.float64)
        return found

    seen = []
    found, _ = searched(
        problem, lambda scale: seen.append(scale) or scale, errors_of=errors, ratios=20
    )
    assert torch.equal(found.scale, seen[0][5])
