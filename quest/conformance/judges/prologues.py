"""Judges of what is computed around a quantizer and a product: gates and their gradients, sums with
a residual, norms, turned heads."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from quest.conformance import oracle
from quest.conformance.oracle import lift
from quest.conformance.verdict import Verdict
from quest.reference import bounds, prologue

from .basis import close


def gated(gate: Tensor, value: Tensor, x: Tensor, between: torch.dtype | None = None) -> Verdict:
    """T1: x = silu(gate) value, computed in float32 and stored in its dtype.

    between: the dtype that silu is stored in before the product, where it is. Where an input is not
    finite, x is not either; which of infinity and NaN it is depends on the order of the products.
    """
    g, v = lift(gate), lift(value)
    stored = None if between is None else oracle.dtype_name(between)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = prologue.gated(g, v)
        bound = bounds.output(expected, bounds.gated(g, v, stored), oracle.dtype_name(x.dtype))
    return close("gated", x, expected, bound, free=~(np.isfinite(g) & np.isfinite(v)))


def gated_backward(
    grad: Tensor, gate: Tensor, value: Tensor, to_gate: Tensor, to_value: Tensor
) -> list[Verdict]:
    """T1: the gradients of gate and value for that of silu(gate) value, each stored in its dtype.

    As in `gated`, where an input is not finite; nor need the gate's gradient be where the product
    of grad and value leaves float32.
    """
    d, g, v = lift(grad), lift(gate), lift(value)
    with np.errstate(invalid="ignore", over="ignore"):
        expected, _ = prologue.gated_backward(d, g, v)
        bound = bounds.output(
            expected, bounds.gated_backward(d, g, v), oracle.dtype_name(to_gate.dtype)
        )
        finite = np.isfinite(d) & np.isfinite(g) & np.isfinite(v)
        free = ~finite | (np.abs(d * v) >= bounds.LARGEST["float32"])
    return [
        close("gradient of the gate", to_gate, expected, bound, free),
        dataclasses.replace(gated(gate, grad, to_value), stage="gradient of its value"),
    ]


def added(x: Tensor, residual: Tensor, h: Tensor) -> Verdict:
    """T0: h = residual + x, rounded once; of 16 bits, float32 in between changes nothing."""
    expected = lift((residual.double() + x.double()).to(h.dtype))
    return close("added", h, expected, np.zeros(expected.shape))


def turned_heads(y: Tensor, cos: Tensor, sin: Tensor, turned: int, h: Tensor) -> Verdict:
    """T0: h is y (M, N), of its first `turned` columns each head turned in float32, rounded once.

    cos, sin: (T, d_head / 2) float32; row r has the angles of row r % T. No product is contracted.
    """
    rows, half = np.arange(len(y)) % max(1, len(cos)), cos.shape[1]
    expected = y.float().numpy().copy()
    c, s = cos.numpy()[rows], sin.numpy()[rows]
    with np.errstate(invalid="ignore", over="ignore"):
        for first in range(0, turned, 2 * half):
            low, high = (
                expected[:, at : at + half].copy() for at in (first, first + half)
            )  # fmt: skip
            expected[:, first : first + half] = low * c - high * s
            expected[:, first + half : first + 2 * half] = high * c + low * s
    stored = lift(torch.from_numpy(expected).to(h.dtype))
    return close("turned", h, stored, np.zeros(stored.shape))


def normed(
    h: Tensor, weight: Tensor, eps: float, rows: Tensor, between: torch.dtype | None = None
) -> Verdict:
    """T1: rows = (h / sqrt(mean(h^2) + eps)) weight, computed in float32 and stored in their dtype.

    between: the dtype that is stored in before the weight, where it is. A row of h that is not
    finite may hold any infinity and NaN; where squares leave float32, it may be 0 as a whole.
    """
    h64, w64 = lift(h), lift(weight)
    stored = None if between is None else oracle.dtype_name(between)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = prologue.normed(h64, w64, eps)
        bound = bounds.output(
            expected, bounds.normed(h64, w64, eps, stored), oracle.dtype_name(rows.dtype)
        )
    zero = bounds.squares_overflow(h64) & (lift(rows) == 0).all(-1, keepdims=True)
    free = np.broadcast_to(~np.isfinite(h64).all(-1, keepdims=True), h64.shape)
    return close("normed", rows, np.where(zero, 0.0, expected), bound, free)
