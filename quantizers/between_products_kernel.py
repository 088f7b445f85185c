"""What lies between a block's products as kernels: see quantizers.between_products.

For devices that have Triton's compiler.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["rms_norm", "rotated_positions", "swiglu"]

# entries of a tile: what one program holds at once
_TILE = 4096


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Each row over its root mean square, times the weight.

    Args:
        x: (..., K), floating point.
        weight: (K,), of the same dtype.
        epsilon: added to the mean square.

    Returns:
        (..., K), contiguous.
    """
    columns = x.shape[-1]
    given = x.reshape(-1, columns)
    found = torch.empty_like(given, memory_format=torch.contiguous_format)
    block = triton.next_power_of_2(columns)
    rows = max(1, _TILE // block)
    _rms_norm[(triton.cdiv(len(given), rows),)](
        *(given, weight.contiguous(), found, len(given), columns, given.stride(0), epsilon),
        ROWS=rows,
        BLOCK=block,
        num_warps=_warps(rows * block),
        enable_fp_fusion=False,
    )
    return found.view(x.shape)


def rotated_positions(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of channels turned by the angle of its position.

    Args:
        x: (B, H, T, D), floating point.
        cos: (B or 1, T, D), of the same dtype.
        sin: likewise.

    Returns:
        (B, H, T, D), the heads of a token side by side.
    """
    batch, heads, length, width = x.shape
    found = torch.empty(batch, length, heads, width, dtype=x.dtype, device=x.device)
    found = found.transpose(1, 2)
    half = triton.next_power_of_2(width // 2)
    taken = min(triton.next_power_of_2(heads), max(1, _TILE // (2 * half)))
    cos, sin = (table.expand(batch, length, width) for table in (cos, sin))
    _rotated_positions[(batch * length, triton.cdiv(heads, taken))](
        *(x, cos, sin, found, length, heads, width // 2),
        *(*x.stride(), *cos.stride(), *sin.stride(), *found.stride()[:3]),
        HEADS=taken,
        HALF=half,
        num_warps=_warps(2 * taken * half),
        enable_fp_fusion=False,
    )
    return found


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The gate's SiLU times what it lets through.

    Args:
        gate: any shape, floating point.
        up: likewise.

    Returns:
        the same shape, contiguous.
    """
    gate, up = gate.contiguous(), up.contiguous()
    found = torch.empty_like(gate)
    entries = gate.numel()
    _swiglu[(triton.cdiv(entries, _TILE),)](
        *(gate, up, found, entries), BLOCK=_TILE, num_warps=8, enable_fp_fusion=False
    )
    return found


def _warps(entries: int) -> int:
    """16 entries a thread, of which 8 of 16 bits are read at once."""
    return min(16, max(1, entries // 512))


@triton.jit
def _rms_norm(
    x, weight, found, rows, columns, stride, epsilon, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    on = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(x + row[:, None] * stride + column[None, :], on, 0).to(tl.float32)
    mean = tl.sum(value * value, 1) / columns
    scaled = value * tl.rsqrt(mean + epsilon)[:, None]
    scaled = scaled.to(found.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + column, column < columns, 0).to(tl.float32)
    at = found + row[:, None] * columns + column[None, :]
    tl.store(at, (factor[None, :] * scaled).to(found.dtype.element_ty), on)


@triton.jit
def _rotated_positions(
    x,
    cos,
    sin,
    found,
    length,
    heads,
    half,
    x_batch,
    x_head,
    x_token,
    x_channel,
    cos_batch,
    cos_token,
    cos_channel,
    sin_batch,
    sin_token,
    sin_channel,
    found_batch,
    found_head,
    found_token,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    batch = (tl.program_id(0) // length).to(tl.int64)
    token = (tl.program_id(0) % length).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    channel = tl.arange(0, HALF)
    inside = channel < half
    on = (head < heads)[:, None] & inside[None, :]
    kind = found.dtype.element_ty
    source = x + batch * x_batch + token * x_token + head[:, None] * x_head
    first = tl.load(source + channel[None, :] * x_channel, on, 0).to(tl.float32)
    second = tl.load(source + (channel + half)[None, :] * x_channel, on, 0).to(tl.float32)
    cos += batch * cos_batch + token * cos_token
    sin += batch * sin_batch + token * sin_token
    cos_1 = tl.load(cos + channel * cos_channel, inside, 0).to(tl.float32)[None, :]
    cos_2 = tl.load(cos + (channel + half) * cos_channel, inside, 0).to(tl.float32)[None, :]
    sin_1 = tl.load(sin + channel * sin_channel, inside, 0).to(tl.float32)[None, :]
    sin_2 = tl.load(sin + (channel + half) * sin_channel, inside, 0).to(tl.float32)[None, :]
    # each product is rounded, as its own operation is in torch
    along_1, across_1 = (first * cos_1).to(kind), (second * sin_1).to(kind)
    along_2, across_2 = (second * cos_2).to(kind), (first * sin_2).to(kind)
    target = found + batch * found_batch + token * found_token + head[:, None] * found_head
    turned_1 = along_1.to(tl.float32) - across_1.to(tl.float32)
    turned_2 = along_2.to(tl.float32) + across_2.to(tl.float32)
    tl.store(target + channel[None, :], turned_1.to(kind), on)
    tl.store(target + (channel + half)[None, :], turned_2.to(kind), on)


@triton.jit
def _swiglu(gate, up, found, entries, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    on = at < entries
    value = tl.load(gate + at, on, 0).to(tl.float32)
    kind = found.dtype.element_ty
    silu = tl.div_rn(value, 1.0 + tl.exp(-value)).to(kind)
    other = tl.load(up + at, on, 0).to(tl.float32)
    tl.store(found + at, (silu.to(tl.float32) * other).to(kind), on)
