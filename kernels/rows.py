"""The quantizer for few rows, a row a thread block, without a mask: CUDA C++, from rows.cu.

The operand of a layer's input in inference: the same function as `blocks.quantize` for what it
supports, blocks of 128 and uniform grids. There a block of 128 is a thread's, which takes the
fewest instructions where rows are many; of few rows a thread's time is the kernel's. Squares are
added in another order, so a scale may differ in its last bit from that of `blocks.quantize`.
The kernel after it may start early, see `cuda.Kernel.launch`.
Source: QuEST (arXiv 2502.05003), Algorithm 1.
"""

from __future__ import annotations

import functools
import math

import torch

from . import blocks, cuda, outputs
from .layout import rows_of
from .quantize import Program

GROUP = 8  # blocks of a warp
WARPS = 16
SHARED_OF_WARP = GROUP * blocks.ORDER * 4


def _warps(width: int) -> int:
    return min(WARPS, -(-width // (GROUP * blocks.ORDER)))


def macros(dtype: torch.dtype, levels: int, kind: str) -> dict[str, int]:
    """What rows.cu is compiled with, for an input of `dtype`."""
    return {"IN": blocks.INPUTS[dtype], "LEVELS": levels, "FORM": blocks.OPERANDS[kind][0]}


@functools.cache
def _kernel(dtype: torch.dtype, levels: int, kind: str, warps: int, device: int) -> cuda.Kernel:
    made = macros(dtype, levels, kind)
    code = cuda.compile_("rows.cu", cuda.architecture(device), made)
    return cuda.load(
        code, "rows", device, threads=32 * warps, shared=warps * SHARED_OF_WARP, layout="4Pqif"
    )


def quantize(
    x: torch.Tensor, program: Program, kind: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(operand, scale, sums) of x (..., d), d a multiple of 128; see `blocks.supports`.

    kind: "bits", operand (..., d / 8) uint8 of a grid of two levels; "codes" or "integers", one of
    (..., d) int8, and sums (..., 1) int32, as in `blocks.quantize`. scale: (..., 1) float32.
    """
    lead, d, device = x.shape[:-1], x.shape[-1], x.device
    rows = math.prod(lead)
    width, dtype = (d // 8, torch.uint8) if kind == "bits" else (d, torch.int8)
    operand = outputs.empty((*lead, width), dtype, device)
    scale = outputs.empty((*lead, 1), torch.float32, device)
    sums = outputs.empty((*lead, 1), torch.int32, device)
    if rows:
        x = rows_of(x if x.ndim == 2 else x.reshape(rows, d))
        launch(x, program, kind, rows, d, operand.data_ptr(), scale.data_ptr(), sums.data_ptr())
    return operand, scale, sums


def launch(
    x: torch.Tensor, program: Program, kind: str, rows: int, d: int, operand: int, scale: int,
    sums: int,
) -> None:  # fmt: skip
    """`quantize` of x, rows of d contiguous entries at multiples of 16 bytes, to addresses.

    x: (rows, d), or contiguous in any shape.
    """
    stride = x.stride(0) if x.ndim == 2 else d
    _kernel(x.dtype, program.levels, kind, _warps(d), x.device.index).launch(
        rows,
        x.data_ptr(), scale, operand, sums, stride * x.element_size(), d // blocks.ORDER,
        program.step,
    )  # fmt: skip
