"""The grids and their mean squared errors (method, 2. Grids)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from quest.reference import grids

LEVELS = [*range(2, 20), 31, 32, 64, 127, 128, 255, 256]
FITTED = [*(grids.uniform(levels) for levels in LEVELS), grids.ternary(), grids.e2m1()]


def integrated(points: np.ndarray) -> float:
    """E[(Z - Q(Z))^2] by quadrature over each cell."""
    ends = [-np.inf, *(points[:-1] + points[1:]) / 2, np.inf]
    cells = zip(points, ends[:-1], ends[1:], strict=True)
    total = sum(
        quad(lambda z, p=p: (z - p) ** 2 * math.exp(-z * z / 2), a, b, epsabs=1e-15, epsrel=1e-12)[
            0
        ]
        for p, a, b in cells
    )
    return total / math.sqrt(2 * math.pi)


@pytest.mark.parametrize(
    ("grid", "published"),
    [
        (grids.uniform(2), 0.36338),
        (grids.ternary(), 0.19017),
        (grids.uniform(4), 0.11885),
        (grids.uniform(8), 0.037440),
        (grids.uniform(16), 0.011543),
        (grids.e2m1(), 0.012685),
        (grids.lloyd_max(4), 0.11748),  # Max 1960, table 1: 0.1175
    ],
)
def test_published_errors(grid: grids.Grid, published: float) -> None:
    assert grid.mse == pytest.approx(published, rel=5e-5)


def test_published_error_of_8_bits() -> None:
    # Printed as 8.78e-5, which is above the optimum by the width of the minimum that was searched.
    assert grids.uniform(256).mse == pytest.approx(8.78e-5, rel=2e-3)
    assert grids.uniform(256).mse < 8.78e-5


@given(
    points=st.lists(st.floats(-6, 6), min_size=2, max_size=12, unique=True).filter(
        lambda p: np.diff(np.sort(p)).min() > 1e-3
    )
)
def test_closed_form_is_the_integral(points: list[float]) -> None:
    ordered = np.sort(points)
    assert grids.mse(ordered) == pytest.approx(integrated(ordered), rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("grid", [grids.uniform(16), grids.e2m1(), grids.lloyd_max(9)])
def test_closed_form_of_fitted_grids_is_the_integral(grid: grids.Grid) -> None:
    assert grid.mse == pytest.approx(integrated(grid.points), rel=1e-10)


@pytest.mark.parametrize("grid", FITTED, ids=lambda g: f"{g.name}{g.levels}")
def test_alpha_is_the_optimum(grid: grids.Grid) -> None:
    assert grid.residual <= 1e-12
    for factor in (1 - 1e-3, 1 + 1e-3):
        assert grid.mse < grids.mse(grid.points * factor)
    # The residual is the derivative of the closed form and not just a number that says so.
    alpha, h = 1.1 * grid.alpha, 1e-5
    moved = grids.e2m1(alpha) if grid.name == "e2m1" else grids.uniform(grid.levels, alpha)
    up, down = (grids.mse(moved.points * (1 + e)) for e in (h, -h))
    assert moved.residual == pytest.approx((up - down) / (2 * h * moved.alpha), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "low", "high"),
    [
        *((partial(grids.uniform, levels), 0.3, 9.0) for levels in (2, 3, 5, 16, 256)),
        (grids.e2m1, 0.05, 4.0),
    ],
)
def test_no_alpha_of_a_scan_is_better(
    make: Callable[..., grids.Grid], low: float, high: float
) -> None:
    best = make().mse
    assert all(make(alpha).mse > best for alpha in np.linspace(low, high, 60))


@given(levels=st.integers(2, 256))
def test_uniform_points(levels: int) -> None:
    grid = grids.uniform(levels)
    assert grid.levels == levels
    assert grid.centred
    assert grid.outer == grid.alpha
    assert np.array_equal(grid.points, -grid.points[::-1])
    np.testing.assert_allclose(np.diff(grid.points), grid.step, rtol=1e-11)
    np.testing.assert_allclose(grid.midpoints, grid.points[1:] - grid.half_gap, atol=1e-14)
    assert grid.residual <= 1e-12


def test_uniform_of_two_levels_has_its_known_optimum() -> None:
    assert grids.uniform(2).alpha == pytest.approx(np.sqrt(2 / np.pi), rel=1e-15)
    assert grids.uniform(2).mse == pytest.approx(1 - 2 / np.pi, rel=1e-14)


def test_ternary_is_uniform_of_three() -> None:
    assert grids.ternary().name == "ternary"
    assert np.array_equal(grids.ternary().points, grids.uniform(3).points)


def test_e2m1_points() -> None:
    grid = grids.e2m1(2.0)
    assert grid.points.tolist() == [-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12]
    assert grid.half_gap == 2.0
    assert not grid.centred
    assert np.isnan(grid.step)


@given(levels=st.integers(2, 256))
def test_lloyd_conditions(levels: int) -> None:
    grid = grids.lloyd_max(levels)
    assert grid.levels == levels
    assert grid.residual <= 1e-12
    assert np.array_equal(grid.points, -grid.points[::-1])
    assert grid.half_gap == pytest.approx((grid.points[-1] - grid.points[-2]) / 2)
    # The means once more, from SciPy's normal and on the side where its tail is accurate.
    upper = grid.points >= 0
    a = np.append(-np.inf, grid.midpoints)[upper]
    b = np.append(grid.midpoints, np.inf)[upper]
    means = (norm.pdf(a) - norm.pdf(b)) / (norm.sf(a) - norm.sf(b))
    np.testing.assert_allclose(grid.points[upper], means, rtol=0, atol=1e-12)
    assert grid.mse <= grids.uniform(levels).mse * (1 + 1e-12)


@given(points=st.lists(st.integers(-40, 40), min_size=2, max_size=9, unique=True))
def test_table_keeps_its_points(points: list[int]) -> None:
    ordered = sorted(points)
    grid = grids.table(ordered)
    assert grid.points.tolist() == ordered
    assert grid.half_gap == (ordered[-1] - ordered[-2]) / 2
    assert np.isnan(grid.alpha)
    assert np.isfinite(grid.mse)
    assert np.isfinite(grid.residual)


def test_table_of_lloyd_points_is_stationary_and_others_are_not() -> None:
    points = grids.lloyd_max(8).points
    assert grids.table(points).residual <= 1e-12
    assert grids.table(points * 1.01).residual > 1e-3


def test_grids_are_cached_and_read_only() -> None:
    assert grids.uniform(16) is grids.uniform(16)
    with pytest.raises(ValueError, match="read-only"):
        grids.uniform(16).points[0] = 0.0


@pytest.mark.parametrize("make", [grids.uniform, grids.lloyd_max])
def test_levels_are_checked(make: Callable[..., grids.Grid]) -> None:
    for levels in (-1, 0, 1, 257):
        with pytest.raises(ValueError, match=f"levels is {levels}; 2 to 256"):
            make(levels)
    for wrong in (2.0, True, "4"):
        with pytest.raises(TypeError, match=f"levels is {wrong!r}; an int from 2 to 256"):
            make(wrong)


@pytest.mark.parametrize("alpha", [0.0, -1.0, np.nan, np.inf])
def test_alpha_is_checked(alpha: float) -> None:
    with pytest.raises(ValueError, match=f"alpha is {alpha}; a finite value above 0"):
        grids.uniform(4, alpha)
    with pytest.raises(ValueError, match=f"alpha is {alpha}; a finite value above 0"):
        grids.e2m1(alpha)


def test_points_are_checked() -> None:
    with pytest.raises(ValueError, match=r"points has shape \(1,\)"):
        grids.table([1.0])
    for wrong in ([1.0, 0.0], [0.0, 0.0], [0.0, np.nan], [0.0, np.inf]):
        with pytest.raises(ValueError, match="finite and increasing"):
            grids.table(wrong)
        with pytest.raises(ValueError, match="finite and increasing"):
            grids.mse(wrong)
