"""Do the judges ever reject what is correct? `python -m property_tests.false_alarms [--seeds N]`.

Each seed draws a shape, a dtype, a distribution, a format and an order for every implementation of
`variants` and `variant_rows`, runs it and asks the judges that judge our own lanes. No failure is
expected. The table names implementation and stage, with seeds, elements judged and the worst ratio
of error to bound; the rules that need the whole (ambiguous share, one-sided flips) are applied to
the sums.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import click
import numpy as np
import torch
from rich.progress import track
from torch import Tensor

import quest
from property_tests import variant_rows, variants
from property_tests.variant_rows import Gate, Gradient, Norm
from property_tests.variants import ROTATIONS, SCALINGS, SUMS, Rotation, Scaling
from quest.conformance import inputs, judges, oracle
from quest.conformance.strategies import ORDERS
from quest.conformance.verdict import Tally, Verdict
from quest.reference.bounds import Sums

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows with a NaN have rules and no rounding.
KINDS = tuple(k for k in inputs.DISTRIBUTIONS if k != "non_finite")
FORMATS = (
    *(quest.grids.uniform(b) for b in range(1, 9)),
    quest.grids.ternary(),
    quest.grids.e2m1(),
    quest.grids.lloyd_max(3),
    quest.grids.lloyd_max(8),
)
# What the operators of gates and norms quantize to: grids that have an operand.
UNIFORM = FORMATS[:9]
ESTIMATORS = (quest.Trust(), quest.Trust(0.5), quest.Clip(1.3), quest.STE())
SPARSITIES = (None, None, quest.NM(2, 4), quest.Pairwise(4, 8))


# Values with many bits. Where sums that are 0 need not come out as 0, the others are made of ties.
NO_TIES = ("gaussian", "heavy", "outlier", "tiny", "huge", "mixed_rows")


@dataclass(frozen=True)
class Implementation:
    """judge(seed) runs the implementation on the seed's input and asks the judges."""

    name: str
    judge: Callable[[int], list[Verdict]]


def _pick(options: tuple, g: torch.Generator):  # type: ignore[no-untyped-def, type-arg]
    return options[int(torch.randint(len(options), (), generator=g))]


def _shape(g: torch.Generator, order: int, group: int = 1) -> tuple[int, int]:
    step = order * group // int(np.gcd(order, group))
    turns = tuple(n for n in (1, 2, 3, 5, 7) if n * step <= max(400, step))
    return _pick((1, 2, 3, 5, 7), g), _pick(turns, g) * step


def _input(g: torch.Generator, order: int, group: int = 1, ties: bool = True) -> Tensor:
    shape = _shape(g, order, group)
    seed = int(torch.randint(2**31, (), generator=g))
    kind, dtype = _pick(KINDS, g), _pick(DTYPES, g)
    if not ties:
        kind, dtype = _pick(NO_TIES, g), torch.float32
    return inputs.draw(kind, shape, dtype, seed)


def _transform(seed: int, rotation: Rotation) -> list[Verdict]:
    g = torch.Generator().manual_seed(seed)
    order, transpose = _pick(ORDERS, g), bool(seed % 2)
    x = _input(g, order)
    y = variants.rotate(x, order, transpose, rotation)
    return [judges.rotated(x, y, order, transpose, rotation.sums(order))]


def _backward(seed: int, rotation: Rotation) -> list[Verdict]:
    g = torch.Generator().manual_seed(seed)
    order = _pick(ORDERS, g)
    grad = _input(g, order)
    mask = torch.randint(2, grad.shape, generator=g).bool()
    dx = variants.rotate(torch.where(mask, grad, 0.0), order, True, rotation)
    return [judges.transposed(grad, quest.packing.pack(mask, 1), dx, order, rotation.sums(order))]


def _scale(seed: int, scaling: Scaling) -> list[Verdict]:
    g = torch.Generator().manual_seed(seed)
    order = _pick(ORDERS, g)
    x = _input(g, order)
    sigma, _ = variants.scale(x, order, scaling, ROTATIONS[0])
    return [judges.scaled(x, sigma, order)]


