"""The transpose of the transform behind a mask, for blocks of 128 and 16 bits: CUDA C++, masked.cu.

The same function as `hadamard` with a mask, for the case that layers are made of. Four of seven
stages are products on the tensor cores, which Triton's layouts can't express; `hadamard` does the
rest, and is as fast as a copy where there is no mask.
Source: QuEST (arXiv 2502.05003), section 3.2 (trust estimation).
"""

from __future__ import annotations

import functools

import torch

from . import cuda, outputs
from .layout import aligned

ORDER = 128
GROUP = 8  # Hadamard blocks of a thread block, which is a warp
TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def supports(x: torch.Tensor, order: int, dtype: torch.dtype | None) -> bool:
    """Whether the kernel does this: x (..., d), y of `dtype`, None for x's."""
    return (
        order == ORDER
        and x.dtype in (torch.bfloat16, torch.float16)
        and (dtype is None or dtype in (x.dtype, torch.float32))
        and cuda.unavailable(x.device) is None
    )


def macros(dtype: torch.dtype, out: torch.dtype) -> dict[str, int]:
    """What masked.cu is compiled with, for x and y of these dtypes."""
    return {"IN": TYPES[dtype], "OUT": TYPES[out]}


@functools.cache
def _kernel(dtype: torch.dtype, out: torch.dtype, device: int) -> cuda.Kernel:
    code = cuda.compile_("masked.cu", cuda.architecture(device), macros(dtype, out))
    return cuda.load(code, "masked", device, threads=32, shared=0, layout="3Pq")


def transpose(
    x: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """y (..., d) = (x masked) H^T of x (..., d), d a multiple of 128; see `supports`.

    mask: (..., d / 8) uint8, little-endian bits; inputs whose bit is 0 count as 0.
    """
    dtype = dtype or x.dtype
    y = outputs.empty(x.shape, dtype, x.device)
    if x.numel():
        x, mask = aligned(x), aligned(mask)
        total = x.numel() // ORDER
        count = -(-total // GROUP)
        _kernel(x.dtype, dtype, x.device.index).launch(
            count, x.data_ptr(), mask.data_ptr(), y.data_ptr(), total
        )
    return y
