"""From an operand of an integer product back to values: (stride stored - top) * unit * sigma.

An entry is stored in 8 bits, or in 1, 2 or 4 bits of a byte, little-endian; see `operands.Form`.
Reads the codes and scales once and writes the values once. The backward multiplies with these: what
the forward saves is 1 to 8 bits an element. Source: method, section 5.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import outputs
from .hadamard import stored
from .whole import quotient, tile

TILE = 1024, 2048  # the widest, and entries in all: 16 a thread


@triton.jit
def _decode(
    code_ptr, scale_ptr, y_ptr, rows, width, code_width, unit,
    PER: tl.constexpr, STRIDE: tl.constexpr, TOP: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    # Each byte is read once, and its entries lie side by side in one thread.
    b = tl.program_id(1) * (WIDTH // PER) + tl.arange(0, WIDTH // PER)[None, :]
    byte = tl.load(code_ptr + r * code_width + b, mask=(r < rows) & (b < code_width), other=0)
    stored = byte.to(tl.int32)
    if PER > 1:
        shift = tl.arange(0, PER)[None, None, :] * (8 // PER)
        every = (stored[:, :, None] >> shift) & ((1 << (8 // PER)) - 1)
        stored = tl.reshape(every, (ROWS, WIDTH))
    integer = STRIDE * stored - TOP
    scale = tl.load(scale_ptr + r, mask=r < rows, other=0.0)
    y = integer.to(tl.float32) * unit * scale
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(y_ptr + r * width + c, y.to(y_ptr.dtype.element_ty), mask=(r < rows) & (c < width))


def decode(
    operand: torch.Tensor, scale: torch.Tensor, width: int, unit: float, dtype: torch.dtype,
    *, bits: int, stride: int, top: int,
) -> torch.Tensor:  # fmt: skip
    """The values (..., width) of an operand and its scale (..., 1) float32, as `dtype`.

    operand: (..., width) int8 for 8 bits, else (..., ceil(width bits / 8)) uint8. With a unit and
    scales of 1, int8 holds the integers.
    """
    lead = operand.shape[:-1]
    rows = math.prod(lead)
    y = outputs.empty((*lead, width), stored(dtype), operand.device)
    if y.numel():
        r, w = tile(rows, width, *TILE, least=8 // bits)
        _decode[(quotient(rows, r), quotient(width, w))](
            operand.contiguous(), scale.contiguous(), y, rows, width, operand.shape[-1], unit,
            8 // bits, stride, top, r, w, num_warps=4,
        )  # fmt: skip
    return y.to(dtype)