def _quantizer(
    seed: int, rotation: Rotation, scaling: Scaling, coding: variants.Coding
) -> list[Verdict]:
    g = torch.Generator().manual_seed(seed)
    order, sparsity = _pick(ORDERS, g), _pick(SPARSITIES, g)
    sums = rotation.sums(order)
    # A dot product of many terms is too coarse for the finest grids: its codes are inconclusive.
    grids = FORMATS if sums.roundings is None else FORMATS[:4]
    q = quest.Quantizer(_pick(grids, g), quest.Hadamard(order), _pick(ESTIMATORS, g), sparsity)
    x = _input(g, order, 1 if sparsity is None else sparsity.m, ties=sums.last)
    return judged(x, q, variants.quantize(x, q, rotation, scaling, coding), sums)


def judged(
    x: Tensor, q: quest.Quantizer, made: tuple[Tensor, ...], sums: Sums, conclusive: bool = True
) -> list[Verdict]:
    """The stages of a quantizer, as `examine.quantizer` has them judged."""
    codes, sigma, mask, keep, values = made
    kept = None if q.sparsity is None else keep
    order = q.transform.order(x.shape[-1])
    found = [judges.scaled(x, sigma, order, sums)]
    if kept is not None:
        found += [judges.selected(x, q, kept, sums), judges.pruned(q, codes, kept)]
    return [
        *found,
        judges.coded(x, q, codes, sigma, kept, conclusive=conclusive, sums=sums),
        judges.masked(x, q, codes, sigma, mask, kept, sums=sums),
        judges.dequantized(q, codes, sigma, kept, values),
    ]


@dataclass(frozen=True)
class Drawn:
    """Two inputs (n, d) of one dtype for a prologue, and the quantizer of its rows.

    conclusive: whether the rows have no ties of their own. Gates of 0 and of infinity, and rows of
    few values that are no longer integers of few bits, have codes that flip together.
    """

    pair: tuple[Tensor, Tensor]
    q: quest.Quantizer
    sums: Sums
    conclusive: bool


def _drawn(g: torch.Generator, rotation: Rotation) -> Drawn:
    order, dtype = _pick(ORDERS, g), _pick(DTYPES, g)
    plain = ("gaussian", "gaussian")
    kinds = _pick((plain, (_pick(KINDS, g), _pick(KINDS, g))), g)
    shape, seed = _shape(g, order), int(torch.randint(2**31, (), generator=g))
    one, other = (inputs.draw(kind, shape, dtype, seed + i) for i, kind in enumerate(kinds))
    sums = rotation.sums(order)
    # As for a quantizer alone: formats for a dot product, and values whose sums need not be exact.
    grids = UNIFORM if sums.roundings is None else UNIFORM[:4]
    q = quest.Quantizer(_pick(grids, g), quest.Hadamard(order), _pick(ESTIMATORS, g))
    conclusive = kinds == plain and (sums.last or dtype is torch.float32)
    return Drawn((one, other), q, sums, conclusive)


Parts = tuple[Rotation, Scaling, variants.Coding]


def _parts(i: int) -> Parts:
    """Every one comes up, in pairs that seldom meet."""
    each = ROTATIONS, SCALINGS, variants.CODINGS
    return each[0][i % len(each[0])], each[1][i % len(each[1])], each[2][i % len(each[2])]


def _rows(x: Tensor, drawn: Drawn, parts: Parts) -> list[Verdict]:
    """The stages of the quantizer and its operand, of a prologue's rows x (n, d).

    Rows that are not finite have rules, and no rounding.
    """
    x, q = x[x.isfinite().all(-1)], drawn.q
    if not len(x):
        return []
    made = variants.quantize(x, q, *parts)
    kind, operand, total = variant_rows.operand(made[0], q.require_grid().levels)
    found = judged(x, q, made, drawn.sums, drawn.conclusive)
    found += judges.encoded(q, kind, made[0], None, operand, total)
    if drawn.conclusive:
        return found
    # Nor may they count in the sums over all seeds.
    return [dataclasses.replace(v, ambiguous=0, up=0, down=0) for v in found]


def _gated(seed: int, gate: Gate, parts: Parts) -> list[Verdict]:
    drawn = _drawn(torch.Generator().manual_seed(seed), parts[0])
    g, v = drawn.pair
    x = variant_rows.gated(g, v, gate)
    stored = x.dtype if gate.stored else None
    return [judges.gated(g, v, x, stored), *_rows(x, drawn, parts)]


