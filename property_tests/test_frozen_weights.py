"""What a weight is frozen into, and the way that a frozen layer takes with it; no GPU.

Weights are frozen as on Hopper, where layers multiply integers. Launches are operators that compute
the same on a CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import quest
from quest import compression, direct, frozen, lowbit, ops, packed, paths
from quest import sparse_product as sparse
from quest.estimators import STE
from quest.recipes import Recipe
from quest.transforms import Hadamard

pytestmark = pytest.mark.whole

# For a weight of 256 columns: the kinds of both operands, and in which form its codes lie.
MADE = {
    "w1a1": ("bits,bits", "the operand"), "w4a4": ("integers,integers", "codes"),
    "w2a4": ("integers,integers", "codes"), "w4a2": ("integers,integers", "codes"),
    "w4a8": ("codes,integers", ""), "w8a4": ("integers,codes", ""), "w8a8": ("codes,codes", ""),
    "w1.58a1.58": ("integers,integers", ""), "fp4": ("integers,integers", ""),
    "w4a4-4:8": ("integers,integers", ""), "w4a4-2:4": ("integers,integers", "compressed"),
    "w4a8-2:4": ("codes,integers", "compressed"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def integers(monkeypatch: pytest.MonkeyPatch) -> None:
    def has(t: Tensor, recipe: Recipe) -> bool:
        assert isinstance(t, Tensor)
        assert isinstance(recipe, Recipe)
        return True

    monkeypatch.setattr(paths, "has_integers", has)


def _weight(width: int = 256, out: int = 24) -> torch.nn.Parameter:
    torch.manual_seed(out)
    return torch.nn.Parameter(torch.randn(out, width))


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


@pytest.mark.parametrize("width", [256, 136])
@pytest.mark.parametrize("name", MADE)
def test_what_a_weight_is_frozen_into(name: str, width: int) -> None:
    """Codes for few rows lie beside an operand where rows are whole blocks of 128."""
    recipe, w = quest.recipe(name), _weight(width)
    kinds, form = MADE[name]
    form = form if width == 256 or form == "compressed" else ""
    held = frozen.freeze(w, recipe)
    operand, scale, _, sums = lowbit.encode(w.detach(), recipe.weight.spec, kinds.split(",")[1])
    assert held.values is None
    for made, expected in ((held.operand, operand), (held.scale, scale), (held.sums, sums)):
        assert _same(made, expected)
    codes = recipe.weight.pack(w).codes if form == "codes" else None
    assert held.packed is held.operand if form == "the operand" else _same(held.packed, codes)
    both = compression.compress(operand) if form == "compressed" else (None, None)
    assert _same(held.kept, both[0])
    assert _same(held.metadata, both[1])
    names = [q.require_grid().name for q in (recipe.activation, recipe.weight)]
    assert (held.kinds, held.names) == (kinds, ",".join(names))
    # No mask is asked for.
    assert held.spec == dataclasses.replace(recipe.activation, estimator=STE()).spec
    assert held.weight is w
    assert held.is_of(w)
    assert not held.is_of(_weight(width))
    assert held.path == "integers"


@pytest.mark.parametrize("name", ["w4a16", "bf16", "w4a4"])
def test_values_ask_for_no_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where integers are not for both sides, or not there; frozen and called with gradients on."""
    w, x = _weight(), torch.randn(3, 256)
    made = quest.recipe(name)
    if name == "w4a4":
        monkeypatch.setattr(paths, "has_integers", lambda *_: False)
    held = frozen.freeze(w, made)
    assert held.path == "values"
    assert held.weight is w
    assert held.is_of(w)
    y = frozen.linear(x, held, None, made)
    assert not y.requires_grad
    assert torch.equal(y, torch.nn.functional.linear(made.activation(x), made.weight(w.detach())))


