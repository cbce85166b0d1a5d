"""sigma, the root mean square of a rotated row (T2)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quest.conformance.public import properties
from quest.conformance.public.capabilities import DTYPES, INPUTS
from quest.conformance.public.court import Court

from . import drawing


@pytest.mark.judges("scale", declares=("blocks",), dtype=DTYPES)
@given(data=st.data())
def test_scale(court: Court, dtype: str, data: st.DataObject) -> None:
    capabilities = court.impl.capabilities
    block = drawing.block(court, data)
    case = data.draw(drawing.plain(dtype, block, capabilities, ties=True))
    court.judge(properties.scale, {"x": case}, (case.make(), block), str(block))


@pytest.mark.judges("scale", declares=("blocks",), dtype=DTYPES, family=tuple(INPUTS))
@given(data=st.data())
def test_inputs(court: Court, dtype: str, family: str, data: st.DataObject) -> None:
    capabilities = court.impl.capabilities
    block = drawing.block(court, data)
    case = data.draw(drawing.family(family, dtype, block, capabilities, ties=True))
    court.judge(properties.scale, {"x": case}, (case.make(), block), str(block))
