"""Rows that few.cu quantizes, at the ends of what its steps and 16 bits can tell: exact integers.

Blocks 2^146 below others keep their signs, and codes 2^14 steps out are the outermost.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from property_tests import few_rows
from property_tests.places import Place
from quest import operands
from quest.conformance import judges
from quest.quantizer import parse

pytestmark = pytest.mark.whole


def _integers(place: Place, x: torch.Tensor, grid: str) -> np.ndarray:
    """What the kernel makes of rows: signs, or 2 code + 1, without what spreads an operand's."""
    q, width = parse(f"{grid}/hadamard128/ste/dense"), x.shape[-1]
    bits = q.require_grid().storage_bits
    recipe, kind = f"w{bits}a{bits}", "bits" if bits == 1 else "integers"
    *weight, _ = few_rows.weight(recipe, 16, width)
    _, a, _, _ = few_rows.shown(place, x, q.spec, recipe, *weight)
    found, rest = np.divmod(judges.whole(a, kind, width), operands.form_of(q, kind).spread)
    assert not rest.any()
    return found


@pytest.mark.parametrize("large", [1.4140625 * 2.0**46, 2.0**48])
@pytest.mark.parametrize("grid", ["uniform1", "uniform4", "uniform2", "uniform4:7.499"])
def test_signs_of_a_block_far_below_its_row(place: Place, grid: str, large: float) -> None:
    """Of sums of squares just below where a block counts with a power of its own, and above. The
    first entry is negative, and the others are 0.
    """
    x = torch.full((5, 4096), large, dtype=torch.bfloat16)
    for row, power in enumerate((98, 99, 100, 101, 120)):
        x[row, -128:] = -(2.0**-power)
    found = _integers(place, x, grid)[:, -128:]
    assert found[:, 0].tolist() == [-1] * 5
    assert (found[:, 1:] == 1).all()


@pytest.mark.parametrize("grid", ["uniform1", "uniform4", "uniform2"])
def test_signs_of_a_block_that_meets_subnormal_numbers(place: Place, grid: str) -> None:
    """Brought to 2^100 below its row, the most that is done, it is the least that bfloat16 has."""
    x = torch.full((1, 256), 2.0**126, dtype=torch.bfloat16)
    x[:, 128:] = -(2.0**-107)
    found = _integers(place, x, grid)[0, 128:]
    assert found[0] == -1
    assert (found[1:] == 1).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("grid", "most"), [("uniform4:0.1171875", 15), ("uniform2:0.0234375", 3)])
def test_codes_far_beyond_the_levels(place: Place, grid: str, most: int, sign: float) -> None:
    """One block of 512, in the least steps: 2^14 of them."""
    x = torch.zeros(2, 65536, dtype=torch.bfloat16)
    x[0, :128], x[1, -128:] = sign, sign
    found = _integers(place, x, grid)
    for row, at in ((0, 0), (1, 65408)):
        assert found[row, at] == sign * most
        assert (np.delete(found[row], at) == 1).all()
