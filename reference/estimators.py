"""The 0/1 masks of the gradient estimators (method, 4. Gradient estimators).

QuEST (arXiv 2502.05003, section 3) multiplies the incoming gradient, in the Hadamard domain, by a
mask. STE passes everything; Clip(c) passes what lies inside c times the grid; Trust(s) passes what
rounding moved by at most s half gaps T.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .arrays import Bool, Float64, real
from .grids import Grid


def _has_widest_gap_outside(grid: Grid) -> bool:
    """Whether the grid is symmetric and no gap is wider than the outermost, up to rounding."""
    tolerance = 1e-12 * grid.outer
    symmetric = np.abs(grid.points + grid.points[::-1]).max() <= tolerance
    return bool(symmetric and np.diff(grid.points).max() <= 2 * grid.half_gap + tolerance)


def _trust_radius(values: Float64, grid: Grid, scale: float, keep: Bool) -> Float64 | None:
    """R in units of sigma where Trust is |x_h| <= R, or None where it is not of that form.

    With s >= 1 every entry inside the outermost points is within s T of its grid point, so only the
    far side of those two points can be masked. Said that way the mask does not depend on how an
    entry at a midpoint was rounded, and interior entries keep their gradient.
    """
    if scale < 1 or not _has_widest_gap_outside(grid):
        return None
    inside = np.full(values.shape, grid.outer + scale * grid.half_gap)
    return np.where(keep, inside, scale * grid.half_gap)


def mask(
    rotated: npt.ArrayLike,
    values: npt.ArrayLike,
    sigma: npt.ArrayLike,
    grid: Grid,
    estimator: str,
    parameter: float,
    keep: npt.ArrayLike,
) -> Bool:
    """Where the gradient passes: bool (..., d).

    rotated: x_h, real (..., d). values: Q(x_h), real (..., d), 0 where pruned. sigma: RMS of the
    rows, real (..., 1). keep: bool (..., d), False where pruned. parameter: c of "clip" in units of
    the outermost point, or s of "trust" in units of T; "ste" ignores it.
    A row of scale 0 has mask 1; a row of scale NaN has mask 0, except with "ste".
    Raises ValueError for an unknown estimator or a parameter that is not finite and above 0.
    """
    rotated, values, sigma = real("rotated", rotated), real("values", values), real("sigma", sigma)
    keep = np.asarray(keep, dtype=np.bool_)
    if estimator not in ("ste", "clip", "trust"):
        raise ValueError(f"estimator is {estimator!r}; 'ste', 'clip' and 'trust' are allowed")
    if estimator == "ste":
        return np.ones(rotated.shape, dtype=np.bool_)
    if not (math.isfinite(parameter) and parameter > 0):
        raise ValueError(f"parameter is {parameter}; a finite value above 0 is allowed")
    with np.errstate(invalid="ignore", over="ignore"):
        if estimator == "clip":
            inside = np.abs(rotated) <= parameter * grid.outer * sigma
        elif (radius := _trust_radius(values, grid, parameter, keep)) is not None:
            inside = np.abs(rotated) <= radius * sigma
        else:
            inside = np.abs(values - rotated) <= parameter * grid.half_gap * sigma
    # A scale that underflows to 0 is the scale of a row of zeros.
    return np.asarray(inside | (sigma == 0), dtype=np.bool_)
