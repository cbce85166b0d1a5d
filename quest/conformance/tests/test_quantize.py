"""Codes with their scale, ties, dequantized values and the gradient's mask (T2 to T4, T6)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import quest
from quest.conformance import exact_rows
from quest.conformance.public import properties
from quest.conformance.public.capabilities import DTYPES, ESTIMATORS, GRIDS, INPUTS
from quest.conformance.public.court import Court
from quest.conformance.strategies import SEEDS, Case

from . import drawing

TIED_GRIDS = ("uniform1", "uniform2", "uniform4", "ternary")
# Of whose outermost point, half gap and step each gives the other two without rounding.
CLIPPED_GRIDS = ("uniform1", "ternary")
CLIPS = ("clip1.3",)


def _quantizer(court: Court, grid: str, data: st.DataObject) -> quest.Quantizer:
    capabilities = court.impl.capabilities
    block = drawing.block(court, data)
    estimator = drawing.estimator(grid, capabilities)
    return quest.Quantizer(quest.grids.parse(grid), quest.Hadamard(block), estimator)


@pytest.mark.judges("quantize", declares=("blocks",), dtype=DTYPES, grid=GRIDS)
@given(data=st.data())
def test_codes(court: Court, dtype: str, grid: str, data: st.DataObject) -> None:
    q = _quantizer(court, grid, data)
    case = data.draw(drawing.plain(dtype, q.transform.order(0), court.impl.capabilities,
                                   ties=False))  # fmt: skip
    drawing.judge(court, properties.codes, case, q)


@pytest.mark.judges("fake_quantize", declares=("blocks",), dtype=DTYPES, grid=GRIDS)
@given(data=st.data())
def test_values(court: Court, dtype: str, grid: str, data: st.DataObject) -> None:
    q = _quantizer(court, grid, data)
    case = data.draw(drawing.plain(dtype, q.transform.order(0), court.impl.capabilities,
                                   ties=False))  # fmt: skip
    drawing.judge(court, properties.values, case, q)


@pytest.mark.judges("quantize", "mask", declares=("blocks", "grids"), dtype=DTYPES,
                    estimator=ESTIMATORS)  # fmt: skip
@given(data=st.data())
def test_mask(court: Court, dtype: str, estimator: str, data: st.DataObject) -> None:
    """Where midpoints go up on ties, too: a mask is judged beside codes that are right."""
    capabilities = court.impl.capabilities
    grid = quest.grids.parse(drawing.grid(court, data))
    block = drawing.block(court, data)
    q = quest.Quantizer(grid, quest.Hadamard(block), quest.estimators.parse(estimator))
    case = data.draw(drawing.plain(dtype, block, capabilities, ties=capabilities.ties == "up"))
    drawing.judge(court, properties.mask, case, q)


@pytest.mark.judges("quantize", declares=("blocks", "ties"), dtype=DTYPES, grid=GRIDS)
@given(data=st.data())
def test_ties(court: Court, dtype: str, grid: str, data: st.DataObject) -> None:
    """Rows of zeros, and entries that rotate to exactly 0: the midpoint of grids of even L."""
    q = _quantizer(court, grid, data)
    case = data.draw(drawing.plain(dtype, q.transform.order(0), court.impl.capabilities,
                                   ties=True))  # fmt: skip
    drawing.judge(court, properties.codes, case, q)


@pytest.mark.judges("quantize", declares=("ties", "any_outer"), dtype=DTYPES, tied=TIED_GRIDS)
@given(seed=SEEDS)
def test_every_tie(court: Court, dtype: str, tied: str, seed: int) -> None:
    """Dyadic scales and steps, values on every midpoint and on the outer points."""
    _exact(court, properties.exact, dtype, _dyadic(tied), quest.STE(), 8, seed)


@pytest.mark.judges("mask", declares=("any_outer",), dtype=DTYPES, tied=TIED_GRIDS,
                    trust=("trust1.0", "trust0.5"))  # fmt: skip
@given(seed=SEEDS)
def test_every_threshold(court: Court, dtype: str, tied: str, trust: str, seed: int) -> None:
    """Values on every threshold of the gradient's mask, at half a step from a point or a quarter:
    they are inside.
    """
    made = quest.estimators.parse(trust)
    _exact(court, properties.exact_mask, dtype, _dyadic(tied), made, 16, seed)


@pytest.mark.judges("mask", declares=("any_outer",), dtype=DTYPES, tied=CLIPPED_GRIDS, clip=CLIPS)
@given(seed=SEEDS)
def test_every_clip(court: Court, dtype: str, tied: str, clip: str, seed: int) -> None:
    """Rows with values on the threshold of a clip: they are inside."""
    made = quest.estimators.parse(clip)
    assert isinstance(made, quest.Clip)
    held, outer = exact_rows.on_threshold(made.scale, 16)
    _exact(court, properties.exact_mask, dtype, f"{tied}:{outer!r}", made, 16, seed, held)


def _dyadic(tied: str) -> str:
    """A grid whose step is a quarter of the RMS."""
    return f"{tied}:{0.25 * (quest.grids.parse(tied).levels - 1) / 2!r}"


def _exact(
    court: Court, property_: Callable[..., Any], dtype: str, grid: str, made: Any, unit: int,
    seed: int, holds: int = 0,
) -> None:  # fmt: skip
    """Of rows of integers with an RMS of so many units, that hold a certain one."""
    q = quest.Quantizer(quest.grids.parse(grid), quest.Identity(), made)
    x = torch.from_numpy(exact_rows.rows(1, 32, unit, seed, holds)).to(drawing.dtype_of(dtype))
    makes = f"torch.from_numpy(exact_rows.rows(1, 32, {unit}, {seed}, {holds})).to(torch.{dtype})"
    court.judge(property_, {"x": makes}, (x, q), drawing.quantizer(q.spec))


@pytest.mark.judges("quantize", declares=("blocks", "grids"), dtype=DTYPES, family=tuple(INPUTS))
@given(data=st.data())
def test_inputs_of_codes(court: Court, dtype: str, family: str, data: st.DataObject) -> None:
    _family(court, properties.codes, dtype, family, data)


@pytest.mark.judges("fake_quantize", declares=("blocks", "grids"), dtype=DTYPES,
                    family=tuple(INPUTS))  # fmt: skip
@given(data=st.data())
def test_inputs_of_values(court: Court, dtype: str, family: str, data: st.DataObject) -> None:
    _family(court, properties.values, dtype, family, data)


@pytest.mark.judges("quantize", "mask", declares=("blocks", "grids", "estimators"), dtype=DTYPES,
                    family=tuple(INPUTS))  # fmt: skip
@given(data=st.data())
def test_inputs_of_mask(court: Court, dtype: str, family: str, data: st.DataObject) -> None:
    grid, estimator = drawing.grid(court, data), drawing.declared_estimator(court, data)
    block = drawing.block(court, data)
    q = quest.Quantizer(quest.grids.parse(grid), quest.Hadamard(block), estimator)
    drawing.judge(court, properties.mask, _drawn(court, dtype, family, q, data), q)


def _family(
    court: Court, property_: Callable[..., Any], dtype: str, family: str, data: st.DataObject
) -> None:
    q = _quantizer(court, drawing.grid(court, data), data)
    drawing.judge(court, property_, _drawn(court, dtype, family, q, data), q)


def _drawn(court: Court, dtype: str, family: str, q: quest.Quantizer, data: st.DataObject) -> Case:
    capabilities = court.impl.capabilities
    ties, block = capabilities.ties == "up", q.transform.order(0)
    return data.draw(drawing.family(family, dtype, block, capabilities, ties=ties))
