"""The judges, T0 to T7: is what a lane wrote admissible, by a bound that was derived?

Each takes what the lane really produced in the stage before, lifts it to float64, asks the oracle
what the stage should be, and gives a `Verdict`. There is one place where right and wrong are
decided, and this is it.

`sums` says how an implementation takes the sums of a transform; our lanes are butterflies.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quest import operands
from quest.quantizer import Quantizer
from quest.recipes import Recipe
from quest.reference import bounds, compression, hadamard, packing, prologue, quantize
from quest.reference import grids as reference_grids
from quest.reference.bounds import BUTTERFLY, Sums

from . import oracle
from .oracle import Array, lift
from .verdict import Verdict, inconclusive, one_sided, ratios, spread, worst


def _at(shape: tuple[int, ...], index: int) -> str:
    return str(tuple(int(i) for i in np.unravel_index(index, shape)))


def form(stage: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Verdict:
    """Shape and dtype of an output."""
    if tuple(t.shape) != shape or t.dtype != dtype:
        told = f"has shape {tuple(t.shape)} and dtype {t.dtype}, not {shape} and {dtype}"
        return Verdict(stage, 0, math.inf, failure=told)
    return Verdict(stage, 0)


def exact(stage: str, actual: Array, expected: Array) -> Verdict:
    """T0: bit for bit."""
    if actual.shape != expected.shape:
        told = f"shape {actual.shape}, not {expected.shape}"
        return Verdict(stage, 0, math.inf, failure=told)
    wrong = np.flatnonzero(np.ravel(actual != expected))
    if wrong.size:
        i = int(wrong[0])
        told = (
            f"{wrong.size} of {actual.size} differ; at {_at(actual.shape, i)} it is "
            f"{actual.flat[i]}, not {expected.flat[i]}"
        )
        return Verdict(stage, actual.size, math.inf, failure=told)
    return Verdict(stage, actual.size)


def bits(t: Tensor) -> Array:
    """The bit patterns of a float tensor, for comparisons that NaN must pass."""
    kind = torch.int32 if t.dtype == torch.float32 else torch.int16
    return lift(t.contiguous().view(kind))


def close(
    stage: str, actual: Tensor, expected: Array, bound: Array, free: Array | None = None
) -> Verdict:
    """T1: |actual - expected| <= bound for each element, with the dtype's own infinities and NaN.

    NaN must stand exactly where it is expected. Where the expected value reaches the end of the
    dtype's range within its bound, an infinity of its sign is admissible. free: where any infinity
    or NaN is.
    """
    a = lift(actual)
    if a.shape != expected.shape:
        return Verdict(stage, 0, math.inf, failure=f"shape {a.shape}, expected {expected.shape}")
    largest = bounds.LARGEST[oracle.dtype_name(actual.dtype)]
    with np.errstate(invalid="ignore", over="ignore"):
        over = (
            np.isinf(a) & (np.abs(expected) + bound >= largest) & (np.sign(a) == np.sign(expected))
        )
        same = (np.isnan(a) & np.isnan(expected)) | (a == expected) | over
        same = same if free is None else same | (free & ~np.isfinite(a))
        error = np.where(same, 0.0, np.abs(a - expected))
    error = np.where(np.isnan(error), math.inf, error)
    ratio, i = worst(error, bound)
    shares = spread(ratios(error, bound))
    failure = None
    if ratio > 1:
        failure = (
            f"at {_at(a.shape, i)} it is {float(a.flat[i])!r}, "
            f"expected {float(expected.flat[i])!r} within {bound.flat[i]:.3e}: "
            f"{ratio:.3g} times the bound"
        )
    return Verdict(stage, a.size, ratio, failure=failure, spread=shares)


def rotated(x: Tensor, y: Tensor, order: int, transpose: bool, sums: Sums = BUTTERFLY) -> Verdict:
    """T1 for x H or x H^T, stored as y's dtype; infinities and NaN spread as sums spread them."""
    x64 = lift(x)
    turn = hadamard.apply_transpose if transpose else hadamard.apply
    with np.errstate(invalid="ignore", over="ignore"):
        expected = turn(x64, order)
        bound = bounds.output(
            expected, bounds.rotation(x64, order, transpose, sums), oracle.dtype_name(y.dtype)
        )
    return close("transform", y, expected, bound)


