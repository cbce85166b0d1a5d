"""Judges of values, packed bytes, forms and selections, mostly on numbers that stand here."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import quest
from property_tests.honest import (
    F32,
    GRIDS,
    HONEST,
    NM24,
    PAIRS,
    SEEDS,
    UNIFORM,
    Array,
    Q,
    decode,
    pack,
    run,
    tensor,
)
from quest.conformance import inputs, judges, oracle
from quest.conformance.verdict import Rejected, Verdict
from quest.reference import bounds, quantize


@pytest.mark.whole
@pytest.mark.parametrize(
    ("pattern", "kept", "told"),
    [
        (NM24, [1, 1, 0, 0, 1, 1, 0, 0], None),
        (NM24, [1, 0, 1, 0, 1, 1, 0, 0], "1 groups drop a larger entry than they keep"),
        (NM24, [1, 1, 1, 0, 1, 0, 0, 0], "a group of 4 does not keep 2"),
        (NM24, [1, 1, 0, 0, 0, 0, 1, 1], "4 exact ties keep the higher index"),
        (PAIRS, [1, 1, 0, 0, 0, 0, 1, 1], "1 groups drop a larger pair than they keep"),
        (PAIRS, [1, 1, 1, 1, 0, 0, 0, 0], None),
        (PAIRS, [1, 1, 1, 0, 1, 0, 0, 0], "half a pair is kept"),
        (PAIRS, [1, 1, 1, 1, 1, 1, 0, 0], "a group of 8 does not keep 4"),
    ],
)
def test_selected_says_why(pattern: Any, kept: list[int], told: str | None) -> None:
    # As entries: 8 6 | 5 4 and four times 3; as pairs: 10, 6.4, 4.2, 4.2.
    x = torch.tensor([[8.0, 6.0, 5.0, 4.0, 3.0, 3.0, 3.0, 3.0]])
    q = Q(UNIFORM[4], quest.Identity(), quest.Trust(), pattern)
    verdict = judges.selected(x, q, torch.tensor([kept], dtype=torch.bool))
    assert verdict.failure == told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_values_hold_and_bite(grid: Any, dtype: torch.dtype) -> None:
    q = Q(grid, quest.Identity(), quest.STE())
    x = inputs.draw("gaussian", (16, 64), dtype, 1)
    out = run(x, q, HONEST)
    exact, codes = out["values"], out["codes"]
    points = decode(codes.numpy(), np.ones(codes.shape, bool), q)
    fused = tensor(points.astype(F32) * out["scale"].numpy(), dtype)
    twice = tensor((points / grid.outer).astype(F32) * (out["scale"].numpy() * F32(grid.outer)),
                   dtype)  # fmt: skip
    for values in (exact, fused, twice):
        judges.dequantized(q, codes, out["scale"], None, values).require()
    # Two units in the last place, and a value of the neighbouring code.
    unit = bounds.UNIT[oracle.dtype_name(dtype)]
    for wrong in (exact * (1 + 4 * unit), exact.roll(1, 1), exact.neg(), exact.bfloat16() * 1.01):
        with pytest.raises(Rejected, match=r"^values: at"):
            judges.dequantized(q, codes, out["scale"], None, wrong.to(dtype)).require()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@given(seed=SEEDS, width=st.integers(1, 19))
def test_packing_holds_and_bites(grid: Any, seed: int, width: int) -> None:
    q = Q(grid, quest.Identity())
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, grid.levels, (3, width)) - (grid.levels // 2 if grid.step else 0)
    data = pack(codes, q)
    judges.packed(q, torch.from_numpy(codes), torch.from_numpy(data)).require()
    for place in range(data.shape[1]):
        for bit in (1, 128):
            wrong = data.copy()
            wrong[seed % 3, place] ^= bit
            with pytest.raises(Rejected, match=r"^packed codes: 1 of"):
                judges.packed(q, torch.from_numpy(codes), torch.from_numpy(wrong)).require()
    with pytest.raises(Rejected, match=r"^packed codes: shape"):
        judges.packed(q, torch.from_numpy(codes), torch.from_numpy(data[:, :-1])).require()
    flags = torch.from_numpy(rng.random((3, width)) < 0.5)
    bits = torch.from_numpy(np.packbits(flags.numpy(), axis=-1, bitorder="little"))
    judges.packed_bits("packed mask", flags, bits).require()
    with pytest.raises(Rejected, match=r"^packed mask"):
        judges.packed_bits("packed mask", ~flags, bits).require()


def test_form() -> None:
    t = torch.zeros(2, 3)
    judges.form("codes", t, (2, 3), torch.float32).require()
    for shape, dtype in (((3, 2), torch.float32), ((2, 3), torch.float16), ((6,), torch.float32)):
        with pytest.raises(Rejected, match=r"^codes: has shape"):
            judges.form("codes", t, shape, dtype).require()


def test_exact() -> None:
    a = np.arange(6).reshape(2, 3)
    judges.exact("row sums", a, a.copy()).require()
    judges.exact("row sums", a[:0], a[:0]).require()
    b = a.copy()
    b[1, 2] = 7
    with pytest.raises(Rejected, match=r"row sums: 1 of 6 differ; at \(1, 2\) it is 5, not 7"):
        judges.exact("row sums", a, b).require()
    with pytest.raises(Rejected, match="row sums: shape"):
        judges.exact("row sums", a, a[:1]).require()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_tell_zeros_apart_and_nan_alike(dtype: torch.dtype) -> None:
    t = torch.tensor([0.0, -0.0, math.nan, 1.0], dtype=dtype)
    judges.exact("scale", judges.bits(t), judges.bits(t.clone())).require()
    assert judges.bits(t)[0] != judges.bits(t)[1]


def test_close_at_the_edge_of_its_bound() -> None:
    expected, bound = np.array([1.0, -2.0]), np.array([0.5, 0.25])
    verdict = judges.close("y", torch.tensor([1.5, -2.25]), expected, bound).require()
    assert verdict.ratio == 1
    with pytest.raises(Rejected, match=r"y: at \(1,\) it is .*-2\.5\)?, expected .*-2\.0"):
        judges.close("y", torch.tensor([1.5, -2.5]), expected, bound).require()


def test_each_element_is_compared() -> None:
    """The first and the last, too, of a tensor of any size."""
    for shape in ((1,), (3, 7), (5, 300)):
        ones, right = np.ones(shape), torch.ones(shape)
        for i in {0, 1 % ones.size, ones.size // 2, ones.size - 2, ones.size - 1} - {-1}:
            wrong = right.clone()
            wrong.view(-1)[i] = 1.5
            assert judges.close("y", wrong, ones, 0.25 * ones).ratio == 2
            assert judges.close("y", wrong, ones, 0.5 * ones).failure is None
            assert judges.exact("y", wrong.numpy(), ones).failure is not None


def test_close_compares_shapes() -> None:
    # Those that NumPy would spread over each other, too.
    for shape in ((3,), (1, 3), (3, 1)):
        ones = np.ones(shape)
        for other in ((3,), (1, 3), (3, 1)):
            failure = judges.close("y", torch.ones(other), ones, ones).failure
            assert (failure is None) == (other == shape)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("actual", "expected", "good"),
    [
        (math.nan, math.nan, True),
        (math.nan, 1.0, False),
        (1.0, math.nan, False),
        (math.inf, math.inf, True),
        (-math.inf, math.inf, False),
        (math.inf, 1.0, False),
        (math.inf, 65504.0, True),  # half a unit on it overflows
        (-math.inf, 65504.0, False),
        (math.inf, 60000.0, False),
        (1.0, math.inf, False),
        (65504.0, math.inf, False),
        (0.0, 0.0, True),
        (2.0**-24, 0.0, False),
    ],
)
def test_close_places_infinities_and_nan(actual: float, expected: float, good: bool) -> None:
    found = judges.close(
        "y",
        torch.tensor([actual], dtype=torch.float16),
        np.array([expected]),
        np.array([abs(expected) * 2.0**-11]),
    )
    assert (found.failure is None) == good, found


def off(exact: Array, roundings: Array | float) -> Tensor:
    """float32 values that are so many units of roundoff, or one more or less, off."""
    return torch.from_numpy(np.asarray(exact) * (1 + roundings * bounds.U32)).float()


def after_the_transform(roundings: int) -> dict[str, Verdict]:
    """Verdicts on values, codes, a mask and a product that are so many roundings off."""
    grid = quest.grids.uniform(4)
    q = Q(grid, quest.Identity(), quest.Clip(1.0))
    one = torch.ones(1, 1)
    codes = torch.arange(-8, 8, dtype=torch.int8)[None]
    points = np.array([grid.points])
    found = {"values": judges.dequantized(q, codes, one, None, off(points, roundings))}
    # An upper code below its midpoint, and a lower one above.
    mids = np.array([grid.midpoints])
    mids = mids[np.abs(mids) > 0.1][None]
    upper = torch.from_numpy(quantize.encode(mids, oracle.grid(grid))).to(torch.int8)
    x = off(mids, -roundings * np.sign(mids))
    found["codes"] = judges.coded(x, q, upper, one, conclusive=False)
    x = off(np.array([[grid.outer, -grid.outer]]), roundings)
    ends = torch.tensor([[7, -8]], dtype=torch.int8)
    found["mask"] = judges.masked(x, q, ends, one, torch.ones(1, 2, dtype=torch.bool))
    numbers = (np.array([[3, -5, 7]]), np.array([[1, 2, -4], [6, -1, 5]]))
    y = off(numbers[0] @ numbers[1].T * 0.75, roundings)
    found["product"] = judges.multiplied(numbers, (0.5, 1.5), (one, torch.ones(2, 1)), None, y)
    return found


def test_roundings_after_the_transform_are_few() -> None:
    """What the counts in `bounds` say at the most, 4 to 7, and far less than 10 times that."""
    for roundings, good in ((0, True), (3, True), (14, False)):
        found = after_the_transform(roundings)
        assert {name: v.failure is None for name, v in found.items()} == dict.fromkeys(found, good)


def test_a_mask_must_agree_with_its_code() -> None:
    # Within its error the value is either side of a midpoint, and either side of a threshold that
    # lies a little below; but not above the one and below the other.
    grid = quest.grids.uniform(4)
    middle = oracle.grid(grid).midpoints[10]
    q = Q(grid, quest.Identity(), quest.Clip(middle * (1 - 4 * bounds.U32) / grid.outer))
    x, one = off(np.array([[middle]]), -2.5), torch.ones(1, 1)
    for code, flag, good in ((3, True, False), (3, False, True), (2, True, True), (2, False, True)):
        codes = torch.tensor([[code]], dtype=torch.int8)
        judges.coded(x, q, codes, one, conclusive=False).require()
        found = judges.masked(x, q, codes, one, torch.tensor([[flag]]))
        assert (found.failure is None) == good, found
