"""A residual that a product adds: judged, against two operations, and who takes it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import quest
from property_tests.fake_launches import Kept, Kernels, Stream
from property_tests.lane_marks import every_dtype, every_lane, fewer
from property_tests.ledger import LEDGER
from property_tests.products import COMPILED, kinds_of, operands_of
from property_tests.prologues import on_hopper
from property_tests.walled import walled
from quest import direct, frozen, joint, lowbit, ops, paths, prologue, residual
from quest.conformance import backends, examine, inputs, judges
from quest.conformance.lanes import Lane, no_product
from quest.conformance.strategies import DTYPES, SEEDS
from quest.kernels import cuda, hopper, layout, outputs, product, recorded
from quest.kernels import rows as by_row
from quest.models.llama import Block, LlamaConfig, rope_angles

RECIPES = ("w1a1", "w1.58a1.58", "w2a2", "w4a4", "w8a8", "w4a8", "fp4")
BITS = {2: torch.int16, 4: torch.int32}


def _same(t: Tensor, other: Tensor) -> bool:
    """Bit for bit; one NaN is as good as another."""
    assert (t.shape, t.dtype) == (other.shape, other.dtype)
    kind = BITS[t.dtype.itemsize]
    equal = t.contiguous().view(kind) == other.contiguous().view(kind)
    return bool((equal | (t.isnan() & other.isnan())).all())


def _lying(t: Tensor, how: str) -> Tensor:
    """t (rows, columns), laid out otherwise."""
    if how == "at an odd address":
        memory = t.new_empty(t.numel() + 1)[1:].view(t.shape)
    elif how == "apart":
        memory = t.new_empty(t.shape[0], t.shape[1] + 3)[:, 1:-2]
    elif how == "turned":
        memory = t.new_empty(t.shape[::-1]).T
    else:
        return t
    return memory.copy_(t)


LYING = ("as it is", "at an odd address", "apart", "turned")


@every_lane
@pytest.mark.parametrize("name", RECIPES)
@fewer
@given(data=st.data())
def test_it_is_judged(lane: Lane, name: str, data: st.DataObject) -> None:
    """Around tiles of 128 rows and columns; rows of whole vectors and not, wherever they lie."""
    if (reason := no_product(lane)) is not None:
        pytest.skip(reason)
    rows = data.draw(st.sampled_from((5, 1, 63, 130, 257)), label="rows")
    columns = data.draw(st.sampled_from((7, 1, 8, 64, 129, 300)), label="columns")
    width = data.draw(st.sampled_from((64, 8, 136, 1024)), label="in_features")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    kind = data.draw(st.sampled_from(sorted(inputs.DISTRIBUTIONS)), label="distribution")
    how = data.draw(st.sampled_from(LYING), label="residual lies")
    seed = data.draw(SEEDS, label="seed")
    x = inputs.draw("gaussian", (rows, width), dtype, seed)
    w = inputs.draw("gaussian", (columns, width), dtype, seed + 1) / width**0.5
    bias = inputs.draw("gaussian", (columns,), dtype, seed + 2) if seed % 2 else None
    beside = _lying(inputs.draw(kind, (rows, columns), dtype, seed + 3), how)
    told = f"{kind}, {how}, {(rows, width)}, {columns} columns, {dtype}, seed {seed}"
    found = examine.product(lane, x, w, bias, quest.recipe(name), dtype, residual=beside)
    assert [v.stage for v in found] == [
        "accumulators", "product", "added", "accumulators", "product", "added"
    ]  # fmt: skip
    LEDGER.judge(lane, found, told)


@pytest.mark.whole
@every_dtype
@pytest.mark.parametrize("name", ["w1a1", "w4a4"])
def test_what_is_seen(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A residual of another row or column, none, one that is taken off, a rounding that is lost."""
    lane = Lane("torch-cpu", "cpu", "dispatch")
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(6, 128, generator=g).to(dtype), torch.randn(24, 128, generator=g).to(dtype)
    beside, made, real = (
        torch.randn(6, 24, generator=g).to(dtype),
        quest.recipe(name),
        lowbit.product,
    )

    def failures(wrong: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[str]:
        def faulty(*given: Any) -> Tensor:
            if len(given) < 12:
                return real(*given)  # type: ignore[no-any-return]
            exact = real(*given[:10], torch.float32)
            return wrong(given[11], real(*given[:11]), exact).to(given[10])

        monkeypatch.setattr(lowbit, "product", faulty)
        found = examine.product(lane, x, w, None, made, dtype, residual=beside)
        return [v.stage for v in found if v.failure is not None]

    monkeypatch.setattr(backends, "operators", backends.operators.__wrapped__)
    assert failures(lambda r, y, _: r + y) == []
    for wrong in (
        lambda r, y, _: y, lambda r, y, _: r, lambda r, y, _: r - y, lambda r, y, _: y - r,
        lambda r, y, _: r.roll(1, 0) + y, lambda r, y, _: r.roll(1, 1) + y,
        lambda r, y, _: r + r + y,
    ):  # fmt: skip
        assert failures(wrong) == ["added"]
    if dtype != torch.float32:
        assert failures(lambda r, _, exact: r.float() + exact) == ["added"]


@pytest.mark.whole
@every_dtype
@pytest.mark.parametrize("how", LYING)
def test_it_is_the_product_and_an_addition(how: str, dtype: torch.dtype) -> None:
    """Bit for bit, also beside infinities and NaN; laid out as any result; nothing is changed."""
    for name, columns in (("w1a1", 24), ("w4a4", 13), ("w8a8", 24)):
        x, w = (inputs.draw("gaussian", (n, 128), torch.float32, n) for n in (7, columns))
        made = operands_of(name, x, w * 2.0**100, w[:, 0].to(dtype), dtype)  # float16: infinite
        made[2][::2] *= 2.0**-100
        beside = _lying(inputs.draw("non_finite", (7, columns), dtype, 1), how)
        before = beside.clone()
        y = lowbit.product(*made)
        for function in (lowbit.product, lowbit.eager_product):
            h = function(*made, beside)
            assert _same(h, beside + y)
            assert _same(h, function(*made, beside))
            assert h.is_contiguous()
            assert h.data_ptr() != beside.data_ptr()
            assert _same(beside, before)
            assert _same(function(*made, None), y)


def test_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowbit, "require_product", lambda _: None)
    made = operands_of("w4a4", torch.randn(3, 128), torch.randn(8, 128), None, torch.bfloat16)
    fits = torch.zeros(3, 8, dtype=torch.bfloat16)
    fakes = [torch.empty_like(t, device="meta") if isinstance(t, Tensor) else t for t in made]
    for wrong in (
        fits[:1], fits[:, :7], fits[0], fits[None], fits.T, fits.float(), fits.half(),
        torch.zeros(3, 8, dtype=torch.int16),
    ):  # fmt: skip
        told = rf"residual must be torch.bfloat16 of shape \(3, 8\) on cpu, got {wrong.dtype} of"
        for function in (lowbit.product, lowbit.eager_product, lowbit.launch_product):
            with pytest.raises(ValueError, match=told):
                function(*made, wrong)
        with pytest.raises(ValueError, match="residual must be"):
            torch.ops.quest.product(*fakes, wrong.to("meta"))
    with pytest.raises(ValueError, match=r"got torch\.bfloat16 of shape .* on meta"):
        lowbit.eager_product(*made, fits.to("meta"))


