"""Packing as kernels, for devices that have Triton's compiler: see quantizers.packing."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["packed_nibbles", "unpacked_nibbles"]

# words that one program packs
_WORDS = 256


def packed_nibbles(codes: Tensor) -> Tensor:
    """Codes of 4 bits, each plus 8, eight to a word, the first in its lowest bits.

    Args:
        codes: int8 (N, K), contiguous.

    Returns:
        int32 (N, ceil(K / 8)), what is left over of the last word zero.
    """
    rows, columns = codes.shape
    words = triton.cdiv(columns, 8)
    packed = torch.empty(rows, words, dtype=torch.int32, device=codes.device)
    _pack[(rows, triton.cdiv(words, _WORDS))](codes, packed, columns, words, BLOCK=_WORDS)
    return packed


def unpacked_nibbles(packed: Tensor, columns: int) -> Tensor:
    """Undo packed_nibbles.

    Args:
        packed: int32 (N, ceil(columns / 8)), contiguous.
        columns: K.

    Returns:
        int8 (N, K).
    """
    rows, words = packed.shape
    codes = torch.empty(rows, columns, dtype=torch.int8, device=packed.device)
    block = 8 * _WORDS
    _unpack[(rows, triton.cdiv(columns, block))](packed, codes, columns, words, BLOCK=block)
    return codes


@triton.jit
def _pack(codes, packed, columns, words, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = tl.arange(0, 8)
    column = word[:, None] * 8 + within[None, :]
    on = column < columns
    code = tl.load(codes + row * columns + column, on, 0).to(tl.int32)
    # no two share a bit: their sum is what they are together
    part = tl.where(on, (code + 8) & 15, 0) << (4 * within)[None, :]
    tl.store(packed + row * words + word, tl.sum(part, 1), word < words)


@triton.jit
def _unpack(packed, codes, columns, words, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    on = column < columns
    word = tl.load(packed + row * words + column // 8, on, 0)
    code = ((word >> (4 * (column % 8))) & 15) - 8
    tl.store(codes + row * columns + column, code.to(tl.int8), on)
