"""Rows at the edges of what the quantizer of few rows does: `rows.cu`.

Rows whose sum of squares is no float go another way through the kernel, with a power of two of the
row. Entries at every place decide that power, or that a row is not finite, and a row that has only
one shows its column of the transform without a rounding.
"""

from __future__ import annotations

import pytest
import torch

from property_tests.ledger import LEDGER
from property_tests.places import Place
from quest import operands, ops, packing
from quest.conformance import examine, inputs
from quest.kernels import blocks, forms
from quest.quantizer import parse

pytestmark = pytest.mark.whole

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


def test_rows_that_end_where_memory_does(place: Place) -> None:
    """Nothing is asked for of the blocks that a warp lacks: the ninth is alone in its own."""
    q, quantize = parse(INTEGERS), place.operators.operand
    for dtype in WIDE:
        x = inputs.draw("gaussian", (3, 1152), dtype, 0)
        expected = quantize(x.to(place.device), q, "integers")
        with place.walled(x) as rows:
            for made, t in zip(quantize(rows, q, "integers"), expected, strict=True):
                assert torch.equal(made, t)


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


@pytest.mark.parametrize("dtype", [*WIDE, torch.float16], ids=str)
def test_rows_of_the_largest_number(place: Place, dtype: torch.dtype) -> None:
    """Of either sign: rounding must not bring their scale to infinity, whatever the width."""
    for width in (*range(128, 1281, 128), 3584):
        x = torch.full((2, width), torch.finfo(dtype).max, dtype=dtype)
        x[1, ::2] *= -1
        _rows(place, x, INTEGERS)
        # Which the bound of a scale does not rule out.
        scale = place.operators.operand(x.to(place.device), parse(INTEGERS), "integers")[1]
        assert bool(scale.isfinite().all())


def test_turns_of_a_row(place: Place) -> None:
    """As many blocks as the warps hold, two turns, three that are not full, and all that there are;
    one row that is large only at its end, one only at its beginning.
    """
    half, full = torch.bfloat16, torch.float32
    cases = [(16384, half), (32768, half), (35456, half), (49152, half), (17408, full)]
    for width, dtype in cases:
        x = inputs.draw("gaussian", (5, width), dtype, 0)
        x[1, -1], x[2, 0] = 2.0**100, -(2.0**127)
        x[3, width // 2] = torch.inf
        x[4] *= 2.0**-130
        _rows(place, x, INTEGERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_whose_codes_are_not_odd(place: Place, dtype: torch.dtype) -> None:
    """A grid with a point at 0, and one of eight bits, beside what 16 bits and 32 have largest."""
    for spec in ("ternary/hadamard128/ste/dense", "uniform8/hadamard128/ste/dense"):
        _rows(place, _edges(dtype), spec)


@pytest.mark.parametrize(
    ("spec", "saved"),
    [("uniform4/hadamard128/trust1.0/dense", 4), ("uniform3/hadamard128/clip0.8/dense", 4),
     ("uniform2/hadamard128/ste/dense", 2), ("ternary/hadamard128/trust1.0/dense", 2)],
)  # fmt: skip
def test_what_is_saved(place: Place, spec: str, saved: int) -> None:
    """Codes in 2 and 4 bits beside all else, which is what it is without; of warps that are full
    and not, of three turns. A row's scale is that of every form.
    """
    q = parse(spec)
    levels = q.require_grid().levels
    stride, top = (1, levels // 2) if levels % 2 else (2, levels - 1)
    while 2 * top < 128:  # int8 has room
        stride, top = 2 * stride, 2 * top
    for width in (640, 2048, 35456):
        x = inputs.draw("gaussian", (3, width), torch.bfloat16, 0).to(place.device)
        program = ops.program(q, x)
        made = blocks.quantize(x, program, form=forms.INTEGERS, saved=saved, sums=True)
        plain = blocks.quantize(x, program, form=forms.INTEGERS, sums=True)
        for t, expected in zip(made[:4], plain[:4], strict=True):
            assert torch.equal(t, expected)
        for form, bits in ((forms.VALUES, 0), (forms.CODES, 0), (forms.PACKED, 4)):
            assert torch.equal(blocks.quantize(x, program, form=form, bits=bits)[1], made[1])
        index = (made[0].cpu().int() + top) // stride
        assert torch.equal(made[4].cpu(), packing.pack(index, saved))
