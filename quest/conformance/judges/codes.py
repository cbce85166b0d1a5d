"""Judges of what a quantizer decides: codes, the mask, and which entries are kept."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from quest.conformance import oracle
from quest.conformance.oracle import Array, lift
from quest.conformance.verdict import Verdict, inconclusive, one_sided, worst
from quest.quantizer import Quantizer
from quest.reference import bounds, hadamard, quantize
from quest.reference import grids as reference_grids
from quest.reference.bounds import BUTTERFLY, Sums

from .basis import at, exact


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
            f"{wrong.size} of {c.size} codes are wrong; at {at(c.shape, i)} it is {c.flat[i]} for "
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
            f"{bad.size} of {m.size} mask bits are wrong; at {at(m.shape, i)} it is "
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
