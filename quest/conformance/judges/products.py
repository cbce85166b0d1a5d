"""Judges of products: sums of integers, what a low-bit product stores, products of values."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quest.conformance import oracle
from quest.conformance.oracle import Array, lift
from quest.conformance.verdict import Verdict
from quest.reference import bounds, packing, prologue

from .basis import close, exact


def accumulated(a: Tensor, b: Tensor, made: Tensor) -> Verdict:
    """T0: int32 sums of products of int8, or counts of the bits that two rows share."""
    if a.dtype == torch.uint8:
        width = 8 * a.shape[-1]
        left, right = (packing.unpack_mask(t.numpy(), width).astype(np.int64) for t in (a, b))
    else:
        left, right = lift(a), lift(b)
    # Sums of integers below 2^53 are exact in float64, and far faster than in int64.
    expected = (left.astype(np.float64) @ right.T.astype(np.float64)).astype(np.int64)
    return exact("accumulators", lift(made), expected)


def multiplied(
    integers: tuple[Array, Array],
    units: tuple[float, float],
    scales: tuple[Tensor, Tensor],
    bias: Tensor | None,
    y: Tensor,
) -> Verdict:
    """T6: the exact sum of integers, times both units and both scales, plus a bias.

    The bias is added with the last product, in one rounding or two.
    """
    expected, bound = _product(integers, units, scales, bias, oracle.dtype_name(y.dtype))
    return close("product", y, expected, bound)


def gated_product(
    integers: tuple[Array, Array],
    units: tuple[float, float],
    scales: tuple[Tensor, Tensor],
    bias: Tensor | None,
    x: Tensor,
) -> Verdict:
    """T6: silu(gate) value of the halves of `multiplied`'s y, each stored in x's dtype before.

    As in `gated`, where one of them may leave the dtype.
    """
    name = oracle.dtype_name(x.dtype)
    y, off = _product(integers, units, scales, bias, name)
    (g, v), (g_off, v_off) = np.split(y, 2, -1), np.split(off, 2, -1)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = prologue.gated(g, v)
        bound = bounds.output(expected, bounds.gated_near(g, v, (g_off, v_off)), name)
        free = np.maximum(np.abs(g) + g_off, np.abs(v) + v_off) >= bounds.LARGEST[name]
    return close("gated product", x, expected, bound, free)


def _product(
    integers: tuple[Array, Array],
    units: tuple[float, float],
    scales: tuple[Tensor, Tensor],
    bias: Tensor | None,
    dtype: str,
) -> tuple[Array, Array]:
    """What `multiplied` expects of a product that is stored in this dtype, and its bound."""
    total = integers[0].astype(np.float64) @ integers[1].T.astype(np.float64)
    factor = units[0] * units[1]
    with np.errstate(invalid="ignore", over="ignore"):
        plain = total * factor * lift(scales[0]) * lift(scales[1]).T
        error = bounds.gamma(bounds.PRODUCT_ROUNDINGS, bounds.U32) * np.abs(plain)
        # Each product of the chain may be subnormal, and is then multiplied by what is left.
        rest = np.abs(lift(scales[1]).T)
        error = error + bounds.ETA32 * (1 + rest * (1 + np.abs(total)))
        expected = plain
        if bias is not None:
            expected = plain + lift(bias)
            error = error + bounds.U32 * (np.abs(expected) + error)
        return expected, bounds.output(expected, error, dtype)


def values_product(
    dtype: torch.dtype, bias: Tensor | None, out: dict[str, Tensor], unit: float, stage: str
) -> Verdict:
    """T1 of y = x_hat w_hat^T + bias, given the values that were multiplied."""
    name = oracle.dtype_name(dtype)
    xh, wh = lift(out["x_hat"]), lift(out["w_hat"])
    y = xh @ wh.T
    error = bounds.gamma(xh.shape[-1], unit) * (np.abs(xh) @ np.abs(wh).T)
    if bias is not None:
        b = lift(bias)
        # The product may be rounded to the dtype before the bias is added.
        error = error + bounds.UNIT[name] * (np.abs(y) + error) + bounds.U32 * np.abs(b)
        y = y + b
    return close(stage, out["y"], y, bounds.output(y, error, name))
