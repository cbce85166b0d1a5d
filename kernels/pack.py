"""An int8 operand in 2 or 4 bits an entry, for the time until the backward reads it.

index = (integer + top) / stride, counted from 0, little-endian within a byte, each row padded with
zero bits: the bytes of `quantize`'s packed codes. top is the grid's largest integer; stride, a
power of two, is what lies between two neighbours (`operands.Form`).
Reads a byte an entry once, and writes a half or a quarter of one. `decode` reads what it writes.
Where `blocks` quantizes, it packs as well; this is for what it does not.
Source: method, sections 2 and 5.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import outputs
from .whole import quotient, tile

TILE = 2048, 2048  # the widest, and entries in all: 16 a thread


@triton.jit
def _pack(
    operand_ptr, packed_ptr, rows, width, bytes_,
    PER: tl.constexpr, SHIFT: tl.constexpr, TOP: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    # Beyond the row an index of 0, which is -TOP.
    integer = tl.load(operand_ptr + r * width + c, mask=(r < rows) & (c < width), other=-TOP)
    index = (integer.to(tl.int32) + TOP) >> SHIFT  # (ROWS, WIDTH)
    shift = tl.arange(0, PER)[None, None, :] * (8 // PER)
    byte = tl.sum(tl.reshape(index, (ROWS, WIDTH // PER, PER)) << shift, axis=2)
    b = tl.program_id(1) * (WIDTH // PER) + tl.arange(0, WIDTH // PER)[None, :]
    tl.store(packed_ptr + r * bytes_ + b, byte.to(tl.uint8), mask=(r < rows) & (b < bytes_))


def pack(operand: torch.Tensor, bits: int, stride: int, top: int) -> torch.Tensor:
    """operand (..., width) int8: (..., ceil(width bits / 8)) uint8.

    bits is 2 or 4, stride a power of two.
    """
    lead, width = operand.shape[:-1], operand.shape[-1]
    rows, bytes_ = math.prod(lead), -(-width * bits // 8)
    packed = outputs.empty((*lead, bytes_), torch.uint8, operand.device)
    if packed.numel():
        r, w = tile(rows, width, *TILE, least=8 // bits)
        _pack[(quotient(rows, r), quotient(width, w))](
            operand.contiguous(), packed, rows, width, bytes_,
            8 // bits, stride.bit_length() - 1, top, r, w, num_warps=4,
        )  # fmt: skip
    return packed
