"""What an adapter is told of a quantizer: plain numbers and names, and nothing of quest's own."""

from __future__ import annotations

from dataclasses import dataclass

from quest.conformance import oracle
from quest.quantizer import Quantizer


@dataclass(frozen=True)
class Format:
    """A quantizer for rows of one width.

    grid: its name, like "uniform4", "ternary", "e2m1", "lloyd_max3"; an own outermost point stands
    behind a colon, "uniform4:1.5". levels: number of points. points: ascending, for rows of unit
    RMS. step: distance of neighbours, None where they are not equidistant. half_gap: half the
    distance of the two outermost points. block: order of the Hadamard blocks. estimator: "trust",
    "clip" or "ste", with its parameter. sparsity: None, or ("nm" or "pairwise", n, m).
    """

    grid: str
    levels: int
    points: tuple[float, ...]
    step: float | None
    half_gap: float
    block: int
    estimator: str = "ste"
    parameter: float = 1.0
    sparsity: tuple[str, int, int] | None = None

    @property
    def bits(self) -> int:
        """Bits of a packed code: the smallest of 1, 2, 4 and 8 that holds all levels."""
        return next(b for b in (1, 2, 4, 8) if 2**b >= self.levels)


def of(q: Quantizer, width: int) -> Format:
    """The format of a quantizer for rows of `width`; ValueError where it has no grid."""
    grid, (estimator, parameter) = q.require_grid(), oracle.estimator(q)
    return Format(
        grid=grid.name,
        levels=grid.levels,
        points=grid.points,
        step=grid.step,
        half_gap=grid.half_gap,
        block=q.transform.order(width),
        estimator=estimator,
        parameter=parameter,
        sparsity=oracle.pattern(q),
    )
