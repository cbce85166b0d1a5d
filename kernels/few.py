"""y = A W^T for few rows of A and packed weights: CUDA C++ for Hopper, from few.cu.

With few rows the time is that of reading the weights, which lie packed at 1, 2 or 4 bits and are
read once. A holds signs as single bits, or int8 of odd integers 2 code + 1. The weights' codes are
counted from 0 and multiplied as they are: the sums of A's rows supply the rest. The epilogue is
`product`'s, with the same roundings.

Source: QuEST (arXiv 2502.05003), section 4; PTX ISA, `mma.sync` m16n8k32 and m16n8k256.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from . import cuda, outputs

if TYPE_CHECKING:
    from cuda.core import ObjectCode

LIMIT = 64  # rows
MAX_WIDTH = 2**16  # for which sums fit int32, and are exact as float32
CHUNK = 128  # a row of one bit is whole chunks of 16 bytes
OUT = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # the numbers of few.cu
ARCHITECTURE = "sm_90a"
TILES = (1, 2, 4, 8)  # of eight rows of A: what is compiled
CLUSTERS = (1, 2, 4, 8)
WARPS = 16
SHARED = 227 * 1024  # bytes that a block can have
# Bytes of A that a block holds, at most: beyond it K is split over a cluster. Measured: clusters
# cost more than reading more of A from the L2 cache, so only what does not fit is split.
HELD = SHARED


@dataclass(frozen=True)
class Plan:
    """How the work is split; the numbers of few.cu.

    cluster: blocks that share K. tiles: of 16 columns, of a cluster. steps: of K, of a block.
    warps: of a block, that share a tile's K. clusters: in the grid. shared: bytes.
    """

    cluster: int
    tiles: int
    steps: int
    warps: int
    clusters: int
    shared: int

    @property
    def own(self) -> int:
        """Tiles that a block writes out."""
        return -(-self.tiles // self.cluster)


def _row_tiles(rows: int) -> int:
    return next(n for n in TILES if 8 * n >= rows)


def _depth(tiles: int) -> int:
    """Units that a warp has in flight, 1 KB each; sums of 64 rows leave registers for three."""
    return 4 if tiles < 8 else 3


def _parts(bits: int) -> int:
    """Bytes of A for a byte of W."""
    return 1 if bits == 1 else 8 // bits


def _shared(rows: int, steps: int, own: int, bits: int) -> int:
    """Bytes of shared memory, as few.cu lays them out."""
    held = 8 * _row_tiles(rows) * 64 * _parts(bits) * steps
    return held + 4 * (rows * (16 * own + 4) + 3 * 16 * own + 2 * rows)


def _steps(width: int, bits: int, cluster: int) -> int:
    """Steps of K, 64 bytes of a row of W each, that a block has."""
    whole = -(-width * bits // 512)
    return -(-whole // cluster)


def supports(rows: int, width: int, bits: int) -> bool:
    """Whether the kernel does this: K a multiple of 128 and at most 65536, 1 to 64 rows.

    More than 32 rows of int8 fit shared memory up to a K of about 27000, 17 to 32 up to 55000.
    """
    return (
        bits in (1, 2, 4)
        and 1 <= rows <= LIMIT
        and 0 < width <= MAX_WIDTH
        and width % CHUNK == 0
        and _shared(rows, _steps(width, bits, CLUSTERS[-1]), 1, bits) <= SHARED
    )


def plan(
    rows: int, columns: int, width: int, bits: int, processors: int, held: int | None = None
) -> Plan:
    """The split of K and N for what `supports` allows; `held` in place of HELD."""
    held = HELD if held is None else held
    row = 64 * _parts(bits)  # bytes of A in a step
    for cluster in CLUSTERS:
        steps = _steps(width, bits, cluster)
        if rows * row * steps <= held and _shared(rows, steps, 1, bits) <= SHARED:
            break
    # The processors of a group share clusters of four and more among 16 of them.
    groups = max(1, processors // cluster if cluster <= 2 else processors // 16 * (16 // cluster))
    total = waves = -(-columns // 16)
    for waves in range(1, total + 1):
        tiles = -(-total // (waves * groups))
        shared = _shared(rows, steps, -(-tiles // cluster), bits)
        if shared <= SHARED:
            break
    # A warp's units, and half a unit for each tile's sums.
    warps = min(
        (1 << i for i in range(WARPS.bit_length())),
        key=lambda n: -(-tiles * n // WARPS) * (-(-steps // n) + 0.5),
    )
    return Plan(cluster, tiles, steps, warps, -(-total // tiles), shared)


def macros(bits: int, tiles: int, cluster: int, out: torch.dtype) -> dict[str, int]:
    """What few.cu is compiled with."""
    return {
        "BITS": bits, "NT": tiles, "CLUSTER": cluster, "OUT": OUT[out],
        "WARPS": WARPS, "DEPTH": _depth(tiles),
    }  # fmt: skip


def compile_(
    bits: int, tiles: int, cluster: int, out: torch.dtype, *, cached: bool = True
) -> ObjectCode:
    """The binary of a variant for sm_90a; see `cuda.compile_`."""
    return cuda.compile_("few.cu", ARCHITECTURE, macros(bits, tiles, cluster, out), cached=cached)


@functools.cache
def _loaded(bits: int, tiles: int, cluster: int, out: torch.dtype, device: int) -> cuda.Kernel:
    code = compile_(bits, tiles, cluster, out)
    return cuda.load(code, "few", device, threads=32 * WARPS, shared=SHARED, layout="8P9if")


@functools.lru_cache(maxsize=1024)
def _ready(
    rows: int, columns: int, width: int, bits: int, out: torch.dtype, device: int
) -> tuple[cuda.Kernel, int, int, int, int, int, int]:
    """The kernel with its shared memory, the blocks, and what few.cu is told of the split."""
    if not supports(rows, width, bits):
        raise ValueError(f"there is no product of {rows} rows of {width} entries at {bits} bits")
    p = plan(rows, columns, width, bits, cuda.processors(device))
    kernel = dataclasses.replace(
        _loaded(bits, _row_tiles(rows), p.cluster, out, device), shared=p.shared
    )
    inverse = -(-(2**32) // (4 * _parts(bits) * p.steps))
    return kernel, p.cluster * p.clusters, p.tiles, p.own, p.steps, p.warps, inverse


def _aligned(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def product(
    a: torch.Tensor,
    w: torch.Tensor,
    bits: int,
    out_dtype: torch.dtype,
    *,
    factor: float,
    length: int,
    a_scale: torch.Tensor,
    w_scale: torch.Tensor,
    a_sum: torch.Tensor,
    w_sum: torch.Tensor | None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y (M, N) of `out_dtype` = p factor a_scale w_scale + bias; see `supports`.

    bits 1: a (M, K/8), w (N, K/8) uint8, bit 1 for +1 and 0 for -1; a_sum (M,), w_sum (N,) int32
    the sums of the rows' signs. p is the sum over `length` of products of signs. Bits past
    `length` are 0.
    bits 2, 4: a (M, K) int8; w (N, K bits/8) uint8, codes from 0 as `packing.pack` lays them out,
    each for the integer 2 code - (2**bits - 1); a_sum (M,) int32 the sums of a's rows. p is the sum
    of products of integers; `length` and w_sum don't count. Entries past a row's end are 0 in a.
    a_scale (M,), w_scale (N,), bias (N,) float32. Vectors are contiguous.
    """
    rows, columns = a.shape[0], w.shape[0]
    y = outputs.empty((rows, columns), out_dtype, a.device)
    if y.numel() == 0:
        return y
    width = a.shape[1] * (8 if bits == 1 else 1)
    kernel, blocks, *split = _ready(rows, columns, width, bits, out_dtype, a.device.index)
    a, w = _aligned(a), _aligned(w)
    at = cuda.pointer
    kernel.launch(
        blocks,
        y.data_ptr(), a.data_ptr(), w.data_ptr(), a_scale.data_ptr(), w_scale.data_ptr(), at(bias),
        a_sum.data_ptr(), at(w_sum), rows, columns, width * bits // CHUNK, length, *split, factor,
    )  # fmt: skip
    return y
