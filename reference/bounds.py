"""Error bounds of floating-point implementations, derived from the number of roundings.

Standard model: fl(a op b) = (a op b)(1 + d), |d| <= u, plus eta/2 where a result is subnormal
(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sections 2 and 3). k roundings in
a row multiply to at most 1 + gamma_k, gamma_k = k u / (1 - k u). Products with ±1 are exact, and
so are sums of integers (times one power of two) below 2^24: there only the normalisation rounds.

Every function takes float64 arrays (..., d) and returns bounds of the same shape, absolute errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import hadamard, prologue
from .arrays import Bool, Float64

UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SMALLEST = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}
LARGEST = {
    "float32": (2 - 2.0**-23) * 2.0**127,
    "float16": 65504.0,
    "bfloat16": (2 - 2.0**-7) * 2.0**127,
}
U32, ETA32 = UNIT["float32"], SMALLEST["float32"]
# The most that an implementation does as a butterfly; a larger power of two ends in a dot product.
BUTTERFLY_LIMIT = 2**14
# Between a rotated value and its place on the grid: the constant step (or midpoint) in float32,
# its product with sigma, the reciprocal, and the product with y.
CODE_ROUNDINGS = 4
# A threshold in float32: the constant, and its product with sigma.
THRESHOLD_ROUNDINGS = 2
# A value: the constant, its product with the code's half integer, and with sigma; one to spare for
# an implementation that multiplies by a stored reciprocal.
VALUE_ROUNDINGS = 4
# An integer product: the factor of both units, its product with the row's scale, the accumulator to
# float32 (a second time where it has a fraction), and the products with both scales.
PRODUCT_ROUNDINGS = 6
# exp(-g) in float32, beside its argument's own error: ex2.approx is off by 2^-22 at the most (PTX
# ISA), and exp by two units in the last place (CUDA C++ Programming Guide; vector libraries too),
# which is as much.
EXP_ROUNDINGS = 4
# silu(g) v after exp: the sum 1 + e, the reciprocal (2^-23, as much as two roundings: PTX ISA,
# rcp.approx), and the products with g and v.
GATED_ROUNDINGS = 5
# Of these, those of the sigmoid itself.
SIGMOID_ROUNDINGS = 3
# The slope of silu is 1.09984 at 2.3994, and nowhere steeper.
SILU_STEEPEST = 1.1
# Where exp(-g) nears the end of float32's range, its reciprocal may be 0.
SIGMOID_SMALLEST = 2.0**-126
# Of mean(h^2) + eps, beside one for each square: the division by d (a reciprocal and a product),
# eps as a float, and the sum of both.
MEAN_ROUNDINGS = 4
# Of 1 / sqrt: a root and a quotient, or an approximation two units in the last place off (rsqrtf:
# CUDA C++ Programming Guide). Then the products with h and the weight.
NORM_ROUNDINGS = 6


@dataclass(frozen=True)
class Sums:
    """How an implementation takes the sums of a transform.

    roundings: the most on any term's way through them; None for a butterfly's. A dot product in any
    order has `order`. last: whether the normalisation comes after the sums, so that sums of
    integers are exact. A wider bound than the arithmetic needs would hide errors: this is what an
    implementation declares, not what makes it pass.
    """

    roundings: int | None = None
    last: bool = True


BUTTERFLY = Sums()


def gamma(k: float, u: float) -> float:
    """k u / (1 - k u), the most that k roundings of unit roundoff u add up to; k u < 1."""
    if not k * u < 1:
        raise ValueError(f"k u must be below 1, got k = {k}, u = {u}")
    return k * u / (1 - k * u)


def output(exact: Float64, error: Float64, dtype: str) -> Float64:
    """Bound after rounding to `dtype` what is `exact` with an absolute error of at most `error`."""
    return error + UNIT[dtype] * (np.abs(exact) + error) + SMALLEST[dtype] / 2


def stored_sum(terms: Sequence[Float64], errors: Sequence[Float64], dtype: str) -> Float64:
    """Bound of a sum of which each term, and each sum on the way, is stored in `dtype`.

    errors: of each term, before it is stored. In any order a term is rounded once where it is
    stored and at most once in each of the n - 1 additions. One term is `output`'s case.
    """
    n = len(terms)
    magnitude = sum((np.abs(t) + e for t, e in zip(terms, errors, strict=True)), np.zeros(()))
    share = UNIT[dtype] if n == 1 else gamma(n, UNIT[dtype])
    total = share * magnitude + sum(errors, np.zeros(())) + n * SMALLEST[dtype] / 2
    return np.asarray(total, dtype=np.float64)


def additions(order: int) -> int:
    """Roundings of the sum in a Hadamard transform: log2 P of a butterfly, m of a base product."""
    m, power = hadamard.split(order)
    dots = (m if m > 1 else 0) + (power // BUTTERFLY_LIMIT if power > BUTTERFLY_LIMIT else 0)
    return int(math.log2(min(power, BUTTERFLY_LIMIT))) + dots


def normalisations(order: int) -> int:
    """Roundings of the factor order**-0.5: none for a power of four, else constant and product."""
    root = math.isqrt(order)
    return 0 if root * root == order and root & (root - 1) == 0 else 2


def _blocks(x: Float64, order: int) -> Float64:
    return x.reshape(*x.shape[:-1], x.shape[-1] // order, order)


def absolute_sum(x: Float64, order: int) -> Float64:
    """|H| |x|: for each output, the sum of the magnitudes that it is made of; like x."""
    sums = np.abs(_blocks(x, order)).sum(-1, keepdims=True) / math.sqrt(order)
    spread = np.broadcast_to(sums, _blocks(x, order).shape)
    return np.asarray(spread.reshape(x.shape), dtype=np.float64)


def exact_sums(x: Float64, order: int) -> Bool:
    """Where any order of summation is exact in float32: integers of 2^k with sums below 2^24."""
    blocks = _blocks(x, order)
    largest = np.abs(blocks).max(-1, keepdims=True, initial=0.0)
    # 2^-23 of the largest sum is the last bit that float32 keeps of it.
    total = np.abs(blocks).sum(-1, keepdims=True)
    _, exponent = np.frexp(np.where(np.isfinite(total), total, 1.0))
    # Not below the last bit of a scaled subnormal: those are exact, too.
    unit = np.ldexp(1.0, np.maximum(exponent - 24, -149))
    with np.errstate(invalid="ignore"):
        whole = np.all(np.fmod(blocks, unit) == 0, axis=-1, keepdims=True)
    good = whole & np.isfinite(largest)
    return np.broadcast_to(good, blocks.shape).reshape(x.shape)


def settled(x: Float64, order: int, sums: Sums) -> Bool:
    """Where these sums are exact: `exact_sums`, unless normalised terms are added."""
    whole = exact_sums(x, order)
    return whole if sums.last or not normalisations(order) else np.zeros_like(whole)


def _rotation_in_range(
    x: Float64, order: int, transpose: bool = False, sums: Sums = BUTTERFLY
) -> Float64:
    """Bound of x H, or x H^T, in float32 where nothing underflows."""
    if order == 1:
        return np.zeros_like(x)
    k_norm = normalisations(order)
    k_sum = additions(order) if sums.roundings is None else sums.roundings
    full = gamma(k_sum + k_norm, U32) * absolute_sum(x, order)
    turn = hadamard.apply_transpose if transpose else hadamard.apply
    normalised = gamma(k_norm, U32) * np.abs(turn(x, order))
    bound: Float64 = np.where(settled(x, order, sums), normalised, full)
    return bound


def rotation(x: Float64, order: int, transpose: bool = False, sums: Sums = BUTTERFLY) -> Float64:
    """Bound of x H, or x H^T, computed in float32 and not yet stored (T1)."""
    # The product with the normalisation may land among the subnormals: of a sum, or of each term.
    lost = ETA32 / 2 * (1 if sums.last else order)
    return _rotation_in_range(x, order, transpose, sums) + (lost if order > 1 else 0.0)


def scale(x: Float64, order: int, sigma: Float64, sums: Sums = BUTTERFLY) -> Float64:
    """Bound of sigma (..., 1) stored in float32, from x or from a rotated x (T2).

    d squares and their sum: gamma_{d+2}, halved by the root; the root, the division by d and the
    power of two that undoes a scaling round once each, and storing once more. Tensor cores that add
    eight squares at a time, four times, cut at most 4 (8 + 2) times and leave a few additions:
    fewer than the d >= 128 of a row that is taken by them.
    """
    d = x.shape[-1]
    propagated = np.sqrt(np.mean(rotation(x, order, sums=sums) ** 2, axis=-1, keepdims=True))
    bound: Float64 = sigma * (gamma(d + 2, U32) / 2 + 4 * U32) + propagated + ETA32
    return bound


def code_margin(x: Float64, order: int, sigma: Float64, sums: Sums = BUTTERFLY) -> Float64:
    """delta of T3: how far t = y / sigma may be from its exact value; sigma (..., 1) as stored.

    The scale is part of the result, so y is held to its row's magnitude: an implementation brings
    each row near 1 by a power of two first, or loses subnormal rows. What is then below 2^-149 of
    the row's largest entry is lost: at most sqrt(order) + 1 halves of it in y, and sigma is at
    least d^-0.5 / 2 in those units.
    """
    z = hadamard.apply(x, order) / sigma
    lost = (math.sqrt(order) + 2) * 2 * math.sqrt(max(x.shape[-1], 1)) * ETA32
    # Sums that are exactly 0 are 0 in any order.
    zero = settled(x, order, sums) & (z == 0)
    turned = _rotation_in_range(x, order, sums=sums)
    margin = turned / sigma + gamma(CODE_ROUNDINGS, U32) * np.abs(z) + lost
    return np.asarray(np.where(zero, 0.0, margin), dtype=np.float64)


def ambiguous_share(midpoints: Sequence[float], order: int, sums: Sums = BUTTERFLY) -> float:
    """Which share of a wide Gaussian row's codes T3 leaves open: two delta, as dense as z is there.

    midpoints: between codes, in units of sigma. delta is `code_margin`'s, with the mean of
    absolute_sum, order sqrt(2 / pi) / sqrt(order).
    """
    z = np.asarray(midpoints, dtype=np.float64)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    k_sum = additions(order) if sums.roundings is None else sums.roundings
    k = k_sum + normalisations(order) if order > 1 else 0
    turned = gamma(k, U32) * math.sqrt(2 * order / math.pi)
    delta = turned + gamma(CODE_ROUNDINGS, U32) * np.abs(z)
    return float(min(1.0, (2 * delta * density).sum()))


def gated(gate: Float64, value: Float64, between: str | None = None) -> Float64:
    """Bound of silu(gate) value in float32, not yet stored.

    The argument -g log2(e) is rounded twice (the constant, the product), which moves exp(-g) by
    gamma_{2|g|}, and exp is off by EXP_ROUNDINGS more: in all d <= gamma_{2|g| + 4}. Of 1 + e the
    share e / (1 + e) = 1 - sigmoid moves by d, so the sum by m = (1 - sigmoid) d and the reciprocal
    by up to 1 / (1 - m); the rest rounds GATED_ROUNDINGS times. Beyond |g| = 128 exp(-g) is far
    outside of float32, and the sigmoid is 1, or 0 within SIGMOID_SMALLEST.
    between: the dtype that silu is stored in before the product, where it is.
    """
    g, v = np.abs(gate), np.abs(value)
    with np.errstate(invalid="ignore", over="ignore"):
        share = _sigmoid_share(gate, GATED_ROUNDINGS)
        silu = g * prologue.sigmoid(gate)
        # The products with g and v may be subnormal.
        lost = g * SIGMOID_SMALLEST + ETA32 / 2
        error = silu * share + lost
        if between is not None:
            error = output(silu, error, between)
        bound: Float64 = error * v * (1 + U32) + (between is not None) * U32 * silu * v + ETA32 / 2
    return bound


def gated_near(gate: Float64, value: Float64, off: tuple[Float64, Float64]) -> Float64:
    """Bound of `gated` where gate and value are known up to `off` only.

    silu is nowhere steeper than 1.09984. What SILU_STEEPEST leaves over, 1.6e-4 of the gate's
    `off`, is more than `gated`'s own part may rise by between the ends of where the gate may lie:
    it is nowhere steeper than 1e-6. There it is taken, and added.
    """
    g, v = off
    with np.errstate(invalid="ignore", over="ignore"):
        far = np.abs(value) + v
        moved = SILU_STEEPEST * g * far + np.abs(gate) * prologue.sigmoid(gate) * v
        bound: Float64 = moved + gated(gate - g, far) + gated(gate + g, far)
    return bound


def _sigmoid_share(gate: Float64, roundings: int) -> Float64:
    """How far, relatively, what is made of the sigmoid is off: see `gated`."""
    g = np.abs(gate)
    k = (2 * np.minimum(g, 128.0) + EXP_ROUNDINGS) * U32
    moved = prologue.sigmoid(-gate) * (k / (1 - k))
    share: Float64 = (1 + moved / (1 - moved)) * (1 + gamma(roundings, U32)) - 1
    return share


def gated_backward(grad: Float64, gate: Float64, value: Float64) -> Float64:
    """Bound of grad value s (1 + g (1 - s)) in float32, not yet stored; s the sigmoid of gate g.

    That of grad silu(g), the gradient of the value, is `gated`'s. s is off by the share a that
    `gated` derives, and 1 - s by s a; then 1 - s, its product with g and the sum with 1 round once
    each, and the products of all four factors three times. Above g = 128 s is 1 and 1 - s is 0.
    The product grad value is to stay within the range; it may be subnormal, and so may the next.
    """
    g = np.abs(gate)
    with np.errstate(invalid="ignore", over="ignore"):
        a = _sigmoid_share(gate, SIGMOID_ROUNDINGS)
        s, rest = prologue.sigmoid(gate), prologue.sigmoid(-gate)
        off = s * a + U32 * (rest + s * a) + SIGMOID_SMALLEST
        product = np.where(gate > 128, 0.0, g * (off + U32 * (rest + off)))
        slope = np.abs(1 + gate * rest)
        error = product + U32 * (slope + product)
        reached = (s * (1 + a) + SIGMOID_SMALLEST) * (slope + error)
        share = reached * (1 + gamma(3, U32)) - s * slope
        lost = ETA32 / 2 * (reached + slope + error + 1)
        bound: Float64 = np.abs(grad * value) * share + lost
    return bound


def squares_overflow(h: Float64) -> Bool:
    """Rows (..., 1) of finite h whose squares may add up to more than float32 holds.

    The reciprocal of the root is then 0.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        total = (h**2).sum(-1, keepdims=True)
        reached = total * (1 + gamma(h.shape[-1], U32)) >= LARGEST["float32"]
    return np.asarray(reached & np.isfinite(h).all(-1, keepdims=True))