def test_what_the_kernel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a product that it adds what was given, where it lies; and nothing of any other."""
    told: list[dict[str, Any]] = []

    def kernel(a: Tensor, b: Tensor, out: torch.dtype, **how: Any) -> Tensor:
        told.append(how)
        return a.new_empty((a.shape[0], b.shape[0]), dtype=out)

    monkeypatch.setattr(product, "product", kernel)
    monkeypatch.setattr(lowbit, "require_product", lambda _: None)
    made = operands_of("w4a4", torch.randn(3, 128), torch.randn(8, 128), None, torch.bfloat16)
    beside = torch.zeros(3, 8, dtype=torch.bfloat16)
    for more in ((), (None,), (beside,)):
        lowbit.launch_product(*made, *more)
        how = told.pop()
        assert how["residual"] is (more[0] if more else None)
        assert how["gate"] is False
        assert not told


@pytest.mark.whole
@pytest.mark.parametrize("shape", [(3, 8), (0, 8), (3, 0)], ids=str)
def test_opcheck(shape: tuple[int, int]) -> None:
    x, w = torch.randn(shape[0], 128), torch.randn(shape[1], 128)
    made = operands_of("w4a4", x, w, None, torch.float16)
    for beside in (torch.ones(shape).half(), torch.ones(shape[::-1]).half().T):
        torch.library.opcheck(torch.ops.quest.product.default, (*made, beside))
        assert lowbit.product(*made, beside).shape == shape


def test_bits_are_told_apart() -> None:
    """What `_same` says, on which this file rests."""
    nan, inf = float("nan"), float("inf")
    t = torch.tensor([1.0, nan, inf, -0.0])
    assert _same(t, t.clone())
    for i, other in ((0, 1.0 + 2**-23), (1, 0.0), (2, -inf), (3, 0.0)):
        wrong = t.clone()
        wrong[i] = other
        assert not _same(t, wrong)


@pytest.mark.whole
@pytest.mark.parametrize(("binary", "tiles"), COMPILED)
def test_nothing_is_spilled(binary: bool, tiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ptxas says of registers: a residual takes some, beside 128 accumulators a thread."""
    core = pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    asked: list[dict[str, int]] = []
    monkeypatch.setattr(cuda, "compile_", lambda *told, cached: asked.append(told[2]))
    for out, bias in ((torch.bfloat16, 0), (torch.bfloat16, 2), (torch.float32, 0)):
        product.compile_(
            binary, hopper.CORRECTED, out, bias, product.KINDS[tiles], residual=True
        )  # fmt: skip
        options = core.ProgramOptions(
            std="c++17", arch=hopper.ARCHITECTURE, ptxas_options="-v",
            define_macro=[(name, str(value)) for name, value in asked[-1].items()],
        )  # fmt: skip
        told = io.StringIO()
        core.Program(cuda._text("product.cu"), "c++", options).compile("cubin", logs=told)
        assert re.findall(r"(\d+) bytes (?:stack|spill)", told.getvalue()) == ["0"] * 3


