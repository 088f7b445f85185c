"""What is computed once for all processes of a team: each its part, and all have the whole."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantizers.channel_transform import ChannelTransform
from quantizers.clipping import search_clip_curve
from quantizers.losses import energy_ratio
from quantizers.output_error import Errors, GroupProblem, output_errors
from quantizers.rounding import QuantizedWeight
from quantizers.rounding_losses import rounding_energies
from quantizers.schemes import Granularity, WeightScheme
from quantizers.statistics import (
    InputStatistics,
    WeightedRows,
    completed,
    drawn_rows,
    heaviest,
    written_parts,
)
from tasks.engine.team import Team


def errors_of(team: Team) -> Errors:
    """``output_errors``, of whose candidates each process takes some."""

    def errors(problem: GroupProblem, transforms: Sequence[ChannelTransform]) -> Tensor:
        own = transforms[team.own(len(transforms))]
        found = (
            output_errors(problem, own)
            if own
            else torch.zeros(0, dtype=torch.float64, device=team.device)
        )
        return team.joined(found, team.counts(len(transforms)))

    return output_errors if team.size == 1 else errors


def splits(team: Team, scheme: WeightScheme, rows: int) -> bool:
    """Whether rows of a weight are rounded apart from each other, and each process has some."""
    apart = scheme.granularity in (Granularity.GROUP, Granularity.CHANNEL)
    return team.size > 1 and apart and rows >= team.size


def clips_of_all(
    team: Team,
    scheme: WeightScheme,
    asked: Mapping[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]],
    factors: Tensor,
) -> dict[str, tuple[Tensor, Tensor]]:
    """``search_clip_curve`` of weights, of whose rows each process takes some where they are apart.

    What was found is exchanged at once.

    Args:
        team: the processes.
        scheme: the weights'.
        asked: what gives each weight, and the Gram matrix of its inputs.
        factors: that are tried.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    counts: dict[str, list[int]] = {}
    for name, (weight_of, gram_of) in asked.items():
        weight = weight_of()
        rows = len(weight)
        if splits(team, scheme, rows):
            counts[name] = team.counts(rows)
            weight = weight[team.own(rows)]
        found[name] = search_clip_curve(weight, gram_of(), scheme, factors)
    apart = [member for name in counts for member in (found[name][0], found[name][1][None])]
    ones = [1] * team.size
    joined = team.all_joined(apart, [c for own in counts.values() for c in (own, ones)])
    for name, chosen, curves in zip(counts, joined[::2], joined[1::2], strict=True):
        found[name] = chosen, functools.reduce(torch.add, curves)
    return found


def own_energies(
    team: Team,
    weight: Tensor,
    quantized: QuantizedWeight,
    scheme: WeightScheme,
    gram: Tensor | None,
    inverse: Tensor | None = None,
) -> dict[str, Tensor]:
    """Energies (2,) float64 of what this process's rows of a weight lose, and of themselves.

    Of the weight, and of its outputs where a Gram matrix is given, as rounding_energies takes it.
    """
    own = team.own(len(weight))
    weights, outputs = rounding_energies(weight, quantized, scheme, own, gram, inverse)
    return {"weight_error": weights} | ({} if outputs is None else {"output_error": outputs})


def errors_of_all(
    team: Team, energies: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """The relative errors of linears, scalars, from own_energies of each: exchanged at once."""
    names = [(linear, kind) for linear, kinds in energies.items() for kind in kinds]
    if not names:
        return {}
    table = team.summed_(torch.stack([energies[linear][kind] for linear, kind in names]))
    ratios = dict(zip(names, energy_ratio(table.t()), strict=True))
    return {
        linear: {kind: ratios[linear, kind] for kind in kinds} for linear, kinds in energies.items()
    }


def rounded_by_rows(
    team: Team, weight: Tensor, compute: Callable[[slice], QuantizedWeight]
) -> QuantizedWeight:
    """Codes of a weight (N, K), of whose rows each process finds some.

    Args:
        team: the processes.
        weight: the whole one.
        compute: gives the codes of some rows; scales and zero points have as many.
    """
    counts = team.counts(len(weight))
    found = compute(team.own(len(weight)))
    zero = found.zero_point
    return replace(
        found,
        codes=team.joined(found.codes, counts),
        scale=team.joined(found.scale, counts),
        zero_point=None if zero is None else team.joined(zero, counts),
    )


def statistics_of_all(
    team: Team, own: InputStatistics, windows: Sequence[int], length: int, samples: Sequence[int]
) -> InputStatistics:
    """Statistics of the inputs that all processes saw; of the own ones what is summed is used up.

    Nothing is refused.

    Args:
        team: the processes.
        own: of this one's inputs, before they are checked.
        windows: of each process.
        length: tokens of a window.
        samples: rows that each process keeps.
    """
    drawn = [drawn_rows(count * length) if len(own.drawn.rows) else 0 for count in windows]
    sums = torch.stack((own.total, own.mean_abs_sum))[None]
    extremes = torch.cat((own.window_minimum, own.window_maximum), 1)
    sums, extremes, sample, *of_drawn = team.all_joined(
        [sums, extremes, own.sample, own.drawn.rows, own.drawn.sizes, own.drawn.priorities],
        [[1] * team.size, windows, samples, *[drawn] * 3],
    )
    total, mean_abs_sum = functools.reduce(torch.add, sums)
    low, high = extremes.chunk(2, 1)
    for part in written_parts(own.gram):
        part.copy_(team.summed_(part.contiguous()))
    return completed(
        InputStatistics(
            gram=own.gram,
            total=total,
            mean_abs_sum=mean_abs_sum,
            window_minimum=low,
            window_maximum=high,
            sample=sample,
            drawn=heaviest(WeightedRows(*of_drawn)),
            tokens=sum(windows) * length,
        )
    )
