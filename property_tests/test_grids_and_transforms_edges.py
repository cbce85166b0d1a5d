"""Grids, transforms, codes and their products at their edges, one function at a time."""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

import quest
from quest import compression, eager, grids, packing, transforms
from quest.packed import packed_product
from quest.reference import compression as reference_compression
from quest.reference import grids as oracle
from quest.reference import hadamard as reference_hadamard
from quest.reference import packing as reference_packing
from quest.reference import quantize as reference_quantize

pytestmark = pytest.mark.whole

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "alpha",
    [
        math.nextafter(2.0**-8, 0),
        0.0,
        math.nextafter(2.0**8, math.inf),
        2**8 + 1,
        True,
        Fraction(1, 2),
    ],
)
def test_that_an_alpha_is_a_number_in_its_range(alpha: Any) -> None:
    """Just outside at either end; in the range, but no float and no int."""
    with pytest.raises(ValueError, match=r"alpha must be a number from 2\^-8 to 2\^8, got"):
        grids.uniform(4, alpha)


@pytest.mark.parametrize("bits", range(1, 9))
def test_that_a_grid_of_a_given_alpha_has_all_points(bits: int) -> None:
    """A power of two: every point is rounded once."""
    assert grids.uniform(bits, 2.0).points == tuple(oracle.uniform(2**bits, 2.0).points)


@pytest.mark.parametrize(("name", "padded"), [("e2m1", 1), ("lloyd_max1", 0), ("lloyd_max3", 0)])
def test_that_a_table_s_midpoints_end_with_infinity(name: str, padded: int) -> None:
    """Where they are not one less than a power of two already; made anew, past the cache."""
    grid = grids.parse(name)
    points, mids = eager.table.__wrapped__(grid, CPU)
    assert torch.equal(points, torch.tensor(grid.points))
    assert torch.equal(mids, torch.tensor([*grid.midpoints, *[math.inf] * padded]))


# Of dyadic steps and points, and the same of the oracle.
DYADIC = [
    (grids.uniform(2, 0.75), oracle.uniform(4, 0.75)),
    (grids.ternary(0.5), oracle.uniform(3, 0.5)),
    (grids.e2m1(0.5), oracle.e2m1(0.5)),
]


@pytest.mark.parametrize(("grid", "expected"), DYADIC, ids=lambda g: g.name)
def test_that_codes_are_those_of_the_nearest_points(grid: grids.Grid, expected: Any) -> None:
    """At all points, on all midpoints and beyond both ends; and back."""
    ends = [-9.0, -grid.half_gap / 2, 0.0, grid.half_gap / 2, 9.0]
    y = torch.tensor([*grid.points, *grid.midpoints, *ends])
    codes = eager._encode(y, torch.ones(1), grid)
    assert codes.tolist() == reference_quantize.encode(y.double().numpy(), expected).tolist()
    points = eager.points(codes[: grid.levels], grid)
    assert torch.equal(points, torch.tensor(grid.points))


