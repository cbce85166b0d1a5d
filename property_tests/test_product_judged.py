"""product.cu in the emulator, judged by the oracle: tiles that are not whole, what ends them."""

from __future__ import annotations

import pytest
import torch

import quest
from property_tests import emulated, places
from property_tests.ledger import LEDGER
from property_tests.products import kinds_of
from quest.conformance import examine, inputs
from quest.kernels import hopper, product

pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
NARROW, WIDE, TALL = product.NARROW, product.WIDE, product.TALL


# Rows, columns and tiles of K: more than the ring has, and tiles that are not whole.
@pytest.mark.parametrize(
    ("name", "tiles", "rows", "columns", "steps", "dtype"),
    [
        ("w8a8", NARROW, 130, 200, 9, torch.bfloat16),
        ("w8a8", WIDE, 300, 70, 1, torch.float32),
        ("w4a4", WIDE, 70, 129, 7, torch.float32),
        ("w4a4", WIDE, 257, 300, 5, torch.bfloat16),
        ("w4a4", TALL, 129, 300, 11, torch.bfloat16),
        ("w1a8", NARROW, 1, 130, 3, torch.float16),
        ("w4a4", NARROW, 66, 5, 1, torch.bfloat16),
        ("w1a1", NARROW, 65, 137, 9, torch.float32),
        ("w1a1", TALL, 130, 260, 6, torch.bfloat16),
        ("w1a1", NARROW, 1030, 5, 1, torch.bfloat16),  # pairs of row tiles in two groups
        ("w4a4", WIDE, 2060, 5, 1, torch.bfloat16),
    ],
)
def test_it_is_judged(
    emulator: emulated.Emulator, name: str, tiles: product.Shape, rows: int, columns: int,
    steps: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    """The accumulators, and with a bias the product and its sum with a residual."""
    lane, width = places.CPU.lane, steps * product.TILE_K * (8 if name == "w1a1" else 1)
    x, w, beside, bias = (
        inputs.draw("gaussian", shape, dtype, seed)
        for seed, shape in enumerate(((rows, width), (columns, width), (rows, columns), (columns,)))
    )
    with product.only(tiles):
        found = examine.product(lane, x, w, bias, quest.recipe(name), dtype, residual=beside)
    LEDGER.judge(lane, found, f"{name}, {tiles}, {rows} x {columns}, {dtype}")


@pytest.mark.parametrize(("name", "tiles"), kinds_of("w1a1", "w4a4"))
def test_a_gate_is_judged(emulator: emulated.Emulator, name: str, tiles: str) -> None:
    x, w = (inputs.draw("gaussian", (n, 256), torch.bfloat16, n) for n in (130, 300))
    with product.only(product.KINDS[tiles]):
        made = quest.recipe(name)
        found = examine.product(places.CPU.lane, x, w, None, made, x.dtype, gate=True)
    LEDGER.judge(places.CPU.lane, found, f"a gate, {name}, {tiles}")


@pytest.mark.parametrize("front", [False, True])
def test_a_residual_is_read_where_it_lies(emulator: emulated.Emulator, front: bool) -> None:
    """And nowhere else, though a tile has more rows and columns: there it has no neighbour."""
    a, b = (inputs.integers("random", n, 128, n) for n in (9, 72))
    beside = inputs.draw("gaussian", (9, 72), torch.bfloat16, 0)
    scales = [torch.ones(n) for n in (9, 72)]
    told = {"epilogue": hopper.PLAIN, "row_scale": scales[0], "column_scale": scales[1]}
    with product.only(NARROW), places.CPU.walled(beside, front) as edged:
        sums = product.product(a, b, beside.dtype, residual=edged, **told)
    y = (a.double() @ b.double().T).to(beside.dtype)
    assert torch.equal(sums, (y.float() + beside.float()).to(beside.dtype))
