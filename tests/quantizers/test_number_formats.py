import pytest
import torch
from torch import Tensor

from quantizers.number_formats import (
    E4M3,
    E5M2,
    NumberFormat,
    codes_in_float32,
    int_format,
    number_format,
    rounded_to_float8,
)


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_span_two_to_the_bits_codes(bits):
    number = int_format(bits)
    assert (number.name, number.bits, number.is_float) == (f"int{bits}", bits, False)
    assert number.qmax - number.qmin + 1 == 2**bits
    assert number.qmin == -(2 ** (bits - 1))
    assert number.code_dtype is torch.int8


@pytest.mark.parametrize("number", [E4M3, E5M2])
def test_floats_agree_with_torch(number):
    limits = torch.finfo(number.code_dtype)
    assert (number.qmin, number.qmax, number.bits) == (limits.min, limits.max, limits.bits)
    assert number.is_float


def test_float_extremes_are_those_of_the_formats():
    assert (E4M3.qmax, E5M2.qmax) == (448.0, 57344.0)


@pytest.mark.parametrize("name", ["int2", "int4", "int8", "e4m3", "e5m2"])
def test_lookup_by_name(name):
    assert number_format(name).name == name
    assert number_format(name) == number_format(name)


@pytest.mark.parametrize("name", ["int9", "int1", "INT4", "fp8", ""])
def test_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=r"int2.*int8.*e4m3.*e5m2"):
        number_format(name)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_unknown_width(bits):
    with pytest.raises(ValueError, match=f"{bits} bits"):
        int_format(bits)


@pytest.mark.parametrize(
    "arguments", [("int4", 8, False), ("e4m3", 4, True), ("int8", 8, True), ("e4m3", 8, False)]
)
def test_contradictory_formats_are_refused(arguments):
    with pytest.raises(ValueError, match="number_format"):
        NumberFormat(*arguments)


def bits(values: Tensor) -> Tensor:
    """What tells -0 from 0, and NaN from nothing."""
    return torch.where(values.isnan(), torch.tensor(torch.nan), values).view(torch.int32)


@pytest.mark.parametrize("number", [E4M3, E5M2], ids=str)
def test_every_float8_code_in_float32(number: NumberFormat) -> None:
    codes = torch.arange(256).to(torch.uint8).view(number.code_dtype)
    # entry by entry, by another way than whole tensors are
    expected = torch.stack([code.to(torch.float32) for code in codes])
    assert expected.isnan().any()
    assert torch.equal(bits(codes_in_float32(codes)), bits(expected))
    columns = codes[::3].repeat(2, 3)[:, ::2]
    assert torch.equal(bits(codes_in_float32(columns)), bits(columns.to(torch.float32)))


def test_integer_codes_in_float32() -> None:
    codes = torch.arange(-128, 128).to(torch.int8)
    assert torch.equal(codes_in_float32(codes), torch.arange(-128.0, 128.0))


@pytest.mark.parametrize("number", [E4M3, E5M2], ids=str)
def test_rounding_to_float8_is_the_conversion_s(number: NumberFormat) -> None:
    codes = torch.arange(256).to(torch.uint8).view(number.code_dtype).to(torch.float32)
    values = codes[codes.isfinite()].unique()
    # each value, what lies half-way to the next, and the next floats on both sides of those
    ties = (values[1:] + values[:-1]) / 2
    near = torch.cat([values, ties])
    below, above = (near.nextafter(torch.tensor(end)) for end in (-torch.inf, torch.inf))
    draw = torch.Generator().manual_seed(0)
    spread = torch.randn(1 << 16, generator=draw) * torch.logspace(-9, 3, 1 << 16)
    odd = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, torch.nan])
    given = torch.cat([near, below, above, spread, odd]).clamp(number.qmin, number.qmax)
    expected = given.to(number.code_dtype).to(torch.float32)
    assert torch.equal(bits(rounded_to_float8(given, number)), bits(expected))
    rows = given[: len(given) // 6 * 6].reshape(6, -1).t()
    assert torch.equal(
        bits(rounded_to_float8(rows, number)), bits(rows.to(number.code_dtype).to(torch.float32))
    )
