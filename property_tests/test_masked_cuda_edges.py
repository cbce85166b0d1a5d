"""The transform back behind a mask in CUDA C++: every bit of a mask, ends, and ranges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from property_tests.ledger import LEDGER
from property_tests.places import Place
from quest import ops
from quest.conformance import examine, inputs

pytestmark = pytest.mark.whole

HALVES = (torch.bfloat16, torch.float16)


def _mask(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, generator=g).to(torch.uint8)


def _judge(place: Place, grad: Tensor, mask: Tensor, told: str) -> None:
    found = examine.backward(place.lane, grad, mask, 128)
    LEDGER.judge(place.lane, found, f"{told}, {tuple(grad.shape)} {grad.dtype}")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
# A group, and a thread block of eight; one block more, and one less.
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 63, 64, 65, 130])
def test_ends(place: Place, rows: int, dtype: torch.dtype) -> None:
    grad = inputs.draw("gaussian", (rows, 128), torch.float64, rows).to(dtype)
    _judge(place, grad, _mask(rows, 16, seed=rows), "ends")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kept", [True, False])
def test_every_bit(place: Place, kept: bool, dtype: torch.dtype) -> None:
    """Of each element alone: what is kept, or dropped, is what its bit says, and exact."""
    bits = torch.eye(128, dtype=torch.bool)
    weight = 1 << torch.arange(8)
    mask = ((bits if kept else ~bits).view(128, 16, 8) * weight).sum(-1).to(torch.uint8)
    grad = torch.arange(1, 129).repeat(128, 1).to(dtype)  # whole numbers up to 128, all alike
    _judge(place, grad, mask, "one bit")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_ends_of_a_range(place: Place, dtype: torch.dtype) -> None:
    """Sums beyond float32 whose share is not; the smallest numbers; infinities that are dropped."""
    largest, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    grad = torch.empty(6, 256, dtype=dtype)
    grad[0] = largest / 16
    grad[1] = torch.where(torch.arange(256) % 2 == 0, largest, -largest) / 16
    grad[2] = least * torch.finfo(dtype).eps  # subnormal
    grad[3] = least
    grad[4:] = inputs.draw("gaussian", (2, 256), torch.float64, 0).to(dtype)
    mask = torch.full((6, 32), 255, dtype=torch.uint8)
    grad[4, 3], mask[4, 0] = float("inf"), 255 - 8
    grad[5, 140], mask[5, 17] = float("nan"), 255 - 16
    made = place.lane.call("masked_transpose", grad, mask, order=128)["dx"]
    assert made.isfinite().all()
    _judge(place, grad, mask, "ends of a range")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_in_float32(place: Place, dtype: torch.dtype) -> None:
    """As the gradient of a float32 weight is wanted: the same, not yet rounded."""
    grad = inputs.draw("gaussian", (37, 384), torch.float64, 2).to(place.device, dtype)
    mask = _mask(37, 48, seed=2).to(place.device)
    wide = ops.launch_masked_transpose(grad, mask, 128, torch.float32)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.to(dtype), ops.launch_masked_transpose(grad, mask, 128))
    found = examine.judges.transposed(
        grad.float().cpu(), mask.cpu(), wide.cpu(), 128, examine.TENSOR_CORES
    )
    LEDGER.judge(place.lane, [found], "in float32")


@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("rows", [1, 9, 64])
def test_nothing_is_read_beside_the_inputs(place: Place, rows: int, front: bool) -> None:
    grad = inputs.draw("gaussian", (rows, 128), torch.float64, 3).to(HALVES[0])
    mask = _mask(rows, 16, seed=3)
    expected = ops.launch_masked_transpose(grad.to(place.device), mask.to(place.device), 128)
    with place.walled(grad, front) as x, place.walled(mask, front) as m:
        assert torch.equal(ops.launch_masked_transpose(x, m, 128), expected)
