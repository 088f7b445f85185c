"""What quantized kernels see of their inputs, simulated as SGLang's kernels compute it."""

from dataclasses import replace

import torch
from torch import Tensor

from quantizers.number_formats import rounded_to_float8
from quantizers.schemes import ActivationScheme, Granularity

__all__ = ["quantize_dequantize_activation"]

# SGLang's int8 kernel (int8_kernel.py, _per_token_quant_int8) takes no smaller absmax.
_SMALLEST_INTEGER_ABSMAX = 1e-10


def quantize_dequantize_activation(
    x: Tensor, scheme: ActivationScheme, *, scale: Tensor | None = None
) -> Tensor:
    """Round activations to a number format and back, in float32.

    Dynamic scales are absmax / qmax, per token, per group of neighbours of a token (as the block
    kernels do, arXiv:2412.19437, section 3.3.2) or over the tensor: absmax / 127 for int8,
    absmax / 448 for e4m3. Integers round ties away from zero and are clamped to the format's
    range; floats saturate and round ties to even. Values are multiplied by the reciprocal of
    the scale, as SGLang does (int8_kernel.py, per_token_quant_fp8.cu). Zeros stay zeros; a
    token that holds NaN or infinity comes back as NaN where scales are dynamic.

    Args:
        x: (..., K), floating point; no gradient passes.
        scheme: the scheme.
        scale: float32 (1,), positive, if the scheme is static; else None.

    Returns:
        shape and dtype of x.

    Raises:
        ValueError: x is not floating point; a scale is missing, unwanted or of another shape
            or dtype; a group size that does not divide K.
    """
    if not x.is_floating_point():
        raise ValueError(f"activations are floating point, not {x.dtype}")
    if scheme.group_size is not None:
        return _in_groups(x, scheme, scheme.group_size)
    _check_scale(scheme, scale)
    number = scheme.number_format
    work = x.detach().to(torch.float32, copy=True)
    if work.numel() == 0:
        return work.to(x.dtype)
    if scale is not None:
        factor, step = 1.0 / scale, scale
    else:
        factor, step = _dynamic(work, scheme)
    work.mul_(factor)
    if number.is_float:
        work.clamp_(number.qmin, number.qmax)
        work = rounded_to_float8(work, number)
    else:
        work = _round_half_away(work).clamp_(number.qmin, number.qmax)
    return work.mul_(step).to(x.dtype)


def _in_groups(x: Tensor, scheme: ActivationScheme, size: int) -> Tensor:
    """Each group of neighbours as if it were a token."""
    if x.shape[-1] % size:
        raise ValueError(f"group size {size} does not divide {x.shape[-1]} channels")
    tokens = replace(scheme, granularity=Granularity.TOKEN, group_size=None)
    return quantize_dequantize_activation(x.reshape(-1, size), tokens).reshape(x.shape)


def _dynamic(values: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor]:
    """Factor onto the code range, and its inverse, the scale; broadcast over values."""
    number = scheme.number_format
    if scheme.granularity is Granularity.TOKEN:
        absmax = torch.maximum(values.amax(-1, keepdim=True), -values.amin(-1, keepdim=True))
    else:
        absmax = torch.maximum(values.amax(), -values.amin())
    # A tensor, so that every device divides exactly: CUDA multiplies by a number's reciprocal.
    largest = torch.full_like(absmax, number.qmax)
    if not number.is_float:
        absmax = absmax.clamp(min=_SMALLEST_INTEGER_ABSMAX)
        return largest / absmax, absmax / largest
    # The reciprocal of a subnormal is infinite, and infinity times zero is NaN.
    step = (absmax / largest).clamp(min=torch.finfo(torch.float32).smallest_normal)
    return 1.0 / step, step


def _round_half_away(values: Tensor) -> Tensor:
    """To the nearest integer, ties away from zero: CUDA's round, which the kernel calls."""
    whole = values.trunc()
    # The fraction is exact, and twice it truncates to 1 exactly from one half on.
    return whole.add_((values - whole).mul_(2.0).trunc_())


def _check_scale(scheme: ActivationScheme, scale: Tensor | None) -> None:
    if scheme.dynamic and scale is not None:
        raise ValueError("a dynamic scheme computes its own scale: pass none")
    if scheme.dynamic:
        return
    if scale is None:
        raise ValueError("a static scheme needs the calibrated scale")
    if tuple(scale.shape) != (1,) or scale.dtype != torch.float32:
        raise ValueError(
            f"a static scale is float32 of shape (1,), not {scale.dtype} {tuple(scale.shape)}"
        )
