"""Transforms of the last axis: none, or a block Hadamard transform.

Source: method, sections 1 and 5; QuEST (arXiv 2502.05003), section 3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from . import constants

MAX_POWER = 16384  # the power of two that a kernel transforms in one tile
MAX_BASE = 64  # and the rest, a small dense product

_Made = TypeVar("_Made")


def kept(make: Callable[..., _Made]) -> functools._lru_cache_wrapper[_Made]:
    """Constants that are made once, by hashable arguments; anew where something may trace.

    That is in what is compiled and under any dispatch mode: what is made there is the trace's own,
    a fake one as torch.export makes them, and kept, every later call would get it.
    """
    known: Any = functools.lru_cache(maxsize=64)(make)

    @functools.wraps(make)
    def get(*key: Any) -> _Made:
        traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
        made: _Made = (make if traced else known)(*key)
        return made

    wrapper: Any = get
    wrapper.cache_clear = known.cache_clear
    return wrapper  # type: ignore[no-any-return]


def _signs(order: int) -> list[list[int]]:
    # Sylvester, natural order: the sign of (i, j) is the parity of the bits they share.
    return [[1 - 2 * ((i & j).bit_count() & 1) for j in range(order)] for i in range(order)]


@functools.cache
def split(order: int) -> tuple[int, int]:
    """(m, P), order = m P: P the power of two that a butterfly does, m the base that is left.

    Legal orders are 2**k and 12, 20, 28 (hence 40) times 2**k. Orders beyond MAX_POWER put a
    Sylvester factor in the base. Raises ValueError for others.
    """
    if isinstance(order, bool) or not isinstance(order, int) or order < 1:
        raise ValueError(f"Hadamard order must be a positive integer, got {order!r}")
    power = order & -order
    odd = order // power
    m = {1: 1, 3: 12, 5: 20, 7: 28}.get(odd)
    if m is None or order % m:
        raise ValueError(f"Hadamard order must be 2**k or 12, 20, 28 or 40 times 2**k, got {order}")
    power = order // m
    while power > MAX_POWER:
        m, power = 2 * m, power // 2
    if m > MAX_BASE:
        raise ValueError(f"Hadamard order {order} is too large: {m} x {power} exceeds {MAX_BASE}")
    return m, power


@kept
def base(m: int, device: torch.device) -> torch.Tensor | None:
    """The base factor: (m, m) float32 of ±1 on `device`; None for m = 1."""
    if m == 1:
        return None
    stem = next((b for b in constants.HADAMARD_BASES if m % b == 0), 1)
    small = [
        [1 - 2 * ((row >> j) & 1) for j in range(stem)]
        for row in constants.HADAMARD_BASES.get(stem, (0,))
    ]
    rest = torch.tensor(_signs(m // stem), dtype=torch.float32)
    return torch.kron(torch.tensor(small, dtype=torch.float32), rest).to(device)


@dataclass(frozen=True)
class Identity:
    """No transform."""

    def order(self, width: int) -> int:
        """1, for every width."""
        return 1

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x itself."""
        return x

    def transpose(self, x: torch.Tensor) -> torch.Tensor:
        """x itself."""
        return x

    def __str__(self) -> str:
        return "identity"


@dataclass(frozen=True)
class Hadamard:
    """Orthonormal block-diagonal Hadamard transform; `block` is the order of a block.

    block: 2**k, or 12, 20, 28 or 40 times 2**k; None takes the largest power of two up to 128 that
    divides the width. Orders with an odd factor are not symmetric: `transpose` is not `apply`.
    """

    block: int | None = None

    def __post_init__(self) -> None:
        if self.block is not None:
            split(self.block)

    def order(self, width: int) -> int:
        """The order of a block for rows of `width`; ValueError where it does not divide it."""
        if self.block is None:
            return min(128, width & -width) if width else 1
        if width % self.block:
            raise ValueError(f"width {width} is not divisible by the Hadamard block {self.block}")
        return self.block

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x H along the last axis; x (..., d) float32, bfloat16 or float16; differentiable."""
        return self._rotate(x, False)

    def transpose(self, x: torch.Tensor) -> torch.Tensor:
        """x H^T along the last axis, the inverse of `apply`; differentiable."""
        return self._rotate(x, True)

    def _rotate(self, x: torch.Tensor, transpose: bool) -> torch.Tensor:
        from . import ops

        ops.check_input(x)
        ops.check_tangents(x)
        y: torch.Tensor = ops.hadamard(x, self.order(x.shape[-1]), transpose)
        return y

    def __str__(self) -> str:
        return "hadamard" if self.block is None else f"hadamard{self.block}"


Transform = Identity | Hadamard


def parse(name: str) -> Transform:
    """The transform of a name: identity, hadamard, hadamard128."""
    if name == "identity":
        return Identity()
    stem, digits = name.rstrip("0123456789"), name[len(name.rstrip("0123456789")) :]
    if stem == "hadamard":
        return Hadamard(int(digits) if digits else None)
    raise ValueError(f"transform must be identity or hadamard[block], got {name!r}")