def scaled(x: Tensor, scale: Tensor, order: int, sums: Sums = BUTTERFLY) -> Verdict:
    """T2: sigma, with zero, non-finite and underflowing rows by their rule."""
    x64 = oracle.rows(lift(x))
    sigma = quantize.scale(x64)
    with np.errstate(invalid="ignore"):
        bound = bounds.scale(np.where(np.isnan(sigma), 0.0, x64), order, sigma, sums)
    bound = np.where(sigma == 0, 0.0, bound)
    return close("scale", scale.reshape(-1, 1), sigma, bound)


def gated(gate: Tensor, value: Tensor, x: Tensor, between: torch.dtype | None = None) -> Verdict:
    """T1: x = silu(gate) value, computed in float32 and stored in its dtype.

    between: the dtype that silu is stored in before the product, where it is. Where an input is not
    finite, x is not either; which of infinity and NaN it is depends on the order of the products.
    """
    g, v = lift(gate), lift(value)
    stored = None if between is None else oracle.dtype_name(between)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = prologue.gated(g, v)
        bound = bounds.output(expected, bounds.gated(g, v, stored), oracle.dtype_name(x.dtype))
    return close("gated", x, expected, bound, free=~(np.isfinite(g) & np.isfinite(v)))


def gated_backward(
    grad: Tensor, gate: Tensor, value: Tensor, to_gate: Tensor, to_value: Tensor
) -> list[Verdict]:
    """T1: the gradients of gate and value for that of silu(gate) value, each stored in its dtype.

    As in `gated`, where an input is not finite; nor need the gate's gradient be where the product
    of grad and value leaves float32.
    """
    d, g, v = lift(grad), lift(gate), lift(value)
    with np.errstate(invalid="ignore", over="ignore"):
        expected, _ = prologue.gated_backward(d, g, v)
        bound = bounds.output(
            expected, bounds.gated_backward(d, g, v), oracle.dtype_name(to_gate.dtype)
        )
        finite = np.isfinite(d) & np.isfinite(g) & np.isfinite(v)
        free = ~finite | (np.abs(d * v) >= bounds.LARGEST["float32"])
    return [
        close("gradient of the gate", to_gate, expected, bound, free),
        dataclasses.replace(gated(gate, grad, to_value), stage="gradient of its value"),
    ]


def added(x: Tensor, residual: Tensor, h: Tensor) -> Verdict:
    """T0: h = residual + x, rounded once; of 16 bits, float32 in between changes nothing."""
    expected = lift((residual.double() + x.double()).to(h.dtype))
    return close("added", h, expected, np.zeros(expected.shape))


def turned_heads(y: Tensor, cos: Tensor, sin: Tensor, turned: int, h: Tensor) -> Verdict:
    """T0: h is y (M, N), of its first `turned` columns each head turned in float32, rounded once.

    cos, sin: (T, d_head / 2) float32; row r has the angles of row r % T. No product is contracted.
    """
    rows, half = np.arange(len(y)) % max(1, len(cos)), cos.shape[1]
    expected = y.float().numpy().copy()
    c, s = cos.numpy()[rows], sin.numpy()[rows]
    with np.errstate(invalid="ignore", over="ignore"):
        for first in range(0, turned, 2 * half):
            low, high = (
                expected[:, at : at + half].copy() for at in (first, first + half)
            )  # fmt: skip
            expected[:, first : first + half] = low * c - high * s
            expected[:, first + half : first + 2 * half] = high * c + low * s
    stored = lift(torch.from_numpy(expected).to(h.dtype))
    return close("turned", h, stored, np.zeros(stored.shape))


