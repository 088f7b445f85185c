import pytest
import torch

from quantizers.number_formats import E4M3, E5M2, NumberFormat, int_format, number_format


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
