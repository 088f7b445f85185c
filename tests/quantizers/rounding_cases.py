"""Schemes to try, and the rounding of single entries, written out."""

import math

import numpy as np
import torch

from quantizers.number_formats import E4M3, E5M2, int_format
from quantizers.schemes import Granularity, WeightScheme

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INT4, INT8 = int_format(4), int_format(8)


def scheme(number, granularity, *, symmetric=True, size=None, dtype=torch.float32):
    return WeightScheme(
        number,
        symmetric,
        granularity,
        group_size=size if granularity is Granularity.GROUP else None,
        block_shape=size if granularity is Granularity.BLOCK else None,
        scale_dtype=dtype,
    )


CASES = [
    (scheme(INT4, Granularity.GROUP, size=8, dtype=torch.bfloat16), (5, 24)),
    (scheme(INT4, Granularity.GROUP, size=8, symmetric=False, dtype=torch.bfloat16), (5, 24)),
    (scheme(INT8, Granularity.GROUP, size=24, dtype=torch.float16), (3, 24)),
    (scheme(INT8, Granularity.CHANNEL), (7, 13)),
    (scheme(INT8, Granularity.CHANNEL, symmetric=False), (7, 13)),
    (scheme(int_format(3), Granularity.CHANNEL, symmetric=False), (1, 9)),
    (scheme(int_format(2), Granularity.TENSOR), (4, 5)),
    (scheme(INT4, Granularity.TENSOR, symmetric=False), (4, 5)),
    (scheme(E4M3, Granularity.CHANNEL), (6, 11)),
    (scheme(E5M2, Granularity.CHANNEL), (6, 11)),
    (scheme(E4M3, Granularity.TENSOR), (6, 11)),
    (scheme(E4M3, Granularity.GROUP, size=4), (3, 12)),
    (scheme(E4M3, Granularity.BLOCK, size=(4, 8)), (8, 16)),
    (scheme(E4M3, Granularity.BLOCK, size=(4, 8)), (7, 19)),
    (scheme(E4M3, Granularity.BLOCK, size=(4, 8)), (3, 5)),
    (scheme(INT4, Granularity.BLOCK, size=(4, 8), symmetric=False), (9, 17)),
]
IDS = [
    f"{s.number_format.name}-{s.granularity}-{'sym' if s.symmetric else 'asym'}-{n}x{k}"
    for s, (n, k) in CASES
]


def matrix(rows, columns, *, seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(device, dtype)


def place(how, row, column):
    """Index of the scale that serves an entry."""
    if how.granularity is Granularity.TENSOR:
        return (0,)
    if how.granularity is Granularity.CHANNEL:
        return (row, 0)
    if how.granularity is Granularity.GROUP:
        return (row, column // how.group_size)
    return (row // how.block_shape[0], column // how.block_shape[1])


def scales_by_hand(weight, how):
    """Scales and zero points group by group, in numpy's float32."""
    groups = {}
    for row, entries in enumerate(weight.float().tolist()):
        for column, entry in enumerate(entries):
            groups.setdefault(place(how, row, column), []).append(np.float32(entry))
    shape = how.scale_shape(*weight.shape)
    scale, zero = torch.empty(shape), torch.zeros(shape, dtype=torch.int8)
    name, bits = how.number_format.name, how.number_format.bits
    for index, group in groups.items():
        low, high = min(*group, np.float32(0)), max(*group, np.float32(0))
        if not how.symmetric:
            span, steps = high - low, np.float32(2**bits - 1)
        else:
            span = max(-low, high)
            largest = {"e4m3": 448, "e5m2": 57344, "int8": 127}
            steps = np.float32(largest.get(name, (2**bits - 1) / 2))
        scale[index] = float(span / steps)
        if not how.symmetric:
            stored = np.float32(scale[index].to(how.scale_dtype).item())
            code = round(float(np.float32(-(2 ** (bits - 1))) - low / stored))
            zero[index] = max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, code))
    return scale.to(how.scale_dtype), None if how.symmetric else zero


def float_by_hand(value, name):
    """Nearest float8, ties to even, saturating."""
    mantissa, smallest, largest = {"e4m3": (3, -6, 448.0), "e5m2": (2, -14, 57344.0)}[name]
    value = max(-largest, min(largest, value))
    exponent = max(math.frexp(value)[1] - 1, smallest)
    step = 2.0 ** (exponent - mantissa)
    return round(value / step) * step


def codes_by_hand(weight, scale, zero, how):
    """Codes entry by entry in float64; the second result marks quotients next to a tie."""
    codes, near_tie = torch.empty(weight.shape), torch.zeros(weight.shape, dtype=torch.bool)
    number = how.number_format
    for row, entries in enumerate(weight.double().tolist()):
        for column, entry in enumerate(entries):
            index = place(how, row, column)
            exact = entry / scale[index].double().item()
            if number.is_float:
                near = [float_by_hand(exact * (1 + e), number.name) for e in (-1e-6, 1e-6)]
                near_tie[row, column] = near[0] != near[1]
                codes[row, column] = float_by_hand(exact, number.name)
            else:
                near_tie[row, column] = abs(abs(exact % 1) - 0.5) < 1e-4
                code = round(exact) + (0 if zero is None else zero[index].item())
                low, high = -(2 ** (number.bits - 1)), 2 ** (number.bits - 1) - 1
                codes[row, column] = max(low, min(high, code))
    return codes, near_tie
