"""Grids: the points that a unit-variance Gaussian is rounded to (method, 2. Grids).

QuEST (arXiv 2502.05003, section 3) scales a row by its RMS, rounds it to a fixed grid and scales it
back, so a grid is fitted once, to Z ~ N(0, 1), by minimising MSE = E[(Z - Q(Z))^2]. With the cells
[a_i, b_i] that end at the midpoints of the points p_i,

    P_i = Phi(b_i) - Phi(a_i)                       probability of the cell
    M_i = phi(a_i) - phi(b_i)                       first moment of the cell
    MSE = 1 - sum_i 2 p_i M_i - p_i^2 P_i           1 = E[Z^2]
    dMSE/dp_i = -2 (M_i - p_i P_i)                  the cells' ends cancel: Q is continuous there

The stationary points are solved for, not searched for: the minimum is flat, so a minimiser stops
when the value no longer moves, at half the digits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import solve_banded
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

from .arrays import Float64

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@dataclass(frozen=True, eq=False)
class Grid:
    """A sorted set of L points for a unit-variance Gaussian; lengths are in units of sigma.

    points: float64 (L,), increasing, read-only.
    alpha: the factor of uniform grids (their outermost point) and of E2M1; NaN for free points.
    step: distance of neighbours of a uniform grid; NaN for all others.
    half_gap: T, half the distance of the two outermost points.
    mse: E[(Z - Q(Z))^2].
    residual: what is left of the condition that fits the grid: |dMSE/dalpha| where there is an
        alpha, else the largest distance of a point from the mean of its cell.
    centred: codes are level numbers about zero (uniform grids) and not indices from 0.
    """

    name: str
    points: Float64
    alpha: float
    step: float
    half_gap: float
    mse: float
    residual: float
    centred: bool

    @property
    def levels(self) -> int:
        return len(self.points)

    @property
    def outer(self) -> float:
        return float(self.points[-1])

    @property
    def midpoints(self) -> Float64:
        """The L - 1 ends that the cells share, float64."""
        return (self.points[:-1] + self.points[1:]) / 2


def _pdf(z: Float64) -> Float64:
    return np.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _moments(points: Float64) -> tuple[Float64, Float64]:
    """P_i and M_i of the module's docstring, each (L,)."""
    ends = np.concatenate([[-np.inf], (points[:-1] + points[1:]) / 2, [np.inf]])
    a, b = ends[:-1], ends[1:]
    # Phi(b) - Phi(a) = Phi(-a) - Phi(-b): the second form keeps its digits in the upper tail.
    probability = np.where(a > 0, ndtr(-a) - ndtr(-b), ndtr(b) - ndtr(a))
    return probability, _pdf(a) - _pdf(b)


