"""Implementations that are correct and not ours: the parts that `false_alarms` puts together.

Each computes in the arithmetic that its name says, with an order of summation, a blocking or a
place of a rounding that none of our lanes has. Rows come near 1 by a power of two, which rounds
nothing. A transform says how it takes its sums (`bounds.Sums`) where it is no butterfly.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import quest
from quest.reference import hadamard
from quest.reference.bounds import BUTTERFLY, Sums

Add = Callable[[Tensor], Tensor]


def split_sum(terms: Tensor, parts: int) -> Tensor:
    """Sum over the last axis in float32: each of `parts` runs in order, then the runs in order."""
    size = -(-terms.shape[-1] // parts)
    runs = torch.nn.functional.pad(terms, (0, size * parts - terms.shape[-1]))
    return sequential(sequential(runs.unflatten(-1, (parts, size))))


def sequential(terms: Tensor) -> Tensor:
    """Sum over the last axis, first to last, one rounding each."""
    total = torch.zeros_like(terms[..., 0])
    for i in range(terms.shape[-1]):
        total = total + terms[..., i]
    return total


def tree(terms: Tensor) -> Tensor:
    """Sum over the last axis by halves: ceil(log2 n) roundings on every way."""
    while terms.shape[-1] > 1:
        n = terms.shape[-1]
        half = n // 2
        added = terms[..., :half] + terms[..., half : 2 * half]
        terms = torch.cat([added, terms[..., 2 * half :]], -1) if n % 2 else added
    return terms[..., 0]


def kahan(terms: Tensor) -> Tensor:
    """Compensated sum over the last axis (Kahan 1965)."""
    total, lost = torch.zeros_like(terms[..., 0]), torch.zeros_like(terms[..., 0])
    for i in range(terms.shape[-1]):
        y = terms[..., i] - lost
        t = total + y
        total, lost = t, (t - total) - y
    return total


def double(terms: Tensor) -> Tensor:
    """Sum over the last axis in float64."""
    return terms.double().sum(-1)


def reverse(terms: Tensor) -> Tensor:
    """Sum over the last axis, last to first."""
    return sequential(terms.flip(-1))


SUMS: dict[str, Add] = {
    "sequential": sequential,
    "reverse": reverse,
    "tree": tree,
    "kahan": kahan,
    "float64": double,
    "split in 4": functools.partial(split_sum, parts=4),
    "split in 7": functools.partial(split_sum, parts=7),
}


@functools.cache
def signs(order: int, transpose: bool) -> Tensor:
    """(order, order) of +1 and -1, float32, by which rows are multiplied from the right."""
    h = torch.from_numpy(hadamard.matrix(order)).float()
    return h.t().contiguous() if transpose else h


@dataclass(frozen=True)
class Rotation:
    """A transform of blocks.

    run(x (blocks, order) float32 near 1, order, transpose) gives the same shape, normalised,
    float32 or float64. sums(order): what the implementer declares of its sums.
    """

    name: str
    run: Callable[[Tensor, int, bool], Tensor]
    sums: Callable[[int], Sums] = lambda order: BUTTERFLY


def _stages(x: Tensor, power: int, spans: list[int], factor: dict[int, float]) -> Tensor:
    """The butterfly's stages on (n, power), in the order of `spans`, each times its factor."""
    for half in spans:
        y = x.reshape(-1, power // (2 * half), 2, half)
        x = torch.stack([y[:, :, 0] + y[:, :, 1], y[:, :, 0] - y[:, :, 1]], 2).reshape(-1, power)
        x = x * factor.get(half, 1.0)
    return x


def _base(x: Tensor, m: int, power: int, transpose: bool, add: Add) -> Tensor:
    """The base factor on (n, m * power) whose Sylvester part is done; sums by `add`."""
    if m == 1:
        return x
    blocks = x.reshape(-1, m, power)
    h = signs(m, transpose)  # y[i] = sum_j x[j] h[j, i]
    terms = blocks[:, None] * h.t()[None, :, :, None]  # (n, i, j, power)
    return add(terms.movedim(2, -1)).to(x.dtype).reshape(-1, m * power)


def _butterfly(
    x: Tensor, order: int, transpose: bool, *, falling: bool = False, first: bool = False,
    halves: bool = False, add: Add = sequential,
) -> Tensor:  # fmt: skip
    """falling: wide spans first. first: normalised before the sums. halves: divided by 2 on the
    way, exactly, at every second stage."""
    m, power = hadamard.split(order)
    spans = [1 << s for s in range(power.bit_length() - 1)]
    factor = dict.fromkeys(spans[1::2], 0.5) if halves else {}
    rest = order**-0.5 * 2.0 ** len(factor)
    x = x * rest if first else x
    y = x.reshape(-1, power)
    y = _stages(y, power, spans[::-1] if falling else spans, factor).reshape(-1, order)
    y = _base(y, m, power, transpose, add)
    return y if first else y * rest


def _matrix(x: Tensor, order: int, transpose: bool, *, add: Add, inside: bool = False) -> Tensor:
    """The whole matrix, term by term. inside: entries of order**-0.5, rounded, in place of 1."""
    h = signs(order, transpose)
    h = h * torch.tensor(order**-0.5, dtype=torch.float32) if inside else h
    y = add(x[:, None, :] * h.t()[None])  # (n, i, j)
    return y if inside else y * order**-0.5


def _product(x: Tensor, order: int, transpose: bool) -> Tensor:
    """The whole matrix, by the library's product in float32."""
    return (x @ signs(order, transpose)) * order**-0.5


def _wide(x: Tensor, order: int, transpose: bool) -> Tensor:
    """The whole matrix in float64, one rounding at the end."""
    return (x.double() @ signs(order, transpose).double()) * order**-0.5


def _fused(x: Tensor, order: int, transpose: bool) -> Tensor:
    """Multiply-adds of normalised entries, one rounding each (the product is exact in float64)."""
    h = (signs(order, transpose) * torch.tensor(order**-0.5, dtype=torch.float32)).double()
    y = torch.zeros_like(x)
    for j in range(order):
        y = (y.double() + x[:, j, None].double() * h[j]).float()
    return y


def _small(order: int) -> int:
    """The power of two of the first of two factors: at most 16, as tensor cores take them."""
    return min(16, hadamard.split(order)[1])


def _factors(x: Tensor, order: int, transpose: bool) -> Tensor:
    """Two small products, H = kron(matrix(order / s), matrix(s)), as on tensor cores."""
    s = _small(order)
    y = (x.reshape(-1, s) @ signs(s, False)).reshape(-1, order // s, s)
    return (y.movedim(1, 2) @ signs(order // s, transpose)).movedim(2, 1).reshape(
        -1, order
    ) * order**-0.5


def _dot(order: int) -> Sums:
    return Sums(roundings=order)


def _terms(order: int) -> Sums:
    return Sums(roundings=order, last=False)


ROTATIONS = (
    Rotation("butterfly, wide spans first", functools.partial(_butterfly, falling=True)),
    Rotation(
        "butterfly, normalised first",
        functools.partial(_butterfly, first=True),
        lambda order: Sums(last=False),
    ),
    Rotation("butterfly, halved on the way", functools.partial(_butterfly, halves=True)),
    Rotation("butterfly, base as a tree", functools.partial(_butterfly, add=tree)),
    Rotation("butterfly, base compensated", functools.partial(_butterfly, add=kahan)),
    Rotation("matrix, float64", _wide),
    Rotation("matrix, tree", functools.partial(_matrix, add=tree)),
    Rotation("matrix, Kahan", functools.partial(_matrix, add=kahan)),
    Rotation("matrix, sequential", functools.partial(_matrix, add=sequential), _dot),
    Rotation("matrix, the library's product", _product, _dot),
    Rotation(
        "matrix, normalised entries",
        functools.partial(_matrix, add=sequential, inside=True),
        _terms,
    ),
    Rotation("matrix, fused multiply-add", _fused, _terms),
    Rotation("two factors", _factors, lambda order: Sums(_small(order) + order // _small(order))),
)


def near_one(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(x 2^-e float32, 2^e float64) by groups of the last axis of x (..., d); (n, group), (n, 1).

    Exact but where an entry lies 2^126 below the largest of its group.
    """
    blocks = x.double().reshape(-1, group)
    top = blocks.abs().amax(-1, keepdim=True)
    power = torch.ldexp(torch.ones_like(top), torch.frexp(top).exponent)
    return (blocks / power).float(), power


def rotate(x: Tensor, order: int, transpose: bool, rotation: Rotation) -> Tensor:
    """x H or x H^T by a rotation, as x's dtype; finite x (..., d)."""
    if x.numel() == 0:
        return torch.empty_like(x)
    near, power = near_one(x, order)
    return (rotation.run(near, order, transpose) * power).to(x.dtype).reshape(x.shape)


@dataclass(frozen=True)
class Scaling:
    """sigma of rows near 1: run(x (rows, d) float32) gives (rows, 1), float32 or float64.

    after: takes the rotated rows.
    """

    name: str
    run: Add
    after: bool = False


def _rms(x: Tensor, *, add: Add, divide: str = "sum") -> Tensor:
    """divide: the "sum" by d, each "term" by d, the sum "times" 1/d, or the "root" by d**0.5."""
    d = x.shape[-1]
    squares = x * x / d if divide == "term" else x * x
    total = add(squares).unsqueeze(-1)
    if divide == "sum":
        return (total / d).sqrt()
    if divide == "times":
        return (total * torch.tensor(1 / d, dtype=total.dtype)).sqrt()
    return total.sqrt() / math.sqrt(d) if divide == "root" else total.sqrt()


def _fused_squares(x: Tensor) -> Tensor:
    total = torch.zeros_like(x[:, 0])
    for i in range(x.shape[-1]):
        total = (total.double() + x[:, i].double() ** 2).float()
    return (total.unsqueeze(-1) / x.shape[-1]).sqrt()


SCALINGS = (
    *(Scaling(f"sum {name}", functools.partial(_rms, add=add)) for name, add in SUMS.items()),
    Scaling("fused multiply-add", _fused_squares),
    Scaling("terms divided first", functools.partial(_rms, add=tree, divide="term")),
    Scaling("times 1/d", functools.partial(_rms, add=sequential, divide="times")),
    Scaling("norm over root of d", functools.partial(_rms, add=tree, divide="root")),
    Scaling("after the transform, tree", functools.partial(_rms, add=tree), after=True),
    Scaling("after the transform, sequential", functools.partial(_rms, add=sequential), after=True),
    Scaling("after the transform, float64", functools.partial(_rms, add=double), after=True),
)


def scale(x: Tensor, order: int, scaling: Scaling, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """(sigma (..., 1) float32, the rotated rows (rows, d) near 1) of finite x (..., d)."""
    near, power = near_one(x, x.shape[-1])
    y = rotation.run(near.reshape(-1, order), order, False).reshape(near.shape)
    sigma = scaling.run(y if scaling.after else near).double() * power
    largest = torch.finfo(torch.float32).max
    return sigma.clamp(max=largest).float().reshape(*x.shape[:-1], 1), y


@dataclass(frozen=True)
class Coding:
    """From rotated rows to codes, mask and values.

    steps(y, sigma, unit) gives y / (sigma unit), unit being a grid's step, or 1 for a table.
    inside(t, threshold, sigma) whether |t| <= threshold sigma. value(point, sigma): the product.
    """

    name: str
    steps: Callable[[Tensor, Tensor, float], Tensor]
    inside: Callable[[Tensor, float, Tensor], Tensor]
    value: Callable[[Tensor, Tensor], Tensor]


def _halved(point: Tensor, sigma: Tensor) -> Tensor:
    # Twice the point is exact, and so is the half of the product (not of a subnormal scale).
    return (2 * point.float()) * sigma / 2


CODINGS = (
    Coding(
        "float64",
        lambda y, s, u: y.double() / (s.double() * u),
        lambda t, c, s: t.double().abs() <= c * s.double(),
        lambda p, s: p * s.double(),
    ),
    Coding(
        "divided twice",
        lambda y, s, u: y.float() / s / u,
        lambda t, c, s: t.float().abs() / s <= c,
        lambda p, s: p.float() * s,
    ),
    Coding(
        "divided by the product",
        lambda y, s, u: y.float() / (s * u),
        lambda t, c, s: t.float().abs() <= s * c,
        _halved,
    ),
    Coding(
        "times two reciprocals",
        lambda y, s, u: y.float() * s.reciprocal() * (1 / u),
        lambda t, c, s: t.float().abs() * s.reciprocal() <= c,
        lambda p, s: p.float() * s,
    ),
    Coding(
        "reciprocal of the product",
        lambda y, s, u: y.float() * (s * u).reciprocal(),
        lambda t, c, s: (t.float() / s).square() <= c * c if c * c > 1e-3 else t.abs() <= c * s,
        lambda p, s: p * s.double(),
    ),
)


def _rounded(y: Tensor, sigma: Tensor, grid: quest.grids.Grid, coding: Coding) -> Tensor:
    if grid.step is None:
        t = coding.steps(y, sigma, 1.0)
        mids = torch.tensor(grid.midpoints, dtype=torch.float64).to(t.dtype)
        return (t.unsqueeze(-1) >= mids).sum(-1)
    half = grid.levels // 2
    t = coding.steps(y, sigma, grid.step)
    if grid.levels % 2 == 0:
        return t.floor().clamp(-half, half - 1).long()
    return (t + 0.5).floor().clamp(-half, half).long()


def _kept(y: Tensor, sparsity: quest.NM | quest.Pairwise) -> Tensor:
    """The pattern, by counting how many of the group are larger, or equal and before."""
    unit = 2 if isinstance(sparsity, quest.Pairwise) else 1
    groups = y.reshape(len(y), -1, sparsity.m // unit, unit)
    norm = groups.abs()[..., 0] if unit == 1 else torch.hypot(groups[..., 0], groups[..., 1])
    mine, other = norm.unsqueeze(-1), norm.unsqueeze(-2)
    before = torch.ones(norm.shape[-1], norm.shape[-1], dtype=torch.bool).tril(-1)
    ahead = ((other > mine) | ((other == mine) & before)).sum(-1)
    return (ahead < sparsity.n // unit).unsqueeze(-1).expand_as(groups).reshape(y.shape)


def quantize(
    x: Tensor, q: quest.Quantizer, rotation: Rotation, scaling: Scaling, coding: Coding
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(codes, scale, mask, keep, values) of finite x (..., d)."""
    grid, d = q.require_grid(), x.shape[-1]
    sigma, y = scale(x, q.transform.order(d), scaling, rotation)
    _, power = near_one(x, d)
    # The stored scale, in the units of y.
    inner = (sigma.reshape(-1, 1).double() / power).float()
    zero = inner == 0
    y, safe = torch.where(zero, 0.0, y), torch.where(zero, 1.0, inner)
    keep = torch.ones(y.shape, dtype=torch.bool)
    if q.sparsity is not None:
        keep = _kept(y, q.sparsity)
    codes = torch.where(keep, _rounded(y, safe, grid, coding), grid.zero_code)
    index = codes + grid.offset
    point = torch.where(keep, torch.tensor(grid.points, dtype=torch.float64)[index], 0.0)
    threshold, pruned, edge = q.thresholds()
    if isinstance(q.estimator, quest.STE):
        mask = torch.ones_like(keep)
    elif not edge:
        # The distance in the arithmetic of y; the point is a constant, times sigma.
        mask = coding.inside(y - point.to(y.dtype) * safe.to(y.dtype), threshold, safe)
    else:
        mask = coding.inside(y, threshold, safe)
        if isinstance(q.estimator, quest.Trust):
            mask = torch.where(keep, mask, coding.inside(y, pruned, safe))
    values = coding.value(point, sigma.reshape(-1, 1)).to(x.dtype)
    shape = x.shape
    return (
        codes.reshape(shape), sigma, (mask | zero).reshape(shape), keep.reshape(shape),
        values.reshape(shape),
    )  # fmt: skip


def product(a: Tensor, b: Tensor, bias: Tensor | None, add: Add, fused: bool) -> Tensor:
    """a b^T + bias in a's dtype, sums by `add` in float32; a (n, k), b (m, k).

    fused: the bias is added before the one rounding to the dtype, else after a first one.
    """
    terms = a.float()[:, None] * b.float()[None]
    total = add(terms)
    if bias is None:
        return total.to(a.dtype)
    if fused:
        return (total + bias.to(total.dtype)).to(a.dtype)
    return total.to(a.dtype) + bias


def split_integers(a: Tensor, b: Tensor, parts: int) -> Tensor:
    """a b^T of int64 (n, k), (m, k), k in parts, the last of them first."""
    size = -(-a.shape[-1] // parts)
    total = torch.zeros(len(a), len(b), dtype=torch.int64)
    for p, r in reversed(list(zip(a.split(size, -1), b.split(size, -1), strict=True))):
        total += p @ r.t()
    return total


def _one_by_one(total: Tensor, units: tuple, scales: tuple, bias: Tensor | None) -> Tensor:
    # The units first: after both scales a product that is in range may have been an infinity.
    y = total.float() * units[0] * units[1] * scales[1].t() * scales[0]
    return y if bias is None else y + bias.float()


def _factors_first(total: Tensor, units: tuple, scales: tuple, bias: Tensor | None) -> Tensor:
    left, right = units[0] * scales[0], units[1] * scales[1]
    y = total.float() * left * right.t()
    return y if bias is None else y + bias.float()


def _fused_bias(total: Tensor, units: tuple, scales: tuple, bias: Tensor | None) -> Tensor:
    left = total.float() * (units[0] * units[1]) * scales[0]
    y = left.double() * scales[1].t().double()
    return (y if bias is None else y + bias.double()).float()


def _doubled(total: Tensor, units: tuple, scales: tuple, bias: Tensor | None) -> Tensor:
    y = total.double() * scales[0].double() * scales[1].t().double() * (units[0] * units[1])
    return y if bias is None else y + bias.double()


EPILOGUES: dict[str, Callable[..., Tensor]] = {
    "one factor after the other": _one_by_one,
    "scales times units first": _factors_first,
    "fused bias": _fused_bias,
    "float64": _doubled,
}
