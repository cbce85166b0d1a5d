"""Judges of stages whose input was not observed: what may have gone before widens the bound.

An implementation that gives only dequantized values shows neither its codes nor its scale. A value
is admissible if some admissible code and some admissible scale make it: the bounds of T2 and T3,
carried through T6 (verification: "where a stage's input can't be observed, its bound is
propagated").
"""

from __future__ import annotations

import dataclasses

import numpy as np
from torch import Tensor

from quest.quantizer import Quantizer
from quest.reference import bounds, hadamard, quantize
from quest.reference.bounds import BUTTERFLY, Sums

from . import judges, oracle
from .oracle import lift
from .verdict import Verdict, inconclusive


def valued(
    x: Tensor, q: Quantizer, values: Tensor, keep: Tensor | None = None, *,
    conclusive: bool = True, sums: Sums = BUTTERFLY,
) -> Verdict:  # fmt: skip
    """T2, T3 and T6 at once: values (..., d) of x.

    keep: the selection that was made; a pruned entry is exactly 0, or NaN in a row that is not
    finite. conclusive: fail where too many elements have more than one admissible code. sums: how
    the transform is summed.
    """
    arguments = oracle.arguments(q, x.shape[-1])
    grid, order = arguments["grid"], arguments["block"]
    x64 = oracle.rows(lift(x))
    sigma = quantize.scale(x64)
    regular = np.isfinite(sigma) & (sigma > 0)
    safe, x64 = np.where(regular, sigma, 1.0), np.where(regular, x64, 0.0)
    scale_error = np.where(regular, bounds.scale(x64, order, safe, sums), 0.0)
    z = hadamard.apply(x64, order) / safe
    # The codes are taken against the scale that was stored, and not against sigma.
    share = scale_error / safe
    delta = np.where(regular, bounds.code_margin(x64, order, safe, sums), 0.0)
    delta = (delta + np.abs(z) * share) / (1 - np.minimum(share, 0.5))
    delta = np.where(share > 0.5, np.inf, delta)  # a scale of a few units of 2^-149
    lowest, highest = quantize.encode(z - delta, grid), quantize.encode(z + delta, grid)
    nominal = quantize.encode(z, grid)
    actual = oracle.rows(lift(values))
    kept = np.ones(actual.shape, bool) if keep is None else oracle.rows(lift(keep))
    nearest = nominal
    distance = np.full(z.shape, np.inf)
    with np.errstate(invalid="ignore"):
        # Of the admissible codes the one whose value is nearest; more than two are rare.
        for step in range(int((highest - lowest).max(initial=0)) + 1):
            code = np.minimum(lowest + step, highest)
            gap = np.abs(quantize.decode(code, grid) * safe - actual)
            nearest = np.where(gap < distance, code, nearest)
            distance = np.fmin(gap, distance)
        point = quantize.decode(nearest, grid)
        expected = np.where(regular & kept, point * safe, np.where(np.isnan(sigma), np.nan, 0.0))
        error = bounds.gamma(bounds.VALUE_ROUNDINGS, bounds.U32) * np.abs(expected)
        error = error + np.abs(point) * scale_error * (1 + bounds.U32) + bounds.ETA32
        bound = bounds.output(expected, error, oracle.dtype_name(values.dtype))
    bound = np.where(regular & kept, bound, 0.0)
    verdict = judges.close("values", values, expected.reshape(tuple(values.shape)),
                           bound.reshape(tuple(values.shape)))  # fmt: skip
    ambiguous = int((regular & kept & (highest > lowest)).sum())
    failure = verdict.failure
    if failure is None and conclusive and inconclusive(ambiguous, z.size):
        failure = f"inconclusive: {ambiguous} of {z.size} codes are ambiguous"
    return dataclasses.replace(verdict, ambiguous=ambiguous, failure=failure)
