"""From an operand of an integer product back to values: integer * unit * sigma.

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


@triton.jit
def _decode(
    code_ptr, scale_ptr, y_ptr, rows, width, code_width, unit,
    BITS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (r < rows) & (c < width)
    if BITS:
        byte = tl.load(code_ptr + r * code_width + c // 8, mask=inside, other=0).to(tl.int32)
        integer = ((byte >> (c % 8)) & 1) * 2 - 1
    else:
        integer = tl.load(code_ptr + r * code_width + c, mask=inside, other=0).to(tl.int32)
        if HALF:
            integer = 2 * integer + 1
    scale = tl.load(scale_ptr + r, mask=r < rows, other=0.0)
    y = integer.to(tl.float32) * unit * scale
    tl.store(y_ptr + r * width + c, y.to(y_ptr.dtype.element_ty), mask=inside)


def decode(
    operand: torch.Tensor, scale: torch.Tensor, width: int, kind: str, unit: float,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """operand (..., bytes) as `encode` makes it, scale (..., 1) float32: values (..., width)."""
    lead = operand.shape[:-1]
    rows = math.prod(lead)
    y = outputs.empty((*lead, width), stored(dtype), operand.device)
    if y.numel():
        w = min(1024, triton.next_power_of_2(width))
        r = min(max(1, 2048 // w), triton.next_power_of_2(rows))
        _decode[(triton.cdiv(rows, r), triton.cdiv(width, w))](
            operand.contiguous(), scale.contiguous(), y, rows, width, operand.shape[-1], unit,
            kind == "bits", kind == "codes", r, w, num_warps=4,
        )  # fmt: skip
    return y.to(dtype)
