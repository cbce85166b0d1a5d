"""What launchers hand to kernels and what operators check and pass on, at the edges.

No GPU: kernels are fakes that keep their arguments, or run in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import quest
from quest import eager, grids, lowbit, operands, ops
from quest import transforms as rotations
from quest.conformance import lanes
from quest.kernels import blocks, decode, hadamard, outputs, pack, product, quantize, sparse

pytestmark = pytest.mark.whole

CPU = torch.device("cpu")
ONE, FOUR = (quest.Quantizer(grids.uniform(bits)) for bits in (1, 4))


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _strided(t: Tensor) -> Tensor:
    """The same entries, neighbours apart."""
    return torch.stack([t, 1 + t], -1)[..., 0]


# Launchers.


@pytest.mark.parametrize(
    ("count", "warps", "teams", "tile"),
    [(1, 1, 4, 16), (9, 3, 1, 16), (10, 2, 2, 16), (16, 1, 4, 16), (31, 1, 4, 32), (33, 4, 1, 32),
     (49, 2, 2, 32), (65, 3, 1, 32), (129, 5, 1, 32)],
)  # fmt: skip
def test_a_thread_block_of_the_block_quantizer(
    count: int, warps: int, teams: int, tile: int
) -> None:
    """Four warps, or the team's where it has more than two; each with a tile of 16 or 32 blocks."""
    shape = blocks._shape(count)
    assert (shape.warps, shape.teams, shape.tile) == (warps, teams, tile)
    for size in (2, 4):
        each = tile * (size * 128 + 16 + 32)  # and, of each block, mask and codes
        assert shape.shared(size) == warps * teams * each


def test_the_largest_order_of_a_tile() -> None:
    """Sixteen warps with 32 registers a thread; beyond it a base does the rest of an order."""
    assert hadamard.TILE_LIMIT == 16 * 32 * 32
    assert rotations.split(hadamard.TILE_LIMIT) == (1, hadamard.TILE_LIMIT)
    assert rotations.split(2 * hadamard.TILE_LIMIT) == (2, hadamard.TILE_LIMIT)


class Launch:
    """Stands for a kernel: keeps the grid and the arguments of its one launch."""

    def __init__(self) -> None:
        self.grid: tuple[int, ...] = ()
        self.told: tuple[Any, ...] = ()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*told: Any, num_warps: int) -> None:
            self.grid, self.told = grid, told

        return launch


def _packs(monkeypatch: pytest.MonkeyPatch, operand: Tensor, bits: int) -> Launch:
    made = Launch()
    monkeypatch.setattr(pack, "_pack", made)
    pack.pack(operand, bits, 2, 2**bits - 1)
    return made


def _decodes(
    monkeypatch: pytest.MonkeyPatch, stored: Tensor, scale: Tensor, width: int, bits: int
) -> Launch:
    made = Launch()
    monkeypatch.setattr(decode, "_decode", made)
    decode.decode(stored, scale, width, 0.5, torch.float32, bits=bits, stride=2, top=2**bits - 1)
    return made


