"""Rows before a quantizer, by implementations that are correct and not ours: for `false_alarms`.

Gate: silu(g) v = g s v, s the sigmoid of g. Norm: (h / sqrt(mean(h^2) + eps)) w. In float32 where a
name does not say float64, and stored once in the inputs' dtype; one that also stores what stands
before the last product says so to its judge (`stored`).

The bounds count roundings of g s, or of h / sqrt, and a product after it, so nothing may get lost
on the way. Hence, in float32: no 1 + tanh where it cancels, no g v or h w first, which can leave
the range where the result does not, no Kahan sum of squares that overflow (it ends in NaN), and no
row brought near 1 where that rounds its subnormal entries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from property_tests.variants import SUMS, Add, near_one

Run = Callable[..., Tensor]


def in_turn(run: Run, *rows: Tensor) -> Tensor:
    """run(rows) of each row alone, the last row first, its last entry first; (n, d) each."""
    n = len(rows[0])
    made = [run(*(t[i : i + 1].flip(-1) for t in rows)).flip(-1) for i in reversed(range(n))]
    return torch.cat(made[::-1])


def _one_and_exp(g: Tensor) -> Tensor:
    return 1 + torch.exp(-g)


def _one_and_power(g: Tensor) -> Tensor:
    return 1 + torch.exp2(g * -math.log2(math.e))


def _two_sides(g: Tensor) -> Tensor:
    e = torch.exp(-g.abs())
    return torch.where(g < 0, e, 1.0) / (1 + e)


def _by_tanh(g: Tensor) -> Tensor:
    # 1 + tanh cancels below 0: there the sigmoid is exp(g) times that of -g.
    s = 0.5 + 0.5 * torch.tanh(g.abs() / 2)
    return torch.where(g < 0, s * torch.exp(g), s)


def _by_log1p(g: Tensor) -> Tensor:
    return torch.exp(g.clamp(max=0) - torch.log1p(torch.exp(-g.abs())))


# (...) float32 or float64 to the same.
SIGMOIDS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": lambda g: 1 / _one_and_exp(g),
    "exp2": lambda g: _one_and_power(g).reciprocal(),
    "exp of the magnitude": _two_sides,
    "tanh": _by_tanh,
    "log1p": _by_log1p,
    "the library's": torch.sigmoid,
}


def _silu_first(g: Tensor, s: Tensor, v: Tensor) -> Tensor:
    return g * s * v


def _value_first(g: Tensor, s: Tensor, v: Tensor) -> Tensor:
    return g * v * s


def _sigmoid_first(g: Tensor, s: Tensor, v: Tensor) -> Tensor:
    return s * v * g


def _quotient(g: Tensor, below: Tensor, v: Tensor) -> Tensor:
    return g / below * v


@dataclass(frozen=True)
class Gate:
    """join(g, part(g), v) is silu(g) v; part is the sigmoid, or what g is divided by.

    wide: in float64. stored: silu(g) is stored in the inputs' dtype before the product with v.
    backwards: see `in_turn`.
    """

    name: str
    part: Callable[[Tensor], Tensor]
    join: Run = _silu_first
    wide: bool = False
    stored: bool = False
    backwards: bool = False


GATES = (
    *(Gate(name, part) for name, part in SIGMOIDS.items()),
    Gate("quotient, exp", _one_and_exp, _quotient),
    Gate("quotient, exp2", _one_and_power, _quotient),
    Gate("exp, value first, float64", SIGMOIDS["exp"], _value_first, wide=True),
    Gate("exp2, sigmoid times value, float64", SIGMOIDS["exp2"], _sigmoid_first, wide=True),
    Gate("tanh, float64", _by_tanh, wide=True),
    Gate("log1p, value first, float64", _by_log1p, _value_first, wide=True),
    Gate("quotient, exp, float64", _one_and_exp, _quotient, wide=True),
    Gate("exp2, silu stored", SIGMOIDS["exp2"], stored=True),
    Gate("quotient, exp, float64, silu stored", _one_and_exp, _quotient, wide=True, stored=True),
    Gate("tanh, rows backwards", _by_tanh, backwards=True),
)


def _raised(t: Tensor, wide: bool) -> Tensor:
    return t.double() if wide else t.float()


def gated(gate: Tensor, value: Tensor, made: Gate) -> Tensor:
    """silu(gate) value of (n, d) each, as their dtype."""

    def run(g: Tensor, v: Tensor) -> Tensor:
        if not made.stored:
            return made.join(g, made.part(g), v)
        silu = made.join(g, made.part(g), torch.ones_like(v))
        return silu.to(gate.dtype).to(v.dtype) * v

    given = (_raised(gate, made.wide), _raised(value, made.wide))
    rows = in_turn(run, *given) if made.backwards else run(*given)
    return rows.to(gate.dtype)


def _slope(sigmoid: Run, g: Tensor, d: Tensor, v: Tensor) -> Tensor:
    s = sigmoid(g)
    return d * v * s * (1 + g * (1 - s))


def _slope_apart(sigmoid: Run, g: Tensor, d: Tensor, v: Tensor) -> Tensor:
    # 1 - s has no difference here.
    return d * v * (sigmoid(g) * (1 + g * sigmoid(-g)))


def _slope_of_sums(sigmoid: Run, g: Tensor, d: Tensor, v: Tensor) -> Tensor:
    s = sigmoid(g)
    return d * ((s + g * s * (1 - s)) * v)


@dataclass(frozen=True)
class Gradient:
    """run(sigmoid, g, grad, v) is grad v s (1 + g (1 - s)), the gate's gradient."""

    name: str
    sigmoid: Callable[[Tensor], Tensor]
    run: Run
    wide: bool = False


