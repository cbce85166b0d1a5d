"""How kernels in CUDA C++ have their tensors lie: they read and write 16 bytes at a time."""

from __future__ import annotations

import torch


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x contiguous, at a multiple of 16 bytes; a copy where it is not."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x (rows, d), its rows contiguous and at multiples of 16 bytes; a copy where they are not."""
    # A single row is contiguous, wherever a next would begin: `aligned` leaves it as it is.
    apart = x.stride(0) * x.element_size() % 16 == 0
    return x if apart and x.stride(1) == 1 and x.data_ptr() % 16 == 0 else aligned(x)
