"""A weight that is quantized once, for inference.

What a forward reads of it: on Hopper the operand of the integer product, its packed codes for few
rows, and its compressed form for many where it is 2:4 sparse; elsewhere the values in the weight's
dtype. The numbers are those of the layer that quantizes its weight each time, on the same path.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import direct, lowbit, operands, ops, paths
from .compression import compress
from .estimators import STE
from .gated_product import HALVES, gated_product, launch_gated_product
from .kernels.product import Turned
from .packed import bits_of, launch_packed, packed_product
from .recipes import Recipe
from .rotated_product import fits, launch_rotated_product, rotated_product
from .sparse_product import launch_sparse_product, sparse_product
from .sparsity import NM


@dataclass(frozen=True, eq=False)
class Frozen:
    """A quantized weight (out, in).

    values: (out, in), where layers multiply values. operand, scale, sums: see
    `quest.lowbit.encode`, where they multiply integers; packed: (out, bytes) uint8, its codes at 1,
    2 or 4 bits counted from 0, or None. kept, metadata: the compressed form of an operand that is
    2:4 sparse, see `quest.compression`, or None. names, kinds: of the grids and operands of
    activation and weight, as `quest.lowbit.product` takes them. spec: of the activation's
    quantizer, without a mask. state: of the weight that it was made of; weight: that one, held so
    that no other gets its address. whole, place: the stack of several that this one's tensors are
    rows of, and which of them it is; see `stack`. calls, biases: see `direct`.
    """

    values: Tensor | None = None
    operand: Tensor | None = None
    scale: Tensor | None = None
    sums: Tensor | None = None
    packed: Tensor | None = None
    kept: Tensor | None = None
    metadata: Tensor | None = None
    names: str = ""
    kinds: str = ""
    spec: str = ""
    weight: Tensor | None = None
    state: tuple[object, ...] = ()
    whole: Stack | None = None
    place: int = 0
    calls: direct.Calls = field(default_factory=direct.Calls, init=False, repr=False)
    biases: direct.Joined = field(default_factory=direct.Joined, init=False, repr=False)

    @property
    def path(self) -> str:
        """Of `quest.paths`: what it is made for."""
        return "values" if self.operand is None else "integers"

    def is_of(self, weight: Tensor) -> bool:
        """Whether it was made of this weight as it is now."""
        return self.state == direct.state(weight)

    def form(self, rows: int, width: int) -> str:
        """What so many rows are multiplied with: "operand", "packed" or "compressed"."""
        if self.kept is not None and paths.reads_compressed(rows):
            return "compressed"
        if paths.reads_packed(rows, _bits(self.packed, width), width):
            return "packed"
        return "operand"

    def gates(self, x: Tensor) -> bool:
        """Whether rows of x (..., in) are multiplied by one kernel that may end in a gate.

        Of two weights of one size, stacked.
        """
        return x.dtype in HALVES and self._alone(x)

    def adds(self, x: Tensor, residual: Tensor) -> bool:
        """Whether one kernel multiplies rows of x (..., in) and adds this to what comes out.

        A residual (..., out) of x's dtype, where x lies.
        """
        return (
            self._alone(x)
            and self.operand is not None
            and residual.dtype == x.dtype
            and residual.device == x.device
            and residual.shape == (*x.shape[:-1], self.operand.shape[0])
        )

    def turns(self, x: Tensor, rotary: Turned) -> bool:
        """Whether one kernel multiplies rows of x (..., T, in) and turns what comes out.

        Its first columns, by angles of T rows; see `rotated_product`.
        """
        return x.dtype in HALVES and self._alone(x) and fits(rotary)

    def _alone(self, x: Tensor) -> bool:
        """Whether the product of operands multiplies rows of x (..., in), and nothing else."""
        return (
            x.ndim > 0
            and self.operand is not None
            and self.form(math.prod(x.shape[:-1]), x.shape[-1]) == "operand"
        )

    def read(self) -> tuple[Tensor, ...]:
        """What a forward reads at the least."""
        if self.kept is not None:
            smallest: tuple[Tensor | None, ...] = (self.kept, self.metadata)
        else:
            smallest = (self.operand if self.packed is None else self.packed,)
        found = (self.values, *smallest, self.scale)
        return tuple(t for t in found if t is not None)


@dataclass(frozen=True, eq=False)
class Stack:
    """Several frozen weights on top of each other, as one."""

    frozen: Frozen
    count: int


# Behind operand and packed codes, which products ask for early, another kernel is to follow: the
# scales'. See `multiply` and `direct`.
_ROWS = ("values", "operand", "packed", "scale", "sums", "kept", "metadata")


@torch.no_grad()
def stack(parts: Sequence[Frozen]) -> list[Frozen]:
    """The same frozen weights as rows of one, `stacked(...)`. They must be of one recipe."""
    made: dict[str, Tensor | None] = {}
    # Single bits are packed as they are: one tensor under two names.
    twins = all(part.packed is part.operand for part in parts)
    for name in _ROWS:
        if twins and name == "packed":
            continue
        found = [t for t in (getattr(part, name) for part in parts) if t is not None]
        every = len(found) == len(parts)
        made[name] = torch.cat(found) if every else None
    if twins:
        made["packed"] = made["operand"]
    one = replace(parts[0], weight=None, state=(), whole=None, place=0)
    whole = Stack(_with(one, made), len(parts))
    rows, first = [], 0
    for place, part in enumerate(parts):
        last = first + len(next(t for t in (part.values, part.operand) if t is not None))
        views = {name: None if t is None else t[first:last] for name, t in made.items()}
        if twins:
            views["packed"] = views["operand"]
        rows.append(_with(replace(part, whole=whole, place=place), views))
        first = last
    return rows


def _with(frozen: Frozen, rows: dict[str, Tensor | None]) -> Frozen:
    return replace(frozen, **rows)  # type: ignore[arg-type]


def stacked(parts: Sequence[Frozen]) -> Frozen | None:
    """The one weight that these are, in this order, the rows of; None where there is none."""
    whole = parts[0].whole
    if whole is None or whole.count != len(parts):
        return None
    if any(part.whole is not whole or part.place != i for i, part in enumerate(parts)):
        return None
    return whole.frozen


def _bits(packed: Tensor | None, width: int) -> int:
    """Bits of a code in packed rows of so many, 0 where there are none: by a shape, which is traced
    and takes the host no time.
    """
    return 0 if packed is None or not width else packed.shape[1] * 8 // width


@torch.no_grad()
def freeze(weight: Tensor, recipe: Recipe) -> Frozen:
    """Quantize a weight (out, in) for layers that run where it lies."""
    pair = operands.kinds(recipe.activation, recipe.weight)
    if pair is None or not paths.has_integers(weight, recipe):
        values = recipe.weight(weight.detach())  # which "bf16" returns as it is
        return Frozen(values, weight=weight, state=direct.State(direct.state(weight)))
    from .kernels import few

    operand, scale, _, sums = lowbit.encode(weight, recipe.weight.spec, pair[1])
    packed = kept = metadata = None
    names = ",".join(q.require_grid().name for q in (recipe.activation, recipe.weight))
    if recipe.weight.sparsity is None:
        bits = bits_of(names, ",".join(pair))
        if few.supports(1, weight.shape[1], bits):
            packed = operand if bits == 1 else recipe.weight.pack(weight).codes
    elif recipe.weight.sparsity == NM(2, 4):
        kept, metadata = compress(operand)
    # The last kernel here, after those that wrote what products read: see `multiply` and `direct`.
    scale = scale.clone()
    kinds = ",".join(pair)
    # Nothing asks for a mask, and its bits are a tenth of the quantizer's work.
    spec = replace(recipe.activation, estimator=STE()).spec
    return Frozen(
        None, operand, scale, sums, packed, kept, metadata, names, kinds, spec, weight,
        direct.State(direct.state(weight)),
    )  # fmt: skip


def linear(
    x: Tensor, frozen: Frozen, bias: Tensor | None, recipe: Recipe, gate: bool = False,
    residual: Tensor | None = None, rotary: Turned | None = None,
) -> Tensor:  # fmt: skip
    """y (..., out) of x's dtype for x (..., in); no gradient.

    gate: (..., out / 2), see `gated_product`; where `frozen.gates(x)`. residual: (..., out); then
    residual + y; where `frozen.adds(x, residual)`. rotary: y is turned, see `rotated_product`;
    where `frozen.turns(x, rotary)`.
    """
    dtype = x.dtype
    if frozen.operand is None:
        assert frozen.values is not None
        values = recipe.activation(x)
        b = None if bias is None else bias.to(dtype)
        return torch.nn.functional.linear(values, frozen.values.to(dtype), b)
    xs = direct.inputs((x,) if residual is None else (x, residual), rotary)
    unwatched = all(map(ops.direct, xs)) and direct.fits(bias, x, frozen.operand.shape[0])
    told = direct.how(None, gate, residual is not None, rotary)
    if unwatched and (made := direct.again(frozen, xs, (bias,), told)) is not None:
        return made[0]
    if unwatched:
        run = functools.partial(direct.linear, x, frozen, bias, dtype, gate, residual, rotary)
        # Rows that lie apart may be copied first.
        whole = x.is_contiguous()
        made = direct.recorded(frozen, xs, (bias,), run, told) if whole else run()
        if made is not None:
            return made[0]
    rows, kind = lowbit.as_rows(x), frozen.kinds.partition(",")[0]
    if unwatched:
        quantized = lowbit.launch_operand(rows, ops.quantizer(frozen.spec), kind)
    else:
        quantized = lowbit.operand(rows, frozen.spec, kind)
    added = None if residual is None else lowbit.as_rows(residual)
    y = multiply(quantized, frozen, bias, x.shape[-1], dtype, unwatched, gate, added, rotary)
    return y.view(*x.shape[:-1], y.shape[-1])


def multiply(
    rows: tuple[Tensor, Tensor, Tensor], frozen: Frozen, bias: Tensor | None, width: int,
    dtype: torch.dtype, unwatched: bool, gate: bool = False, residual: Tensor | None = None,
    rotary: Turned | None = None,
) -> Tensor:  # fmt: skip
    """y (n, out) of `dtype` for rows of `width` entries and a weight, both as integers.

    rows: operand (n, bytes), scale (n, 1), sums (n, 1), as `lowbit.operand` makes them.
    unwatched: `ops.direct` of what they were made of. gate, rotary: as in `linear`; residual:
    (n, out).
    """
    assert frozen.operand is not None
    assert frozen.scale is not None
    assert frozen.sums is not None
    a, a_scale, a_sums = rows
    weight: tuple[Tensor, ...] = (frozen.operand,)
    function, launch = lowbit.product, lowbit.launch_product
    form = frozen.form(len(a), width)
    more: tuple[Any, ...] = () if residual is None else (residual,)
    assert form == "operand" or not more
    if gate:
        assert form == "operand"
        function, launch = gated_product, launch_gated_product
    elif rotary is not None:
        assert form == "operand"
        function, launch, more = rotated_product, launch_rotated_product, rotary
    elif form == "compressed":
        assert frozen.kept is not None
        assert frozen.metadata is not None
        function, launch = sparse_product, launch_sparse_product
        weight = (frozen.kept, frozen.metadata)
    elif form == "packed":
        assert frozen.packed is not None
        function, launch, weight = packed_product, launch_packed, (frozen.packed,)
        more = (True,)  # settled: `freeze` and `stack` queue another kernel after their codes'
    y: Tensor = (launch if unwatched else function)(
        a, *weight, a_scale, frozen.scale, a_sums, frozen.sums, bias, frozen.names, frozen.kinds,
        width, dtype, *more,
    )  # fmt: skip
    return y
