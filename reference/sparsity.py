"""Which entries a sparse operand keeps (method, 6. Sparsity). Ties keep the lower index.

A row that holds a NaN or an infinity has no magnitudes to compare and is treated as a row of zeros,
so that its counts stay right.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .arrays import Bool, Float64, finite_rows, real

Pattern: TypeAlias = tuple[str, int, int]
"""("nm", n, m) or ("pairwise", n, m): n of m adjacent entries are kept."""


def _groups(x: npt.ArrayLike, n: int, m: int) -> Float64:
    """Check the arguments; x (..., d) becomes (..., d / m, m)."""
    for name, value in (("n", n), ("m", m)):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; an int is allowed")
    if not 1 <= n <= m:
        raise ValueError(f"n is {n} and m is {m}; 1 <= n <= m is allowed")
    x = real("x", x)
    if x.shape[-1] % m:
        raise ValueError(f"x has width {x.shape[-1]}; a multiple of m = {m} is allowed")
    x = np.where(finite_rows(x), x, 0.0)
    return x.reshape(*x.shape[:-1], x.shape[-1] // m, m)


def _largest(magnitude: Float64, count: int) -> Bool:
    """True for the `count` largest along the last axis; a stable sort keeps the lower index."""
    order = np.argsort(-magnitude, axis=-1, kind="stable")
    keep = np.zeros(magnitude.shape, dtype=np.bool_)
    np.put_along_axis(keep, order[..., :count], True, axis=-1)
    return keep


def keep_nm(x: npt.ArrayLike, n: int, m: int) -> Bool:
    """N:M: in each group of m adjacent entries the n of largest magnitude.

    x: real (..., d) with d a multiple of m. Returns bool (..., d), True for kept entries.
    Raises TypeError or ValueError for n and m outside 1 <= n <= m and for other widths.
    """
    groups = _groups(x, n, m)
    return _largest(np.abs(groups), n).reshape(np.shape(x))


def keep_pairwise(x: npt.ArrayLike, n: int, m: int) -> Bool:
    """Pairwise n:m: of the m/2 adjacent pairs in each group the n/2 of largest L2 norm.

    x: real (..., d) with d a multiple of m. Returns bool (..., d), True for kept entries.
    Raises TypeError or ValueError for n and m not even or outside 2 <= n <= m, and other widths.
    """
    groups = _groups(x, n, m)
    if n % 2 or m % 2:
        raise ValueError(f"n is {n} and m is {m}; even numbers are allowed")
    pairs = groups.reshape(*groups.shape[:-1], m // 2, 2)
    # A power of two for each pair keeps the squares in range and the ties of integers exact.
    _, exponent = np.frexp(np.abs(pairs).max(axis=-1))
    scaled = np.ldexp(pairs, -exponent[..., np.newaxis])
    with np.errstate(over="ignore"):  # the norm of two entries near the largest float64
        norm = np.ldexp(np.sqrt((scaled**2).sum(axis=-1)), exponent)
    keep = _largest(norm, n // 2)
    return np.repeat(keep, 2, axis=-1).reshape(np.shape(x))


def keep(x: npt.ArrayLike, pattern: Pattern | None) -> Bool:
    """The entries that `pattern` keeps, all of them where it is None; bool, the shape of x.

    Raises ValueError for an unknown kind of pattern, and what `keep_nm` and `keep_pairwise` raise.
    """
    if pattern is None:
        return np.ones(np.shape(x), dtype=np.bool_)
    kind, n, m = pattern
    if kind == "nm":
        return keep_nm(x, n, m)
    if kind == "pairwise":
        return keep_pairwise(x, n, m)
    raise ValueError(f"sparsity is of kind {kind!r}; 'nm' and 'pairwise' are allowed")
