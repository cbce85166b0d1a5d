"""The Hadamard transform and its transpose, in blocks: x H and x H^T (T1)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quest.conformance.public import properties
from quest.conformance.public.capabilities import BLOCKS, DTYPES, INPUTS
from quest.conformance.public.court import Court

from . import drawing


@pytest.mark.judges("hadamard", dtype=DTYPES, block=BLOCKS)
@given(data=st.data())
def test_transform(court: Court, dtype: str, block: int, data: st.DataObject) -> None:
    case = data.draw(drawing.plain(dtype, block, court.impl.capabilities, ties=True))
    court.judge(properties.transform, {"x": case}, (case.make(), block), str(block))


@pytest.mark.judges("hadamard_transpose", dtype=DTYPES, block=BLOCKS)
@given(data=st.data())
def test_transpose(court: Court, dtype: str, block: int, data: st.DataObject) -> None:
    case = data.draw(drawing.plain(dtype, block, court.impl.capabilities, ties=True))
    court.judge(properties.transpose, {"x": case}, (case.make(), block), str(block))


@pytest.mark.judges("hadamard", declares=("blocks",), dtype=DTYPES, family=tuple(INPUTS))
@given(data=st.data())
def test_inputs(court: Court, dtype: str, family: str, data: st.DataObject) -> None:
    capabilities = court.impl.capabilities
    block = drawing.block(court, data)
    case = data.draw(drawing.family(family, dtype, block, capabilities, ties=True))
    court.judge(properties.transform, {"x": case}, (case.make(), block), str(block))