GRADIENTS = (
    Gradient("exp", SIGMOIDS["exp"], _slope),
    Gradient("exp2, sigmoid of -g", SIGMOIDS["exp2"], _slope_apart),
    Gradient("tanh", _by_tanh, _slope),
    Gradient("exp of the magnitude, sigmoid of -g", _two_sides, _slope_apart),
    Gradient("log1p, float64", _by_log1p, _slope, wide=True),
    Gradient("tanh, sum of two terms, float64", _by_tanh, _slope_of_sums, wide=True),
)


def gradients(grad: Tensor, gate: Tensor, value: Tensor, made: Gradient) -> tuple[Tensor, Tensor]:
    """(of the gate, of the value) for the gradient of silu(gate) value; (n, d), of their dtype."""
    d, g, v = (_raised(t, made.wide) for t in (grad, gate, value))
    to_gate, to_value = made.run(made.sigmoid, g, d, v), g * made.sigmoid(g) * d
    return to_gate.to(gate.dtype), to_value.to(value.dtype)


def _mean(h: Tensor, eps: Tensor, *, add: Add, divide: str = "sum") -> Tensor:
    """mean(h^2) + eps of h (n, d) and eps (n, 1), of one dtype: (n, 1).

    divide: the "sum" by d, each "term" by d, the sum "times" 1/d, or eps times d: "not" at all.
    """
    d = h.shape[-1]
    squares = h * h / d if divide == "term" else h * h
    total = add(squares).unsqueeze(-1).to(h.dtype)
    if divide == "not":
        return total + eps * d
    if divide == "times":
        total = total * torch.tensor(1 / d, dtype=h.dtype)
    return (total / d if divide == "sum" else total) + eps


def _fused_mean(h: Tensor, eps: Tensor) -> Tensor:
    """By multiply-adds, one rounding each (the square is exact in float64)."""
    total = torch.zeros_like(eps)
    for i in range(h.shape[-1]):
        total = (total.double() + h[:, i : i + 1].double() ** 2).float()
    return total / h.shape[-1] + eps


def _rsqrt(h: Tensor, m: Tensor, w: Tensor) -> Tensor:
    return h * m.rsqrt() * w


def _reciprocal(h: Tensor, m: Tensor, w: Tensor) -> Tensor:
    return h * (1 / m.sqrt()) * w


def _over_root(h: Tensor, m: Tensor, w: Tensor) -> Tensor:
    return h / m.sqrt() * w


def _weight_times_inverse(h: Tensor, m: Tensor, w: Tensor) -> Tensor:
    return (w * m.rsqrt()) * h


def _weight_over_root(h: Tensor, m: Tensor, w: Tensor) -> Tensor:
    return h * (w / m.sqrt())


def _weight_first(h: Tensor, m: Tensor, w: Tensor) -> Tensor:
    return h * w / m.sqrt()


def _by_log(h: Tensor, m: Tensor, w: Tensor) -> Tensor:
    return torch.exp(m.log() * -0.5) * h * w


def _whole(h: Tensor, m: Tensor, w: Tensor) -> Tensor:
    """m: the sum of squares and d eps."""
    return h * (math.sqrt(h.shape[-1]) / m.sqrt()) * w


def _newton(h: Tensor, m: Tensor, w: Tensor) -> Tensor:
    """An inverse root of 8 bits, and two of Newton's steps: an error of e becomes 1.5 e^2."""
    y = m.rsqrt().bfloat16().to(m.dtype)
    for _ in range(2):
        y = y * (1.5 - 0.5 * m * y * y)
    return h * y * w


