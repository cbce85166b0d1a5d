"""Corners of the kernels in CUDA C++ that planted faults outlived: each test has killed one."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor

from property_tests.places import Place
from property_tests.test_few_cuda_edges import (  # noqa: F401 - the fixture, of every test
    _exact,
    _on_hopper,
    _split,
    _width,
)
from quest import compression, eager, ops
from quest.conformance import judges
from quest.kernels import blocks, cuda, few, forms, hopper, outputs, product, rows, sparse
from quest.quantizer import parse

pytestmark = pytest.mark.whole

FOUR = "uniform4/hadamard128/ste/dense"


def _ones(place: Place, *counts: int) -> list[Tensor]:
    return [torch.ones(n, device=place.device) for n in counts]


def _normal(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _random(rows: int, width: int, low: int, high: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (rows, width), generator=g).to(torch.int8)


# --- products of codes ------------------------------------------------------------------------


def _codes(
    place: Place, a: Tensor, b: Tensor, row_scale: Tensor, column_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """y of codes, each 1/2 less than what it stands for, and the exact sums times 4."""
    sums = [(2 * t.long() + 1).sum(1).int().to(place.device) for t in (a, b)]
    with product.only(product.NARROW):
        y = product.product(
            a.to(place.device), b.to(place.device), torch.float32, epilogue=hopper.CORRECTED,
            length=a.shape[1], row_scale=row_scale.to(place.device),
            column_scale=column_scale.to(place.device), row_sum=sums[0], column_sum=sums[1],
        )  # fmt: skip
    return y.cpu(), (2 * a.long() + 1) @ (2 * b.long() + 1).T


def test_codes_of_rows_that_are_almost_nothing(place: Place) -> None:
    """A quarter of such a scale is no normal float: the column's brings back all of its bits."""
    a, b = _random(40, 128, -8, 8, 40), _random(8, 128, -8, 8, 8)
    scale, columns = torch.full((40,), (1 + 2.0**-23) * 2.0**-126), torch.full((8,), 2.0**120)
    y, fours = _codes(place, a, b, scale, columns)
    exact = fours.double() / 4 * scale.double()[:, None] * columns.double()
    assert torch.equal(y, exact.float())


def test_long_sums_of_codes_are_rounded_once(place: Place) -> None:
    """Where four times a sum leaves int32."""
    a, b = _random(3, 32896, 40, 128), _random(8, 32896, 40, 128, 1)
    y, fours = _codes(place, a, b, torch.ones(3), torch.ones(8))
    assert torch.equal(y, (fours.double() / 4).float())


def test_signs_that_have_nothing_in_common(place: Place) -> None:
    """Four times the bits that rows share, less a column's sum, is then far below 0."""
    bits = torch.randint(0, 2, (5, 1024), generator=torch.Generator().manual_seed(0))
    bits[0], bits[1], bits[2, :1000], bits[3, :1000] = 0, 1, 0, 1
    signs, weights = 2 * bits - 1, 2 ** torch.arange(8)
    operand = (bits.view(5, -1, 8) * weights).sum(-1).to(torch.uint8).to(place.device)
    sums, ones = signs.sum(1).int().to(place.device), torch.ones(5, device=place.device)
    with product.only(product.NARROW):
        y = product.product(
            operand, operand, torch.float32, epilogue=hopper.CORRECTED, length=1024,
            row_scale=ones, column_scale=ones, row_sum=sums, column_sum=sums,
        )  # fmt: skip
    assert torch.equal(y.cpu().long(), signs @ signs.T)


