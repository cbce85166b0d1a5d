"""What the quantizers for Hadamard blocks of 128 have in common: blocks.cu and rows.cu."""

from __future__ import annotations

import torch

ORDER = 128
RESERVED = 1024  # bytes of shared memory of a thread block, for the system (the Programming Guide)
# The numbers of codes.cuh.
VALUES, PACKED, CODES, INTEGERS = range(4)
OPERANDS = {"bits": (PACKED, 1), "codes": (CODES, 0), "integers": (INTEGERS, 0)}  # form, bits
INPUTS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # of halves.cuh


def readable(x: torch.Tensor) -> torch.Tensor:
    """x (rows, d) itself where the kernels can read it, rows apart or not; else a copy.

    They ask for 16 bytes at a time, which must lie on a multiple of 16.
    """
    chunk = 16 // x.element_size()
    pitch, rest = divmod(x.stride(0), chunk)
    # Within a tile rows are counted in 32 bits.
    fits = x.stride(1) == 1 and not rest and pitch < 2**26 and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)
