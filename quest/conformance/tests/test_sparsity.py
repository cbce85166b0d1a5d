"""Which entries a sparse operand keeps, and its codes (T5, T3)."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import quest
from quest.conformance.public import properties
from quest.conformance.public.capabilities import DTYPES, SPARSITIES
from quest.conformance.public.court import Court

from . import drawing


def _group(pattern: str) -> int:
    """Widths are multiples of 8, and of the pattern's own groups."""
    made = quest.sparsity.parse(pattern)
    return 8 if made is None else math.lcm(8, made.m)


def _quantizer(court: Court, pattern: str, data: st.DataObject) -> quest.Quantizer:
    capabilities = court.impl.capabilities
    grid = drawing.grid(court, data)
    block = drawing.block(court, data, _group(pattern))
    return quest.Quantizer(quest.grids.parse(grid), quest.Hadamard(block),
                           drawing.estimator(grid, capabilities),
                           quest.sparsity.parse(pattern))  # fmt: skip


@pytest.mark.judges("select", declares=("blocks", "grids"), dtype=DTYPES, pattern=SPARSITIES)
@given(data=st.data())
def test_selection(court: Court, dtype: str, pattern: str, data: st.DataObject) -> None:
    q = _quantizer(court, pattern, data)
    capabilities = court.impl.capabilities
    case = data.draw(
        drawing.plain(dtype, q.transform.order(0), capabilities, ties=True, group=_group(pattern))
    )
    code = drawing.quantizer(q.spec)
    court.judge(properties.selection, {"x": case.expression()}, (case.make(), q), code)


@pytest.mark.judges("select", "quantize", declares=("blocks", "grids"), dtype=DTYPES,
                    pattern=SPARSITIES)  # fmt: skip
@given(data=st.data())
def test_codes(court: Court, dtype: str, pattern: str, data: st.DataObject) -> None:
    q = _quantizer(court, pattern, data)
    capabilities = court.impl.capabilities
    case = data.draw(
        drawing.plain(dtype, q.transform.order(0), capabilities, ties=False, group=_group(pattern))
    )
    code = drawing.quantizer(q.spec)
    court.judge(properties.codes, {"x": case.expression()}, (case.make(), q), code)
