"""Codes as bytes, the first element in the lowest bits, each row padded with zero bits (T0)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quest.conformance import inputs
from quest.conformance.public import properties
from quest.conformance.public.capabilities import BITS
from quest.conformance.public.court import Court
from quest.conformance.strategies import SEEDS

SHAPES = st.tuples(st.sampled_from((1, 3)), st.sampled_from((1, 2, 3, 8, 9, 64, 131)))


@pytest.mark.judges("pack", bits=BITS)
@given(shape=SHAPES, seed=SEEDS)
def test_pack(court: Court, bits: int, shape: tuple[int, int], seed: int) -> None:
    codes, made = inputs.unsigned(bits, shape, seed), f"inputs.unsigned({bits}, {shape}, {seed})"
    court.judge(properties.packed, {"codes": made}, (codes, bits), str(bits))


@pytest.mark.judges("unpack", bits=BITS)
@given(shape=SHAPES, seed=SEEDS)
def test_unpack(court: Court, bits: int, shape: tuple[int, int], seed: int) -> None:
    codes, made = inputs.unsigned(bits, shape, seed), f"inputs.unsigned({bits}, {shape}, {seed})"
    court.judge(properties.unpacked, {"codes": made}, (codes, bits), str(bits))
