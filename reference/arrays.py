"""Array types of the oracle, and the one place where its inputs become float64."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Float64: TypeAlias = npt.NDArray[np.float64]
Int64: TypeAlias = npt.NDArray[np.int64]
Uint8: TypeAlias = npt.NDArray[np.uint8]
Bool: TypeAlias = npt.NDArray[np.bool_]


def real(name: str, value: npt.ArrayLike) -> Float64:
    """Lift `value`, floats or integers of shape (..., d), to float64.

    Raises TypeError for any other dtype and ValueError for an array without a last axis.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} has dtype {array.dtype}; real floats or integers are allowed")
    if array.ndim == 0:
        raise ValueError(f"{name} is a scalar; an array with at least one axis is allowed")
    return array.astype(np.float64)


def integers(name: str, value: npt.ArrayLike, low: int, high: int) -> Int64:
    """Lift integers of any shape to int64 and check that all lie in [low, high].

    Raises TypeError for any other dtype and ValueError for a value outside the range.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {array.dtype}; integers are allowed")
    if array.size and (array.min() < low or array.max() > high):
        raise ValueError(
            f"{name} holds values from {array.min()} to {array.max()}; {low} to {high} are allowed"
        )
    return array.astype(np.int64)


def finite_rows(x: Float64) -> Bool:
    """For x of shape (..., d), bool (..., 1): True where the row holds no NaN and no infinity."""
    return np.asarray(np.isfinite(x).all(axis=-1, keepdims=True), dtype=np.bool_)
