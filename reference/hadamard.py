"""Hadamard matrices and the block-diagonal orthonormal transform x H (method, 1. Notation).

Orders: 2^k by Sylvester's doubling in natural order, and m 2^k with m = 12, 20 or 28 as
kron(base(m), sylvester(2^k)). Order 40 * 2^k is 20 * 2^(k+1). None of the three bases is symmetric,
so x H and x H^T differ: the backward needs the second (QuEST, arXiv 2502.05003, section 3).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .arrays import Float64, real

# Smallest multiple of four that is the odd part of an order times a power of two.
_BASE_OF_ODD_PART = {1: 1, 3: 12, 5: 20, 7: 28}

# First rows of four symmetric circulants A, B, C, D of order 7 with AA + BB + CC + DD = 28 I.
# J. Williamson, "Hadamard's determinant theorem and the sum of four squares",
# Duke Math. J. 11 (1944); these rows were found by exhaustive search.
_WILLIAMSON_7 = (
    (1, 1, 1, -1, -1, 1, 1),
    (1, 1, 1, -1, -1, 1, 1),
    (1, 1, -1, 1, 1, -1, 1),
    (1, -1, 1, -1, -1, 1, -1),
)


def is_order(n: int) -> bool:
    """Whether `matrix(n)` exists: n = 2^k, or m 2^k with m = 12, 20 or 28, k >= 0."""
    if n < 1:
        return False
    odd = n
    while odd % 2 == 0:
        odd //= 2
    return odd in _BASE_OF_ODD_PART and n % _BASE_OF_ODD_PART[odd] == 0


def split(order: int) -> tuple[int, int]:
    """Factor a legal order into (m, power of two) with m = 1, 12, 20 or 28.

    Raises TypeError for an order that is not an int and ValueError for an illegal one.
    """
    if not isinstance(order, (int, np.integer)) or isinstance(order, bool):
        raise TypeError(f"order is {order!r}; an int is allowed")
    if not is_order(int(order)):
        raise ValueError(
            f"order is {order}; 2^k, 12*2^k, 20*2^k and 28*2^k with k >= 0 are allowed"
        )
    odd = int(order)
    while odd % 2 == 0:
        odd //= 2
    m = _BASE_OF_ODD_PART[odd]
    return m, int(order) // m


def _sylvester(order: int) -> Float64:
    """Sylvester's matrix of order 2^k: H_1 = [1], H_2n = [[H_n, H_n], [H_n, -H_n]]."""
    h = np.ones((1, 1))
    while len(h) < order:
        h = np.block([[h, h], [h, -h]])
    return h


def _paley(q: int) -> Float64:
    """Paley's first construction for a prime q = 3 mod 4: I + S of order q + 1, S skew.

    R. E. A. C. Paley, "On orthogonal matrices", J. Math. Phys. 12 (1933).
    """
    squares = {i * i % q for i in range(1, q)}
    skew = np.zeros((q + 1, q + 1))
    skew[0, 1:] = 1
    skew[1:, 0] = -1
    for i in range(q):
        for j in range(q):
            if i != j:
                skew[1 + i, 1 + j] = 1 if (i - j) % q in squares else -1
    return np.eye(q + 1) + skew


def _williamson() -> Float64:
    """Williamson's matrix of order 28 from the four circulants above."""
    a, b, c, d = (
        np.array([np.roll(row, shift) for shift in range(7)], dtype=np.float64)
        for row in _WILLIAMSON_7
    )
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


def base(m: int) -> Float64:
    """The base matrix of order m = 1, 12, 20 or 28: float64 (m, m) of +1 and -1.

    Raises ValueError for any other m.
    """
    if m == 1:
        return np.ones((1, 1))
    if m in (12, 20):
        return _paley(m - 1)
    if m == 28:
        return _williamson()
    raise ValueError(f"m is {m}; 1, 12, 20 and 28 are allowed")


def matrix(order: int) -> Float64:
    """The unnormalised Hadamard matrix: float64 (order, order) of +1 and -1, H H^T = order * I.

    Raises TypeError for an order that is not an int and ValueError for an illegal one.
    """
    return np.asarray(np.kron(*_factors(order)), dtype=np.float64)


def _factors(order: int) -> tuple[Float64, Float64]:
    """Two matrices, about as large as each other, whose Kronecker product is `matrix(order)`.

    That of order 32768 would take 8 GB. The product of Sylvester's matrices is Sylvester's.
    """
    m, power = split(order)
    small = 1 << (power.bit_length() - 1) // 2
    return np.asarray(np.kron(base(m), _sylvester(power // small))), _sylvester(small)


def _blockwise(x: npt.ArrayLike, left: Float64, right: Float64) -> Float64:
    """x times kron(left, right) / sqrt(block), block by block."""
    x = real("x", x)
    block = len(left) * len(right)
    if x.shape[-1] % block:
        raise ValueError(f"x has width {x.shape[-1]}; a multiple of the block {block} is allowed")
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // block, len(left), len(right))
    # One factor after the sum, so that sums of integers stay exact. A NaN or an infinity spreads
    # over its block, which is what the quantizer expects, without a warning.
    with np.errstate(invalid="ignore", over="ignore"):
        rotated: Float64 = left.T @ (blocks @ right) / math.sqrt(block)
    return rotated.reshape(x.shape)


def apply(x: npt.ArrayLike, block: int) -> Float64:
    """x H with H = matrix(block) / sqrt(block) on each block of the last axis.

    x: real (..., d) with d a multiple of `block`. Returns float64 (..., d).
    Raises ValueError for an illegal block or width, TypeError for a dtype that is not real.
    """
    return _blockwise(x, *_factors(block))


def apply_transpose(x: npt.ArrayLike, block: int) -> Float64:
    """x H^T, the inverse of `apply`; shapes and errors as there."""
    left, right = _factors(block)
    return _blockwise(x, left.T, right.T)
