"""Judges of what codes are stored as: values, packed bytes, a product's operands, whole and
compressed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quest import operands
from quest.conformance import oracle
from quest.conformance.oracle import Array, lift
from quest.conformance.verdict import Verdict
from quest.quantizer import Quantizer
from quest.reference import bounds, compression, packing, quantize

from .basis import close, exact, form


def dequantized(
    q: Quantizer, codes: Tensor, scale: Tensor, keep: Tensor | None, values: Tensor
) -> Verdict:
    """T6: point(code) * sigma as the values' dtype; pruned entries and zero rows exactly 0."""
    grid = oracle.grid(q.require_grid())
    s = lift(scale)
    kept = np.ones(codes.shape, bool) if keep is None else lift(keep)
    points = np.where(kept, quantize.decode(lift(codes), grid), 0.0)
    with np.errstate(invalid="ignore"):
        expected = points * s
    error = bounds.gamma(bounds.VALUE_ROUNDINGS, bounds.U32) * np.abs(expected) + bounds.ETA32
    bound = bounds.output(expected, error, oracle.dtype_name(values.dtype))
    bound = np.where(expected == 0, 0.0, bound)
    return close("values", values, expected, bound)


def packed(q: Quantizer, codes: Tensor, data: Tensor) -> Verdict:
    """T0: the bytes of packed codes."""
    grid = oracle.grid(q.require_grid())
    unsigned = packing.to_unsigned(lift(codes), grid)
    bits = packing.storage_bits(grid.levels)
    return exact("packed codes", lift(data), packing.pack(unsigned, bits).astype(np.int64))


def packed_bits(stage: str, flags: Tensor, data: Tensor) -> Verdict:
    """T0: the bytes of a packed mask."""
    return exact(stage, lift(data), packing.pack_mask(lift(flags)).astype(np.int64))


def encoded(
    q: Quantizer, kind: str, codes: Tensor, keep: Tensor | None, operand: Tensor, sums: Tensor
) -> list[Verdict]:
    """T0: an operand's integers, times the unit, are the points of the codes; and their sums."""
    made = operands.form(q.require_grid(), kind)
    points = quantize.decode(lift(codes), oracle.grid(q.require_grid()))
    if keep is not None:
        points = np.where(lift(keep), points, 0.0)
    integers = whole(operand, kind, codes.shape[-1])
    # The integer nearest to its point is expected. 1e-6 is a window and no tolerance: neighbours
    # are a unit apart, so an integer this near its point is the nearest one.
    far = np.abs(integers * made.unit - points) > 1e-6 * made.unit
    expected = np.where(far, np.rint(points / made.unit), integers).astype(np.int64)
    stored = integers
    if kind == "bits":
        # The bytes: padding bits that are set would be counted.
        stored, expected = lift(operand), packing.pack_mask(points > 0).astype(np.int64)
    return [
        exact("operand", stored, expected),
        exact("operand sums", lift(sums), integers.sum(-1, keepdims=True)),
    ]


def compressed(operand: Tensor, values: Tensor, metadata: Tensor) -> list[Verdict]:
    """T0 of the compressed form of an operand (rows, d), and of what comes back of it."""
    kept, words = compression.compress(operand.numpy())
    stages = ("compressed values", "compressed metadata", "decompressed")
    found = [
        form(stages[0], values, kept.shape, torch.int8),
        form(stages[1], metadata, words.shape, torch.int32),
    ]
    if any(v.failure for v in found):
        return found
    made = metadata.numpy().astype(np.int64) & 0xFFFFFFFF
    back = compression.decompress(values.numpy(), made)
    pairs = ((values.numpy(), kept), (made, words), (back, operand.numpy()))
    return [exact(stage, *pair) for stage, pair in zip(stages, pairs, strict=True)]


def whole(operand: Tensor, kind: str, width: int) -> Array:
    """The integers (..., width) int64 of an operand, by the oracle's unpacking."""
    if kind == "bits":
        return 2 * packing.unpack_mask(operand.numpy(), width).astype(np.int64) - 1
    return lift(operand) * 2 + 1 if kind == "codes" else lift(operand)