SHAPES = [*((3, width) for width in range(1, 10)), (1, 4096), (1, 2**20), (4096, 1), (300, 5)]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_tiles_of_packed_entries(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sides are powers of two, a row is whole bytes, nothing is larger than the matrix needs, and
    a grid has no more programs along its second axis than CUDA takes.
    """
    for rows, width in SHAPES:
        per = 8 // bits
        dtype = torch.int8 if bits == 8 else torch.uint8
        stored = torch.zeros(rows, -(-width * bits // 8), dtype=dtype)
        launches = [_decodes(monkeypatch, stored, torch.ones(rows, 1), width, bits)]
        if bits in operands.PACKED.values():
            operand = torch.zeros(rows, width, dtype=torch.int8)
            launches.append(_packs(monkeypatch, operand, bits))
        for made in launches:
            height, across = made.told[-2:]
            assert height & (height - 1) == across & (across - 1) == 0
            assert across % per == 0
            assert height < 2 * rows
            assert across < max(2 * width, 1 + per)
            assert (made.grid[0] - 1) * height < rows <= made.grid[0] * height
            assert (made.grid[1] - 1) * across < width <= made.grid[1] * across
            assert made.grid[1] <= 65535


def test_operands_and_scales_that_lie_apart_are_made_contiguous(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernels of `pack` and `decode` read one entry after another."""
    operand = torch.arange(24, dtype=torch.int8).view(3, 8)
    stored, scale = operand.to(torch.uint8), torch.arange(3.0)[:, None]
    (found,) = _packs(monkeypatch, _strided(operand), 4).told[:1]
    assert found.is_contiguous()
    assert torch.equal(found, operand)
    made = _decodes(monkeypatch, _strided(stored), _strided(scale), 16, 4)
    for found, expected in zip(made.told[:2], (stored, scale), strict=True):
        assert found.is_contiguous()
        assert torch.equal(found, expected)


INTERPRETER = next(lane for lane in lanes.all_lanes() if lane.remote)


no_triton = pytest.mark.skipif(lanes.missing(INTERPRETER) is not None, reason="no Triton")


@no_triton
def test_rows_that_several_programs_pack() -> None:
    """A program takes 128 rows of 16 entries."""
    operand = (2 * torch.arange(200 * 16).remainder(7) - 7).view(200, 16).to(torch.int8)
    made = INTERPRETER.call("pack_operand", operand, q=FOUR)["packed"]
    assert torch.equal(made, eager.pack_operand(operand, FOUR))


@no_triton
def test_vectors_that_several_programs_multiply_with_a_base() -> None:
    """In the interpreter a program takes 4096; these are 16384, of the order 2 * 16384."""
    order, at = 2 * hadamard.TILE_LIMIT, {3: 1.0, 12345: -2.0, 32000: 4.0}
    x = torch.zeros(1, order)
    x[0, list(at)] = torch.tensor(list(at.values()))
    y = INTERPRETER.call("hadamard", x, order=order, transpose=False)["y"]
    # Sylvester's signs: the parity of the bits that two indices share.
    shared = {i: np.bitwise_count(np.arange(order) & i).astype(int) for i in at}
    expected = sum(v * (-1.0) ** shared[i] for i, v in at.items()) * order**-0.5
    # Sums of 1, 2 and 4 are exact; factors and products of the norm round, four at most of 2^-24.
    torch.testing.assert_close(y[0].double(), torch.as_tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("byte", [-1, 256])
def test_a_poison_is_a_byte(byte: int) -> None:
    with pytest.raises(ValueError, match=rf"byte must be in 0\.\.255, got {byte}"):
        outputs.poisoned(byte).__enter__()
    with outputs.poisoned(255):
        assert outputs.empty((3,), torch.uint8, CPU).tolist() == [255] * 3


@pytest.mark.parametrize("kind", ["bits", "integers"])
def test_rows_without_columns_have_the_sums_of_rows_of_zeros(kind: str) -> None:
    q = ONE if kind == "bits" else FOUR
    x = torch.zeros(3, 0)
    with outputs.poisoned(0x55):
        _, scale, _, sums = quantize.encode(x, ops.program(q, x), kind=kind, integer=2.0)
    assert scale.tolist() == sums.tolist() == [[0]] * 3


def test_forced_tiles_of_the_sparse_product_end_with_their_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sparse, "_forced", None)  # and None again after this test
    own = sparse.shape(22016, 1024, 132)
    assert own == sparse.WIDE
    with sparse.only(sparse.NARROW):
        with sparse.only(None):
            assert sparse.shape(22016, 1024, 132) == own
        assert sparse.shape(22016, 1024, 132) == sparse.NARROW
    assert sparse.shape(22016, 1024, 132) == own
    with pytest.raises(KeyError), sparse.only(sparse.NARROW):
        raise KeyError
    assert sparse.shape(22016, 1024, 132) == own


def test_forced_tiles_of_the_product_end_with_their_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_forced", None)  # and None again after this test
    with product.only(product.TALL):
        with product.only(None):
            assert product.forced() is None
        assert product.forced() == product.TALL
    assert product.forced() is None
    with pytest.raises(KeyError), product.only(product.TALL):
        raise KeyError
    assert product.forced() is None


# Operators.


def test_what_the_kernels_are_told_of_an_estimator() -> None:
    x = torch.zeros(2, 128)
    for estimator, told in (
        (quest.STE(), quantize.STE), (quest.Clip(1.0), quantize.EDGE),
        (quest.Trust(1.0), quantize.EDGE), (quest.Trust(0.5), quantize.DISTANCE),
    ):  # fmt: skip
        q = quest.Quantizer(grids.uniform(4), estimator=estimator)
        assert ops.program(q, x).estimator == told


@pytest.mark.parametrize("grid", [grids.lloyd_max(2), grids.e2m1()], ids=str)
def test_what_the_kernels_are_told_of_a_table(grid: grids.Grid) -> None:
    """Points, and midpoints up to one less than a power of two."""
    made = ops.program(quest.Quantizer(grid), torch.zeros(2, 128))
    assert made.points.dtype == made.midpoints.dtype == torch.float32
    assert made.points.tolist() == torch.tensor(grid.points).tolist()
    padding = [float("inf")] * (2**grid.storage_bits - grid.levels)
    assert made.midpoints.tolist() == [*torch.tensor(grid.midpoints).tolist(), *padding]


def test_the_widest_rows() -> None:
    ops.check_input(torch.zeros(0, 2**30))
    with pytest.raises(ValueError, match=r"at most 2\^30 entries, got 1073741825"):
        ops.check_input(torch.zeros(0, 2**30 + 1))


def test_what_is_no_row_has_no_operand() -> None:
    """Checked before anything runs, the launcher included."""
    for x in (torch.tensor(1.0), torch.zeros(3, 128, dtype=torch.int32)):
        for operand in (lowbit.launch_operand, lowbit.eager_operand):
            with pytest.raises((TypeError, ValueError), match="x must "):
                operand(x, FOUR, "integers")


@pytest.mark.parametrize(("dtype", "entries"), [(torch.int8, 1), (torch.uint8, 8)], ids=str)
def test_the_widest_product(dtype: torch.dtype, entries: int) -> None:
    """2^16 entries fit an int32 accumulator, of a byte each or of eight in a byte."""
    columns = 2**16 // entries
    a = torch.ones(1, columns, dtype=dtype)
    assert lowbit.accumulate(a, a).tolist() == [[columns]]
    wide = torch.ones(1, columns + 1, dtype=dtype)
    with pytest.raises(ValueError, match=f"rows have {2**16 + entries} entries; 65536 fit"):
        lowbit.accumulate(wide, wide)


@pytest.mark.parametrize(
    ("bias", "error", "told"),
    [
        (torch.zeros(5).int(), TypeError, "bias must be float32, bfloat16 or float16, got"),
        (torch.zeros(5).double(), TypeError, "bias must be float32, bfloat16 or float16, got"),
        (torch.zeros(1), ValueError, r"bias must be torch.float32 of shape \(5,\) on cpu, got"),
        (torch.zeros(3), ValueError, r"bias must be torch.float32 of shape \(5,\) on cpu, got"),
        (torch.zeros(5, 1), ValueError, r"bias must be torch.float32 of shape \(5,\) on cpu, got"),
    ],
)
def test_a_bias_that_a_product_does_not_take(
    bias: Tensor, error: type[Exception], told: str
) -> None:
    a, b = torch.zeros(3, 128, dtype=torch.int8), torch.zeros(5, 128, dtype=torch.int8)

    def product(bias: Tensor) -> Tensor:
        return lowbit.eager_product(
            a, b, torch.ones(3, 1), torch.ones(5, 1), torch.zeros(3, 1).int(),
            torch.zeros(5, 1).int(), bias, "uniform4,uniform4", "integers,integers", 128,
            torch.float32,
        )  # fmt: skip

    assert product(torch.arange(5.0)).tolist() == [[0, 1, 2, 3, 4]] * 3
    with pytest.raises(error, match=told):
        product(bias)
