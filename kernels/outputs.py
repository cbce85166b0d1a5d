"""The one place where kernels get memory for their outputs.

A kernel must write every byte of its outputs. To let a test see a byte that was never written, all
launchers allocate here, and `poisoned` fills what they get with a chosen byte first: two runs with
two different bytes agree only where everything was written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

_poison: int | None = None


def poisons() -> bool:
    """Whether outputs are filled first."""
    return _poison is not None


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised contiguous tensor; filled with the poison byte inside `poisoned`."""
    out = torch.empty(tuple(shape), dtype=dtype, device=device)
    if _poison is not None:
        out.view(torch.uint8).fill_(_poison)
    return out


@contextmanager
def poisoned(byte: int) -> Iterator[None]:
    """Fill all outputs that launchers allocate inside the block with `byte` (0 to 255).

    0xFF makes every float dtype NaN and every integer -1 or its maximum.
    """
    global _poison
    if not 0 <= byte <= 255:
        raise ValueError(f"byte must be in 0..255, got {byte}")
    before, _poison = _poison, byte
    try:
        yield
    finally:
        _poison = before
