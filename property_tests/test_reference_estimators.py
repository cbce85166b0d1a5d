"""The masks of the gradient estimators (method, 4. Gradient estimators)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quest.reference import estimators, grids, quantize

EXACT = [
    *(grids.uniform(levels, (levels - 1) / 2) for levels in (2, 3, 4, 16, 256)),
    grids.e2m1(1.0),
    grids.table([-4.0, -1.0, 1.0, 4.0]),
    grids.table([-3.0, -1.0, 0.0, 0.5, 4.0]),  # asymmetric
    grids.table([-3.0, -2.0, 2.0, 3.0]),  # widest gap inside
]
FITTED = [
    *(grids.uniform(levels) for levels in (2, 3, 4, 16, 256)),
    grids.ternary(),
    grids.e2m1(),
    *(grids.lloyd_max(levels) for levels in (2, 3, 16, 256)),
]


@given(
    grid=st.sampled_from(EXACT),
    estimator=st.sampled_from(["ste", "clip", "trust"]),
    parameter=st.sampled_from([0.25, 0.5, 0.75, 1.0, 1.25, 2.0]),
    exponent=st.integers(-3, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_mask_is_the_inequality_in_exact_arithmetic(
    grid: grids.Grid, estimator: str, parameter: float, exponent: int, seed: int
) -> None:
    """Dyadic numbers throughout: the definitions can be evaluated as they are written."""
    rng = np.random.default_rng(seed)
    sigma = 2.0**exponent
    width = 8 * int(grid.outer + 2 * grid.half_gap)
    t = np.concatenate([rng.integers(-width, width + 1, 32) / 8, grid.points, grid.midpoints])
    keep = np.repeat([True, False], len(t))
    t = np.tile(t, 2)
    values = np.where(keep, quantize.decode(quantize.encode(t, grid), grid) * sigma, 0.0)
    mask = estimators.mask(t * sigma, values, [sigma], grid, estimator, parameter, keep)
    expected = {
        "ste": np.full(t.shape, True),
        "clip": np.abs(t * sigma) <= parameter * grid.points[-1] * sigma,
        "trust": np.abs(values - t * sigma) <= parameter * grid.half_gap * sigma,
    }[estimator]
    assert mask.dtype == np.bool_
    assert np.array_equal(mask, expected)


@given(
    grid=st.sampled_from(FITTED),
    parameter=st.sampled_from([1.0, 1.5]),
    sigma=st.floats(1e-3, 1e3),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_trust_keeps_the_inside_whatever_the_rounding(
    grid: grids.Grid, parameter: float, sigma: float, dtype: type[np.floating]
) -> None:
    points = np.concatenate([grid.points, grid.midpoints])
    x = (points * sigma).astype(dtype).astype(np.float64)
    values = quantize.decode(quantize.encode(x / sigma, grid), grid) * sigma
    keep = np.full(x.shape, True)
    assert estimators.mask(x, values, [sigma], grid, "trust", parameter, keep).all()


@given(grid=st.sampled_from(FITTED), sigma=st.floats(1e-3, 1e3))
def test_trust_ends_at_the_outer_half_gap(grid: grids.Grid, sigma: float) -> None:
    edge = (grid.points[-1] + (grid.points[-1] - grid.points[-2]) / 2) * sigma
    x = np.array([-1.001, -0.999, 0.999, 1.001]) * edge
    values = quantize.decode(quantize.encode(x / sigma, grid), grid) * sigma
    mask = estimators.mask(x, values, [sigma], grid, "trust", 1.0, np.full(4, True))
    assert mask.tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("points", "t", "expected"),
    [
        # T = 1/2 and a gap of 4 inside: its middle is not within T of a point.
        ([-3.0, -2.0, 2.0, 3.0], [0.0, 1.0, 1.5, 3.5, 4.0], [0, 0, 1, 1, 0]),
        # T = 1 from the upper end; the lower end is nearer to zero.
        ([-1.0, 0.0, 2.0], [-2.5, -2.0, 1.0, 3.0, 3.5], [0, 1, 1, 1, 0]),
    ],
)
def test_trust_of_tables_that_are_not_widest_outside(
    points: list[float], t: list[float], expected: list[int]
) -> None:
    grid = grids.table(points)
    values = quantize.decode(quantize.encode(t, grid), grid)
    mask = estimators.mask(t, values, [1.0], grid, "trust", 1.0, np.full(5, True))
    assert mask.tolist() == [bool(e) for e in expected]


def test_pruned_entries_are_compared_with_zero() -> None:
    grid = grids.uniform(4, 1.5)  # T = 1/2
    x = np.array([0.4, 0.5, 0.6, 1.0, 1.1])
    keep = np.full(5, False)
    for scale, expected in ((1.0, [1, 1, 0, 0, 0]), (2.0, [1, 1, 1, 1, 0]), (0.5, [0] * 5)):
        mask = estimators.mask(x, np.zeros(5), [1.0], grid, "trust", scale, keep)
        assert mask.tolist() == [bool(e) for e in expected]


def test_rows_of_scale_zero_and_nan() -> None:
    x = np.array([[0.0, 0.0], [1.0, np.nan], [5e-324, 0.0]])
    sigma = np.array([[0.0], [np.nan], [0.0]])
    for estimator in ("ste", "clip", "trust"):
        values = np.where(np.isnan(sigma), np.nan, 0.0) * np.ones(2)
        mask = estimators.mask(
            x, values, sigma, grids.uniform(4), estimator, 1.0, np.full(x.shape, True)
        )
        assert mask.all(axis=1).tolist() == [True, estimator == "ste", True]
        assert mask.any(axis=1).tolist() == [True, estimator == "ste", True]


def test_errors_name_the_argument() -> None:
    x = np.ones(2)
    with pytest.raises(ValueError, match="estimator is 'pact'; 'ste', 'clip' and 'trust'"):
        estimators.mask(x, x, [1.0], grids.uniform(4), "pact", 1.0, x > 0)
    for parameter in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"parameter is {parameter}; a finite value above 0"):
            estimators.mask(x, x, [1.0], grids.uniform(4), "clip", parameter, x > 0)
