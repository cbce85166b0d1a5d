"""sparse.cu in the emulator, judged by the oracle: tiles that are not whole, many of K and one."""

from __future__ import annotations

import pytest
import torch

import quest
from property_tests import emulated, places
from property_tests.ledger import LEDGER
from quest.conformance import examine, inputs
from quest.kernels import sparse

pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
NARROW, WIDE = sparse.NARROW, sparse.WIDE


# Rows, columns and tiles of K: more than the ring has, and tiles that are not whole.
@pytest.mark.parametrize(
    ("name", "tiles", "rows", "columns", "steps", "dtype"),
    [
        ("w4a4-2:4", NARROW, 130, 300, 9, torch.bfloat16),
        ("w4a8-2:4", WIDE, 300, 257, 6, torch.float16),
        ("w4a4-2:4", WIDE, 70, 129, 1, torch.float32),
        ("w1a1-2:4", NARROW, 1, 3, 3, torch.float32),
    ],
)
def test_it_is_judged(
    emulator: emulated.Emulator, name: str, tiles: sparse.Shape, rows: int, columns: int,
    steps: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    lane, width = places.CPU.lane, steps * sparse.TILE_K
    x, w, bias = (
        inputs.draw("gaussian", shape, dtype, seed)
        for seed, shape in enumerate(((rows, width), (columns, width), (columns,)))
    )
    with sparse.only(tiles):
        found = examine.product(lane, x, w, bias, quest.recipe(name), dtype, compressed=True)
    LEDGER.judge(lane, found, f"{name}, {tiles}, {rows} x {columns}, {dtype}")