def _normed(seed: int, norm: Norm, parts: Parts) -> list[Verdict]:
    g = torch.Generator().manual_seed(seed)
    drawn = _drawn(g, parts[0])
    # Halves, whose sum is in range.
    h, residual = (t / 2 for t in drawn.pair)
    weight = inputs.draw("gaussian", (h.shape[-1],), h.dtype, seed)
    eps, add = _pick((1e-5, 1e-6, 1.0), g), _pick(tuple(variant_rows.ADDITIONS.values()), g)
    found = []
    if seed % 2:
        x, h = h, add(h, residual)
        found.append(judges.added(x, residual, h))
    rows = variant_rows.normed(h, weight, eps, norm)
    stored = h.dtype if norm.stored else None
    found.append(judges.normed(h, weight, eps, rows, stored))
    return found + _rows(rows, drawn, parts)


def _gradients(seed: int, gradient: Gradient) -> list[Verdict]:
    g = torch.Generator().manual_seed(seed)
    gate, value = _drawn(g, ROTATIONS[0]).pair
    grad = inputs.draw(_pick(KINDS, g), tuple(gate.shape), gate.dtype, seed)
    made = variant_rows.gradients(grad, gate, value, gradient)
    return judges.gated_backward(grad, gate, value, *made)


def _layer(seed: int, add: variants.Add, fused: bool) -> list[Verdict]:
    """The products of a layer whose operands are given: y, dx, dw and db."""
    g = torch.Generator().manual_seed(seed)
    dtype, bias = _pick(DTYPES, g), bool(seed % 3)
    n, k, m = _pick((1, 3, 7), g), _pick((16, 48, 96), g), _pick((1, 5, 8), g)
    kind = _pick(("gaussian", "heavy", "outlier", "equal", "alternating", "integers"), g)
    x, w = inputs.draw(kind, (n, k), dtype, seed), inputs.draw("gaussian", (m, k), dtype, seed + 1)
    grad = inputs.draw(kind, (n, m), dtype, seed + 2)
    b = inputs.draw("gaussian", (m,), dtype, seed + 3) if bias else None
    made = quest.recipe("w4a4", transform=quest.Hadamard(16))
    xh, wh = made.activation(x), made.weight(w)
    masks = tuple(q.quantize(t).mask for q, t in ((made.activation, x), (made.weight, w)))
    turn = functools.partial(variants.rotate, order=16, transpose=True, rotation=ROTATIONS[0])
    dx = torch.where(masks[0], variants.product(grad, wh.t(), None, add, fused), 0.0)
    dw = torch.where(masks[1], variants.product(grad.t(), xh.t(), None, add, fused), 0.0)
    out = {
        "y": variants.product(xh, wh, b, add, fused),
        "dx": turn(dx),
        "dw": turn(dw),
        "x_hat": xh,
        "w_hat": wh,
    }
    if b is not None:
        out["db"] = add(grad.float().t()).to(dtype)
    return judges.layer(x, w, grad, b, made, out, (masks[0], masks[1]), 2.0**-24)


def _integers(seed: int, epilogue: str, parts: int) -> list[Verdict]:
    """The integer product: K in parts, and the factors in another order."""
    g = torch.Generator().manual_seed(seed)
    dtype, k = _pick(DTYPES, g), _pick((8, 96, 1000), g)
    shapes = (_pick((1, 3, 7), g), k), (_pick((1, 5, 8), g), k)
    a, b = (torch.randint(-127, 128, s, generator=g) for s in shapes)
    kind = _pick(("gaussian", "heavy", "tiny", "mixed_rows"), g)
    scales = tuple(
        inputs.draw(kind, (s[0], 1), torch.float32, seed + i).abs() for i, s in enumerate(shapes)
    )
    bias = inputs.draw("gaussian", (len(b),), dtype, seed) if seed % 2 else None
    units = (0.0436, 0.117)
    total = variants.split_integers(a, b, parts)
    y = variants.EPILOGUES[epilogue](total, units, (scales[0], scales[1]), bias).to(dtype)
    whole = (oracle.lift(a), oracle.lift(b))
    return [
        judges.accumulated(a.to(torch.int8), b.to(torch.int8), total.int()),
        judges.multiplied(whole, units, (scales[0], scales[1]), bias, y),
    ]


