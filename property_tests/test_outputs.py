"""Where launchers allocate: poison inside the block, nothing but memory outside of it."""

from __future__ import annotations

import pytest
import torch

from quest.kernels import outputs

CPU = torch.device("cpu")


def filled(*shape: int, dtype: torch.dtype = torch.float32) -> set[int]:
    """The bytes of a new output."""
    out = outputs.empty(shape, dtype, CPU)
    assert (out.shape, out.dtype, out.device) == (shape, dtype, CPU)
    return set(out.view(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("byte", [0, 0x55, 0xFF])
def test_every_byte_is_poisoned(byte: int) -> None:
    with outputs.poisoned(byte):
        for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.int32):
            assert filled(3, 5, dtype=dtype) == {byte}


def test_outputs_without_elements() -> None:
    with outputs.poisoned(1):
        for shape in ((0, 3), (3, 0), (2, 0, 3), (0,)):
            assert filled(*shape) == set()


def test_the_block_around_is_back_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with outputs.poisoned(1):
        with outputs.poisoned(2):
            assert filled(4) == {2}
        assert filled(4) == {1}
        with pytest.raises(KeyError), outputs.poisoned(2):
            raise KeyError
        assert filled(4) == {1}
    # Outside of all blocks memory is left as it comes.
    monkeypatch.setattr(torch, "empty", lambda *_, **how: torch.full((4,), 7, dtype=torch.uint8))
    assert filled(4, dtype=torch.uint8) == {7}


@pytest.mark.parametrize("byte", [-1, 256])
def test_what_is_no_byte(byte: int) -> None:
    with pytest.raises(ValueError, match=f"byte must be in 0..255, got {byte}"):
        outputs.poisoned(byte).__enter__()
