"""Where tensors lie that CUDA C++ reads 16 bytes at a time: as they are where it can."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from property_tests import emulated
from quest import compression, ops
from quest.kernels import blocks, compress, few, forms, hopper, layout, masked, product, sparse
from quest.kernels import rows as rows_cu
from quest.quantizer import parse

DTYPES = [torch.float32, torch.bfloat16, torch.int8]


def _made(t: torch.Tensor, from_: torch.Tensor, copied: bool) -> None:
    assert torch.equal(t, from_)
    assert t.data_ptr() % 16 == 0
    assert t.stride(-1) == 1
    assert (t.data_ptr() == from_.data_ptr() and t.stride() == from_.stride()) != copied


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_aligned_and_rows_of(dtype: torch.dtype) -> None:
    chunk = 16 // dtype.itemsize
    wide = torch.arange(12 * 9 * chunk).reshape(12, 9 * chunk).to(dtype)
    assert wide.data_ptr() % 16 == 0
    # Of each: whether the whole, and whether its rows, are to be copied.
    for t, whole, rows in (
        (wide, False, False),
        (wide[:, : 8 * chunk], True, False),
        (wide[:, chunk:], True, False),
        (wide[:, 1 : 1 + 8 * chunk], True, True),  # begins beside a multiple
        (wide[:, ::2], True, True),
        (wide.t(), True, True),
        (wide.flatten()[chunk // 2 :][: 8 * chunk].reshape(1, -1), True, True),
        (wide.as_strided((3, 8 * chunk), (8 * chunk + 1, 1)), True, True),  # rows beside one
        (wide.as_strided((1, 8 * chunk), (8 * chunk + 1, 1)), False, False),  # the only one is not
    ):
        _made(layout.aligned(t), t, whole)
        assert layout.aligned(t).is_contiguous()
        _made(layout.rows_of(t), t, rows)


def test_bulk_copies_have_rows_padded() -> None:
    x = torch.arange(34, dtype=torch.int8).reshape(2, 17)
    made = hopper.aligned(x)
    assert made.shape == (2, 32)
    assert torch.equal(made[:, :17], x)
    assert not made[:, 17:].any()
    assert hopper.aligned(made) is made
    assert hopper.aligned(x[:, :0]).shape == (2, 16)
    _made(hopper.aligned(made.flatten()[8:40].reshape(1, 32)), made.flatten()[8:40][None], True)


def _foreign(t: Tensor) -> Tensor:
    """The same in memory that another library gave, which begins at an odd address."""
    at = np.zeros(t.nbytes + 32, dtype=np.uint8)
    made = torch.from_numpy(at[-at.ctypes.data % 16 + 1 :][: t.nbytes]).view(t.dtype).view(t.shape)
    assert made.storage_offset() == 0
    return made.copy_(t)


def test_memory_that_another_library_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the address that counts, and not where a view begins in its storage."""
    x = _random(5, 256).char()
    given, seen = _foreign(x), list[Tensor]()
    for made in (layout.aligned(given), layout.rows_of(given), forms.readable(given)):
        assert made.data_ptr() % 16 == 0
        assert torch.equal(made, x)

    def launched(words: Tensor, *told: Any, **how: Any) -> None:
        seen.append(words)

    monkeypatch.setattr(compress, "_compress", {(1, 1): launched})
    compress.compress(given)
    assert seen[0].data_ptr() % 4 == 0
    assert torch.equal(seen[0].view(torch.int8).view(5, 256), x)


def _off(t: Tensor) -> Tensor:
    """The same where no kernel reads it: beside a multiple of 16 bytes."""
    held = t.new_empty(t.numel() + 32)
    at = -held.data_ptr() % 16 // t.element_size() + 1
    return held[at : at + t.numel()].view(t.shape).copy_(t)


def _random(*shape: int) -> Tensor:
    return torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(0))


def test_copies_stay_until_the_launch(
    emulator: emulated.Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address keeps nothing: of two copies of which one is let go before, the other is given the
    same memory. That each is there is asked where a kernel would begin; none does.
    """
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    copies: list[weakref.ref[Tensor]] = []
    launches = 0

    def noted(copy: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            made = copy(x)
            copies.extend([weakref.ref(made)] * (made is not x))
            return made

        return call

    def launch(kernel: emulated.Kernel, *told: Any, overlap: bool = False) -> None:
        nonlocal launches
        launches += 1
        assert copies
        assert all(copy() is not None for copy in copies)
        copies.clear()

    for module, name in (
        (layout, "aligned"), (hopper, "aligned"), (blocks, "aligned"), (blocks, "rows_of"),
        (blocks, "readable"), (few, "aligned"), (masked, "aligned"), (product, "aligned"),
        (sparse, "aligned"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, noted(getattr(module, name)))
    monkeypatch.setattr(emulated.Kernel, "launch", launch)
    x, beside, (weight,) = (_off(_random(n, 256).bfloat16()) for n in (5, 5, 1))
    program, form = ops.program(parse("uniform4/hadamard128/ste/dense"), x), forms.INTEGERS
    for by_row in (True, False):
        monkeypatch.setattr(rows_cu, "takes", lambda *_, taken=by_row: taken)
        blocks.quantize(x, program, form=form)
        blocks.normed(x, None, _off(weight), 1e-5, program, form=form)
    blocks.normed(x, beside, _off(weight), 1e-5, program, form=form)
    blocks.gated(x, beside, program, form=form)
    masked.transpose(x, _off(torch.zeros(5, 32, dtype=torch.uint8)))
    a, b, half = _off(_random(5, 256).char()), _off(_random(64, 256).char()), torch.float16
    cos, sin, residual = (_off(torch.ones(5, n)) for n in (32, 32, 64))
    product.product(a, b, half, epilogue=hopper.PLAIN, residual=_off(residual.half()))
    product.product(a, b, half, epilogue=hopper.PLAIN, rotary=product.Turned(cos, sin, 64))
    b.view(64, -1, 4)[..., 1::2] = 0
    values, metadata = map(_off, compression.compress(b))
    sparse.product(values, metadata, a, torch.int32, epilogue=hopper.RAW)
    scale, sums = torch.ones(64), torch.ones(5, dtype=torch.int32)
    few.product(
        _off(_random(5, 512).char()), b.view(torch.uint8), 4, half, factor=1.0, length=512,
        a_scale=scale[:5], w_scale=scale, a_sum=sums, w_sum=None,
    )  # fmt: skip
    assert launches == 11
