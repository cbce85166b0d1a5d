"""y = A W^T for few rows of A and packed weights: CUDA C++ for Hopper, from few.cu.

With few rows the time is that of reading the weights, which lie packed at 1, 2 or 4 bits and are
read once. A holds signs as single bits, or int8 of integers. The weights' codes are counted from 0
and multiplied as they are: the sums of A's rows supply the rest. The epilogue is that of
`kernels.product`, with the same roundings.

Source: QuEST (arXiv 2502.05003), section 4; PTX ISA, `mma.sync` m16n8k32 and m16n8k256.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from . import cuda, outputs
from .hopper import bias_type
from .layout import aligned

if TYPE_CHECKING:
    from cuda.core import ObjectCode

LIMIT = 64  # rows
# For which sums fit int32, and are exact as float32: those of integers to 15, or to 120 in eights.
MAX_WIDTH = 2**16
CHUNK = 128  # a row of one bit is whole chunks of 16 bytes
OUT = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # the numbers of few.cu
ARCHITECTURE = "sm_90a"
TILES = (1, 2, 4, 8)  # of eight rows of A: what is compiled
CLUSTERS = (1, 2, 4, 8)
WARPS = 16
SHARES = (1, 2, 4, 8, 16)  # warps that share a tile's K
SHARED = 227 * 1024  # bytes that a block can have
# Bytes of A, of one or two tiles, that a block brings where it has all of K; with more, two blocks
# share K. Apart, 64 KB took 4 to 25 percent less time, 86 KB 11 to 16 more (the H200's few.txt).
ALONE = 80 * 1024
# Bytes of A, of more than one tile, that a block holds: sums of 9 rows and more want room, or the
# tiles of W come in waves, each of which brings A anew.
HELD = 192 * 1024


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


def _depth(tiles: int, bits: int) -> int:
    """Units that a warp has in flight, 1 KB each; sums of 64 rows leave registers for three.

    More than four mostly help 4 bits alone, which wait for memory the longest.
    """
    if tiles <= 2 and bits == 4:
        return 6
    return 4 if tiles < 8 else 3


def _parts(bits: int) -> int:
    """Bytes of A for a byte of W."""
    return 1 if bits == 1 else 8 // bits


def _held(rows: int, steps: int, bits: int) -> int:
    """Bytes of so many rows of A in so many steps."""
    return rows * 64 * _parts(bits) * steps


def _shared(rows: int, steps: int, own: int, bits: int) -> int:
    """Bytes of shared memory, as few.cu lays them out."""
    words = rows * (16 * own + 4) + 3 * 16 * own + 2 * rows
    return _held(8 * _row_tiles(rows), steps, bits) + 4 * words


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


def _brings_little(rows: int, steps: int, bits: int, cluster: int) -> bool:
    """Whether a block of so many steps is fast, as far as A goes; see ALONE and HELD."""
    tiles = _row_tiles(rows)
    if cluster == 1 and tiles <= 2 and _held(rows, steps, bits) > ALONE:
        return False
    return tiles == 1 or _held(8 * tiles, steps, bits) <= HELD


def split(rows: int, width: int, bits: int) -> int:
    """Blocks of a cluster, which share K, for what `supports` allows: the fewest that will do."""
    for cluster in CLUSTERS:
        steps = _steps(width, bits, cluster)
        fits = _shared(rows, steps, 1, bits) <= SHARED
        if fits and _brings_little(rows, steps, bits, cluster):
            break
    return cluster


def plan(rows: int, columns: int, width: int, bits: int, cluster: int, groups: int) -> Plan:
    """The split of K and N over clusters of so many blocks, `groups` of which run at once."""
    steps = _steps(width, bits, cluster)
    total = waves = -(-columns // 16)
    for waves in range(1, total + 1):
        tiles = -(-total // (waves * groups))
        shared = _shared(rows, steps, -(-tiles // cluster), bits)
        if shared <= SHARED:
            break
    return Plan(cluster, tiles, steps, _warps(tiles, steps, cluster), -(-total // tiles), shared)


def _warps(tiles: int, steps: int, cluster: int) -> int:
    """Warps that share a tile's K, so that the last of a block ends soonest."""
    # A warp's units, and half a unit for each tile's sums; those for other blocks cost more.
    flush = 0.5 if cluster == 1 else 1.5
    return min(SHARES, key=lambda n: -(-tiles * n // WARPS) * (-(-steps // n) + flush))


def macros(bits: int, tiles: int, cluster: int, out: torch.dtype) -> dict[str, int]:
    """What few.cu is compiled with."""
    return {
        "BITS": bits, "NT": tiles, "CLUSTER": cluster, "OUT": OUT[out], "WARPS": WARPS,
        "DEPTH": _depth(tiles, bits),
    }  # fmt: skip


def compile_(
    bits: int, tiles: int, cluster: int, out: torch.dtype, *, cached: bool = True
) -> ObjectCode:
    """The binary of a variant for sm_90a; see `cuda.compile_`."""
    made = macros(bits, tiles, cluster, out)
    return cuda.compile_("few.cu", ARCHITECTURE, made, cached=cached)


@functools.cache
def _loaded(bits: int, tiles: int, cluster: int, out: torch.dtype, device: int) -> cuda.Kernel:
    code = compile_(bits, tiles, cluster, out)
    return cuda.load(code, "few", device, threads=32 * WARPS, shared=SHARED, layout="8P8iIfi")


@functools.lru_cache(maxsize=1024)
def _ready(
    rows: int, columns: int, width: int, bits: int, out: torch.dtype, device: int
) -> tuple[cuda.Kernel, int, int, int, int, int, int]:
    """The kernel with its shared memory, the blocks, and what few.cu is told of the split."""
    if not supports(rows, width, bits):
        raise ValueError(f"there is no product of {rows} rows of {width} entries at {bits} bits")
    cluster = split(rows, width, bits)
    kernel = _loaded(bits, _row_tiles(rows), cluster, out, device)
    groups = max(1, cuda.clusters(kernel, cluster))
    p = plan(rows, columns, width, bits, cluster, groups)
    kernel, divisor = dataclasses.replace(kernel, shared=p.shared), inverse(p, bits)
    shift = p.warps.bit_length() - 1
    return kernel, p.cluster * p.clusters, p.tiles, p.own, p.steps, shift, divisor


def inverse(p: Plan, bits: int) -> int:
    """What few.cu divides by the groups of 32 chunks in a block's share of a row with."""
    return -(-(2**31) // -(-4 * _parts(bits) * p.steps // 32))


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
    settled: bool = False,
) -> torch.Tensor:
    """y (M, N) of `out_dtype` = p factor a_scale w_scale + bias; see `supports`.

    bits 1: a (M, K/8), w (N, K/8) uint8, bit 1 for +1 and 0 for -1; a_sum (M,), w_sum (N,) int32
    the sums of the rows' signs. p is the sum over `length` of products of signs. Bits past
    `length` are 0.
    bits 2, 4: a (M, K) int8; w (N, K bits/8) uint8, codes from 0 as `packing.pack` lays them out,
    each for the integer 2 code - (2**bits - 1); a_sum (M,) int32 the sums of a's rows. p is the sum
    of products of integers; `length` and w_sum don't count. Entries past a row's end are 0 in a.
    a_scale (M,), w_scale (N,) float32; bias (N,) float32, bfloat16 or float16. Vectors are
    contiguous. settled: between what wrote w and this launch, another launch that did not overlap
    has been queued on this stream; rows.cu always overlaps, and does not count. This one
    then overlaps with kernels before it, and asks for w before they have ended.
    """
    rows, columns = a.shape[0], w.shape[0]
    y = outputs.empty((rows, columns), out_dtype, a.device)
    if y.numel() == 0:
        return y
    width = a.shape[1] * (8 if bits == 1 else 1)
    given, a, w = w, aligned(a), aligned(w)
    at = cuda.pointer
    launch(
        y.data_ptr(), a.data_ptr(), w.data_ptr(), rows, columns, width, bits, a.device.index,
        out_dtype, factor, length, a_scale.data_ptr(), w_scale.data_ptr(), a_sum.data_ptr(),
        at(w_sum), bias,
        settled and w is given,  # a copy has just been written
    )  # fmt: skip
    return y


def launch(
    y: int, a: int, w: int, rows: int, columns: int, width: int, bits: int, device: int,
    out_dtype: torch.dtype, factor: float, length: int, a_scale: int, w_scale: int, a_sum: int,
    w_sum: int, bias: torch.Tensor | None, settled: bool,
) -> None:  # fmt: skip
    """`product` on addresses, of rows of `width` entries."""
    kernel, blocks, *split_ = _ready(rows, columns, width, bits, out_dtype, device)
    kernel.launch(
        blocks,
        y, a, w, a_scale, w_scale, cuda.pointer(bias), a_sum, w_sum, rows, columns,
        width * bits // CHUNK, length, *split_, factor, bias_type(bias), overlap=settled,
    )  # fmt: skip
