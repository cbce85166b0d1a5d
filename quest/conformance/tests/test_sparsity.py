"""Which entries a sparse operand keeps, its codes, values and mask (T5, T3, T6, T4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import quest
from quest.conformance.public import properties
from quest.conformance.public.capabilities import DTYPES, SPARSITIES
from quest.conformance.public.court import Court
from quest.estimators import Estimator

from . import drawing


def _group(pattern: str) -> int:
    """Widths are multiples of 8, and of the pattern's own groups."""
    made = quest.sparsity.parse(pattern)
    return 8 if made is None else math.lcm(8, made.m)


def _quantizer(
    court: Court, pattern: str, data: st.DataObject, estimator: Estimator | None = None
) -> quest.Quantizer:
    """Of a grid and a block that are declared; by default of the grid's own estimator."""
    grid = drawing.grid(court, data)
    block = drawing.block(court, data, _group(pattern))
    estimator = estimator or drawing.estimator(grid, court.impl.capabilities)
    return quest.Quantizer(quest.grids.parse(grid), quest.Hadamard(block), estimator,
                           quest.sparsity.parse(pattern))  # fmt: skip


def _judge(
    court: Court, property_: Callable[..., Any], dtype: str, pattern: str, q: quest.Quantizer,
    data: st.DataObject,
) -> None:  # fmt: skip
    """Of finite rows; where midpoints go up, with ties."""
    capabilities = court.impl.capabilities
    case = data.draw(
        drawing.plain(dtype, q.transform.order(0), capabilities,
                      ties=capabilities.ties == "up", group=_group(pattern))
    )  # fmt: skip
    drawing.judge(court, property_, case, q)


@pytest.mark.judges("select", declares=("blocks", "grids"), dtype=DTYPES, pattern=SPARSITIES)
@given(data=st.data())
def test_selection(court: Court, dtype: str, pattern: str, data: st.DataObject) -> None:
    q = _quantizer(court, pattern, data)
    capabilities = court.impl.capabilities
    case = data.draw(
        drawing.plain(dtype, q.transform.order(0), capabilities, ties=True, group=_group(pattern))
    )
    code = drawing.quantizer(q.spec)
    court.judge(properties.selection, {"x": case}, (case.make(), q), code)


@pytest.mark.judges("select", "quantize", declares=("blocks", "grids"), dtype=DTYPES,
                    pattern=SPARSITIES)  # fmt: skip
@given(data=st.data())
def test_codes(court: Court, dtype: str, pattern: str, data: st.DataObject) -> None:
    q = _quantizer(court, pattern, data)
    capabilities = court.impl.capabilities
    case = data.draw(
        drawing.plain(dtype, q.transform.order(0), capabilities, ties=False, group=_group(pattern))
    )
    drawing.judge(court, properties.codes, case, q)


@pytest.mark.judges("select", "fake_quantize", declares=("blocks", "grids"), dtype=DTYPES,
                    pattern=SPARSITIES)  # fmt: skip
@given(data=st.data())
def test_values(court: Court, dtype: str, pattern: str, data: st.DataObject) -> None:
    _judge(court, properties.values, dtype, pattern, _quantizer(court, pattern, data), data)


@pytest.mark.judges("select", "quantize", "mask", declares=("blocks", "grids", "estimators"),
                    dtype=DTYPES, pattern=SPARSITIES)  # fmt: skip
@given(data=st.data())
def test_mask(court: Court, dtype: str, pattern: str, data: st.DataObject) -> None:
    """A pruned entry is compared with 0: a small one keeps its gradient."""
    estimator = drawing.declared_estimator(court, data)
    q = _quantizer(court, pattern, data, estimator)
    _judge(court, properties.mask, dtype, pattern, q, data)
