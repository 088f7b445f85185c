"""Packing of integer codes into int32, bit for bit as compressed-tensors stores them.

A stored element is code + 2^(bits-1); element 0 lies in the lowest bits; rows are packed along
K without interleaving, zero points along N in the same order. Padding bits are zero.
Bytes are viewed as wider integers, so the host and the device are little-endian.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from quantizers.devices import compiles_kernels

__all__ = ["pack_codes", "pack_zero_points", "unpack_codes", "unpack_zero_points"]


def pack_codes(codes: Tensor, bits: int, *, check: bool = True) -> Tensor:
    """Pack signed codes along K.

    Waits for the device once, to check the range, if bits is 4.

    Args:
        codes: int8 (N, K), within [-2^(bits-1), 2^(bits-1) - 1].
        bits: 4 or 8.
        check: whether codes are looked at, for which a device is waited for.

    Returns:
        int32 (N, ceil(K * bits / 32)).

    Raises:
        ValueError: codes are not an int8 matrix, or do not fit; bits is not 4 or 8.
    """
    _check(bits, codes, torch.int8)
    rows, words = codes.shape[0], -(-codes.shape[1] * bits // 32)
    pad = words * 32 // bits - codes.shape[1]
    if bits == 8:
        # Adding 128 modulo 256 flips the highest bit.
        octets = F.pad(codes.view(torch.uint8) ^ 0x80, (0, pad)).reshape(-1)
        return octets.view(torch.int32).view(rows, words)
    if check and codes.numel():
        low, high = torch.stack((codes.amin(), codes.amax())).tolist()
        if low < -8 or high > 7:
            raise ValueError(f"codes from {low} to {high} do not fit into 4 bits (-8 to 7)")
    if compiles_kernels(codes):
        from quantizers.packing_kernel import packed_nibbles

        return packed_nibbles(codes.contiguous())
    # Flat before each view: a matrix of one row may have strides that a view refuses.
    pairs = F.pad(codes + 8, (0, pad)).reshape(-1).view(torch.int16)
    # The low byte of a | (b << 8) | (b << 4) is a | (b << 4).
    return (pairs >> 4).bitwise_or_(pairs).to(torch.uint8).view(torch.int32).view(rows, words)


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Undo pack_codes.

    Args:
        packed: int32 (N, ceil(columns * bits / 32)).
        bits: 4 or 8.
        columns: K.

    Returns:
        int8 (N, K), contiguous.

    Raises:
        ValueError: packed is not an int32 matrix of that shape; bits is not 4 or 8.
    """
    _check(bits, packed, torch.int32)
    words = -(-columns * bits // 32)
    if packed.shape[1] != words:
        raise ValueError(
            f"{columns} codes of {bits} bits fill {words} words, not {packed.shape[1]}"
        )
    if bits == 4 and compiles_kernels(packed):
        from quantizers.packing_kernel import unpacked_nibbles

        return unpacked_nibbles(packed.contiguous(), columns)
    rows, padded = packed.shape[0], words * 32 // bits
    octets = packed.reshape(-1).view(torch.uint8)
    if bits == 8:
        codes = (octets ^ 0x80).view(torch.int8)
    else:
        pairs = octets.to(torch.int16)
        codes = (pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F).view(torch.int8).sub_(8)
    return codes.view(rows, padded)[:, :columns].contiguous()


def pack_zero_points(zero_point: Tensor, bits: int) -> Tensor:
    """Pack signed zero points along N.

    Args:
        zero_point: int8 (N, G), within [-2^(bits-1), 2^(bits-1) - 1].
        bits: 4 or 8.

    Returns:
        int32 (ceil(N * bits / 32), G), contiguous.

    Raises:
        ValueError: as pack_codes.
    """
    _check(bits, zero_point, torch.int8)
    return pack_codes(zero_point.t(), bits).t().contiguous()


def unpack_zero_points(packed: Tensor, bits: int, rows: int) -> Tensor:
    """Undo pack_zero_points.

    Args:
        packed: int32 (ceil(rows * bits / 32), G).
        bits: 4 or 8.
        rows: N.

    Returns:
        int8 (N, G), contiguous.

    Raises:
        ValueError: as unpack_codes.
    """
    _check(bits, packed, torch.int32)
    return unpack_codes(packed.t(), bits, rows).t().contiguous()


def _check(bits: int, matrix: Tensor, dtype: torch.dtype) -> None:
    if bits not in (4, 8):
        raise ValueError(f"cannot pack {bits} bits: use 4 or 8")
    if matrix.ndim != 2 or matrix.dtype != dtype:
        raise ValueError(
            f"need a matrix of {dtype}, not {matrix.dtype} of shape {tuple(matrix.shape)}"
        )
