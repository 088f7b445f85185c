"""OmniQuant (arXiv 2308.13137): clipping and channel scales learned by gradient descent."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.errors import NonFiniteError
from quantizers.number_formats import rounded_to_float8
from quantizers.rounding import expand_scale
from quantizers.scales import weight_scales
from quantizers.schemes import WeightScheme

__all__ = ["Learnable", "clip_of", "fake_quantize", "learn", "starting_logits"]

# sigmoid(4) = .982, the paper's start: a factor of exactly 1 has no gradient
_START = 4.0


@dataclass(frozen=True, eq=False)
class Learnable:
    """Parameters with one learning rate.

    Attributes:
        parameters: float32 leaves that require gradients; changed in place by learn.
        learning_rate: AdamW's.
    """

    parameters: Sequence[Tensor]
    learning_rate: float


def starting_logits(factors: Tensor) -> Tensor:
    """Logits whose sigmoid is a clip factor, none above the paper's start.

    A factor that a search left at 1 would start at infinity, where nothing is learned.

    Args:
        factors: in (0, 1], any shape.

    Returns:
        float32, the same shape, a leaf that requires a gradient.
    """
    logits = torch.logit(factors.detach().to(torch.float32), eps=1e-6).clamp(max=_START)
    return logits.requires_grad_()


def clip_of(logits: Tensor) -> Tensor:
    """The clip factors (equation 2) of logits: their sigmoid."""
    return torch.sigmoid(logits)


def fake_quantize(weight: Tensor, scheme: WeightScheme, low: Tensor, high: Tensor) -> Tensor:
    """A weight after rounding, with gradients: rounding passes them straight through.

    The values are those of dequantize(quantize_weight(...)) with scales from clipped extremes.
    Gradients reach the weight and, through the scales, both factors.

    Args:
        weight: (N, K), floating point.
        scheme: the scheme.
        low: factors on the lower extremes, scheme.scale_shape(N, K).
        high: on the upper ones.

    Returns:
        (N, K) float32.
    """
    work, number = weight.to(torch.float32), scheme.number_format
    scale, zero = weight_scales(work, scheme, clip_low=low, clip_high=high)
    per_entry = expand_scale(scale, scheme, *work.shape).to(torch.float32)
    levels = work / per_entry
    if number.is_float:
        levels = levels.clamp(number.qmin, number.qmax)
        exact = rounded_to_float8(levels.detach(), number)
        return (levels + (exact - levels).detach()) * per_entry
    offset = 0.0 if zero is None else expand_scale(zero, scheme, *work.shape).to(torch.float32)
    levels = levels + (levels.round() - levels).detach()
    levels = torch.clamp(levels + offset, number.qmin, number.qmax) - offset
    return levels * per_entry


def learn(
    learnable: Sequence[Learnable],
    loss_of: Callable[[int], Tensor],
    batches: int,
    *,
    epochs: int,
    weight_decay: float = 0.0,
) -> list[float]:
    """Minimize a loss with AdamW, all batches in their order in every epoch; keep what was best.

    The loss is measured before the first step and after every epoch: rounding jumps where
    gradients see a slope, so that a start that a search has found may be better than all that
    follows.

    Args:
        learnable: what is learned, changed in place.
        loss_of: the scalar loss of a batch by its number, under the parameters as they are.
        batches: how many there are.
        epochs: passes over all batches.
        weight_decay: AdamW's.

    Returns:
        the mean loss before the first epoch and after each: epochs + 1 numbers. The parameters are
        those of the least of them.

    Raises:
        NonFiniteError: a loss is NaN or infinite; the parameters are those of the least so far.
    """
    optimizer = torch.optim.AdamW(
        [{"params": list(part.parameters), "lr": part.learning_rate} for part in learnable],
        weight_decay=weight_decay,
    )
    leaves = [leaf for part in learnable for leaf in part.parameters]
    best = [leaf.detach().clone() for leaf in leaves]
    try:
        losses = [_mean_loss(loss_of, batches)]
        for epoch in range(epochs):
            for batch in range(batches):
                optimizer.zero_grad()
                loss = loss_of(batch)
                _require_finite(float(loss.detach()), epoch)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            losses.append(_mean_loss(loss_of, batches, epoch))
            if losses[-1] == min(losses):
                best = [leaf.detach().clone() for leaf in leaves]
    finally:
        with torch.no_grad():
            for leaf, value in zip(leaves, best, strict=True):
                leaf.copy_(value)
    return losses


@torch.no_grad()
def _mean_loss(loss_of: Callable[[int], Tensor], batches: int, epoch: int = 0) -> float:
    losses = [float(loss_of(batch)) for batch in range(batches)]
    for loss in losses:
        _require_finite(loss, epoch)
    return sum(losses) / batches


def _require_finite(loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise NonFiniteError(f"the loss is {loss} in epoch {epoch + 1}")