class _SumsInTurn(TorchFunctionMode):
    """Of a device that adds one after another, and divides by a number as CUDA does.

    That is by multiplying with its reciprocal, which may be rounded up.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.sum:
            return functools.reduce(torch.add, args[0].unbind(-1)).unsqueeze(-1)
        if func is torch.Tensor.div:
            return args[0] * torch.tensor(float(args[1])).reciprocal()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("width", [7, 15, 224])
def test_that_no_finite_row_has_an_infinite_scale(width: int) -> None:
    """All entries the largest float32: rounding takes their root mean square beyond it."""
    x = torch.full((1, width), torch.finfo(torch.float32).max)
    with _SumsInTurn():
        sigma = eager._normalise(x, width)[2]
    assert torch.equal(sigma, x[:, :1])


@pytest.mark.parametrize(("grid", "expected"), DYADIC, ids=lambda g: g.name)
def test_that_pruned_entries_have_the_code_of_zero(grid: grids.Grid, expected: Any) -> None:
    """Whatever theirs would be: these are far from zero."""
    q = quest.quantizer.parse(f"{grid}/identity/ste/2:4")
    x = torch.tensor([[-9.0, -8, 7, -7, 7, -7, 9, 8]])
    _, codes, _, _, keep = eager.quantize(x, q, values=False, codes=True, packed=False)
    assert keep.int().tolist() == [[1, 1, 0, 0, 0, 0, 1, 1]]
    assert codes[~keep].tolist() == reference_quantize.encode(np.zeros(4), expected).tolist()


@pytest.mark.parametrize("shape", [(3, 0), (0, 8)])
def test_that_nothing_is_quantized_to_nothing(shape: tuple[int, int]) -> None:
    q = quest.quantizer.parse("uniform4/identity/ste/dense")
    x = torch.zeros(shape)
    values, codes, scale, mask, _ = eager.quantize(x, q, values=True, codes=True, packed=False)
    assert values.shape == codes.shape == mask.shape == shape
    assert torch.equal(scale, torch.zeros(shape[0], 1))


def test_that_one_element_is_quantized() -> None:
    """To the outermost point of a grid of alpha 1, where its scale is its magnitude."""
    q = quest.quantizer.parse("uniform1:1.0/identity/ste/dense")
    x = torch.tensor([[-3.0]])
    values, codes, scale, _, _ = eager.quantize(x, q, values=True, codes=True, packed=False)
    assert (values.item(), codes.item(), scale.item()) == (-3.0, -1, 3.0)


def test_that_single_entries_are_ranked_by_magnitude() -> None:
    """Also where squares underflow to 0, or overflow: nothing ties."""
    y = torch.tensor([[2.0**-100, 2.0**-99, 2.0**-98, -(2.0**-97)], [2.0**99, 1, 2.0**98, -3e38]])
    keep = eager.select(y, quest.NM(1, 4))
    assert keep.int().tolist() == [[0, 0, 0, 1], [0, 0, 0, 1]]


def test_that_pairs_are_ranked_by_their_l2_norm() -> None:
    """By the sum of magnitudes 3 + 4 would be more than 6 + 0."""
    keep = eager.select(torch.tensor([[3.0, 4, 6, 0], [0, -6, -4, 3]]), quest.Pairwise(2, 4))
    assert keep.int().tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_that_every_byte_is_unpacked(bits: int) -> None:
    packed = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    width = 128 * 8 // bits
    expected = reference_packing.unpack(packed.numpy(), bits, width)
    assert np.array_equal(packing.unpack(packed, bits, width).numpy(), expected)


@pytest.mark.parametrize("bits", [2, 4])
def test_that_packed_codes_stand_for_the_points(bits: int) -> None:
    """Odd integers, of a grid whose outermost point is the largest: a row of 1 picks each."""
    levels = 2**bits
    name = f"uniform{bits}:{levels - 1}.0"
    w = packing.pack(torch.arange(levels)[None], bits)
    one, none = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)
    spread = {2: 32, 4: 8}[bits]  # what stands for 1 in an operand, and not in packed codes
    y = packed_product(
        spread * torch.eye(levels, dtype=torch.int8), w, one.expand(levels, 1), one,
        none.expand(levels, 1), none, None, f"{name},{name}", "integers,integers", levels,
        torch.float32,
    )  # fmt: skip
    assert y.flatten().tolist() == list(range(1 - levels, levels, 2))


@pytest.mark.parametrize("scale", [math.nextafter(1.0, 0), 1.0, 1.5])
def test_that_trust_of_1_and_more_has_an_edge(scale: float) -> None:
    """It trusts all that lies inside the grid; less compares distances."""
    grid = grids.uniform(2)
    t = scale * grid.half_gap
    expected = (grid.outer + t, t, True) if scale >= 1 else (t, t, False)
    assert quest.Quantizer(grid, estimator=quest.Trust(scale)).thresholds() == expected


@pytest.mark.parametrize("scale", [1e30, 1e39, 1e300, 1.7e308])
@pytest.mark.parametrize("kind", [quest.Clip, quest.Trust])
def test_thresholds_beyond_float32(kind: type[quest.Clip], scale: float) -> None:
    """All passes, rows of zeros, too, whose scale is 0; a kernel is told them as float32."""
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    for sparsity in (None, quest.NM(2, 4)):
        q = quest.Quantizer(grids.uniform(4), estimator=kind(scale), sparsity=sparsity)
        assert all(0 < t <= torch.finfo(torch.float32).max for t in q.thresholds()[:2])
        assert q.quantize(x).mask.all()


@pytest.mark.parametrize("order", [1, 2, 4, 8])
def test_that_signs_are_sylvester_s(order: int) -> None:
    assert transforms._signs(order) == reference_hadamard.matrix(order).tolist()


@pytest.mark.parametrize("m", [2, 4, 64, 12, 24, 20, 40, 28, 56])
def test_that_a_base_is_its_matrix(m: int) -> None:
    """One of the three times Sylvester's, in this order; made anew, past the cache."""
    base = transforms.base.__wrapped__(m, CPU)
    assert base is not None
    assert base.dtype == torch.float32
    assert base.tolist() == reference_hadamard.matrix(m).tolist()


def test_that_there_is_no_base_of_1() -> None:
    assert transforms.base.__wrapped__(1, CPU) is None


def test_that_an_order_twice_the_largest_power_is_split() -> None:
    """The limit is a power of two itself."""
    most = transforms.MAX_POWER
    assert transforms.split.__wrapped__(most) == (1, most)
    assert transforms.split.__wrapped__(2 * most) == (2, most)


class _ReversesTies(TorchFunctionMode):
    """A sort that is not asked to be stable may give equal entries in any order: in this one."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        how = dict(kwargs or {})
        if func is not torch.argsort or how.get("stable", False):
            return func(*args, **how)
        y = args[0].flip(-1)
        return y.shape[-1] - 1 - func(y, **(how | {"stable": True}))


def test_that_the_first_zeros_are_kept_beside_nonzeros() -> None:
    """Groups of none, one and two: the form is one, however equal entries are sorted."""
    x = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 5, 0, 6, 0, 0, 0, 7, 8, 0]], dtype=torch.int8)
    with _ReversesTies():
        values, metadata = compression.eager_compress(x)
    expected_values, expected_metadata = reference_compression.compress(x.numpy())
    assert np.array_equal(values.numpy(), expected_values)
    assert np.array_equal(metadata.numpy().view(np.uint32), expected_metadata)
