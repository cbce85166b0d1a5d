"""The judges hold and bite: unusual correct implementations pass, each planted fault is rejected.

Nothing here calls production arithmetic: `honest` is a NumPy pipeline of its own, and a fault is
the same pipeline with one part replaced. A fault names the judges that must reject it, and may add
some that are allowed to; every other judge has to hold, so a fault is laid at the right door.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import quest
from quest import operands
from quest.conformance import exact_rows, examine, inputs, judges, lanes, oracle
from quest.conformance.verdict import Rejected, Verdict
from quest.kernels import outputs
from quest.reference import bounds, hadamard, quantize

Array = np.ndarray
SEEDS = st.integers(0, 2**32 - 1)
F32 = np.float32


def tensor(a: Array, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rounded once, from float64."""
    return torch.from_numpy(np.ascontiguousarray(a)).to(dtype)


def failing(verdicts: list[Verdict]) -> set[str]:
    return {v.stage for v in verdicts if v.failure is not None}


# --- transforms -------------------------------------------------------------------------------


def sign_matrix(order: int) -> Array:
    return hadamard.matrix(order)


def blocks(x: Array, order: int) -> Array:
    return x.reshape(*x.shape[:-1], -1, order)


def by_matrix(h: Array, x: Array, order: int) -> Array:
    return (blocks(x, order) @ h).reshape(x.shape)


