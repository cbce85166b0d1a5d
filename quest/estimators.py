"""Gradient estimators: which entries let the gradient through, in the rotated domain.

Source: method, section 4; QuEST (arXiv 2502.05003), section 4 (trust estimation).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from . import scalars


def _scale(name: str, value: float) -> None:
    if not (scalars.is_number(value) and abs(value) <= sys.float_info.max):
        raise ValueError(f"{name} scale must be a finite number, got {scalars.shown(value)}")
    if value <= 0:
        raise ValueError(f"{name} scale must be positive, got {value!r}")


@dataclass(frozen=True)
class STE:
    """Straight-through: the gradient passes everywhere."""

    def __str__(self) -> str:
        return "ste"


@dataclass(frozen=True)
class Clip:
    """The gradient passes where |x_h| <= scale * outermost point * sigma."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        _scale("Clip", self.scale)

    def __str__(self) -> str:
        return f"clip{float(self.scale)!r}"


@dataclass(frozen=True)
class Trust:
    """The gradient passes where |Q(x_h) - x_h| <= scale * T * sigma, T the grid's half gap."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        _scale("Trust", self.scale)

    def __str__(self) -> str:
        return f"trust{float(self.scale)!r}"


Estimator = STE | Clip | Trust


def parse(name: str) -> Estimator:
    """The estimator of a name: ste, clip1.3, trust1.0."""
    if name == "ste":
        return STE()
    for stem, kind in (("clip", Clip), ("trust", Trust)):
        if name.startswith(stem):
            try:
                return kind(float(name[len(stem) :]))
            except ValueError as error:
                raise ValueError(f"estimator {name!r}: {error}") from None
    raise ValueError(f"estimator must be ste, clip<scale> or trust<scale>, got {name!r}")
