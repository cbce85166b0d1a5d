"""The quantizer in every lane: scale, codes, mask, selection, packing and values (T0, T2 to T6)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, currently_in_test_context, given, target
from hypothesis import strategies as st

import quest
from property_tests.lane_marks import every_dtype, every_lane, fewer
from property_tests.ledger import LEDGER
from quest.conformance import exact_rows, examine, inputs, judges, oracle
from quest.conformance.lanes import Lane
from quest.conformance.strategies import (
    ESTIMATORS,
    FORMATS,
    HEADER,
    ORDERS,
    SEEDS,
    SPARSITIES,
    Case,
    cases,
    lane_code,
    widths,
)
from quest.reference import hadamard, quantize


def check(lane: Lane, case: Case, q: quest.Quantizer, conclusive: bool = True) -> None:
    found = examine.quantizer(lane, case.make(), q, conclusive=conclusive)
    code = f"q = quest.quantizer.parse({q.spec!r})\nprint(examine.quantizer(lane, x, q))"
    LEDGER.judge(lane, found, f"{HEADER}{lane_code(lane)}{case.code()}\n{code}", conclusive)
    if currently_in_test_context():
        target(max((v.ratio for v in found), default=0.0), label=f"worst ratio, {lane}")


# format, order, sparsity, estimator, dtype, distribution, shape: each kind of part at least once.
ONE_OF_EACH = (
    ("uniform1", 128, None, quest.Clip(1.3), torch.bfloat16, "gaussian", (5, 384)),
    ("uniform1", 2, quest.Pairwise(4, 8), quest.Trust(1.5), torch.float32, "equal", (3, 16)),
    ("uniform2", 12, quest.Pairwise(4, 8), quest.Trust(), torch.float32, "heavy", (3, 24)),
    ("uniform3", 16, quest.NM(1, 2), quest.Trust(0.5), torch.float16, "gaussian", (7, 48)),
    ("uniform4", 128, quest.NM(2, 4), quest.Trust(), torch.float32, "mixed_rows", (17, 1280)),
    ("uniform4", 1, quest.NM(1, 4), quest.Trust(), torch.float32, "alternating", (2, 3, 8)),
    ("uniform4", 128, quest.NM(2, 4), quest.Trust(), torch.float32, "gaussian", (2, 20480)),
    ("uniform8", 32, None, quest.Trust(), torch.bfloat16, "gaussian", (64, 256)),
    ("uniform8", 1, None, quest.Trust(0.5), torch.float32, "zeros", (2, 9)),
    ("ternary", 20, quest.NM(2, 4), quest.Clip(0.6), torch.float32, "outlier", (3, 60)),
    ("e2m1", 1, None, quest.Trust(0.5), torch.float32, "gaussian", (4, 33)),
    ("e2m1", 16, quest.Pairwise(4, 8), quest.Trust(), torch.float16, "non_finite", (9, 48)),
    ("lloyd_max3", 8, quest.NM(1, 4), quest.Trust(), torch.float32, "tiny", (2, 40)),
    ("lloyd_max8", 2, None, quest.STE(), torch.bfloat16, "huge", (3, 18)),
)


@every_lane
def test_one_of_each(lane: Lane) -> None:
    """In one test, since the quick profile takes one in 16 parameters."""
    for seed, (format_, order, sparsity, estimator, dtype, kind, shape) in enumerate(ONE_OF_EACH):
        q = quest.Quantizer(FORMATS[format_], quest.Hadamard(order), estimator, sparsity)
        check(lane, Case(kind, shape, dtype, "contiguous", seed), q, conclusive=False)


@every_lane
@every_dtype
@pytest.mark.parametrize("format_", FORMATS)
@fewer
@given(data=st.data())
def test_quantizer(lane: Lane, dtype: torch.dtype, format_: str, data: st.DataObject) -> None:
    order = data.draw(st.sampled_from(ORDERS), label="order")
    sparsity = data.draw(st.sampled_from(SPARSITIES), label="sparsity")
    estimator = data.draw(st.sampled_from(ESTIMATORS), label="estimator")
    group = 1 if sparsity is None else sparsity.m
    case = data.draw(cases(dtype, widths(order, group)))
    q = quest.Quantizer(FORMATS[format_], quest.Hadamard(order), estimator, sparsity)
    assume(lane.supports("quantize", {"q": q}))
    # Equal rows flip together, and the rules on ambiguous codes count independent ones.
    check(lane, case, q, conclusive=case.layout != "expanded")


@every_lane
@pytest.mark.parametrize("layout", inputs.LAYOUTS)
@pytest.mark.parametrize("distribution", ["gaussian", "equal"])
def test_layouts(lane: Lane, layout: str, distribution: str) -> None:
    case = Case(distribution, (2, 3, 96), torch.float32, layout, 0)
    for sparsity in (None, quest.NM(2, 4)):
        q = quest.Quantizer(FORMATS["uniform4"], quest.Hadamard(32), quest.Trust(), sparsity)
        check(lane, case, q, conclusive=layout != "expanded")


@every_lane
@pytest.mark.parametrize(
    ("width", "format_"),
    [*((20480, name) for name in ("uniform1", "uniform4", "ternary", "e2m1", "lloyd_max3")),
     (14336, "uniform4"), (14336, "e2m1")],
)  # fmt: skip
def test_wide_rows(lane: Lane, width: int, format_: str) -> None:
    # 20480 columns do not fit one tile: two passes over the row.
    for sparsity in (None, quest.Pairwise(4, 8)):
        q = quest.Quantizer(FORMATS[format_], quest.Hadamard(128), quest.Trust(), sparsity)
        check(lane, Case("gaussian", (2, width), torch.bfloat16, "contiguous", width), q)
        check(lane, Case("mixed_rows", (3, width), torch.float32, "padded", width), q)
        check(lane, Case("non_finite", (3, width), torch.float16, "offset", width), q)


@every_lane
@pytest.mark.parametrize("grid", ["uniform1", "lloyd_max1"])
def test_two_of_four_in_a_row_of_eight(lane: Lane, grid: str) -> None:
    # Compiled, an earlier selection did not keep exactly two of each four here (NOTES.md, bug 3).
    q = quest.quantizer.parse(f"{grid}/hadamard1/trust1.0/2:4")
    check(lane, Case("gaussian", (8,), torch.bfloat16, "contiguous", 0), q)


@every_lane
@pytest.mark.parametrize("loud", [0, 1, 2])
def test_chunks_of_other_magnitudes(lane: Lane, loud: int) -> None:
    # A row that takes three turns, one of them 2^60 times as large as the others.
    x = inputs.draw("gaussian", (2, 20480), torch.float32, loud)
    x[:, 8192 * loud : 8192 * (loud + 1)] *= 2.0**60
    q = quest.Quantizer(FORMATS["uniform4"], quest.Hadamard(128), quest.Trust())
    # The quiet chunks are so near zero that their sign is all that is left of them.
    LEDGER.judge(lane, examine.quantizer(lane, x, q), f"chunk {loud} is loud")
    x[0, -1] = float("nan")
    LEDGER.judge(lane, examine.quantizer(lane, x, q), f"chunk {loud} is loud, NaN at the end")


@every_lane
@pytest.mark.parametrize("format_", ["uniform4", "uniform8"])
def test_subnormal_scales(lane: Lane, format_: str) -> None:
    # The stored scale is rounded to few bits, and codes are taken against it.
    q = quest.Quantizer(FORMATS[format_], quest.Hadamard(128), quest.Trust())
    case = Case("subnormal", (64, 384), torch.float32, "contiguous", 0)
    check(lane, case, q, conclusive=False)


@every_lane
def test_rows_without_columns(lane: Lane) -> None:
    q = quest.Quantizer(FORMATS["uniform4"], quest.Identity(), quest.Trust())
    out = lane.call("quantize", torch.zeros(3, 0), q=q)
    assert out["codes"].shape == (3, 0)
    assert torch.equal(out["scale"], torch.zeros(3, 1))
    out = lane.call("encode", torch.zeros(3, 0), q=q, kind="integers")
    assert out["operand"].shape == (3, 0)
    assert torch.equal(out["scale"], torch.zeros(3, 1))
    assert torch.equal(out["sums"], torch.zeros(3, 1, dtype=torch.int32))


@every_lane
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("format_", ["uniform1", "uniform4", "uniform8", "e2m1"])
def test_all_bit_patterns(lane: Lane, dtype: torch.dtype, format_: str) -> None:
    # Rows of neighbours: every value of the dtype is quantized, in a row of its own magnitude.
    x = inputs.all_patterns(dtype, 64)
    q = quest.Quantizer(FORMATS[format_], quest.Identity(), quest.Trust())
    found = examine.quantizer(lane, x, q, conclusive=False)
    LEDGER.judge(lane, found, f"inputs.all_patterns({dtype}, 64), {q.spec}", conclusive=False)


# Steps and points that are dyadic: midpoints are multiples of an eighth of sigma. Not parameters,
# of which the quick profile would take the first alone.
DYADIC = (
    *(quest.grids.uniform(bits, (2**bits - 1) / 8) for bits in (1, 2, 4)),
    quest.grids.ternary(0.25),
    quest.grids.e2m1(0.5),
)


@every_lane
@every_dtype
@fewer
@given(seed=SEEDS)
def test_exact_lane(lane: Lane, dtype: torch.dtype, seed: int) -> None:
    """Dyadic scales and steps, values on midpoints, zero and the edges: ties bit for bit."""
    # In half steps; rms is a power of two in these units, so sigma and t are exact.
    z = exact_rows.rows(3, 32, half_steps_per_sigma=8, seed=seed) / 8
    # Hadamard of a power of four and float32: the rotation is exact, too.
    order = 16 if dtype == torch.float32 else 1
    x = torch.from_numpy(hadamard.apply_transpose(z, order) * 2.0 ** (seed % 21 - 10)).to(dtype)
    assert np.array_equal(hadamard.apply(oracle.lift(x), order), z * 2.0 ** (seed % 21 - 10)), (
        "the construction is not exact"
    )
    estimators = (quest.Trust(), quest.Trust(0.5), quest.Clip(1.0), quest.Clip(2.0))
    for i, grid in enumerate(DYADIC):
        assert np.isin(z, grid.midpoints).any(), "the construction has no ties"
        for estimator in (estimators[(seed + i) % 4], estimators[(seed + i + 1) % 4]):
            q = quest.Quantizer(grid, quest.Hadamard(order), estimator)
            out = lane.call("quantize", x, q=q)
            expected = quantize.quantize(oracle.lift(x), **oracle.arguments(q, 32))
            told = f"exact rows of seed {seed}, {q.spec}"
            LEDGER.judge(
                lane,
                [
                    judges.exact("exact scale", oracle.lift(out["scale"]), expected.scale),
                    judges.exact("exact codes", oracle.lift(out["codes"]), expected.codes),
                    judges.exact("exact mask", oracle.lift(out["mask"]), expected.mask),
                ],
                told,
            )


@every_lane
@pytest.mark.parametrize("format_", ["uniform1", "uniform3", "uniform8", "ternary", "e2m1"])
@fewer
@given(seed=SEEDS)
def test_near_ties(lane: Lane, format_: str, seed: int) -> None:
    """Rows made of midpoints and their float32 neighbours: most codes are open, none is wrong."""
    grid = FORMATS[format_]
    rng = np.random.default_rng(seed)
    mids = np.array(grid.midpoints)
    # Outer midpoints seldom: the row's RMS has to stay below 1.
    p = np.exp(-(mids**2))
    z = rng.choice(mids, (4, 128), p=p / p.sum()) * (1 + rng.integers(-4, 5, (4, 128)) * 2.0**-23)
    # Entries that bring the row's RMS to 1 leave the others where they are.
    squares = (z[:, :120] ** 2).sum(-1, keepdims=True)
    assert squares.max() < 128, "the construction is not near ties"
    z[:, 120:] = np.sqrt((128 - squares) / 8)
    x = torch.from_numpy(hadamard.apply_transpose(z, 128)).float()
    q = quest.Quantizer(grid, quest.Hadamard(128), quest.Trust())
    found = examine.quantizer(lane, x, q, conclusive=False)
    LEDGER.judge(lane, found, f"near ties of seed {seed}, {q.spec}", conclusive=False)


@every_lane
@every_dtype
def test_interior_gradient_survives(lane: Lane, dtype: torch.dtype) -> None:
    """At the default trust no entry inside the grid is masked, whatever the dtype."""
    for format_ in FORMATS:
        q = quest.Quantizer(FORMATS[format_], quest.Hadamard(128), quest.Trust())
        x = inputs.draw("gaussian", (64, 256), dtype, 7)
        out = lane.call("quantize", x, q=q)
        y = hadamard.apply(oracle.lift(x), 128) / oracle.lift(out["scale"])
        inside = np.abs(y) <= FORMATS[format_].outer
        assert oracle.lift(out["mask"])[inside].all()
        assert inside.mean() > 0.5


@every_lane
def test_mean_squared_error_is_the_grid_s(lane: Lane) -> None:
    """On Gaussian rows the error is the closed form's, within five standard errors."""
    x = inputs.draw("gaussian", (64, 1024), torch.float32, 3)
    y = hadamard.apply(oracle.lift(x), 128)
    for format_ in ("uniform1", "uniform2", "uniform4", "ternary", "e2m1", "lloyd_max4"):
        q = quest.Quantizer(FORMATS[format_], quest.Hadamard(128), quest.Trust())
        values = oracle.lift(lane.call("fake_quantize", x, q=q)["values"])
        squares = (values - y) ** 2
        expected = oracle.grid(FORMATS[format_]).mse
        # Five standard errors: a false alarm in 2 million.
        assert abs(squares.mean() - expected) < 5 * squares.std() / squares.size**0.5
