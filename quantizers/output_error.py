"""The output error of a group of linears under a transform: what the searches minimize.

With inputs x, weights W, a transform x' = (x - shift) / scale, W' = W scale, codes R of W' and
quantized inputs q(x'), the outputs differ by R q(x') - W' x' = (R - W') x' + R (q(x') - x').

- The first part is the weights'. Its mean square over all tokens is tr((R - W') H' (R - W')^T)
  with H' the Gram matrix of x': exact, without the inputs.
- What the second part adds, its square and twice its product with the first, depends on each
  token's range. It is measured on the sampled rows, which are really quantized.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.activations import quantize_dequantize_activation
from quantizers.channel_transform import (
    ChannelTransform,
    transformed_absmax,
    transformed_gram,
    transformed_sample,
)
from quantizers.input_scales import InputRange, static_input_scale
from quantizers.rounding import dequantize, quantize_weight, weight_scales
from quantizers.schemes import ActivationScheme, WeightScheme
from quantizers.statistics import InputStatistics

__all__ = ["GroupProblem", "group_input_scale", "output_error"]


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
        """All weights as one (N, K), float32."""
        return torch.cat([weight.to(torch.float32) for weight in self.weights])


def output_error(problem: GroupProblem, transform: ChannelTransform) -> Tensor:
    """Mean over tokens of the squared error of all outputs, estimated as the module says.

    Returns:
        scalar, float64, on the device of the statistics.
    """
    scaled = problem.stacked().mul_(transform.scale)
    scale, zero_point = weight_scales(scaled, problem.weight_scheme)
    codes = quantize_weight(scaled, scale, zero_point, problem.weight_scheme)
    restored = dequantize(codes, problem.weight_scheme)
    difference = restored - scaled
    gram = transformed_gram(problem.statistics, transform)
    # rows in float32, their sum in float64
    error = torch.mm(difference, gram).mul_(difference).sum(1).to(torch.float64).sum()
    if problem.activation_scheme is None:
        return error
    rows = transformed_sample(problem.statistics, transform)
    quantized = quantize_dequantize_activation(
        rows, problem.activation_scheme, scale=group_input_scale(problem, transform)
    )
    by_inputs = (quantized - rows) @ restored.t()
    by_weights = rows @ difference.t()
    added = by_inputs.mul(by_weights.mul_(2.0).add_(by_inputs)).sum(1)
    return error + added.to(torch.float64).sum() / max(rows.shape[0], 1)


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
