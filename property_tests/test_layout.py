"""Where tensors lie that CUDA C++ reads 16 bytes at a time: as they are where it can."""

from __future__ import annotations

import pytest
import torch

from quest.kernels import hopper, layout

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
