"""The quantizer in plain PyTorch at its edges: rows without a scale, ties, layouts, dtypes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import quest
from quest import eager, grids, operands, ops, transforms

MAX = torch.finfo(torch.float32).max
LEAST = 2.0**-149


def _gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _codes(x: torch.Tensor, spec: str) -> tuple[torch.Tensor, ...]:
    q = quest.quantizer.parse(spec)
    return eager.quantize(x, q, values=True, codes=True, packed=False)


@pytest.fixture
def double_by_default() -> Iterator[None]:
    eager.table.cache_clear()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    eager.table.cache_clear()


def test_that_rows_come_to_one_to_two() -> None:
    """By a power of two and back; beyond 2^127 to at most 4."""
    x = torch.tensor([[LEAST], [2.0**-126], [-(2.0**-125)], [1.5], [-(2.0**126)], [MAX], [0.0]])
    down, up, _ = eager._powers(x)
    assert (down * up == 1).all()
    assert (x * down).flatten().tolist() == [
        2.0**-23, 1.0, -1.0, 1.5, -1.0, 4 - 2.0**-22, 0.0
    ]  # fmt: skip


def test_that_the_largest_rows_have_a_finite_scale() -> None:
    for width in (1, 3, 8, 24):  # at 8 and 24 the root is rounded up to infinity
        _, _, scale, _, _ = _codes(torch.full((2, width), MAX), "uniform4/identity/ste/dense")
        assert scale.isfinite().all()
        assert (scale >= MAX * (1 - 2.0**-20)).all()


@pytest.mark.parametrize("grid", ["uniform1", "uniform4", "ternary", "e2m1", "lloyd_max3"])
@pytest.mark.parametrize("rest", ["clip1.0/dense", "trust0.5/2:4", "trust1.0/pairs2:4"])
@pytest.mark.whole
def test_that_rows_without_a_scale_are_coded_as_zeros(grid: str, rest: str) -> None:
    """NaN, infinity, and what is so small that its root mean square is 0."""
    x = _gaussian(5, 64).abs().neg()
    x[0, 3], x[1, 5], x[2, 0], x[3:] = torch.nan, torch.inf, -torch.inf, 0
    x[3, 9] = -LEAST
    for transform in ("identity", "hadamard16"):
        values, codes, scale, mask, keep = _codes(x, f"{grid}/{transform}/{rest}")
        assert (codes == codes[4]).all()
        if keep.numel():
            assert (keep == keep[4]).all()
        assert (codes[4] == grids.parse(grid).zero_code).all()
        assert scale[:3].isnan().all()
        assert scale[3:].count_nonzero() == 0
        assert values[:3].isnan().all()
        assert values[3:].count_nonzero() == 0
        assert mask[3:].all()
        assert not mask[:3].any()


def test_that_a_midpoint_goes_up() -> None:
    """In a table, at a scale of exactly 1."""
    grid = grids.e2m1(0.5)
    mids = list(grid.midpoints)
    x = torch.tensor([mids + [1.0] * 7 + [0.5] * 2 + [0.25] * 2 + [0.0] * 7])
    assert x.shape == (1, 32)
    _, codes, scale, _, _ = _codes(x, f"{grid}/identity/ste/dense")
    assert scale.item() == 1
    assert codes[0, : len(mids)].tolist() == list(range(1, 15))
    assert eager._encode(x, scale, grid).dtype == torch.int32


@pytest.mark.parametrize("name", ["e2m1", *(f"lloyd_max{bits}" for bits in range(1, 9))])
@pytest.mark.whole
def test_that_midpoints_fill_a_tree(name: str) -> None:
    grid = grids.parse(name)
    points, mids = eager.table(grid, torch.device("cpu"))
    assert torch.equal(points, torch.tensor(grid.points))
    count = len(grid.midpoints)
    assert torch.equal(mids[:count], torch.tensor(grid.midpoints))
    assert (mids[count:] == torch.inf).all()
    assert len(mids) == next(2**k - 1 for k in range(1, 9) if 2**k > count)


@pytest.mark.parametrize("order", [16, 12])
@pytest.mark.whole
def test_that_what_a_trace_makes_is_not_kept(order: int) -> None:
    """Nor given to it what was made before: tables of a grid, and the base of a transform."""
    q = quest.Quantizer(grids.e2m1(), quest.Hadamard(order))
    x = _gaussian(3, 48)
    eager.table.cache_clear()
    transforms.base.cache_clear()
    for _ in range(2):  # in a process that has called nothing, and in one that has
        with FakeTensorMode() as mode:
            fake = mode.from_tensor(x)
            ops.program(q, fake)
            assert q.quantize(fake).dequantize().shape == x.shape
        assert torch.equal(q.quantize(x).dequantize(), q(x))


def test_that_the_default_dtype_changes_nothing(double_by_default: None) -> None:
    x = _gaussian(4, 48).float()
    spec = "e2m1/hadamard16/trust0.5/2:4"
    tables = eager.table(grids.e2m1(), x.device)
    assert [t.dtype for t in tables] == [torch.float32] * 2
    wide = _codes(x, spec)
    bits = torch.full((4, 6), 0x5A, dtype=torch.uint8)
    back = eager.masked_transpose(x, bits, 16)
    eager.table.cache_clear()
    torch.set_default_dtype(torch.float32)
    for a, b in zip((*wide, back), (*_codes(x, spec), eager.masked_transpose(x, bits, 16)),
                    strict=True):  # fmt: skip
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


class _ReversesTies(TorchFunctionMode):
    """A sort that is not asked to be stable may give equal entries in any order: in this one."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        how = dict(kwargs or {})
        if func is not torch.Tensor.argsort or how.get("stable", False):
            return func(*args, **how)
        y = args[0].flip(-1)
        return y.shape[-1] - 1 - func(y, **(how | {"stable": True}))