def implementations() -> Iterator[Implementation]:
    """All of them."""
    for r in ROTATIONS:
        yield Implementation(f"transform: {r.name}", functools.partial(_transform, rotation=r))
        yield Implementation(f"backward: {r.name}", functools.partial(_backward, rotation=r))
    for s in SCALINGS:
        yield Implementation(f"scale: {s.name}", functools.partial(_scale, scaling=s))
    for i in range(len(ROTATIONS)):
        r, s, c = _parts(i)
        part = functools.partial(_quantizer, rotation=r, scaling=s, coding=c)
        yield Implementation(f"quantizer: {r.name}; {s.name}; {c.name}", part)
    yield from _prologues()
    for name, add in SUMS.items():
        for fused in (False, True):
            label = f"layer: sums {name}" + (", bias in the sum" if fused else "")
            yield Implementation(label, functools.partial(_layer, add=add, fused=fused))
    for i, name in enumerate(variants.EPILOGUES):
        part = functools.partial(_integers, epilogue=name, parts=(1, 2, 5)[i % 3])
        yield Implementation(f"product: K in {(1, 2, 5)[i % 3]}, {name}", part)


def _prologues() -> Iterator[Implementation]:
    """Gates and norms; the parts of the quantizers behind them take turns."""
    turns = map(_parts, itertools.count(len(ROTATIONS)))
    for gate in variant_rows.GATES:
        part = functools.partial(_gated, gate=gate, parts=next(turns))
        yield Implementation(f"gate: {gate.name}", part)
    for norm in variant_rows.NORMS:
        part = functools.partial(_normed, norm=norm, parts=next(turns))
        yield Implementation(f"norm: {norm.name}", part)
    for gradient in variant_rows.GRADIENTS:
        part = functools.partial(_gradients, gradient=gradient)
        yield Implementation(f"gate's gradients: {gradient.name}", part)


@dataclass
class Line:
    """A line of the table: the seeds that reached a stage, and what they added up to."""

    seeds: int
    tally: Tally


def judge(seeds: range, chosen: list[Implementation]) -> dict[tuple[str, str], Line]:
    """Lines by (implementation, stage)."""
    lines: dict[tuple[str, str], Line] = {}
    shown = track(seeds, "seeds", transient=True) if sys.stderr.isatty() else seeds
    for seed in shown:
        for made in chosen:
            for verdict in made.judge(seed):
                line = lines.setdefault((made.name, verdict.stage), Line(0, Tally()))
                line.seeds += 1
                line.tally.add(verdict)
                if verdict.failure is not None:
                    line.tally.failures[-1] = f"seed {seed}: {verdict.failure}"
    return lines


def table(lines: dict[tuple[str, str], Line]) -> list[str]:
    """The table, its totals, and what failed."""
    wide, stages = (max(map(len, names)) for names in zip(*lines, strict=True))
    head = (
        f"{'implementation':<{wide}}  {'stage':<{stages}}{'seeds':>6}{'elements':>12}{'worst r':>9}"
    )
    told = [head + f"{'failures':>10}"]
    failures = []
    order = list(dict.fromkeys(name for name, _ in lines))
    for (name, stage), line in sorted(lines.items(), key=lambda item: order.index(item[0][0])):
        problems = line.tally.problems()
        told.append(
            f"{name:<{wide}}  {stage:<{stages}}{line.seeds:>6}{line.tally.elements:>12,}"
            f"{line.tally.ratio:>9.3f}{len(problems):>10}"
        )
        failures += [f"{name}, {stage}: {p}" for p in problems]
    elements = sum(line.tally.elements for line in lines.values())
    names = len({name for name, _ in lines})
    total = f"{names} implementations, {elements:,} elements judged, {len(failures)} false alarms"
    return [*told, total, *failures[:20]]


@click.command()
@click.option("--seeds", default=1000, show_default=True, type=click.IntRange(min=1))
@click.option("--first", default=0, show_default=True, type=click.IntRange(min=0), help="Seed.")
@click.option("--only", default="", help="Only implementations whose name holds this.")
def main(seeds: int, first: int, only: str) -> None:
    """Judge correct implementations that are not ours, and count the false alarms."""
    torch.set_num_threads(1)
    known = list(implementations())
    chosen = [made for made in known if only in made.name]
    if not chosen:
        names = "; ".join(made.name for made in known)  # some of which have commas
        told = f"no implementation has {only!r} in its name; there are: {names}"
        raise click.BadParameter(told, param_hint="--only")
    lines = judge(range(first, first + seeds), chosen)
    click.echo(
        f"seeds {first} to {first + seeds - 1}; quest {quest.__version__}, torch "
        f"{torch.__version__}, numpy {np.__version__}, Python {platform.python_version()}"
    )
    click.echo("\n".join(table(lines)))
    sys.exit(any(line.tally.problems() for line in lines.values()))


if __name__ == "__main__":
    main()
