"""Corners of the kernels in CUDA C++ that planted faults outlived: each test has killed one."""

from __future__ import annotations

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
from quest.kernels import blocks, forms, hopper, product, rows, sparse
from quest.quantizer import parse

pytestmark = pytest.mark.whole

FOUR = "uniform4/hadamard128/ste/dense"


def _ones(place: Place, *counts: int) -> list[Tensor]:
    return [torch.ones(n, device=place.device) for n in counts]


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


@pytest.mark.parametrize("cluster", [4, 8])
def test_blocks_without_a_step_read_nothing_of_a(cluster: int, place: Place) -> None:
    """A ends where memory does, and the last blocks of a cluster begin behind its rows."""
    for bits in (1, 4):
        with _split((1,), (cluster,)):
            _exact(place, bits, (5, 40, _width(bits, cluster + 1)), edged=True)


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