def butterfly(
    x: Array, order: int, stages: list[int] | None = None, flip: int | None = None
) -> Array:
    """x times Sylvester's signs in x's dtype; `flip` swaps sum and difference of one stage."""
    y = blocks(x, order)
    for s in range(int(math.log2(order))) if stages is None else stages:
        pairs = y.reshape(-1, order // (2 << s), 2, 1 << s)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        parts = [low + high, high - low if s == flip else low - high]
        y = np.stack(parts, axis=2).reshape(y.shape)
    return y.reshape(x.shape)


def reversed_butterfly(x: Array, order: int) -> Array:
    stages = list(range(int(math.log2(order))))[::-1]
    return butterfly(x.astype(F32), order, stages) * F32(order**-0.5)


def by_loop(x: Array, order: int) -> Array:
    """Base product row after row, last first, then the butterfly."""
    m, power = hadamard.split(order)
    y = x.astype(F32).reshape(-1, m, power)
    base = hadamard.base(m)
    out = np.zeros_like(y)
    for j in reversed(range(m)):
        out += base[j][:, None].astype(F32) * y[:, j : j + 1]
    return (butterfly(out, power) * F32(order**-0.5)).reshape(x.shape)


def by_torch(x: Array, order: int) -> Array:
    h = torch.from_numpy(sign_matrix(order)).float()
    y = torch.from_numpy(blocks(x.astype(F32), order)) @ h * order**-0.5
    return y.numpy().reshape(x.shape)


def by_numpy(x: Array, order: int) -> Array:
    return by_matrix(sign_matrix(order).astype(F32), x.astype(F32), order) * F32(order**-0.5)


ROTATIONS: dict[str, Callable[[Array, int], Array]] = {
    "float64": hadamard.apply,
    "butterfly after a base loop": by_loop,
}
# Sums of n terms; where one term is most of the sum they miss the bound of a butterfly.
PRODUCTS = {"numpy": by_numpy, "torch": by_torch}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", [1, 2, 16, 128, 512, 12, 40, 112])
@given(seed=SEEDS)
def test_rotated_holds(order: int, dtype: torch.dtype, seed: int) -> None:
    name = ("gaussian", "heavy", "outlier", "integers", "equal", "mixed_rows")[seed % 6]
    x = inputs.draw(name, (3, 2 * order), dtype, seed)
    ways = dict(ROTATIONS) | (PRODUCTS if name in ("gaussian", "integers", "equal") else {})
    if hadamard.split(order)[0] == 1:
        ways["reversed butterfly"] = reversed_butterfly
    for how, rotate in ways.items():
        y = tensor(rotate(oracle.lift(x), order), dtype)
        verdict = judges.rotated(x, y, order, False)
        assert verdict.failure is None, (how, verdict)
    back = tensor(hadamard.apply_transpose(oracle.lift(x), order), dtype)
    judges.rotated(x, back, order, True).require()


@pytest.mark.parametrize("order", [2, 16, 12])
@given(seed=SEEDS)
def test_rotated_spreads_what_is_not_finite(order: int, seed: int) -> None:
    x = inputs.draw("non_finite", (5, 3 * order), torch.float32, seed)
    y = tensor(hadamard.apply(oracle.lift(x), order))
    judges.rotated(x, y, order, False).require()
    if not y.isfinite().all():
        for wrong in (y.nan_to_num(), y.where(y.isfinite(), torch.nan), y.where(y.isfinite(), 1.0)):
            if torch.equal(wrong.isnan(), y.isnan()) and torch.equal(wrong.isinf(), y.isinf()):
                continue
            with pytest.raises(Rejected, match=r"^transform"):
                judges.rotated(x, wrong, order, False).require()
    one = y.clone()
    one[0, 0] = math.inf if y[0, 0].isfinite() else 1.0
    with pytest.raises(Rejected, match=r"^transform"):
        judges.rotated(x, one, order, False).require()


def sequency(order: int) -> Array:
    """Walsh order: rows sorted by their number of sign changes."""
    h = sign_matrix(order)
    return h[np.argsort((np.diff(h, axis=1) != 0).sum(1), kind="stable")]


def bit_reversed(order: int) -> Array:
    width = int(math.log2(order))
    return sign_matrix(order)[[int(f"{i:0{width}b}"[::-1], 2) for i in range(order)]]


def tail_left(x: Array, order: int) -> Array:
    y = hadamard.apply(x, order)
    y[..., -order:] = x[..., -order:]
    return y


def full_width(x: Array, order: int) -> Array:
    return hadamard.apply(x, x.shape[-1])


def in_bfloat16(x: Array, order: int) -> Array:
    h = tensor(sign_matrix(order) * order**-0.5, torch.bfloat16)
    return by_matrix(h.double().numpy(), x, order)


def rounded_stages(x: Array, order: int) -> Array:
    y = x
    for s in range(int(math.log2(order))):
        y = tensor(butterfly(y, order, [s]), torch.bfloat16).double().numpy()
    return y * order**-0.5


def half_sums(x: Array, order: int) -> Array:
    return butterfly(x.astype(np.float16), order).astype(np.float64) * order**-0.5


N = 128
# (name, order, what stands where x H is due, dtype of the output)
ROTATION_FAULTS: list[tuple[str, int, Callable[[Array, int], Array], torch.dtype]] = [
    ("n^-1/2 missing", N, lambda x, n: by_matrix(sign_matrix(n), x, n), torch.float32),
    ("n^-1/2 doubled", N, lambda x, n: hadamard.apply(x, n) * n**-0.5, torch.float32),
    ("one butterfly sign", N, lambda x, n: butterfly(x, n, flip=3) * n**-0.5, torch.float32),
    ("last butterfly sign", 2, lambda x, n: butterfly(x, n, flip=0) * n**-0.5, torch.float32),
    ("a stage left out", N, lambda x, n: butterfly(x, n, [0, 1, 2]) * 8**-0.5, torch.float32),
    ("Walsh order", N, lambda x, n: by_matrix(sequency(n), x, n) * n**-0.5, torch.float32),
    ("Walsh order, 16 bits", 8, lambda x, n: by_matrix(sequency(n), x, n) * n**-0.5, torch.float16),
    ("dyadic order", 64, lambda x, n: by_matrix(bit_reversed(n), x, n) * n**-0.5, torch.float32),
    ("tail block not transformed", N, tail_left, torch.float32),
    ("tail block not transformed, bf16", 16, tail_left, torch.bfloat16),
    ("blocks of the full width", 64, full_width, torch.float32),
    ("not transformed", N, lambda x, n: x, torch.bfloat16),
    ("H in bfloat16, scale inside", N, in_bfloat16, torch.float32),
    ("H in bfloat16, scale inside, order 12", 12, in_bfloat16, torch.float32),
    ("H in bfloat16, scale inside, stored in float16", N, in_bfloat16, torch.float16),
    ("sums in bfloat16", N, rounded_stages, torch.float32),
    ("sums in bfloat16, stored so", N, rounded_stages, torch.bfloat16),
    ("sums in float16", N, half_sums, torch.float32),
    ("constant in bfloat16", 8, lambda x, n: hadamard.apply(x, n) * 1.0005, torch.float32),
    *(
        (f"H^T of order {n}", n, hadamard.apply_transpose, dtype)
        for n in (12, 20, 28, 40, 56)
        for dtype in (torch.float32, torch.bfloat16)
    ),
]


@pytest.mark.parametrize(
    ("order", "wrong", "dtype"),
    [f[1:] for f in ROTATION_FAULTS],
    ids=[f"{f[0]}-{f[3]}".replace("torch.", "") for f in ROTATION_FAULTS],
)
@pytest.mark.parametrize("seed", range(3))
def test_rotated_bites(
    order: int, wrong: Callable[[Array, int], Array], dtype: torch.dtype, seed: int
) -> None:
    x = inputs.draw("gaussian", (64, 4 * order), dtype, seed)
    y = tensor(wrong(oracle.lift(x), order), dtype)
    with pytest.raises(Rejected, match=r"^transform: at \(\d+, \d+\) it is"):
        judges.rotated(x, y, order, False).require()


def lift_of(a: Array) -> Array:
    """float32 values, in float64."""
    return np.asarray(a, dtype=np.float32).astype(np.float64)


def test_three_bounds_off_is_too_far() -> None:
    x = inputs.draw("gaussian", (8, 48), torch.float32, 0)
    x64 = oracle.lift(x)
    for transpose, turn in ((False, hadamard.apply), (True, hadamard.apply_transpose)):
        exact = turn(x64, 12)
        bound = bounds.output(exact, bounds.rotation(x64, 12, transpose), "float32")
        with pytest.raises(Rejected, match=r"^transform"):
            judges.rotated(x, tensor(exact + 3 * bound), 12, transpose).require()
    sigma = quantize.scale(x64)
    wrong = sigma + 3 * bounds.scale(x64, 12, sigma)
    with pytest.raises(Rejected, match=r"^scale"):
        judges.scaled(x, tensor(wrong), 12).require()


@pytest.mark.parametrize("order", [1, 8])
@pytest.mark.parametrize("name", ["y", "dx", "dw", "db"])
def test_a_fifth_over_the_layers_bound_is_too_far(name: str, order: int) -> None:
    """The bounds counted again, term by term: one of them ten times as wide would let this pass."""
    g = np.random.default_rng(order)
    n, d, outs, u = 9, 16, 11, 2.0**-24
    xh, wh, grad = (lift_of(g.standard_normal(shape)) for shape in ((n, d), (outs, d), (n, outs)))
    bias = lift_of(g.standard_normal(outs))
    made = quest.recipe("w4a4", transform=quest.Hadamard(order) if order > 1 else quest.Identity())

    def turned(a: Array, b: Array) -> tuple[Array, Array]:
        """(a b H^T, its bound): the product, stored; the butterfly's additions and the factor."""
        inner, terms = a @ b, a.shape[-1]
        first = bounds.gamma(terms, u) * (np.abs(a) @ np.abs(b))
        first = first + u * (np.abs(inner) + first) + 2.0**-150
        k = (int(np.log2(order)) + bounds.normalisations(order)) if order > 1 else 0
        largest = bounds.absolute_sum(np.abs(inner) + first, order)
        total = bounds.absolute_sum(first, order) + (bounds.gamma(k, u) * largest if k else 0.0)
        exact = hadamard.apply_transpose(inner, order)
        return exact, total + u * (np.abs(exact) + total) + 2.0**-150

    y = xh @ wh.T
    error = bounds.gamma(d, u) * (np.abs(xh) @ np.abs(wh).T)
    error = error + u * (np.abs(y) + error) + u * np.abs(bias)
    error = error + u * (np.abs(y + bias) + error) + 2.0**-150
    sums, off = grad.sum(0), bounds.gamma(n, u) * np.abs(grad).sum(0)
    exact = {
        "y": (y + bias, error),
        "dx": turned(grad, wh),
        "dw": turned(grad.T, xh),
        "db": (sums, off + u * (np.abs(sums) + off) + 2.0**-150),
    }
    out = {k: tensor(v[0]) for k, v in exact.items()} | {"x_hat": tensor(xh), "w_hat": tensor(wh)}

    def judged(out: dict[str, Tensor]) -> set[str]:
        x, w = torch.zeros(n, d), torch.zeros(outs, d)
        given = (tensor(grad), tensor(bias), made, out, (None, None), u)
        return failing(judges.layer(x, w, *given))

    assert not judged(out)
    value, bound = exact[name]
    assert judged(out | {name: tensor(value + 1.2 * bound)}) == {f"layer {name}"}


@pytest.mark.parametrize("order", [12, 20, 28, 40])
def test_rotated_bites_where_the_transpose_is_due(order: int) -> None:
    x = inputs.draw("gaussian", (5, order), torch.float32, order)
    y = tensor(hadamard.apply(oracle.lift(x), order))
    judges.rotated(x, y, order, False).require()
    with pytest.raises(Rejected, match=r"^transform"):
        judges.rotated(x, y, order, True).require()


# --- the quantizer: an honest pipeline, and the same with one part replaced ------------------


@dataclass(frozen=True)
class Parts:
    """One function for each stage of the quantizer; all but `stored` work in float64.

    rotate(x, order), scale(x, y) -> (rows, 1), stored(sigma) -> what is written as the scale,
    select(y, q) -> keep, encode(t, q) for t = y / sigma, mask(x, y, sigma, codes, keep, q),
    decode(codes, keep, q) -> points, value(points, sigma) and pack(codes, q).
    """

    rotate: Callable[..., Array]
    scale: Callable[..., Array]
    stored: Callable[..., Array]
    select: Callable[..., Array]
    encode: Callable[..., Array]
    mask: Callable[..., Array]
    decode: Callable[..., Array]
    value: Callable[..., Array]
    pack: Callable[..., Array]
    flags: Callable[..., Array]


def rms(x: Array, y: Array) -> Array:
    return np.sqrt(np.mean(x**2, -1, keepdims=True))


def rms_after(x: Array, y: Array) -> Array:
    return rms(y, y)


def sum_reversed(x: Array, y: Array) -> Array:
    """RMS in float32, last entry first."""
    total = np.cumsum((x[:, ::-1].astype(F32)) ** 2, axis=-1, dtype=F32)[:, -1:]
    return np.sqrt(total / F32(x.shape[-1])).astype(np.float64)


def norms(y: Array, unit: int) -> Array:
    return np.sqrt((y.reshape(len(y), -1, unit) ** 2).sum(-1))


def select_by(
    y: Array, n: int, m: int, unit: int, *, largest: bool = True, stable: bool = True
) -> Array:
    groups = norms(y, unit).reshape(len(y), -1, m // unit)
    key = -groups if largest else groups
    if stable:
        order = np.argsort(key, -1, kind="stable")
    else:
        order = (m // unit - 1) - np.argsort(key[..., ::-1], -1, kind="stable")
    keep = np.zeros(groups.shape, bool)
    np.put_along_axis(keep, order[..., : n // unit], True, -1)
    return np.repeat(keep.reshape(len(y), -1), unit, -1)


def select(y: Array, q: quest.Quantizer) -> Array:
    s = q.sparsity
    if s is None:
        return np.ones(y.shape, bool)
    return select_by(y, s.n, s.m, 2 if isinstance(s, quest.Pairwise) else 1)


def grid_of(q: quest.Quantizer) -> Any:
    return q.require_grid()


def encode(t: Array, q: quest.Quantizer) -> Array:
    g = grid_of(q)
    if g.step is None:
        return np.searchsorted(np.array(g.midpoints), t, side="right")
    half = g.levels // 2
    if g.levels % 2:
        return np.clip(np.floor(t / g.step + 0.5), -half, half).astype(int)
    return np.clip(np.floor(t / g.step), -half, half - 1).astype(int)


def decode(codes: Array, keep: Array, q: quest.Quantizer) -> Array:
    g = grid_of(q)
    low = 0 if g.step is None else -(g.levels // 2)
    # A planted fault may leave the range; the judges see that in the codes.
    index = np.clip(codes - low, 0, g.levels - 1)
    return np.where(keep, np.array(g.points)[index], 0.0)


def mask(x: Array, y: Array, sigma: Array, codes: Array, keep: Array, q: quest.Quantizer) -> Array:
    g, e = grid_of(q), q.estimator
    if isinstance(e, quest.STE):
        return np.ones(y.shape, bool)
    if isinstance(e, quest.Clip):
        return np.abs(y) <= e.scale * g.outer * sigma
    if e.scale >= 1:
        return np.abs(y) <= (np.where(keep, g.outer, 0.0) + e.scale * g.half_gap) * sigma
    return np.abs(decode(codes, keep, q) * sigma - y) <= e.scale * g.half_gap * sigma


def pack_bits(unsigned: Array, bits: int) -> Array:
    per = 8 // bits
    padded = np.pad(unsigned, ((0, 0), (0, -unsigned.shape[-1] % per))).astype(np.int64)
    shifts = bits * np.arange(per)
    return (padded.reshape(len(unsigned), -1, per) << shifts).sum(-1).astype(np.uint8)


def unsigned(codes: Array, q: quest.Quantizer) -> Array:
    g = grid_of(q)
    return codes + (0 if g.step is None else g.levels // 2)


def storage(q: quest.Quantizer) -> int:
    return next(b for b in (1, 2, 4, 8) if 2**b >= grid_of(q).levels)


def pack(codes: Array, q: quest.Quantizer) -> Array:
    return pack_bits(unsigned(codes, q) & 255, storage(q))


HONEST = Parts(
    rotate=hadamard.apply,
    scale=rms,
    stored=lambda sigma: sigma,
    select=select,
    encode=encode,
    mask=mask,
    decode=decode,
    value=lambda points, sigma: points * sigma,
    pack=pack,
    flags=lambda m: pack_bits(m, 1),
)


def in_float32(function: Callable[..., Array]) -> Callable[..., Array]:
    """The same formula with every operand rounded to float32."""

    def wrapped(*args: Any) -> Array:
        return function(*[a.astype(F32) if isinstance(a, Array) and a.dtype.kind == "f" else a
                          for a in args])  # fmt: skip

    return wrapped


def encode_float32(t: Array, q: quest.Quantizer) -> Array:
    g = grid_of(q)
    if g.step is None:
        return np.searchsorted(np.array(g.midpoints, F32), t.astype(F32), side="right")
    half = g.levels // 2
    steps = t.astype(F32) / F32(g.step)
    if g.levels % 2:
        return np.clip(np.floor(steps + F32(0.5)), -half, half).astype(int)
    return np.clip(np.floor(steps), -half, half - 1).astype(int)


# Correct, each in its own way.
WAYS: dict[str, Parts] = {
    "float64": HONEST,
    "scale of the rotated row": replace(HONEST, scale=rms_after),
    "reversed float32 sum": replace(HONEST, scale=sum_reversed),
    "float32 rotation": replace(HONEST, rotate=by_torch),
    "float32 base loop": replace(HONEST, rotate=by_loop),
    "float32 codes": replace(HONEST, encode=encode_float32),
    "float32 mask": replace(HONEST, mask=in_float32(mask)),
    "float32 values": replace(HONEST, value=in_float32(lambda p, s: p * s)),
    "all float32": replace(
        HONEST,
        rotate=by_torch,
        scale=sum_reversed,
        encode=encode_float32,
        mask=in_float32(mask),
        value=in_float32(lambda p, s: s * p),
    ),
}


def run(x: Tensor, q: quest.Quantizer, p: Parts) -> dict[str, Tensor]:
    """What a lane with these parts would write; `x` (rows, d)."""
    x64 = oracle.lift(x)
    with np.errstate(divide="ignore", invalid="ignore"):
        y = p.rotate(x64, q.transform.order(x.shape[-1])).astype(np.float64)
        sigma = p.scale(x64, y)
        written = p.stored(sigma).astype(F32)
        # Zero rows divide 0 by 1, as the method's rule for them asks.
        t = np.where(sigma == 0, 0.0, y / np.where(sigma == 0, 1.0, sigma))
        keep = p.select(y, q)
        codes = p.encode(np.where(keep, t, 0.0), q)
        flags = p.mask(x64, y, sigma, codes, keep, q)
        values = p.value(p.decode(codes, keep, q), sigma)
    return {
        "codes": torch.from_numpy(np.asarray(codes, np.int64)).to(torch.int16),
        "scale": torch.from_numpy(written),
        "mask": torch.from_numpy(np.asarray(flags, bool)),
        "keep": torch.from_numpy(np.asarray(keep, bool)),
        "values": tensor(values, x.dtype),
        "packed": torch.from_numpy(p.pack(codes, q)),
        "bits": torch.from_numpy(p.flags(np.asarray(flags, bool))),
    }


def judge(
    x: Tensor, q: quest.Quantizer, out: dict[str, Tensor], *, conclusive: bool = True
) -> list[Verdict]:
    """Every judge of the quantizer, each given what was really written in the stages before."""
    keep = out["keep"] if q.sparsity is not None else None
    found = [judges.scaled(x, out["scale"], q.transform.order(x.shape[-1]))]
    if keep is not None:
        found += [judges.selected(x, q, keep), judges.pruned(q, out["codes"], keep)]
    codes = judges.coded(x, q, out["codes"], out["scale"], keep, conclusive=conclusive)
    found += [codes, judges.packed_bits("packed mask", out["mask"], out["bits"])]
    if codes.failure is None or "outside" not in codes.failure:
        found += [
            judges.masked(x, q, out["codes"], out["scale"], out["mask"], keep),
            judges.dequantized(q, out["codes"], out["scale"], keep, out["values"]),
            judges.packed(q, out["codes"], out["packed"]),
        ]
    return found


Q = quest.Quantizer
UNIFORM = {b: quest.grids.uniform(b) for b in range(1, 9)}
GRIDS = [
    *UNIFORM.values(),
    quest.grids.ternary(),
    quest.grids.e2m1(),
    *(quest.grids.lloyd_max(b) for b in (1, 2, 4, 8)),
]
H128, H12 = quest.Hadamard(128), quest.Hadamard(12)
NM24, PAIRS = quest.NM(2, 4), quest.Pairwise(4, 8)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@given(data=st.data(), seed=SEEDS)
def test_quantizer_judges_hold(grid: Any, data: st.DataObject, seed: int) -> None:
    order = data.draw(st.sampled_from([1, 16, 128, 12, 40]))
    estimator = data.draw(
        st.sampled_from([quest.Trust(), quest.Trust(0.5), quest.Clip(1.3), quest.STE()])
    )
    sparsity = data.draw(st.sampled_from([None, NM24, PAIRS, quest.NM(1, 4), quest.NM(4, 8)]))
    name = data.draw(
        st.sampled_from(["gaussian", "heavy", "outlier", "one_hot", "mixed_rows", "zeros"])
    )
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    width = 2 * order * (1 if sparsity is None else sparsity.m)
    x = inputs.draw(name, (3, width), dtype, seed)
    q = Q(grid, quest.Hadamard(order), estimator, sparsity)
    for how, parts in WAYS.items():
        for verdict in judge(x, q, run(x, q, parts)):
            assert verdict.failure is None, (how, verdict)


def bias(x: Array, y: Array) -> Array:
    return np.sqrt((x**2).sum(-1, keepdims=True) / (x.shape[-1] - 1))


def centred(x: Array, y: Array) -> Array:
    return x.std(-1, keepdims=True)


def absmax(x: Array, y: Array) -> Array:
    return np.abs(x).max(-1, keepdims=True)


def mean_magnitude(x: Array, y: Array) -> Array:
    return np.abs(x).mean(-1, keepdims=True)


def padded_width(x: Array, y: Array) -> Array:
    padded = 2 ** math.ceil(math.log2(x.shape[-1]))
    return np.sqrt((x**2).sum(-1, keepdims=True) / padded)


def over_all_rows(x: Array, y: Array) -> Array:
    return np.broadcast_to(np.sqrt(np.mean(x**2)), (len(x), 1))


def with_epsilon(x: Array, y: Array) -> Array:
    return rms(x, y) + 1e-8


def epsilon_in_half(points: Array, sigma: Array) -> Array:
    """x / (s + 1e-8) s in float16, where the epsilon vanishes: 0 / 0 in a row of zeros."""
    s = sigma.astype(np.float16)
    return points * sigma * (s / (s + np.float16(1e-8))).astype(np.float64)


def to_bfloat16(a: Array) -> Array:
    return tensor(a, torch.bfloat16).double().numpy()


def steps(t: Array, q: quest.Quantizer) -> Array:
    return t / grid_of(q).step


def clipped(t: Array, q: quest.Quantizer) -> Array:
    half = grid_of(q).levels // 2
    return np.clip(t, -half, half - 1).astype(int)


def rounded_by(function: Callable[[Array], Array]) -> Callable[..., Array]:
    return lambda t, q: clipped(function(steps(t, q)), q)


def upper(limit: int) -> Callable[..., Array]:
    return lambda t, q: np.minimum(encode(t, q), limit)


def lower(limit: int) -> Callable[..., Array]:
    return lambda t, q: np.maximum(encode(t, q), limit)


def lower_clamp_without_division(t: Array, q: quest.Quantizer) -> Array:
    """clamp(-alpha (L - 1), ...) where clamp(-alpha (L - 1) / L, ...) was meant."""
    half = grid_of(q).levels // 2
    return np.clip(np.floor(steps(t, q)), -half * grid_of(q).levels, half - 1).astype(int)


def to_even(t: Array, q: quest.Quantizer) -> Array:
    """round(t - 1/2) by halves to even; midpoints of even L are integers, 0 among them."""
    if grid_of(q).levels % 2:
        half = grid_of(q).levels // 2
        return np.clip(np.round(steps(t, q)), -half, half).astype(int)
    return clipped(np.round(steps(t, q) - 0.5), q)


def down_at_ties(t: Array, q: quest.Quantizer) -> Array:
    if grid_of(q).step is None:
        return np.searchsorted(np.array(grid_of(q).midpoints), t, side="left")
    return -encode(-t, q) - (1 if grid_of(q).levels % 2 == 0 else 0)


def away_from_zero(t: Array, q: quest.Quantizer) -> Array:
    return np.where(t < 0, down_at_ties(t, q), encode(t, q))


def in_bfloat16_codes(t: Array, q: quest.Quantizer) -> Array:
    return encode(to_bfloat16(t), q)


E2M1_UNIT = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def e2m1_on(unit: Array) -> Callable[..., Array]:
    """Codes by the midpoints of another table."""

    def wrong(t: Array, q: quest.Quantizer) -> Array:
        alpha = grid_of(q).outer / 6
        points = alpha * np.concatenate([-unit[:0:-1], unit])
        return np.searchsorted((points[1:] + points[:-1]) / 2, t, side="right")

    return wrong


def e2m1_sign_magnitude(t: Array, q: quest.Quantizer) -> Array:
    """The hardware's code (sign bit, magnitude) where the index into the sorted points is due."""
    index = encode(t, q) - 7
    return np.where(index < 0, 7 - index, index)


def e2m1_floor(t: Array, q: quest.Quantizer) -> Array:
    return np.clip(np.searchsorted(np.array(grid_of(q).points), t, side="right") - 1, 0, 14)


def unsigned_codes(t: Array, q: quest.Quantizer) -> Array:
    return unsigned(encode(t, q), q)


def nibbles_swapped(codes: Array, q: quest.Quantizer) -> Array:
    good = pack(codes, q)
    return (good >> 4) | (good << 4)


def last_dropped(codes: Array, q: quest.Quantizer) -> Array:
    per = 8 // storage(q)
    whole = codes.shape[-1] // per * per
    bits = pack_bits(unsigned(codes[:, :whole], q), storage(q))
    return np.pad(bits, ((0, 0), (0, -(-codes.shape[-1] // per) - bits.shape[-1])))


def rows_run_on(codes: Array, q: quest.Quantizer) -> Array:
    """Rows packed one after another, without padding."""
    flat = pack_bits(unsigned(codes, q).reshape(1, -1), storage(q)).ravel()
    good = pack(codes, q)
    return np.resize(flat, good.shape)


def big_endian(m: Array) -> Array:
    return np.packbits(m, axis=-1, bitorder="big")


MaskPart = Callable[..., Array]


def strict(x: Array, y: Array, sigma: Array, codes: Array, keep: Array, q: Q) -> Array:
    """`<` for `<=`."""
    g, e = grid_of(q), q.estimator
    if isinstance(e, quest.Clip):
        return np.abs(y) < e.scale * g.outer * sigma
    if e.scale >= 1:
        return np.abs(y) < (g.outer + e.scale * g.half_gap) * sigma
    return np.abs(decode(codes, keep, q) * sigma - y) < e.scale * g.half_gap * sigma


def in_steps(x: Array, y: Array, sigma: Array, codes: Array, keep: Array, q: Q) -> Array:
    g = grid_of(q)
    return np.abs(y / (sigma * g.step)) <= g.outer + g.half_gap


def from_clipped(x: Array, y: Array, sigma: Array, codes: Array, keep: Array, q: Q) -> Array:
    g = grid_of(q)
    inner = np.clip(y, -g.outer * sigma, g.outer * sigma)
    return mask(x, inner, sigma, codes, keep, q)


def not_rotated(x: Array, y: Array, sigma: Array, codes: Array, keep: Array, q: Q) -> Array:
    return mask(x, x, sigma, codes, keep, q)


def naive_distance(dtype: torch.dtype) -> MaskPart:
    """|Q(y) - y| <= T sigma evaluated in a low precision: interior entries are masked, too."""

    def wrong(x: Array, y: Array, sigma: Array, codes: Array, keep: Array, q: Q) -> Array:
        value = tensor(decode(codes, keep, q) * sigma, dtype)
        limit = tensor(grid_of(q).half_gap * sigma, dtype)
        return ((value - tensor(y, dtype)).abs() <= limit).numpy()

    return wrong


def of_other_bits(bits: int) -> MaskPart:
    return lambda x, y, sigma, codes, keep, q: mask(
        x, y, sigma, codes, keep, replace(q, grid=UNIFORM[bits])
    )


def of_estimator(e: Any) -> MaskPart:
    return lambda x, y, sigma, codes, keep, q: mask(
        x, y, sigma, codes, keep, replace(q, estimator=e)
    )


def of_kept(x: Array, y: Array, sigma: Array, codes: Array, keep: Array, q: Q) -> Array:
    return mask(x, y, sigma, codes, np.ones_like(keep), q)


def only_kept(x: Array, y: Array, sigma: Array, codes: Array, keep: Array, q: Q) -> Array:
    return mask(x, y, sigma, codes, keep, q) & keep


def inverted(x: Array, y: Array, sigma: Array, codes: Array, keep: Array, q: Q) -> Array:
    return ~mask(x, y, sigma, codes, keep, q)


def ones(x: Array, y: Array, sigma: Array, codes: Array, keep: Array, q: Q) -> Array:
    return np.ones(y.shape, bool)


def by_l1(y: Array, q: quest.Quantizer) -> Array:
    folded = np.abs(y).reshape(len(y), -1, 2).sum(-1)
    return np.repeat(select_by(folded, 2, 4, 1), 2, -1)


def by_maximum(y: Array, q: quest.Quantizer) -> Array:
    folded = np.abs(y).reshape(len(y), -1, 2).max(-1)
    return np.repeat(select_by(folded, 2, 4, 1), 2, -1)


def signed_largest(y: Array, q: quest.Quantizer) -> Array:
    groups = y.reshape(len(y), -1, 4)
    keep = np.zeros(groups.shape, bool)
    np.put_along_axis(keep, np.argsort(-groups, -1, kind="stable")[..., :2], True, -1)
    return keep.reshape(y.shape)


def above_threshold(y: Array, q: quest.Quantizer) -> Array:
    """Magnitude pruning of whole rows: half of the entries, but not half of each group."""
    return np.abs(y) > np.median(np.abs(y), -1, keepdims=True)


@dataclass(frozen=True)
class Fault:
    """A replaced part, where it shows, the judges that must reject it and those that may."""

    name: str
    q: quest.Quantizer
    parts: Parts
    stages: str
    also: str = ""
    distribution: str = "gaussian"
    shape: tuple[int, int] = (64, 256)
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return self.name


def fault(name: str, q: quest.Quantizer, stages: str, also: str = "", **how: Any) -> Fault:
    """`how`: parts by name, and fields of `Fault`."""
    fields = {k: how.pop(k) for k in ("distribution", "shape", "dtype") if k in how}
    return Fault(name, q, replace(HONEST, **how), stages, also, **fields)


I4, I8 = Q(UNIFORM[4], H128), Q(UNIFORM[8], H128)
PLAIN4, BIT = Q(UNIFORM[4], quest.Identity()), Q(UNIFORM[1], H128, quest.Clip(1.3))
FP4 = Q(quest.grids.e2m1(), H128)
SPARSE4 = Q(UNIFORM[4], H128, quest.Trust(), NM24)
PAIRS4 = Q(UNIFORM[4], H128, quest.Trust(), PAIRS)
F16, BF16 = torch.float16, torch.bfloat16
AFTER = "codes, mask, values"
FAULTS = [
    # Transform: a rotation by another orthonormal matrix leaves the scale right.
    fault("rotation: n^-1/2 missing", I4, "codes", "mask",
          rotate=lambda x, n: hadamard.apply(x, n) * n**0.5),
    fault("rotation: Walsh order", I4, "codes", "mask",
          rotate=lambda x, n: by_matrix(sequency(n), x, n) * n**-0.5),
    fault("rotation: left out", I4, "codes", "mask", rotate=lambda x, n: x),
    fault("rotation: tail block left out", I8, "codes", "mask", rotate=tail_left),
    fault("rotation: one butterfly sign", BIT, "codes", "mask",
          rotate=lambda x, n: butterfly(x, n, flip=6) * n**-0.5),
    fault("rotation: H^T", Q(UNIFORM[4], H12), "codes", "mask", shape=(64, 120),
          rotate=hadamard.apply_transpose),
    fault("rotation: H in bfloat16", I8, "codes", "mask", rotate=in_bfloat16),
    fault("rotation: sums in bfloat16", I4, "codes", "mask", rotate=rounded_stages),
    # Scale: the codes are judged against the scale that was written, and hold.
    fault("scale: unbiased", I4, "scale", "mask", scale=bias),
    fault("scale: mean subtracted", I4, "scale", scale=centred),
    fault("scale: largest magnitude", I4, "scale", scale=absmax),
    fault("scale: mean magnitude", I4, "scale", scale=mean_magnitude),
    fault("scale: one for all rows", I4, "scale", scale=over_all_rows),
    fault("scale: padded width", PLAIN4, "scale", scale=padded_width, shape=(64, 192)),
    fault("scale: 1e-8 added", I4, "scale", scale=with_epsilon, distribution="tiny"),
    fault("scale: 1e-8 added, row of zeros", I4, "scale", AFTER, scale=with_epsilon,
          distribution="zeros"),
    fault("scale: 1e-8 added in float16", I4, "values", value=epsilon_in_half,
          distribution="zeros", dtype=F16),
    fault("scale: of the kept entries", SPARSE4, "scale", "codes, mask, values",
          scale=lambda x, y: rms(np.where(select(y, SPARSE4), y, 0), y)),
    fault("scale: bfloat16 stored", I4, "scale", AFTER, stored=to_bfloat16),
    fault("scale: another stored than used", I4, "scale", AFTER,
          stored=lambda sigma: sigma * 1.01),
    fault("scale: alpha folded in", I4, "scale", AFTER,
          stored=lambda sigma: sigma * UNIFORM[4].outer),
    fault("scale: codes by the unbiased one", I8, "codes", "mask",
          encode=lambda t, q: encode(t * (255 / 256) ** 0.5, q)),
    fault("scale: values by the unbiased one", I4, "values",
          value=lambda p, s: p * s * (256 / 255) ** 0.5),
    fault("grid: constant of 3 bits in the codes", I4, "codes",  "mask",
          encode=lambda t, q: clipped(np.floor(t / (2 * UNIFORM[3].outer / 15)), q)),
    fault("grid: constant of 3 bits in the values", I4, "values",
          value=lambda p, s: p * s * (UNIFORM[3].outer / UNIFORM[4].outer)),
    fault("grid: alpha 1e-6 off", I4, "values", value=lambda p, s: p * s * (1 + 1e-6)),
    fault("grid: uniform for Lloyd-Max", Q(quest.grids.lloyd_max(4), H128), "codes", "mask",
          encode=lambda t, q: encode(t, I4) + 8),
    # Codes.
    fault("codes: trunc", I4, "codes", "mask", encode=rounded_by(np.trunc)),
    fault("codes: round", I4, "codes", "mask", encode=rounded_by(np.round)),
    fault("codes: ceil", I4, "codes", "mask", encode=rounded_by(np.ceil)),
    fault("codes: ternary by floor", Q(quest.grids.ternary(), H128), "codes", "mask",
          encode=lambda t, q: np.clip(np.floor(t / q.grid.step), -1, 1).astype(int)),
    fault("codes: clamp to -7", I4, "codes", "mask", encode=lower(-7)),
    fault("codes: clamp to 6", I4, "codes", "mask", encode=upper(6)),
    fault("codes: lower clamp not divided by L", I4, "codes", AFTER,
          encode=lower_clamp_without_division),
    fault("codes: not clamped", I4, "codes", AFTER,
          encode=lambda t, q: np.floor(t / q.grid.step).astype(int)),
    fault("codes: not centred", I4, "codes", AFTER, encode=unsigned_codes),
    fault("codes: sign lost in 8 bits", I8, "codes", AFTER, encode=lambda t, q: encode(t, q) & 127),
    fault("codes: t in bfloat16", I4, "codes", "mask", encode=in_bfloat16_codes),
    fault("codes: 1 bit inverted", BIT, "codes", "mask", encode=lambda t, q: -1 - encode(t, q)),
    fault("codes: E2M1, 1.25 for 1.5", FP4, "codes", "mask",
          encode=e2m1_on(np.array([0, 0.5, 1, 1.25, 2, 3, 4, 6]))),
    fault("codes: E2M1, table of E3M0", FP4, "codes", "mask",
          encode=e2m1_on(np.array([0, 0.25, 0.5, 1, 2, 4, 8, 16]))),
    fault("codes: E2M1 rounds down", FP4, "codes", "mask", encode=e2m1_floor),
    fault("codes: E2M1 as sign and magnitude", FP4, "codes", AFTER, encode=e2m1_sign_magnitude),
    fault("codes: E2M1 in bfloat16", FP4, "codes", "mask", encode=in_bfloat16_codes),
    fault("codes: one element wrong", I4, "codes", "mask",
          encode=lambda t, q: np.where(np.arange(t.size).reshape(t.shape) == 4321,
                                       encode(t, q) ^ 1, encode(t, q))),
    # Packing.
    fault("pack: nibbles swapped", I4, "packed codes", pack=nibbles_swapped),
    fault("pack: odd width drops a nibble", PLAIN4, "packed codes", pack=last_dropped,
          shape=(64, 33)),
    fault("pack: odd width drops a bit", Q(UNIFORM[1], quest.Identity()), "packed codes",
          pack=last_dropped, shape=(64, 33)),
    fault("pack: rows run on", PLAIN4, "packed codes", pack=rows_run_on, shape=(64, 33)),
    fault("pack: signed nibbles", I4, "packed codes",
          pack=lambda c, q: pack_bits(c & 15, 4)),
    fault("pack: 3 bits at 3 bits", Q(UNIFORM[3], H128), "packed codes",
          pack=lambda c, q: np.resize(np.packbits(c & 7), pack(c, q).shape)),
    fault("pack: mask big-endian", I4, "packed mask", flags=big_endian),
    # Mask.
    fault("mask: threshold in steps", I4, "mask", mask=in_steps),
    fault("mask: of the clipped value", I4, "mask", mask=from_clipped),
    fault("mask: before the rotation", I4, "mask", mask=not_rotated),
    fault("mask: distance in bfloat16", I8, "mask", mask=naive_distance(BF16), dtype=BF16),
    fault("mask: distance in float16", I8, "mask", mask=naive_distance(F16), dtype=F16),
    fault("mask: another width's alpha", I4, "mask", mask=of_other_bits(3)),
    fault("mask: none", I4, "mask", mask=ones),
    fault("mask: inverted", I4, "mask", mask=inverted),
    fault("mask: Trust(0.5) taken as Trust(1)", Q(UNIFORM[4], H128, quest.Trust(0.5)), "mask",
          mask=of_estimator(quest.Trust())),
    fault("mask: Clip(1) for Trust(1)", I4, "mask", mask=of_estimator(quest.Clip(1.0))),
    fault("mask: Trust for Clip(1.3) at 1 bit", BIT, "mask", mask=of_estimator(quest.Trust())),
    fault("mask: 1.25 for 1.30", BIT, "mask", mask=of_estimator(quest.Clip(1.25))),
    fault("mask: STE masked", Q(UNIFORM[2], H128, quest.STE()), "mask",
          mask=of_estimator(quest.Trust())),
    fault("mask: FP4 with the gap of 4 bits", FP4, "mask", mask=lambda x, y, s, c, k, q:
          np.abs(y) <= (q.grid.outer + UNIFORM[4].half_gap) * s),
    fault("mask: pruned entries as kept ones", SPARSE4, "mask", mask=of_kept),
    fault("mask: pruned entries never", SPARSE4, "mask", mask=only_kept),
    # Sparsity.
    fault("selection: keeps the smallest", SPARSE4, "selection", "mask",
          select=lambda y, q: select_by(y, 2, 4, 1, largest=False)),
    fault("selection: keeps the largest signed", SPARSE4, "selection", "mask",
          select=signed_largest),
    fault("selection: unstable ties", replace(SPARSE4, transform=quest.Identity()), "selection",
          select=lambda y, q: select_by(y, 2, 4, 1, stable=False), distribution="integers"),
    fault("selection: unstable ties of rotated integers",
          replace(SPARSE4, transform=quest.Hadamard(16)), "selection", "mask",
          select=lambda y, q: select_by(y, 2, 4, 1, stable=False), distribution="integers"),
    fault("selection: unstable ties of pairs", replace(PAIRS4, transform=quest.Identity()),
          "selection", select=lambda y, q: select_by(y, 4, 8, 2, stable=False),
          distribution="equal"),
    fault("selection: 2:4 where pairs are due", PAIRS4, "selection", "mask",
          select=lambda y, q: select_by(y, 2, 4, 1)),
    fault("selection: entries of 8 where pairs are due", PAIRS4, "selection", "mask",
          select=lambda y, q: select_by(y, 4, 8, 1)),
    fault("selection: pairs where 2:4 is due", SPARSE4, "selection", "mask",
          select=lambda y, q: select_by(y, 4, 8, 2)),
    fault("selection: pairs by L1", PAIRS4, "selection", "mask", select=by_l1),
    fault("selection: pairs by maximum", PAIRS4, "selection", "mask", select=by_maximum),
    fault("selection: one kept of four", SPARSE4, "selection", "mask",
          select=lambda y, q: select_by(y, 1, 4, 1)),
    fault("selection: whole rows", SPARSE4, "selection", "mask", select=above_threshold),
    fault("pruned: half a step", SPARSE4, "values",
          decode=lambda c, k, q: decode(c, np.ones_like(k), q)),
    fault("pruned: the dense code", SPARSE4, "pruned codes", "codes, values",
          encode=lambda t, q: np.where(t == 0, -1, encode(t, q))),
]  # fmt: skip


@pytest.mark.parametrize("planted", FAULTS, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_quantizer_judges_bite(planted: Fault, seed: int) -> None:
    x = inputs.draw(planted.distribution, planted.shape, planted.dtype, seed)
    q = planted.q
    found = judge(x, q, run(x, q, planted.parts))
    rejected = failing(found)
    must, may = set(planted.stages.split(", ")), set(planted.also.split(", "))
    assert must <= rejected, rejected
    assert rejected <= must | may, rejected
    first = next(v for v in found if v.failure is not None)
    assert first.ratio > 1
    with pytest.raises(Rejected, match=f"^{first.stage}: "):
        first.require()
    honest = judge(x, q, run(x, q, HONEST))
    assert not failing(honest), honest


def test_every_quantizer_stage_has_a_fault() -> None:
    stages = {s for f in FAULTS for s in f.stages.split(", ")}
    assert stages == {
        "scale", "selection", "pruned codes", "codes", "packed codes", "packed mask", "mask",
        "values",
    }  # fmt: skip


@pytest.mark.whole
@pytest.mark.parametrize(
    ("pattern", "kept", "told"),
    [
        (NM24, [1, 1, 0, 0, 1, 1, 0, 0], None),
        (NM24, [1, 0, 1, 0, 1, 1, 0, 0], "1 groups drop a larger entry than they keep"),
        (NM24, [1, 1, 1, 0, 1, 0, 0, 0], "a group of 4 does not keep 2"),
        (NM24, [1, 1, 0, 0, 0, 0, 1, 1], "4 exact ties keep the higher index"),
        (PAIRS, [1, 1, 0, 0, 0, 0, 1, 1], "1 groups drop a larger pair than they keep"),
        (PAIRS, [1, 1, 1, 1, 0, 0, 0, 0], None),
        (PAIRS, [1, 1, 1, 0, 1, 0, 0, 0], "half a pair is kept"),
        (PAIRS, [1, 1, 1, 1, 1, 1, 0, 0], "a group of 8 does not keep 4"),
    ],
)
def test_selected_says_why(pattern: Any, kept: list[int], told: str | None) -> None:
    # As entries: 8 6 | 5 4 and four times 3; as pairs: 10, 6.4, 4.2, 4.2.
    x = torch.tensor([[8.0, 6.0, 5.0, 4.0, 3.0, 3.0, 3.0, 3.0]])
    q = Q(UNIFORM[4], quest.Identity(), quest.Trust(), pattern)
    verdict = judges.selected(x, q, torch.tensor([kept], dtype=torch.bool))
    assert verdict.failure == told


# --- the exact lane ---------------------------------------------------------------------------


def dyadic_rows(seed: int, width: int = 512) -> Array:
    """Quarter steps of uniform(4, alpha=7.5), RMS exactly 1: midpoints, edges, zeros."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((4, width), dtype=np.int64)
    for row in rows:
        row[:5] = [32, -32, 30, -30, 34]  # the threshold of Trust, the outer points, beyond
        row[5:11] = [4, -4, 8, -8, 12, -12]  # midpoints
        row[11:-4] = rng.integers(-2, 3, width - 15)
        left = 16 * width - int((row**2).sum())
        row[-4:] = exact_rows.four_squares(left)
        rng.shuffle(row)
    return rows / 4.0


EXACT_FAULTS = [
    ("codes", replace(HONEST, encode=to_even)),
    ("codes", replace(HONEST, encode=down_at_ties)),
    ("codes", replace(HONEST, encode=away_from_zero)),
    ("mask", replace(HONEST, mask=strict)),
]


def exact_verdicts(x: Tensor, q: quest.Quantizer, parts: Parts) -> list[Verdict]:
    expected = quantize.quantize(oracle.lift(x), **oracle.arguments(q, x.shape[-1]))
    out = run(x, q, parts)
    return [
        judges.exact("scale", oracle.lift(out["scale"]), expected.scale),
        judges.exact("codes", oracle.lift(out["codes"]), expected.codes),
        judges.exact("mask", oracle.lift(out["mask"]), expected.mask),
    ]


@pytest.mark.parametrize("power", [-20, 0, 3])
@pytest.mark.parametrize("estimator", [quest.Trust(), quest.Clip(1.0), quest.Trust(0.5)], ids=str)
@given(seed=SEEDS)
def test_exact_lane_holds_and_bites(estimator: Any, power: int, seed: int) -> None:
    """Step 1, sigma a power of two: nothing rounds, so every tie is decided bit for bit."""
    q = Q(quest.grids.uniform(4, alpha=7.5), quest.Identity(), estimator)
    x = tensor(dyadic_rows(seed) * 2.0**power)
    for how, parts in WAYS.items():
        assert not failing(exact_verdicts(x, q, parts)), how
    for stage, parts in EXACT_FAULTS:
        assert stage in failing(exact_verdicts(x, q, parts)), (stage, parts)


@pytest.mark.parametrize("stage", ["ternary", "e2m1"])
@given(seed=SEEDS)
def test_exact_lane_of_other_grids(stage: str, seed: int) -> None:
    grid = quest.grids.ternary(1.0) if stage == "ternary" else quest.grids.e2m1(1.0)
    q = Q(grid, quest.Identity())
    x = tensor(dyadic_rows(seed))
    assert not failing(exact_verdicts(x, q, HONEST))
    ties = replace(HONEST, encode=down_at_ties)
    assert "codes" in failing(exact_verdicts(x, q, ties))


@pytest.mark.parametrize("order", [1, 2, 8])
def test_zero_has_no_slack(order: int) -> None:
    """A sum that is exactly 0 has the code of +step / 2 whatever the scale."""
    q = Q(UNIFORM[4], quest.Hadamard(order))
    x = tensor(np.array([[0.0, 0.0, 3.0, 3.0, -2.0, -2.0, 0.0, 0.0] * 2]))
    out = run(x, q, HONEST)
    judges.coded(x, q, out["codes"], out["scale"]).require()
    zero = torch.from_numpy(hadamard.apply(oracle.lift(x), order) == 0)
    assert zero.any()
    below = out["codes"].masked_fill(zero, -1)
    with pytest.raises(Rejected, match=f"{int(zero.sum())} of 16 codes are wrong; .* within 0.000"):
        judges.coded(x, q, below, out["scale"]).require()


# --- the statistical rules of T3 --------------------------------------------------------------


def test_codes_that_lean_one_way_are_rejected() -> None:
    x = inputs.draw("gaussian", (3072, 128), torch.float32, 5)
    out = run(x, I8, HONEST)
    y, s = hadamard.apply(oracle.lift(x), 128), oracle.lift(out["scale"])
    margin = bounds.code_margin(oracle.lift(x), 128, s)
    for lean, word in ((0.99, "one-sided: [0-9]+ ambiguous codes went up, 0 down"),
                       (-0.99, "one-sided: 0 ambiguous codes went up, [0-9]+ down")):  # fmt: skip
        codes = torch.from_numpy(encode(y / s + lean * margin, I8)).to(torch.int16)
        with pytest.raises(Rejected, match=word):
            judges.coded(x, I8, codes, out["scale"]).require()
        judges.coded(x, I8, codes, out["scale"], conclusive=False).require()
    sign = np.where(np.random.default_rng(0).random(y.shape) < 0.5, 0.99, -0.99)
    even = torch.from_numpy(encode(y / s + sign * margin, I8)).to(torch.int16)
    judges.coded(x, I8, even, out["scale"]).require()


def test_a_corpus_of_near_ties_is_inconclusive() -> None:
    grid = UNIFORM[4]
    rng = np.random.default_rng(0)
    z = rng.choice(np.array(grid.midpoints), (8, 256))
    x = tensor(z)
    q = Q(grid, quest.Identity())
    scale = torch.ones(8, 1)
    codes = torch.from_numpy(encode(z, q)).to(torch.int16)
    with pytest.raises(Rejected, match=r"inconclusive: [0-9]+ of 2048 codes are ambiguous"):
        judges.coded(x, q, codes, scale).require()
    verdict = judges.coded(x, q, codes, scale, conclusive=False).require()
    assert verdict.ambiguous > 1000
    # Ambiguous is not arbitrary: two codes off is wrong in any case.
    with pytest.raises(Rejected, match="codes are wrong"):
        judges.coded(x, q, (codes + 2).clamp(max=7), scale, conclusive=False).require()


# --- rows with rules of their own -------------------------------------------------------------


def special_rows() -> tuple[Tensor, dict[str, Tensor]]:
    """A row of zeros, one with a NaN, one with an infinity, a regular one."""
    x = inputs.draw("gaussian", (4, 128), torch.float32, 0)
    x[0], x[1, 3], x[2, 5] = 0.0, math.nan, math.inf
    clean = x.clone()
    clean[1:3] = 0.0
    out = run(clean, I4, HONEST)
    out["scale"][1:3] = math.nan
    out["values"][1:3] = math.nan
    out["mask"][1:3] = False
    out["bits"][1:3] = 0
    return x, out


def test_special_rows_hold() -> None:
    x, out = special_rows()
    assert not failing(judge(x, I4, out))
    assert out["scale"][0] == 0
    assert out["mask"][0].all()


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "row", "value", "stage"),
    [
        ("scale", 0, 1e-45, "scale"),
        ("scale", 0, math.nan, "scale"),
        ("scale", 1, 1.0, "scale"),
        ("scale", 2, math.inf, "scale"),
        ("scale", 3, math.nan, "scale"),
        ("mask", 0, False, "mask"),
        ("mask", 1, True, "mask"),
        ("mask", 2, True, "mask"),
        ("values", 0, 1e-45, "values"),
        ("values", 0, math.nan, "values"),
        ("values", 1, 0.0, "values"),
        ("values", 2, math.inf, "values"),
        ("values", 3, math.nan, "values"),
        ("codes", 0, -1, "codes"),
        ("codes", 2, 3, "codes"),
    ],
)
def test_special_rows_bite(name: str, row: int, value: float, stage: str) -> None:
    x, out = special_rows()
    out[name][row, 0] = value
    assert stage in failing(judge(x, I4, out))


@given(seed=SEEDS)
def test_scale_holds_at_every_magnitude(seed: int) -> None:
    name = ("tiny", "subnormal", "huge", "mixed_rows", "heavy", "alternating")[seed % 6]
    x = inputs.draw(name, (5, 96), torch.float32, seed)
    sigma = quantize.scale(oracle.lift(x))
    for order in (1, 32):
        judges.scaled(x, tensor(sigma), order).require()
        # A relative error of 1e-4 is far outside the bound wherever float32 can show it.
        wrong = tensor(sigma * (1 + 1e-4))
        if (oracle.lift(wrong) > 1e-40).any():
            with pytest.raises(Rejected, match=r"^scale"):
                judges.scaled(x, wrong, order).require()


# --- values, packing, form --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_values_hold_and_bite(grid: Any, dtype: torch.dtype) -> None:
    q = Q(grid, quest.Identity(), quest.STE())
    x = inputs.draw("gaussian", (16, 64), dtype, 1)
    out = run(x, q, HONEST)
    exact, codes = out["values"], out["codes"]
    points = decode(codes.numpy(), np.ones(codes.shape, bool), q)
    fused = tensor(points.astype(F32) * out["scale"].numpy(), dtype)
    twice = tensor((points / grid.outer).astype(F32) * (out["scale"].numpy() * F32(grid.outer)),
                   dtype)  # fmt: skip
    for values in (exact, fused, twice):
        judges.dequantized(q, codes, out["scale"], None, values).require()
    # Two units in the last place, and a value of the neighbouring code.
    unit = bounds.UNIT[oracle.dtype_name(dtype)]
    for wrong in (exact * (1 + 4 * unit), exact.roll(1, 1), exact.neg(), exact.bfloat16() * 1.01):
        with pytest.raises(Rejected, match=r"^values: at"):
            judges.dequantized(q, codes, out["scale"], None, wrong.to(dtype)).require()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@given(seed=SEEDS, width=st.integers(1, 19))
def test_packing_holds_and_bites(grid: Any, seed: int, width: int) -> None:
    q = Q(grid, quest.Identity())
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, grid.levels, (3, width)) - (grid.levels // 2 if grid.step else 0)
    data = pack(codes, q)
    judges.packed(q, torch.from_numpy(codes), torch.from_numpy(data)).require()
    for place in range(data.shape[1]):
        for bit in (1, 128):
            wrong = data.copy()
            wrong[seed % 3, place] ^= bit
            with pytest.raises(Rejected, match=r"^packed codes: 1 of"):
                judges.packed(q, torch.from_numpy(codes), torch.from_numpy(wrong)).require()
    with pytest.raises(Rejected, match=r"^packed codes: shape"):
        judges.packed(q, torch.from_numpy(codes), torch.from_numpy(data[:, :-1])).require()
    flags = torch.from_numpy(rng.random((3, width)) < 0.5)
    bits = torch.from_numpy(np.packbits(flags.numpy(), axis=-1, bitorder="little"))
    judges.packed_bits("packed mask", flags, bits).require()
    with pytest.raises(Rejected, match=r"^packed mask"):
        judges.packed_bits("packed mask", ~flags, bits).require()


def test_form() -> None:
    t = torch.zeros(2, 3)
    judges.form("codes", t, (2, 3), torch.float32).require()
    for shape, dtype in (((3, 2), torch.float32), ((2, 3), torch.float16), ((6,), torch.float32)):
        with pytest.raises(Rejected, match=r"^codes: has shape"):
            judges.form("codes", t, shape, dtype).require()


def test_exact() -> None:
    a = np.arange(6).reshape(2, 3)
    judges.exact("row sums", a, a.copy()).require()
    judges.exact("row sums", a[:0], a[:0]).require()
    b = a.copy()
    b[1, 2] = 7
    with pytest.raises(Rejected, match=r"row sums: 1 of 6 differ; at \(1, 2\) it is 5, not 7"):
        judges.exact("row sums", a, b).require()
    with pytest.raises(Rejected, match="row sums: shape"):
        judges.exact("row sums", a, a[:1]).require()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_tell_zeros_apart_and_nan_alike(dtype: torch.dtype) -> None:
    t = torch.tensor([0.0, -0.0, math.nan, 1.0], dtype=dtype)
    judges.exact("scale", judges.bits(t), judges.bits(t.clone())).require()
    assert judges.bits(t)[0] != judges.bits(t)[1]


def test_close_at_the_edge_of_its_bound() -> None:
    expected, bound = np.array([1.0, -2.0]), np.array([0.5, 0.25])
    verdict = judges.close("y", torch.tensor([1.5, -2.25]), expected, bound).require()
    assert verdict.ratio == 1
    with pytest.raises(Rejected, match=r"y: at \(1,\) it is .*-2\.5\)?, expected .*-2\.0"):
        judges.close("y", torch.tensor([1.5, -2.5]), expected, bound).require()


def test_close_compares_shapes() -> None:
    # Those that NumPy would spread over each other, too.
    for shape in ((3,), (1, 3), (3, 1)):
        ones = np.ones(shape)
        for other in ((3,), (1, 3), (3, 1)):
            failure = judges.close("y", torch.ones(other), ones, ones).failure
            assert (failure is None) == (other == shape)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("actual", "expected", "good"),
    [
        (math.nan, math.nan, True),
        (math.nan, 1.0, False),
        (1.0, math.nan, False),
        (math.inf, math.inf, True),
        (-math.inf, math.inf, False),
        (math.inf, 1.0, False),
        (math.inf, 65504.0, True),  # half a unit on it overflows
        (-math.inf, 65504.0, False),
        (math.inf, 60000.0, False),
        (1.0, math.inf, False),
        (65504.0, math.inf, False),
        (0.0, 0.0, True),
        (2.0**-24, 0.0, False),
    ],
)
def test_close_places_infinities_and_nan(actual: float, expected: float, good: bool) -> None:
    found = judges.close(
        "y",
        torch.tensor([actual], dtype=torch.float16),
        np.array([expected]),
        np.array([abs(expected) * 2.0**-11]),
    )
    assert (found.failure is None) == good, found


def off(exact: Array, roundings: Array | float) -> Tensor:
    """float32 values that are so many units of roundoff, or one more or less, off."""
    return torch.from_numpy(np.asarray(exact) * (1 + roundings * bounds.U32)).float()


def after_the_transform(roundings: int) -> dict[str, Verdict]:
    """Verdicts on values, codes, a mask and a product that are so many roundings off."""
    grid = quest.grids.uniform(4)
    q = Q(grid, quest.Identity(), quest.Clip(1.0))
    one = torch.ones(1, 1)
    codes = torch.arange(-8, 8, dtype=torch.int8)[None]
    points = np.array([grid.points])
    found = {"values": judges.dequantized(q, codes, one, None, off(points, roundings))}
    # An upper code below its midpoint, and a lower one above.
    mids = np.array([grid.midpoints])
    mids = mids[np.abs(mids) > 0.1][None]
    upper = torch.from_numpy(quantize.encode(mids, oracle.grid(grid))).to(torch.int8)
    x = off(mids, -roundings * np.sign(mids))
    found["codes"] = judges.coded(x, q, upper, one, conclusive=False)
    x = off(np.array([[grid.outer, -grid.outer]]), roundings)
    ends = torch.tensor([[7, -8]], dtype=torch.int8)
    found["mask"] = judges.masked(x, q, ends, one, torch.ones(1, 2, dtype=torch.bool))
    numbers = (np.array([[3, -5, 7]]), np.array([[1, 2, -4], [6, -1, 5]]))
    y = off(numbers[0] @ numbers[1].T * 0.75, roundings)
    found["product"] = judges.multiplied(numbers, (0.5, 1.5), (one, torch.ones(2, 1)), None, y)
    return found


def test_roundings_after_the_transform_are_few() -> None:
    """What the counts in `bounds` say at the most, 4 to 7, and far less than 10 times that."""
    for roundings, good in ((0, True), (3, True), (14, False)):
        found = after_the_transform(roundings)
        assert {name: v.failure is None for name, v in found.items()} == dict.fromkeys(found, good)


def test_a_mask_must_agree_with_its_code() -> None:
    # Within its error the value is either side of a midpoint, and either side of a threshold that
    # lies a little below; but not above the one and below the other.
    grid = quest.grids.uniform(4)
    middle = oracle.grid(grid).midpoints[10]
    q = Q(grid, quest.Identity(), quest.Clip(middle * (1 - 4 * bounds.U32) / grid.outer))
    x, one = off(np.array([[middle]]), -2.5), torch.ones(1, 1)
    for code, flag, good in ((3, True, False), (3, False, True), (2, True, True), (2, False, True)):
        codes = torch.tensor([[code]], dtype=torch.int8)
        judges.coded(x, q, codes, one, conclusive=False).require()
        found = judges.masked(x, q, codes, one, torch.tensor([[flag]]))
        assert (found.failure is None) == good, found


# --- backward ---------------------------------------------------------------------------------


def transposed_case(order: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Array, Tensor]:
    grad = inputs.draw("gaussian", (6, 3 * order), dtype, seed)
    flags = np.random.default_rng(seed).random(grad.shape) < 0.7
    return grad, flags, torch.from_numpy(pack_bits(flags, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", [1, 8, 128, 12, 40])
@given(seed=SEEDS)
def test_transposed_holds(order: int, dtype: torch.dtype, seed: int) -> None:
    grad, flags, packed = transposed_case(order, seed, dtype)
    taken = oracle.lift(grad) * flags
    ways = [hadamard.apply_transpose(taken, order)]
    ways.append(by_matrix(sign_matrix(order).T.astype(F32), taken.astype(F32), order)
                * F32(order**-0.5))  # fmt: skip
    for way in ways:
        judges.transposed(grad, packed, tensor(way, dtype), order).require()


BACKWARD_FAULTS: list[tuple[str, Callable[[Array, Array, int], Array]]] = [
    ("mask left out", lambda g, m, n: hadamard.apply_transpose(g, n)),
    ("mask inverted", lambda g, m, n: hadamard.apply_transpose(g * ~m, n)),
    ("mask after H^T", lambda g, m, n: hadamard.apply_transpose(g, n) * m),
    ("mask of the next row", lambda g, m, n: hadamard.apply_transpose(g * np.roll(m, 1, 0), n)),
    ("H^T left out", lambda g, m, n: g * m),
    ("H where H^T is due", lambda g, m, n: hadamard.apply(g * m, n)),
    ("n^-1/2 missing", lambda g, m, n: hadamard.apply_transpose(g * m, n) * n**0.5),
    ("H in bfloat16", lambda g, m, n: by_matrix(
        tensor(sign_matrix(n).T * n**-0.5, BF16).double().numpy(), g * m, n)),
    ("unwritten tail", lambda g, m, n: np.where(
        np.arange(g.shape[-1]) < n, hadamard.apply_transpose(g * m, n), math.nan)),
]  # fmt: skip


@pytest.mark.parametrize("wrong", [pytest.param(f[1], id=f[0]) for f in BACKWARD_FAULTS])
@pytest.mark.parametrize("order", [12, 40])
def test_transposed_bites(wrong: Callable[..., Array], order: int) -> None:
    grad, flags, packed = transposed_case(order, 0, torch.float32)
    with pytest.raises(Rejected, match=r"^backward: at"):
        judges.transposed(grad, packed, tensor(wrong(oracle.lift(grad), flags, order)), order
                          ).require()  # fmt: skip


def test_transposed_bites_where_a_masked_infinity_spreads() -> None:
    grad, flags, packed = transposed_case(8, 0, torch.float32)
    grad[0, int(np.flatnonzero(~flags[0])[0])] = math.inf
    g64 = oracle.lift(grad)
    chosen = np.where(flags, g64, 0.0)
    judges.transposed(grad, packed, tensor(hadamard.apply_transpose(chosen, 8)), 8).require()
    with np.errstate(invalid="ignore"):
        product = hadamard.apply_transpose(g64 * flags, 8)
    with pytest.raises(Rejected, match=r"^backward: at \(0, \d+\) it is .*nan"):
        judges.transposed(grad, packed, tensor(product), 8).require()


# --- the layer --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One call: inputs, operands as they were multiplied, masks; all rows by columns."""

    x: Tensor
    w: Tensor
    grad: Tensor
    bias: Tensor | None
    recipe: quest.Recipe
    x_out: dict[str, Tensor]
    w_out: dict[str, Tensor]

    @property
    def order(self) -> int:
        return self.recipe.weight.transform.order(self.x.shape[-1])

    @property
    def hats(self) -> tuple[Array, Array]:
        return oracle.lift(self.x_out["values"]), oracle.lift(self.w_out["values"])

    def judge(self, out: dict[str, Array]) -> list[Verdict]:
        tensors = {k: tensor(v, self.x.dtype) for k, v in out.items()}
        tensors |= {"x_hat": self.x_out["values"], "w_hat": self.w_out["values"]}
        masks = self.x_out["mask"], self.w_out["mask"]
        return judges.layer(
            self.x, self.w, self.grad, self.bias, self.recipe, tensors, masks, bounds.U32
        )


@functools.cache
def layer_case(
    recipe: str, order: int, dtype: torch.dtype, bias: bool, seed: int, square: bool = False
) -> Layer:
    made = quest.recipe(recipe, transform=quest.Hadamard(order))
    rows, columns, width = (48, 48, 48) if square else (7, 11, 4 * order)
    x = inputs.draw("gaussian", (rows, width), dtype, seed)
    w = inputs.draw("heavy", (columns, width), dtype, seed + 1)
    grad = inputs.draw("gaussian", (rows, columns), dtype, seed + 2)
    b = inputs.draw("gaussian", (columns,), dtype, seed + 3) if bias else None
    parts = run(x, made.activation, HONEST), run(w, made.weight, HONEST)
    return Layer(x, w, grad, b, made, *parts)


def gradients(c: Layer, product: Callable[[Array, Array], Array] = np.matmul) -> dict[str, Array]:
    """The layer in float64, but for the product."""
    (xh, wh), g = c.hats, oracle.lift(c.grad)
    out = {"y": product(xh, wh.T)}
    for name, a, m, t in (("dx", g, wh, c.x_out), ("dw", g.T, xh, c.w_out)):
        inner = product(a, m) * t["mask"].numpy()
        out[name] = hadamard.apply_transpose(inner.astype(np.float64), c.order)
    if c.bias is not None:
        out["y"] = out["y"] + oracle.lift(c.bias)
        out["db"] = g.sum(0)
    return out


def product32(a: Array, b: Array) -> Array:
    return (a.astype(F32) @ b.astype(F32)).astype(np.float64)


def product_in_chunks(a: Array, b: Array) -> Array:
    """Split K in four, last chunk first, float32 sums."""
    cuts = np.array_split(np.arange(a.shape[1]), 4)
    total = np.zeros((len(a), b.shape[1]), F32)
    for cut in reversed(cuts):
        total += a[:, cut].astype(F32) @ b[cut].astype(F32)
    return total.astype(np.float64)


def product_one_by_one(a: Array, b: Array) -> Array:
    total = np.zeros((len(a), b.shape[1]), F32)
    for k in reversed(range(a.shape[1])):
        total += a[:, k : k + 1].astype(F32) * b[k : k + 1].astype(F32)
    return total.astype(np.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", ["w4a4", "w1a1", "w8a8", "fp4", "w1.58a1.58-2:4", "w4a4-4:8"])
@given(seed=st.integers(0, 2**16))
def test_layer_holds(recipe: str, dtype: torch.dtype, seed: int) -> None:
    order = (8, 12, 32)[seed % 3] if "-" not in recipe else 16
    c = layer_case.__wrapped__(recipe, order, dtype, bool(seed % 2), seed)
    ways = (np.matmul, product32, product_in_chunks, product_one_by_one)
    for product in ways:
        for verdict in c.judge(gradients(c, product)):
            assert verdict.failure is None, (product, verdict)
    # Torch's own product and its rounding to the dtype between the product and the rotation.
    stored = gradients(c, lambda a, b: (tensor(a, dtype) @ tensor(b, dtype)).double().numpy())
    assert not failing(c.judge(stored))


def swapped_scales(c: Layer) -> dict[str, Array]:
    """y = (codes product) * row scale * column scale, with the two vectors exchanged."""
    sx, sw = c.x_out["scale"].double().numpy(), c.w_out["scale"].double().numpy()
    xh, wh = c.hats
    return gradients(c) | {"y": (xh / sx * np.resize(sw, sx.shape)) @ (wh / sw * sx).T}


def half_step_missing(c: Layer) -> dict[str, Array]:
    """Integer codes multiplied without the 1/2 of (code + 1/2) on one side."""
    q, (_, wh) = c.recipe.activation, c.hats
    codes, s = c.x_out["codes"].numpy(), c.x_out["scale"].double().numpy()
    return gradients(c) | {"y": (codes * grid_of(q).step * s) @ wh.T}


def without(product: Callable[[Array, Array], Array], *names: str) -> Callable[..., Any]:
    """The layer with another product in some of its outputs."""
    return lambda c: gradients(c) | {k: v for k, v in gradients(c, product).items() if k in names}


def drop_last(a: Array, b: Array) -> Array:
    return a[:, :-8] @ b[:-8]


def last_split_only(a: Array, b: Array) -> Array:
    """Split-K that stores where it should add."""
    half = a.shape[1] // 2
    return a[:, half:] @ b[half:]


def half_accumulator(a: Array, b: Array) -> Array:
    total = np.zeros((len(a), b.shape[1]), np.float16)
    for k in range(a.shape[1]):
        total += (a[:, k : k + 1] * b[k : k + 1]).astype(np.float16)
    return total.astype(np.float64)


def rotated_back(c: Layer, name: str, inner: Array) -> dict[str, Array]:
    return gradients(c) | {name: hadamard.apply_transpose(inner, c.order)}


def inner(c: Layer) -> tuple[Array, Array]:
    (xh, wh), g = c.hats, oracle.lift(c.grad)
    return g @ wh, g.T @ xh


def masks(c: Layer) -> tuple[Array, Array]:
    return c.x_out["mask"].numpy(), c.w_out["mask"].numpy()


def through_the_scale(c: Layer) -> dict[str, Array]:
    """dx with the term that a differentiable sigma would add."""
    x, g = oracle.lift(c.x), inner(c)[0]
    sigma = c.x_out["scale"].double().numpy()
    points = c.hats[0] / sigma
    extra = (g * points).sum(-1, keepdims=True) * x / (sigma * x.shape[-1])
    return gradients(c) | {"dx": gradients(c)["dx"] + extra}


ROUGH_DW = without(half_accumulator, "dw")
LAYER_FAULTS: list[tuple[str, Callable[[Layer], dict[str, Array]], str]] = [
    ("last K tile missing", without(drop_last, "y"), "layer y"),
    ("last K tile missing in dx", without(drop_last, "dx"), "layer dx"),
    ("last K tile missing in dw", without(drop_last, "dw"), "layer dw"),
    ("split K stored, not added", without(last_split_only, "y"), "layer y"),
    ("float16 accumulator", without(half_accumulator, "y"), "layer y"),
    ("float16 accumulator in dw", ROUGH_DW, "layer dw"),
    ("scales swapped", swapped_scales, "layer y"),
    ("K/2 correction missing", half_step_missing, "layer y"),
    ("operands not quantized",
     lambda c: gradients(c) | {"y": oracle.lift(c.x) @ oracle.lift(c.w).T}, "layer y"),
    ("bias left out", lambda c: gradients(c) | {"y": c.hats[0] @ c.hats[1].T}, "layer y"),
    ("bias twice", lambda c: gradients(c) | {"y": gradients(c)["y"] + oracle.lift(c.bias)},
     "layer y"),
    ("H^T left out in dx", lambda c: gradients(c) | {"dx": inner(c)[0] * masks(c)[0]}, "layer dx"),
    ("H^T left out in dw", lambda c: gradients(c) | {"dw": inner(c)[1] * masks(c)[1]}, "layer dw"),
    ("H for H^T in dx",
     lambda c: gradients(c) | {"dx": hadamard.apply(inner(c)[0] * masks(c)[0], c.order)},
     "layer dx"),
    ("H for H^T in dw",
     lambda c: gradients(c) | {"dw": hadamard.apply(inner(c)[1] * masks(c)[1], c.order)},
     "layer dw"),
    ("mask of the weight in dx", lambda c: rotated_back(c, "dx", inner(c)[0] * masks(c)[1]),
     "layer dx"),
    ("mask of the activation in dw", lambda c: rotated_back(c, "dw", inner(c)[1] * masks(c)[0]),
     "layer dw"),
    ("no mask in dx", lambda c: rotated_back(c, "dx", inner(c)[0]), "layer dx"),
    ("no mask in dw", lambda c: rotated_back(c, "dw", inner(c)[1]), "layer dw"),
    ("x for X in dw", lambda c: rotated_back(
        c, "dw", (oracle.lift(c.grad).T @ oracle.lift(c.x)) * masks(c)[1]), "layer dw"),
    ("w for W in dx", lambda c: rotated_back(
        c, "dx", (oracle.lift(c.grad) @ oracle.lift(c.w)) * masks(c)[0]), "layer dx"),
    ("dw scaled by the rows", lambda c: gradients(c) | {"dw": gradients(c)["dw"] / len(c.x)},
     "layer dw"),
    ("gradient through the scale", through_the_scale, "layer dx"),
    ("db averaged", lambda c: gradients(c) | {"db": oracle.lift(c.grad).mean(0)}, "layer db"),
    ("db over the wrong axis", lambda c: gradients(c) | {"db": oracle.lift(c.grad).sum(1)},
     "layer db"),
    ("NaN in one element", lambda c: gradients(c) | {"y": np.where(
        np.arange(48) == 47, math.nan, gradients(c)["y"])}, "layer y"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "stage"), [f[1:] for f in LAYER_FAULTS], ids=[f[0] for f in LAYER_FAULTS]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_bites(
    wrong: Callable[[Layer], dict[str, Array]], stage: str, dtype: torch.dtype
) -> None:
    if dtype == BF16 and wrong is ROUGH_DW:
        pytest.skip("float16 sums of 48 terms are finer than the bfloat16 they end in")
    # Square, since wrong operands and axes of rectangular shapes would fail by themselves.
    c = layer_case("w4a4", 12, dtype, True, 5, square=True)
    assert not failing(c.judge(gradients(c)))
    assert failing(c.judge(wrong(c))) == {stage}


def test_layer_bites_on_narrowed_integers() -> None:
    """int32 sums of 8-bit codes narrowed to float16: 65504 is passed within a few hundred terms."""
    x = torch.ones(3, 128) * 127.5
    w = torch.ones(2, 128) * 127.5
    made = quest.recipe("w8a8", transform=quest.Identity())
    total = (oracle.lift(x) @ oracle.lift(w).T).astype(np.float64)
    with np.errstate(over="ignore"):
        narrowed = total.astype(np.float16).astype(np.float64)
    ones = torch.ones(3, 128, dtype=torch.bool), torch.ones(2, 128, dtype=torch.bool)
    g = torch.zeros(3, 2)
    out = {"y": total, "dx": np.zeros((3, 128)), "dw": np.zeros((2, 128))}
    for y, expected in ((total, set()), (narrowed, {"layer y"})):
        tensors = {k: tensor(v) for k, v in (out | {"y": y}).items()} | {"x_hat": x, "w_hat": w}
        assert failing(judges.layer(x, w, g, None, made, tensors, ones, bounds.U32)) == expected


def adjoint_case(
    order: int, dtype: torch.dtype, seed: int
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Array]]:
    x = inputs.draw("gaussian", (5, 2 * order), dtype, seed)
    w = inputs.draw("gaussian", (7, 2 * order), dtype, seed + 1)
    g = inputs.draw("gaussian", (5, 7), dtype, seed + 2)
    x64, w64, g64 = map(oracle.lift, (x, w, g))
    return (x, w, g), {"y": x64 @ w64.T, "dx": g64 @ w64, "dw": g64.T @ x64}


def adjoint(case: tuple[Tensor, ...], out: dict[str, Array], order: int) -> Verdict:
    tensors = {k: tensor(v, case[0].dtype) for k, v in out.items()}
    return judges.adjoint(case[0], case[1], case[2], tensors, order, bounds.U32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(seed=st.integers(0, 2**16), order=st.sampled_from([1, 8, 128, 12, 28]))
def test_adjoint_holds(seed: int, order: int, dtype: torch.dtype) -> None:
    case, out = adjoint_case(order, dtype, seed)
    adjoint(case, out, order).require()
    low = {k: tensor(v.astype(F32), dtype).double().numpy() for k, v in out.items()}
    adjoint(case, low, order).require()


@pytest.mark.parametrize("order", [12, 28])
@pytest.mark.parametrize("name", ["dx", "dw"])
def test_adjoint_bites(order: int, name: str) -> None:
    for seed in range(5):
        case, out = adjoint_case(order, torch.float32, seed)
        for wrong in (
            hadamard.apply(out[name], order),
            hadamard.apply_transpose(out[name], order),
            -out[name],
            out[name][:, ::-1],
            out[name] * math.nan,
        ):
            with pytest.raises(Rejected, match=rf"^adjoint: .*<{name}, v>"):
                adjoint(case, out | {name: wrong}, order).require()


# --- outputs that do not follow their input ---------------------------------------------------


class Scripted(lanes.Lane):
    """A lane that writes what it is told to: write(stage, first tensor)."""

    def __init__(self, write: Callable[[str, Tensor], dict[str, Tensor]]) -> None:
        super().__init__("scripted", "cpu", "eager")
        object.__setattr__(self, "write", write)

    def call(self, stage: str, *tensors: Tensor, **static: Any) -> dict[str, Tensor]:
        return self.write(stage, tensors[0])


def deaf(honest: Tensor, other: Tensor) -> Iterator[Tensor]:
    """Constants of many values, and what was right for another input."""
    assert honest.unique().numel() > 1
    # Every code, byte and truth value that occurs; of floats an entry, their mean, 0, 1 and NaN.
    values = honest.unique().tolist()
    if honest.is_floating_point():
        values = [values[0], float(honest.double().mean()), 0.0, 1.0, math.nan]
    yield from (torch.full_like(honest, v) for v in values)
    assert not torch.equal(honest, other)
    yield other


def written(x: Tensor, q: quest.Quantizer) -> dict[str, dict[str, Tensor]]:
    """What an honest lane writes in the three stages of a sparse quantizer, and more."""
    out = run(x, q, HONEST)
    keep = torch.from_numpy(pack_bits(out["keep"].numpy(), 1))
    return {
        "quantize": out | {"codes": out["codes"].to(q.code_dtype)},
        "pack": out | {"codes": out["packed"], "mask": out["bits"], "keep": keep},
        "fake_quantize": out | {"mask": out["bits"]},
    }


# Stage, output, and the judge that must notice.
HEARD = (
    ("quantize", "codes", "codes"),
    ("quantize", "scale", "scale"),
    ("quantize", "mask", "mask"),
    ("quantize", "keep", "selection"),
    ("pack", "codes", "packed codes"),
    ("pack", "scale", "packed scale"),
    ("pack", "mask", "packed mask"),
    ("pack", "keep", "packed keep"),
    ("fake_quantize", "values", "values"),
    ("fake_quantize", "mask", "values' mask"),
)


@pytest.mark.parametrize(
    ("grid", "sparsity"), [(UNIFORM[1], NM24), (UNIFORM[4], PAIRS), (quest.grids.e2m1(), NM24)]
)
def test_quantizer_that_does_not_hear_its_input(grid: Any, sparsity: Any) -> None:
    """Every element has a bound on both sides, so "not constant" needs no judge of its own."""
    q = Q(grid, quest.Hadamard(16), quest.Clip(0.6), sparsity)
    x, another = (inputs.draw("heavy", (8, 48), torch.float32, seed) for seed in (0, 1))
    honest, other = written(x, q), written(another, q)
    assert not failing(examine.quantizer(Scripted(lambda at, _: honest[at]), x, q))
    for stage, name, judge_ in HEARD:
        for wrong in deaf(honest[stage][name], other[stage][name]):
            out = honest | {stage: honest[stage] | {name: wrong}}
            found = examine.quantizer(Scripted(lambda at, _, out=out: out[at]), x, q)
            assert judge_ in failing(found), (stage, name, wrong)


def test_pruned_codes_have_a_verdict_of_their_own() -> None:
    q = Q(UNIFORM[4], quest.Hadamard(16), quest.Clip(0.6), NM24)
    x = inputs.draw("heavy", (8, 48), torch.float32, 0)
    honest = written(x, q)
    codes = torch.where(honest["quantize"]["keep"], honest["quantize"]["codes"], 1)
    out = honest | {"quantize": honest["quantize"] | {"codes": codes.to(torch.int8)}}
    assert "pruned codes" in failing(examine.quantizer(Scripted(lambda at, _: out[at]), x, q))


def test_a_transform_in_another_dtype_is_refused() -> None:
    # By its values alone it would be more than good enough.
    x = inputs.draw("gaussian", (8, 48), torch.bfloat16, 0)
    y = tensor(hadamard.apply(oracle.lift(x), 16), torch.float32)
    assert failing(examine.transform(Scripted(lambda *_: {"y": y}), x, 16)) == {"transform"}


@pytest.mark.parametrize("name", ["w1a1", "w4a4", "w8a8", "w4a4-2:4"])
def test_operand_and_product_that_do_not_hear_their_input(name: str) -> None:
    made = quest.recipe(name, estimator=quest.Clip(0.6))  # which masks some
    q = made.weight
    kinds = operands.kinds(made.activation, q)
    assert kinds is not None
    packs = operands.saved(q, kinds[1]).kind in operands.PACKED
    static = {"q": q, "kind": kinds[1], "width": 48, "dtype": torch.float32}
    cpu = lanes.all_lanes()[0]

    def honest_of(x: Tensor, w: Tensor) -> dict[str, dict[str, Tensor]]:
        a = cpu.call("encode", x, q=made.activation, kind=kinds[0])
        b = cpu.call("encode", w, q=q, kind=kinds[1])
        names = ",".join(p.require_grid().name for p in (made.activation, q))
        vectors = (a["scale"], b["scale"], a["sums"], b["sums"])
        return {
            "quantize": cpu.call("quantize", w, q=q),
            "encode": b,
            "decode": cpu.call("decode", b["operand"], b["scale"], **static),
            "left": a,
            "pack_operand": cpu.call("pack_operand", b["operand"], q=q) if packs else {},
            "compress": cpu.call("compress", b["operand"]) if q.sparsity else {},
            "accumulate": cpu.call("accumulate", a["operand"], b["operand"]),
            "product": cpu.call("product", a["operand"], b["operand"], *vectors, grids=names,
                                kinds=",".join(kinds), width=48, dtype=torch.float32),
        }  # fmt: skip

    x, w, x2, w2 = (inputs.draw("heavy", (8, 48), torch.float32, seed) for seed in range(4))
    honest, other = honest_of(x, w), honest_of(x2, w2)
    for stage, output, judge_ in (
        ("encode", "operand", "operand"),
        ("encode", "scale", "operand scale"),
        ("encode", "mask", "operand mask"),
        ("encode", "sums", "operand sums"),
        ("decode", "values", "values"),
        *([("pack_operand", "packed", "packed codes")] if packs else []),
        ("accumulate", "accumulators", "accumulators"),
        ("product", "y", "product"),
    ):
        for wrong in (honest[stage][output], *deaf(honest[stage][output], other[stage][output])):
            out = honest | {stage: honest[stage] | {output: wrong}}

            def write(at: str, t: Tensor, out: dict[str, dict[str, Tensor]] = out) -> Any:
                return out["left" if at == "encode" and t is x else at]

            lane = Scripted(write)
            found = (
                examine.encoded(lane, w, q, kinds[1])
                if stage in ("encode", "decode", "pack_operand")
                else examine.product(lane, x, w, None, made, torch.float32)
            )
            good = wrong is honest[stage][output]
            assert (judge_ not in failing(found)) == good, (stage, output, wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotation_that_does_not_hear_its_input(dtype: torch.dtype) -> None:
    x, another = (inputs.draw("gaussian", (8, 48), dtype, seed) for seed in (0, 1))
    honest, other = (tensor(hadamard.apply(oracle.lift(t), 16), dtype) for t in (x, another))
    assert not failing(examine.transform(Scripted(lambda *_: {"y": honest}), x, 16))
    for wrong in deaf(honest, other):
        found = examine.transform(Scripted(lambda *_, y=wrong: {"y": y}), x, 16)
        assert failing(found) == {"transform"}, wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backward_that_does_not_hear_its_input(dtype: torch.dtype) -> None:
    (grad, flags, mask), (grad2, flags2, _) = (transposed_case(16, seed, dtype) for seed in (0, 1))
    honest, other = (
        tensor(hadamard.apply_transpose(oracle.lift(g) * m, 16), dtype)
        for g, m in ((grad, flags), (grad2, flags2))
    )
    assert not failing(examine.backward(Scripted(lambda *_: {"dx": honest}), grad, mask, 16))
    for wrong in deaf(honest, other):
        found = examine.backward(Scripted(lambda *_, dx=wrong: {"dx": dx}), grad, mask, 16)
        assert failing(found) == {"backward"}, wrong


@pytest.mark.parametrize("name", ["y", "dx", "dw", "db", "x_hat", "w_hat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", ["w4a4", "w1a1"])
def test_layer_that_does_not_hear_its_input(recipe: str, dtype: torch.dtype, name: str) -> None:
    c, c2 = (layer_case(recipe, 12, dtype, True, seed) for seed in (0, 1))
    honest, other = (
        {k: tensor(v, dtype) for k, v in gradients(each).items()}
        | {"x_hat": each.x_out["values"], "w_hat": each.w_out["values"]}
        for each in (c, c2)
    )

    def failing_with(out: dict[str, Tensor]) -> set[str]:
        def write(stage: str, t: Tensor) -> dict[str, Tensor]:
            return out if stage == "linear" else c.x_out if t.shape == c.x.shape else c.w_out

        return failing(examine.layer(Scripted(write), c.x, c.w, c.grad, c.bias, c.recipe))

    assert not failing_with(honest)
    for wrong in deaf(honest[name], other[name]):
        assert f"layer {name}" in failing_with(honest | {name: wrong}), wrong


# --- the gate before a quantizer --------------------------------------------------------------


def swish(g: Array) -> Array:
    with np.errstate(over="ignore"):
        return g / (1 + np.exp(-g))


def rounded(a: Array, dtype: torch.dtype) -> Array:
    return tensor(a, dtype).double().numpy()


def gates(dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    gate = inputs.draw("heavy", (8, 256), dtype, seed) * 4
    return gate, inputs.draw("gaussian", (8, 256), dtype, seed + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(seed=SEEDS)
def test_gated_holds(dtype: torch.dtype, seed: int) -> None:
    gate, value = gates(dtype, seed % 2**31)
    g, v = oracle.lift(gate), oracle.lift(value)
    single = gate.float()
    in_float32 = (single / (1 + (-single).exp()) * value.float()).double().numpy()
    for x in (swish(g) * v, in_float32, v * (g * np.exp(-np.logaddexp(0, -g)))):
        judges.gated(gate, value, tensor(x, dtype)).require()
    between = tensor(rounded(swish(g), dtype) * v, dtype)
    judges.gated(gate, value, between, dtype).require()


def test_gated_of_what_is_not_finite() -> None:
    """Infinite or NaN, as it comes, but not finite; and a product beyond the range is infinite."""
    inf, nan = math.inf, math.nan
    gate = torch.tensor([[inf, -inf, nan, 1.0, -120.0, 3e38, 3e38, 1.0]])
    value = torch.tensor([[1.0, 1.0, 1.0, -inf, inf, 3e38, -3e38, 1.0]])
    x = torch.tensor([[inf, nan, nan, -inf, -inf, inf, -inf, 1 / (1 + math.exp(-1))]])
    judges.gated(gate, value, x).require()
    judges.gated(gate, value, torch.where(x.isfinite() | (gate == 3e38), x, nan)).require()
    for at in range(8):
        wrong = x.clone()
        wrong[0, at] = 0.0
        with pytest.raises(Rejected, match=r"^gated: at \(0, "):
            judges.gated(gate, value, wrong).require()
    wrong = x.clone()
    wrong[0, 5] = -inf
    with pytest.raises(Rejected, match=r"^gated"):
        judges.gated(gate, value, wrong).require()


GATE_FAULTS: dict[str, Callable[[Array, Array], Array]] = {
    "the sigmoid alone": lambda g, v: swish(g) / g * v,
    "gelu": lambda g, v: g * 0.5 * (1 + np.tanh(0.79788456 * (g + 0.044715 * g**3))) * v,
    "gelu by a sigmoid": lambda g, v: g / (1 + np.exp(-1.702 * g)) * v,
    "relu": lambda g, v: np.maximum(g, 0) * v,
    "gate and value swapped": lambda g, v: swish(v) * g,
    "exp of the gate, not of its negative": lambda g, v: g / (1 + np.exp(g)) * v,
    "a power of two for exp": lambda g, v: g / (1 + np.exp2(-g)) * v,
    "log2(e) in bfloat16": lambda g, v: g / (1 + np.exp2(-1.4453125 * g)) * v,
    "the value left out": lambda g, v: swish(g),
    "silu of the product": lambda g, v: swish(g * v),
    "the next value": lambda g, v: swish(g) * np.roll(v, 1, -1),
    "values of the next row": lambda g, v: swish(g) * np.roll(v, 1, 0),
    "the last block's gate is 0": lambda g, v: np.where(np.arange(256) < 128, swish(g) * v, 0.0),
    "tanh with 11 bits": lambda g, v: g / 2 * (1 + np.tanh(g / 2) * (1 + 2.0**-9)) * v,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", GATE_FAULTS)
def test_gated_bites(name: str, dtype: torch.dtype) -> None:
    gate, value = gates(dtype, 0)
    with np.errstate(over="ignore", invalid="ignore"):
        x = GATE_FAULTS[name](oracle.lift(gate), oracle.lift(value))
    with pytest.raises(Rejected, match=r"^gated: at \(\d, \d+\) it is"):
        judges.gated(gate, value, tensor(x, dtype)).require()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gated_bites_what_is_rounded_twice(dtype: torch.dtype) -> None:
    gate, value = gates(dtype, 0)
    g, v = oracle.lift(gate), oracle.lift(value)
    twice = tensor(rounded(swish(g), dtype) * v, dtype)
    judges.gated(gate, value, twice, dtype).require()
    with pytest.raises(Rejected, match=r"^gated"):
        judges.gated(gate, value, twice).require()
    truncated = tensor(np.nextafter((swish(g) * v).astype(F32), F32(0)), dtype)
    judges.gated(gate, value, truncated).require()
    bits = {torch.bfloat16: 16, torch.float16: 13}[dtype]
    cut = (swish(g) * v).astype(F32).view(np.int32) >> bits << bits
    with pytest.raises(Rejected, match=r"^gated"):
        judges.gated(gate, value, tensor(cut.view(F32), dtype)).require()


def steep(g: Array) -> Array:
    """The slope of silu."""
    with np.errstate(over="ignore"):
        s = 1 / (1 + np.exp(-g))
    return s * (1 + g * (1 - s))


def slopes(dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return inputs.draw("gaussian", (8, 256), dtype, seed + 2), *gates(dtype, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(seed=SEEDS)
def test_gradients_of_a_gate_hold(dtype: torch.dtype, seed: int) -> None:
    given_ = slopes(dtype, seed % 2**31)
    d, g, v = map(oracle.lift, given_)
    single = given_[1].float()
    s = single.sigmoid()
    in_float32 = s * (1 + single * (1 - s)) * given_[0].float() * given_[2].float()
    to_value = tensor(d * swish(g), dtype)
    for to_gate in (tensor(d * v * steep(g), dtype), in_float32.to(dtype)):
        for verdict in judges.gated_backward(*given_, to_gate, to_value):
            verdict.require()


def test_gradients_of_a_gate_that_are_not_finite() -> None:
    inf, nan = math.inf, math.nan
    gate = torch.tensor([[inf, -inf, nan, 1.0, 1.0, 20.0, 1.0]])
    value = torch.tensor([[1.0, 1.0, 1.0, -inf, 1.0, 3e38, 1.0]])
    grad = torch.tensor([[1.0, 1.0, 1.0, 1.0, inf, 3e38, 1.0]])
    right = torch.tensor([[nan, nan, nan, -inf, inf, inf, float(steep(np.ones(1))[0])]])
    to_value = torch.tensor([[inf, nan, nan, 0.7310586, inf, inf, 0.7310586]])
    for at in range(7):
        for verdict in judges.gated_backward(grad, gate, value, right, to_value):
            verdict.require()
        wrong = right.clone()
        wrong[0, at] = 0.0
        with pytest.raises(Rejected, match=r"^gradient of the gate: at \(0, "):
            judges.gated_backward(grad, gate, value, wrong, to_value)[0].require()
    for far in (inf, nan):  # where all inputs are finite, and their product
        wrong = right.clone()
        wrong[0, 6] = far
        with pytest.raises(Rejected, match=r"^gradient of the gate: at \(0, 6\)"):
            judges.gated_backward(grad, gate, value, wrong, to_value)[0].require()


GRADIENT_FAULTS: dict[str, Callable[[Array, Array, Array], tuple[Array, Array]]] = {
    "the sigmoid for the slope": lambda d, g, v: (d * v / (1 + np.exp(-g)), d * swish(g)),
    "the slope of the sigmoid": lambda d, g, v: (
        d * v * np.exp(-np.abs(g)) / (1 + np.exp(-np.abs(g))) ** 2,
        d * swish(g),
    ),
    "the second term has another sign": lambda d, g, v: (
        d * v * (2 / (1 + np.exp(-g)) - steep(g)),
        d * swish(g),
    ),
    "the value is left out": lambda d, g, v: (d * steep(g), d * swish(g)),
    "the gradient is left out": lambda d, g, v: (v * steep(g), d * swish(g)),
    "both swapped": lambda d, g, v: (d * swish(g), d * v * steep(g)),
    "the value's is the gate's": lambda d, g, v: (d * v * steep(g), d * g),
    "the value's of the value": lambda d, g, v: (d * v * steep(g), d * swish(v)),
    "the next row's value": lambda d, g, v: (d * np.roll(v, 1, 0) * steep(g), d * swish(g)),
    "silu of the next column": lambda d, g, v: (d * v * steep(g), d * swish(np.roll(g, 1, -1))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", GRADIENT_FAULTS)
def test_gradients_of_a_gate_bite(name: str, dtype: torch.dtype) -> None:
    given_ = slopes(dtype, 0)
    with np.errstate(over="ignore"):
        made = [tensor(t, dtype) for t in GRADIENT_FAULTS[name](*map(oracle.lift, given_))]
    found = judges.gated_backward(*given_, *made)
    assert any(verdict.failure for verdict in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_a_gate_are_rounded_once(dtype: torch.dtype) -> None:
    given_ = slopes(dtype, 0)
    d, g, v = map(oracle.lift, given_)
    twice = tensor(rounded(d * v, dtype) * steep(g), dtype), tensor(d * swish(g), dtype)
    assert judges.gated_backward(*given_, *twice)[0].failure
    stored = tensor(d * v * steep(g), dtype), tensor(d * rounded(swish(g), dtype), dtype)
    assert judges.gated_backward(*given_, *stored)[1].failure


def test_a_fifth_over_the_bound_of_a_gates_gradient_is_too_far() -> None:
    grad, gate, value = slopes(torch.float32, 3)
    d, g, v = map(oracle.lift, (grad, gate, value))
    u, s = 2.0**-24, 1 / (1 + np.exp(-g))
    a = (2 * np.abs(g) + 4) * u * (1 - s) + 3 * u
    slope = np.abs(1 + g * (1 - s))
    error = np.abs(g) * (s * a + 2 * u * (1 - s)) + u * slope
    exact = d * v * steep(g)
    bound = np.abs(d * v) * s * (a * slope + error) + 4 * u * np.abs(exact)
    to_value = tensor(d * swish(g))
    judges.gated_backward(grad, gate, value, tensor(exact + 0.8 * bound), to_value)[0].require()
    with pytest.raises(Rejected, match=r"^gradient of the gate"):
        judges.gated_backward(grad, gate, value, tensor(exact + 1.2 * bound), to_value)[0].require()


def test_a_fifth_over_the_gates_bound_is_too_far() -> None:
    gate, value = gates(torch.float32, 3)
    g, v = oracle.lift(gate), oracle.lift(value)
    exact = swish(g) * v
    sigmoid = 1 / (1 + np.exp(-g))
    u = 2.0**-24
    bound = np.abs(exact) * ((2 * np.abs(g) + 4) * u * (1 - sigmoid) + 5 * u + u)
    judges.gated(gate, value, tensor(exact + 0.8 * bound)).require()
    with pytest.raises(Rejected, match=r"^gated"):
        judges.gated(gate, value, tensor(exact + 1.2 * bound)).require()


@pytest.mark.parametrize("name", ["w1a1", "w4a4", "w8a8", "w1.58a1.58"])
def test_gated_operand_that_is_wrong(name: str) -> None:
    """Each output by itself, what belongs to other inputs, and x that is not what was quantized."""
    q = quest.recipe(name).activation
    kind = (operands.kinds(q, q) or ("",))[0]
    cpu = lanes.all_lanes()[0]
    gate, value = gates(torch.bfloat16, 0)
    honest = cpu.call("gated", gate, value, q=q, kind=kind)
    other = cpu.call("gated", value, gate, q=q, kind=kind)

    def failing_with(**wrong: Tensor) -> set[str]:
        lane = Scripted(lambda *_: honest | wrong)
        return failing(examine.gated(lane, gate, value, q, kind))

    assert not failing_with()
    assert failing_with(operand=honest["operand"][:, :-1]) == {"gated operand"}
    assert failing_with(scale=honest["scale"][:, 0]) == {"gated scale"}
    assert failing_with(sums=honest["sums"].long()) == {"gated sums"}
    assert failing_with(x=honest["x"].float()) == {"gated"}
    assert "gated codes" in failing_with(operand=other["operand"])
    assert "gated scale" in failing_with(scale=other["scale"])
    assert failing_with(sums=other["sums"]) == {"gated sums"}
    assert failing_with(sums=honest["sums"] + 2) == {"gated sums"}
    # Of silu in 16 bits: right by itself, and not once.
    twice = torch.nn.functional.silu(gate) * value
    assert failing_with(**(cpu.call("encode", twice, q=q, kind=kind) | {"x": twice})) == {"gated"}
    # The operand is of another x than the one that is shown.
    found = failing_with(**cpu.call("encode", value, q=q, kind=kind))
    assert {"gated scale", "gated codes"} <= found
    form, even = operands.form_of(q, kind), q.require_grid().levels % 2 == 0
    turned = honest["operand"].clone()
    if kind == "integers":  # to a neighbour
        turned[3, 5] += (-1 if turned[3, 5] > 0 else 1) * form.spread * (1 + even)
    else:  # or one further off
        turned[3, 5] ^= 127 if kind == "bits" else 2
    assert "gated codes" in failing_with(operand=turned)
    if kind == "integers":
        for by in (1, form.spread)[: 1 + even]:  # between two, and the even multiple
            apart = honest["operand"] - by * honest["operand"].sign()
            assert failing_with(operand=apart) == {"gated operand"}


def normal(h: Array, w: Array, eps: float = 1e-5) -> Array:
    return h / np.sqrt(np.mean(h**2, -1, keepdims=True) + eps) * w


def norms_case(dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    h = inputs.draw("heavy", (8, 256), dtype, seed) * 4
    return h, inputs.draw("gaussian", (256,), dtype, seed + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(seed=SEEDS)
def test_normed_holds(dtype: torch.dtype, seed: int) -> None:
    h, weight = norms_case(dtype, seed % 2**31)
    h64, w = oracle.lift(h), oracle.lift(weight)
    sigma = np.sqrt((h64**2).mean(-1, keepdims=True) + 1e-5)
    single = torch.nn.functional.rms_norm(h.float(), (256,), weight.float(), 1e-5)
    for x in (normal(h64, w), h64 * (w / sigma), single.double().numpy()):
        judges.normed(h, weight, 1e-5, tensor(x, dtype)).require()
    between = tensor(rounded(h64 / sigma, dtype) * w, dtype)
    judges.normed(h, weight, 1e-5, between, dtype).require()


def test_normed_of_what_is_not_finite() -> None:
    inf, nan = math.inf, math.nan
    h = torch.tensor([[1.0, inf], [nan, 1.0], [3e38, 1.0], [3.0, -4.0]])
    weight = torch.ones(2)
    right = tensor(normal(oracle.lift(h[3:]), np.ones(2)))
    x = torch.cat((torch.tensor([[0.0, nan], [nan, nan], [0.0, 0.0]]), right))
    judges.normed(h, weight, 1e-5, x).require()
    # Where squares overflow, what is right by a wider sum is right, too; and all else is not.
    wide = x.clone()
    wide[2] = torch.tensor([math.sqrt(2), math.sqrt(2) / 3e38])
    judges.normed(h, weight, 1e-5, wide).require()
    for row, column, value in ((0, 1, 1.0), (1, 0, 0.0), (1, 1, 1.0), (2, 0, 1.0), (3, 0, 0.0)):
        wrong = wide.clone()
        wrong[row, column] = value
        with pytest.raises(Rejected, match=rf"^normed: at \({row}, {column}\)"):
            judges.normed(h, weight, 1e-5, wrong).require()
    # A row has one sum, which overflows for all of it or for none.
    part = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    with pytest.raises(Rejected, match=r"^normed: at \(0, 1\)"):
        judges.normed(torch.full((1, 4), 3e38), torch.ones(4), 1e-5, part).require()
    # And nothing is 0 where squares do not overflow.
    with pytest.raises(Rejected, match=r"^normed: at \(0, "):
        judges.normed(h[3:], weight, 1e-5, torch.zeros(1, 2)).require()


NORM_FAULTS: dict[str, Callable[[Array, Array], Array]] = {
    "the mean is taken off": lambda h, w: normal(h - h.mean(-1, keepdims=True), w),
    "the sum for the mean": lambda h, w: normal(h, w) / 16,
    "divided by d - 1": lambda h, w: normal(h, w) * math.sqrt(255 / 256),
    "no root": lambda h, w: h / (np.mean(h**2, -1, keepdims=True) + 1e-5) * w,
    "the weight left out": lambda h, w: normal(h, np.ones(256)),
    "1 + weight": lambda h, w: normal(h, 1 + w),
    "the weight of the first block for all": lambda h, w: normal(h, np.tile(w[:128], 2)),
    "the next weight": lambda h, w: normal(h, np.roll(w, 1)),
    "the row before's scale": lambda h, w: h * np.roll(normal(h, w) / h, 1, 0),
    "the first block's squares alone": lambda h, w: (
        h / np.sqrt(np.mean(h[:, :128] ** 2, -1, keepdims=True) + 1e-5) * w
    ),
    "the last column is not counted": lambda h, w: (
        h / np.sqrt((h[:, :-1] ** 2).sum(-1, keepdims=True) / 256 + 1e-5) * w
    ),
    "not normalised": lambda h, w: h * w,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NORM_FAULTS)
def test_normed_bites(name: str, dtype: torch.dtype) -> None:
    h, weight = norms_case(dtype, 0)
    h = torch.where(h == 0, 1.0, h)
    # The last column weighs enough to be missed.
    h[:, -1] = h.abs().amax(-1)
    x = NORM_FAULTS[name](oracle.lift(h), oracle.lift(weight))
    with pytest.raises(Rejected, match=r"^normed: at \(\d, \d+\) it is"):
        judges.normed(h, weight, 1e-5, tensor(x, dtype)).require()


@pytest.mark.parametrize("eps", [1e-6, 1e-4])
def test_another_eps(eps: float) -> None:
    h, weight = norms_case(torch.bfloat16, 0)
    h = (h * 2.0**-8).bfloat16()
    x = tensor(normal(oracle.lift(h), oracle.lift(weight), eps), torch.bfloat16)
    judges.normed(h, weight, eps, x).require()
    with pytest.raises(Rejected, match=r"^normed"):
        judges.normed(h, weight, 1e-5, x).require()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_normed_bites_what_is_rounded_twice(dtype: torch.dtype) -> None:
    h, weight = norms_case(dtype, 0)
    h64, w = oracle.lift(h), oracle.lift(weight)
    twice = tensor(rounded(normal(h64, np.ones(256)), dtype) * w, dtype)
    judges.normed(h, weight, 1e-5, twice, dtype).require()
    with pytest.raises(Rejected, match=r"^normed"):
        judges.normed(h, weight, 1e-5, twice).require()


def test_a_fifth_over_the_norms_bound_is_too_far() -> None:
    h, weight = norms_case(torch.float32, 3)
    exact, u = normal(oracle.lift(h), oracle.lift(weight)), 2.0**-24
    bound = np.abs(exact) * ((256 + 4) / 2 + 6 + 1) * u
    judges.normed(h, weight, 1e-5, tensor(exact + 0.8 * bound)).require()
    with pytest.raises(Rejected, match=r"^normed"):
        judges.normed(h, weight, 1e-5, tensor(exact + 1.2 * bound)).require()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_added_holds_and_bites(dtype: torch.dtype) -> None:
    x, residual = (inputs.draw(n, (64, 64), dtype, 0) for n in ("heavy", "non_finite"))
    h = residual + x
    judges.added(x, residual, h).require()
    # Beyond the range, and once more through float64.
    top = torch.full((1, 1), torch.finfo(dtype).max, dtype=dtype)
    judges.added(top, top, top + top).require()
    up = torch.nextafter(h, torch.full_like(h, math.inf))
    for wrong in (residual - x, x, up, torch.where(h.isnan(), 0.0, h)):
        with pytest.raises(Rejected, match=r"^added"):
            judges.added(x, residual, wrong).require()


@pytest.mark.parametrize("name", ["w1a1", "w4a4", "w8a8"])
@pytest.mark.parametrize("adds", [False, True])
def test_normed_operand_that_is_wrong(adds: bool, name: str) -> None:
    """Each output by itself, and rows of other inputs."""
    q = quest.recipe(name).activation
    kind = (operands.kinds(q, q) or ("",))[0]
    cpu = lanes.all_lanes()[0]
    x, weight = norms_case(torch.bfloat16, 0)
    residual = inputs.draw("gaussian", (8, 256), torch.bfloat16, 5)
    extra = (residual,) if adds else ()
    static = {"q": q, "kind": kind, "eps": 1e-5}
    honest = cpu.call("normed", x, weight, *extra, **static)
    other = cpu.call("normed", residual, weight, *extra, **static)

    def failing_with(**wrong: Tensor) -> set[str]:
        lane = Scripted(lambda *_: honest | wrong)
        given = residual if adds else None
        return failing(examine.normed(lane, x, given, weight, 1e-5, q, kind))

    assert not failing_with()
    assert failing_with(operand=honest["operand"][:, :-1]) == {"normed operand"}
    assert failing_with(x=honest["x"].float()) == {"normed"}
    assert failing_with(h=x[:1]) == {"added"}
    assert "normed codes" in failing_with(operand=other["operand"])
    assert "normed scale" in failing_with(scale=other["scale"] * 1.001)
    assert failing_with(sums=honest["sums"] + 2) == {"normed sums"}
    if adds:
        assert {"added", "normed"} <= failing_with(h=x)
    encoded = {k: other[k] for k in ("operand", "scale", "sums")}
    assert "normed" in failing_with(**encoded, x=other["x"])


def test_what_is_not_shown_must_be_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, value = gates(torch.bfloat16, 0)
    static = {"q": quest.recipe("w4a4").activation, "kind": "integers"}
    f = lanes.operators("dispatch")
    for i in range(3):

        def other(*given: Any, i: int = i) -> list[Tensor]:
            made = list(f.gated_encode_shown(*given)[:3])
            made[i] = made[i] + 1
            return made

        changed = SimpleNamespace(**(vars(f) | {"gated_encode": other}))
        with monkeypatch.context() as patch:
            patch.setattr(lanes, "operators", lambda _, changed=changed: changed)
            with pytest.raises(lanes.GuardError, match="is another where the rows"):
                lanes.all_lanes()[0].call("gated", gate, value, **static)


# --- what guards every call of a lane ---------------------------------------------------------

FAKE = lanes.Lane("fake", "cpu", "eager")
LAID = inputs.equal_rows(inputs.draw("gaussian", (3, 4), torch.float32, 0))


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Puts a function in place of a lane's stage and calls it, guarded."""

    def call(function: Callable[[Tensor], Tensor], x: Tensor, lane: lanes.Lane = FAKE) -> Any:
        monkeypatch.setitem(lanes._STAGES, "hadamard", lambda _, t: {"y": function(t)})
        return lane.call("hadamard", x)

    return call


def filled(x: Tensor, count: int) -> Tensor:
    """An output from the launchers' allocator with its first `count` elements written."""
    out = outputs.empty(x.shape, x.dtype, x.device)
    out.view(-1)[:count] = 1.0
    return out


def test_guard_passes_a_clean_lane(stage: Callable[..., Any]) -> None:
    x = inputs.lay_out(inputs.draw("gaussian", (3, 5), torch.float32, 0), "padded")
    y = stage(lambda t: t * 2, x)["y"]
    assert torch.equal(y, x * 2)
    assert torch.equal(stage(lambda t: filled(t, 15), x)["y"], torch.ones(3, 5))
    nan = stage(lambda t: t * math.nan, x)["y"]
    assert nan.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int32])
@pytest.mark.parametrize("missing", [1, 2, 15])
def test_guard_sees_an_unwritten_tail(
    stage: Callable[..., Any], dtype: torch.dtype, missing: int
) -> None:
    x = torch.ones(3, 5, dtype=dtype)
    with pytest.raises(lanes.GuardError, match="y differs between two runs"):
        stage(lambda t: filled(t, 15 - missing), x)


def whole(t: Tensor) -> Tensor:
    """All of a tensor's storage, gaps and margins included."""
    return torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())


@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_guard_sees_a_changed_input(stage: Callable[..., Any], layout: str) -> None:
    x = inputs.lay_out(LAID, layout)
    with pytest.raises(lanes.GuardError, match="input 0 was changed"):
        stage(lambda t: whole(t).mul_(2), x)
    before = x.clone()
    with pytest.raises(lanes.GuardError, match="input 0 was changed"):
        stage(lambda t: whole(t).neg_().neg_().add_(1) * 1, x)
    assert torch.equal(x, before), "a lane works on copies"


@pytest.mark.parametrize("layout", ["offset", "padded", "strided", "expanded"])
@pytest.mark.parametrize("gap", [0, -1])
def test_guard_sees_a_write_into_a_gap(stage: Callable[..., Any], layout: str, gap: int) -> None:
    x = inputs.lay_out(LAID, layout)

    def spill(t: Tensor) -> Tensor:
        flat = whole(t)
        flat[flat.isnan().nonzero()[gap]] = 1.0
        return t * 1

    with pytest.raises(lanes.GuardError, match="input 0 was changed"):
        stage(spill, x)


def test_guard_sees_what_is_not_deterministic(stage: Callable[..., Any]) -> None:
    calls = iter(range(10))
    with pytest.raises(lanes.GuardError, match="not deterministic"):
        stage(lambda t: t + next(calls), torch.ones(3))
    with pytest.raises(lanes.GuardError, match="not deterministic"):
        stage(lambda t: t * torch.rand(3), torch.ones(3))
    sign = iter((1.0, -1.0))
    with pytest.raises(lanes.GuardError, match="not deterministic"):
        stage(lambda t: t * 0 * next(sign), torch.ones(3))  # 0 and -0


def test_guard_sees_another_device(stage: Callable[..., Any]) -> None:
    with pytest.raises(lanes.GuardError, match="y is on meta, not cpu"):
        stage(lambda t: t.to("meta"), torch.ones(3))
    if torch.cuda.is_available():
        with pytest.raises(lanes.GuardError, match="y is on cpu, not cuda"):
            stage(lambda t: t.cpu(), torch.ones(3), lanes.Lane("fake", "cuda", "eager"))


def test_guard_passes_on_what_a_stage_raises(stage: Callable[..., Any]) -> None:
    def broken(t: Tensor) -> Tensor:
        raise ZeroDivisionError("the lane's own")

    with pytest.raises(ZeroDivisionError, match="own"):
        stage(broken, torch.ones(3))
    # The allocator is back to normal.
    assert outputs._poison is None


def test_poison_fills_every_byte() -> None:
    with outputs.poisoned(0xFF):
        assert outputs.empty((3,), torch.float32, torch.device("cpu")).isnan().all()
        assert (outputs.empty((3,), torch.int8, torch.device("cpu")) == -1).all()
        with outputs.poisoned(0x55):
            assert (outputs.empty((3,), torch.uint8, torch.device("cpu")) == 0x55).all()
        assert outputs.empty((3,), torch.bfloat16, torch.device("cpu")).isnan().all()
    with pytest.raises(ValueError, match=r"byte must be in 0\.\.255, got 256"), \
            outputs.poisoned(256):  # fmt: skip
        pass


@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_transfer_and_pipe_keep_strides_offset_and_gaps(layout: str) -> None:
    x = inputs.lay_out(LAID, layout)
    pipe = io.BytesIO()
    lanes.send(pipe, x)
    pipe.seek(0)
    for y in (lanes.transfer(x, "cpu"), lanes.receive(pipe)):
        assert (y.stride(), y.storage_offset()) == (x.stride(), x.storage_offset())
        assert lanes._bytes(y) == lanes._bytes(x)
        assert y.data_ptr() != x.data_ptr()
