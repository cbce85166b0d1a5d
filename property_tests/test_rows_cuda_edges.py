"""Rows at the edges of what the two quantizers of few rows do: `rows.cu`, `few_rows.cuh`.

Rows whose sum of squares is no float go another way through either kernel, with a power of two of
the row or of the block. Entries at every place decide that power, or that a row is not finite, and
a row that has only one shows its column of the transform without a rounding.
"""

from __future__ import annotations

import pytest
import torch

from property_tests import few_rows
from property_tests.ledger import LEDGER
from property_tests.places import Place
from quest import operands
from quest.conformance import examine, inputs
from quest.quantizer import parse

pytestmark = pytest.mark.whole

HALVES = (torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.bfloat16)  # of a range that squares leave
BITS, INTEGERS = "uniform1/hadamard128/ste/dense", "uniform4/hadamard128/ste/dense"
# At the exponents 254, which is brought near 1 as 253 is, and 1; normal; below all exponents.
POWERS = (127, 60, 1, -60, -126, -130)


def _alone(value: float, dtype: torch.dtype) -> torch.Tensor:
    """128 blocks of one entry each, at every place, of either sign."""
    sign = 1.0 - 2.0 * (torch.arange(128) % 3 == 1)
    return torch.diag(sign * value).to(dtype)


def _edges(dtype: torch.dtype) -> torch.Tensor:
    """Rows of 384: at the ends of the range, and where sums of squares just are, or are no more,
    taken as they come (2^-76 to 2^100).
    """
    most, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    x = inputs.draw("gaussian", (24, 384), torch.float32, 0).to(dtype)
    x[0] = most
    x[1] = most * (1 - 2 * (torch.arange(384) % 2))
    x[2] = -least
    x[3, 5:] = 0.0
    x[3, 5:7] = torch.tensor([least, -least])
    x[4] *= least
    x[5] = x[5] / 8 * least
    x[6] = torch.where(torch.arange(384) % 5 == 2, most, 0.0)
    x[7:10] = 0.0
    x[8, 200] = most
    x[9, 383] = least
    if dtype != torch.float16:
        for row, power in enumerate((-38, 50), 10):
            step = torch.finfo(dtype).eps
            for i, factor in enumerate((1 - step / 2, 1.0, 1 + step)):
                x[row + 2 * i] = 0.0
                x[row + 2 * i, 130 + i] = factor * 2.0**power
        # A block at one end of the range beside one at the other.
        for row, powers in enumerate(((120, -120, 0), (-100, 0, 90), (-135, -30, -60)), 16):
            for i, power in enumerate(powers):
                x[row, 128 * i : 128 * i + 128] *= 2.0**power
        x[19, :128] = -0.0
        x[19, 128:] *= 2.0**-120
        x[20, 128:] = 0.0
        x[20] *= 2.0**115
        x[21] *= 2.0**-126
    x[22, ::2] = -0.0
    x[23, :256] = -0.0
    return x


def _rows(place: Place, x: torch.Tensor, spec: str) -> None:
    """T2, T3 and T0 of an operand of few rows. Rows are made of ties, which prove nothing."""
    q = parse(spec)
    kind = (operands.kinds(q, q) or ("",))[0]
    found = examine.operand(place.lane, x, q, kind)
    LEDGER.judge(place.lane, found, f"{x.dtype}, {spec}", conclusive=False)


