"""Which grids the kernel that quantizes its few rows takes: steps from 2^-6, below 1."""

from __future__ import annotations

import pytest

import quest
from quest import fused, grids

pytestmark = pytest.mark.whole  # each of the few lines guards one end

LESS = 1 - 2.0**-50  # two roundings do not take it away


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(
    ("step", "kind"),
    [(2.0**-6, "integers"), (2.0**-6 * LESS, None), (LESS, "integers"), (1.0, None)],
)
def test_the_steps_of_integers(bits: int, step: float, kind: str | None) -> None:
    grid = grids.uniform(bits, step * (2**bits - 1) / 2)
    assert grid.step is not None
    assert (grid.step < 2.0**-6, grid.step < 1) == (step < 2.0**-6, step < 1)
    assert fused.pairs(quest.Quantizer(grid), grids.uniform(4)) == kind
    # The weight's steps are of no matter: its codes are made before.
    assert fused.pairs(quest.Quantizer(grids.uniform(4)), grid) == "integers"


@pytest.mark.parametrize("alpha", [2.0**-8, 2.0**8])
def test_single_bits_have_any_step(alpha: float) -> None:
    grid = grids.uniform(1, alpha)
    assert fused.pairs(quest.Quantizer(grid), grid) == "bits"
