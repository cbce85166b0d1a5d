"""The quantizer for Hadamard blocks of 128: CUDA C++, from blocks.cu and rows.cu.

The same function as `quantize`, for the case that layers are made of: blocks of 128, uniform grids,
no sparsity, masks by a threshold. Four stages of the transform are products on the tensor cores,
three are additions in a lane, which Triton's layouts can't express. Everything else runs in
`quantize`. Here a warp has 32 blocks, eight at a time; inputs that are not very large, without a
prologue or behind a norm, are `rows`'s.

`gated` and `normed` make the rows themselves, of a gate and a value or by RMSNorm, which saves
writing them and reading them again.
Source: QuEST (arXiv 2502.05003), Algorithm 1; SwiGLU, arXiv 2002.05202; RMSNorm, arXiv 1910.07467.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from . import cuda, outputs
from . import rows as by_row
from .forms import INPUTS, INTEGERS, ORDER, PACKED, RESERVED, VALUES, readable
from .layout import aligned, rows_of
from .quantize import DISTANCE, STE, Program

TILE, SMALL = 32, 16  # blocks that a warp holds: see `_tile`
WARP_LIMIT = 12  # warps whose threads hold a row, at most
# By an entry's bytes: warps that a multiprocessor takes at once, of float32 as many as its shared
# memory holds, and the registers that a thread of so many may have.
RESIDENT = {2: 16, 4: 12}
REGISTERS = {2: 128, 4: 168}
GATHERED = 48  # bytes a block in which a warp gathers what is narrower than a lane writes
# Of a team that holds several rows, at most; and how much more of its threads they must fill than a
# row alone would.
MOST_ROWS, MOST_WARPS, GAIN = 6, 4, 1.1
PLAIN, GATED, NORMED, ADDED = range(4)  # prologues


def supports(program: Program, x: torch.Tensor) -> bool:
    """Whether the kernel does this, with a prologue or without; `quantize` does the rest."""
    return (
        program.order == ORDER
        and program.base is None
        and program.points is None
        and program.group is None
        and program.estimator != DISTANCE
        and x.dtype in INPUTS
        and 0 < x.shape[-1] <= WARP_LIMIT * TILE * ORDER
        # y / (sigma step), at most sqrt(d) / step, is rounded to whole numbers of 16 bits.
        and math.sqrt(x.shape[-1]) < 2**14 * program.step
        and cuda.unavailable(x.device) is None
        and all(
            _bytes(_shape(x.shape[-1] // ORDER, several, x.element_size()), x.element_size())
            <= cuda.shared(x.device.index)
            for several in (False, True)
        )
    )


class Shape(NamedTuple):
    """How threads share rows.

    rows: of a team of `warps`. segment: blocks of a row that share a warp, or `tile`. teams: of a
    thread block. tile: blocks that a warp holds.
    """

    rows: int
    warps: int
    segment: int
    teams: int
    tile: int

    @property
    def kind(self) -> int:
        """Warps as the source wants them: of a row 0 for a share of one, 2 for several."""
        if self.rows > 1:
            return self.warps
        return min(self.warps, 2) if self.segment == self.tile else 0

    def shared(self, size: int) -> int:
        """Bytes of shared memory that a thread block is launched with; size: of an entry."""
        return self.warps * self.teams * self.tile * (size * ORDER + GATHERED)


def _bytes(shape: Shape, size: int) -> int:
    """Of shared memory that a thread block has; size: of an entry."""
    several = shape.rows > 1
    slots, teams = (shape.tile * shape.warps, shape.teams) if several else (WARP_LIMIT, 4)
    # Four exchanges a team, as exchange.cuh has them: a barrier, and two sets of slots.
    return shape.shared(size) + 4 * teams * (8 + 2 * 4 * slots)


def _tile(blocks: int, size: int) -> int:
    """Blocks that a warp holds: few where the row, or an entry's bytes, let them be enough.

    A wave's inputs come before anything is computed, and its last blocks are computed after all
    have come: the less a wave holds, the less of either. But warps that share a row wait for each
    other, and of float32 five or more to a row leave room for few teams.
    """
    return SMALL if blocks <= (SMALL if size == 2 else 4 * SMALL) else TILE


@functools.cache
def _shape(blocks: int, several: bool = True, size: int = 2) -> Shape:
    """For rows of so many blocks, of entries of `size` bytes.

    several: whether a team may hold more than one.
    """
    tile = _tile(blocks, size)
    if blocks < tile and blocks & (blocks - 1) == 0:
        return Shape(1, 1, blocks, 4, tile)
    rows, warps = _team(blocks, MOST_ROWS if several else 1, tile)
    return Shape(rows, warps, tile, max(1, 4 // warps), tile)


def _team(blocks: int, most: int, tile: int) -> tuple[int, int]:
    """(rows, warps) whose threads they fill best: one, or up to `most` where that is far more."""

    def filled(team: tuple[int, int]) -> float:
        return team[0] / team[1]  # times blocks a row, over blocks a warp

    alone, *several = ((n, -(-n * blocks // tile)) for n in range(1, most + 1))
    fit = [team for team in several if team[1] <= MOST_WARPS]
    best = max(fit, key=filled, default=alone)
    return best if filled(best) > GAIN * filled(alone) else alone


def macros(
    dtype: torch.dtype, levels: int, edge: bool, form: int, bits: int, prologue: int = PLAIN,
    shown: bool = False, saved: int = 0, rows: int = 1, warps: int = 1, tile: int = TILE,
) -> dict[str, int]:  # fmt: skip
    """What blocks.cu is compiled with, for an input of `dtype`.

    rows: of a team; warps: of a team of several rows, else as `Shape.kind`; tile: `Shape.tile`.
    """
    return {
        "REGISTERS": REGISTERS[dtype.itemsize], "IN": INPUTS[dtype], "LEVELS": levels,
        "EDGE": int(edge), "FORM": form, "BITS": bits, "PROLOGUE": prologue, "SHOWN": int(shown),
        "SAVED": saved, "ROWS": rows, "WARPS": warps, "TILE": tile,
    }  # fmt: skip


@functools.cache
def _kernel(
    shape: Shape, dtype: torch.dtype, levels: int, edge: bool, form: int, bits: int, device: int,
    prologue: int = PLAIN, shown: bool = False, saved: int = 0,
) -> cuda.Kernel:  # fmt: skip
    made = macros(
        dtype, levels, edge, form, bits, prologue, shown, saved, shape.rows, shape.kind, shape.tile
    )  # fmt: skip
    code = cuda.compile_("blocks.cu", cuda.architecture(device), made)
    threads = 32 * shape.warps * shape.teams
    return cuda.load(
        code, "quantize", device, threads=threads,
        shared=shape.shared(dtype.itemsize), layout="6P2q4i2f" + ("2P2i2Pf" if prologue else ""),
    )  # fmt: skip


def _grid(
    rows: int, blocks: int, device: int, size: int, several: bool = True
) -> tuple[int, tuple[int, ...], Shape]:
    """(thread blocks, what the kernel is told of the shape, the shape); all of them run at once."""
    shape = _shape(blocks, several, size)
    of_team, warps, segment, teams, tile = shape
    fit = (cuda.shared(device) + RESERVED) // (_bytes(shape, size) + RESERVED)
    resident = max(1, min(RESIDENT[size] // (warps * teams), fit))
    units = -(-rows * blocks // tile) if segment < tile else -(-rows // of_team)
    count = min(-(-units // teams), resident * cuda.processors(device))
    return count, (units, rows * blocks, blocks, warps, segment, teams), shape


def quantize(
    x: torch.Tensor,
    program: Program,
    *,
    form: int,
    bits: int = 0,
    sums: bool = False,
    masked: bool = True,
    saved: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, scale, mask, sums, saved) of x (..., d), d a multiple of 128; see `supports`.

    form: VALUES, out (..., d) of x's dtype; PACKED, out (..., d bits / 8) uint8; CODES or INTEGERS,
    out (..., d) int8: codes; or 2 code + 1 (L odd: the code), times the largest power of two that
    leaves it in int8. scale: (..., 1) float32. mask: (..., d / 8) uint8, or where not `masked` of
    shape (0,). sums: (..., 1) int32 of such integers, or, with codes and bits, of 2 code + 1; or of
    shape (0,). saved: of integers, in 2 or 4 bits an entry, what `pack` makes of out,
    (..., d saved / 8) uint8; or, for 0, of shape (0,).
    """
    if sums and (form == VALUES or (form == PACKED and bits > 1)):
        raise ValueError(f"there are no sums of form {form} with {bits} bits")
    _check_saved(saved, form, program)
    lead, d, device = x.shape[:-1], x.shape[-1], x.device
    rows = math.prod(lead)
    if rows and by_row.takes(rows, d, x.dtype):
        x = rows_of(x if x.ndim == 2 else x.reshape(rows, d))
    else:
        x = aligned(x)
    width, dtype = {
        VALUES: (d, x.dtype), PACKED: (d * bits // 8, torch.uint8),
    }.get(form, (d, torch.int8))  # fmt: skip
    out = outputs.empty((*lead, width), dtype, device)
    scale = outputs.empty((*lead, 1), torch.float32, device)
    mask = outputs.empty((*lead, d // 8) if masked else (0,), torch.uint8, device)
    sum_ = outputs.empty((*lead, 1) if sums else (0,), torch.int32, device)
    kept = outputs.empty((*lead, d * saved // 8) if saved else (0,), torch.uint8, device)
    if rows:
        launch(
            x, program, form, bits, rows, d, out.data_ptr(), scale.data_ptr(),
            mask.data_ptr() if masked else 0, sum_.data_ptr() if sums else 0,
            kept.data_ptr() if saved else 0, saved,
        )  # fmt: skip
    return out, scale, mask, sum_, kept


def _check_saved(saved: int, form: int, program: Program) -> None:
    if saved and (form != INTEGERS or saved not in (2, 4) or program.levels > 2**saved):
        raise ValueError(
            f"integers of at most 2 or 4 bits can be saved in as many, got form {form} of "
            f"{program.levels} levels in {saved}"
        )


def launch(
    x: torch.Tensor, program: Program, form: int, bits: int, rows: int, d: int, out: int,
    scale: int, mask: int, sums: int, kept: int = 0, saved: int = 0,
) -> None:  # fmt: skip
    """`quantize` of x, rows of d entries, contiguous and aligned, to addresses.

    Where they are rows.cu's (`rows.takes`) they may lie apart. mask, sums, kept: or 0. saved: the
    bits of an entry of `kept`.
    """
    if by_row.takes(rows, d, x.dtype):
        by_row.launch(x, program, form, bits, rows, d, out, scale, mask, sums, kept, saved, None, 0)
        return
    device = x.device.index
    # Values gain nothing by several rows a team (kernels/README.md).
    count, told, shape = _grid(rows, d // ORDER, device, x.itemsize, several=form != VALUES)
    edge = bool(mask) and program.estimator != STE
    kernel = _kernel(shape, x.dtype, program.levels, edge, form, bits, device, saved=saved)
    kernel.launch(
        count, x.data_ptr(), scale, out, mask, sums, kept, *told, program.step, program.threshold
    )


class Made(NamedTuple):
    """What a prologue gives: as `quantize` does, and the rows; None where not asked for.

    added: h, of `normed` with a residual. rows: as they were quantized.
    """

    out: torch.Tensor
    scale: torch.Tensor
    sums: torch.Tensor
    mask: torch.Tensor | None
    saved: torch.Tensor | None
    added: torch.Tensor | None
    rows: torch.Tensor | None


def gated(
    gate: torch.Tensor, value: torch.Tensor, program: Program, *, form: int, bits: int = 0,
    show: bool = False, masked: bool = False, saved: int = 0,
) -> Made:  # fmt: skip
    """The quantizer of rows = silu(gate) value, both (rows, d) bfloat16 or float16.

    They may be columns of a wider tensor. Rows are computed in float32 and rounded once; given
    back where `show` is asked for. The rest as in `quantize`: PACKED of one bit, CODES or INTEGERS,
    and `supports` is to hold for both.
    """
    return _made(
        gate, value, program, form=form, bits=bits, show=show, prologue=GATED, masked=masked,
        saved=saved,
    )  # fmt: skip


def normed(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float,
    program: Program, *, form: int, bits: int = 0, show: bool = False,
) -> Made:  # fmt: skip
    """The quantizer of rows = (h / sqrt(mean(h^2) + eps)) weight, for inference: without a mask.

    h = residual + x, rounded, is given back where there is a residual; else it is x, and None. x,
    residual: (rows, d) bfloat16 or float16, weight: (d,) of that dtype. The rest as in `gated`;
    `supports` is to hold.
    """
    prologue = NORMED if residual is None else ADDED
    return _made(
        x, residual, program, form=form, bits=bits, show=show, prologue=prologue, weight=weight,
        eps=eps,
    )  # fmt: skip


def _made(
    first: torch.Tensor, second: torch.Tensor | None, program: Program, *, form: int, bits: int,
    show: bool, prologue: int, weight: torch.Tensor | None = None, eps: float = 0.0,
    masked: bool = False, saved: int = 0,
) -> Made:  # fmt: skip
    if form == VALUES or (form == PACKED and bits > 1):
        raise ValueError(f"a prologue makes no form {form} with {bits} bits")
    _check_saved(saved, form, program)
    (rows, d), device = first.shape, first.device
    packed = form == PACKED
    out = outputs.empty(
        (rows, d // 8 if packed else d), torch.uint8 if packed else torch.int8, device
    )
    scale = outputs.empty((rows, 1), torch.float32, device)
    sums = outputs.empty((rows, 1), torch.int32, device)
    mask = outputs.empty((rows, d // 8), torch.uint8, device) if masked else None
    kept = outputs.empty((rows, d * saved // 8), torch.uint8, device) if saved else None
    added = outputs.empty((rows, d), first.dtype, device) if prologue == ADDED else None
    shown = outputs.empty((rows, d), first.dtype, device) if show else None
    if rows:
        launch_prologue(
            first, second, program, form, bits, prologue, out.data_ptr(), scale.data_ptr(),
            sums.data_ptr(), cuda.pointer(added), weight, eps, cuda.pointer(mask),
            cuda.pointer(kept), saved, cuda.pointer(shown),
        )  # fmt: skip
    return Made(out, scale, sums, mask, kept, added, shown)


def launch_prologue(
    first: torch.Tensor, second: torch.Tensor | None, program: Program, form: int, bits: int,
    prologue: int, out: int, scale: int, sums: int, added: int = 0,
    weight: torch.Tensor | None = None, eps: float = 0.0, mask: int = 0, kept: int = 0,
    saved: int = 0, shown: int = 0,
) -> None:  # fmt: skip
    """`gated` or `normed`, as `prologue` says, of rows (at least one, d) to addresses.

    added, mask, kept, shown: or 0. saved: the bits of an entry of `kept`.
    """
    (rows, d), device = first.shape, first.device.index
    first = readable(first)
    second = None if second is None else readable(second)
    weight = None if weight is None else readable(weight[None])
    if prologue == NORMED and weight is not None and by_row.takes(rows, d, first.dtype):
        norm = weight[0], eps
        by_row.launch(
            first, program, form, bits, rows, d, out, scale, mask, sums, kept, saved, norm, shown
        )
        return
    count, told, shape = _grid(rows, d // ORDER, device, first.itemsize)
    edge = bool(mask) and program.estimator != STE
    kernel = _kernel(
        shape, first.dtype, program.levels, edge, form, bits, device, prologue, bool(shown), saved,
    )  # fmt: skip
    chunk = 16 // first.element_size()
    kernel.launch(
        count, first.data_ptr(), scale, out, mask, sums, kept, *told, program.step,
        program.threshold, cuda.pointer(second), shown, first.stride(0) // chunk,
        0 if second is None else second.stride(0) // chunk, cuda.pointer(weight), added, eps,
    )  # fmt: skip