@pytest.mark.parametrize("recipe", ["w4a4", "w1a1"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_kind_of_row_in_one_kernel(place: Place, dtype: torch.dtype, recipe: str) -> None:
    """Among them zeros of either sign, and rows that end within a step of K."""
    for seed, name in enumerate(inputs.DISTRIBUTIONS):
        few_rows.judged(place, inputs.draw(name, (8, 640), dtype, seed), recipe)
    for x in torch.split(_edges(dtype), 8):
        few_rows.judged(place, x, recipe)
    # Small, but not for 16 bits: a block has no power of its own.
    x = inputs.draw("gaussian", (8, 640), torch.float32, 0)
    x *= 2.0 ** -torch.arange(8)[:, None]
    few_rows.judged(place, (x / 16).to(dtype), recipe)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_one_entry_at_every_place_of_a_block(place: Place, dtype: torch.dtype) -> None:
    """Eight blocks a row; the largest entry is one of either half of a word, of any sign."""
    for power in POWERS if dtype == torch.bfloat16 else (15, 1, -24):
        for blocks in torch.split(_alone(2.0**power, dtype), 64):
            few_rows.judged(place, blocks.reshape(8, 1024), "w4a4")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_an_entry_that_is_not_finite_in_one_kernel(place: Place, dtype: torch.dtype) -> None:
    """It makes its row's scale NaN and its codes those of zeros, those of finite blocks, too."""
    for i, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
        x = inputs.draw("gaussian", (8, 1024), dtype, i)
        x[:7].view(7, 8, 128)[:, 3, i::19] = bad
        x[2:4] = torch.where(x[2:4].isfinite(), 0.0, x[2:4])
        few_rows.judged(place, x, "w4a4")


# Groups that are not full, by one block and by all but one; that a row ends in, soon and late.
SHAPES = {
    "w4a4": ((1, 128), (1, 1152), (3, 2560), (3, 1280), (8, 2048), (7, 128), (5, 1920)),
    "w1a1": ((1, 128), (3, 1664), (8, 896)),
}


@pytest.mark.parametrize("recipe", ["w4a4", "w1a1"])
def test_groups_of_blocks(place: Place, recipe: str) -> None:
    """Eight blocks are transformed together, whichever rows they are of."""
    for seed, shape in enumerate(SHAPES[recipe]):
        for name in ("gaussian", "mixed_rows"):
            few_rows.judged(place, inputs.draw(name, shape, torch.bfloat16, seed), recipe)


def test_rows_that_end_where_memory_does(place: Place) -> None:
    """Nothing is asked for of the blocks that a group lacks: the ninth is alone in its own."""
    with place.walled(inputs.draw("gaussian", (3, 384), torch.bfloat16, 0)) as rows:
        few_rows.judged(place, rows, "w4a4")


def test_the_largest_block_has_more_before_it_than_lanes(place: Place) -> None:
    """Lanes look for a row's power in turns; one that is too low makes its sum infinite."""
    x = inputs.draw("gaussian", (3, 4224), torch.bfloat16, 0)
    for row, block in enumerate((31, 32, 0)):
        x[row, 128 * block : 128 * block + 128] *= 2.0**100
    few_rows.judged(place, x, "w4a4")


def test_a_row_that_another_warp_has_summed(place: Place) -> None:
    """Warp 1 scales row 32, which warp 0 sums in its third turn: warp 1 has two, and waits.

    Shared memory may still hold what the same rows left there: these are others each time.
    """
    for seed in range(2):
        few_rows.judged(place, inputs.draw("gaussian", (33, 384), torch.bfloat16, seed), "w4a4")


def test_a_cluster_of_two(place: Place) -> None:
    """Each block needs the other's sums, and not those that earlier rows left in its memory."""
    for seed in range(4):
        few_rows.judged(place, inputs.draw("mixed_rows", (8, 4096), torch.bfloat16, seed), "w4a4")


def test_shares_of_a_cluster(place: Place) -> None:
    """Of K, the last of which is not full: every block of the grid finds the same scale."""
    for name in ("gaussian", "zeros", "non_finite", "negative_zeros", "subnormal", "huge"):
        few_rows.judged(place, inputs.draw(name, (8, 4224), torch.bfloat16, 2), "w4a4")
    few_rows.judged(place, _edges(torch.bfloat16)[12:20].repeat(1, 11), "w4a4")


def test_more_groups_than_warps(place: Place) -> None:
    """Rows are read a second time, from the last group back to the first."""
    few_rows.judged(place, inputs.draw("mixed_rows", (16, 16384), torch.bfloat16, 3), "w4a4")


@pytest.mark.parametrize("spec", [INTEGERS, BITS])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_one_entry_at_every_place_of_a_row(place: Place, dtype: torch.dtype, spec: str) -> None:
    """The power of a row is that of its largest entry, wherever it lies."""
    _rows(place, torch.cat([_alone(2.0**power, dtype) for power in POWERS]), spec)


@pytest.mark.parametrize("dtype", [*WIDE, torch.float16], ids=str)
def test_an_entry_that_is_not_finite_at_every_place(place: Place, dtype: torch.dtype) -> None:
    x = inputs.draw("gaussian", (384, 128), dtype, 0)
    for i, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
        x[128 * i : 128 * i + 128].fill_diagonal_(bad)
    _rows(place, x, INTEGERS)


@pytest.mark.parametrize("spec", [BITS, INTEGERS])
@pytest.mark.parametrize("dtype", [*WIDE, torch.float16], ids=str)
def test_every_kind_of_row(place: Place, dtype: torch.dtype, spec: str) -> None:
    """Among them zeros of either sign, and rows at the ends of the range."""
    x = [inputs.draw(name, (8, 384), dtype, i) for i, name in enumerate(inputs.DISTRIBUTIONS)]
    _rows(place, torch.cat([*x, _edges(dtype)]), spec)


def test_turns_of_a_row(place: Place) -> None:
    """As many blocks as the warps hold, two turns, three that are not full, and all that there are;
    one row that is large only at its end, one only at its beginning.
    """
    for width in (16384, 32768, 35456, 49152):
        x = inputs.draw("gaussian", (5, width), torch.bfloat16, 0)
        x[1, -1], x[2, 0] = 2.0**100, -(2.0**127)
        x[3, width // 2] = torch.inf
        x[4] *= 2.0**-130
        _rows(place, x, INTEGERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_whose_codes_are_not_odd(place: Place, dtype: torch.dtype) -> None:
    """A grid with a point at 0, and one of eight bits, beside what 16 bits and 32 have largest."""
    for spec in ("ternary/hadamard128/ste/dense", "uniform8/hadamard128/ste/dense"):
        _rows(place, _edges(dtype), spec)
