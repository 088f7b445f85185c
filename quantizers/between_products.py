"""What a decoder block of Llama's kind computes between its matrix products.

Each is rounded to the inputs' dtype where transformers rounds it. Where no gradient is asked for,
one kernel each on a GPU reads and writes once what torch passes several times.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from quantizers.devices import compiles_kernels

__all__ = ["rms_norm", "rotated_positions", "swiglu"]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm, arXiv 1910.07467 eq. 4: each row over its root mean square, times the weight.

    Args:
        x: (..., K), floating point; its mean square is taken in float32.
        weight: (K,), of the same dtype.
        epsilon: added to the mean square.

    Returns:
        (..., K), x's dtype.
    """
    if _in_one_pass(x, weight):
        from quantizers.between_products_kernel import rms_norm as kernel

        return kernel(x, weight, epsilon)
    rows = x.float()
    scaled = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * scaled.to(x.dtype)


def rotated_positions(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, arXiv 2104.09864 eq. 34, channels paired half with half.

    Args:
        x: (B, H, T, D), floating point: queries or keys.
        cos: (B or 1, T, D), of the same dtype.
        sin: likewise.

    Returns:
        (B, H, T, D), x's dtype.
    """
    if _in_one_pass(x, cos, sin):
        from quantizers.between_products_kernel import rotated_positions as kernel

        return kernel(x, cos, sin)
    first, second = x.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return (x * cos[:, None]) + (turned * sin[:, None])


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The gate's SiLU times what it lets through, arXiv 2002.05202 eq. 6.

    Args:
        gate: (..., K), floating point.
        up: likewise.

    Returns:
        (..., K), the same dtype.
    """
    if _in_one_pass(gate, up):
        from quantizers.between_products_kernel import swiglu as kernel

        return kernel(gate, up)
    return silu(gate) * up


def _in_one_pass(*tensors: Tensor) -> bool:
    """Whether a kernel takes them: it passes no gradient, and computes in float32."""
    kinds = {tensor.dtype for tensor in tensors}
    return (
        not torch.is_grad_enabled()
        and len(kinds) == 1
        and kinds <= {torch.bfloat16, torch.float16, torch.float32}
        and compiles_kernels(tensors[0])
    )
