"""Edges of the quantizers in CUDA C++: special rows, sums, and what lies beside their outputs.

A variant or two each: what `test_blocks` and `test_prologue_kernel` meet among many parameters.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from property_tests.ledger import LEDGER
from property_tests.places import Place
from quest import lowbit, operands, ops, packing
from quest.conformance import examine, inputs, judges
from quest.kernels import blocks, forms, rows
from quest.quantizer import parse

pytestmark = pytest.mark.whole

SIGNS = "uniform1/hadamard128/ste/dense"
FOUR = "uniform4/hadamard128/ste/dense"
TERNARY = "ternary/hadamard128/ste/dense"
CLIPPED = "uniform4/hadamard128/clip0.5/dense"
TRUSTED = "ternary/hadamard128/trust1.0/dense"
HALF, FULL = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True, params=["blocks.cu", "rows.cu"])
def _by_either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    # By each of the kernels, whatever the rule between them says of so many rows.
    monkeypatch.setattr(rows, "takes", lambda *_: request.param == "rows.cu")


def _kind(spec: str) -> str:
    return (operands.kinds(parse(spec), parse(spec)) or ("",))[0]


def _judge(place: Place, x: Tensor, spec: str, told: str) -> None:
    """T2, T3 and T0 of an operand; rows at the ends of a range may hold many near ties."""
    found = examine.operand(place.lane, x, parse(spec), _kind(spec))
    LEDGER.judge(place.lane, found, f"{told}, {tuple(x.shape)} {x.dtype}, {spec}", conclusive=False)


def _normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return inputs.draw("gaussian", shape, torch.float64, seed)


def _lost() -> Tensor:
    """Rows of one number, the smallest: their scale is 0, and then so are their codes."""
    x = torch.zeros(4, 256)
    x[(0, 1, 2, 3), (0, 77, 128, 255)] = torch.tensor([1.0, -1.0, 1.0, -1.0]) * 2.0**-149
    return x


def _odd(dtype: torch.dtype) -> Tensor:
    """Equal numbers with the last bit set: of their differences, which are 0, none is negative."""
    return torch.full((2, 256), 1 + torch.finfo(dtype).eps, dtype=dtype)


def _not_finite(dtype: torch.dtype, width: int) -> Tensor:
    """A NaN or an infinity at each of the first places of a row's last block."""
    bad = (float("nan"), float("inf"), float("-inf"))
    x = _normal((16 * len(bad), width)).to(dtype)
    for i, row in enumerate(x):
        row[width - 128 + i // len(bad)] = bad[i % len(bad)]
    return x


def _far(dtype: torch.dtype) -> Tensor:
    """Rows at the end of the range, and rows whose blocks are of unlike magnitudes."""
    largest = torch.finfo(dtype).max
    x = _normal((12, 256))
    x[:4] *= 2.0**126
    x[4:6] = 0.0
    x[4, 3], x[5, 200] = largest, -largest
    x[6:9, :128] *= 2.0**-100
    x[6:9, 128:] *= 2.0**60
    x[9:, :128] *= 2.0**-90
    x[9:, 128:] *= 2.0**-60
    return x.clamp(-largest, largest).to(dtype)


@pytest.mark.parametrize("dtype", [HALF, FULL], ids=str)
def test_signs_and_how_many(place: Place, dtype: torch.dtype) -> None:
    """One bit an entry: every word of a block, a 0 among the positive ones, and their sums."""
    kinds = ("gaussian", "integers", "negative_zeros", "zeros", "non_finite", "one_hot")
    for i, kind in enumerate(kinds):
        _judge(place, inputs.draw(kind, (9, 256), dtype, i), SIGNS, kind)
    _judge(place, _odd(dtype), SIGNS, "equal numbers")
    if dtype == FULL:
        _judge(place, _lost(), SIGNS, "a scale of 0")


@pytest.mark.parametrize("dtype", [HALF, FULL], ids=str)
def test_rows_that_are_computed_again(place: Place, dtype: torch.dtype) -> None:
    """Far from 1, or not finite: found in whichever chunk, block and warp of a row it lies."""
    # A part of a warp, of a team, a warp, a team: by one row, and by several.
    for width, step in (
        (256, 1), (640, 5), (768, 7), (1920, 7), (3584, 7), (5632, 7), (8192, 7)
    ):  # fmt: skip
        _judge(place, _not_finite(dtype, width)[::step], FOUR, "not finite")
    _judge(place, _far(dtype), FOUR, "far from 1")
    for i, kind in enumerate(("tiny", "subnormal", "huge", "mixed_rows", "zeros")):
        # Of a warp, and of a team, some threads have no block.
        for width in (256, 640, 1920, 3584, 8320):
            _judge(place, inputs.draw(kind, (9, width), dtype, i), FOUR, kind)
    _judge(place, _odd(dtype), FOUR, "equal numbers")
    # Rounding must not bring their scale to infinity, whatever the width: no bound rules that out.
    for width in (*range(128, 1281, 128), 3584):
        x = torch.full((2, width), torch.finfo(dtype).max, dtype=dtype)
        _judge(place, x, FOUR, "the largest number")
        assert bool(
            place.operators.operand(x.to(place.device), parse(FOUR), "integers")[1].isfinite().all()
        )


def test_sums_of_an_odd_grid(place: Place) -> None:
    for i, (kind, width) in enumerate(
        [("gaussian", 128), ("heavy", 256), ("zeros", 128), ("outlier", 384)]
    ):
        _judge(place, inputs.draw(kind, (9, width), HALF, i), TERNARY, kind)


@pytest.mark.parametrize(("dtype", "spec"), [(HALF, CLIPPED), (FULL, TRUSTED)], ids=str)
def test_values_and_masks(place: Place, dtype: torch.dtype, spec: str) -> None:
    """Of each word of a block; of zeros, which lie within any limit, and of an infinity."""
    x = _normal((11, 256)).to(dtype)
    x[:8] *= 2.0 ** torch.arange(-4, 4)[:, None]  # a limit is a product, not a sum
    x[8], x[9, 140] = 0.0, float("inf")
    found = examine.quantizer(place.lane, x, parse(spec), conclusive=False)
    LEDGER.judge(place.lane, found, f"{dtype}, {spec}", conclusive=False)


@pytest.mark.parametrize("dtype", [HALF, FULL], ids=str)
def test_a_limit_beyond_float32(place: Place, dtype: torch.dtype) -> None:
    """It leaves nothing out, but of rows that are not finite."""
    x = _normal((6, 256))
    x[:4] *= torch.tensor([1.0, 1e10, 1e30, 1e-10])[:, None]  # limits on both sides
    x[4], x[5, 3] = 0.0, float("nan")
    for scale in ("1e30", "1e37"):
        program = ops.program(parse(f"uniform4/hadamard128/clip{scale}/dense"), x)
        there = x.to(place.device, dtype)
        for form, bits in ((forms.INTEGERS, 0), (forms.VALUES, 0)):
            mask = blocks.quantize(there, program, form=form, bits=bits)[2].cpu()
            assert mask.unique(dim=1).tolist() == [[255]] * 5 + [[0]]


@pytest.mark.parametrize("dtype", [HALF, torch.float16, FULL], ids=str)
@pytest.mark.parametrize("width", [256, 1024, 4096])
def test_every_square_counts_once(place: Place, width: int, dtype: torch.dtype) -> None:
    """Rows of a number or two, in each place of a block and in each block: exact scales."""
    rows = 256
    i = torch.arange(rows)
    number = 2.0 ** (i % 11 - 5)
    x = torch.zeros(rows, width // 128, 128)
    x[i, i * 5 % (width // 128), i % 128] = number * (1 - i % 3)
    x[i, i * 5 // 128 % (width // 128), (i + 64) % 128] += number * 2
    squares = x.double().square().sum((1, 2))
    x = x.view(rows, width).to(place.device, dtype)
    scale = blocks.quantize(x, ops.program(parse(FOUR), x), form=forms.INTEGERS)[1]
    expected = (squares / width).float().sqrt()[:, None]
    assert torch.equal(scale.cpu(), expected)


def _transformed(x: Tensor) -> Tensor:
    """Blocks of 128, times 128^0.5, of whole numbers: exact."""
    i = torch.arange(128)
    signs = torch.tensor([1 - 2 * (n.bit_count() % 2) for n in range(128)])[i & i[:, None]]
    return (x.double().unflatten(-1, (-1, 128)) @ signs.double()).flatten(-2)


@pytest.mark.parametrize("dtype", [HALF, torch.float16, FULL], ids=str)
@pytest.mark.parametrize("width", [256, 2048, 4096])
def test_masks_at_the_limit(place: Place, width: int, dtype: torch.dtype) -> None:
    """Sums of ones and minus ones, whose sigma is 1: exact numbers, some of which are the limit.

    It lies inside; by one float less, it is beyond. By one more nothing else comes inside.
    """
    x = _normal((9, width)).sign().to(dtype)
    sums = _transformed(x).abs()
    root = np.float32(11.313708498984761)
    near = np.float32(10.0) / root
    made = {}
    for n in range(-4, 5):
        threshold = np.float32(near + n * np.spacing(near))
        made[float(threshold * root)] = float(threshold)  # rounded to float32, as the limit is
    assert (sums == 10).sum() > 50
    for limit in (10 - 2.0**-20, 10.0, 10 + 2.0**-20):
        program = ops.program(parse(CLIPPED), x)
        program = dataclasses.replace(program, threshold=made[float(limit)])
        mask = blocks.quantize(x.to(place.device), program, form=forms.INTEGERS)[2]
        assert torch.equal(mask.cpu(), packing.pack(sums <= float(limit), 1))


@pytest.mark.parametrize("dtype", [HALF, torch.float16, FULL], ids=str)
def test_zeros_are_positive(place: Place, dtype: torch.dtype) -> None:
    """Whatever they come of: zeros of either sign, alone and in blocks beside others, and sums that
    cancel; in 16 blocks of a warp and in 32.
    """
    for width in (256, 2048, 4096):
        x = torch.zeros(6, width, dtype=dtype)
        x[0], x[1] = -0.0, 0.0
        x[2:4], x[2:4, 128], x[3, 128] = -0.0, 1.0, -1.0
        x[4], x[5] = 1.5, -1.5
        x = x.to(place.device)
        for spec in (SIGNS, SIGNS.replace("ste", "clip1.0")):
            program = ops.program(parse(spec), x)
            out, _, mask, sums, _ = blocks.quantize(
                x, program, form=forms.PACKED, bits=1, sums=True
            )
            sign = _transformed(x.cpu()) >= 0
            assert sign[:2].all()
            assert sign[2:4, :128].all()
            assert (~sign[4:]).sum(-1).tolist() == [0, width // 128]
            assert torch.equal(out.cpu(), packing.pack(sign, 1))
            assert torch.equal(sums[:, 0].cpu(), (2 * sign.int() - 1).sum(-1, dtype=torch.int32))
            assert (mask[:2] == 255).all()


@pytest.mark.parametrize(
    ("spec", "form", "bits"), [(FOUR, forms.INTEGERS, 0), (SIGNS, forms.PACKED, 1)]
)
@pytest.mark.parametrize(
    ("rows", "width"),
    [
        (1, 128),
        (1, 256),
        (3, 512),
        (5, 3584),
        (3, 8192),
        (3, 5632),
        (4, 640),
        (1, 384),
        (5, 2048),
        (3, 1920),
        (7, 768),
    ],
)
def test_nothing_is_written_beside_the_outputs(
    place: Place, rows: int, width: int, spec: str, form: int, bits: int
) -> None:
    """Addresses inside of larger tensors, as a prepared layer gives them; the last warp has room
    for rows that there are not.
    """
    x = _normal((rows, width)).to(place.device, HALF)
    program = ops.program(parse(spec), x)
    operand, scale, _, sums, _ = blocks.quantize(
        x, program, form=form, bits=bits, sums=True, masked=False
    )
    around = 64
    made = [
        torch.full((around + t.numel() + around,), 77, dtype=t.dtype, device=place.device)
        for t in (operand, scale, sums)
    ]
    at = [t[around:].data_ptr() for t in made]
    blocks.launch(x, program, form, bits, rows, width, at[0], at[1], 0, at[2])
    for t, expected in zip(made, (operand, scale, sums), strict=True):
        assert torch.equal(t[around:-around], expected.flatten())
        assert (t[:around] == 77).all()
        assert (t[-around:] == 77).all()


@pytest.mark.parametrize(
    ("rows", "width"), [(1, 128), (3, 384), (3, 1920), (7, 768), (3, 3584), (3, 5632)]
)
def test_nothing_is_read_beside_the_inputs(place: Place, rows: int, width: int) -> None:
    """Neither blocks that a warp has room for nor rows of the next turn."""
    x = _normal((rows, width)).to(place.device, HALF)
    program, form = ops.program(parse(FOUR), x), forms.INTEGERS
    plain = blocks.quantize(x, program, form=form)[0]
    gated = blocks.gated(x, x, program, form=form).out
    with place.walled(x) as t:
        assert torch.equal(blocks.quantize(t, program, form=form)[0], plain)
        assert torch.equal(blocks.gated(t, t, program, form=form).out, gated)


def test_rows_without_a_scale(place: Place) -> None:
    """What plain PyTorch makes of them."""
    q = parse(FOUR)
    for dtype in (HALF, torch.float16, FULL):
        x = torch.cat((_not_finite(dtype, 256), torch.zeros(3, 256, dtype=dtype)))
        made = lowbit.launch_operand(x.to(place.device), q, _kind(FOUR))
        for t, expected in zip(made, lowbit.eager_operand(x, q, _kind(FOUR)), strict=True):
            torch.testing.assert_close(t.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [HALF, FULL], ids=str)
@pytest.mark.parametrize("spec", [FOUR, SIGNS])
@pytest.mark.parametrize(
    ("largest", "power"), [*((127, n) for n in (0, -6, -8, -20, -24)), (0, -126), (0, -133)]
)
def test_signs_of_a_block_far_below_its_row(
    place: Place, largest: int, power: int, spec: str, dtype: torch.dtype
) -> None:
    """16 bits, and of 2^-24 a float32, hold no number of it once its row's largest is near 1; and
    beside 1, which stays as it is, it has the least numbers of a bfloat16.
    """
    x = torch.zeros(2, 256, dtype=dtype)
    x[:, 5], x[0, 128:], x[1, 128:] = 2.0**largest, -(2.0**power), 2.0**power
    _judge(place, x, spec, "a block far below")
    made = lowbit.launch_operand(x.to(place.device), parse(spec), _kind(spec))
    found = judges.whole(made[0].cpu(), _kind(spec), 256)[:, 128:]
    assert (found[:, 0] < 0).tolist() == [True, False]
    assert (found[:, 1:] > 0).all()


@pytest.mark.parametrize("apart", [140, 150, 160, 240])
def test_what_is_lost_beside_its_row_is_positive(place: Place, apart: int) -> None:
    """Signs, integers and values of a block that a row's power leaves nothing of, or little."""
    x = _normal((3, 256))
    x[:, :128] *= 2.0 ** (apart // 2)
    x[:, 128:] *= 2.0 ** -(apart // 2)
    x = x.to(place.device, HALF)
    program = ops.program(parse(SIGNS), x)
    bits = blocks.quantize(x, program, form=forms.PACKED, bits=1, sums=True)
    integers = blocks.quantize(x, program, form=forms.INTEGERS, sums=True)
    values = blocks.quantize(x, program, form=forms.VALUES)
    positive = integers[0].cpu() > 0
    assert torch.equal(positive, values[0].cpu() > 0)
    weight = 1 << torch.arange(8)
    packed = (positive.view(3, 32, 8) * weight).sum(-1).to(torch.uint8)
    assert torch.equal(packed, bits[0].cpu())
    largest = int(integers[0].max())
    assert torch.equal(bits[3].cpu() * largest, integers[3].cpu())
