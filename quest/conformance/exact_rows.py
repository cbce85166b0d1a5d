"""Rows of integers whose mean square is exactly a power of four, and thresholds on one of them."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt


def four_squares(n: int) -> tuple[int, int, int, int]:
    """Integers with a^2 + b^2 + c^2 + e^2 = n >= 0 (Lagrange), by search."""
    for a in range(math.isqrt(n), -1, -1):
        for b in range(math.isqrt(n - a * a), -1, -1):
            rest = n - a * a - b * b
            for c in range(math.isqrt(rest), -1, -1):
                e = math.isqrt(rest - c * c)
                if e * e == rest - c * c:
                    return a, b, c, e
    raise ValueError(f"n must not be negative, got {n}")


def rows(
    count: int, width: int, half_steps_per_sigma: int, seed: int, holds: int = 0
) -> npt.NDArray[np.float64]:
    """(count, width) integers, many of them small, with RMS exactly `half_steps_per_sigma`.

    holds: an integer that each row has with both signs, beside others; 0 for none.
    """
    rng = np.random.default_rng(seed)
    total = width * half_steps_per_sigma**2
    out = np.zeros((count, width), dtype=np.int64)
    for row in out:
        held = (holds, -holds) if holds else ()
        row[: len(held)] = held
        left = total - len(held) * holds**2
        for i in range(len(held), width - 4):
            # Zero often; never more than the row can hold.
            limit = min(3 * half_steps_per_sigma, math.isqrt(left))
            row[i] = 0 if rng.random() < 0.2 else rng.integers(-limit, limit + 1)
            left -= int(row[i]) ** 2
        row[-4:] = four_squares(left)
        rng.shuffle(row)
    return out.astype(np.float64)


def on_threshold(parameter: float, unit: int) -> tuple[int, float]:
    """(n, outer): n / unit is on the threshold parameter * outer of a clip, and never beyond it.

    outer is a float32. A parameter like 1.3 is none, and may be rounded before it is multiplied or
    after: both products are at least n / unit, so that it is inside in any precision from float32
    on, and both round to it in float32. Where no pair is so, fewer of the products are n / unit.
    """
    narrow = float(np.float32(parameter))
    found: list[tuple[int, int, float]] = []
    for n in range(unit // 4, 3 * unit + 1):
        outer = np.float32(n / unit / min(parameter, narrow))
        if Fraction(min(parameter, narrow)) * Fraction(float(outer)) < Fraction(n, unit):
            outer = np.nextafter(outer, np.float32(np.inf))
        # Those that divide by the outermost point take its reciprocal.
        if np.float32(n / unit) * (np.float32(1) / outer) > narrow:
            continue
        products = [Fraction(c) * Fraction(float(outer)) for c in (parameter, narrow)]
        on = sum(p == Fraction(n, unit) for p in products)
        on += sum(float(np.float32(float(p))) == n / unit for p in products)
        found.append((-on, n, float(outer)))
    _, n, made = min(found)
    return n, made