@dataclass(frozen=True)
class Norm:
    """join(h, mean(h, eps), w) is h w / sqrt(mean(h^2) + eps).

    wide: in float64. stored: h / sqrt is stored in h's dtype before the weight. most: rows beyond
    it are brought there by a power of two. backwards: see `in_turn`.
    """

    name: str
    mean: Run
    join: Run
    wide: bool = False
    stored: bool = False
    most: float = math.inf
    backwards: bool = False


def _sum(name: str, divide: str = "sum") -> Run:
    return functools.partial(_mean, add=SUMS[name], divide=divide)


# No square of a row overflows, and what its least entries lose is nothing after the product with an
# inverse of 2^-31 sqrt(d) at the most. Rows near 1 would lose bits of subnormal entries.
LOWERED = 2.0**32

NORMS = (
    Norm("sum sequential, rsqrt", _sum("sequential"), _rsqrt),
    Norm("sum reverse, 1 / root", _sum("reverse"), _reciprocal),
    Norm("sum tree, over root", _sum("tree"), _over_root),
    Norm("sum kahan, rsqrt, rows lowered", _sum("kahan"), _rsqrt, most=LOWERED),
    Norm("sum float64, weight times rsqrt", _sum("float64"), _weight_times_inverse),
    Norm("sum split in 4, weight over root", _sum("split in 4"), _weight_over_root),
    Norm("sum split in 7, times 1/d, rsqrt", _sum("split in 7", "times"), _rsqrt),
    Norm("fused multiply-add, over root", _fused_mean, _over_root),
    Norm("terms divided first, 1 / root", _sum("tree", "term"), _reciprocal),
    Norm("eps times d, over norm", _sum("sequential", "not"), _whole),
    Norm("sum tree, Newton, rows lowered", _sum("tree"), _newton, most=LOWERED),
    Norm("rsqrt, float64", _sum("tree"), _rsqrt, wide=True),
    Norm("weight first, over root, float64", _sum("reverse"), _weight_first, wide=True),
    Norm("exp of log, float64", _sum("split in 4"), _by_log, wide=True),
    Norm("eps times d, float64", _sum("kahan", "not"), _whole, wide=True),
    Norm("sum tree, rsqrt, unit stored", _sum("tree"), _rsqrt, stored=True),
    Norm("over root, float64, unit stored", _sum("float64"), _over_root, wide=True, stored=True),
    Norm("sum tree, 1 / root, rows backwards", _sum("tree"), _reciprocal, backwards=True),
)


def normed(h: Tensor, weight: Tensor, eps: float, made: Norm) -> Tensor:
    """(h / sqrt(mean(h^2) + eps)) weight of finite h (n, d) and weight (d,), as their dtype."""
    _, power = near_one(h, h.shape[-1])
    power = (power / made.most).clamp(min=1)  # (n, 1) float64

    def run(x: Tensor, w: Tensor, e: Tensor) -> Tensor:
        m = made.mean(x, e)
        if not made.stored:
            return made.join(x, m, w)
        return made.join(x, m, torch.ones_like(w)).to(h.dtype).to(w.dtype) * w

    x, w, e = (_raised(t, made.wide) for t in (h / power, weight.expand_as(h), eps / power / power))
    rows = in_turn(run, x, w, e) if made.backwards else run(x, w, e)
    return rows.to(h.dtype)


# h = residual + x of (n, d), one dtype, rounded once.
ADDITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x first": lambda x, residual: x + residual,
    "difference": lambda x, residual: residual - (-x),
    "float32": lambda x, residual: (residual.float() + x.float()).to(x.dtype),
    "float64": lambda x, residual: (x.double() + residual.double()).to(x.dtype),
}


def operand(codes: Tensor, levels: int) -> tuple[str, Tensor, Tensor]:
    """(kind, operand, sums) of codes (n, d) of a uniform grid; sums are (n, 1) int32.

    An even grid's integers are twice its codes, and 1; doubled as often as int8 has room. Two
    levels are bits, the first of eight the lowest: (n, ceil(d / 8)) uint8. The 256 of 8 bits stay
    codes, (n, d) int8, as integers do.
    """
    whole = 2 * codes + 1 if levels % 2 == 0 else codes
    largest = levels - 1 if levels % 2 == 0 else levels // 2
    while 2 < levels < 256 and 2 * largest < 128:
        whole, largest = 2 * whole, 2 * largest
    sums = whole.sum(-1, keepdim=True).int()
    if levels == 2:
        spare = -codes.shape[-1] % 8
        bits = torch.nn.functional.pad((codes == 0).long(), (0, spare))
        eights = bits.reshape(len(bits), -1, 8) << torch.arange(8)
        return "bits", eights.sum(-1).to(torch.uint8), sums
    if levels == 256:
        return "codes", codes.to(torch.int8), sums
    return "integers", whole.to(torch.int8), sums
