"""The quantizer for few rows, a row a thread block, without a mask: CUDA C++, from rows.cu.

The operand of a layer's input in inference: the same function as `blocks.quantize` for what it
supports, blocks of 128 and uniform grids. There a warp has 32 blocks of 128 at a time, which takes
the fewest instructions where rows are many; of few rows a warp's time is the kernel's.

`normed` makes the rows itself by RMSNorm, as `blocks.normed` does without a residual, which saves
writing them and reading them again.

Squares are added in another order than in blocks.cu, so a scale, or an entry of a row that a norm
makes, may differ in its last bit.
It may start before the kernel before it has ended, see `cuda.Kernel.launch`, and so may the kernel
after it.
Source: QuEST (arXiv 2502.05003), Algorithm 1; RMSNorm, arXiv 1910.07467.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import torch

from . import blocks, cuda, outputs
from .layout import rows_of
from .quantize import STE, Program

GROUP = 8  # blocks of a warp
WARPS = 16
# Thread blocks of a multiprocessor up to which a launch leaves each no more than its share, by shared
# memory that it asks for: those that start early would all go where the kernel before ends first.
# More than so many don't fit anyway, as registers go.
SHARES = 16
STATIC = 2048  # bytes of shared memory that a thread block has without asking, at most


class Shape(NamedTuple):
    """Of a thread block: its warps, and whether a row has more than they hold at a time."""

    warps: int
    long: bool


@functools.cache
def shape(width: int) -> Shape:
    """For rows of so many entries."""
    warps = -(-width // (GROUP * blocks.ORDER))
    return Shape(min(WARPS, warps), warps > WARPS)


def macros(
    dtype: torch.dtype, levels: int, edge: bool, form: int, bits: int, shape: Shape,
    normed: bool = False, saved: int = 0,
) -> dict[str, int]:  # fmt: skip
    """What rows.cu is compiled with, for an input of `dtype`; normed: with a norm before it."""
    return {
        "IN": blocks.INPUTS[dtype], "LEVELS": levels, "EDGE": int(edge), "FORM": form,
        "BITS": bits, "NORMED": int(normed), "SAVED": saved, "WARPS": shape.warps,
        "LONG": int(shape.long),
    }  # fmt: skip


@functools.cache
def _kernel(
    dtype: torch.dtype, levels: int, edge: bool, form: int, bits: int, shape: Shape, device: int,
    normed: bool = False, saved: int = 0,
) -> cuda.Kernel:  # fmt: skip
    made = macros(dtype, levels, edge, form, bits, shape, normed, saved)
    code = cuda.compile_("rows.cu", cuda.architecture(device), made)
    return cuda.load(
        code, "rows", device, threads=32 * shape.warps, shared=cuda.shared(device) - STATIC,
        layout="6Pqi2f" + ("2Pf" if normed else ""),
    )  # fmt: skip


@functools.cache
def _room(rows: int, device: int) -> int:
    """Bytes of shared memory that a row's thread block asks for; see SHARES."""
    share = -(-rows // cuda.processors(device))
    if not 1 < share <= SHARES:
        return 0
    return (cuda.shared(device) + blocks.RESERVED) // share - blocks.RESERVED - STATIC


@functools.cache
def _ready(room: int, *kind: Any) -> cuda.Kernel:
    return dataclasses.replace(_kernel(*kind), shared=room)


def quantize(
    x: torch.Tensor, program: Program, kind: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(operand, scale, sums) of x (..., d), d a multiple of 128; see `blocks.supports`.

    kind: "bits", operand (..., d / 8) uint8 of a grid of two levels; "codes" or "integers", one of
    (..., d) int8, and sums (..., 1) int32, as in `blocks.quantize`. scale: (..., 1) float32.
    """
    lead, d = x.shape[:-1], x.shape[-1]
    made = _outputs(x, kind)
    if rows := math.prod(lead):
        x = rows_of(x if x.ndim == 2 else x.reshape(rows, d))
        operand, scale, sums = (t.data_ptr() for t in made)
        launch(x, program, kind, rows, d, operand, scale, sums)
    return made


def normed(
    x: torch.Tensor, weight: torch.Tensor, eps: float, program: Program, kind: str, *,
    show: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """`quantize` of rows = (x / sqrt(mean(x^2) + eps)) weight, and these if they are to be shown.

    x: (rows, d) bfloat16 or float16, rows apart or not; weight: (d,) of that dtype. The rows are
    computed in float32 and rounded once, as in `blocks.normed`.
    """
    made = _outputs(x, kind)
    shown = outputs.empty(x.shape, x.dtype, x.device) if show else None
    if len(x):
        norm = blocks.readable(weight[None])[0], eps
        x, (rows, d) = blocks.readable(x), x.shape
        at = [t.data_ptr() for t in made]
        launch(x, program, kind, rows, d, at[0], at[1], at[2], norm, cuda.pointer(shown))
    return *made, shown


def _outputs(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory for operand, scale and sums."""
    lead, d, device = x.shape[:-1], x.shape[-1], x.device
    width, dtype = (d // 8, torch.uint8) if kind == "bits" else (d, torch.int8)
    return (
        outputs.empty((*lead, width), dtype, device),
        outputs.empty((*lead, 1), torch.float32, device),
        outputs.empty((*lead, 1), torch.int32, device),
    )


def launch(
    x: torch.Tensor, program: Program, kind: str, rows: int, d: int, operand: int, scale: int,
    sums: int, norm: tuple[torch.Tensor, float] | None = None, shown: int = 0,
) -> None:  # fmt: skip
    form, bits = blocks.OPERANDS[kind]
    launch_all(x, program, form, bits, rows, d, operand, scale, 0, sums, 0, 0, norm, shown)


def launch_all(
    x: torch.Tensor, program: Program, form: int, bits: int, rows: int, d: int, out: int,
    scale: int, mask: int, sums: int, kept: int = 0, saved: int = 0,
    norm: tuple[torch.Tensor, float] | None = None, shown: int = 0,
) -> None:  # fmt: skip
    """`quantize` of x, rows of d contiguous entries at multiples of 16 bytes, to addresses.

    x: (rows, d), or contiguous in any shape. norm: of `normed`, its weight, which lies at a
    multiple of 16 bytes, and eps; shown: or 0.
    It may start before the kernel before it has ended, and waits.
    """
    stride, device = x.stride(0) if x.ndim == 2 else d, x.device.index
    given = () if norm is None else (norm[0].data_ptr(), shown, norm[1])
    edge = bool(mask) and program.estimator != STE
    kernel = _ready(
        _room(rows, device), x.dtype, program.levels, edge, form, bits, shape(d), device,
        norm is not None, saved,
    )  # fmt: skip
    kernel.launch(
        rows,
        x.data_ptr(), scale, out, mask, sums, kept, stride * x.element_size(), d // blocks.ORDER,
        program.step, program.threshold, *given,
        overlap=cuda.overlaps(device),
    )  # fmt: skip