class _Names(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Of each operator that is called, and what it gave."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        self.seen.append((func.name(), made))
        return made


@pytest.mark.parametrize("order", [128, 64])
@pytest.mark.parametrize("name", ["w4a4", "w1a1", "w8a8", "w4a4-2:4"])
def test_another_kernel_follows_those_that_wrote_a_weight(name: str, order: int) -> None:
    """Which lets the first call read it before the kernel before it has ended: also where another
    kernel quantizes the rows, which may overlap with what is before it.
    """
    made = quest.recipe(name)
    activation, weight = (
        dataclasses.replace(q, transform=Hadamard(order)) for q in (made.activation, made.weight)
    )
    with _Names() as mode:
        held = frozen.freeze(_weight(), Recipe("own", weight, activation))
    assert (held.packed is not None) == (name in ("w4a4", "w1a1"))
    last, made = mode.seen[-1]
    assert last == "aten::clone"
    assert made is held.scale


def test_a_weight_that_counts_no_writes() -> None:
    """It is no weight that was never written, though it lies where that one lies."""
    w = torch.zeros(4, 4)
    held = frozen.Frozen(state=direct.state(w))
    assert held.is_of(w)
    with torch.inference_mode():
        other = torch.empty(0).set_(w)  # type: ignore[call-overload]
    assert other.data_ptr() == w.data_ptr()
    assert not held.is_of(other)
    assert frozen.Frozen(state=direct.state(other)).is_of(other)


def test_recorded_calls_are_of_one_weight() -> None:
    """What is made like it has none, and no one is shown them."""
    held = frozen.Frozen()
    assert (held.place, held.path) == (0, "values")
    held.calls["kind",] = None
    assert not dataclasses.replace(held).calls
    assert "calls" not in repr(held)
    with pytest.raises(TypeError, match="unexpected keyword argument 'calls'"):
        frozen.Frozen(calls=direct.Calls())  # type: ignore[call-arg]


def test_what_rows_are_multiplied_with() -> None:
    """And what is read of it at the least, with the scales."""
    w = _weight(width=512)
    dense, sparse_, bits, eight, values = (
        frozen.freeze(w, quest.recipe(name))
        for name in ("w4a4", "w4a4-2:4", "w1a1", "w8a8", "bf16")
    )
    few, one, many = paths.FEW_ROWS[4], paths.FEW_ROWS[1], paths.SPARSE_ROWS
    for held, forms in (
        (dense, {1: "packed", few: "packed", few + 1: "operand", many: "operand"}),
        (bits, {1: "packed", one: "packed", one + 1: "operand", many: "operand"}),
        (sparse_, {1: "operand", few: "operand", many - 1: "operand", many: "compressed"}),
        (eight, {1: "operand", many: "operand"}),
    ):
        assert {rows: held.form(rows, 512) for rows in forms} == forms
    for held, least in (
        (dense, (dense.packed, dense.scale)), (bits, (bits.operand, bits.scale)),
        (sparse_, (sparse_.kept, sparse_.metadata, sparse_.scale)),
        (eight, (eight.operand, eight.scale)), (values, (values.values,)),
    ):  # fmt: skip
        assert [id(t) for t in held.read()] == [id(t) for t in least]


# --- stacks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w4a4", "w1a1", "w8a8", "w4a4-2:4"])
def test_another_kernel_follows_those_that_stack_a_weight(name: str) -> None:
    """As in `freeze`: what products ask for early is not what was written last."""
    parts = [frozen.freeze(_weight(), quest.recipe(name)) for _ in range(2)]
    with _Names() as mode:
        whole = frozen.stacked(frozen.stack(parts))
    assert whole is not None
    wrote = [made for name, made in mode.seen if name == "aten::cat"]
    early = [i for i, made in enumerate(wrote) if made is whole.operand or made is whole.packed]
    assert len(early) == 1 + (name == "w4a4")
    assert any(made is whole.scale for made in wrote[max(early) + 1 :])


ROWS = ("values", "operand", "packed", "scale", "sums", "kept", "metadata")


@pytest.mark.parametrize("outs", [(24,), (24, 8, 40)])
@pytest.mark.parametrize("name", ["w4a4", "w1a1", "w4a4-2:4", "w8a8", "bf16"])
def test_a_stack_is_one_weight(name: str, outs: tuple[int, ...]) -> None:
    """Every tensor of it is the parts' on top of each other, and they are its rows: no copies."""
    parts = [frozen.freeze(_weight(out=n), quest.recipe(name)) for n in outs]
    rows = frozen.stack(parts)
    whole = frozen.stacked(rows)
    assert whole is not None
    assert (whole.whole, whole.weight, whole.state, whole.place) == (None, None, (), 0)
    assert (whole.packed is whole.operand) == (parts[0].packed is parts[0].operand)
    for made in (whole, *rows):
        for key in ("names", "kinds", "spec"):
            assert getattr(made, key) == getattr(parts[0], key)
    for key in ROWS:
        all_, first = getattr(whole, key), 0
        for row, part in zip(rows, parts, strict=True):
            mine, own = getattr(row, key), getattr(part, key)
            assert _same(mine, own)
            if own is not None:
                assert mine.data_ptr() == all_[first:].data_ptr()
                first += len(own)
        assert first == (0 if all_ is None else len(all_))
    for row, part in zip(rows, parts, strict=True):
        assert (row.packed is row.operand) == (part.packed is part.operand)
        assert row.weight is part.weight
        assert row.state == part.state
    assert frozen.stacked(parts) is None
    if len(rows) > 1:
        for others in (rows[:2], rows[1:], rows[::-1], [*rows[:2], rows[0]], [*rows[:2], parts[2]]):
            assert frozen.stacked(others) is None
        again = frozen.stack(parts)
        assert frozen.stacked([rows[0], *again[1:]]) is None
        assert frozen.stacked(again) is not whole


def test_what_is_said_of_a_weight() -> None:
    """Not the calls that were recorded, nor memory that belongs to them."""
    told = repr(frozen.freeze(_weight(), quest.recipe("w4a4")))
    assert "spec=" in told
    assert "calls" not in told
    assert "biases" not in told


def test_what_one_part_lacks_all_lack() -> None:
    parts = [frozen.freeze(_weight(), quest.recipe("w1a1")) for _ in range(2)]
    for lacks in (0, 1):
        mixed = list(parts)
        mixed[lacks] = dataclasses.replace(parts[lacks], packed=None)
        for row, part in zip(frozen.stack(mixed), parts, strict=True):
            assert row.packed is None
            assert _same(row.operand, part.operand)


# --- ways -------------------------------------------------------------------------------------


class Ways:
    """The names of what was called, in order; kept: what recorded calls give."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        self.direct = self.linear = True
        self.kept: Tensor | None = None
        self.asked: list[tuple[Any, ...]] = []
        operators: dict[str, Callable[..., Any]] = {
            "operand": lowbit.operand, "product": lowbit.product,
            "packed": packed.packed_product, "sparse": sparse.sparse_product,
        }  # fmt: skip
        for module, name, key in (
            (lowbit, "operand", "operand"), (lowbit, "launch_operand", "operand"),
            (lowbit, "product", "product"), (lowbit, "launch_product", "product"),
            (frozen, "packed_product", "packed"), (frozen, "launch_packed", "packed"),
            (frozen, "sparse_product", "sparse"), (frozen, "launch_sparse_product", "sparse"),
        ):  # fmt: skip
            launches = name.startswith("launch")
            patch.setattr(module, name, self._way("launch " * launches + key, operators[key]))
        patch.setattr(ops, "direct", lambda x: isinstance(x, Tensor) and self.direct)
        for name in ("again", "recorded", "linear"):
            patch.setattr(direct, name, getattr(self, f"_{name}"))

    def _way(self, name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            self.seen.append(name)
            if name.endswith("packed"):
                assert given[-1] is True  # settled: another kernel has followed that of the codes
            if name == "launch operand":  # which takes the quantizer itself
                given = (given[0], given[1].spec, given[2])
            return operator(*given)

        return run

    def _again(
        self, held: frozen.Frozen, xs: Sequence[Tensor], reads: Sequence[Tensor | None],
        told: direct.Told,
    ) -> tuple[Tensor] | None:  # fmt: skip
        assert told == direct.Told(added=len(xs) > 1)
        self.seen.append("again")
        self.asked.append((*xs, held, *reads))
        return None if self.kept is None else (self.kept,)

    def _recorded(
        self, held: frozen.Frozen, xs: Sequence[Tensor], reads: Sequence[Tensor | None],
        run: Callable[[], tuple[Tensor] | None], told: direct.Told,
    ) -> tuple[Tensor] | None:  # fmt: skip
        assert told == direct.Told(added=len(xs) > 1)
        self.seen.append("recorded")
        self.asked.append((*xs, held, *reads))
        return run()

    def _linear(
        self, x: Tensor, held: frozen.Frozen, bias: Tensor | None, dtype: torch.dtype, gate: bool,
        residual: Tensor | None, rotary: None,
    ) -> tuple[Tensor] | None:  # fmt: skip
        assert not gate
        self.seen.append("direct")
        if not self.linear:
            return None
        rows = lowbit.encode(lowbit.as_rows(x), held.spec, held.kinds.partition(",")[0])
        assert held.operand is not None
        assert held.scale is not None
        assert held.sums is not None
        y: Tensor = lowbit.eager_product(
            rows[0], held.operand, rows[1], held.scale, rows[3], held.sums, bias, held.names,
            held.kinds, x.shape[-1], dtype,
        )  # fmt: skip
        y = y.view(*x.shape[:-1], -1)
        return (y if residual is None else residual + y,)

    def take(self) -> list[str]:
        """What was called since this was asked last."""
        found = self.seen[:]
        self.seen.clear()
        return found


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Ways:
    return Ways(monkeypatch)


HALF, FULL = torch.bfloat16, torch.float32
PRODUCTS = {"w4a4": "packed", "w1a1": "packed", "w4a8": "product", "w8a8": "product"}


@pytest.mark.parametrize("dtype", [HALF, FULL], ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_the_ways_of_few_rows(name: str, dtype: torch.dtype, ways: Ways) -> None:
    """All give the same numbers: those of the operand and the product apart."""
    recipe = quest.recipe(name)
    held = frozen.freeze(_weight(), recipe)
    x, bias = torch.randn(2, 3, 256, dtype=dtype), torch.randn(24)
    apart = ["operand", PRODUCTS[name]]
    ways.direct = False
    plain = dataclasses.replace(held, packed=None)
    for bias_ in (None, bias):
        ways.direct = False
        expected = frozen.linear(x, plain, bias_, recipe)
        assert (expected.shape, expected.dtype) == ((2, 3, 24), dtype)
        assert ways.take() == ["operand", "product"]

        def check(*called: str, given: Tensor | None = bias_, x: Tensor = x) -> None:
            y = frozen.linear(x, held, given, recipe)
            assert torch.equal(y, expected)  # noqa: B023
            assert ways.take() == list(called)

        check(*apart)
        ways.direct = True
        ways.asked.clear()
        check("again", "recorded", "direct")
        for asked in ways.asked:
            assert [a is b for a, b in zip(asked, (x, held, bias_), strict=True)] == [True] * 3
        assert len(ways.asked) == 2
        in_columns = x.mT.contiguous().mT  # which kernels can't read where they lie
        check("again", "direct", x=in_columns)
        ways.linear = False  # where direct launches have another way to take
        launched = [f"launch {way}" for way in apart]
        check("again", "recorded", "direct", *launched)
        check("again", "direct", *launched, x=in_columns)
        ways.linear = True
        if bias_ is not None:  # which no kernel reads where it lies
            strided = torch.stack([bias, bias], -1)[..., 0]
            check(*apart, given=strided)
        ways.kept = expected
        assert frozen.linear(x, held, bias_, recipe) is expected
        assert ways.take() == ["again"]
        ways.kept = None


@pytest.mark.parametrize("dtype", [HALF, FULL], ids=str)
def test_the_ways_with_a_residual(dtype: torch.dtype, ways: Ways) -> None:
    """Those of the operand; where something watches the residual alone, by operators."""
    recipe = quest.recipe("w8a8")
    held = frozen.freeze(_weight(), recipe)
    x, beside, bias = torch.randn(2, 3, 256), torch.randn(2, 3, 24), torch.randn(24)
    x, beside = x.to(dtype), beside.to(dtype)
    assert held.adds(x, beside)
    ways.direct = False
    expected = beside + frozen.linear(x, held, bias, recipe)
    ways.take()

    def check(*called: str, x: Tensor = x) -> None:
        y = frozen.linear(x, held, bias, recipe, residual=beside)
        assert torch.equal(y, expected)
        assert ways.take() == list(called)

    check("operand", "product")
    ways.direct = True
    check("again", "recorded", "direct")
    for asked in ways.asked:
        assert [a is b for a, b in zip(asked, (x, beside, held, bias), strict=True)] == [True] * 4
    assert len(ways.asked) == 2
    check("again", "direct", x=x.mT.contiguous().mT)
    ways.linear = False
    check("again", "recorded", "direct", "launch operand", "launch product")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "direct", lambda t: t is x)
        check("operand", "product")
    ways.kept = expected
    check("again")


def test_the_ways_of_many_rows(ways: Ways) -> None:
    """The operand, or what is left of a 2:4 sparse one, from where on it is read."""
    for name, way in (("w4a4", "product"), ("w4a4-2:4", "sparse")):
        recipe = quest.recipe(name)
        held = frozen.freeze(_weight(128, 8), recipe)
        x = torch.randn(paths.SPARSE_ROWS, 128)
        ways.direct = False
        expected = frozen.linear(x, dataclasses.replace(held, kept=None), None, recipe)
        assert ways.take() == ["operand", "product"]
        assert torch.equal(frozen.linear(x, held, None, recipe), expected)
        assert ways.take() == ["operand", way]
        ways.direct, ways.linear = True, False
        assert torch.equal(frozen.linear(x, held, None, recipe), expected)
        assert ways.take() == ["again", "recorded", "direct", "launch operand", f"launch {way}"]


def test_a_copy_has_no_calls_of_another() -> None:
    """They read the weight that they were recorded of. What is told of a weight is free of them."""
    held = frozen.Frozen(names="grids")
    held.calls[1,] = None
    held.biases[1] = (), torch.zeros(1)
    copy = dataclasses.replace(held, place=1)
    assert not copy.calls
    assert not copy.biases
    assert "names='grids'" in repr(held)
    assert "calls" not in repr(held)
    assert "biases" not in repr(held)
