"""Judges of a layer: its forward and gradients, and that the backward is the forward's adjoint."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from quest.conformance import oracle
from quest.conformance.oracle import lift
from quest.conformance.verdict import Verdict, worst
from quest.recipes import Recipe
from quest.reference import bounds, hadamard
from quest.reference.bounds import BUTTERFLY, Sums

from .basis import close
from .products import values_product


def layer(
    x: Tensor,
    w: Tensor,
    grad: Tensor,
    bias: Tensor | None,
    recipe: Recipe,
    out: dict[str, Tensor],
    masks: tuple[Tensor | None, Tensor | None],
    unit: float,
    parts: Sequence[int] = (),
    sums: Sums = BUTTERFLY,
) -> list[Verdict]:
    """T1 and T7 for the layer, given the operands that it multiplied and their masks.

    masks: bool, of x and of w; None where an operand is not quantized. unit: the unit roundoff of
    the product's accumulation, 2^-24, or 2^-23 where tensor cores truncate. parts: the rows of w of
    each of several layers on this x, where it is not one. sums: how gradients are rotated back.
    """
    dtype = oracle.dtype_name(x.dtype)
    g, xh, wh = lift(grad), lift(out["x_hat"]), lift(out["w_hat"])
    found = [values_product(x.dtype, bias, out, unit, "layer y")]
    order = recipe.weight.transform.order(x.shape[-1])
    for name, a, m, mask in (("dx", g, wh, masks[0]), ("dw", g.T, xh, masks[1])):
        chosen = np.ones(out[name].shape, bool) if mask is None else lift(mask)
        inner = np.where(chosen, a @ m, 0.0)
        # The product is stored in the dtype before it is rotated back; where the gradients of
        # several layers reach x, each of them and each of their sums.
        ends = np.cumsum(parts)[:-1] if name == "dx" else ()
        pieces = list(zip(np.split(a, ends, -1), np.split(m, ends), strict=True))
        products = [p @ r for p, r in pieces]
        first = bounds.stored_sum(
            products,
            [bounds.gamma(p.shape[-1], unit) * (np.abs(p) @ np.abs(r)) for p, r in pieces],
            dtype,
        )
        # An infinity on the way makes a whole block infinite or NaN.
        over = chosen & (sum(map(np.abs, products)) + first >= bounds.LARGEST[dtype])
        free = bounds.absolute_sum(over.astype(np.float64), order) > 0
        first = np.where(chosen, first, 0.0)
        spread = bounds.absolute_sum(first, order)
        largest = np.abs(inner) + first
        k = bounds.additions(order) if sums.roundings is None else sums.roundings
        k += bounds.normalisations(order)
        turn = bounds.gamma(k, bounds.U32) * bounds.absolute_sum(largest, order) if k else 0.0
        expected = hadamard.apply_transpose(inner, order)
        bound = bounds.output(expected, spread + turn, dtype)
        found.append(close(f"layer {name}", out[name], expected, bound, free))
    if bias is not None:
        total = g.sum(0)
        error = bounds.gamma(len(g), unit) * np.abs(g).sum(0)
        found.append(close("layer db", out["db"], total, bounds.output(total, error, dtype)))
    return found


def adjoint(
    x: Tensor, w: Tensor, grad: Tensor, out: dict[str, Tensor], order: int, unit: float
) -> Verdict:
    """T7: <g, J v> = <J^T g, v>, for a layer that rotates and neither rounds nor masks.

    There y = (x H)(w H)^T = x w^T is bilinear, so <g, y>, <dx, x> and <dw, w> are one number. Each
    is a sum over the same products |g| |x H| |w H|, rounded once an addition on its way (the
    product, two rotations) and once for each time that a result is stored.
    """
    u_out = bounds.UNIT[oracle.dtype_name(x.dtype)]
    k = 2 * (bounds.additions(order) + bounds.normalisations(order))
    n = max(x.shape[-1], *grad.shape)
    share = bounds.gamma(k, bounds.U32) + bounds.gamma(n, unit) + bounds.gamma(4, u_out)
    x64, w64, g64 = np.abs(lift(x)), np.abs(lift(w)), np.abs(lift(grad))
    sums = bounds.absolute_sum(x64, order) @ bounds.absolute_sum(w64, order).T
    bound = np.asarray([2 * share * float((g64 * sums).sum())])
    left = float((lift(grad) * lift(out["y"])).sum())
    ratio, failure = 0.0, None
    for name, t in (("dx", x), ("dw", w)):
        right = float((lift(out[name]) * lift(t)).sum())
        r, _ = worst(np.asarray([abs(left - right)]), bound)
        if r > 1 and failure is None:
            failure = f"<g, y> = {left!r} but <{name}, v> = {right!r}, {r:.3g} times the bound"
        ratio = max(ratio, r)
    return Verdict("adjoint", 2, ratio, failure=failure)
