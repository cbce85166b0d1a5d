"""Grids: the points that a unit-variance Gaussian is rounded to.

The constants are literals in `constants.py`, written by the float64 oracle
(`quest.reference.grids`) and held to it by a property test. Source: method, section 2; QuEST (arXiv
2502.05003), section 3.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

from . import constants, scalars


@dataclass(frozen=True)
class Grid:
    """A sorted set of `levels` points for a row of unit RMS; made by the functions below.

    name: what `parse` turns back into this grid. points: (levels,) ascending. step: the distance of
    neighbours of a uniform grid, None for a table. half_gap: half the distance of the two outermost
    points. Codes of uniform grids are centred at zero (see `quest.Quantized`), codes of tables are
    indices into `points`.
    """

    name: str
    points: tuple[float, ...] = field(repr=False)
    step: float | None
    half_gap: float

    def __post_init__(self) -> None:
        if not 2 <= len(self.points) <= 256:
            raise ValueError(f"a grid has 2 to 256 points, got {len(self.points)}")
        if not all(a < b for a, b in zip(self.points, self.points[1:], strict=False)):
            raise ValueError(f"points of a grid ascend strictly, got {self.points}")
        if not all(map(math.isfinite, self.points)):
            raise ValueError(f"points of a grid are finite, got {self.points}")

    def __hash__(self) -> int:
        # Grids are keys of caches that a layer asks in every call: not all points each time.
        return hash((self.name, len(self.points)))

    @property
    def levels(self) -> int:
        """Number of points L."""
        return len(self.points)

    @property
    def outer(self) -> float:
        """The outermost point; for uniform grids this is the method's alpha."""
        return self.points[-1]

    @property
    def storage_bits(self) -> int:
        """Bits of a packed code: the smallest of 1, 2, 4 and 8 that holds all levels."""
        return next(b for b in (1, 2, 4, 8) if 2**b >= self.levels)

    @property
    def offset(self) -> int:
        """What packing adds to a code to make it an index from 0."""
        return 0 if self.step is None else self.levels // 2

    @property  # not cached: where a lock guards that, as in Python 3.11, nothing can trace it
    def midpoints(self) -> tuple[float, ...]:
        """(levels - 1,) boundaries of the cells; a value on one belongs to the upper cell."""
        return tuple((a + b) / 2 for a, b in zip(self.points, self.points[1:], strict=False))

    @functools.cached_property
    def zero_code(self) -> int:
        """The code of 0, which pruned entries carry."""
        return sum(m <= 0 for m in self.midpoints) - self.offset

    def __str__(self) -> str:
        return self.name


def _uniform(levels: int, alpha: float, name: str) -> Grid:
    points = tuple(alpha * (2 * i - (levels - 1)) / (levels - 1) for i in range(levels))
    return Grid(name, points, step=2 * alpha / (levels - 1), half_gap=alpha / (levels - 1))


def _alpha(alpha: float) -> float:
    if not (scalars.is_number(alpha) and 2.0**-8 <= alpha <= 2.0**8):
        raise ValueError(
            f"alpha must be a number from 2^-8 to 2^8, got {scalars.shown(alpha)}: it is in "
            "units of a row's RMS, and kernels compute in float32"
        )
    return float(alpha)


def uniform(bits: int, alpha: float | None = None) -> Grid:
    """2**bits equidistant points from -alpha to alpha, bits 1 to 8; by default MSE-optimal.

    Here and below ValueError for an alpha outside 2^-8 to 2^8.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"bits must be an integer from 1 to 8, got {bits!r}")
    if alpha is None:
        return _uniform(2**bits, constants.UNIFORM_ALPHA[2**bits], f"uniform{bits}")
    return _uniform(2**bits, _alpha(alpha), f"uniform{bits}:{float(alpha)!r}")


def ternary(alpha: float | None = None) -> Grid:
    """-alpha, 0, alpha (1.58 bit); alpha MSE-optimal by default."""
    if alpha is None:
        return _uniform(3, constants.UNIFORM_ALPHA[3], "ternary")
    return _uniform(3, _alpha(alpha), f"ternary:{float(alpha)!r}")


def e2m1(alpha: float | None = None) -> Grid:
    """alpha times the 15 values 0, ±.5, ±1, ±1.5, ±2, ±3, ±4, ±6 of FP4; MSE-optimal by default."""
    name = "e2m1" if alpha is None else f"e2m1:{_alpha(alpha)!r}"
    a = constants.E2M1_ALPHA if alpha is None else _alpha(alpha)
    half = [a * v for v in (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
    return _table(name, (*(-v for v in reversed(half)), 0.0, *half))


def lloyd_max(bits: int) -> Grid:
    """The 2**bits free points of least MSE, bits 1 to 8 (Lloyd 1982, Max 1960)."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"bits must be an integer from 1 to 8, got {bits!r}")
    half = constants.LLOYD_MAX[bits]
    return _table(f"lloyd_max{bits}", (*(-v for v in reversed(half)), *half))


def _table(name: str, points: tuple[float, ...]) -> Grid:
    return Grid(name, points, step=None, half_gap=(points[-1] - points[-2]) / 2)


@functools.cache
def parse(name: str) -> Grid:
    """The grid of a name: uniform4, ternary, e2m1, lloyd_max3, or one with its alpha, e2m1:0.5."""
    kind, _, tail = name.partition(":")
    stem, digits = kind.rstrip("0123456789"), kind[len(kind.rstrip("0123456789")) :]
    try:
        alpha = float(tail) if tail else None
        if stem == "uniform" and digits:
            return uniform(int(digits), alpha)
        if stem == "lloyd_max" and digits and alpha is None:
            return lloyd_max(int(digits))
        if kind == "ternary":
            return ternary(alpha)
        if kind == "e2m1":
            return e2m1(alpha)
    except ValueError as error:
        raise ValueError(f"grid {name!r}: {error}") from None
    raise ValueError(f"grid must be uniform1..8, ternary, e2m1 or lloyd_max1..8, got {name!r}")