def test_sparse_sums_beyond_2_to_24_are_rounded_once(place: Place) -> None:
    """Of codes beside a weight whose integers are even."""
    x, w = _random(3, 8192, 60, 128), 2 * _random(8, 8192, 30, 64, 1)
    w.view(8, -1, 4)[..., 1::2] = 0
    exact = ((2 * x.long() + 1) @ w.long().T).double() / 2
    assert exact.abs().min() > 2**24
    values, metadata = (t.to(place.device) for t in compression.compress(w))
    tokens, features = _ones(place, 3, 8)
    with sparse.only(sparse.NARROW):
        y = sparse.product(
            values, metadata, x.to(place.device), torch.float32, epilogue=hopper.CORRECTED,
            feature_scale=features, token_scale=tokens,
            feature_sum=(2 * w.sum(-1, dtype=torch.int32)).to(place.device),
        )  # fmt: skip
    assert torch.equal(y.cpu(), exact.float())


# --- what is added, and by what a gate is shut ------------------------------------------------

FLOAT, HALF, SHORT = torch.float32, torch.float16, torch.bfloat16


def _scales(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Of near rows; of every third one, far, or negative, that every other column brings back."""
    row, column = torch.ones(rows), torch.full((columns,), 2.0**-6)
    row[::3], column[::2] = -(2.0**120), 2.0**-126
    return row, column


@pytest.mark.parametrize(
    ("tiles", "out"),
    [("wide", FLOAT), ("wide", SHORT), ("tall", HALF), ("narrow", FLOAT)], ids=str,
)  # fmt: skip
def test_a_residual_in_whole_vectors(
    tiles: str, out: torch.dtype, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cluster's many tiles, of rows near and far: what two operations give."""
    monkeypatch.setattr(cuda, "processors", lambda _: 2)
    a, b = _random(70, 160, -8, 8), _random(536, 160, -8, 8, 1)
    row, column = _scales(70, 536)
    y = ((a.double() @ b.double().T) * row.double()[:, None] * column.double()).to(out)
    beside = torch.randn(70, 536, generator=torch.Generator().manual_seed(0)).to(out)
    expected = (beside.float() + y.float()).to(out)
    a, b, row, column, beside = (t.to(place.device) for t in (a, b, row, column, beside))
    with product.only(product.KINDS[tiles]), outputs.poisoned(0xFF):
        h = product.product(a, b, out, epilogue=hopper.PLAIN, row_scale=row, column_scale=column,
                            residual=beside)  # fmt: skip
    assert torch.equal(h.cpu(), expected)


@pytest.mark.parametrize("tiles", [sparse.WIDE, sparse.NARROW], ids=["wide", "narrow"])
def test_tokens_that_are_far_below_0(tiles: sparse.Shape, place: Place) -> None:
    x, w = _random(70, 160, -8, 8), _random(72, 160, -8, 8, 1)
    w.view(72, -1, 4)[..., 1::2] = 0
    values, metadata = (t.to(place.device) for t in compression.compress(w))
    token, feature = torch.full((70,), -(2.0**120)), torch.full((72,), 2.0**-126)
    with sparse.only(tiles):
        y = sparse.product(
            values, metadata, x.to(place.device), FLOAT, epilogue=hopper.PLAIN,
            token_scale=token.to(place.device), feature_scale=feature.to(place.device),
        )  # fmt: skip
    assert torch.equal(y.cpu(), x.float() @ w.float().T * -(2.0**-6))


@pytest.mark.parametrize("out", [FLOAT, HALF, SHORT], ids=str)
@pytest.mark.parametrize("added", [FLOAT, HALF, SHORT], ids=str)
def test_a_bias_of_another_dtype(added: torch.dtype, out: torch.dtype, place: Place) -> None:
    """It is read as what it is, and rounded once."""
    a, b = _random(5, 32, -8, 8), _random(200, 32, -8, 8, 1)
    bias = (100 * torch.randn(200, generator=torch.Generator().manual_seed(0))).to(added)
    row, column = _ones(place, 5, 200)
    with product.only(product.NARROW):
        y = product.product(
            a.to(place.device), b.to(place.device), out, epilogue=hopper.PLAIN, row_scale=row,
            column_scale=column, bias=bias.to(place.device),
        )  # fmt: skip
    assert torch.equal(y.cpu(), (a.float() @ b.float().T + bias.float()).to(out))


@pytest.mark.parametrize(
    ("tiles", "out"), [("wide", HALF), ("tall", SHORT), ("narrow", HALF)], ids=str
)
def test_a_gate_of_far_rows(
    tiles: str, out: torch.dtype, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside near ones: what is judged are the halves of the product that writes both."""
    monkeypatch.setattr(cuda, "processors", lambda _: 2)
    a, b = _random(70, 160, -8, 8), _random(2 * 268, 160, -8, 8, 1)
    row, column = _scales(70, 536)
    a, b, row, column = (t.to(place.device) for t in (a, b, row, column))
    with product.only(product.KINDS[tiles]), outputs.poisoned(0xFF):
        y, found = (
            product.product(a, b, out, epilogue=hopper.PLAIN, row_scale=row, column_scale=column,
                            gate=gate).cpu()
            for gate in (False, True)
        )  # fmt: skip
    gate, value = y.chunk(2, -1)
    judges.gated(gate, value, found).require()


# --- gates and norms whose factors leave the range --------------------------------------------


@pytest.mark.parametrize("kernel", ["blocks", "product"])
def test_a_gate_that_is_shut_on_a_large_value(kernel: str, place: Place) -> None:
    """silu(gate) is 0, and so is what it lets through, though gate times value is no float."""
    gate = torch.full((4, 256), -1e20).bfloat16().to(place.device)
    value = torch.full((4, 256), 1e20).bfloat16().to(place.device)
    gate[:, ::2], value[:, ::2] = 1.5, -2.0
    expected = eager.gated(gate.cpu(), value.cpu()).abs()
    assert expected.isfinite().all()
    if kernel == "blocks":
        made = blocks.gated(gate, value, ops.program(parse(FOUR), gate), form=forms.INTEGERS,
                            show=True)  # fmt: skip
        assert made.rows is not None
        assert torch.equal(made.rows.cpu().abs(), expected)
        assert made.scale.isfinite().all()
        return
    a, b = (torch.zeros(n, 128, dtype=torch.int8, device=place.device) for n in (4, 512))
    row, column = _ones(place, 4, 512)
    y = product.product(
        a, b, torch.bfloat16, epilogue=hopper.PLAIN, row_scale=row, column_scale=column,
        bias=torch.cat((gate[0], value[0])), gate=True,
    )  # fmt: skip
    assert torch.equal(y.cpu().abs(), expected)


@pytest.mark.parametrize("few", [True, False])
def test_a_norm_whose_weight_is_large(
    few: bool, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """h times the weight is no float, where (h over its root) times the weight is one."""
    monkeypatch.setattr(rows, "takes", lambda *_: few)
    x = (torch.randn(3, 256, generator=torch.Generator().manual_seed(0)) * 1e15).bfloat16()
    weight = torch.full((256,), 1e30).bfloat16()
    expected = eager.normed(x, None, weight, 1e-5)[1]
    assert expected.isfinite().all()
    x = x.to(place.device)
    made = blocks.normed(x, None, weight.to(place.device), 1e-5, ops.program(parse(FOUR), x),
                         form=forms.INTEGERS, show=True)  # fmt: skip
    assert made.rows is not None
    # Each is rounded to bfloat16 once, by 2^-9 at most, from floats that differ in their last bits.
    torch.testing.assert_close(made.rows.cpu(), expected, rtol=2**-7, atol=0)
    assert made.scale.isfinite().all()


# --- where memory ends, and how it lies -------------------------------------------------------


def test_one_memory_as_several_matrices(place: Place) -> None:
    """Of more rows, of longer ones, and in other tiles: what was made of the first is not kept."""
    memory = _random(1, 160 * 128, -128, 128).flatten().to(place.device)
    assert memory.data_ptr() % 16 == 0
    for height, width, tiles in (
        (40, 64, product.NARROW), (160, 64, product.NARROW), (160, 128, product.NARROW),
        (160, 128, product.WIDE),
    ):  # fmt: skip
        a = memory[: height * width].view(height, width)
        with product.only(tiles):
            y = product.product(a, a, torch.int32, epilogue=hopper.RAW).cpu()
        assert torch.equal(y.double(), a.cpu().double() @ a.cpu().double().T)


@pytest.mark.parametrize("residual", [False, True])
def test_elements_that_ints_do_not_count(
    residual: bool, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tiles of 2^32, the first and one of the last: turns are given that come to no other."""
    height, columns, group = 2**20, 2**12, 1000
    pair = product.GROUP * group + 1  # of the second turn
    told = struct.pack("3iIiIi", 2, height // 128, 0, group, 0, 0, 0)
    monkeypatch.setattr(cuda, "processors", lambda _: 2)
    monkeypatch.setattr(product, "turns", lambda *_: told)
    a, b = torch.zeros(height, 16, dtype=torch.int8), torch.zeros(columns, 16, dtype=torch.int8)
    a[:128], a[128 * pair :][:128] = _random(128, 16, -8, 8), _random(128, 16, -8, 8, 1)
    b[:128] = _random(128, 16, -8, 8, 2)
    row, column = _ones(place, height, columns)
    beside = torch.empty(height, columns, dtype=SHORT, device=place.device) if residual else None
    if beside is not None:  # no more of it than is read
        beside[:128, :128], beside[128 * pair :][:128, :128] = 0, 3
    with product.only(product.NARROW):
        y = product.product(
            a.to(place.device), b.to(place.device), SHORT, epilogue=hopper.PLAIN, row_scale=row,
            column_scale=column, residual=beside,
        )  # fmt: skip
    for first in (0, 128 * pair):
        exact = (a[first:][:128].float() @ b[:128].float().T).to(SHORT)
        expected = exact + 3 if residual and first else exact
        assert torch.equal(y[first:][:128, :128].cpu(), expected)


def test_rows_whose_quarter_ints_do_not_count(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread writes every fourth row of its warp's; of all columns, one tile."""
    told = struct.pack("3iIiIi", 1, 1, 1, *product._divisor(8), *product._divisor(1))
    monkeypatch.setattr(product, "turns", lambda *_: told)
    columns, device = 2**27, place.device
    a = _random(16, 16, -8, 8)
    b = torch.empty(columns, 16, dtype=torch.int8, device=device)
    b[:128] = _random(128, 16, -8, 8, 1).to(device)
    with product.only(product.NARROW):
        y = product.product(a.to(device), b, torch.int32, epilogue=hopper.RAW)
    assert torch.equal(y[:, :128].cpu(), (a.float() @ b[:128].cpu().float().T).int())


@pytest.mark.parametrize("cluster", [4, 8])
def test_blocks_without_a_step_read_nothing_of_a(cluster: int, place: Place) -> None:
    """A ends where memory does, and the last blocks of a cluster begin behind its rows."""
    for bits in (1, 4):
        with _split((1,), (cluster,)):
            _exact(place, bits, (5, 40, _width(bits, cluster + 1)), edged=True)


@pytest.mark.parametrize("bits", [1, 4])
def test_a_tile_of_few_columns_ends_where_memory_does(bits: int, place: Place) -> None:
    """Eight at the most: it has no rows of W in its upper half."""
    for columns in (5, 8):
        with _split((1,)):
            _exact(place, bits, (5, columns, 640), edged=True)


def test_rows_of_which_few_wait_for_a_second_turn(place: Place) -> None:
    """A block's warps bring 32 pieces of A, of more than 32 rows, at once; here are some more."""
    for many in (33, 40, 47):
        with _split():
            _exact(place, 4, (many, 40, 512))


def test_clusters_whose_last_block_has_fewer_tiles(place: Place) -> None:
    """Three for two blocks, beside another cluster's: in whichever order clusters run."""
    for settled in (False, True):
        with _split(clusters=(2,), groups=3):
            assert few.plan(5, 144, 512, 4, 2, 3).tiles == 3
            _exact(place, 4, (5, 144, 512), settled=settled)


def test_rows_with_an_axis_of_one(place: Place) -> None:
    """(5, 1, 256) of (1, 5, 256), contiguous, whose axis of one has a stride that says nothing."""
    x = torch.randn(1, 5, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = x.to(place.device)
    turned = x.transpose(0, 1)
    assert turned.is_contiguous()
    assert turned.stride() == (256, 1280, 1)
    program, made = ops.program(parse(FOUR), x), []
    for each in (x.view(5, 256), turned):
        out = torch.empty(5, 256, dtype=torch.int8, device=place.device)
        scale = torch.empty(5, device=place.device)
        sums = torch.empty(5, dtype=torch.int32, device=place.device)
        with rows.only(True):
            blocks.launch(each, program, forms.INTEGERS, 0, 5, 256, out.data_ptr(),
                          scale.data_ptr(), 0, sums.data_ptr())  # fmt: skip
        made.append((out, scale, sums))
    for first, second in zip(*made, strict=True):
        assert torch.equal(first, second)


def test_metadata_off_a_multiple_of_16_bytes(place: Place) -> None:
    x, w = _random(5, 512, -128, 128), _random(7, 512, -128, 128, 1)
    w.view(7, -1, 4)[..., 1::2] = 0
    values, metadata = compression.compress(w)
    held = torch.zeros(metadata.numel() + 8, dtype=torch.int32, device=place.device)
    at = (-held.data_ptr() % 16) // 4 + 1
    off = held[at : at + metadata.numel()].view(metadata.shape).copy_(metadata)
    y = sparse.product(values.to(place.device), off, x.to(place.device), torch.int32,
                       epilogue=hopper.RAW)  # fmt: skip
    assert torch.equal(y.cpu().long(), x.long() @ w.long().T)


# Rows that share a warp, and are three of a team; the last has room for more, or lacks blocks.
@pytest.mark.parametrize("width", [512, 640])
@pytest.mark.parametrize("by_row", [True, False])
def test_nothing_beside_any_input_or_output(
    by_row: bool, width: int, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks, values, what is saved, and rows that a prologue makes lie between bytes that are none
    of theirs; behind the inputs, a norm's weight among them, no memory is mapped.
    """
    held, margin = [], 2**15

    def between(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        held.append(torch.full((margin + size + margin,), 77, dtype=torch.uint8, device=device))
        return held[-1][margin : margin + size].view(dtype).view(tuple(shape))

    monkeypatch.setattr(outputs, "empty", between)
    monkeypatch.setattr(rows, "takes", lambda *_: by_row)
    given = [_normal(n, width, i) for i, n in enumerate((5, 5, 1))]
    with ExitStack() as memory:
        x, beside, (weight,) = (memory.enter_context(place.walled(t)) for t in given)
        for bits in (4, 2):
            program = ops.program(parse(f"uniform{bits}/hadamard128/trust1.0/dense"), x)
            how = {"form": forms.INTEGERS, "saved": bits}
            blocks.quantize(x, program, sums=True, **how)
            blocks.gated(x, beside, program, show=True, masked=True, **how)
        for form in (forms.VALUES, forms.PACKED):
            blocks.quantize(x, program, form=form, bits=4)
        for residual in (None, beside):
            blocks.normed(x, residual, weight, 1e-5, program, form=forms.INTEGERS, show=True)
    assert len(held) > 30
    assert all((t[:margin] == 77).all() and (t[-margin:] == 77).all() for t in held)


@pytest.mark.parametrize("width", [512, 640])
@pytest.mark.parametrize("by_row", [True, False])
def test_rows_that_lie_apart(
    by_row: bool, width: int, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of each input in their own way: the same as one behind the other."""
    monkeypatch.setattr(rows, "takes", lambda *_: by_row)
    wide = [_normal(9, width + n, n).to(place.device) for n in (64, 128)]
    apart = [t[:, 8 : width + 8] for t in wide]
    program, how = ops.program(parse(FOUR), apart[0]), {"form": forms.INTEGERS}
    weight = wide[0][0, :width].clone()

    def made(x: Tensor, beside: Tensor) -> list[Tensor | None]:
        return [
            *blocks.quantize(x, program, sums=True, **how),
            *blocks.gated(x, beside, program, show=True, **how),
            *blocks.normed(x, None, weight, 1e-5, program, show=True, **how),
            *blocks.normed(x, beside, weight, 1e-5, program, show=True, **how),
        ]

    for t, expected in zip(made(*apart), made(*(t.contiguous() for t in apart)), strict=True):
        assert (t is None) == (expected is None)
        if t is not None and expected is not None:
            assert torch.equal(t.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("by_row", [True, False])
def test_rows_that_lie_far_apart(
    by_row: bool, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last begins more than 2^32 bytes behind the first; of the memory between them nothing is
    touched.
    """
    monkeypatch.setattr(rows, "takes", lambda *_: by_row)
    near, beside = (_normal(6, 256, n).to(place.device) for n in (0, 1))
    # As far as blocks.cu reads rows where they lie.
    far = torch.empty(6, 2**29 - 8, dtype=torch.bfloat16, device=place.device)[:, :256]
    assert far.copy_(near) is forms.readable(far)
    program, how = ops.program(parse(FOUR), near), {"form": forms.INTEGERS}
    weight = near[0].clone()

    def made(x: Tensor) -> list[Tensor | None]:
        return [
            *blocks.quantize(x, program, sums=True, **how),
            *blocks.gated(x, beside, program, **how),
            *blocks.gated(beside, x, program, **how),
            *blocks.normed(x, None, weight, 1e-5, program, show=True, **how),
            *blocks.normed(x, beside, weight, 1e-5, program, **how),
        ]

    for t, expected in zip(made(far), made(near), strict=True):
        assert (t is None) == (expected is None)
        if t is not None and expected is not None:
            assert torch.equal(t.view(torch.uint8), expected.view(torch.uint8))


def test_rows_are_computed_again_in_some_turns(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two warps, whose sums take turns of their own: the second turn, and the fourth."""
    monkeypatch.setattr(rows, "takes", lambda *_: False)
    monkeypatch.setattr(cuda, "processors", lambda _: 1)
    x = _normal(25, 8192, 0)
    x[8:16] *= 1e-30
    x[24:] *= 1e-30
    x = x.to(place.device)
    assert blocks._grid(25, 64, 0, 2)[0] == 4  # thread blocks, of two teams each
    how = {"form": forms.INTEGERS, "sums": True}
    made = blocks.quantize(x, ops.program(parse(FOUR), x), **how)
    for some in (slice(0, 8), slice(8, 16), slice(24, 25)):
        alone = blocks.quantize(x[some], ops.program(parse(FOUR), x), **how)
        for t, expected in zip(made[:4], alone[:4], strict=True):
            assert torch.equal(t[some], expected)


@pytest.mark.parametrize("by_row", [True, False])
def test_values_of_the_least_scale(
    by_row: bool, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of it is nothing; its points, of several steps, are not."""
    monkeypatch.setattr(rows, "takes", lambda *_: by_row)
    x = torch.full((3, 256), 2.0**-149).to(place.device)  # transformed, the first of a block is all
    q = parse(FOUR)
    made = blocks.quantize(x, ops.program(q, x), form=forms.VALUES)[0].cpu()
    points = torch.full((3, 256), 0.5 * q.require_grid().step)
    points[:, ::128] *= 15
    expected = torch.round(points.double()) * 2.0**-149
    assert torch.equal(made.double(), expected)
