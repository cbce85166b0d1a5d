"""Packing and decoding of operands that several programs share, and of one entry: exactly."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from property_tests.lane_marks import every_lane
from quest import operands
from quest.conformance.lanes import Lane
from quest.quantizer import parse

pytestmark = pytest.mark.whole

# Wider than a program's tile, more rows than it has, and less than a byte; one that is strided.
CASES = (((3, 4101), False), ((2100, 3), False), ((1, 1), False), ((3, 9), True))
# By bits: a grid, what a code is an odd number of (ternary: a number), and the least code.
GRIDS = {
    4: ("uniform4:1.875/identity/ste/dense", 0.125, -8),
    2: ("uniform2:1.5/identity/ste/dense", 0.5, -2),
    1: ("ternary:0.25/identity/ste/dense", 0.25, -1),
}


def apart(x: Tensor) -> Tensor:
    """The same entries, where rows do not follow each other and neighbours lie apart."""
    return torch.stack([x, x], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0]


def packed(index: npt.NDArray[np.int64], bits: int) -> npt.NDArray[np.int64]:
    """Little-endian within a byte; what is missing of a row's last byte is 0."""
    per = 8 // bits
    padded = np.pad(index, ((0, 0), (0, -index.shape[1] % per)))
    return (padded.reshape(len(index), -1, per) << (bits * np.arange(per))).sum(-1)


@every_lane
@pytest.mark.parametrize(("shape", "strided"), CASES, ids=str)
@pytest.mark.parametrize("levels", GRIDS)
def test_operands_of_several_programs(
    lane: Lane, levels: int, shape: tuple[int, int], strided: bool
) -> None:
    spec, unit, least = GRIDS[levels]
    q, bits = parse(spec), max(2, levels)
    rng = np.random.default_rng(0)
    codes = rng.integers(least, 2 if levels == 1 else -least, shape)
    integers = codes if levels == 1 else 2 * codes + 1
    spread = operands.form(q.require_grid(), "integers").spread
    operand = torch.from_numpy((spread * integers).astype(np.int8))
    scale = torch.from_numpy(2.0 ** rng.integers(-3, 4, (len(codes), 1))).float()
    expected = packed(codes - least, bits)
    if strided:
        operand, scale = apart(operand), apart(scale)
    made = lane.call("pack_operand", operand, q=q)["packed"]
    np.testing.assert_array_equal(made.numpy(), expected)
    small = torch.from_numpy(expected.astype(np.uint8))
    small = apart(small) if strided else small
    values = torch.from_numpy(integers).float() * unit * scale
    for kind, held in (
        ("integers", operand),
        (f"packed{bits}", apart(small) if strided else small),
    ):
        static = {"q": q, "kind": kind, "width": shape[1], "dtype": torch.float32}
        found = lane.call("decode", held, scale, **static)["values"]
        torch.testing.assert_close(found, values, rtol=0, atol=0)


@every_lane
@pytest.mark.parametrize("width", [1, 11])
def test_single_bits_are_decoded(lane: Lane, width: int) -> None:
    """The least of a tile are the eight entries of a byte."""
    q = parse("uniform1:0.5/identity/ste/dense")
    signs = np.random.default_rng(0).integers(0, 2, (3, width))
    operand = torch.from_numpy(np.packbits(signs, axis=-1, bitorder="little"))
    scale = torch.tensor([[0.25], [1.0], [4.0]])
    static = {"q": q, "kind": "bits", "width": width, "dtype": torch.float32}
    values = lane.call("decode", operand, scale, **static)["values"]
    expected = torch.from_numpy(2 * signs - 1).float() * 0.5 * scale
    torch.testing.assert_close(values, expected, rtol=0, atol=0)


@every_lane
@pytest.mark.parametrize("levels", GRIDS)
def test_scales_at_the_ends_of_the_range(lane: Lane, levels: int) -> None:
    """Integers times the unit come first: a unit's share of such a scale is nothing, and an integer
    times the other no float.
    """
    spec, unit, least = GRIDS[levels]
    q, bits = parse(spec), max(2, levels)
    codes = np.arange(least, 2 if levels == 1 else -least)
    integers = codes if levels == 1 else 2 * codes + 1
    spread = operands.form(q.require_grid(), "integers").spread
    operand = torch.from_numpy((spread * integers).astype(np.int8)).repeat(3, 1)
    scale = torch.tensor([[2.0**-149 / unit], [2.0**-147 / unit], [2.0**127]])
    small = torch.from_numpy(packed(np.tile(codes - least, (3, 1)), bits).astype(np.uint8))
    for kind, held in (("integers", operand), (f"packed{bits}", small)):
        static = {"q": q, "kind": kind, "width": len(codes), "dtype": torch.float32}
        found = lane.call("decode", held, scale, **static)["values"]
        expected = torch.from_numpy(integers * unit) * scale.double()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=0)
