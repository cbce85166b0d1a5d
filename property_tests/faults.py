"""Wrong parts of an honest pipeline that several files plant: a transform, codes, a mask."""

from __future__ import annotations

import math

import numpy as np
import torch

import quest
from property_tests.honest import (
    Array,
    Q,
    butterfly,
    by_matrix,
    decode,
    encode,
    grid_of,
    sign_matrix,
    tensor,
)
from quest.reference import hadamard


def sequency(order: int) -> Array:
    """Walsh order: rows sorted by their number of sign changes."""
    h = sign_matrix(order)
    return h[np.argsort((np.diff(h, axis=1) != 0).sum(1), kind="stable")]


def tail_left(x: Array, order: int) -> Array:
    y = hadamard.apply(x, order)
    y[..., -order:] = x[..., -order:]
    return y


def in_bfloat16(x: Array, order: int) -> Array:
    h = tensor(sign_matrix(order) * order**-0.5, torch.bfloat16)
    return by_matrix(h.double().numpy(), x, order)


def rounded_stages(x: Array, order: int) -> Array:
    y = x
    for s in range(int(math.log2(order))):
        y = tensor(butterfly(y, order, [s]), torch.bfloat16).double().numpy()
    return y * order**-0.5


def steps(t: Array, q: quest.Quantizer) -> Array:
    return t / grid_of(q).step


def clipped(t: Array, q: quest.Quantizer) -> Array:
    half = grid_of(q).levels // 2
    return np.clip(t, -half, half - 1).astype(int)


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


def strict(x: Array, y: Array, sigma: Array, codes: Array, keep: Array, q: Q) -> Array:
    """`<` for `<=`."""
    g, e = grid_of(q), q.estimator
    if isinstance(e, quest.Clip):
        return np.abs(y) < e.scale * g.outer * sigma
    if e.scale >= 1:
        return np.abs(y) < (g.outer + e.scale * g.half_gap) * sigma
    return np.abs(decode(codes, keep, q) * sigma - y) < e.scale * g.half_gap * sigma
