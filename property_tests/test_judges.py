"""The judges of a quantizer hold and bite: each fault of a table is rejected, and by which judges.

A fault names the judges that must reject it, and may add some that are allowed to; every other
judge has to hold, so a fault is laid at the right door. Parts that other files plant, too, are in
`faults`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import quest
from property_tests.faults import clipped, in_bfloat16, rounded_stages, sequency, steps, tail_left
from property_tests.honest import (
    BF16,
    F16,
    GRIDS,
    H12,
    H128,
    HONEST,
    I4,
    I8,
    NM24,
    PAIRS,
    SEEDS,
    UNIFORM,
    WAYS,
    Array,
    Parts,
    Q,
    butterfly,
    by_matrix,
    decode,
    encode,
    failing,
    grid_of,
    judge,
    mask,
    pack,
    pack_bits,
    rms,
    run,
    select,
    select_by,
    storage,
    tensor,
    unsigned,
)
from quest.conformance import inputs
from quest.conformance.verdict import Rejected
from quest.reference import hadamard


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


# --- faults -----------------------------------------------------------------------------------


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


PLAIN4, BIT = Q(UNIFORM[4], quest.Identity()), Q(UNIFORM[1], H128, quest.Clip(1.3))
FP4 = Q(quest.grids.e2m1(), H128)
SPARSE4 = Q(UNIFORM[4], H128, quest.Trust(), NM24)
PAIRS4 = Q(UNIFORM[4], H128, quest.Trust(), PAIRS)
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
