"""Grids of `quest.grids`: bits of a code, MSE-optimal points, and what makes one."""

from __future__ import annotations

import itertools
import math

import pytest

from quest import grids
from quest.reference import grids as oracle

pytestmark = pytest.mark.whole


def test_a_code_takes_the_fewest_bits_that_packing_has() -> None:
    expected = {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
    for make in (grids.uniform, grids.lloyd_max):
        assert {bits: make(bits).storage_bits for bits in expected} == expected
    assert (grids.ternary().storage_bits, grids.e2m1().storage_bits) == (2, 4)


def test_a_grid_is_mse_optimal_by_default() -> None:
    """The oracle solves for alpha; its tolerance is that of test_constants."""
    for grid, expected in (
        (grids.uniform(2), oracle.uniform(4)),
        (grids.ternary(), oracle.ternary()),
        (grids.e2m1(), oracle.e2m1()),
    ):
        assert grid.points == pytest.approx(tuple(expected.points), rel=2.0**-36), grid


def test_alpha_may_be_an_int() -> None:
    for make in (lambda a: grids.uniform(4, a), grids.ternary, grids.e2m1):
        assert make(2) == make(2.0)
        assert str(make(2)) == str(make(2.0))


@pytest.mark.parametrize("alpha", [2.0**-8, 2.0**8, 2**8])
def test_the_least_and_the_largest_alpha(alpha: float) -> None:
    """Kernels round beside 1.5 * 2^23: codes of 2^16 entries, all but one of them 0, are less."""
    for grid in (
        *(grids.uniform(b, alpha) for b in (1, 8)),
        grids.ternary(alpha),
        grids.e2m1(alpha),
    ):
        gaps = [b - a for a, b in itertools.pairwise(grid.points)]
        assert math.sqrt(2**16) / min(gaps) < 1.5 * 2**23
        assert grids.parse(str(grid)) == grid


@pytest.mark.parametrize("points", [(0.0, 1.0, 0.5), (1.0, 0.0, 2.0), (0.0, 1.0, 1.0)])
def test_every_point_is_above_the_one_before(points: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="points of a grid ascend strictly"):
        grids.Grid("custom", points, None, 1.0)


@pytest.mark.parametrize("name", ["uniform", "lloyd_max", "ternary2", "e2m12"])
def test_a_name_has_bits_where_its_kind_has(name: str) -> None:
    with pytest.raises(ValueError, match=f"grid must be uniform1..8, .*, got '{name}'"):
        grids.parse(name)


def test_a_grid_is_shown_without_its_points() -> None:
    """Of which there may be 256."""
    shown = repr(grids.uniform(8))
    assert "uniform8" in shown
    assert "points" not in shown
