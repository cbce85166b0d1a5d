"""What an operand stands for, and which quantizers can be multiplied: by the grids themselves."""

from __future__ import annotations

import contextlib
import math

import pytest

import quest
from quest import grids, operands
from quest.grids import Grid

pytestmark = pytest.mark.whole

LLOYD = grids.lloyd_max(4)
GRIDS = (
    *(grids.uniform(b) for b in range(1, 9)), grids.uniform(4, 0.3), grids.ternary(),
    grids.e2m1(), grids.e2m1(3.0), grids.lloyd_max(1), LLOYD, grids.lloyd_max(2),
)  # fmt: skip


def _forms(grid: Grid) -> dict[str, operands.Form]:
    found = {}
    for kind in operands.KINDS:
        with contextlib.suppress(ValueError):
            found[kind] = operands.form(grid, kind)
    return found


# Of float64: a point, its step or unit, and two operations.
ROUNDINGS = 4 * 2.0**-53


def _uniform(levels: int) -> Grid:
    """A grid of points 2 apart: odd integers, or even ones."""
    points = tuple(float(2 * i - (levels - 1)) for i in range(levels))
    return Grid(f"of{levels}", points, 2.0, 1.0)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_point_is_its_integer_times_the_unit(grid: Grid) -> None:
    """And `integer` turns a point, of a uniform grid one in steps, into that integer."""
    for form in _forms(grid).values():
        for p in grid.points:
            turned = (p if grid.step is None else p / grid.step) * form.integer
            assert math.isclose(turned, round(turned), rel_tol=ROUNDINGS)
            assert math.isclose(round(turned) * form.unit, p, rel_tol=ROUNDINGS)
            assert abs(round(turned)) == form.spread or grid.levels > 2  # a pair of signs


def test_integers_fill_int8() -> None:
    """By hand: the largest is doubled while it fits, and all others with it."""
    for grid, spread, largest in (
        (grids.uniform(1), 64, 64), (grids.uniform(2), 32, 96), (grids.uniform(3), 16, 112),
        (grids.uniform(4), 8, 120), (grids.uniform(5), 4, 124), (grids.uniform(6), 2, 126),
        (grids.uniform(7), 1, 127), (grids.ternary(), 64, 64), (grids.e2m1(), 8, 96),
        (_uniform(15), 16, 112), (_uniform(128), 1, 127), (_uniform(255), 1, 127),
    ):  # fmt: skip
        form = operands.form(grid, "integers")
        assert form.spread == spread
        assert round(grid.outer / form.unit) == largest
    for grid, form in (
        (grids.uniform(2), (64, 96)), (grids.uniform(4), (16, 120)), (grids.ternary(), (64, 64)),
        (grids.uniform(3), (32, 112)),
    ):  # fmt: skip
        saved = operands.saved(quest.Quantizer(grid), "integers")
        assert (saved.stride, saved.top) == form  # from one integer to the next; the largest


def test_the_kinds_that_grids_have() -> None:
    kinds = {str(grid): tuple(_forms(grid)) for grid in GRIDS}
    assert kinds == {
        "uniform1": ("bits", "integers"), "lloyd_max1": ("bits", "integers"),
        **{f"uniform{b}": ("integers",) for b in range(2, 8)}, "uniform8": ("codes",),
        "uniform4:0.3": ("integers",), "ternary": ("integers",), "e2m1": ("integers",),
        "e2m1:3.0": ("integers",), "lloyd_max4": (), "lloyd_max2": (),
    }  # fmt: skip


def test_another_alpha_has_the_same_kinds() -> None:
    """However the quotients of points are rounded."""
    for i in range(1, 200):
        for bits, kind in ((7, "integers"), (8, "codes")):
            assert tuple(_forms(grids.uniform(bits, i / 7))) == (kind,)


def test_int8_holds_integers_to_127() -> None:
    assert tuple(_forms(_uniform(128))) == ("integers",)  # to 127
    assert tuple(_forms(_uniform(130))) == ()  # to 129, and no code of 8 bits fills it
    assert tuple(_forms(_uniform(255))) == ("integers",)  # to 127 times a unit of 2
    wide = Grid("far", (-128.0, 0.0, 128.0), 1.0, 64.0)
    assert tuple(_forms(wide)) == ()


def test_every_point_must_be_an_integer_times_the_unit() -> None:
    """Above an integer and below one, by a billionth at the least."""
    for between in (0.25, -0.25, 1e-9):
        assert tuple(_forms(Grid("odd", (-1.0, between, 1.0), None, 0.3))) == ()


def test_what_is_saved_is_packed_where_it_is_a_dense_uniform_grid_of_integers() -> None:
    q = quest.Quantizer
    for made, kind, saved in (
        (q(grids.uniform(2)), "integers", "packed2"),
        (q(grids.uniform(4)), "integers", "packed4"),
        (q(grids.ternary()), "integers", "packed2"),
        (q(grids.uniform(1)), "bits", "bits"),
        (q(grids.uniform(8)), "codes", "codes"),
        (q(grids.e2m1()), "integers", "integers"),
        (q(grids.uniform(4), sparsity=quest.NM(2, 4)), "integers", "integers"),
    ):
        assert operands.saved(made, kind).kind == saved


def test_bits_are_multiplied_with_bits_alone() -> None:
    one, two, eight, table, none = (
        quest.Quantizer(g) for g in (grids.uniform(1), grids.uniform(2), grids.uniform(8), LLOYD,
                                     None)
    )  # fmt: skip
    assert operands.kinds(one, one) == ("bits", "bits")
    assert operands.kinds(two, two) == ("integers", "integers")
    for other, kind in ((two, "integers"), (eight, "codes")):
        assert operands.kinds(one, other) == ("integers", kind)
        assert operands.kinds(other, one) == (kind, "integers")
    for other in (table, none):
        for known in (one, two, eight):
            assert operands.kinds(known, other) is None
            assert operands.kinds(other, known) is None


def test_sums_of_integers_need_no_correction() -> None:
    """The kernel then reads no sums: their factors and the length are 0, whatever the width."""
    form = operands.form(grids.uniform(4), "integers")
    for width in (1, 128):
        made = operands.terms(form, form, width)
        assert made == operands.Terms(False, form.unit**2, 0, 0, 0)
