"""The searches' mathematics in plain words, from all rows of activations, in float64.

Slow and independent: no Gram matrix, no statistics, nothing of the code under test.
"""

from __future__ import annotations

import torch
from torch import Tensor

QMAX = {"int4": 7.0, "int8": 127.0, "e4m3": 448.0}


def to_e4m3(x: Tensor) -> Tensor:
    """To three bits behind the leading one, of numbers from 2^-6 on; ties to even."""
    step = torch.exp2((torch.frexp(x).exponent - 1).clamp(min=-6) - 3.0)
    return ((x / step).round() * step).clamp(-448, 448)


def group_weights(weight: Tensor, width: int | None) -> list[Tensor]:
    """Views of a weight (N, K), one for each group of columns; the whole rows without width."""
    return list(weight.split(width or weight.shape[1], dim=1))


def rounded(
    entries: Tensor,
    name: str,
    *,
    symmetric: bool = True,
    clip: float | Tensor = 1.0,
    whole: bool = False,
    scale_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Entries (N, width) after rounding, one scale for each row, or for all if whole."""
    entries = entries.double()
    low, high = entries.amin(1, keepdim=True) * clip, entries.amax(1, keepdim=True) * clip
    if whole:
        low, high = low.amin(), high.amax()
    low, high = low.clamp(max=0), high.clamp(min=0)
    span = torch.maximum(-low, high) if symmetric else high - low
    bits = {"int4": 4, "int8": 8}.get(name, 0)
    if name == "e4m3" or (name == "int8" and symmetric):
        steps = QMAX[name]
    else:
        # 7.5 steps to each side of zero, or 15 from end to end
        steps = (2**bits - 1) / 2 if symmetric else 2**bits - 1
    scale = (span / steps).to(scale_dtype).double()
    scale = torch.where(span == 0, 1.0, scale)
    if name == "e4m3":
        return to_e4m3(entries / scale) * scale
    bottom, top = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    zero = 0.0 if symmetric else (bottom - low / scale).round().clamp(bottom, top)
    codes = ((entries / scale).round() + zero).clamp(bottom, top)
    return (codes - zero) * scale


def rounded_weight(weight: Tensor, name: str, width: int | None = None, **how) -> Tensor:
    """A weight (N, K) rounded group by group; all of it under one scale with whole=True."""
    return torch.cat([rounded(part, name, **how) for part in group_weights(weight, width)], 1)


def rounded_inputs(x: Tensor, kind: str | None) -> Tensor:
    """Inputs (T, K) as a kernel sees them: "int8 token", "e4m3 token", "e4m3 static" or None."""
    if kind is None:
        return x
    x = x.float()
    absmax = x.abs().amax() if kind == "e4m3 static" else x.abs().amax(1, keepdim=True)
    absmax = torch.where(absmax > 0, absmax, 1.0)
    if kind == "int8 token":
        scale = absmax / 127
        steps = x / scale
        return torch.sign(steps) * (steps.abs() + 0.5).floor() * scale
    scale = absmax / 448
    return to_e4m3(x / scale) * scale


def output_loss(
    x: Tensor, weights: list[Tensor], rounding, inputs: str | None = None, shift=0.0, scale=1.0
) -> float:
    """Mean over tokens of the squared error of all outputs, by running every token twice.

    The linears' biases take what the shift moves, so it is left out of both.

    Args:
        x: (T, K).
        weights: (N_i, K).
        rounding: what becomes of the stacked, scaled weights.
        inputs: how the transformed inputs are rounded.
        shift: (K,).
        scale: (K,).
    """
    x, weight = x.double(), torch.cat(weights).double()
    moved = x - shift
    wanted = moved @ weight.T
    found = rounded_inputs(moved / scale, inputs).double() @ rounding(weight * scale).T
    return float((found - wanted).square().sum(1).mean())


def awq_scale(
    x: Tensor, weights: list[Tensor], version: str, ratio: float, width: int | None
) -> Tensor:
    """Factors of one ratio, as the reference computes them from all inputs at once."""
    size = x.double().abs().mean(0)
    size = torch.where(size > 0, size, size[size > 0].min())
    scale = size**ratio
    if version == "v1":
        weight = torch.cat(weights).double().abs()
        parts = [p / p.amax(1, keepdim=True) for p in group_weights(weight, width)]
        scale = scale / torch.cat(parts, 1).mean(0).clamp(min=1e-4) ** (1 - ratio)
    scale = scale.clamp(min=1e-4)
    return scale / (scale.max() * scale.min()).sqrt()
