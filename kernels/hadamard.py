"""Block Hadamard transform y = x H along the last axis, and its transpose y = x H^T.

H = matrix(order) * order**-0.5 with matrix(m * P) = kron(base_m, sylvester(P)), P a power of two.
The Sylvester part is a butterfly of log2 P stages on a tile in registers, in float32 whatever the
input dtype: each stage adds and subtracts the two halves of every span, so an output is a sum of P
terms with log2 P roundings. The base part (m = 12, 20, 28, or a Sylvester factor of an order beyond
one tile) is a small product; the butterfly follows it in the same kernel, or where a block does not
fit one program comes before it, with a float32 intermediate.

Reads the input once and writes the output once for powers of two up to TILE_LIMIT, and for orders
with a base, of 16 bits and without a mask, up to FUSED_LIMIT; more often otherwise. Behind a mask
masked.py, where CUDA C++ runs, has the order 128 of 16 bits.
Sources: QuEST (arXiv 2502.05003), section 3; Sylvester (1867) for the factorisation.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from . import outputs, whole
from .whole import power_of_two, quotient

INTERPRETED = bool(triton.knobs.runtime.interpret)
TILE_LIMIT = 16384  # float32 elements that one program holds: 32 registers a thread at 16 warps
BASE_LIMIT = 64  # rows of the base product that one program accumulates
BASE_SUMS = 2048  # that a warp accumulates of a base's product, 64 a thread: the fastest of 1792
FUSED_LIMIT = 8192  # of orders with a base that one program holds: the butterfly follows in it
LOSSLESS = 2**16  # the smallest value of bfloat16 over this is the smallest of float32


@triton.jit
def _stage(x, SPANS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    spans = tl.permute(tl.reshape(x, (SPANS, 2, HALF)), (0, 2, 1))  # (SPANS, HALF, 2)
    low, high = tl.split(spans)
    out = tl.permute(tl.join(low + high, low - high), (0, 2, 1))
    return tl.reshape(out, (ROWS, WIDTH))


@triton.jit
def butterfly(x, LOG: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Unnormalised Sylvester transform of order 2**LOG of a float32 tile (ROWS, WIDTH)."""
    for s in tl.static_range(LOG):
        x = _stage(x, ROWS * WIDTH // (2 << s), 1 << s, ROWS, WIDTH)
    return x


@triton.jit
def _read(
    x_ptr, mask_ptr, r, c, inside, width, mask_width, MASKED: tl.constexpr
):  # fmt: skip
    x = tl.load(x_ptr + r * width + c, mask=inside, other=0.0).to(tl.float32)
    if MASKED:
        bits = tl.load(mask_ptr + r * mask_width + c // 8, mask=inside, other=0).to(tl.int32)
        # A select and not a product: a masked infinity must not become NaN.
        x = tl.where(((bits >> (c % 8)) & 1) != 0, x, 0.0)
    return x


@triton.jit
def _non_finite(x):
    return (x != x) | (tl.abs(x) == float("inf"))


@triton.jit
def _transform(
    x_ptr, y_ptr, mask_ptr, rows, width, mask_width, before, after,
    LOG: tl.constexpr, MASKED: tl.constexpr, RESCUE: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    # One program: ROWS rows x WIDTH columns; WIDTH is a multiple of the order. Inputs are
    # multiplied by `before`, a power of two, and sums by `after`.
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (r < rows) & (c < width)
    x = _read(x_ptr, mask_ptr, r, c, inside, width, mask_width, MASKED)
    y = butterfly(x * before, LOG, ROWS, WIDTH)
    tl.store(y_ptr + r * width + c, (y * after).to(y_ptr.dtype.element_ty), mask=inside)
    if RESCUE:  # noqa: SIM102 (known to the compiler; what follows, when the kernel runs)
        # Sums that left float32 where the normalised result need not: again, scaled; `before` is 1.
        # Such blocks hold nothing that 2^-LOG could lose beside their sums.
        if tl.max(_non_finite(y).to(tl.int32)) != 0:
            x = _read(x_ptr, mask_ptr, r, c, inside, width, mask_width, MASKED)
            lost = _non_finite(butterfly(x, LOG, ROWS, WIDTH))
            y = butterfly(x * 0.5**LOG, LOG, ROWS, WIDTH) * (after * 2.0**LOG)
            tl.store(y_ptr + r * width + c, y.to(y_ptr.dtype.element_ty), mask=inside & lost)


@triton.jit
def _base_product(
    x_ptr, y_ptr, base_ptr, power_ptr, vectors, columns, norm,
    M: tl.constexpr, PADDED: tl.constexpr, LOG: tl.constexpr, SCALED: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    # One program: WIDTH of the vectors that the base multiplies, y[i] = norm * sum_j base[j, i]
    # x[j]. Vector v lies in block v // columns, at column v % columns; its entries are `columns`
    # apart. LOG: then the Sylvester part, of order 2^LOG, along the columns. SCALED: times the
    # power of two of the block.
    v = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, :]
    start = (v // columns) * M * columns + v % columns
    i = tl.arange(0, PADDED)[:, None]
    acc = tl.zeros((PADDED, WIDTH), dtype=tl.float32)
    for j in range(M):
        x = tl.load(x_ptr + start + j * columns, mask=v < vectors, other=0.0).to(tl.float32)
        acc += tl.load(base_ptr + j * M + i, mask=i < M, other=0.0) * x
    inside = (i < M) & (v < vectors)
    acc = butterfly(acc, LOG, PADDED, WIDTH) * norm
    if SCALED:
        acc *= tl.load(power_ptr + v // columns, mask=v < vectors, other=1.0)
    tl.store(y_ptr + start + i * columns, acc.to(y_ptr.dtype.element_ty), mask=inside)


def readable(x: torch.Tensor) -> torch.Tensor:
    """x contiguous, in a dtype that kernels load: the interpreter misreads bfloat16 subnormals."""
    return (x.float() if INTERPRETED else x).contiguous()


def stored(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which kernels store floats: the interpreter truncates where it should round."""
    return torch.float32 if INTERPRETED else dtype


def factor(order: int, base: torch.Tensor | None) -> int:
    """The power of two that a tile transforms: what the base leaves of the order."""
    return order if base is None else order // len(base)


def warps(elements: int) -> int:
    """Warps for a tile of `elements` float32: 32 registers of data a thread, at most 16 warps."""
    return min(16, max(1, elements // 1024))


def tile(rows: int, width: int, order: int) -> tuple[int, int]:
    """(ROWS, WIDTH) of one program's tile, powers of two, WIDTH a multiple of `order`."""
    # One warp on 1024 elements was the fastest tile measured: its stages need no barrier.
    return whole.tile(rows, width, 1024, 1024, least=order)


def prescale(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., d) times powers of two that bring the largest of d to [1, 2), and their inverses.

    As both must be normal, subnormals stay below 1, and 2^127 comes to 2.
    """
    x = x.float()
    field = x.view(torch.int32).bitwise_and(0x7FFFFFFF).amax(-1, keepdim=True) >> 23
    field = field.clamp(1, 253)
    return x * ((254 - field) << 23).view(torch.float32), (field << 23).view(torch.float32)


def launch_base(
    x: torch.Tensor,
    base: torch.Tensor,
    columns: int,
    norm: float,
    dtype: torch.dtype,
    power: torch.Tensor | None = None,
    log: int = 0,
) -> torch.Tensor:
    """x (..., d) as blocks (m, columns): norm * base^T x for each block, stored as `dtype`.

    power: a factor for each block, float32, or None. log: 2^log is the order of a Sylvester
    transform along the columns of what comes out, which they are a multiple of.
    """
    m = len(base)
    padded = power_of_two(m)
    y = outputs.empty(x.shape, dtype, x.device)
    vectors = x.numel() // m
    # The interpreter takes as long for a large tile as for a small one.
    width = max(4096 if INTERPRETED else BASE_SUMS // padded, 1 << log)
    _base_product[(quotient(vectors, width),)](
        x, y, base, x if power is None else power, vectors, columns, norm,
        m, padded, log, power is not None, width,
        num_warps=padded * width // BASE_SUMS,
    )  # fmt: skip
    return y


def launch_tile(
    x: torch.Tensor,
    order: int,
    norm: float,
    dtype: torch.dtype,
    mask: torch.Tensor | None = None,
    narrow: bool = False,
    near_one: bool = False,
) -> torch.Tensor:
    """norm times the Sylvester transform; the bits of `mask` (rows, ceil(d/8)) select inputs.

    narrow: the values of x are those of a 16-bit dtype. near_one: their sums stay in range.
    """
    # Blocks lie one behind the other, and their bits: as rows, they are taken in memory's order,
    # and no tile hangs over a row. Below 16 entries they would not be read by vectors.
    width = order if order % 16 == 0 else x.shape[-1]
    rows = x.numel() // width
    r, w = tile(rows, width, order)
    mask = None if mask is None else mask.contiguous()
    y = outputs.empty(x.shape, dtype, x.device)
    log = order.bit_length() - 1
    # The mean of a block never leaves float32, and no value of 16 bits loses a bit by becoming its
    # share of one (order 2^14 takes the smallest, 2^-133, to 2^-147). Subnormals of float32 would:
    # that kernel looks for sums out of range first.
    before = 1 / order if narrow else 1.0
    _transform[(quotient(rows, r), quotient(width, w))](
        x, y, x if mask is None else mask, rows, width, -(-width // 8), before, norm / before,
        log, mask is not None, log > 0 and not (narrow or near_one), r, w, num_warps=warps(r * w),
    )  # fmt: skip
    return y


@functools.cache
def weights(base: torch.Tensor, transpose: bool, share: float) -> torch.Tensor:
    """base, or base^T, times `share`, contiguous. Cached: a base lives as long as the process.

    What a CUDA graph captures is written when it is replayed: call each order, direction and dtype
    once before a capture.
    """
    return (base.t() if transpose else base).contiguous() * share


def hadamard(
    x: torch.Tensor,
    order: int,
    base: torch.Tensor | None,
    transpose: bool,
    mask: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """y = x H, or x H^T, blockwise along the last axis, computed in float32.

    x: (..., d) float32, bfloat16 or float16, d divisible by `order`. base: (m, m) float32 of ±1 on
    x's device, m <= BASE_LIMIT, or None for m = 1; order / m is a power of two <= TILE_LIMIT.
    mask: (..., ceil(d / 8)) uint8, little-endian bits; inputs whose bit is 0 count as 0.
    Returns y of x's shape, as `dtype`, by default x's.
    """
    narrow = x.dtype != torch.float32
    dtype = dtype or x.dtype
    if x.numel() == 0:
        return outputs.empty(x.shape, dtype, x.device)
    x = readable(x)
    power = factor(order, base)
    final = stored(dtype)
    if base is None:
        return launch_tile(x, order, order**-0.5, final, mask, narrow).to(dtype)
    if mask is not None:
        x = launch_tile(x, 1, 1.0, x.dtype, mask)  # what is masked must not set the power
    # Sums stay in range: of shares of 16 bits, which lose none, or of blocks brought near 1. One
    # normalisation, at the end: sums of integers stay exact.
    share, y, up = 1.0, x.view(-1, order), None
    if narrow and order <= LOSSLESS:
        share = 1 / power_of_two(order)
    else:
        y, up = prescale(y)
    norm, log = order**-0.5 / share, power.bit_length() - 1
    if order > FUSED_LIMIT:
        y = launch_tile(y, power, share, torch.float32, narrow=up is None, near_one=True)
        share, log = 1.0, 0
    turned = weights(base, transpose, share)
    return launch_base(y, turned, power, norm, final, up, log).view(x.shape).to(dtype)