def normed(h: Float64, weight: Float64, eps: float, between: str | None = None) -> Float64:
    """Bound of (h / sqrt(mean(h^2) + eps)) weight in float32, not yet stored; no overflow.

    The weight comes last: h weight may be subnormal, or none, where the row is not.
    d squares and their sum: gamma_d, all terms positive, and MEAN_ROUNDINGS more; squares may be
    subnormal. The root of what is off by m is off by at most (1 - m)^(-1/2) - 1; NORM_ROUNDINGS
    follow. between: the dtype that h / sqrt is stored in before the weight, where it is.
    """
    d = h.shape[-1]
    with np.errstate(invalid="ignore", over="ignore"):
        mean = (h**2).sum(-1, keepdims=True) / max(d, 1)
        off = gamma(d + MEAN_ROUNDINGS, U32) + ETA32 / (mean + eps)
        share = (1 - off) ** -0.5 * (1 + gamma(NORM_ROUNDINGS, U32)) - 1
        unit = np.abs(h) / np.sqrt(mean + eps)
        error = unit * share + ETA32 / 2
        if between is not None:
            error = output(unit, error, between)
        v = np.abs(weight)
        bound: Float64 = error * v * (1 + U32) + (between is not None) * U32 * unit * v + ETA32 / 2
    return bound
