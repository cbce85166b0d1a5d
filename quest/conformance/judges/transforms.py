"""Judges of transforms, of their backward behind a mask, and of the scale of a rotated row."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from quest.conformance import oracle
from quest.conformance.oracle import lift
from quest.conformance.verdict import Verdict
from quest.reference import bounds, hadamard, packing, quantize
from quest.reference.bounds import BUTTERFLY, Sums

from .basis import close


def rotated(x: Tensor, y: Tensor, order: int, transpose: bool, sums: Sums = BUTTERFLY) -> Verdict:
    """T1 for x H or x H^T, stored as y's dtype; infinities and NaN spread as sums spread them."""
    x64 = lift(x)
    turn = hadamard.apply_transpose if transpose else hadamard.apply
    with np.errstate(invalid="ignore", over="ignore"):
        expected = turn(x64, order)
        bound = bounds.output(
            expected, bounds.rotation(x64, order, transpose, sums), oracle.dtype_name(y.dtype)
        )
    return close("transform", y, expected, bound)


def scaled(x: Tensor, scale: Tensor, order: int, sums: Sums = BUTTERFLY) -> Verdict:
    """T2: sigma, with zero, non-finite and underflowing rows by their rule."""
    x64 = oracle.rows(lift(x))
    sigma = quantize.scale(x64)
    with np.errstate(invalid="ignore"):
        bound = bounds.scale(np.where(np.isnan(sigma), 0.0, x64), order, sigma, sums)
    bound = np.where(sigma == 0, 0.0, bound)
    return close("scale", scale.reshape(-1, 1), sigma, bound)


def transposed(
    grad: Tensor, mask: Tensor, dx: Tensor, order: int, sums: Sums = BUTTERFLY
) -> Verdict:
    """T7 for the fused backward, given the packed mask: (grad * mask) H^T."""
    bits = packing.unpack_mask(mask.numpy(), grad.shape[-1]).astype(bool)
    taken = torch.where(torch.from_numpy(bits), grad.double(), 0.0)
    verdict = rotated(taken, dx, order, True, sums)
    return dataclasses.replace(verdict, stage="backward")
