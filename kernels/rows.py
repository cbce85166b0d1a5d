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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from . import cuda
from .forms import INPUTS, ORDER, RESERVED
from .quantize import STE, Program

GROUP = 8  # blocks of a warp
WARPS = 16
RESIDENT = 32  # warps of a multiprocessor that have registers, of 16 bits; as in rows.cu
# Entries of an input up to which this takes less time than blocks.cu, a row of fewer than a warp's
# counted as so many: 4096 x 4096 at 4 bits, with a mask, 14.3 us for 15.7, 16384 x 2048 27.5 for
# 26.7, with 1 bit 24.9 for 23.9; without a mask 512 x 2048 2.4 for 3.6, 4096 x 2048 8.5 for 9.6,
# 4096 x 5632 about the same (the H200's quantizer.txt, parts 12 to 14).
MOST = 2**24
# Of float32, whose bytes are what counts, any number of rows of up to so many entries: 16384 x 2048
# with a mask 40.1 us for 42.7, 16384 x 4096 91 for 99.
NARROW = 4096
# Thread blocks of a multiprocessor up to which a launch leaves each no more than its share, by
# shared memory that it asks for: those that start early would all go where the kernel before ends
# first. More than so many don't fit anyway, as registers go.
SHARES = 16
GRANULE = 128  # bytes in which shared memory is given out


_forced: bool | None = None


@contextmanager
def only(taken: bool) -> Iterator[None]:
    """All rows that both kernels can quantize are this one's inside the block, or none."""
    global _forced
    before, _forced = _forced, taken
    try:
        yield
    finally:
        _forced = before


def takes(rows: int, d: int, dtype: torch.dtype) -> bool:
    """Whether so many rows of d entries are this kernel's; see MOST and NARROW.

    Whatever is made of them: codes and values of the same rows are to have the same scale.
    """
    if _forced is not None:
        return _forced
    least = GROUP * ORDER
    if dtype == torch.float32 and least <= d <= NARROW:
        return True
    return rows * max(d, least) <= MOST


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
    normed: bool, saved: int,
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
        code, "rows", device, threads=32 * shape.warps,
        shared=cuda.shared(device) - _static(WARPS),
        layout="6Pq2i2f" + ("2Pf" if normed else ""),
    )  # fmt: skip


def _static(warps: int) -> int:
    """Bytes of shared memory that a thread block has without asking, or a few more."""
    # Three sums of eight blocks a warp, and two numbers.
    return -(-104 * warps // GRANULE) * GRANULE


def _room(rows: int, warps: int, device: int) -> int:
    """Bytes of shared memory that a row's thread block asks for; see SHARES."""
    share = -(-rows // cuda.processors(device))
    if not 1 < share <= SHARES:
        return 0
    room = (cuda.shared(device) + RESERVED) // share - RESERVED - _static(warps)
    return room // GRANULE * GRANULE


def _ahead(rows: int, dtype: torch.dtype, how: Shape, device: int) -> int:
    """How much further on a row lies that a thread block asks for, into the L2 cache; 0: none.

    Half as many as run at a time. While these compute memory would have nothing to do: of 13.9 us
    for 4096 x 4096 with 1 bit that took 0.6, of 12.5 without a mask 0.7; of 4096 x 2048, with a
    norm or without, nothing. An eighth or a quarter as many mostly give less, and of float32, whose
    bytes are what counts, it cost (the H200's quantizer.txt, parts 14 and 15).
    """
    at_once = cuda.processors(device) * (RESIDENT // how.warps)
    if dtype == torch.float32 or how.long or rows <= at_once:
        return 0
    return at_once // 2


@functools.cache
def _ready(room: int, *which: Any) -> cuda.Kernel:
    return dataclasses.replace(_kernel(*which), shared=room)


def launch(
    x: torch.Tensor, program: Program, form: int, bits: int, rows: int, d: int, out: int,
    scale: int, mask: int, sums: int, kept: int, saved: int,
    norm: tuple[torch.Tensor, float] | None, shown: int,
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
    edge, how, overlap = bool(mask) and program.estimator != STE, shape(d), cuda.overlaps(device)
    kernel = _ready(
        _room(rows, how.warps, device) if overlap else 0, x.dtype, program.levels, edge, form,
        bits, how, norm is not None, saved, device,
    )  # fmt: skip
    kernel.launch(
        rows,
        x.data_ptr(), scale, out, mask, sums, kept, stride * x.element_size(), d // ORDER,
        _ahead(rows, x.dtype, how, device), program.step, program.threshold, *given,
        overlap=overlap,
    )  # fmt: skip
