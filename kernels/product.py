"""y = A B^T of low-bit operands on Hopper's tensor cores, compiled from product.cu at run time.

Int8 operands (2 to 8 bits) accumulate exactly in int32; operands of single bits are compared by AND
and counted, since for signs s = 2 b - 1 the sum of s_a s_b is 4 |a & b| - 2 |a| - 2 |b| + K. The
epilogue turns an accumulator into a dequantized value in the output's dtype, to which it may add a
residual, or apply the rotary embedding; with a gate, two of them into silu(gate) value. NVRTC
compiles each variant once (about a second) and keeps the binary in the user's cache.

Source: QuEST (arXiv 2502.05003), section 4; SwiGLU, arXiv 2002.05202; RoPE, arXiv 2104.09864; PTX
ISA, `wgmma.mma_async` and `cp.async.bulk.tensor`.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from . import cuda, layout, outputs
from .hopper import ARCHITECTURE, OUT, aligned, bias_type, tensor_map

if TYPE_CHECKING:
    from cuda.core import ObjectCode

# The numbers of product.cu.
TILE_K, CLUSTER, CONSUMERS, GROUP = 128, 2, 2, 8
THREADS = 128 * (CONSUMERS + 1)
HEADS = (32, 64, 128)  # widths of heads that it turns


class Turned(NamedTuple):
    """How the first columns of a product are turned: by whole heads, as `product` has it.

    cos, sin: (T, d_head / 2) float32. columns: how many are turned, a multiple of d_head.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    columns: int