# --- who takes it -----------------------------------------------------------------------------

WIDTH, OUT, ROWS = 256, 384, 60
HALF = torch.bfloat16


class Layer:
    """A frozen layer as on Hopper, on a CPU whose kernels are fakes."""

    def __init__(
        self, patch: pytest.MonkeyPatch, recipe: str = "w4a4", bias: bool = True,
        dtype: torch.dtype = HALF, out: int = OUT,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        direct._plan.cache_clear()
        self.kernels = Kernels(patch)
        self.kernels.activation = quest.recipe(recipe).activation
        Stream(patch)
        patch.setattr(paths, "has_integers", lambda *_: True)
        patch.setattr(prologue, "has_kernel", lambda *_: True)
        self.layer = quest.Linear(WIDTH, out, bias, recipe).to(dtype).eval().freeze()
        assert self.layer._frozen is not None
        self.held = self.layer._frozen

    def seen(self, run: Callable[[], Any], *read: Tensor) -> list[str]:
        """What was launched, or "again" for each recorded call that was queued."""
        held = self.held
        found = (held.operand, held.packed, held.scale, held.sums, self.layer.bias, *read)
        self.kernels.memory += [t for t in found if t is not None]
        self.kernels.take()
        before = len(Kept.all)
        self.made = run()
        return ["again"] * (len(Kept.all) - before) + self.kernels.take()


@pytest.fixture(autouse=True)
def _no_plan() -> Iterator[None]:
    with torch.no_grad():
        yield
    direct._plan.cache_clear()


def _inputs(
    rows: int | tuple[int, ...] = ROWS, dtype: torch.dtype = HALF, out: int = OUT
) -> tuple[Tensor, Tensor]:
    lead, g = (rows,) if isinstance(rows, int) else rows, torch.Generator().manual_seed(7)
    x, beside = (torch.randn(*lead, n, generator=g).to(dtype) for n in (WIDTH, out))
    return x, beside


@pytest.mark.whole
@every_dtype
@pytest.mark.parametrize("recipe", ["w1a1", "w4a4", "w8a8"])
@pytest.mark.parametrize("bias", [False, True])
def test_one_kernel_multiplies_and_adds(
    recipe: str, bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes out is that of two operations; at the third call it is recorded."""
    made = Layer(monkeypatch, recipe, bias, dtype)
    held = made.held
    for lead in ((ROWS,), (2, ROWS), (1, 3, ROWS)):
        x, beside = _inputs(lead, dtype)
        made.seen(lambda: made.layer(x), x)  # noqa: B023
        expected = beside + made.made
        held.calls.clear()  # a recorded call writes nothing here

        def run() -> Tensor:
            return quest.added(x, made.layer, beside)  # noqa: B023

        for _ in range(2):
            assert made.seen(run, beside) == ["blocks", "added product"]
            assert _same(made.made, expected)
        with monkeypatch.context() as patch:
            patch.setattr(quest.Linear, "check", lambda *_: pytest.fail("checked again"))
            assert made.seen(run) == ["again"]
        assert (made.made.shape, made.made.dtype) == (expected.shape, dtype)
        addresses = Kept.all[-1][1]
        assert addresses == (x.data_ptr(), beside.data_ptr(), made.made.data_ptr())
        assert Kept.all[-1][0].told[1:3] == addresses[:2]
        # The layer's own call is another.
        assert made.seen(lambda: made.layer(x)) == ["blocks", "product"]  # noqa: B023


def test_other_addresses_of_a_recorded_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Layer(monkeypatch)
    x, beside = _inputs()
    for _ in range(2):
        made.seen(lambda: quest.added(x, made.layer, beside), beside)
    others = x.clone(), beside.clone()
    assert made.seen(lambda: quest.added(others[0], made.layer, others[1])) == ["again"]
    assert Kept.all[-1][1][:2] == tuple(t.data_ptr() for t in others)


def test_what_has_two_inputs_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate with its value, an addition, and a norm of a sum, of the same two tensors."""
    made = Layer(monkeypatch, out=WIDTH)
    x, beside = _inputs(out=WIDTH)
    norm = nn.RMSNorm(WIDTH, 1e-5, dtype=HALF)
    kinds: list[tuple[Callable[[], Any], list[str]]] = [
        (lambda: quest.added(x, made.layer, beside), ["blocks", "added product"]),
        (lambda: quest.gated(x, beside, made.layer), ["gated", "product"]),
        (lambda: quest.normed(x, norm, (made.layer,), beside), ["added", "product"]),
    ]
    for run, first in kinds:
        assert made.seen(run, x, beside) == first
        assert made.seen(run, x, beside) == first
    told = []
    for run, _ in kinds:
        assert made.seen(run) == ["again"]
        told.append(id(Kept.all[-1][0]))
    assert len(set(told)) == 3


@pytest.mark.whole
@pytest.mark.parametrize("how", [*LYING[1:], "the input itself"])
def test_a_residual_that_is_not_recorded(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lies otherwise is copied for the kernel at each call, or at one too many places."""
    made = Layer(monkeypatch, out=WIDTH)
    x, beside = _inputs(out=WIDTH)
    beside = x if how == "the input itself" else _lying(beside, how)
    told: list[int] = []
    launch, aligned = product.launch, layout.aligned

    def launched(*given: Any) -> None:
        told.append(given[-2])
        launch(*given)

    def copied(t: Tensor) -> Tensor:
        made.kernels.memory.append(aligned(t))
        return made.kernels.memory[-1]

    class Again(Kept):
        """As recorded launches are: each address is one parameter of one launch."""

        def __init__(
            self, taken: list[Any], stream: int, *addresses: int, copies: recorded.Copies
        ) -> None:
            if addresses[1] != told[-1] or addresses[0] == addresses[1]:
                raise ValueError("the addresses stand in other places")
            super().__init__(taken, stream, *addresses, copies=copies)

    monkeypatch.setattr(product, "launch", launched)
    monkeypatch.setattr(layout, "aligned", copied)
    monkeypatch.setattr(recorded, "Again", Again)
    made.seen(lambda: made.layer(x), x)
    expected = beside + made.made
    for _ in range(4):
        found = made.seen(lambda: quest.added(x, made.layer, beside), beside)
        assert found == ["blocks", "added product"]
        assert _same(made.made, expected)
    assert all(at % 16 == 0 for at in told)
    assert (told[-1] == beside.data_ptr()) == (how == "the input itself")


@pytest.mark.whole
@pytest.mark.parametrize(
    "case",
    ["few rows", "hooked", "grad", "not frozen", "values", "broadcast", "a row",
     "another dtype", "autocast", "2:4", "of another module"],
)  # fmt: skip
def test_who_does_not_take_it(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are those of the layer and of an addition all the same."""
    rows = {"few rows": 3, "2:4": paths.SPARSE_ROWS}.get(case, ROWS)
    made = Layer(monkeypatch, "w4a4-2:4" if case == "2:4" else "w4a4")
    layer: Any = made.layer
    x, beside = _inputs(rows)
    calls: list[int] = []
    if case == "hooked":
        layer.register_forward_hook(lambda *_: calls.append(1))
    elif case == "not frozen":
        layer.train()
    elif case == "values":
        monkeypatch.setattr(paths, "allows", lambda path: path == "values")
    elif case == "broadcast":
        beside = beside[0]
    elif case == "a row":
        beside = beside[:1]
    elif case == "another dtype":
        beside = beside.float()
    elif case == "of another module":
        layer = nn.Sequential(layer)
    for name in ("product", "launch_product"):
        real = getattr(lowbit, name)

        def noted(*given: Any, real: Callable[..., Tensor] = real, **how: Any) -> Tensor:
            assert len(given) < 12
            return real(*given, **how)

        monkeypatch.setattr(lowbit, name, noted)
    if case in ("2:4", "autocast", "not frozen", "values"):  # without a kernel, by plain operators
        monkeypatch.setattr(ops, "direct", lambda _: False)
        monkeypatch.setattr(paths, "choose", lambda *_: "values")
    if case == "autocast":
        layer.float().freeze()
        x, beside = x.float(), beside.float()  # which is not the dtype of what comes out

    def run(function: Callable[[], Tensor]) -> Tensor:
        cast = torch.autocast("cpu", HALF, enabled=case == "autocast")
        with torch.set_grad_enabled(case == "grad"), cast:
            return function()

    seen = made.seen(lambda: run(lambda: quest.added(x, layer, beside)), x)
    assert "added product" not in seen
    assert len(calls) == (case == "hooked")
    expected = run(lambda: beside + layer(x))
    found = made.made
    assert _same(found.detach(), expected.detach())
    assert found.requires_grad == (case == "grad")


def test_which_residuals_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Like what comes out, of any number of rows that are not read packed; and a row by itself."""
    made = Layer(monkeypatch, "w8a8")
    held = made.held
    x, beside = _inputs()
    assert held.packed is None
    for t, other in ((x, beside), (x[0], beside[0]), (x[None], beside[None]), (x[:0], beside[:0])):
        assert held.adds(t, other)
        assert not held.adds(t, other[..., 1:])
        assert not held.adds(t, other.float())
        assert not held.adds(t, other.to("meta"))
        assert not held.adds(t, other[None])
    assert held.adds(x.float(), beside.float())
    assert not held.adds(x[0, 0], beside[0])
    assert not frozen.Frozen(values=x).adds(x, beside)


def test_what_is_no_layer_and_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    made, none, word = Layer(monkeypatch), None, "rows"
    x, beside = _inputs()
    wrong: Any
    for wrong in (none, word, (made.layer,)):
        with pytest.raises(TypeError, match=r"layer must be a torch\.nn\.Module, got \w+"):
            quest.added(x, wrong, beside)
    for wrong in (none, word, 1.0):
        with pytest.raises(TypeError, match=r"residual must be a torch\.Tensor, got \w+"):
            quest.added(x, made.layer, wrong)
        with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got \w+"):
            quest.added(wrong, made.layer, beside)
    with pytest.raises(ValueError, match="x must have 256 columns"):
        quest.added(x[:, 1:], made.layer, beside)
    with pytest.raises(TypeError, match="x must have the weight's dtype"):
        quest.added(x.half(), made.layer, beside)
    with pytest.raises(RuntimeError, match="must match the size"):
        quest.added(x, nn.Linear(WIDTH, OUT, dtype=HALF), beside[:, 1:])


@pytest.mark.whole
@every_dtype
@pytest.mark.parametrize("name", ["w1a1", "w4a4", "w4a4-2:4", "fp4"])
def test_by_operators(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where something watches: one operator with a residual, and its bits."""
    monkeypatch.setattr(paths, "has_integers", lambda *_: True)
    torch.manual_seed(0)
    layer = quest.Linear(WIDTH, OUT, True, name).to(dtype).eval().freeze()
    given: list[Any] = []
    real = lowbit.product

    def noted(*told: Any) -> Tensor:
        given.append(told[11:])
        y: Tensor = real(*told)
        return y

    monkeypatch.setattr(lowbit, "product", noted)
    for lead in ((ROWS,), (2, ROWS), (1,)):
        x, beside = _inputs(lead, dtype)
        expected = beside + layer(x)
        given.clear()
        assert _same(quest.added(x, layer, beside), expected)
        taken = name in ("w4a4-2:4", "fp4") or lead != (1,)
        assert [len(told) for told in given] == ([1] if taken else [])
    turned = beside.new_empty(OUT, ROWS).T
    x, beside = _inputs(ROWS, dtype)
    turned.copy_(beside)
    assert _same(quest.added(x, layer, turned), beside + layer(x))


@pytest.mark.whole
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, whose product adds; the same bits."""
    monkeypatch.setattr(paths, "has_integers", lambda *_: True)
    torch.manual_seed(0)
    layer = quest.Linear(WIDTH, OUT, True, "w4a4").to(HALF).eval().freeze()
    x, beside = _inputs()
    given: list[int] = []
    real = lowbit.eager_product
    monkeypatch.setattr(
        lowbit, "eager_product", lambda *told: (given.append(len(told)), real(*told))[1]
    )

    def run(x: Tensor, beside: Tensor) -> Tensor:
        return quest.added(x, layer, beside) * 2

    expected = (beside + layer(x)) * 2
    given.clear()
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for _ in range(2):
        assert _same(compiled(x, beside), expected)
    assert given == [12, 12]
    torch.compiler.reset()


# --- in an MLP and in a model -----------------------------------------------------------------


def _noted(patch: pytest.MonkeyPatch) -> list[bool]:
    """Of each product by the operator whether it adds."""
    seen: list[bool] = []
    real = lowbit.product

    def noted(*told: Any) -> Tensor:
        seen.append(len(told) > 11 and told[11] is not None)
        y: Tensor = real(*told)
        return y

    patch.setattr(lowbit, "product", noted)
    return seen


@pytest.mark.whole
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, ROWS])
def test_a_swiglu_is_added(
    rows: int, dtype: torch.dtype, stacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its last product behind one kernel for gate and up; elsewhere by an addition."""
    monkeypatch.setattr(paths, "has_integers", lambda *_: True)
    torch.manual_seed(0)
    gate, up, down = (
        quest.Linear(inside, out, False, "w4a4").to(dtype).eval().freeze()
        for inside, out in ((WIDTH, OUT), (WIDTH, OUT), (OUT, WIDTH))
    )
    if stacked:
        assert joint.stack((gate, up))
    norm = nn.RMSNorm(WIDTH, 1e-5, dtype=dtype)
    x, beside = _inputs(rows, dtype, WIDTH)
    seen = _noted(monkeypatch)
    for given_ in (None, beside):
        h, y = quest.normed_swiglu(x, norm, gate, up, down, given_)
        assert not any(seen)
        seen.clear()
        same, out = quest.normed_swiglu(x, norm, gate, up, down, given_, add=True)
        assert _same(same, h)
        assert _same(out, h + y)
        assert any(seen) == (stacked and rows == ROWS and dtype != torch.float32)
        seen.clear()


@pytest.mark.whole
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [3, ROWS])
def test_a_block_of_a_llama(
    tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit that of its parts, called one after another; both sums are the products'."""
    monkeypatch.setattr(paths, "has_integers", lambda *_: True)
    config = LlamaConfig(16, 1, 256, 2)
    torch.manual_seed(0)
    block = Block(config).to(dtype)
    quest.freeze_(quest.quantize_(block, "w4a4"))
    x = torch.randn(1, tokens, 256).to(dtype)
    cos, sin = rope_angles(config, tokens, x.device)
    attention, mlp = block.self_attn, block.mlp
    h = x + attention(block.input_layernorm(x), cos, sin)
    expected = h + mlp(block.post_attention_layernorm(h))
    seen = _noted(monkeypatch)
    assert _same(block(x, cos, sin), expected)
    few = tokens == 3
    assert sum(seen) == (0 if few else 1 if dtype == torch.float32 else 2)
    # Where something must see a module's call, it does.
    calls: list[int] = []
    attention.register_forward_hook(lambda *_: calls.append(1))
    assert _same(block(x, cos, sin), expected)
    assert calls == [1]


def test_what_a_block_leaves_to_its_second_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum that no product makes, for a norm's kernel can; and nothing else."""
    monkeypatch.setattr(paths, "has_integers", lambda *_: True)
    layer = quest.Linear(WIDTH, OUT, False, "w4a4").to(HALF).eval().freeze()
    for rows, left in ((3, True), (ROWS, False)):
        x, beside = _inputs(rows)
        y, rest = residual.apart(x, layer, beside)
        assert (rest is beside) == left
        assert (rest is None) == (not left)
        assert _same(y if rest is None else rest + y, beside + layer(x))


# --- on a GPU ---------------------------------------------------------------------------------


@on_hopper
@pytest.mark.whole
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("processors", [2, 6, 132])
@pytest.mark.parametrize(("name", "tiles"), kinds_of("w1a1", "w4a4", "w4a8"))
def test_the_kernel_s_bits(
    name: str, tiles: str, processors: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few and many tiles, ragged ones, biases, rows near and far, residuals of any numbers."""
    monkeypatch.setattr(cuda, "processors", lambda _: processors)
    for rows, columns, width in ((1, 128, 128), (257, 381, 400), (700, 1160, 1168), (63, 9, 128)):
        g = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, width, generator=g)
        x *= torch.tensor([1.0, 1e32, 1e-32])[torch.arange(rows) % 3, None]
        w = torch.randn(columns, width, generator=g) / width**0.5
        w *= torch.tensor([1.0, 1e-32, 1e32, 4.0])[torch.arange(columns) % 4, None]
        bias = torch.randn(columns, generator=g)
        for i, given_ in enumerate((None, bias, bias.to(dtype))):
            made = [
                t.cuda() if isinstance(t, Tensor) else t
                for t in operands_of(name, x, w, given_, dtype)
            ]
            drawn = inputs.draw(("gaussian", "non_finite", "heavy")[i], (rows, columns), dtype, i)
            for how in LYING:
                beside = _lying(drawn.cuda(), how)
                with product.only(product.KINDS[tiles]), outputs.poisoned(0x55):
                    y, h, again = (
                        lowbit.product(*made, t) for t in (None, beside, beside)
                    )  # fmt: skip
                assert _same(h, beside + y)
                assert torch.equal(h.view(BITS[dtype.itemsize]), again.view(BITS[dtype.itemsize]))
            judges.added(y.cpu(), drawn, h.cpu()).require()


@on_hopper
@pytest.mark.whole
@pytest.mark.parametrize("front", [False, True], ids=["behind", "before"])
@pytest.mark.parametrize("columns", [128, 104, 99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_read_or_written_beside_it(
    dtype: torch.dtype, columns: int, front: bool
) -> None:
    """Of rows and columns that fill a part of a tile; of whole vectors and not."""
    for rows in (40, 1, 129):
        made = [
            t.cuda() if isinstance(t, Tensor) else t
            for t in operands_of(
                "w4a4", torch.randn(rows, 128), torch.randn(columns, 128), None, dtype
            )
        ]
        beside = torch.randn(rows, columns).to(dtype)
        expected = beside.cuda() + lowbit.product(*made)
        at, terms = cuda.pointer, lowbit.terms(*made[7:9], 128)
        for tiles in product.KINDS.values():
            memory = torch.full((rows + 2, columns), 7.0, dtype=dtype, device="cuda")
            with walled(beside, front) as edged, product.only(tiles):
                if edged.data_ptr() % 16:  # where `product` would copy it
                    continue
                # y lies one row down, at 16 bytes where rows are whole vectors.
                y = memory[1:-1] if columns * dtype.itemsize % 16 == 0 else memory
                product.launch(
                    y.data_ptr(), at(made[0]), at(made[1]), rows, columns, 128,
                    memory.device.index, dtype, False,
                    hopper.CORRECTED if terms.corrected else hopper.PLAIN, terms.length,
                    terms.factor, at(made[2]), at(made[3]), 0,
                    at(made[4]) if terms.rows else 0, at(made[5]) if terms.columns else 0,
                    False, 0, residual=edged.data_ptr(),
                )  # fmt: skip
                torch.cuda.synchronize()
            assert torch.equal(y[:rows], expected)
            rest = memory[rows:] if y is memory else memory[:: rows + 1]
            assert bool((rest == 7.0).all())


@on_hopper
@pytest.mark.whole
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recipe", ["w1a1", "w4a4", "w8a8", "w4a4-2:4"])
@pytest.mark.parametrize("rows", [3, 40, 600])
def test_a_layer_on_hopper(rows: int, recipe: str, compiled: bool) -> None:
    """Eager, recorded, compiled and in a CUDA graph: the bits of two operations."""
    torch.manual_seed(0)
    for dtype in (HALF, torch.float32):
        layer = quest.Linear(512, 384, True, recipe).to("cuda", dtype).eval().freeze()
        x, beside = (torch.randn(rows, n, device="cuda").to(dtype) for n in (512, 384))

        def run(x: Tensor, beside: Tensor) -> Tensor:
            return quest.added(x, layer, beside)  # noqa: B023

        expected = beside + layer(x)
        if compiled:
            torch.compiler.reset()
            run = torch.compile(run, fullgraph=True)
        for _ in range(4):
            assert _same(run(x, beside), expected)
        others = x.flip(0).contiguous(), beside.flip(1).contiguous()
        assert _same(run(*others), others[1] + layer(others[0]))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(x, beside)
        x.copy_(others[0])
        beside.copy_(others[1])
        graph.replay()
        assert _same(captured, others[1] + layer(others[0]))


@on_hopper
@pytest.mark.whole
@pytest.mark.parametrize("recipe", ["w1a1", "w4a4", "w8a8"])
@pytest.mark.parametrize("tokens", [3, 60, 600])
def test_a_block_on_hopper(tokens: int, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its products add is what additions behind them make: eager and recorded."""
    # A norm of a sum is of another kernel than one of few rows: squares in another order.
    monkeypatch.setattr(by_row, "takes", lambda *_: False)
    config = LlamaConfig(16, 1, 512, 4)
    torch.manual_seed(0)
    block = Block(config).to("cuda", HALF)
    quest.freeze_(quest.quantize_(block, recipe))
    x = torch.randn(1, tokens, 512, device="cuda").to(HALF)
    cos, sin = rope_angles(config, tokens, x.device)
    with monkeypatch.context() as patch:
        patch.setattr(frozen.Frozen, "adds", lambda *_: False)
        expected = block(x, cos, sin)
    for _ in range(4):
        assert _same(block(x, cos, sin), expected)
