"""The output error of a group of linears under a transform: what the searches minimize.

With inputs x, weights W, a transform x' = (x - shift) / scale, W' = W scale, codes R of W' and
quantized inputs q(x'), the outputs differ by R q(x') - W' x' = (R - W') x' + R (q(x') - x').

- The first part is the weights'. Its mean square over all tokens is tr((R - W') H' (R - W')^T)
  with H' the Gram matrix of x': exact, without the inputs.
- What the second part adds, its square and twice its product with the first, depends on each
  token's range. It is measured on some hundred rows, which are really quantized: drawn the
  likelier the larger they are, and weighted so that the estimate has no bias.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.activations import quantize_dequantize_activation
from quantizers.channel_transform import (
    ChannelTransform,
    transformed_absmax,
    transformed_gram,
    transformed_rows,
    transformed_sample,
)
from quantizers.devices import compiles_kernels
from quantizers.input_scales import InputRange, static_input_scale
from quantizers.losses import row_errors
from quantizers.rounding import quantize_dequantize_weight
from quantizers.scales import scales_of, weight_scales
from quantizers.schemes import ActivationScheme, Granularity, WeightScheme
from quantizers.statistics import InputStatistics, weighted_rows

__all__ = [
    "DEVICE_ENTRIES",
    "Errors",
    "GroupProblem",
    "group_input_scale",
    "output_error",
    "output_errors",
]

# Entries worked on at once: rows that stay in a CPU's cache are tried several times faster.
_CPU_ENTRIES = 1 << 20
DEVICE_ENTRIES = 1 << 27
# Columns of a product: a Gram matrix's blocks left of the diagonal are not multiplied.
_PRODUCT_COLUMNS = 2048


@dataclass(frozen=True, eq=False)
class GroupProblem:
    """A group of linears that share their inputs, and how both are to be quantized.

    Attributes:
        weights: (N_i, K) of each linear, floating point.
        statistics: of the inputs (K,).
        weight_scheme: the weights' scheme; with one scale per tensor all linears share it.
        activation_scheme: the inputs' scheme, None where they are not quantized.
        input_range: what a static scale of the inputs covers.
        percentile: for InputRange.PERCENTILE.
    """

    weights: Sequence[Tensor]
    statistics: InputStatistics
    weight_scheme: WeightScheme
    activation_scheme: ActivationScheme | None = None
    input_range: InputRange = InputRange.MINMAX
    percentile: float = 99.99

    @property
    def columns(self) -> int:
        """K, the number of input channels."""
        return int(self.weights[0].shape[1])

    def stacked(self) -> Tensor:
        """All weights as one (N, K), float32; made once."""
        return self._stacked

    @functools.cached_property
    def _stacked(self) -> Tensor:
        return torch.cat([weight.to(torch.float32) for weight in self.weights])

    @functools.cached_property
    def as_stored(self) -> Tensor:
        """All weights as one (N, K) in their own dtype."""
        return torch.cat(list(self.weights)) if len(self.weights) > 1 else self.weights[0]

    @functools.cached_property
    def one_sided_gram(self) -> Tensor:
        """H in bfloat16 (K, K), what lies right of a diagonal block doubled: see row_errors.

        What lies left of one is not written, and nothing reads it.
        """
        gram = self.statistics.gram
        found = torch.empty_like(gram, dtype=torch.bfloat16)
        for block in _column_blocks(self.columns):
            part = gram[: block.stop, block] / max(self.statistics.tokens, 1)
            part[: block.start] *= 2.0
            found[: block.stop, block] = part
        return found


# of a group, the output errors of some transforms, (R,) float64
Errors = Callable[[GroupProblem, Sequence[ChannelTransform]], Tensor]


def output_error(problem: GroupProblem, transform: ChannelTransform) -> Tensor:
    """Mean over tokens of the squared error of all outputs, estimated as the module says.

    Returns:
        scalar, float64, on the device of the statistics.
    """
    return output_errors(problem, [transform])[0]


def output_errors(problem: GroupProblem, transforms: Sequence[ChannelTransform]) -> Tensor:
    """output_error of each of some transforms, (R,) float64; nothing waits for the device."""
    alone = all(_weights_alone(problem, transform) for transform in transforms)
    number = problem.weight_scheme.number_format
    if alone and compiles_kernels(problem.weights[0], number):
        return _errors_of_weights(problem, torch.stack([t.scale for t in transforms]))
    return torch.stack([_output_error(problem, transform) for transform in transforms])


def _output_error(problem: GroupProblem, transform: ChannelTransform) -> Tensor:
    gram = transformed_gram(problem.statistics, transform)
    rows = lost = weights = None
    if problem.activation_scheme is not None:
        kept, weights = weighted_rows(problem.statistics)
        rows = transformed_rows(kept, transform)
        step = group_input_scale(problem, transform)
        lost = quantize_dequantize_activation(rows, problem.activation_scheme, scale=step) - rows
    error = torch.zeros((), dtype=torch.float64, device=gram.device)
    for scaled in _scaled_parts(problem, transform):
        scale, zero_point = weight_scales(scaled, problem.weight_scheme)
        restored = quantize_dequantize_weight(scaled, scale, zero_point, problem.weight_scheme)
        difference = torch.sub(restored, scaled, out=scaled)
        # rows in float32, their sum in float64
        error += row_errors(difference, gram).to(torch.float64).sum()
        if rows is not None and lost is not None and weights is not None:
            by_inputs, by_weights = lost @ restored.t(), rows @ difference.t()
            added = by_inputs.mul(by_weights.mul_(2.0).add_(by_inputs)).sum(1)
            error += added.mul_(weights).to(torch.float64).sum() / problem.statistics.tokens
    return error


def _weights_alone(problem: GroupProblem, transform: ChannelTransform) -> bool:
    """Whether only weights are rounded, row by row, and nothing is shifted."""
    by_row = problem.weight_scheme.granularity in (Granularity.GROUP, Granularity.CHANNEL)
    return problem.activation_scheme is None and transform.shift is None and by_row


def _errors_of_weights(problem: GroupProblem, factors: Tensor) -> Tensor:
    """output_errors of weights alone under factors (R, K), by kernels: bf16 factors, float32 sums.

    With D = (R - W') / factor the error is tr(D H D^T), H as it was collected: what the factor
    does to H is not computed for every factor.
    """
    from quantizers.scales_kernel import group_extremes
    from quantizers.search_kernel import add_row_dots_, rounding_loss

    scheme, columns = problem.weight_scheme, problem.columns
    width, number = scheme.width(columns), scheme.number_format
    errors = torch.zeros(len(factors), dtype=torch.float64, device=factors.device)
    # of each block of columns, what is multiplied with all columns up to its end
    grams = [(b, problem.one_sided_gram[: b.stop, b]) for b in _column_blocks(columns)]
    for part in torch.split(problem.as_stored, max(1, DEVICE_ENTRIES // columns)):
        scale, zero = scales_of(group_extremes(part, factors, width), scheme)
        # as many factors at once as rows leave room for
        step = max(1, DEVICE_ENTRIES // part.numel())
        found = torch.zeros(len(factors), len(part), device=factors.device)
        for start in range(0, len(factors), step):
            own = slice(start, start + step)
            zeros = None if zero is None else zero[own]
            lost = rounding_loss(part, factors[own], scale[own], zeros, width, number)
            lost, sums = lost.flatten(0, 1), found[own].flatten()
            for block, gram in grams:
                product = torch.mm(lost[:, : block.stop], gram, out_dtype=torch.float32)
                add_row_dots_(sums, product, lost[:, block])
        errors += found.sum(1, dtype=torch.float64)
    return errors


def _column_blocks(columns: int) -> list[slice]:
    starts = range(0, columns, _PRODUCT_COLUMNS)
    return [slice(start, min(start + _PRODUCT_COLUMNS, columns)) for start in starts]


def _scaled_parts(problem: GroupProblem, transform: ChannelTransform) -> Iterator[Tensor]:
    """The scaled weights in parts (n, K) float32 whose scales are their own: rows, or blocks."""
    stacked = problem.stacked()
    if problem.weight_scheme.granularity in (Granularity.TENSOR, Granularity.BLOCK):
        yield stacked * transform.scale
        return
    entries = _CPU_ENTRIES if stacked.device.type == "cpu" else DEVICE_ENTRIES
    for part in torch.split(stacked, max(1, entries // stacked.shape[1])):
        yield part * transform.scale


def group_input_scale(problem: GroupProblem, transform: ChannelTransform) -> Tensor | None:
    """The group's static input scale, float32 (1,), or None where scales are dynamic."""
    scheme = problem.activation_scheme
    if scheme is None or scheme.dynamic:
        return None
    return static_input_scale(
        transformed_absmax(problem.statistics, transform),
        transformed_sample(problem.statistics, transform),
        scheme.number_format,
        problem.input_range,
        problem.percentile,
    )
