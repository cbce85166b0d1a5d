"""The quantizer for Hadamard blocks of 128, a row a thread block: CUDA C++, from rows.cu.

The same function as that of blocks.cu, which gives 32 blocks of 128 to a warp: the fewest
instructions, where inputs are very large. Of others a warp's time is the kernel's. `blocks.launch`
chooses, by `takes`. Of prologues it has the norm without a residual, for inference.

Squares are added in another order than in blocks.cu, so a scale, or an entry of a row that a norm
makes, may differ in its last bit.
It may start before the kernel before it has ended, see `cuda.Kernel.launch`, and so may the kernel
after it.
Source: QuEST (arXiv 2502.05003), Algorithm 1; RMSNorm, arXiv 1910.07467.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import torch

from . import cuda
from .forms import INPUTS, ORDER, RESERVED, VALUES
from .quantize import STE, Program

GROUP = 8  # blocks of a warp
WARPS = 16
# Entries of an input up to which this takes less time than blocks.cu, a row of fewer than a warp's
# counted as so many: 4096 x 4096 at 4 bits, with a mask, 14.9 us for 15.8, 16384 x 2048 27.3 for
# 26.3; without a mask 512 x 2048 2.4 for 3.6, 4096 x 2048 8.5 for 9.6, 4096 x 5632 about the same
# (the H200's quantizer.txt, parts 12 and 13).
MOST = 2**24
# Rows of so many entries at most are this kernel's however many they are where memory is what
# counts: of float32 or as values, 16384 x 2048 36.9 us for 40.1, of float32 16384 x 4096 91 for 99.
NARROW = 4096
# Thread blocks of a multiprocessor up to which a launch leaves each no more than its share, by
# shared memory that it asks for: those that start early would all go where the kernel before ends
# first. More than so many don't fit anyway, as registers go.
SHARES = 16
STATIC = 2048  # bytes of shared memory that a thread block has without asking, at most


def takes(rows: int, d: int, dtype: torch.dtype, form: int) -> bool:
    """Whether so many rows of d entries are this kernel's; see MOST and NARROW."""
    least = GROUP * ORDER
    moves = dtype == torch.float32 or form == VALUES
    return rows * max(d, least) <= MOST or (moves and least <= d <= NARROW)


class Shape(NamedTuple):
    """Of a thread block: its warps, and whether a row has more than they hold at a time."""

    warps: int
    long: bool


@functools.cache
def shape(width: int) -> Shape:
    """For rows of so many entries."""
    warps = -(-width // (GROUP * ORDER))
    return Shape(min(WARPS, warps), warps > WARPS)


def macros(
    dtype: torch.dtype, levels: int, edge: bool, form: int, bits: int, shape: Shape,
    normed: bool = False, saved: int = 0,
) -> dict[str, int]:  # fmt: skip
    """What rows.cu is compiled with, for an input of `dtype`; normed: with a norm before it."""
    return {
        "IN": INPUTS[dtype], "LEVELS": levels, "EDGE": int(edge), "FORM": form, "BITS": bits,
        "NORMED": int(normed), "SAVED": saved, "WARPS": shape.warps, "LONG": int(shape.long),
    }  # fmt: skip


@functools.cache
def _kernel(
    dtype: torch.dtype, levels: int, edge: bool, form: int, bits: int, shape: Shape, normed: bool,
    saved: int, device: int,
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
    return (cuda.shared(device) + RESERVED) // share - RESERVED - STATIC


@functools.cache
def _ready(room: int, *which: Any) -> cuda.Kernel:
    return dataclasses.replace(_kernel(*which), shared=room)


def launch(
    x: torch.Tensor, program: Program, form: int, bits: int, rows: int, d: int, out: int,
    scale: int, mask: int, sums: int, kept: int = 0, saved: int = 0,
    norm: tuple[torch.Tensor, float] | None = None, shown: int = 0,
) -> None:  # fmt: skip
    """`blocks.launch` of x, rows (at least one) of d contiguous entries at multiples of 16 bytes.

    x: (rows, d), rows apart or not, or contiguous in any shape. norm: the weight of a norm before
    it, (d,) of x's dtype of 16 bits, at a multiple of 16 bytes, and eps: what is quantized are the
    rows (x / sqrt(mean(x^2) + eps)) weight, computed in float32 and rounded once, which `shown`
    gets, or 0.
    It may start before the kernel before it has ended, and waits.
    """
    stride, device = x.stride(0) if x.ndim == 2 else d, x.device.index
    given = () if norm is None else (norm[0].data_ptr(), shown, norm[1])
    edge = bool(mask) and program.estimator != STE
    kernel = _ready(
        _room(rows, device), x.dtype, program.levels, edge, form, bits, shape(d),
        norm is not None, saved, device,
    )  # fmt: skip
    kernel.launch(
        rows,
        x.data_ptr(), scale, out, mask, sums, kept, stride * x.element_size(), d // ORDER,
        program.step, program.threshold, *given,
        overlap=cuda.overlaps(device),
    )  # fmt: skip