def normed(
    h: Tensor, weight: Tensor, eps: float, rows: Tensor, between: torch.dtype | None = None
) -> Verdict:
    """T1: rows = (h / sqrt(mean(h^2) + eps)) weight, computed in float32 and stored in their dtype.

    between: the dtype that is stored in before the weight, where it is. A row of h that is not
    finite may hold any infinity and NaN; where squares leave float32, it may be 0 as a whole.
    """
    h64, w64 = lift(h), lift(weight)
    stored = None if between is None else oracle.dtype_name(between)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = prologue.normed(h64, w64, eps)
        bound = bounds.output(
            expected, bounds.normed(h64, w64, eps, stored), oracle.dtype_name(rows.dtype)
        )
    zero = bounds.squares_overflow(h64) & (lift(rows) == 0).all(-1, keepdims=True)
    free = np.broadcast_to(~np.isfinite(h64).all(-1, keepdims=True), h64.shape)
    return close("normed", rows, np.where(zero, 0.0, expected), bound, free)


def _cell(codes: Array, grid: reference_grids.Grid) -> tuple[Array, Array]:
    """[low, high): the values that have these codes."""
    ends = np.concatenate([[-np.inf], grid.midpoints, [np.inf]])
    index = codes - quantize.code_range(grid)[0]
    return ends[index], ends[index + 1]


def _regular(scale: Array) -> Array:
    """Rows with a scale to divide by."""
    return np.isfinite(scale) & (scale > 0)


def coded(
    x: Tensor,
    q: Quantizer,
    codes: Tensor,
    scale: Tensor,
    keep: Tensor | None = None,
    *,
    conclusive: bool = True,
    sums: Sums = BUTTERFLY,
) -> Verdict:
    """T3: every code is the code of some t within delta of the exact y / sigma.

    keep: the selection that the lane made; pruned entries must carry the code of 0.
    conclusive: apply the rules on ambiguous elements (off for corpora that are made of ties).
    """
    arguments = oracle.arguments(q, x.shape[-1])
    grid, order = arguments["grid"], arguments["block"]
    x64, c, s = oracle.rows(lift(x)), oracle.rows(lift(codes)), lift(scale).reshape(-1, 1)
    low, high = quantize.code_range(grid)
    if c.size and (c.min() < low or c.max() > high):
        told = f"codes from {c.min()} to {c.max()}, outside {low} to {high}"
        return Verdict("codes", c.size, math.inf, failure=told)
    regular = _regular(s)
    safe = np.where(regular, s, 1.0)
    x64 = np.where(regular, x64, 0.0)
    z = hadamard.apply(x64, order) / safe
    delta = np.where(regular, bounds.code_margin(x64, order, safe, sums), 0.0)
    if keep is not None:
        kept = oracle.rows(lift(keep))
        z, delta = np.where(kept, z, 0.0), np.where(kept, delta, 0.0)
    lowest, highest = quantize.encode(z - delta, grid), quantize.encode(z + delta, grid)
    begin, end = _cell(c, grid)
    admissible = (c >= lowest) & (c <= highest)
    with np.errstate(invalid="ignore"):
        distance = np.maximum(np.maximum(begin - z, z - end), 0.0)
    # A value on the upper end of a cell is not in it: no distance, but wrong where delta is 0.
    distance = np.where(admissible, np.minimum(distance, delta), np.maximum(distance, 5e-324))
    ratio, _ = worst(distance, delta)
    open_ = highest > lowest
    nominal = quantize.encode(z, grid)
    up, down = int((c > nominal).sum()), int((c < nominal).sum())
    ambiguous = int(open_.sum())
    failure = None
    wrong = np.flatnonzero(~admissible)
    if wrong.size:
        i = int(wrong[0])
        failure = (
            f"{wrong.size} of {c.size} codes are wrong; at {_at(c.shape, i)} it is {c.flat[i]} for "
            f"y / sigma = {float(z.flat[i])!r} within {delta.flat[i]:.3e}, admissible "
            f"{lowest.flat[i]} to {highest.flat[i]}"
        )
        ratio = max(ratio, math.nextafter(1.0, 2.0))
    elif conclusive and inconclusive(ambiguous, c.size):
        failure = f"inconclusive: {ambiguous} of {c.size} codes are ambiguous"
    elif conclusive and one_sided(up, down):
        failure = f"one-sided: {up} ambiguous codes went up, {down} down"
    return Verdict("codes", c.size, ratio, ambiguous, up, down, failure)


