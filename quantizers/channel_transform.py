"""Moving a factor and an offset per channel from a linear's inputs into its weights.

The inputs x of a group of linears become (x - shift) / scale, their weights W become W * scale and
their biases take W shift, so the outputs stay what they were. The factor and the offset are folded
into what makes the inputs: a norm, or the linear before.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.statistics import InputStatistics

__all__ = [
    "ChannelTransform",
    "absorbed_shift",
    "expand_to_heads",
    "fold_into_bias",
    "fold_into_linear",
    "fold_into_norm",
    "gram_blocks",
    "nearest_power_of_two",
    "norm_scale",
    "scale_columns",
    "share_between_heads",
    "transformed_absmax",
    "transformed_gram",
    "transformed_gram_blocks",
    "transformed_rows",
    "transformed_sample",
]


@dataclass(frozen=True, eq=False)
class ChannelTransform:
    """The map x -> (x - shift) / scale of the inputs of a group of linears.

    Attributes:
        scale: (K,) float32, positive.
        shift: (K,) float32, or None for none.
    """

    scale: Tensor
    shift: Tensor | None = None


def transformed_gram(statistics: InputStatistics, transform: ChannelTransform) -> Tensor:
    """The Gram matrix H = X^T X / T of the transformed inputs, (K, K) float32."""
    gram = statistics.gram
    if transform.shift is not None:
        shift, total = transform.shift, statistics.total
        mixed = torch.outer(total, shift)
        gram = (gram - mixed).sub_(mixed.t())
        gram.add_(torch.outer(shift, shift).mul_(statistics.tokens))
    inverse = 1.0 / transform.scale
    # in place: of wide inputs each more matrix counts
    return (gram * inverse[:, None]).mul_(inverse[None, :] / max(statistics.tokens, 1))


def transformed_gram_blocks(
    statistics: InputStatistics, transform: ChannelTransform, width: int
) -> Tensor:
    """The blocks on the diagonal of transformed_gram, (K / width, width, width) float32.

    Args:
        statistics: of the inputs.
        transform: of them.
        width: divides K.
    """
    gram = gram_blocks(statistics.gram, width)
    if transform.shift is not None:
        shift, total = (v.reshape(-1, width) for v in (transform.shift, statistics.total))
        mixed = total[:, :, None] * shift[:, None, :]
        gram = (gram - mixed).sub_(mixed.mT)
        gram.add_((shift[:, :, None] * shift[:, None, :]).mul_(statistics.tokens))
    inverse = (1.0 / transform.scale).reshape(-1, width)
    scaled = gram * inverse[:, :, None]
    return scaled.mul_(inverse[:, None, :] / max(statistics.tokens, 1))


def gram_blocks(gram: Tensor, width: int) -> Tensor:
    """The blocks on the diagonal of a matrix (K, K): (K / width, width, width), a view."""
    count = len(gram) // width
    return gram.reshape(count, width, count, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def transformed_sample(statistics: InputStatistics, transform: ChannelTransform) -> Tensor:
    """The sampled rows of the transformed inputs, (m, K) float32."""
    return transformed_rows(statistics.sample, transform)


def transformed_rows(rows: Tensor, transform: ChannelTransform) -> Tensor:
    """Rows (m, K) of inputs after the transform, float32."""
    rows = rows.to(torch.float32)
    return (rows if transform.shift is None else rows - transform.shift) / transform.scale


def transformed_absmax(statistics: InputStatistics, transform: ChannelTransform) -> Tensor:
    """The largest transformed |x| of each channel in each window, (W, K) float32."""
    low, high = statistics.window_minimum, statistics.window_maximum
    if transform.shift is not None:
        low, high = low - transform.shift, high - transform.shift
    return torch.maximum(high, -low).clamp(min=0.0) / transform.scale


def norm_scale(scale: Tensor, weight: Tensor, dtype: torch.dtype, offset: float = 0.0) -> Tensor:
    """The factors nearest to ``scale`` that a norm can take exactly.

    A norm's weight is stored in few bits: the folded weight is rounded to them, and the factor
    that comes out of it is what the following weights are multiplied with.

    Args:
        scale: (..., K) float32, positive: the factors that are wanted.
        weight: (K,) the norm's weight as stored.
        dtype: what the folded weight is stored in.
        offset: 1 where the norm multiplies by 1 + weight, as Gemma's do.

    Returns:
        (..., K) float32; as asked where the norm's factor is zero, 1 where its dtype cannot hold
        what is asked.
    """
    factor = weight.to(torch.float32) + offset
    exact, usable = _exact_scale(factor, scale, dtype, offset)
    # what the dtype cannot hold stays as it was
    unscaled, _ = _exact_scale(factor, torch.ones_like(scale), dtype, offset)
    return torch.where(usable, exact, torch.where(factor == 0, scale, unscaled))


def _exact_scale(
    factor: Tensor, scale: Tensor, dtype: torch.dtype, offset: float
) -> tuple[Tensor, Tensor]:
    folded = _folded(factor, scale, dtype, offset).to(torch.float32) + offset
    usable = folded.isfinite() & (folded != 0) & (factor.sign() == folded.sign())
    exact = factor / torch.where(usable, folded, torch.ones_like(folded))
    return torch.where(usable, exact, torch.ones_like(exact)), usable


def fold_into_norm(
    weight: Tensor, transform: ChannelTransform, dtype: torch.dtype, offset: float = 0.0
) -> Tensor:
    """The weight (K,) in ``dtype`` of a norm whose output is divided by the scale."""
    return _folded(weight.to(torch.float32) + offset, transform.scale, dtype, offset)


def _folded(factor: Tensor, scale: Tensor, dtype: torch.dtype, offset: float) -> Tensor:
    return (factor / scale - offset).to(dtype)


def fold_into_linear(weight: Tensor, transform: ChannelTransform) -> Tensor:
    """The weight (N, K) float32 of a linear whose outputs (N,) are divided by the scale."""
    # in float32 by its factor: one pass over a weight in fewer bits
    return (weight / transform.scale[:, None]).to(torch.float32)


def fold_into_bias(bias: Tensor, transform: ChannelTransform) -> Tensor:
    """The bias (N,) float32 of a norm or linear whose output is shifted and divided."""
    bias = bias.to(torch.float32)
    return (bias if transform.shift is None else bias - transform.shift) / transform.scale


def scale_columns(weight: Tensor, transform: ChannelTransform) -> Tensor:
    """The weight (N, K) float32 of a linear whose inputs are divided by the scale."""
    return (weight * transform.scale).to(torch.float32)


def absorbed_shift(weight: Tensor, transform: ChannelTransform) -> Tensor:
    """What a linear's bias (N,) gains when its inputs are shifted: W shift, float32.

    Args:
        weight: (N, K), before its columns are scaled.
        transform: with a shift.
    """
    if transform.shift is None:
        raise ValueError("the transform has no shift")
    return weight.to(torch.float32) @ transform.shift


def share_between_heads(values: Tensor, channels: int, head_dim: int, how: str) -> Tensor:
    """One value per key-value channel of values (..., K) per channel of all query heads.

    Under grouped-query attention each key-value head feeds the same number of neighbouring query
    heads, so the factors of their inputs have to be the same.

    Args:
        values: (..., K), K = query heads * head_dim.
        channels: key-value heads * head_dim.
        head_dim: size of a head.
        how: "mean", "max" or "min" over the query heads that share a channel.

    Returns:
        (..., channels).

    Raises:
        ValueError: sizes that do not fit, or an unknown way.
    """
    if channels % head_dim or values.shape[-1] % channels:
        given = f"{values.shape[-1]} channels"
        raise ValueError(f"{given} do not fall into heads of {head_dim} that share {channels}")
    heads = torch.unflatten(values, -1, (channels // head_dim, -1, head_dim))
    if how == "mean":
        return torch.flatten(heads.mean(-2), -2)
    if how not in ("max", "min"):
        raise ValueError(f"{how} is no way to share: use mean, max or min")
    return torch.flatten(heads.amax(-2) if how == "max" else heads.amin(-2), -2)


def expand_to_heads(values: Tensor, columns: int, head_dim: int) -> Tensor:
    """The inverse of :func:`share_between_heads`: (..., columns), equal values for sharers."""
    repeats = columns // values.shape[-1]
    heads = torch.unflatten(values, -1, (-1, 1, head_dim))
    return torch.flatten(heads.expand(*heads.shape[:-2], repeats, head_dim), -3)


def nearest_power_of_two(scale: Tensor) -> Tensor:
    """The power of two nearest to each factor: dividing a weight by one rounds nothing."""
    return torch.exp2(torch.log2(scale).round())
