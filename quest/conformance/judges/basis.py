"""What the judges are made of: the form of an output, equality bit for bit, and closeness within a
bound."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from quest.conformance import oracle
from quest.conformance.oracle import Array, lift
from quest.conformance.verdict import Verdict, ratios, spread, worst
from quest.reference import bounds


def at(shape: tuple[int, ...], index: int) -> str:
    """Where the element of this flat index is, for messages."""
    return str(tuple(int(i) for i in np.unravel_index(index, shape)))


def form(stage: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Verdict:
    """Shape and dtype of an output."""
    if tuple(t.shape) != shape or t.dtype != dtype:
        told = f"has shape {tuple(t.shape)} and dtype {t.dtype}, not {shape} and {dtype}"
        return Verdict(stage, 0, math.inf, failure=told)
    return Verdict(stage, 0)


def exact(stage: str, actual: Array, expected: Array) -> Verdict:
    """T0: bit for bit."""
    if actual.shape != expected.shape:
        told = f"shape {actual.shape}, not {expected.shape}"
        return Verdict(stage, 0, math.inf, failure=told)
    wrong = np.flatnonzero(np.ravel(actual != expected))
    if wrong.size:
        i = int(wrong[0])
        told = (
            f"{wrong.size} of {actual.size} differ; at {at(actual.shape, i)} it is "
            f"{actual.flat[i]}, not {expected.flat[i]}"
        )
        return Verdict(stage, actual.size, math.inf, failure=told)
    return Verdict(stage, actual.size)


def bits(t: Tensor) -> Array:
    """The bit patterns of a float tensor, for comparisons that NaN must pass."""
    kind = torch.int32 if t.dtype == torch.float32 else torch.int16
    return lift(t.contiguous().view(kind))


def close(
    stage: str, actual: Tensor, expected: Array, bound: Array, free: Array | None = None
) -> Verdict:
    """T1: |actual - expected| <= bound for each element, with the dtype's own infinities and NaN.

    NaN must stand exactly where it is expected. Where the expected value reaches the end of the
    dtype's range within its bound, an infinity of its sign is admissible. free: where any infinity
    or NaN is. An output of another dtype than the three fails.
    """
    name = oracle.dtype_name(actual.dtype)
    if name not in bounds.LARGEST:
        return Verdict(
            stage, 0, math.inf, failure=f"has dtype {actual.dtype}, not {', '.join(bounds.LARGEST)}"
        )
    a = lift(actual)
    if a.shape != expected.shape:
        return Verdict(stage, 0, math.inf, failure=f"shape {a.shape}, expected {expected.shape}")
    largest = bounds.LARGEST[name]
    with np.errstate(invalid="ignore", over="ignore"):
        over = (
            np.isinf(a) & (np.abs(expected) + bound >= largest) & (np.sign(a) == np.sign(expected))
        )
        same = (np.isnan(a) & np.isnan(expected)) | (a == expected) | over
        same = same if free is None else same | (free & ~np.isfinite(a))
        error = np.where(same, 0.0, np.abs(a - expected))
    error = np.where(np.isnan(error), math.inf, error)
    ratio, i = worst(error, bound)
    shares = spread(ratios(error, bound))
    failure = None
    if ratio > 1:
        failure = (
            f"at {at(a.shape, i)} it is {float(a.flat[i])!r}, "
            f"expected {float(expected.flat[i])!r} within {bound.flat[i]:.3e}: "
            f"{ratio:.3g} times the bound"
        )
    return Verdict(stage, a.size, ratio, failure=failure, spread=shares)
