"""The quantizers of CUDA C++, `blocks.cu` and `rows.cu`: any width, grid and prologue."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from property_tests.ledger import LEDGER
from property_tests.places import Place
from quest import operands
from quest.conformance import examine, inputs
from quest.kernels import cuda, rows
from quest.quantizer import parse

GRIDS = ("uniform1", "uniform2", "uniform3", "uniform4", "uniform5", "uniform8", "ternary")
DTYPES = st.sampled_from((torch.bfloat16, torch.float16, torch.float32))
# Of a row: each of the teams, warps that share a row, and rows that share a warp; the widest.
BLOCKS = st.one_of(st.integers(1, 48), st.sampled_from((64, 86, 100, 112, 384)))
KINDS = st.sampled_from(sorted(inputs.DISTRIBUTIONS))
# A place is the same for all examples.
drawn = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def _rows(data: st.DataObject, dtype: torch.dtype, blocks: int) -> tuple[torch.Tensor, str]:
    rows = data.draw(st.integers(1, 20 if blocks < 50 else 4), "rows")
    kind, seed = data.draw(KINDS, "kind"), data.draw(st.integers(0, 99), "seed")
    return inputs.draw(kind, (rows, 128 * blocks), dtype, seed), f"{rows} rows of {128 * blocks}"


def _spec(data: st.DataObject, estimators: tuple[str, ...]) -> tuple[str, str]:
    grid, estimator = data.draw(st.sampled_from(GRIDS)), data.draw(st.sampled_from(estimators))
    spec = f"{grid}/hadamard128/{estimator}/dense"
    return spec, (operands.kinds(parse(spec), parse(spec)) or ("",))[0]


@pytest.fixture(autouse=True)
def _one_multiprocessor(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "processors", lambda _: 1)  # turns, and buffers that are used again


@drawn
@given(data=st.data(), few=st.booleans())
def test_rows(place: Place, data: st.DataObject, few: bool) -> None:
    """Values, codes, operands and masks, by either kernel."""
    spec, kind = _spec(data, ("ste", "clip0.8", "trust1.0"))
    x, told = _rows(data, data.draw(DTYPES), data.draw(BLOCKS))
    q = parse(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "takes", lambda *_: few)
        found = examine.quantizer(place.lane, x, q, conclusive=False)
        LEDGER.judge(place.lane, found, told, conclusive=False)
        LEDGER.judge(place.lane, examine.encoded(place.lane, x, q, kind), told, conclusive=False)


@drawn
@given(data=st.data(), few=st.booleans())
def test_operands(place: Place, data: st.DataObject, few: bool) -> None:
    """Without a mask, by either kernel."""
    spec, kind = _spec(data, ("ste",))
    x, told = _rows(data, data.draw(DTYPES), data.draw(BLOCKS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "takes", lambda *_: few)
        found = examine.operand(place.lane, x, parse(spec), kind)
    LEDGER.judge(place.lane, found, f"{told}, {spec}", conclusive=False)


@drawn
@given(data=st.data(), few=st.booleans(), sums=st.booleans())
def test_norms(place: Place, data: st.DataObject, few: bool, sums: bool) -> None:
    """Of rows, or of their sum with others; without one by either kernel."""
    spec, kind = _spec(data, ("ste",))
    dtype, blocks = data.draw(st.sampled_from((torch.bfloat16, torch.float16))), data.draw(BLOCKS)
    x, told = _rows(data, dtype, min(blocks, 200))  # beside the widest no weight has room
    seed = data.draw(st.integers(0, 99), "seed")
    residual = inputs.draw(data.draw(KINDS, "kind"), tuple(x.shape), dtype, seed) if sums else None
    weight = inputs.draw("gaussian", (x.shape[1],), dtype, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "takes", lambda *_: few)
        found = examine.normed(
            place.lane, x, residual, weight, 1e-5, parse(spec), kind, conclusive=False
        )
    LEDGER.judge(place.lane, found, f"{told}, {spec}", conclusive=False)


@drawn
@given(data=st.data())
def test_gates(place: Place, data: st.DataObject) -> None:
    spec, kind = _spec(data, ("ste",))
    dtype = data.draw(st.sampled_from((torch.bfloat16, torch.float16)))
    gate, told = _rows(data, dtype, data.draw(BLOCKS))
    seed = data.draw(st.integers(0, 99), "seed")
    value = inputs.draw(data.draw(KINDS, "kind"), tuple(gate.shape), dtype, seed)
    found = examine.gated(place.lane, gate, value, parse(spec), kind, conclusive=False)
    LEDGER.judge(place.lane, found, f"{told}, {spec}", conclusive=False)
