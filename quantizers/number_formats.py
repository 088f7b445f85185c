"""Number formats that weights and activations are rounded to."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "E4M3",
    "E5M2",
    "NumberFormat",
    "codes_in_float32",
    "int_format",
    "number_format",
    "rounded_to_float8",
]

# name: (bits, largest finite value, torch dtype), as in arXiv:2209.05433, table 1.
_FLOATS: dict[str, tuple[int, float, torch.dtype]] = {
    "e4m3": (8, 448.0, torch.float8_e4m3fn),
    "e5m2": (8, 57344.0, torch.float8_e5m2),
}
# bits of a mantissa, exponent of the smallest normal number
_STEPS = {torch.float8_e4m3fn: (3, -6), torch.float8_e5m2: (2, -14)}
_INTEGER_BITS = range(2, 9)


@dataclass(frozen=True)
class NumberFormat:
    """One number format: a signed integer of 2 to 8 bits, or an 8 bit float.

    Attributes:
        name: "int2" to "int8", "e4m3" or "e5m2".
        bits: width of one code in bits.
        is_float: whether codes are floating point numbers.

    Raises:
        ValueError: the three attributes do not describe a known format.
    """

    name: str
    bits: int
    is_float: bool

    def __post_init__(self) -> None:
        """Refuse formats that do not exist."""
        if self.is_float:
            known = self.name in _FLOATS and self.bits == _FLOATS[self.name][0]
        else:
            known = self.bits in _INTEGER_BITS and self.name == f"int{self.bits}"
        if not known:
            raise ValueError(
                f"no number format {self.name!r} with {self.bits} bits, is_float={self.is_float}: "
                "build formats with number_format(name) or int_format(bits)"
            )

    @property
    def qmin(self) -> float:
        """The smallest code: -2^(bits-1), or the most negative finite float."""
        return -_FLOATS[self.name][1] if self.is_float else -float(1 << (self.bits - 1))

    @property
    def qmax(self) -> float:
        """The largest code: 2^(bits-1) - 1, or the largest finite float."""
        return _FLOATS[self.name][1] if self.is_float else float((1 << (self.bits - 1)) - 1)

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype that codes are held in: int8 for every integer format."""
        return _FLOATS[self.name][2] if self.is_float else torch.int8


def int_format(bits: int) -> NumberFormat:
    """The signed integer format of a width.

    Args:
        bits: 2 to 8.

    Raises:
        ValueError: any other width.
    """
    if bits not in _INTEGER_BITS:
        raise ValueError(f"no integer format of {bits} bits: use 2 to 8")
    return NumberFormat(f"int{bits}", bits, is_float=False)


E4M3 = NumberFormat("e4m3", 8, is_float=True)
E5M2 = NumberFormat("e5m2", 8, is_float=True)


def codes_in_float32(codes: Tensor) -> Tensor:
    """Codes of any format in float32, exactly.

    On a CPU torch's own conversion of E4M3 takes five times as long.

    Args:
        codes: any shape, int8 or float8.

    Returns:
        The shape of codes, float32.
    """
    if codes.dtype != torch.float8_e4m3fn or codes.device.type != "cpu":
        return codes.to(torch.float32)
    bits = codes.view(torch.int8)
    # in float16 sign, exponent and mantissa stand alike, and an exponent of the same bits is 8 less
    shifted = bits.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    found = shifted.view(torch.float16).to(torch.float32).mul_(256.0)
    unset = (bits & 0x7F) == 0x7F
    return found.masked_fill_(unset, torch.nan) if bool(unset.any()) else found


def rounded_to_float8(values: Tensor, number: NumberFormat) -> Tensor:
    """values.to(number.code_dtype) in float32, bit for bit.

    Args:
        values: any shape, float32, from number.qmin to number.qmax, or NaN.
        number: an 8 bit float.

    Returns:
        The shape of values, float32.
    """
    if values.device.type != "cpu":
        return values.to(number.code_dtype).to(torch.float32)
    mantissa, least = _STEPS[number.code_dtype]
    # 1.5 * 2^23 steps of a value's binade: their sum has a step as its last bit, ties to even
    exponent = (values.view(torch.int32) & 0x7F800000).clamp_(min=(127 + least) << 23)
    steps = exponent.add_(((23 - mantissa) << 23) | 0x400000).view(torch.float32)
    return (values + steps).sub_(steps).copysign_(values)


_KNOWN: dict[str, NumberFormat] = {
    **{f"int{bits}": int_format(bits) for bits in _INTEGER_BITS},
    "e4m3": E4M3,
    "e5m2": E5M2,
}


def number_format(name: str) -> NumberFormat:
    """Look a format up by its name.

    Args:
        name: "int2" to "int8", "e4m3" or "e5m2".

    Raises:
        ValueError: an unknown name; the text lists the known ones.
    """
    try:
        return _KNOWN[name]
    except KeyError:
        raise ValueError(f"unknown number format {name!r}: use {', '.join(_KNOWN)}") from None