@dataclass(frozen=True)
class Shape:
    """How consumers share the work: `team` of them a tile; `stages` tiles of K in flight.

    columns: of a tile, 128 or 256.
    """

    team: int
    stages: int
    columns: int

    @property
    def rows(self) -> int:
        """Rows of A in a tile."""
        return 64 * self.team

    @property
    def shared(self) -> int:
        """Bytes of shared memory, as product.cu lays them out."""
        flight = self.stages * (self.rows + self.columns) * TILE_K
        staged = 4 * CONSUMERS * 16 * 160  # 16 padded rows of each warp, for the output
        columns = CONSUMERS * 3 * 4 * self.columns
        return flight + staged + columns + 16 * self.stages + 8 * CONSUMERS

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Of a product: pairs of row tiles down, and tiles across."""
        return -(-rows // (CLUSTER * self.rows)), -(-columns // self.columns)

    def clusters(self, rows: int, columns: int) -> int:
        """Pairs of tiles of a product."""
        down, across = self.grid(rows, columns)
        return down * across


# Two consumers on a tile (`Shape.team`), or each on one of its own, which it writes while the other
# computes. Large tiles ask shared memory for fewer bytes, small ones leave less of the last turn
# idle.
WIDE = Shape(2, 4, 256)
TALL = Shape(1, 5, 256)
NARROW = Shape(1, 8, 128)
KINDS = {"wide": WIDE, "tall": TALL, "narrow": NARROW}


class Cost(NamedTuple):
    """What tiles take, in us: by 128 bytes of K; by turn of the whole GPU, alone and for heads that
    are turned; and by launch: of what does not hide behind the tensor cores' work.

    writing: what does hide, where the tensor cores have so long.
    """

    step: float
    turn: float
    turned: float
    launch: float
    writing: float


# By whether operands are bits. As `python -m benchmarks.tile_costs` fits them to what
# `python -m benchmarks.tiles` measured on an H200 (tiles.csv there): 208 products of 64 rows on, K
# of 256 to 11008. What they choose is judged by those times, and no cost by itself.
COSTS = {
    False: {
        WIDE: Cost(0.606, 2.55, 2.02, 2.34, 1.03),
        TALL: Cost(0.34, 0.1, 1.33, 4.0, 0.89),
        NARROW: Cost(0.2, 0.33, 0.55, 2.51, 0.58),
    },
    True: {
        TALL: Cost(0.343, 0.77, 0.12, 3.92, 0.38),
        NARROW: Cost(0.299, 0.37, 0.47, 2.03, 0.86),
    },
}

_forced: Shape | None = None


@contextmanager
def only(tiles: Shape | None) -> Iterator[None]:
    """Products inside the block use these tiles, whatever their size; None: their own."""
    global _forced
    before, _forced = _forced, tiles
    try:
        yield
    finally:
        _forced = before


def forced() -> Shape | None:
    """The tiles of `only`; None outside of such a block."""
    return _forced


@functools.lru_cache(maxsize=4096)
def shape(
    binary: bool, rows: int, columns: int, width: int, processors: int, turned: bool
) -> Shape:
    """The tiles of a product, rows of `width` bytes: those that take the least by COSTS."""
    at_once = max(1, processors // CLUSTER)
    steps = -(-width // TILE_K)

    def taken(tiles: Shape) -> float:
        cost, turns = COSTS[binary][tiles], -(-tiles.clusters(rows, columns) // at_once)
        computing = max(steps * cost.step, cost.writing)
        return turns * (computing + cost.turn + turned * cost.turned) + cost.launch

    return min(COSTS[binary], key=taken)


def _divisor(by: int) -> tuple[int, int]:
    """(multiplier, shift): n * multiplier >> shift is n // by, for n below 2**31.

    Source: Granlund and Montgomery, Division by Invariant Integers using Multiplication (1994).
    """
    shift = 31 + (by - 1).bit_length()
    return -(-(1 << shift) // by), shift


@functools.lru_cache(maxsize=4096)
def turns(pairs: int, across: int) -> bytes:
    """`Turns` of product.cu: how it takes so many pairs of tiles down and tiles across."""
    group, last = _divisor(GROUP * across), _divisor(pairs % GROUP or GROUP)
    return struct.pack("3iIiIi", pairs * across, pairs, across, *group, *last)


def compile_(
    binary: bool, epilogue: int, out: torch.dtype, bias: int, tiles: Shape, gate: bool = False,
    residual: bool = False, rotary: int = 0, *, cached: bool = True,
) -> ObjectCode:  # fmt: skip
    """The binary of a variant for sm_90a. See `cuda.compile_`.

    bias: a `hopper.bias_type`. rotary: half the width of the heads that it turns, 0 for none.
    """
    macros = {
        "BINARY": int(binary), "EPILOGUE": epilogue, "OUT": OUT[out], "BIAS": bias,
        "GATE": int(gate), "RESIDUAL": int(residual), "ROTARY": rotary,
        "TILE_N": tiles.columns, "TILE_K": TILE_K, "CLUSTER": CLUSTER, "CONSUMERS": CONSUMERS,
        "TEAM": tiles.team, "STAGES": tiles.stages,
    }  # fmt: skip
    return cuda.compile_("product.cu", ARCHITECTURE, macros, cached=cached)


@functools.cache
def _kernel(
    binary: bool, epilogue: int, out: torch.dtype, bias: int, tiles: Shape, gate: bool,
    residual: bool, rotary: int, device: int,
) -> cuda.Kernel:  # fmt: skip
    """The variant, loaded on the current device."""
    more = "2P2i" if rotary else "P" * residual
    return cuda.load(
        compile_(binary, epilogue, out, bias, tiles, gate, residual, rotary), "product", device,
        threads=THREADS, shared=tiles.shared, layout="128s128s6P4if2i28s" + more,
    )  # fmt: skip


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.dtype,
    *,
    epilogue: int,
    length: int = 0,
    factor: float = 1.0,
    row_scale: torch.Tensor | None = None,
    column_scale: torch.Tensor | None = None,
    row_sum: torch.Tensor | None = None,
    column_sum: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    settled: bool = False,
    gate: bool = False,
    residual: torch.Tensor | None = None,
    rotary: Turned | None = None,
) -> torch.Tensor:
    """a (M, bytes), b (N, bytes): int8, or uint8 of eight bits each. Returns (M, N) of `out`.

    gate: (M, N / 2) of an `out` of 16 bits, silu(y[:, :N / 2]) y[:, N / 2:], computed in float32
    of y as it would be written, and rounded once. Not for RAW.
    residual: (M, N) of `out`; what is returned is residual + y, computed in float32 of y as it
    would be written, and rounded once. Not for RAW, nor with a gate.
    rotary: the first columns of y are turned, for an `out` of 16 bits: of each head, of a width in
    HEADS, low cos - high sin and high cos + low sin for its halves, computed in float32 of y as it
    would be written, and rounded once. Row r has the angles of row r % T. Not for RAW, nor with a
    gate or a residual.

    epilogue, of hopper.py: RAW writes the int32 accumulators; else y = p factor row_scale
    column_scale + bias. PLAIN: p is the accumulator. CORRECTED, for bits: the sum over `length` of
    products of signs, 4 acc - row_sum - column_sum - length with the sums of the rows' signs.
    CORRECTED, for int8: the sum of (a + 1/2)(b + 1/2), acc + (row_sum + column_sum - length) / 4
    with the sums of 2 a + 1. row_scale (M,), column_scale (N,) float32; row_sum (M,),
    column_sum (N,) int32; bias (N,) float32, bfloat16 or float16. acc, or with bits 4 acc, must fit
    int32, which K below 2**17 does. Of signs, p, 4 acc - column_sum and row_sum + length must be
    below 2**22 in size, which K below 2**17 makes them.
    settled: between what wrote b and this launch, another launch that did not overlap has been
    queued on this stream; rows.cu always overlaps, and does not count. b may then be
    asked for before kernels before this one have ended.
    """
    rows, columns = a.shape[0], b.shape[0] // (1 + gate)
    y = outputs.empty((rows, columns), out, a.device)
    if y.numel() == 0:
        return y
    given, a, b = b, aligned(a), aligned(b)
    residual = None if residual is None else layout.aligned(residual)
    at = cuda.pointer
    launch(
        y.data_ptr(), a.data_ptr(), b.data_ptr(), rows, columns, a.shape[1], a.device.index, out,
        a.dtype == torch.uint8, epilogue, length, factor, at(row_scale), at(column_scale),
        at(bias), at(row_sum), at(column_sum),
        settled and b is given,  # a copy has just been written
        bias_type(bias), gate, at(residual), rotary,
    )  # fmt: skip
    return y


def launch(
    y: int, a: int, b: int, rows: int, columns: int, width: int, device: int, out: torch.dtype,
    binary: bool, epilogue: int, length: int, factor: float, row_scale: int, column_scale: int,
    bias: int, row_sum: int, column_sum: int, settled: bool, bias_type: int, gate: bool = False,
    residual: int = 0, rotary: Turned | None = None,
) -> None:  # fmt: skip
    """`product` on addresses, 0 for None, and a `hopper.bias_type`.

    Rows of a and b are of `width` bytes, a multiple of 16. columns: of y; b has twice as many rows
    with a gate. residual: at a multiple of 16 bytes; y lies elsewhere. rotary: copied where its
    tables don't lie as the kernel reads them.
    """
    processors, features = cuda.processors(device), columns * (1 + gate)
    tiles = _forced or shape(binary, rows, features, width, processors, rotary is not None)
    held = min(tiles.rows, rows)  # of a tile: what lies outside of A is not asked for
    more: tuple[int, ...] = (residual,) if residual else ()
    half = 0
    if rotary is not None:
        cos, sin = map(layout.aligned, rotary[:2])
        positions, half = cos.shape
        more = (cos.data_ptr(), sin.data_ptr(), positions, rotary.columns)
    _kernel(binary, epilogue, out, bias_type, tiles, gate, residual != 0, half, device).launch(
        CLUSTER * min(tiles.clusters(rows, features), processors // CLUSTER),
        tensor_map(a, rows, width, held, TILE_K),
        tensor_map(b, features, width, tiles.columns // CLUSTER, TILE_K),
        y, row_scale, column_scale, bias, row_sum, column_sum, rows, columns, width, length,
        factor, held, settled, turns(*tiles.grid(rows, features)), *more, overlap=True,
    )  # fmt: skip