def masked(
    x: Tensor,
    q: Quantizer,
    codes: Tensor,
    scale: Tensor,
    mask: Tensor,
    keep: Tensor | None = None,
    sums: Sums = BUTTERFLY,
) -> Verdict:
    """T4: (code, mask) is a pair that some t within delta, and some threshold within its own error,
    produces. Rows without a scale follow their rule: 1 for zeros, 0 for non-finite (1 under STE).
    """
    arguments = oracle.arguments(q, x.shape[-1])
    grid, order = arguments["grid"], arguments["block"]
    kind, parameter = arguments["estimator"], arguments["parameter"]
    x64, c, s = oracle.rows(lift(x)), oracle.rows(lift(codes)), lift(scale).reshape(-1, 1)
    m = oracle.rows(lift(mask))
    kept = np.ones(m.shape, bool) if keep is None else oracle.rows(lift(keep))
    regular = _regular(s)
    safe = np.where(regular, s, 1.0)
    x64 = np.where(regular, x64, 0.0)
    z = hadamard.apply(x64, order) / safe
    delta = np.where(regular, bounds.code_margin(x64, order, safe, sums), 0.0)
    # The t within delta that also have this code; a pruned entry's code says nothing of t.
    begin, end = _cell(c, grid)
    low = np.where(kept, np.maximum(z - delta, begin), z - delta)
    high = np.where(kept, np.minimum(z + delta, end), z + delta)
    high = np.maximum(low, high)
    point = np.where(kept, quantize.decode(c, grid), 0.0)
    edge = kind == "clip" or (kind == "trust" and parameter >= 1)
    if kind == "ste":
        threshold = np.full(m.shape, np.inf)
    elif kind == "clip":
        threshold = np.full(m.shape, parameter * grid.outer)
    elif edge:
        threshold = np.where(kept, grid.outer, 0.0) + parameter * grid.half_gap
    else:
        threshold = np.full(m.shape, parameter * grid.half_gap)
    centre = np.zeros(m.shape) if edge else point
    nearest = np.where((low <= centre) & (centre <= high), 0.0,
                       np.minimum(np.abs(low - centre), np.abs(high - centre)))  # fmt: skip
    farthest = np.maximum(np.abs(low - centre), np.abs(high - centre))
    finite = np.where(np.isfinite(threshold), threshold, 0.0)  # STE has an infinite one
    slack = bounds.gamma(bounds.THRESHOLD_ROUNDINGS, bounds.U32) * finite
    if not edge:
        # The point in float32 (constant and product), and the difference.
        slack = slack + bounds.gamma(3, bounds.U32) * (np.abs(point) + finite)
    past = np.abs(z - centre) - threshold
    may, must_not = nearest <= threshold + slack, farthest > threshold - slack
    rule = np.where(s == 0, True, kind == "ste")
    wrong = np.where(regular, np.where(m, ~may, ~must_not), m != rule)
    ambiguous = int((regular & may & must_not).sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        beyond = np.where(m, past, -past)
        ratio = np.where(beyond > 0, beyond / (delta + slack), 0.0)
    settled = np.where(regular & np.isfinite(ratio), ratio, 0.0)
    peak = float(settled.max(initial=0.0))
    failure = None
    bad = np.flatnonzero(wrong)
    if bad.size:
        i = int(bad[0])
        failure = (
            f"{bad.size} of {m.size} mask bits are wrong; at {_at(m.shape, i)} it is "
            f"{bool(m.flat[i])} for y / sigma = {float(z.flat[i])!r}, code {c.flat[i]}, threshold "
            f"{float(threshold.flat[i])!r}"
        )
        peak = max(peak, math.nextafter(1.0, 2.0))
    else:
        peak = min(peak, 1.0)
    return Verdict("mask", m.size, peak, ambiguous, failure=failure)


def selected(x: Tensor, q: Quantizer, keep: Tensor, sums: Sums = BUTTERFLY) -> Verdict:
    """T5: exact counts, min(kept) >= max(dropped) within the bound, exact ties by the rule."""
    name, n, m = oracle.pattern(q) or ("", 0, 0)
    order = q.transform.order(x.shape[-1])
    x64, k = oracle.rows(lift(x)), oracle.rows(lift(keep)).astype(bool)
    finite = np.isfinite(x64).all(-1, keepdims=True)
    x64 = np.where(finite, x64, 0.0)
    y, b = hadamard.apply(x64, order), bounds.rotation(x64, order, sums=sums)
    sums_exact = bounds.settled(x64, order, sums)
    unit = 2 if name == "pairwise" else 1
    groups = (len(k), k.shape[1] // m, m // unit, unit)
    count = k.reshape(groups)
    if (count.any(-1) != count.all(-1)).any():
        return Verdict("selection", k.size, math.inf, failure="half a pair is kept")
    chosen = count.all(-1)
    if (chosen.sum(-1) != n // unit).any():
        told = f"a group of {m} does not keep {n}"
        return Verdict("selection", k.size, math.inf, failure=told)
    # Row-wise scaling by a power of two, as in `bounds.code_margin`, may lose what is this small.
    top = np.abs(x64).max(-1, keepdims=True, initial=0.0)[:, :, None]
    lost = top * 2.0 ** (-149 if unit == 1 else -74)
    norm = np.sqrt((y.reshape(groups) ** 2).sum(-1))
    slack = np.sqrt((b.reshape(groups) ** 2).sum(-1)) + 2 * bounds.U32 * norm * (unit == 2)
    slack = slack + np.where(norm == 0, 0.0, lost)
    least = np.where(chosen, norm + slack, np.inf).min(-1)
    most = np.where(chosen, -np.inf, norm - slack).max(-1)
    bad = np.flatnonzero(least < most)
    if bad.size:
        told = f"{bad.size} groups drop a larger {'pair' if unit == 2 else 'entry'} than they keep"
        return Verdict("selection", k.size, math.inf, failure=told)
    # Ties that any summation order sees as ties.
    size = np.sort(np.abs(y.reshape(groups)), axis=-1)
    tied = np.asarray((size[:, :, :, None] == size[:, :, None, :]).all(-1))
    settled = np.asarray(sums_exact.reshape(groups).all((-1, -2)))
    tied &= settled[:, :, None, None]
    later = np.tril(np.ones((m // unit, m // unit), bool), -1)  # row index after column index
    taken = np.asarray(chosen)
    broken = tied & later & taken[:, :, :, None] & ~taken[:, :, None, :]
    if broken.any():
        told = f"{int(broken.sum())} exact ties keep the higher index"
        return Verdict("selection", k.size, math.inf, failure=told)
    with np.errstate(divide="ignore", invalid="ignore"):
        over = np.where(chosen, np.inf, norm).max(-1, where=~chosen, initial=0.0)
        under = np.where(chosen, norm, np.inf).min(-1)
        ratio = np.where(over > under, (over - under) / (2 * slack.max(-1)), 0.0)
    return Verdict("selection", k.size, float(np.nan_to_num(ratio).max(initial=0.0)))


def pruned(q: Quantizer, codes: Tensor, keep: Tensor) -> Verdict:
    """T0: pruned entries carry the code of 0."""
    zero = int(quantize.encode([0.0], oracle.grid(q.require_grid()))[0])
    c, k = lift(codes), lift(keep)
    return exact("pruned codes", np.where(k, zero, c), np.full(c.shape, zero))


def dequantized(
    q: Quantizer, codes: Tensor, scale: Tensor, keep: Tensor | None, values: Tensor
) -> Verdict:
    """T6: point(code) * sigma as the values' dtype; pruned entries and zero rows exactly 0."""
    grid = oracle.grid(q.require_grid())
    s = lift(scale)
    kept = np.ones(codes.shape, bool) if keep is None else lift(keep)
    points = np.where(kept, quantize.decode(lift(codes), grid), 0.0)
    with np.errstate(invalid="ignore"):
        expected = points * s
    error = bounds.gamma(bounds.VALUE_ROUNDINGS, bounds.U32) * np.abs(expected) + bounds.ETA32
    bound = bounds.output(expected, error, oracle.dtype_name(values.dtype))
    bound = np.where(expected == 0, 0.0, bound)
    return close("values", values, expected, bound)


def packed(q: Quantizer, codes: Tensor, data: Tensor) -> Verdict:
    """T0: the bytes of packed codes."""
    grid = oracle.grid(q.require_grid())
    unsigned = packing.to_unsigned(lift(codes), grid)
    bits = packing.storage_bits(grid.levels)
    return exact("packed codes", lift(data), packing.pack(unsigned, bits).astype(np.int64))


def packed_bits(stage: str, flags: Tensor, data: Tensor) -> Verdict:
    """T0: the bytes of a packed mask."""
    return exact(stage, lift(data), packing.pack_mask(lift(flags)).astype(np.int64))


def transposed(
    grad: Tensor, mask: Tensor, dx: Tensor, order: int, sums: Sums = BUTTERFLY
) -> Verdict:
    """T7 for the fused backward, given the packed mask: (grad * mask) H^T."""
    bits = packing.unpack_mask(mask.numpy(), grad.shape[-1]).astype(bool)
    taken = torch.where(torch.from_numpy(bits), grad.double(), 0.0)
    verdict = rotated(taken, dx, order, True, sums)
    return dataclasses.replace(verdict, stage="backward")


def encoded(
    q: Quantizer, kind: str, codes: Tensor, keep: Tensor | None, operand: Tensor, sums: Tensor
) -> list[Verdict]:
    """T0: an operand's integers, times the unit, are the points of the codes; and their sums."""
    made = operands.form(q.require_grid(), kind)
    points = quantize.decode(lift(codes), oracle.grid(q.require_grid()))
    if keep is not None:
        points = np.where(lift(keep), points, 0.0)
    integers = whole(operand, kind, codes.shape[-1])
    # The integer nearest to its point is expected. 1e-6 is a window and no tolerance: neighbours
    # are a unit apart, so an integer this near its point is the nearest one.
    far = np.abs(integers * made.unit - points) > 1e-6 * made.unit
    expected = np.where(far, np.rint(points / made.unit), integers).astype(np.int64)
    stored = integers
    if kind == "bits":
        # The bytes: padding bits that are set would be counted.
        stored, expected = lift(operand), packing.pack_mask(points > 0).astype(np.int64)
    return [
        exact("operand", stored, expected),
        exact("operand sums", lift(sums), integers.sum(-1, keepdims=True)),
    ]


def compressed(operand: Tensor, values: Tensor, metadata: Tensor) -> list[Verdict]:
    """T0 of the compressed form of an operand (rows, d), and of what comes back of it."""
    kept, words = compression.compress(operand.numpy())
    stages = ("compressed values", "compressed metadata", "decompressed")
    found = [
        form(stages[0], values, kept.shape, torch.int8),
        form(stages[1], metadata, words.shape, torch.int32),
    ]
    if any(v.failure for v in found):
        return found
    made = metadata.numpy().astype(np.int64) & 0xFFFFFFFF
    back = compression.decompress(values.numpy(), made)
    pairs = ((values.numpy(), kept), (made, words), (back, operand.numpy()))
    return [exact(stage, *pair) for stage, pair in zip(stages, pairs, strict=True)]


def whole(operand: Tensor, kind: str, width: int) -> Array:
    """The integers (..., width) int64 of an operand, by the oracle's unpacking."""
    if kind == "bits":
        return 2 * packing.unpack_mask(operand.numpy(), width).astype(np.int64) - 1
    return lift(operand) * 2 + 1 if kind == "codes" else lift(operand)


def accumulated(a: Tensor, b: Tensor, made: Tensor) -> Verdict:
    """T0: int32 sums of products of int8, or counts of the bits that two rows share."""
    if a.dtype == torch.uint8:
        width = 8 * a.shape[-1]
        left, right = (packing.unpack_mask(t.numpy(), width).astype(np.int64) for t in (a, b))
    else:
        left, right = lift(a), lift(b)
    # Sums of integers below 2^53 are exact in float64, and far faster than in int64.
    expected = (left.astype(np.float64) @ right.T.astype(np.float64)).astype(np.int64)
    return exact("accumulators", lift(made), expected)


def multiplied(
    integers: tuple[Array, Array],
    units: tuple[float, float],
    scales: tuple[Tensor, Tensor],
    bias: Tensor | None,
    y: Tensor,
) -> Verdict:
    """T6: the exact sum of integers, times both units and both scales, plus a bias.

    The bias is added with the last product, in one rounding or two.
    """
    expected, bound = _product(integers, units, scales, bias, oracle.dtype_name(y.dtype))
    return close("product", y, expected, bound)


def gated_product(
    integers: tuple[Array, Array],
    units: tuple[float, float],
    scales: tuple[Tensor, Tensor],
    bias: Tensor | None,
    x: Tensor,
) -> Verdict:
    """T6: silu(gate) value of the halves of `multiplied`'s y, each stored in x's dtype before.

    As in `gated`, where one of them may leave the dtype.
    """
    name = oracle.dtype_name(x.dtype)
    y, off = _product(integers, units, scales, bias, name)
    (g, v), (g_off, v_off) = np.split(y, 2, -1), np.split(off, 2, -1)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = prologue.gated(g, v)
        bound = bounds.output(expected, bounds.gated_near(g, v, (g_off, v_off)), name)
        free = np.maximum(np.abs(g) + g_off, np.abs(v) + v_off) >= bounds.LARGEST[name]
    return close("gated product", x, expected, bound, free)


def _product(
    integers: tuple[Array, Array],
    units: tuple[float, float],
    scales: tuple[Tensor, Tensor],
    bias: Tensor | None,
    dtype: str,
) -> tuple[Array, Array]:
    """What `multiplied` expects of a product that is stored in this dtype, and its bound."""
    total = integers[0].astype(np.float64) @ integers[1].T.astype(np.float64)
    factor = units[0] * units[1]
    with np.errstate(invalid="ignore", over="ignore"):
        plain = total * factor * lift(scales[0]) * lift(scales[1]).T
        error = bounds.gamma(bounds.PRODUCT_ROUNDINGS, bounds.U32) * np.abs(plain)
        # Each product of the chain may be subnormal, and is then multiplied by what is left.
        rest = np.abs(lift(scales[1]).T)
        error = error + bounds.ETA32 * (1 + rest * (1 + np.abs(total)))
        expected = plain
        if bias is not None:
            expected = plain + lift(bias)
            error = error + bounds.U32 * (np.abs(expected) + error)
        return expected, bounds.output(expected, error, dtype)


def values_product(
    dtype: torch.dtype, bias: Tensor | None, out: dict[str, Tensor], unit: float, stage: str
) -> Verdict:
    """T1 of y = x_hat w_hat^T + bias, given the values that were multiplied."""
    name = oracle.dtype_name(dtype)
    xh, wh = lift(out["x_hat"]), lift(out["w_hat"])
    y = xh @ wh.T
    error = bounds.gamma(xh.shape[-1], unit) * (np.abs(xh) @ np.abs(wh).T)
    if bias is not None:
        b = lift(bias)
        # The product may be rounded to the dtype before the bias is added.
        error = error + bounds.UNIT[name] * (np.abs(y) + error) + bounds.U32 * np.abs(b)
        y = y + b
    return close(stage, out["y"], y, bounds.output(y, error, name))


def layer(
    x: Tensor,
    w: Tensor,
    grad: Tensor,
    bias: Tensor | None,
    recipe: Recipe,
    out: dict[str, Tensor],
    masks: tuple[Tensor | None, Tensor | None],
    unit: float,
    parts: Sequence[int] = (),
    sums: Sums = BUTTERFLY,
) -> list[Verdict]:
    """T1 and T7 for the layer, given the operands that it multiplied and their masks.

    masks: bool, of x and of w; None where an operand is not quantized. unit: the unit roundoff of
    the product's accumulation, 2^-24, or 2^-23 where tensor cores truncate. parts: the rows of w of
    each of several layers on this x, where it is not one. sums: how gradients are rotated back.
    """
    dtype = oracle.dtype_name(x.dtype)
    g, xh, wh = lift(grad), lift(out["x_hat"]), lift(out["w_hat"])
    found = [values_product(x.dtype, bias, out, unit, "layer y")]
    order = recipe.weight.transform.order(x.shape[-1])
    for name, a, m, mask in (("dx", g, wh, masks[0]), ("dw", g.T, xh, masks[1])):
        chosen = np.ones(out[name].shape, bool) if mask is None else lift(mask)
        inner = np.where(chosen, a @ m, 0.0)
        # The product is stored in the dtype before it is rotated back; where the gradients of
        # several layers reach x, each of them and each of their sums.
        ends = np.cumsum(parts)[:-1] if name == "dx" else ()
        pieces = list(zip(np.split(a, ends, -1), np.split(m, ends), strict=True))
        products = [p @ r for p, r in pieces]
        first = bounds.stored_sum(
            products,
            [bounds.gamma(p.shape[-1], unit) * (np.abs(p) @ np.abs(r)) for p, r in pieces],
            dtype,
        )
        # An infinity on the way makes a whole block infinite or NaN.
        over = chosen & (sum(map(np.abs, products)) + first >= bounds.LARGEST[dtype])
        free = bounds.absolute_sum(over.astype(np.float64), order) > 0
        first = np.where(chosen, first, 0.0)
        spread = bounds.absolute_sum(first, order)
        largest = np.abs(inner) + first
        k = bounds.additions(order) if sums.roundings is None else sums.roundings
        k += bounds.normalisations(order)
        turn = bounds.gamma(k, bounds.U32) * bounds.absolute_sum(largest, order) if k else 0.0
        expected = hadamard.apply_transpose(inner, order)
        bound = bounds.output(expected, spread + turn, dtype)
        found.append(close(f"layer {name}", out[name], expected, bound, free))
    if bias is not None:
        total = g.sum(0)
        error = bounds.gamma(len(g), unit) * np.abs(g).sum(0)
        found.append(close("layer db", out["db"], total, bounds.output(total, error, dtype)))
    return found


def adjoint(
    x: Tensor, w: Tensor, grad: Tensor, out: dict[str, Tensor], order: int, unit: float
) -> Verdict:
    """T7: <g, J v> = <J^T g, v>, for a layer that rotates and neither rounds nor masks.

    There y = (x H)(w H)^T = x w^T is bilinear, so <g, y>, <dx, x> and <dw, w> are one number. Each
    is a sum over the same products |g| |x H| |w H|, rounded once an addition on its way (the
    product, two rotations) and once for each time that a result is stored.
    """
    u_out = bounds.UNIT[oracle.dtype_name(x.dtype)]
    k = 2 * (bounds.additions(order) + bounds.normalisations(order))
    n = max(x.shape[-1], *grad.shape)
    share = bounds.gamma(k, bounds.U32) + bounds.gamma(n, unit) + bounds.gamma(4, u_out)
    x64, w64, g64 = np.abs(lift(x)), np.abs(lift(w)), np.abs(lift(grad))
    sums = bounds.absolute_sum(x64, order) @ bounds.absolute_sum(w64, order).T
    bound = np.asarray([2 * share * float((g64 * sums).sum())])
    left = float((lift(grad) * lift(out["y"])).sum())
    ratio, failure = 0.0, None
    for name, t in (("dx", x), ("dw", w)):
        right = float((lift(out[name]) * lift(t)).sum())
        r, _ = worst(np.asarray([abs(left - right)]), bound)
        if r > 1 and failure is None:
            failure = f"<g, y> = {left!r} but <{name}, v> = {right!r}, {r:.3g} times the bound"
        ratio = max(ratio, r)
    return Verdict("adjoint", 2, ratio, failure=failure)
