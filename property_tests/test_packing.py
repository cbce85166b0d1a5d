"""Packing against the oracle, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quest import packing
from quest.reference import packing as reference

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
BITS = (1, 2, 4, 8)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", BITS)
@given(
    shape=st.lists(st.integers(0, 4), max_size=2),
    width=st.integers(0, 41),
    dtype=st.sampled_from(INTEGERS),
    seed=st.integers(0, 2**32 - 1),
)
def test_pack_and_unpack_are_the_oracle_s(
    device: str, bits: int, shape: list[int], width: int, dtype: torch.dtype, seed: int
) -> None:
    high = 2**bits if dtype != torch.int8 else min(2**bits, 128)
    values = np.random.default_rng(seed).integers(0, high, (*shape, width))
    tensor = torch.from_numpy(values).to(device, dtype)
    packed = packing.pack(tensor, bits)
    expected = reference.pack(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.device == tensor.device
    assert np.array_equal(packed.cpu().numpy(), expected)
    assert packed.shape == expected.shape
    back = packing.unpack(packed, bits, width)
    assert back.dtype == torch.uint8
    assert np.array_equal(back.cpu().numpy(), reference.unpack(expected, bits, width))
    assert np.array_equal(back.cpu().numpy(), values)


@given(
    shape=st.lists(st.integers(1, 3), max_size=2), width=st.integers(1, 41), seed=st.integers(0, 99)
)
def test_flags_are_the_oracle_s(shape: list[int], width: int, seed: int) -> None:
    flags = np.random.default_rng(seed).random((*shape, width)) < 0.5
    packed = packing.pack(torch.from_numpy(flags), 1)
    assert np.array_equal(packed.numpy(), reference.pack_mask(flags))
    assert np.array_equal(packing.unpack(packed, 1, width).numpy(), flags)
    assert np.array_equal(packed.numpy(), np.packbits(flags, axis=-1, bitorder="little"))


@pytest.mark.parametrize("bits", BITS)
def test_every_byte_unpacks(bits: int) -> None:
    every = np.arange(256, dtype=np.uint8)[:, np.newaxis]
    for width in range(1, 8 // bits + 1):
        got = packing.unpack(torch.from_numpy(every), bits, width).numpy()
        assert np.array_equal(got, reference.unpack(every, bits, width))


def test_the_first_element_is_in_the_lowest_bits() -> None:
    assert packing.pack(torch.tensor([1, 2, 3]), 4).tolist() == [0x21, 0x03]
    assert packing.pack(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 1]), 1).tolist() == [1, 1]
    assert packing.pack(torch.tensor([3, 0, 1]), 2).tolist() == [0b010011]


def test_inputs_stay_and_need_not_be_contiguous() -> None:
    base = torch.arange(64, dtype=torch.uint8).reshape(8, 8) % 16
    before = base.clone()
    for view in (base.t(), base[:, ::2], base[1:, 3:]):
        assert np.array_equal(packing.pack(view, 4).numpy(), reference.pack(view.numpy(), 4))
        again = packing.unpack(packing.pack(view, 8).t().contiguous().t(), 8, view.shape[1])
        assert torch.equal(again, view)
    for bits in BITS:
        packing.pack(base, bits).fill_(255)
    assert torch.equal(base, before)
