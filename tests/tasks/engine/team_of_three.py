"""One of three processes that exchange tensors: ``python -m tests.tasks.engine.team_of_three``.

Each compares what it is given of all with what it computes alone from the same seeds.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from flows.shift import meet
from quantizers.channel_transform import ChannelTransform
from quantizers.clipping import clip_factors, search_clip_curve
from quantizers.losses import relative_output_error
from quantizers.number_formats import int_format
from quantizers.output_error import GroupProblem, output_errors
from quantizers.rounding import dequantize, round_group
from quantizers.schemes import Granularity, WeightScheme
from quantizers.statistics import add_batch, empty_statistics, largest_sum, weighted_rows
from tasks.engine.sharing import (
    clips_of_all,
    errors_of,
    errors_of_all,
    own_energies,
    rounded_by_rows,
    statistics_of_all,
)
from tasks.engine.team import Team

SIZE, WINDOWS, LENGTH, COLUMNS, ROWS = 3, 7, 40, 32, 10
SCHEME = WeightScheme(int_format(4), symmetric=True, granularity=Granularity.GROUP, group_size=16)


def inputs() -> torch.Tensor:
    """(W, T, K); a channel is large."""
    x = torch.randn(WINDOWS, LENGTH, COLUMNS, generator=torch.Generator().manual_seed(1))
    return x * torch.linspace(0.1, 5, COLUMNS)


def exchanges(team: Team) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.bool):
        whole = (torch.arange(7 * 5).reshape(7, 5) % 2).to(dtype)
        counts = team.counts(7)
        assert counts == [3, 2, 2]
        assert torch.equal(team.joined(whole[team.own(7)], counts), whole)
    codes = torch.arange(14.0).reshape(7, 2).to(torch.float8_e4m3fn)
    joined = team.joined(codes[team.own(7)], team.counts(7))
    assert joined.dtype == codes.dtype and torch.equal(joined.float(), codes.float())
    assert team.joined(torch.zeros(0, 3), [0, 0, 0]).shape == (0, 3)
    assert team.all_joined([], []) == []
    given = [whole[team.own(7)], codes[team.own(7)], torch.zeros(0, 3), whole[:1] + team.rank]
    ones = [1, 1, 1]
    first, second, none, ranks = team.all_joined(given, [counts, counts, [0, 0, 0], ones])
    assert torch.equal(first, whole) and torch.equal(second.float(), codes.float())
    assert none.shape == (0, 3)
    assert torch.equal(ranks, torch.cat([whole[:1] + rank for rank in range(SIZE)]))
    # in the order of the ranks, in which the 1 is lost; in another it is not
    mine = torch.tensor([1e8, 1.0, -1e8])[team.rank].repeat(5)
    assert torch.equal(team.summed_(mine), torch.zeros(5))


def statistics(team: Team) -> None:
    x, mine = inputs(), team.own(WINDOWS)
    keep = torch.arange(0, WINDOWS * LENGTH, 9)
    own = keep[(keep >= mine.start * LENGTH) & (keep < mine.stop * LENGTH)] - mine.start * LENGTH
    samples, start = [], 0
    for count in team.counts(WINDOWS):
        end = start + count * LENGTH
        samples.append(int(((keep >= start) & (keep < end)).sum()))
        start = end
    found = add_batch(
        empty_statistics(COLUMNS),
        x[mine],
        keep=own,
        last=False,
        before=mine.start * LENGTH,
    )
    found = statistics_of_all(team, found, team.counts(WINDOWS), LENGTH, samples)
    alone = add_batch(empty_statistics(COLUMNS), x, keep=keep)
    assert found.tokens == alone.tokens
    assert torch.equal(found.sample, alone.sample)
    assert torch.equal(found.window_minimum, alone.window_minimum)
    assert torch.equal(found.window_maximum, alone.window_maximum)
    torch.testing.assert_close(found.gram, alone.gram, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(found.gram, found.gram.T, rtol=0, atol=0)
    torch.testing.assert_close(found.total, alone.total, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(found.mean_abs_sum, alone.mean_abs_sum)
    # all rows are drawn of so few, each once
    rows, weights = weighted_rows(found)
    assert len(rows) == WINDOWS * LENGTH and torch.equal(weights, torch.ones(len(rows)))
    flat = x.reshape(-1, COLUMNS)
    torch.testing.assert_close(rows.sum(0), flat.sum(0), rtol=1e-5, atol=1e-3)
    broken = x.clone()
    # of the last process: all find it
    broken[-1, 3, 2] = torch.nan
    part = add_batch(empty_statistics(COLUMNS), broken[mine], last=False)
    found = statistics_of_all(team, part, team.counts(WINDOWS), LENGTH, [0] * SIZE)
    assert not bool(largest_sum(found).isfinite()), "a NaN of another process was not found"


def searches(team: Team) -> None:
    known = add_batch(empty_statistics(COLUMNS), inputs())
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2))
    problem = GroupProblem([weight], known, SCHEME)
    for count in (1, 2, 5):
        scales = torch.linspace(0.5, 2, count * COLUMNS).reshape(count, COLUMNS)
        transforms = [ChannelTransform(scale) for scale in scales]
        found = errors_of(team)(problem, transforms)
        assert torch.equal(found, output_errors(problem, transforms))
    factors = clip_factors()
    gram_of = lambda: known.gram  # noqa: E731
    asked = {"it": (lambda: weight, gram_of), "half": (lambda: weight[:5], gram_of)}
    clips = clips_of_all(team, SCHEME, asked, factors)
    for name, (weight_of, _) in asked.items():
        expected, errors = search_clip_curve(weight_of(), known.gram, SCHEME, factors)
        assert torch.equal(clips[name][0], expected)
        torch.testing.assert_close(clips[name][1], errors)
    (whole,) = round_group([weight], SCHEME, [None])
    lost = own_energies(team, weight, whole, SCHEME, known.gram)
    torch.testing.assert_close(
        errors_of_all(team, {"it": lost})["it"]["output_error"],
        torch.tensor(
            relative_output_error(weight, dequantize(whole, SCHEME), known.gram),
            dtype=torch.float64,
        ),
    )
    parts = rounded_by_rows(
        team, weight, lambda rows: round_group([weight[rows]], SCHEME, [None])[0]
    )
    assert torch.equal(parts.codes, whole.codes) and torch.equal(parts.scale, whole.scale)
    assert parts.zero_point is None


def main() -> None:
    torch.set_num_threads(1)
    rank = int(sys.argv[1])
    meet(rank, ["cpu"] * SIZE, sys.argv[2])
    team = Team(rank, SIZE)
    exchanges(team)
    statistics(team)
    searches(team)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
