"""The quantizer for Hadamard blocks of 128, a block a thread: CUDA C++, from blocks.cu.

The same function as `quantize`, for the case that layers are made of: blocks of 128, uniform grids,
no sparsity, masks by a threshold. A block in one thread's registers makes the transform 896
additions and nothing else, which Triton's layouts can't express. Everything else runs in
`quantize`.
Source: QuEST (arXiv 2502.05003), Algorithm 1.
"""

from __future__ import annotations

import functools
import math

import torch

from . import cuda, outputs
from .quantize import DISTANCE, STE, Program

ORDER = 128
TILE = 32  # blocks that a warp holds
# Warps whose threads hold a row, at most; and that a multiprocessor's registers hold.
WARP_LIMIT = RESIDENT = 12
REGISTERS = 168
SHARED_OF_WARP = 2 * TILE * 2 * ORDER  # two buffers of 16-bit blocks, or one of float32
STATIC = 4096  # more than what blocks.cu declares besides
# The numbers of blocks.cu.
VALUES, PACKED, CODES, INTEGERS = range(4)
OPERANDS = {"bits": (PACKED, 1), "codes": (CODES, 0), "integers": (INTEGERS, 0)}  # form, bits
INPUTS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def supports(program: Program, x: torch.Tensor) -> bool:
    """Whether the kernel does this; `quantize` does the rest."""
    return (
        program.order == ORDER
        and program.base is None
        and program.points is None
        and program.group is None
        and program.estimator != DISTANCE
        and x.dtype in INPUTS
        and 0 < x.shape[-1] <= WARP_LIMIT * TILE * ORDER
        # y / (sigma step), at most sqrt(d) / step, is rounded beside 1.5 * 2^23.
        and math.sqrt(x.shape[-1]) < 2**22 * program.step
        and cuda.unavailable(x.device) is None
        and _shared(x.shape[-1] // ORDER) + STATIC <= cuda.shared(x.device.index)
    )


def _shared(blocks: int) -> int:
    """Bytes of a thread block's buffers, for rows of so many blocks."""
    warps, _, teams, _ = _shape(blocks)
    return warps * teams * SHARED_OF_WARP


def _shape(blocks: int) -> tuple[int, int, int, int]:
    """(warps of a team, blocks of a row that share a warp or TILE, teams of a thread block, thread
    blocks of a multiprocessor) for rows of so many blocks.
    """
    if blocks < TILE and blocks & (blocks - 1) == 0:
        return 1, blocks, 4, RESIDENT // 4
    warps = -(-blocks // TILE)
    teams = max(1, 4 // warps)
    return warps, TILE, teams, RESIDENT // (warps * teams)


def macros(dtype: torch.dtype, levels: int, edge: bool, form: int, bits: int) -> dict[str, int]:
    """What blocks.cu is compiled with, for an input of `dtype`."""
    return {
        "REGISTERS": REGISTERS, "IN": INPUTS[dtype], "LEVELS": levels,
        "EDGE": int(edge), "FORM": form, "BITS": bits,
    }  # fmt: skip


@functools.cache
def _kernel(
    warps: int, dtype: torch.dtype, levels: int, edge: bool, form: int, bits: int, device: int
) -> cuda.Kernel:
    made = macros(dtype, levels, edge, form, bits)
    code = cuda.compile_("blocks.cu", cuda.architecture(device), made)
    return cuda.load(
        code, "quantize", device, threads=32 * warps,
        shared=warps * SHARED_OF_WARP, layout="5P2q4i2f",
    )  # fmt: skip


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x contiguous, at a multiple of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def quantize(
    x: torch.Tensor,
    program: Program,
    *,
    form: int,
    bits: int = 0,
    sums: bool = False,
    masked: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, scale, mask, sums) of x (..., d), d a multiple of 128; see `supports`.

    form: VALUES, out (..., d) of x's dtype; PACKED, out (..., d bits / 8) uint8; CODES or INTEGERS,
    out (..., d) int8, codes or (L even) 2 code + 1. scale: (..., 1) float32. mask: (..., d / 8)
    uint8, or where not `masked` of shape (0,). sums: (..., 1) int32 of 2 code + 1 (L odd: of
    codes), or of shape (0,).
    """
    if sums and (form == VALUES or (form == PACKED and bits > 1)):
        raise ValueError(f"there are no sums of form {form} with {bits} bits")
    lead, d, device = x.shape[:-1], x.shape[-1], x.device
    rows = math.prod(lead)
    x = aligned(x)
    width, dtype = {
        VALUES: (d, x.dtype), PACKED: (d * bits // 8, torch.uint8),
    }.get(form, (d, torch.int8))  # fmt: skip
    out = outputs.empty((*lead, width), dtype, device)
    scale = outputs.empty((*lead, 1), torch.float32, device)
    mask = outputs.empty((*lead, d // 8) if masked else (0,), torch.uint8, device)
    sum_ = outputs.empty((*lead, 1) if sums else (0,), torch.int32, device)
    if rows:
        launch(
            x, program, form, bits, rows, d, out.data_ptr(), scale.data_ptr(),
            mask.data_ptr() if masked else 0, sum_.data_ptr() if sums else 0,
        )  # fmt: skip
    return out, scale, mask, sum_


def launch(
    x: torch.Tensor, program: Program, form: int, bits: int, rows: int, d: int, out: int,
    scale: int, mask: int, sums: int,
) -> None:  # fmt: skip
    """`quantize` of x, rows of d entries, contiguous and aligned, to addresses; mask, sums or 0."""
    blocks, device = d // ORDER, x.device.index
    warps, segment, teams, resident = _shape(blocks)
    kernel = _kernel(
        warps * teams, x.dtype, program.levels, program.estimator != STE, form, bits, device
    )
    units = -(-rows * blocks // TILE) if segment < TILE else rows
    kernel.launch(
        min(-(-units // teams), resident * cuda.processors(device)),
        x.data_ptr(), scale, out, mask, sums, units, rows * blocks, blocks, warps, segment, teams,
        program.step, program.threshold,
    )  # fmt: skip
