"""Triton's kernels on more entries than an int counts: rows are as they are alone. 4 to 22 GiB."""

from __future__ import annotations

import pytest
import torch

from property_tests.room import Room, only_one  # noqa: F401 - the fixture `room`
from quest import ops, transforms
from quest.kernels import compress, decode, hadamard, outputs, pack
from quest.quantizer import parse

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


def _some(rows: int) -> torch.Tensor:
    """The first, one in the middle and the last."""
    return torch.tensor([0, rows // 2, rows - 1], device="cuda")


def _integers(rows: int, width: int, some: torch.Tensor) -> torch.Tensor:
    """int8: odd ones to 15 in some rows, and -15 elsewhere, which packs as 0."""
    made = torch.full((rows, width), -15, dtype=torch.int8, device="cuda")
    made[some] = (2 * torch.randint(16, (len(some), width), device="cuda") - 15).to(torch.int8)
    return made


def test_the_last_row_that_is_packed(room: Room) -> None:
    room(4 * 2**30)
    rows = 2**31 // 4096 + 3
    some = _some(rows)
    with outputs.poisoned(0xFF):
        operand = _integers(rows, 4096, some)
        packed = pack.pack(operand, 4, 2, 15)
        few = pack.pack(operand[some], 4, 2, 15)
    assert torch.equal(packed[some], few)
    packed[some] = 0
    assert not bool(packed.any())


@pytest.mark.parametrize("bits", [4, 8])
def test_the_last_row_that_is_decoded(bits: int, room: Room) -> None:
    room(8 * 2**30)
    rows = 2**31 // 4096 + 3
    some = _some(rows)
    how = {"unit": 1.0, "dtype": torch.bfloat16, "bits": bits}
    how |= {"stride": 2, "top": 15} if bits == 4 else {"stride": 1, "top": 0}
    with outputs.poisoned(0xFF):
        operand = _integers(rows, 4096, some)
        if bits == 4:
            operand = pack.pack(operand, 4, 2, 15)
        scale = torch.zeros(rows, 1, device="cuda")
        scale[some] = torch.rand(3, 1, device="cuda")
        y = decode.decode(operand, scale, 4096, **how)
        few = decode.decode(operand[some], scale[some], 4096, **how)
    assert torch.equal(y[some], few)
    y[some] = 0.0
    assert not bool(y.any())


def test_the_last_row_that_is_compressed(room: Room) -> None:
    """Of which the kernel counts words of four entries."""
    room(15 * 2**30)
    rows = 2**33 // 1024 + 3
    some = _some(rows)
    with outputs.poisoned(0xFF):
        operand = torch.zeros(rows, 1024, dtype=torch.int8, device="cuda")
        operand[some, 1::4] = torch.randint(1, 127, (3, 256), device="cuda").to(torch.int8)
        operand[some, 2::4] = torch.randint(1, 127, (3, 256), device="cuda").to(torch.int8)
        values, metadata, crowded = compress.compress(operand)
        few = compress.compress(operand[some])
    assert torch.equal(values[some], few[0])
    assert torch.equal(metadata[some], few[1])
    assert not bool(crowded.any())
    assert torch.equal(metadata, metadata[1:2].expand_as(metadata).index_copy(0, some, few[1]))
    values[some] = 0
    assert not bool(values.any())


def test_the_last_row_that_is_quantized(room: Room) -> None:
    room(14 * 2**30)
    rows = 2**31 // 4096 + 3
    some = _some(rows)
    q = parse("e2m1/hadamard128/trust1.0/dense")
    with outputs.poisoned(0xFF):
        x = torch.zeros(rows, 4096, dtype=torch.bfloat16, device="cuda")
        x[some] = torch.randn(3, 4096, device="cuda").bfloat16()
        made = ops.launch_quantize(x, q, values=True, codes=True, packed=True)
        few = ops.launch_quantize(x[some], q, values=True, codes=True, packed=True)
        zero = ops.launch_quantize(x[1:2], q, values=True, codes=True, packed=True)
    for whole, part, other in zip(made[:4], few[:4], zero[:4], strict=True):
        assert torch.equal(whole[some], part)
        whole[some] = other
        assert bool((whole == other).all())
