"""Packed codes and masks, byte by byte."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quest.reference import grids, packing, quantize

BITS = st.sampled_from([1, 2, 4, 8])
GRIDS = [*(grids.uniform(n) for n in (2, 3, 4, 15, 16, 256)), grids.e2m1(), grids.lloyd_max(5)]


def bytes_by_string(row: list[int], bits: int) -> list[int]:
    """Write each element in binary, the first at the right, and cut bytes from the right."""
    text = "".join(f"{v:0{bits}b}" for v in reversed(row))
    text = text.zfill(-(-len(text) // 8) * 8)
    return [int(text[max(end - 8, 0) : end], 2) for end in range(len(text), 0, -8)]


@given(bits=BITS, rows=st.integers(0, 3), width=st.integers(0, 21), seed=st.integers(0, 2**32 - 1))
def test_pack_and_unpack(bits: int, rows: int, width: int, seed: int) -> None:
    unsigned = np.random.default_rng(seed).integers(0, 2**bits, (2, rows, width))
    packed = packing.pack(unsigned, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (2, rows, -(-width * bits // 8))
    for row, expected in zip(
        packed.reshape(-1, packed.shape[-1]) if packed.size else [],
        unsigned.reshape(-1, width) if packed.size else [],
        strict=True,
    ):
        assert row.tolist() == bytes_by_string(expected.tolist(), bits)
    back = packing.unpack(packed, bits, width)
    assert back.dtype == np.uint8
    assert np.array_equal(back, unsigned)


def test_nibbles_of_an_odd_width() -> None:
    assert packing.pack([1, 2, 15], 4).tolist() == [0x21, 0x0F]
    assert packing.pack([1, 0, 0, 0, 0, 0, 0, 1, 1], 1).tolist() == [0x81, 0x01]
    assert packing.pack([3, 0, 1, 2], 2).tolist() == [0b10_01_00_11]


@given(width=st.integers(0, 21), seed=st.integers(0, 2**32 - 1))
def test_masks_are_packed_like_numpys_little_bits(width: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((3, width)) < 0.5
    packed = packing.pack_mask(mask)
    assert np.array_equal(packed, np.packbits(mask, axis=-1, bitorder="little"))
    back = packing.unpack_mask(packed, width)
    assert back.dtype == np.bool_
    assert np.array_equal(back, mask)


@pytest.mark.parametrize("grid", GRIDS)
def test_unsigned_codes_are_the_point_indices(grid: grids.Grid) -> None:
    codes = quantize.encode(grid.points, grid)
    unsigned = packing.to_unsigned(codes, grid)
    assert unsigned.dtype == np.uint8
    assert unsigned.tolist() == list(range(grid.levels))
    back = packing.from_unsigned(unsigned, grid)
    assert back.dtype == np.int64
    assert np.array_equal(back, codes)
    bits = packing.storage_bits(grid.levels)
    assert np.array_equal(packing.unpack(packing.pack(unsigned, bits), bits, grid.levels), unsigned)


@given(levels=st.integers(2, 256))
def test_storage_bits_are_the_fewest(levels: int) -> None:
    bits = packing.storage_bits(levels)
    assert 2**bits >= levels
    assert all(2**fewer < levels for fewer in (1, 2, 4, 8) if fewer < bits)


def test_errors_name_the_argument() -> None:
    for levels in (1, 257):
        with pytest.raises(ValueError, match=f"levels is {levels}; 2 to 256"):
            packing.storage_bits(levels)
    for bits in (0, 3, 16):
        with pytest.raises(ValueError, match=f"bits is {bits}; 1, 2, 4 and 8"):
            packing.pack([0], bits)
        with pytest.raises(ValueError, match=f"bits is {bits}; 1, 2, 4 and 8"):
            packing.unpack([0], bits, 1)
    for row in ([0, 16], [-1, 3]):
        with pytest.raises(ValueError, match=r"unsigned holds values from .*; 0 to 15 are allowed"):
            packing.pack(row, 4)
    with pytest.raises(TypeError, match="unsigned has dtype float64"):
        packing.pack([0.0], 4)
    with pytest.raises(ValueError, match="unsigned is a scalar"):
        packing.pack(3, 4)
    with pytest.raises(ValueError, match=r"packed has shape \(2,\); \(\.\.\., 3\) is allowed"):
        packing.unpack([0, 0], 4, 5)
    with pytest.raises(TypeError, match="mask has dtype int64; bool"):
        packing.pack_mask(np.array([0, 1], dtype=np.int64))
    with pytest.raises(ValueError, match="codes holds values from -3 to 0; -2 to 1"):
        packing.to_unsigned([-3, 0], grids.uniform(4))
    with pytest.raises(ValueError, match="unsigned holds values from 0 to 3; 0 to 2"):
        packing.from_unsigned([0, 3], grids.ternary())
