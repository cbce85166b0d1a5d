"""From a row of floats to its low-bit form in one pass: transform, RMS, codes, mask, packing.

For each row x of width d, in float32 whatever the input dtype:

    e      = exponent of max |x|             all that follows works on x 2^-e, exactly
    sigma  = sqrt(mean(x^2))                  H is orthonormal: the RMS of x is that of x H
    y      = x H
    keep   = N:M selection on |y|             (or all)
    code   = clamp(floor(y / (sigma step)))   uniform grids; a search among midpoints for tables
    mask   = |y| <= threshold sigma           (Clip, Trust(s >= 1)), or |Q(y) - y| <= s T sigma
    value  = point(code) sigma                0 where pruned

The power of two keeps squares and butterflies in range, so that rows of any finite magnitude have
their true scale. A row of zeros (or one whose sigma rounds to 0) has scale 0, values 0, mask 1. A
row with a NaN or infinity has scale NaN, values NaN, and is computed as if it were zeros otherwise.

A program is one warp, whose stages need no barrier: it holds rows of up to CHUNK elements in
registers, and reads longer ones twice, the second time from the cache. Writes only what is asked
for. Orders beyond CHUNK and bases that are no power of two are transformed first, by the kernels of
`hadamard`.
Source: QuEST (arXiv 2502.05003), Algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import outputs
from .hadamard import (
    BASE_LIMIT,
    INTERPRETED,
    TILE_LIMIT,
    butterfly,
    factor,
    launch_base,
    launch_tile,
    prescale,
    readable,
    stored,
)
from .whole import power_of_two, quotient

STE, EDGE, DISTANCE = 0, 1, 2  # how the mask is decided
# Elements that a program, one warp, holds at a time; the largest order that it does. The
# interpreter takes as long for a large tile as for a small one.
CHUNK = 8192 if INTERPRETED else 1024
GROUP_UNITS = (2, 4)  # entries, or pairs of entries, of the N:M groups that the kernel compares

__all__ = [
    "BASE_LIMIT", "DISTANCE", "EDGE", "GROUP_UNITS", "STE", "TILE_LIMIT", "Program", "encode",
    "quantize", "supports",
]  # fmt: skip


@triton.jit
def _exponent(x):
    # Largest exponent field and largest magnitude pattern of each row. Integer comparison of the
    # bit patterns sees NaN and infinity, which a floating-point maximum may drop.
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    top = tl.max(bits, axis=1, keep_dims=True)
    # 2^-e and 2^e must both be normal floats.
    field = tl.minimum(tl.maximum(top >> 23, 1), 253)
    return field, top


@triton.jit
def _power(field):
    return (field << 23).to(tl.float32, bitcast=True)


@triton.jit
def _sum_of_squares(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, LOG: tl.constexpr):
    # A tree of neighbours, (ROWS, 1). `tl.sum` adds in an order that depends on the layout, which
    # depends on what else the kernel does: packed and unpacked codes would have other scales.
    a, b = tl.split(tl.reshape(x, (ROWS * WIDTH // 2, 2)))
    s = tl.fma(a, a, b * b)
    for level in tl.static_range(1, LOG):
        a, b = tl.split(tl.reshape(s, ((ROWS * WIDTH) >> (level + 1), 2)))
        s = a + b
    return tl.reshape(s, (ROWS, 1))


@triton.jit
def _encode(t, points_ptr, mids_ptr, LEVELS: tl.constexpr, TABLE: tl.constexpr, LOG: tl.constexpr):
    # Code (int32) and point (float32) nearest to t; `t` counts steps for uniform grids.
    if TABLE:
        # Count of midpoints <= t, by halving; midpoints beyond the last one are +inf.
        code = tl.zeros_like(t).to(tl.int32)
        for s in tl.static_range(LOG):
            probe = tl.load(mids_ptr + code + ((1 << (LOG - 1 - s)) - 1))
            code += tl.where(t >= probe, 1 << (LOG - 1 - s), 0)
        point = tl.load(points_ptr + code)
    elif LEVELS % 2 == 0:
        q = tl.minimum(tl.maximum(tl.floor(t), -(LEVELS // 2)), LEVELS // 2 - 1)
        code = q.to(tl.int32)
        point = q + 0.5
    else:
        q = tl.minimum(tl.maximum(tl.floor(t + 0.5), -(LEVELS // 2)), LEVELS // 2)
        code = q.to(tl.int32)
        point = q
    return code, point


@triton.jit
def _best_of_4(x, WANTED: tl.constexpr, GROUPS: tl.constexpr):
    # (GROUPS, 4): int32, 1 for the WANTED largest of each group.
    even, odd = tl.split(tl.reshape(x, (GROUPS, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    ba, ca, da = (b > a).to(tl.int32), (c > a).to(tl.int32), (d > a).to(tl.int32)
    cb, db, dc = (c > b).to(tl.int32), (d > b).to(tl.int32), (d > c).to(tl.int32)
    a = (ba + ca + da < WANTED).to(tl.int32)
    b = (1 - ba + cb + db < WANTED).to(tl.int32)
    c = (2 - ca - cb + dc < WANTED).to(tl.int32)
    d = (3 - da - db - dc < WANTED).to(tl.int32)
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _select(y, N: tl.constexpr, M: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr,
            WIDTH: tl.constexpr):  # fmt: skip
    # True for the N units of each group of M entries with the largest norm; a unit is an entry, or
    # a pair of adjacent entries. A unit's rank is the number of units that come before it: larger
    # ones, or equal ones of lower index. Every two units are compared once, so the ranks are a
    # permutation, and the count exact, whatever the compiler makes of a norm.
    UNITS: tl.constexpr = M // 2 if PAIRS else M
    WANTED: tl.constexpr = N // 2 if PAIRS else N
    GROUPS: tl.constexpr = ROWS * WIDTH // M
    norm = tl.abs(y)
    if PAIRS:
        a, b = tl.split(tl.reshape(norm, (GROUPS * UNITS, 2)))
        # The larger first: (a, b) and (b, a) are a tie, and the lower index must see it.
        larger, smaller = tl.maximum(a, b), tl.minimum(a, b)
        norm = tl.fma(larger, larger, smaller * smaller)
    if UNITS == 2:
        a, b = tl.split(tl.reshape(norm, (GROUPS, 2)))
        second = (b > a).to(tl.int32)
        kept = tl.join(1 - second, second)
    else:
        kept = _best_of_4(norm, WANTED, GROUPS)
    if PAIRS:
        kept = tl.reshape(kept, (GROUPS * UNITS,))
        kept = tl.join(kept, kept)
    return tl.reshape(kept, (ROWS, WIDTH)) != 0


@triton.jit
def _store_bits(ptr, code, r, chunk, rows, bytes_, BITS: tl.constexpr, ROWS: tl.constexpr,
                WIDTH: tl.constexpr):  # fmt: skip
    # Little-endian within a byte: element i at bit (i % per) * BITS of byte i // per. `code` is 0
    # beyond the width, so the padding bits of a row's last byte are 0.
    PER: tl.constexpr = 8 // BITS
    shift = (tl.arange(0, PER) * BITS)[None, None, :]
    packed = tl.sum(tl.reshape(code, (ROWS, WIDTH // PER, PER)) << shift, axis=2)
    b = chunk * (WIDTH // PER) + tl.arange(0, WIDTH // PER)[None, :]
    tl.store(ptr + r * bytes_ + b, packed.to(tl.uint8), mask=(r < rows) & (b < bytes_))


@triton.jit
def _emit(
    x, chunk, r, sigma, stored_sigma, rows, width,
    values_ptr, codes_ptr, mask_ptr, keep_ptr, points_ptr, mids_ptr,
    code_bytes, mask_bytes, norm, step, threshold, pruned_threshold, zero_code, integer,
    LOG: tl.constexpr, LEVELS: tl.constexpr, TABLE: tl.constexpr, LOG_LEVELS: tl.constexpr,
    OFFSET: tl.constexpr, ESTIMATOR: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, PAIRS: tl.constexpr,
    VALUES: tl.constexpr, CODES: tl.constexpr, BITS: tl.constexpr, INTEGERS: tl.constexpr,
    PACK_MASK: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # Everything after the scale, for one tile x (already scaled by 2^-e). Returns the rows' sums of
    # integers (ROWS, 1), if SUMS.
    c = chunk * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (r < rows) & (c < width)
    y = butterfly(x, LOG, ROWS, WIDTH) * norm
    safe = tl.where(sigma > 0, sigma, 1.0)  # zero and non-finite rows divide 0 by 1
    t = y * tl.div_rn(1.0, safe if TABLE else safe * step)
    code, point = _encode(t, points_ptr, mids_ptr, LEVELS, TABLE, LOG_LEVELS)
    value = point if TABLE else point * step
    if M > 0:
        keep = _select(y, N, M, PAIRS, ROWS, WIDTH)
        code = tl.where(keep, code, zero_code)
        value = tl.where(keep, value, 0.0)
    if ESTIMATOR == 0:
        mask = inside
    elif ESTIMATOR == 1:
        bound = threshold * sigma
        if M > 0:
            bound = tl.where(keep, bound, pruned_threshold * sigma)
        mask = tl.abs(y) <= bound
    else:
        distance = tl.abs(value - y * tl.div_rn(1.0, safe))
        # A zero row lies on the grid (scale 0), a non-finite one nowhere.
        mask = ((distance <= threshold) | (sigma == 0)) & (sigma == sigma)
    mask = mask & inside
    if VALUES:
        out = (value * stored_sigma).to(values_ptr.dtype.element_ty)
        tl.store(values_ptr + r * width + c, out, mask=inside)
    if BITS > 0:
        unsigned = tl.where(inside, code + OFFSET, 0)
        _store_bits(codes_ptr, unsigned, r, chunk, rows, code_bytes, BITS, ROWS, WIDTH)
    elif CODES:
        tl.store(codes_ptr + r * width + c, code.to(codes_ptr.dtype.element_ty), mask=inside)
    sums = tl.zeros((ROWS, 1), tl.int32)
    if SUMS or INTEGERS:
        # Points of these grids are integers times a unit; rounding removes that of the constants.
        integers = tl.floor(point * integer + 0.5).to(tl.int32)
        if M > 0:
            integers = tl.where(keep, integers, 0)
        if INTEGERS:
            tl.store(codes_ptr + r * width + c, integers.to(tl.int8), mask=inside)
        if SUMS:
            sums = tl.sum(tl.where(inside, integers, 0), axis=1, keep_dims=True)
    if PACK_MASK:
        _store_bits(mask_ptr, mask.to(tl.int32), r, chunk, rows, mask_bytes, 1, ROWS, WIDTH)
    else:
        tl.store(mask_ptr + r * width + c, mask.to(tl.uint8), mask=inside)
    if CODES and M > 0:
        if PACK_MASK:
            _store_bits(keep_ptr, (keep & inside).to(tl.int32), r, chunk, rows, mask_bytes, 1,
                        ROWS, WIDTH)  # fmt: skip
        else:
            tl.store(keep_ptr + r * width + c, keep.to(tl.uint8), mask=inside)
    return sums


@triton.jit
def _quantize(
    x_ptr, power_ptr, scale_ptr, values_ptr, codes_ptr, mask_ptr, keep_ptr, sums_ptr, points_ptr,
    mids_ptr, rows, width, code_bytes, mask_bytes,
    norm, count, step, threshold, pruned_threshold, zero_code, integer,
    LOG: tl.constexpr, LEVELS: tl.constexpr, TABLE: tl.constexpr, LOG_LEVELS: tl.constexpr,
    OFFSET: tl.constexpr, ESTIMATOR: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, PAIRS: tl.constexpr,
    VALUES: tl.constexpr, CODES: tl.constexpr, BITS: tl.constexpr, INTEGERS: tl.constexpr,
    PACK_MASK: tl.constexpr, SUMS: tl.constexpr, PRESCALED: tl.constexpr, CHUNKS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, LOG_WIDTH: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    if CHUNKS == 1:
        c = tl.arange(0, WIDTH)[None, :]
        x = tl.load(x_ptr + r * width + c, mask=(r < rows) & (c < width), other=0.0).to(tl.float32)
        field, top = _exponent(x)
        x = x * _power(254 - field)
        squares = _sum_of_squares(x, ROWS, WIDTH, LOG_WIDTH)
    else:
        field = tl.full((ROWS, 1), 1, tl.int32)
        top = tl.zeros((ROWS, 1), tl.int32)
        squares = tl.zeros((ROWS, 1), tl.float32)
        for chunk in range(CHUNKS):
            c = chunk * WIDTH + tl.arange(0, WIDTH)[None, :]
            inside = (r < rows) & (c < width)
            x = tl.load(x_ptr + r * width + c, mask=inside, other=0.0).to(tl.float32)
            new, t = _exponent(x)
            top = tl.maximum(top, t)
            new = tl.maximum(field, new)
            # A power of two rescales the running sum without rounding; 2^-252 and less is 0.
            shrink = _power(tl.maximum(127 + field - new, 1))
            x = x * _power(254 - new)
            squares = squares * shrink * shrink + _sum_of_squares(x, ROWS, WIDTH, LOG_WIDTH)
            field = new
    finite = top < 0x7F800000
    down = _power(254 - field)
    up = _power(field)
    if PRESCALED:
        power = tl.load(power_ptr + r, mask=r < rows, other=1.0)
    else:
        power = tl.full((ROWS, 1), 1.0, tl.float32)
    # Rounding must not push the scale of a row at the end of the range over it.
    sigma = tl.minimum(tl.sqrt_rn(tl.div_rn(squares, count)) * up * power, 3.4028234663852886e38)
    sigma = tl.where(finite, sigma, float("nan"))
    tl.store(scale_ptr + r, sigma, mask=r < rows)
    # Codes are taken against the stored scale, also where storing rounded it (subnormals). Rows
    # whose scale is 0 or NaN are computed as zeros.
    inner = tl.div_rn(sigma, power) * down
    if CHUNKS == 1:
        sums = _emit(
            tl.where(inner > 0, x, 0.0), 0, r, inner, sigma, rows, width,
            values_ptr, codes_ptr, mask_ptr, keep_ptr, points_ptr, mids_ptr,
            code_bytes, mask_bytes, norm, step, threshold, pruned_threshold, zero_code,
            integer, LOG, LEVELS, TABLE, LOG_LEVELS, OFFSET, ESTIMATOR, N, M, PAIRS,
            VALUES, CODES, BITS, INTEGERS, PACK_MASK, SUMS, ROWS, WIDTH,
        )  # fmt: skip
    else:
        sums = tl.zeros((ROWS, 1), tl.int32)
        for chunk in range(CHUNKS):
            c = chunk * WIDTH + tl.arange(0, WIDTH)[None, :]
            inside = (r < rows) & (c < width)
            x = tl.load(x_ptr + r * width + c, mask=inside, other=0.0).to(tl.float32) * down
            sums += _emit(
                tl.where(inner > 0, x, 0.0), chunk, r, inner, sigma, rows, width,
                values_ptr, codes_ptr, mask_ptr, keep_ptr, points_ptr, mids_ptr,
                code_bytes, mask_bytes, norm, step, threshold, pruned_threshold, zero_code,
                integer, LOG, LEVELS, TABLE, LOG_LEVELS, OFFSET, ESTIMATOR, N, M, PAIRS,
                VALUES, CODES, BITS, INTEGERS, PACK_MASK, SUMS, ROWS, WIDTH,
            )  # fmt: skip
    if SUMS:
        tl.store(sums_ptr + r, sums, mask=r < rows)


@dataclass(frozen=True)
class Program:
    """What `quantize` computes, in numbers and tensors; the caller's policy ends here.

    order, base: the transform, as in `hadamard`; order 1 for none.
    levels, step: a uniform grid; or points (L,) and midpoints (2**ceil(log2 L) - 1,) float32 on the
    input's device, the latter padded with +inf, for a table (step is then not used).
    zero_code: the code of 0, which pruned entries get; offset: what packing adds to a code.
    bits: of a packed code (1, 2, 4 or 8).
    estimator: STE, EDGE (|y| <= threshold sigma; pruned_threshold for pruned entries) or DISTANCE
    (|Q(y) - y| <= threshold sigma).
    group: None, or (n, m, pairs).
    """

    order: int
    base: torch.Tensor | None
    levels: int
    step: float
    points: torch.Tensor | None
    midpoints: torch.Tensor | None
    zero_code: int
    offset: int
    bits: int
    estimator: int
    threshold: float
    pruned_threshold: float
    group: tuple[int, int, bool] | None


def supports(program: Program) -> bool:
    """Whether the kernel has this sparsity group: one of 2 or 4 entries, or pairs of entries."""
    if program.group is None:
        return True
    _, m, pairs = program.group
    return m // (2 if pairs else 1) in GROUP_UNITS


def _shape(width: int, order: int) -> tuple[int, int, int]:
    """(ROWS, WIDTH, CHUNKS) of a program: CHUNK elements at a time, whole rows where they fit."""
    w = max(16, order, min(power_of_two(width), CHUNK))
    return CHUNK // w, w, quotient(width, w)


def _run(
    x: torch.Tensor,
    p: Program,
    *,
    values: bool,
    codes: bool,
    bits: int,
    pack_mask: bool,
    integers: bool = False,
    integer: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(values, codes, scale, mask, keep, sums); what is not asked for has shape (0,).

    bits: of a packed code, 0 for a byte each. pack_mask: mask and keep as bits.
    integer: what makes a point an integer (of a uniform grid, in steps): asks for sums. integers:
    store these in place of codes.
    """
    if not supports(p):
        raise ValueError(f"group {p.group} is not one of {GROUP_UNITS} entries or pairs")
    x, dtype = readable(x), x.dtype
    lead, d = x.shape[:-1], x.shape[-1]
    rows = math.prod(lead)
    device, sparse = x.device, p.group is not None
    mask_bytes, code_bytes = -(-d // 8), -(-d * bits // 8)
    wide = torch.int8 if p.points is None or p.levels <= 128 or integers else torch.uint8

    def out(wanted: bool, last: int, dtype: torch.dtype) -> torch.Tensor:
        return outputs.empty((*lead, last) if wanted else (0,), dtype, device)

    value_out = out(values, d, stored(dtype))
    code_out = out(codes, code_bytes if bits else d, torch.uint8 if bits else wide)
    scale = out(True, 1, torch.float32)
    mask = out(True, mask_bytes if pack_mask else d, torch.uint8)
    keep = out(codes and sparse and not integers, mask_bytes if pack_mask else d, torch.uint8)
    sums = out(integer is not None, 1, torch.int32)
    if not x.numel():
        scale.zero_()  # a row without columns is a row of zeros
        sums.zero_()
    else:
        power, squares, norm = None, d, p.order**-0.5
        order = factor(p.order, p.base)
        if p.base is not None or order > CHUNK:
            x, power = prescale(x)
            log = order.bit_length() - 1
            # What these kernels leave of the normalisation is the root of `over`: it is divided out
            # once, with that of the kernel's own butterfly.
            over = 1 if p.base is None else p.base.shape[0]
            if order > CHUNK:
                x = launch_tile(x, order, 0.5 ** (log // 2), torch.float32, near_one=True)
                over, norm = over * 2 ** (log % 2), (over * 2 ** (log % 2)) ** -0.5
            if p.base is not None:
                x = launch_base(x, p.base, order, 1.0, torch.float32)
            squares, order = d * over, 1 if order > CHUNK else order
        n, group, pairs = p.group or (0, 0, False)
        r, w, chunks = _shape(d, order)
        nothing = scale  # a pointer that is never followed
        _quantize[(quotient(rows, r),)](
            x, nothing if power is None else power, scale, value_out, code_out, mask, keep, sums,
            nothing if p.points is None else p.points,
            nothing if p.midpoints is None else p.midpoints,
            rows, d, code_bytes, mask_bytes,
            norm, float(squares), p.step, p.threshold, p.pruned_threshold, p.zero_code,
            0.0 if integer is None else float(integer),
            order.bit_length() - 1, p.levels, p.points is not None,
            (p.levels - 1).bit_length(), p.offset, p.estimator, n, group, pairs,
            values, codes and not integers, bits, integers, pack_mask, integer is not None,
            power is not None, chunks, r, w, w.bit_length() - 1, num_warps=1,
        )  # fmt: skip
    return value_out.to(dtype), code_out, scale, mask, keep, sums


def quantize(
    x: torch.Tensor, program: Program, *, values: bool, codes: bool, packed: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize x (..., d) float32, bfloat16 or float16, d divisible by the order and the group.

    Returns (values, codes, scale, mask, keep); what is not asked for has shape (0,).
    values: (..., d) of x's dtype. scale: (..., 1) float32, sigma.
    codes: (..., d) int8 (uint8 for tables of more than 128 levels), or packed (..., ceil(d bits/8))
    uint8. mask: (..., d) bool, or packed bits (..., ceil(d/8)) uint8. keep: like mask, for groups.
    `packed` packs codes, mask and keep. Without codes the mask is packed too if `packed`.
    """
    bits = program.bits if codes and packed else 0
    value, code, scale, mask, keep, _ = _run(
        x, program, values=values, codes=codes, bits=bits, pack_mask=packed
    )
    if packed:
        return value, code, scale, mask, keep
    return value, code, scale, mask.view(torch.bool), keep.view(torch.bool)


def encode(
    x: torch.Tensor, program: Program, *, kind: str, integer: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize x (..., d) to an operand of an integer product: (operand, scale, mask, sums).

    operand: (..., ceil(d/8)) uint8 for kind "bits"; (..., d) int8 for "integers", point * integer
    (uniform grids: in steps), 0 where pruned; and for "codes", the codes. scale: (..., 1) float32.
    mask: (..., ceil(d/8)) uint8. sums: (..., 1) int32 of point * integer, whatever the kind.
    """
    _, code, scale, mask, _, sums = _run(
        x, program, values=False, codes=True, bits=1 if kind == "bits" else 0, pack_mask=True,
        integers=kind == "integers", integer=integer,
    )  # fmt: skip
    return code, scale, mask, sums
