"""The quantizer: rotate, scale by the RMS, round to a grid (method, 1. Notation and 3. Rounding).

QuEST (arXiv 2502.05003, section 3): x_h = x H; sigma = RMS of a row of x_h; code = rounding of
x_h / sigma; value = sigma * point(code). Everything is per row along the last axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from . import estimators, hadamard
from . import sparsity as patterns
from .arrays import Bool, Float64, Int64, finite_rows, integers, real
from .grids import Grid


@dataclass(frozen=True, eq=False)
class Quantized:
    """What the quantizer makes of x (..., d); all arrays (..., d) but `scale`.

    rotated: x_h, float64. codes: int64. scale: sigma, float64 (..., 1). keep: bool, False where
    pruned. mask: bool, True where the gradient passes. values: the dequantized x_h, float64.
    """

    rotated: Float64
    codes: Int64
    scale: Float64
    keep: Bool
    mask: Bool
    values: Float64


def scale(x: npt.ArrayLike) -> Float64:
    """sigma = sqrt(mean(x^2)) of each row: real (..., d) to float64 (..., 1).

    0 for a row of zeros or of width 0, NaN for a row that holds a NaN or an infinity.
    """
    x = real("x", x)
    finite = finite_rows(x)
    x = np.where(finite, x, 0.0)
    # A power of two moves the largest entry into [1/2, 1): no square overflows or underflows, and
    # nothing is rounded.
    _, exponent = np.frexp(np.abs(x).max(axis=-1, keepdims=True, initial=0.0))
    squares = np.ldexp(x, -exponent) ** 2
    mean = squares.sum(axis=-1, keepdims=True) / max(x.shape[-1], 1)
    return np.where(finite, np.ldexp(np.sqrt(mean), exponent), np.nan)


def encode(t: npt.ArrayLike, grid: Grid) -> Int64:
    """The code of the nearest point, a midpoint going up: real (..., d), unit scale, to int64.

    Uniform grids of even L: floor(t / step) in [-L/2, L/2 - 1]; of odd L: floor(t / step + 1/2) in
    [-(L-1)/2, (L-1)/2]. Other grids: the index into the sorted points. The code of a NaN is 0.
    """
    t = real("t", t)
    if not grid.centred:
        index = np.searchsorted(grid.midpoints, t, side="right")
        return np.where(np.isnan(t), 0, index).astype(np.int64)
    t = np.where(np.isnan(t), 0.0, t)
    with np.errstate(over="ignore"):
        steps = t / grid.step
    if grid.levels % 2 == 0:
        code = np.clip(np.floor(steps), -(grid.levels // 2), grid.levels // 2 - 1)
    else:
        code = np.clip(np.floor(steps + 0.5), -(grid.levels // 2), grid.levels // 2)
    return code.astype(np.int64)


def code_range(grid: Grid) -> tuple[int, int]:
    """The lowest and the highest code of a grid."""
    low = -(grid.levels // 2) if grid.centred else 0
    return low, low + grid.levels - 1


def decode(codes: npt.ArrayLike, grid: Grid) -> Float64:
    """The points of the codes, unit scale: integers of any shape to float64.

    Raises TypeError for codes that are not integers and ValueError for codes outside the grid.
    """
    codes = integers("codes", codes, *code_range(grid))
    if not grid.centred:
        return grid.points[codes]
    levels = codes.astype(np.float64)
    return (levels + 0.5 if grid.levels % 2 == 0 else levels) * np.float64(grid.step)


def quantize(
    x: npt.ArrayLike,
    grid: Grid,
    block: int,
    estimator: str,
    parameter: float,
    sparsity: patterns.Pattern | None = None,
) -> Quantized:
    """Quantize x, real (..., d); the order of the Hadamard blocks is `block`, 1 for none.

    estimator and parameter: see `estimators.mask`. sparsity: None, ("nm", n, m) or
    ("pairwise", n, m), chosen on x_h; the scale stays that of the dense row.
    A pruned entry has the code of t = 0 and the value 0. A row of zeros has the codes of t = 0,
    values 0, scale 0 and mask 1. A row with a NaN or an infinity has values NaN and scale NaN, and
    the codes and selection of a row of zeros.
    Raises ValueError or TypeError where `hadamard.apply`, `sparsity.keep` or `estimators.mask` do.
    """
    rotated = hadamard.apply(x, block)
    sigma = scale(rotated)
    keep = patterns.keep(rotated, sparsity)
    # Where sigma is 0 all of t is 0, without a division.
    t = np.divide(rotated, sigma, out=np.zeros_like(rotated), where=sigma != 0)
    finite = ~np.isnan(sigma)
    codes = encode(np.where(keep & finite, t, 0.0), grid)
    with np.errstate(over="ignore"):
        values = np.where(keep, decode(codes, grid) * sigma, 0.0)
    values = np.where(finite, values, np.nan)
    mask = estimators.mask(rotated, values, sigma, grid, estimator, parameter, keep)
    return Quantized(rotated, codes, sigma, keep, mask, values)
