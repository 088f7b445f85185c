"""OmniQuant (arXiv 2308.13137): clipping and channel scales learned by gradient descent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.errors import NonFiniteError
from quantizers.rounding import expand_scale, weight_scales
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
        exact = levels.detach().to(number.code_dtype).to(torch.float32)
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
    """Minimize a loss with AdamW, all batches in their order in every epoch.

    Args:
        learnable: what is learned, changed in place; the caller keeps a copy of the start.
        loss_of: the scalar loss of a batch by its number, under the parameters as they are.
        batches: how many there are.
        epochs: passes over all batches.
        weight_decay: AdamW's.

    Returns:
        the mean loss of every epoch, each batch's before its step.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    optimizer = torch.optim.AdamW(
        [{"params": list(part.parameters), "lr": part.learning_rate} for part in learnable],
        weight_decay=weight_decay,
    )
    losses: list[float] = []
    for epoch in range(epochs):
        total = 0.0
        for batch in range(batches):
            optimizer.zero_grad()
            loss = loss_of(batch)
            value = float(loss.detach())
            if not torch.isfinite(loss.detach()):
                raise NonFiniteError(f"the loss is {value} in epoch {epoch + 1}")
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += value
        losses.append(total / batches)
    return losses
