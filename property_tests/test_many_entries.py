"""A transform of more entries than an int counts: its rows are as they are alone. 9 to 22 GiB."""

from __future__ import annotations

import pytest
import torch

from property_tests.room import Room, only_one  # noqa: F401 - the fixture `room`
from quest import ops, transforms
from quest.kernels import hadamard, outputs

pytestmark = [
    pytest.mark.whole,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("order", [8, 128, 1792, 28672])
def test_the_last_row_of_a_transform(order: int, masked: bool, room: Room) -> None:
    room((9 if order < 1792 else 22) * 2**30)  # with a base, what is masked, and a float32 part
    rows = 2**31 // order + 3
    x = torch.zeros(rows, order, dtype=torch.bfloat16, device="cuda")
    some = torch.tensor([0, rows // 2, rows - 1], device="cuda")
    x[some] = torch.randn(3, order, device="cuda").bfloat16()
    mask = None
    if masked:
        mask = torch.zeros(rows, order // 8, dtype=torch.uint8, device="cuda")
        mask[some] = torch.randint(1, 256, (3, order // 8), dtype=torch.uint8, device="cuda")
    base = transforms.base(transforms.split(order)[0], x.device)
    with outputs.poisoned(0xFF):
        y = hadamard.hadamard(x, order, base, True, mask)
        few = ops.launch_hadamard(x[some], order, True) if mask is None else (
            ops.launch_masked_transpose(x[some], mask[some], order)
        )  # fmt: skip
    assert torch.equal(y[some].view(torch.int16), few.view(torch.int16))
    y[some] = 0.0
    assert not bool(y.view(torch.int16).any())
