"""Rows of integers whose mean square is exactly a power of four."""

from __future__ import annotations

import math

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


def rows(count: int, width: int, half_steps_per_sigma: int, seed: int) -> npt.NDArray[np.float64]:
    """(count, width) integers, many of them small, with RMS exactly `half_steps_per_sigma`."""
    rng = np.random.default_rng(seed)
    total = width * half_steps_per_sigma**2
    out = np.zeros((count, width), dtype=np.int64)
    for row in out:
        left = total
        for i in range(width - 4):
            # Zero often; never more than the row can hold.
            limit = min(3 * half_steps_per_sigma, math.isqrt(left))
            row[i] = 0 if rng.random() < 0.2 else rng.integers(-limit, limit + 1)
            left -= int(row[i]) ** 2
        row[-4:] = four_squares(left)
        rng.shuffle(row)
    return out.astype(np.float64)
