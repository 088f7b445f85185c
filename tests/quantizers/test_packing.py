import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import (
    pack_to_int32,
    unpack_from_int32,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from quantizers.packing import pack_codes, pack_zero_points, unpack_codes, unpack_zero_points


def random_codes(rows, columns, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    return torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)


def word(value):
    """A 32 bit pattern as the int32 that torch shows."""
    return value - (1 << 32) if value >= 1 << 31 else value


def packed_by_hand(codes, bits):
    """Element i of a row lies at bit i * bits of the row, word by word."""
    rows = []
    for row in codes.tolist():
        pattern = sum((code + (1 << (bits - 1))) << (i * bits) for i, code in enumerate(row))
        words = -(-len(row) * bits // 32)
        rows.append([word((pattern >> (32 * i)) & 0xFFFFFFFF) for i in range(words)])
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize(
    ("codes", "bits", "expected"),
    [
        ([-8, -7, -6, -5, -4, -3, -2, 7], 4, 0xF6543210),
        ([-128, -127, 0, 127], 8, 0xFF800100),
    ],
)
def test_literal_vectors(device, codes, bits, expected):
    matrix = torch.tensor([codes], dtype=torch.int8, device=device)
    packed = pack_codes(matrix, bits)
    assert packed.tolist() == [[word(expected)]]
    assert packed.device == matrix.device
    assert torch.equal(unpack_codes(packed, bits, len(codes)), matrix)
    column = matrix.t().contiguous()
    assert pack_zero_points(column, bits).tolist() == [[word(expected)]]
    assert torch.equal(unpack_zero_points(packed, bits, len(codes)), column)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 3, 8, 13])
@pytest.mark.parametrize("columns", [1, 3, 4, 5, 7, 8, 9, 31, 32, 33, 128])
def test_equal_to_compressed_tensors(bits, rows, columns):
    codes = random_codes(rows, columns, bits)
    before = codes.clone()
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.is_contiguous()
    assert torch.equal(packed, packed_by_hand(codes, bits))
    assert torch.equal(packed, pack_to_int32(codes, bits))
    restored = unpack_codes(packed, bits, columns)
    assert restored.dtype == torch.int8
    assert restored.is_contiguous()
    assert torch.equal(restored, codes)
    assert torch.equal(restored, unpack_from_int32(packed, bits, codes.shape))
    assert torch.equal(codes, before)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 64])
@pytest.mark.parametrize("groups", [1, 3, 28])
def test_zero_points_equal_compressed_tensors(bits, rows, groups):
    zeros = random_codes(rows, groups, bits, seed=1)
    packed = pack_zero_points(zeros, bits)
    assert packed.is_contiguous()
    assert torch.equal(packed, packed_by_hand(zeros.t(), bits).t())
    assert torch.equal(packed, pack_to_int32(zeros, bits, packed_dim=0))
    restored = unpack_zero_points(packed, bits, rows)
    assert restored.is_contiguous()
    assert torch.equal(restored, zeros)
    assert torch.equal(restored, unpack_from_int32(packed, bits, zeros.shape, packed_dim=0))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    bits=st.sampled_from([4, 8]),
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_round_trip(bits, rows, columns, seed):
    codes = random_codes(rows, columns, bits, seed)
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, columns), codes)
    assert torch.equal(unpack_zero_points(pack_zero_points(codes, bits), bits, rows), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_strided_views(bits):
    codes = random_codes(24, 40, bits)
    assert torch.equal(pack_codes(codes.t(), bits), packed_by_hand(codes.t(), bits))
    part = codes[1::2, 3:30]
    assert torch.equal(pack_codes(part, bits), packed_by_hand(part, bits))
    packed = pack_codes(codes, bits)
    assert torch.equal(unpack_codes(packed[::2], bits, 40), codes[::2])


@pytest.mark.parametrize("bits", [4, 8])
def test_no_rows(bits):
    packed = pack_codes(torch.empty(0, 16, dtype=torch.int8), bits)
    assert packed.shape == (0, 16 * bits // 32)
    assert unpack_codes(packed, bits, 16).shape == (0, 16)


@pytest.mark.parametrize("code", [-9, 8, 127, -128])
def test_codes_that_do_not_fit_are_refused(code):
    codes = torch.zeros(2, 8, dtype=torch.int8)
    codes[1, 3] = code
    with pytest.raises(ValueError, match=f"{code}"):
        pack_codes(codes, 4)
    with pytest.raises(ValueError, match=f"{code}"):
        pack_zero_points(codes, 4)


def test_wrong_arguments_are_refused():
    codes = random_codes(2, 8, 4)
    with pytest.raises(ValueError, match="3 bits"):
        pack_codes(codes, 3)
    with pytest.raises(ValueError, match=r"int8.*int32"):
        pack_codes(codes.to(torch.int32), 4)
    with pytest.raises(ValueError, match=r"\(8,\)"):
        pack_codes(codes[0], 4)
    with pytest.raises(ValueError, match=r"int32.*int8"):
        unpack_codes(codes, 4, 8)
    with pytest.raises(ValueError, match="3 words, not 1"):
        unpack_codes(pack_codes(codes, 4), 4, 17)
