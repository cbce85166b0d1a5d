"""Rows that few.cu quantizes, at the ends of what its steps and 16 bits can tell: exact integers.

Blocks 2^146 below others keep their signs, and codes 2^14 steps out are the outermost.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import quest
from property_tests.test_rows_cuda_edges import DEVICE, _weight, on_hopper
from quest.conformance import judges
from quest.fused import few_linear_shown

pytestmark = pytest.mark.whole


def _integers(x: torch.Tensor, spec: str, recipe: str) -> np.ndarray:
    """What the kernel makes of rows, as integers."""
    weight, scales, totals, _ = _weight(recipe, x.shape[-1])
    grid = quest.recipe(recipe).weight.require_grid().name
    rows, w, w_scale, w_sums = (t.to(DEVICE) for t in (x, weight, scales, totals))
    _, a, _, _ = few_linear_shown(rows, w, w_scale, w_sums, None, spec, grid, torch.float32)
    return judges.whole(a.cpu(), "bits" if recipe == "w1a1" else "integers", x.shape[-1])


@on_hopper
@pytest.mark.parametrize("large", [1.4140625 * 2.0**46, 2.0**48])
@pytest.mark.parametrize("grid", ["uniform1", "uniform4", "uniform2", "uniform4:7.499"])
def test_signs_of_a_block_far_below_its_row(grid: str, large: float) -> None:
    """Of sums of squares just below where a block counts with a power of its own, and above. The
    first entry is negative, and the others are 0.
    """
    x = torch.full((5, 4096), large, dtype=torch.bfloat16)
    for row, power in enumerate((98, 99, 100, 101, 120)):
        x[row, -128:] = -(2.0**-power)
    recipe = {"uniform1": "w1a1", "uniform2": "w2a2"}.get(grid, "w4a4")
    found = _integers(x, f"{grid}/hadamard128/ste/dense", recipe)[:, -128:]
    assert found[:, 0].tolist() == [-1] * 5
    assert (found[:, 1:] == 1).all()


@on_hopper
@pytest.mark.parametrize("grid", ["uniform1", "uniform4", "uniform2"])
def test_signs_of_a_block_that_meets_subnormal_numbers(grid: str) -> None:
    """Brought to 2^100 below its row, the most that is done, it is the least that bfloat16 has."""
    x = torch.full((1, 256), 2.0**126, dtype=torch.bfloat16)
    x[:, 128:] = -(2.0**-107)
    recipe = {"uniform1": "w1a1", "uniform2": "w2a2"}.get(grid, "w4a4")
    found = _integers(x, f"{grid}/hadamard128/ste/dense", recipe)[0, 128:]
    assert found[0] == -1
    assert (found[1:] == 1).all()


@on_hopper
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("grid", "most"), [("uniform4:0.1171875", 15), ("uniform2:0.0234375", 3)])
def test_codes_far_beyond_the_levels(grid: str, most: int, sign: float) -> None:
    """One block of 512, in the least steps: 2^14 of them."""
    x = torch.zeros(2, 65536, dtype=torch.bfloat16)
    x[0, :128], x[1, -128:] = sign, sign
    recipe = "w2a2" if most == 3 else "w4a4"
    found = _integers(x, f"{grid}/hadamard128/ste/dense", recipe)
    for row, at in ((0, 0), (1, 65408)):
        assert found[row, at] == sign * most
        assert (np.delete(found[row], at) == 1).all()
