"""Teams of `blocks.cu`: rows that share a warp or a thread block, turns, and what a gate makes.

`rows.cu` has a thread block for each row, and none of this.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from property_tests.ledger import LEDGER
from property_tests.places import Place
from quest import operands, ops, packing
from quest.conformance import examine, inputs, judges
from quest.kernels import blocks, cuda, forms, rows
from quest.quantizer import parse

pytestmark = pytest.mark.whole

FOUR = "uniform4/hadamard128/ste/dense"
TRUSTED = "ternary/hadamard128/trust1.0/dense"
HALF, FULL = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _by_teams(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whatever the rule says of so few rows.
    monkeypatch.setattr(rows, "takes", lambda *_: False)


def _kind(spec: str) -> str:
    return (operands.kinds(parse(spec), parse(spec)) or ("",))[0]


def _normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return inputs.draw("gaussian", shape, torch.float64, seed)


def _third_turn(width: int, size: int = 2) -> int:
    """Rows with which the last team of a multiprocessor comes to a third turn, and one more; of
    teams of several rows, and of warps that rows share, the last has one. size: of an entry.
    """
    shape = blocks._shape(width // 128, size=size)
    teams = blocks.RESIDENT[size] // (shape.warps * shape.teams) * shape.teams
    of_team = shape.rows if shape.segment == shape.tile else shape.tile // shape.segment
    return of_team * 3 * teams + 1


# Of warps of 32 blocks: rows that have a warp; five warps, four, of which one is half empty, two,
# and three for two rows, of which one is not full. Of 16: rows that have a warp, which is full or
# not; share one; are three for one, five for two and three for four; have four.
@pytest.mark.parametrize("dtype", [HALF, FULL], ids=str)
@pytest.mark.parametrize(
    ("width", "tile"),
    [*((n, 32) for n in (3584, 16512, 14336, 8192, 5632)),
     *((n, 16) for n in (2048, 1920, 1024, 640, 768, 2560, 8192))],
)  # fmt: skip
def test_turns_of_a_multiprocessor(
    place: Place, width: int, tile: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No row is left out, and none has the numbers of another, which differ much."""
    monkeypatch.setattr(cuda, "processors", lambda _: 1)
    monkeypatch.setattr(blocks, "_tile", lambda *_: tile)
    monkeypatch.setattr(blocks, "_shape", blocks._shape.__wrapped__)  # it remembers
    rows = _third_turn(width, dtype.itemsize)
    powers = torch.arange(rows) * 37 % 41 - 20
    x = _normal((rows, width)) * 2.0 ** powers[:, None].double()
    found = examine.operand(place.lane, x.to(dtype), parse(FOUR), _kind(FOUR))
    LEDGER.judge(place.lane, found, f"{rows} rows of unlike magnitudes, {width}", conclusive=False)


