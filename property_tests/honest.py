"""An honest quantizer that is not ours, for the judges to pass, and to break.

Nothing here calls production arithmetic: it is a NumPy pipeline of its own, and a fault is the
same pipeline with one part replaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import quest
from quest.conformance import judges, oracle
from quest.conformance.verdict import Verdict
from quest.reference import hadamard

Array = np.ndarray
SEEDS = st.integers(0, 2**32 - 1)
F32 = np.float32
F16, BF16 = torch.float16, torch.bfloat16


def tensor(a: Array, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rounded once, from float64."""
    return torch.from_numpy(np.ascontiguousarray(a)).to(dtype)


def rounded(a: Array, dtype: torch.dtype) -> Array:
    return tensor(a, dtype).double().numpy()


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


# --- the quantizer, stage by stage ------------------------------------------------------------


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


# --- grids, and quantizers on them ------------------------------------------------------------

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
I4, I8 = Q(UNIFORM[4], H128), Q(UNIFORM[8], H128)
