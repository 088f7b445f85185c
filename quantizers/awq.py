"""AWQ (arXiv 2306.00978): factors per channel, searched over powers of the inputs' size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from quantizers.channel_transform import ChannelTransform
from quantizers.output_error import Errors, GroupProblem, output_errors
from quantizers.schemes import Granularity, WeightScheme
from quantizers.statistics import InputStatistics

__all__ = [
    "AwqVersion",
    "ImportanceMeasure",
    "Trial",
    "Tried",
    "candidate_scales",
    "importance",
    "search",
]

_SMALLEST = 1e-4
# halvings of the grid's step around its best ratio
_REFINEMENTS = 2


class AwqVersion(StrEnum):
    """V1: x^r / w^(1 - r); V2: x^r. x is the inputs' size, w that of the weights in a group."""

    V1 = "v1"
    V2 = "v2"


class ImportanceMeasure(StrEnum):
    """How the size of a channel's inputs is measured."""

    MEAN_ABS = "mean_abs"
    ROOT_MEAN_SQUARE = "root_mean_square"


@dataclass(frozen=True)
class Trial:
    """One point of the search: mean squared output error per token."""

    version: str
    ratio: float
    error: float


@dataclass(frozen=True, eq=False)
class Tried:
    """What a search tried, its errors still on their device.

    Attributes:
        points: version and ratio of each.
        errors: (n,) float64.
    """

    points: Sequence[tuple[str, float]]
    errors: Tensor

    def trials(self) -> list[Trial]:
        """All of it, for which the device is waited for."""
        errors = self.errors.tolist()
        return [Trial(*point, error) for point, error in zip(self.points, errors, strict=True)]


def search(
    problem: GroupProblem,
    realize: Callable[[Tensor], Tensor],
    *,
    versions: Sequence[AwqVersion] = (AwqVersion.V2,),
    measure: ImportanceMeasure = ImportanceMeasure.MEAN_ABS,
    ratios: int = 20,
    refine: bool = False,
    errors_of: Errors = output_errors,
) -> tuple[ChannelTransform, Tried]:
    """The factors with the least output error, and everything that was tried.

    Args:
        problem: the linears and their inputs.
        realize: turns wanted factors (R, K) into those that can be folded.
        versions: tried each; the first of equals wins.
        measure: of the inputs' size.
        ratios: r = 0, 1/ratios, ... below 1.
        refine: whether to halve the step around the best ratio of each version, twice, for which
            the device is waited for; without, nothing waits for it.
        errors_of: what gives the output errors of candidates, (R,) float64.
    """
    sizes = importance(problem.statistics, measure)
    weights = None
    if AwqVersion.V1 in versions:
        weights = weight_importance(problem.stacked(), problem.weight_scheme)
    points: list[tuple[str, float]] = []
    scales: list[Tensor] = []
    errors: list[Tensor] = []

    def attempt(version: AwqVersion, tried: Sequence[float]) -> None:
        wanted = realize(candidate_scales(sizes, weights, version, tried))
        points.extend((version.value, ratio) for ratio in tried)
        scales.append(wanted)
        errors.append(errors_of(problem, [ChannelTransform(scale) for scale in wanted]))

    for version in versions:
        first, width = len(errors), 1 / ratios
        attempt(version, [step / ratios for step in range(ratios)])
        for _ in range(_REFINEMENTS if refine else 0):
            width /= 2
            known = torch.cat(errors[first:])
            own = points[len(points) - len(known) :]
            _, best = own[int(_least(known))]
            beside = (best - width, best + width)
            attempt(version, [ratio for ratio in beside if 0 <= ratio <= 1])
    found = torch.cat(errors)
    # a copy: a part of what all were would keep the whole
    scale = torch.cat(scales).index_select(0, _least(found).reshape(1)).squeeze(0)
    return ChannelTransform(scale), Tried(points, found)


def _least(errors: Tensor) -> Tensor:
    """The number of the least error, the first of equals; NaN is none."""
    return errors.nan_to_num(torch.inf, torch.inf, -torch.inf).argmin()


def importance(statistics: InputStatistics, measure: ImportanceMeasure) -> Tensor:
    """The size of each channel's inputs, (K,) float32; 0 for a channel that was always zero."""
    tokens = max(statistics.tokens, 1)
    if measure is ImportanceMeasure.MEAN_ABS:
        return statistics.mean_abs_sum / tokens
    return (statistics.gram.diagonal() / tokens).clamp(min=0.0).sqrt()


def weight_importance(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """Mean over rows of |W| / (the largest |W| that shares its scale in the row), (K,) float32."""
    width = weight.shape[1] if scheme.granularity is Granularity.TENSOR else None
    width = width or min(scheme.width(weight.shape[1]), weight.shape[1])
    parts = torch.split(weight.abs().to(torch.float32), width, dim=1)
    # part by part: no second matrix lies beside the weights
    return torch.cat([(p / p.amax(1, keepdim=True).clamp(min=_TINY)).mean(0) for p in parts])


_TINY = torch.finfo(torch.float32).tiny


def candidate_scales(
    sizes: Tensor, weights: Tensor | None, version: AwqVersion, ratios: Sequence[float]
) -> Tensor:
    """Factors of some ratios, clamped at 1e-4 and divided by sqrt(largest * smallest) of each.

    A channel whose inputs were always zero says nothing of itself: it is taken as the smallest
    that was seen, since what is never zero in use must not vanish.

    Args:
        sizes: (K,) the inputs' sizes.
        weights: (K,) the weights' sizes, for V1 only.
        version: the formula.
        ratios: r in [0, 1], R of them.

    Returns:
        (R, K) float32, positive.
    """
    seen = sizes > 0
    least = torch.where(seen, sizes, torch.full_like(sizes, torch.inf)).amin()
    sizes = torch.where(seen, sizes, torch.where(least.isfinite(), least, torch.ones_like(least)))
    scale = torch.stack([sizes.pow(ratio) for ratio in ratios])
    if version is AwqVersion.V1:
        if weights is None:
            raise ValueError("version v1 needs the weights' sizes")
        weights = weights.clamp(min=_SMALLEST)
        scale = scale / torch.stack([weights.pow(1 - ratio) for ratio in ratios])
    scale = scale.clamp(min=_SMALLEST)
    return scale / (scale.amax(1, keepdim=True) * scale.amin(1, keepdim=True)).sqrt()