def test_turns_of_the_widest_rows(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three turns of a row of as many warps as there may be; of equal numbers all is exact."""
    monkeypatch.setattr(cuda, "processors", lambda _: 1)
    x = (2.0 ** torch.arange(3)[:, None].repeat(1, 49152)).to(place.device, HALF)
    program = ops.program(parse(FOUR), x)
    operand, scale, _, sums, _ = blocks.quantize(x, program, form=forms.INTEGERS, sums=True)
    # Of a block's transform the first number is far beyond the grid, and the others are 0.
    expected = torch.full((3, 384, 128), 8, dtype=torch.int8)
    expected[..., 0] = 120
    assert torch.equal(operand.cpu().view(3, 384, 128), expected)
    assert scale.flatten().tolist() == [1, 2, 4]
    assert sums.flatten().tolist() == 3 * [384 * (120 + 127 * 8)]


# Each turn with sums of two kinds that warps exchange: two of a row, three of two rows, and of 16
# blocks two of five rows; rows that have one, or share one.
@pytest.mark.parametrize("width", [8192, 5632, 768, 1920, 1024])
def test_turns_of_a_norm(place: Place, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "processors", lambda _: 1)
    rows = _third_turn(width)
    powers = torch.arange(rows) * 37 % 41 - 20
    x = (_normal((rows, width)) * 2.0 ** powers[:, None].double()).to(HALF)
    weight = _normal((width,), 1).to(HALF)
    q, kind = parse(FOUR), _kind(FOUR)
    found = examine.normed(place.lane, x, None, weight, 1e-5, q, kind, conclusive=False)
    LEDGER.judge(place.lane, found, "norms of rows of unlike magnitudes", conclusive=False)


def test_a_gate(place: Place) -> None:
    """silu over all of its range, to where exp leaves float32; 8 rows a warp, and what is left."""
    gate = torch.linspace(-100, 100, 33 * 256).view(33, 256)
    gate[15:] /= 20
    gate, value = gate.to(HALF), inputs.draw("heavy", (33, 256), HALF, 1)
    shown = place.operators.gated_encode_shown(
        gate.to(place.device), value.to(place.device), FOUR, _kind(FOUR)
    )[3]
    LEDGER.judge(place.lane, [judges.gated(gate, value, shown.cpu())], "a gate from -100 to 100")


# Five blocks, six, twelve, 20, 25, 33 and 44: three rows a team, five, four, three, five, three and
# two; 20 by warps of 16 blocks, which float32 has, as well. Values are made of rows alone.
@pytest.mark.parametrize(
    ("width", "tile"),
    [(640, 16), (768, 16), (1536, 16), (2560, 16), (2560, 32), (3200, 32), (4224, 32), (5632, 32)],
)
@pytest.mark.parametrize("dtype", [HALF, FULL], ids=str)
def test_a_scale_is_that_of_a_row_by_itself(
    place: Place, dtype: torch.dtype, width: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, whatever is made of a row and wherever in a team it lies: beside rows far from
    1, too, which are computed again.
    """
    monkeypatch.setattr(blocks, "_tile", lambda *_: tile)
    monkeypatch.setattr(blocks, "_shape", blocks._shape.__wrapped__)  # it remembers
    x = _normal((25, width))
    x[::3] *= 1e-30
    x = x.to(place.device, dtype)
    program = ops.program(parse(FOUR), x)
    scale = blocks.quantize(x, program, form=forms.VALUES)[1]
    for form, bits in ((forms.INTEGERS, 0), (forms.CODES, 0), (forms.PACKED, 4)):
        assert torch.equal(blocks.quantize(x, program, form=form, bits=bits)[1], scale)
    alone = [blocks.quantize(row, program, form=forms.INTEGERS)[1] for row in x.split(1)]
    assert torch.equal(torch.cat(alone), scale)


@pytest.mark.parametrize("width", [640, 768, 1024, 2048, 3584])
@pytest.mark.parametrize(
    ("spec", "saved"),
    [("uniform4/hadamard128/trust1.0/dense", 4), ("uniform3/hadamard128/clip0.8/dense", 4),
     ("uniform2/hadamard128/ste/dense", 2), (TRUSTED, 2)],
)  # fmt: skip
def test_what_is_saved(
    place: Place, spec: str, saved: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes in 2 and 4 bits; a gate's are those of the rows that it shows, in each of its turns."""
    monkeypatch.setattr(cuda, "processors", lambda _: 1)
    # Halves of a wider tensor: a row does not begin where the one before ends.
    rows = _third_turn(width)
    gate, value = (3 * _normal((rows, 2 * width))).to(place.device, HALF).chunk(2, -1)
    program = ops.program(parse(spec), gate)
    how = {"form": forms.INTEGERS, "saved": saved}
    gated = blocks.gated(gate, value, program, show=True, masked=True, **how)
    assert gated.rows is not None
    shown = judges.gated(gate.cpu(), value.cpu(), gated.rows.cpu())
    LEDGER.judge(place.lane, [shown], f"a gate in turns, {spec}")
    made = blocks.quantize(gated.rows, program, sums=True, **how)
    seen = (gated.out, gated.scale, gated.mask, gated.sums, gated.saved)
    for t, expected in zip(seen, made, strict=True):
        assert t is not None
        assert torch.equal(t.view(torch.uint8), expected.view(torch.uint8))
    levels = parse(spec).require_grid().levels
    stride, top = (1, levels // 2) if levels % 2 else (2, levels - 1)
    while 2 * top < 128:  # int8 has room
        stride, top = 2 * stride, 2 * top
    index = (made[0].cpu().int() + top) // stride
    assert torch.equal(made[4].cpu(), packing.pack(index, saved))
