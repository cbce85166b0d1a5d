"""Sparsity patterns, applied to the rotated weights on top of quantization.

Source: method, section 6; QuEST (arXiv 2502.05003), sparse extension.
"""

from __future__ import annotations

from dataclasses import dataclass


def _check(n: int, m: int, unit: int) -> None:
    for name, value in (("n", n), ("m", m)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if value % unit:
            raise ValueError(f"{name} counts entries of whole pairs and must be even, got {value}")
    if n >= m:
        raise ValueError(f"n must be less than m, got {n}:{m}")


@dataclass(frozen=True)
class NM:
    """In each group of `m` entries keep the `n` of largest magnitude; ties keep the lower index."""

    n: int
    m: int

    def __post_init__(self) -> None:
        _check(self.n, self.m, 1)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Pairwise:
    """In each group of `m` entries keep the `n / 2` adjacent pairs of largest L2 norm."""

    n: int
    m: int

    def __post_init__(self) -> None:
        _check(self.n, self.m, 2)

    def __str__(self) -> str:
        return f"pairs{self.n}:{self.m}"


Sparsity = NM | Pairwise


def parse(name: str) -> Sparsity | None:
    """The pattern of a name: dense, 2:4, pairs4:8."""
    if name == "dense":
        return None
    n, _, m = name.removeprefix("pairs").partition(":")
    if n.isdecimal() and m.isdecimal():
        return (Pairwise if name.startswith("pairs") else NM)(int(n), int(m))
    raise ValueError(f"sparsity must be dense, N:M or pairsN:M, got {name!r}")
