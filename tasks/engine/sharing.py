"""What is computed once for all processes of a team: each its part, and all have the whole."""

from __future__ import annotations

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
from quantizers.statistics import InputStatistics, WeightedRows, completed, drawn_rows, heaviest
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


def clip_of(
    team: Team, weight: Tensor, gram: Tensor, scheme: WeightScheme, factors: Tensor
) -> tuple[Tensor, Tensor]:
    """``search_clip_curve``, of whose rows each process takes some where they are apart."""
    rows = len(weight)
    if not splits(team, scheme, rows):
        return search_clip_curve(weight, gram, scheme, factors)
    chosen, curve = search_clip_curve(weight[team.own(rows)], gram, scheme, factors)
    return team.joined(chosen, team.counts(rows)), team.summed_(curve.to(team.device))


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
    extremes = team.joined(torch.cat((own.window_minimum, own.window_maximum), 1), windows)
    low, high = extremes.chunk(2, 1)
    drawn = [drawn_rows(count * length) if len(own.drawn.rows) else 0 for count in windows]
    return completed(
        InputStatistics(
            gram=team.summed_(own.gram),
            total=team.summed_(own.total),
            mean_abs_sum=team.summed_(own.mean_abs_sum),
            window_minimum=low,
            window_maximum=high,
            sample=team.joined(own.sample, samples),
            drawn=heaviest(
                WeightedRows(
                    team.joined(own.drawn.rows, drawn),
                    team.joined(own.drawn.sizes, drawn),
                    team.joined(own.drawn.priorities, drawn),
                )
            ),
            tokens=sum(windows) * length,
        )
    )