def test_that_ties_keep_the_lower_index() -> None:
    y = torch.tensor([[1.0, -1, 1, 1, 0, 2, -2, 2], [0, 0, 0, 0, 3, 3, -4, 4]])
    pairs = torch.tensor([[3.0, 4, 4, -3, 0, 5, 1, 0], [0, 0, 1, 1, 0, 0, 0, 0]])
    with _ReversesTies():
        single = eager.select(y, quest.NM(2, 4)).int().tolist()
        double = eager.select(pairs, quest.Pairwise(4, 8)).int().tolist()
    assert single == [[1, 1, 0, 0, 0, 1, 1, 0], [1, 1, 0, 0, 0, 0, 1, 1]]
    assert double == [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]


def test_that_masks_are_of_what_was_not_rounded() -> None:
    """A pruned entry passes below T alone where trust prunes, and as any other where it clips."""
    x = _gaussian(8, 64)
    for spec in ("clip0.5", "trust1.0", "trust0.5", "ste"):
        q = quest.quantizer.parse(f"uniform2/identity/{spec}/2:4")
        values, _, scale, mask, keep = eager.quantize(x, q, values=True, codes=True, packed=False)
        grid = q.require_grid()
        size = x.abs() / scale
        wanted = {
            "clip0.5": size <= 0.5 * grid.outer,
            "trust1.0": size <= torch.where(keep, grid.outer + grid.half_gap, grid.half_gap),
            "trust0.5": (values / scale - x / scale).abs() <= 0.5 * grid.half_gap,
            "ste": torch.ones_like(keep),
        }[spec]
        assert torch.equal(mask, wanted)


def test_that_the_layout_changes_no_bit() -> None:
    x, weight = _gaussian(64, 1000), _gaussian(1000)
    across = x.t().contiguous().t()
    q = quest.quantizer.parse("uniform8/hadamard8/trust1.0/dense")
    for make in (
        lambda t: eager.quantize(t, q, values=True, codes=True, packed=True),
        lambda t: eager.normed(t, None, weight, 1e-5)[1:],
        lambda t: [eager.hadamard(t, order, False) for order in (1, 8, 1000 // 125)],
        lambda t: [eager.hadamard(t[:, :order], order, True) for order in (1, 16, 12)],
    ):
        for a, b in zip(make(across), make(x), strict=True):
            assert torch.equal(a, b)
            assert a.is_contiguous()


def test_that_one_element_is_transformed() -> None:
    for value in (3.0, -7.25, 0.125):
        x = torch.tensor([value])
        bits = torch.ones(1, dtype=torch.uint8)
        assert eager.hadamard(x, 1, False).item() == value
        assert eager.masked_transpose(x, bits, 1).item() == value


def test_that_a_gradient_is_rounded_to_what_is_asked() -> None:
    grad, bits = _gaussian(3, 24).bfloat16(), torch.full((3, 3), 0xA7, dtype=torch.uint8)
    wide = eager.masked_transpose(grad, bits, 12, torch.float32)
    assert wide.dtype == torch.float32
    assert torch.equal(wide, eager.masked_transpose(grad.float(), bits, 12))
    assert torch.equal(wide.bfloat16(), eager.masked_transpose(grad, bits, 12))
    assert torch.equal(wide.bfloat16(), eager.masked_transpose(grad, bits, 12, torch.bfloat16))


def test_that_fakes_have_the_shapes_of_results() -> None:
    x = _gaussian(2, 3, 72)

    def told(made: tuple[torch.Tensor, ...]) -> list[Any]:
        return [(t.shape, t.dtype) for t in made]

    for spec in ("uniform4/hadamard8/trust1.0/dense", "e2m1/hadamard12/ste/2:4"):
        q = quest.quantizer.parse(spec)
        for values, codes, packed in itertools.product((False, True), repeat=3):
            how = {"values": values, "codes": codes, "packed": packed}
            assert told(eager.quantize(x, q, **how)) == told(eager.like(x, q, **how))
    for recipe, kind in (("w1a1", "bits"), ("w4a4", "integers"), ("w8a8", "codes")):
        made = eager.encode(x, quest.recipe(recipe).weight, kind)
        assert told(made) == told(eager.encoded_like(x, kind))
    q = quest.recipe("w4a4").weight
    operand = eager.encode(x, q, "integers")[0]
    bits = operands.PACKED[operands.saved(q, "integers").kind]
    packed_form = eager.pack_operand(operand, q)
    assert told((packed_form,)) == told((eager.packed_like(operand, bits),))


def test_that_rows_turn_as_the_transform_does() -> None:
    """And not back: an order of 12 is not symmetric. Inside the grid, within half a step."""
    x = _gaussian(16, 48)
    q = quest.quantizer.parse("uniform8/hadamard12/ste/dense")
    values, _, scale, _, _ = eager.quantize(x, q, values=True, codes=False, packed=False)
    grid = q.require_grid()
    turned = eager.hadamard(x, 12, False) / scale
    inside = turned.abs() < grid.outer
    assert inside.any()
    assert ((values / scale - turned).abs() <= 0.501 * (grid.step or 0))[inside].all()