def _checked(points: npt.ArrayLike) -> Float64:
    array = np.array(points, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2:
        raise ValueError(f"points has shape {array.shape}; (L,) with L >= 2 is allowed")
    if not np.isfinite(array).all() or not (np.diff(array) > 0).all():
        raise ValueError(f"points is {array}; finite and increasing values are allowed")
    array.setflags(write=False)
    return array


def mse(points: npt.ArrayLike) -> float:
    """E[(Z - Q(Z))^2] for Z ~ N(0, 1) and Q the nearest of `points`, real (L,), increasing.

    Raises ValueError for points that are not finite and increasing, or fewer than two.
    """
    points = _checked(points)
    probability, first = _moments(points)
    return 1 - math.fsum(points * (2 * first - points * probability))


def _slope(alpha: float, unit: Float64) -> float:
    """dMSE/dalpha of the grid alpha * unit."""
    probability, first = _moments(alpha * unit)
    return float(-2 * np.sum(unit * (first - alpha * unit * probability)))


def _optimum(unit: Float64, low: float, high: float) -> float:
    """The root of dMSE/dalpha in [low, high], where the property tests find exactly one."""
    root, result = brentq(
        _slope, low, high, args=(unit,), xtol=1e-15, rtol=4 * np.finfo(float).eps, full_output=True
    )
    if not result.converged:
        raise RuntimeError(f"alpha did not converge: {result.flag}")
    return float(root)


def _levels(levels: int) -> int:
    if isinstance(levels, bool):
        raise TypeError(f"levels is {levels}; an int from 2 to 256 is allowed")
    try:
        value = operator.index(levels)
    except TypeError:
        raise TypeError(f"levels is {levels!r}; an int from 2 to 256 is allowed") from None
    if not 2 <= value <= 256:
        raise ValueError(f"levels is {value}; 2 to 256 is allowed")
    return value


def _alpha(alpha: float | None) -> float | None:
    if alpha is None:
        return None
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha is {alpha}; a finite value above 0, or None, is allowed")
    return float(alpha)


def uniform(levels: int, alpha: float | None = None) -> Grid:
    """L equidistant points from -alpha to alpha; alpha=None takes the MSE-optimal one.

    Raises TypeError or ValueError for levels outside 2 to 256 or an alpha that is not above 0.
    """
    return _uniform(_levels(levels), _alpha(alpha))


@functools.cache
def _uniform(levels: int, alpha: float | None) -> Grid:
    unit = (2 * np.arange(levels) - (levels - 1)) / (levels - 1)
    if alpha is None:
        alpha = _optimum(unit, 0.3, 9.0)
    points = _checked(alpha * unit)
    return Grid(
        name="uniform",
        points=points,
        alpha=alpha,
        step=2 * alpha / (levels - 1),
        half_gap=alpha / (levels - 1),
        mse=mse(points),
        residual=abs(_slope(alpha, unit)),
        centred=True,
    )


@functools.cache
def ternary() -> Grid:
    """The uniform grid of three levels, "1.58 bit"."""
    return dataclasses.replace(uniform(3), name="ternary")


def e2m1(alpha: float | None = None) -> Grid:
    """FP4 E2M1: alpha * {0, ±.5, ±1, ±1.5, ±2, ±3, ±4, ±6}, 15 points; alpha=None is MSE-optimal.

    Raises ValueError for an alpha that is not finite and above 0.
    """
    return _e2m1(_alpha(alpha))


@functools.cache
def _e2m1(alpha: float | None) -> Grid:
    unit = np.concatenate([-_E2M1[:0:-1], _E2M1])
    if alpha is None:
        alpha = _optimum(unit, 0.05, 4.0)
    points = _checked(alpha * unit)
    return Grid(
        name="e2m1",
        points=points,
        alpha=alpha,
        step=math.nan,
        half_gap=alpha * (6 - 4) / 2,
        mse=mse(points),
        residual=abs(_slope(alpha, unit)),
        centred=False,
    )


def _lloyd_residual(points: Float64) -> float:
    """Largest distance of a point from the mean of its cell.

    The other Lloyd condition, that cells end at midpoints, holds by construction. A cell so far out
    that its probability underflows has no mean in float64 and is left out.
    """
    probability, first = _moments(points)
    some = probability > 0
    return float(np.max(np.abs(points[some] - first[some] / probability[some])))


def _free(name: str, points: Float64) -> Grid:
    return Grid(
        name=name,
        points=points,
        alpha=math.nan,
        step=math.nan,
        half_gap=float(points[-1] - points[-2]) / 2,
        mse=mse(points),
        residual=_lloyd_residual(points),
        centred=False,
    )


def table(points: npt.ArrayLike) -> Grid:
    """A grid of any points, real (L,), finite and increasing; raises ValueError for others."""
    return _free("table", _checked(points))


def lloyd_max(levels: int) -> Grid:
    """The L free points of least MSE: each is the mean of its cell (Lloyd 1982, Max 1960).

    The points are symmetric about zero. Raises TypeError or ValueError for levels outside 2 to 256.
    """
    return _lloyd_max(_levels(levels))


@functools.cache
def _lloyd_max(levels: int) -> Grid:
    # Lloyd's iteration p <- c(p), with c_i = M_i / P_i the mean of a cell, needs some L^2 sweeps;
    # Newton on p - c(p) = 0 needs four. Its Jacobian is tridiagonal, because p_i moves only
    # the two ends next to it, and strictly diagonally dominant for every p, because phi is
    # log-concave (Fleischer 1964). The start is the asymptotic point density, phi^(1/3).
    points = math.sqrt(3) * ndtri((np.arange(levels) + 0.5) / levels)
    for _ in range(20):
        if _lloyd_residual(points) <= 2e-13:  # rounding leaves up to 1e-13
            return _free("lloyd_max", _checked(points))
        probability, first = _moments(points)
        means = first / probability
        ends = (points[:-1] + points[1:]) / 2
        # dc_i/dp for the end above a cell and for the end below it; the end moves by dp / 2.
        above = (ends - means[:-1]) * _pdf(ends) / probability[:-1] / 2
        below = (means[1:] - ends) * _pdf(ends) / probability[1:] / 2
        bands = np.zeros((3, levels))  # SciPy's form: superdiagonal, diagonal, subdiagonal
        bands[0, 1:] = -above
        bands[1] = 1
        bands[1, :-1] -= above
        bands[1, 1:] -= below
        bands[2, :-1] = -below
        points = points + solve_banded((1, 1), bands, means - points)
        points = (points - points[::-1]) / 2  # the optimum is symmetric; rounding is not
    raise RuntimeError(f"Lloyd-Max with {levels} levels did not converge")
