"""How quantized rows become operands of an integer product.

The points of a grid that are integers times a unit fit an exact product: signs as single bits,
other integers as int8, times the largest power of two that leaves them there: the same sums, but
the bits that then are always 0 take no power, which is what holds back the tensor cores (a small
negative integer sets all the upper ones). Uniform grids of 8 bits have integers to 255, twice what
int8 holds: there the codes themselves are multiplied, and sums of the rows supply the half that
each of them lacks.
Source: method, section 3; QuEST (arXiv 2502.05003), section 4.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .grids import Grid
    from .quantizer import Quantizer

KINDS = ("bits", "integers", "codes")
# In which an operand of integers waits for the backward, and the bits of an entry.
PACKED = {"packed2": 2, "packed4": 4}
# The accumulator is int32: fewer than 2**17 products of -128 fit it. The limit is the power of two
# below.
MAX_WIDTH = 2**16


@dataclass(frozen=True)
class Form:
    """An operand: what is stored, and what it stands for.

    kind: "bits", (..., ceil(d/8)) uint8, bit 1 for +1 and bit 0 for -1; "integers", (..., d) int8;
    or "codes", (..., d) int8, where the integer is 2 code + 1.
    integer: what turns a point (of a uniform grid: in steps) into its integer. unit: a point is
    its integer times unit. bits: of a stored entry, packed where they are fewer than 8; the integer
    is stride times what is stored, less top. spread: the power of two that integers are multiples
    of.
    """

    kind: str
    integer: float
    unit: float
    bits: int
    stride: int
    top: int
    spread: int


_STORED = {"bits": (1, 2, 1), "integers": (8, 1, 0), "codes": (8, 2, -1)}


@functools.cache
def form(grid: Grid, kind: str) -> Form:
    """The form of a grid's points; ValueError where the grid has none of that kind."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if grid.step is not None:
        unit = grid.step if grid.levels % 2 else grid.step / 2
        factor = 1.0 if grid.levels % 2 else 2.0
    else:
        # The outermost point of E2M1 is 12 halves; a table of two points is a pair of signs.
        whole = 12.0 if grid.name.startswith("e2m1") else 1.0
        unit, factor = grid.outer / whole, whole / grid.outer
    largest = round(grid.outer / unit)
    fits = {"bits": grid.levels == 2, "integers": largest <= 127, "codes": largest == 255}
    if not (fits[kind] and all(abs(p / unit - round(p / unit)) < 1e-9 for p in grid.points)):
        raise ValueError(f"grid {grid.name!r} has no operand of kind {kind!r}")
    spread = 1 << (127 // largest).bit_length() - 1 if kind == "integers" else 1
    return Form(kind, factor * spread, unit / spread, *_STORED[kind], spread)


def form_of(q: Quantizer, kind: str) -> Form:
    """The form of what a quantizer makes; ValueError where it has none of that kind."""
    made = form(q.require_grid(), kind)
    if q.sparsity is not None and kind != "integers":
        # A pruned 0 is neither a sign nor half of an odd number.
        raise ValueError(f"pruned entries, sparsity {q.sparsity}, have no place in {kind!r}")
    return made


@functools.cache
def saved(q: Quantizer, kind: str) -> Form:
    """The form in which an operand of `kind` is kept for the backward.

    Integers of a dense uniform grid of 3 to 16 levels in the bits of their code, as an index from
    0: "packed2" or "packed4", (..., ceil(d bits / 8)) uint8, as in `packing`. Others as they are.
    """
    made, grid = form_of(q, kind), q.require_grid()
    packs = kind == "integers" and q.sparsity is None and grid.step is not None
    if not packs or grid.storage_bits not in PACKED.values():
        return made
    return replace(
        made,
        kind=f"packed{grid.storage_bits}",
        bits=grid.storage_bits,
        stride=made.spread if grid.levels % 2 else 2 * made.spread,
        top=round(grid.outer / made.unit),
    )


@functools.cache
def readable(q: Quantizer, kind: str) -> Form:
    """The form of an operand that `decode` reads, one of `KINDS` or of `PACKED`."""
    if kind not in PACKED:
        return form_of(q, kind)
    made = saved(q, "integers")
    if made.kind != kind:
        raise ValueError(f"quantizer {q} has no operand of kind {kind!r}")
    return made


def _kind(q: Quantizer, kinds: tuple[str, ...]) -> str | None:
    for kind in kinds if q.grid is not None else ():
        try:
            form_of(q, kind)
        except ValueError:
            continue
        return kind
    return None


@functools.cache
def kinds(activation: Quantizer, weight: Quantizer) -> tuple[str, str] | None:
    """The kinds in which two quantizers' rows are multiplied; None where they can't be."""
    a, w = _kind(activation, KINDS), _kind(weight, KINDS)
    if "bits" in (a, w) and a != w:
        a, w = _kind(activation, KINDS[1:]), _kind(weight, KINDS[1:])
    return None if a is None or w is None else (a, w)


@dataclass(frozen=True)
class Terms:
    """What makes a product of the accumulator; see `quest.kernels.product`.

    rows, columns: what to multiply the rows' sums by, 0 where they don't count.
    """

    corrected: bool
    factor: float
    rows: int
    columns: int
    length: int


def terms(a: Form, b: Form, width: int) -> Terms:
    """The terms of sum(point point) over `width` entries."""
    unit = a.unit * b.unit
    if a.kind == b.kind == "bits":
        return Terms(True, unit, 1, 1, width)
    if a.kind == b.kind == "codes":
        return Terms(True, 4 * unit, 1, 1, width)  # a point is (code + 1/2) 2 unit
    if "codes" in (a.kind, b.kind):
        # sum of integer (code + 1/2): half of the other's sum.
        return Terms(True, 2 * unit, 2 * (b.kind == "codes"), 2 * (a.kind == "codes"), 0)
    return Terms(False, unit, 0, 0, 0)
