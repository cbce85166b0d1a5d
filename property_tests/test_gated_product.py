"""Two products that end in a gate: judged, against a product and its gate, and who takes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import quest
from property_tests.fake_launches import Kept, Kernels, Stream
from property_tests.lane_marks import every_lane, fewer
from property_tests.ledger import LEDGER
from property_tests.products import kinds_of, operands_of
from quest import direct, eager, frozen, joint, lowbit, operands, ops, paths, prologue
from quest.conformance import examine, inputs, judges
from quest.conformance.lanes import Lane, no_product
from quest.conformance.strategies import SEEDS
from quest.gated_product import (
    HALVES,
    eager_gated_product,
    gated_product,
    launch_gated_product,
)
from quest.kernels import cuda, hopper, product

RECIPES = ("w1a1", "w1.58a1.58", "w2a2", "w4a4", "w8a8", "w4a8", "fp4", "w4a4-2:4")


def _names(made: quest.Recipe) -> tuple[str, tuple[str, str]]:
    kinds = operands.kinds(made.activation, made.weight)
    assert kinds is not None
    return ",".join(q.require_grid().name for q in (made.activation, made.weight)), kinds


@every_lane
@pytest.mark.parametrize("name", RECIPES)
@fewer
@given(data=st.data())
def test_it_is_judged(lane: Lane, name: str, data: st.DataObject) -> None:
    if (reason := no_product(lane)) is not None:
        pytest.skip(reason)
    # Around the tiles of 128 rows and of 64 and 128 columns of each.
    rows = data.draw(st.sampled_from((5, 1, 130, 257)), label="rows")
    columns = data.draw(st.sampled_from((7, 1, 64, 129, 300)), label="columns")
    width = data.draw(st.sampled_from((64, 8, 136, 1024)), label="in_features")
    dtype = data.draw(st.sampled_from(HALVES), label="dtype")
    kind = data.draw(st.sampled_from(sorted(inputs.DISTRIBUTIONS)), label="distribution")
    times = data.draw(st.sampled_from((1.0, 8.0, 0.01)), label="times")
    seed = data.draw(SEEDS, label="seed")
    x = inputs.draw(kind, (rows, width), dtype, seed)
    w = inputs.draw("gaussian", (2 * columns, width), dtype, seed + 1) * (times / width**0.5)
    bias = inputs.draw("gaussian", (2 * columns,), dtype, seed + 2) if seed % 2 else None
    told = f"{kind}, {(rows, width)}, {columns} columns, times {times}, {dtype}, seed {seed}"
    found = examine.product(lane, x, w, bias, quest.recipe(name), dtype, gate=True)
    assert [v.stage for v in found] == [
        "accumulators", "gated product", "accumulators", "gated product"
    ]  # fmt: skip
    LEDGER.judge(lane, found, told)


@pytest.mark.whole
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["w1a1", "w4a4", "w8a8"])
def test_the_judge_bites(name: str, dtype: torch.dtype) -> None:
    """A gate of the other half, none, no bias, a scale or a column of another, a lost rounding."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(6, 128, generator=g), torch.randn(24, 128, generator=g) / 4
    bias = torch.randn(24, generator=g)
    made = operands_of(name, x, w, bias, dtype)
    q, kinds = quest.recipe(name), _names(quest.recipe(name))[1]
    whole = tuple(judges.whole(t, kind, 128) for t, kind in zip(made[:2], kinds, strict=True))
    units = tuple(
        operands.form(side.require_grid(), kind).unit
        for side, kind in zip((q.activation, q.weight), kinds, strict=True)
    )

    def failure(t: Tensor) -> str | None:
        told = (whole[0], whole[1]), (units[0], units[1]), (made[2], made[3]), bias
        return judges.gated_product(*told, t.to(dtype)).failure

    y = lowbit.product(*made[:-1], torch.float32)
    gate, value = y.chunk(2, -1)
    right = eager.gated(gate, value)
    assert failure(right) is None
    assert failure(eager.gated(gate.to(dtype), value.to(dtype))) is None
    assert failure(gated_product(*made)) is None
    plain = [
        t.clone() for t in lowbit.product(*made[:6], None, *made[7:-1], torch.float32).chunk(2, -1)
    ]
    step = 2.0 ** (-6 if dtype == torch.bfloat16 else -9)
    for wrong in (
        eager.gated(value, gate), gate * value, gate, eager.gated(*plain),
        eager.gated(gate.roll(1, -1), value), eager.gated(gate, value.roll(1, 0)),
        right * (1 + step), eager.gated(gate, plain[1]), eager.gated(gate.abs(), value),
        torch.sigmoid(gate) * value,
    ):  # fmt: skip
        assert failure(wrong) is not None


def test_far_values_are_free() -> None:
    """Where a gate or a value may leave the dtype; and nowhere else."""
    whole = np.full((1, 1), 1000.0), np.array([[1.0], [1.0], [100.0], [1.0]])
    scales = torch.ones(1, 1), torch.tensor([[1.0], [60.0], [1.0], [70.0]])
    for x, right in (
        ([[float("inf"), float("inf")]], True),
        ([[float("nan"), float("-inf")]], True),
        ([[float("inf"), 3.0]], False),
        ([[1.0, float("nan")]], False),
    ):
        made = judges.gated_product(whole, (1.0, 1.0), scales, None, torch.tensor(x).half())
        assert (made.failure is None) == right
    scales[1][:] = 1.0
    for wrong in ([[1e6, float("nan")]], [[float("nan"), 1e6]], [[1e8, 1e6]]):
        told = judges.gated_product(whole, (1.0, 1.0), scales, None, torch.tensor(wrong).float())
        assert (told.failure is None) == (wrong == [[1e8, 1e6]])


def test_what_does_not_fit() -> None:
    x, w = torch.randn(3, 128), torch.randn(8, 128)
    made = operands_of("w4a4", x, w, None, torch.bfloat16)
    for function in (gated_product, eager_gated_product):
        with pytest.raises(TypeError, match=r"dtype must be bfloat16 or float16, got .*float32"):
            function(*made[:-1], torch.float32)
        odd = operands_of("w4a4", x, w[:5], None, torch.bfloat16)
        with pytest.raises(ValueError, match=r"as many rows for the gate .* got shape \(5, 128\)"):
            function(*odd)
        with pytest.raises(ValueError, match="a_scale must be"):
            function(*made[:2], made[2][:1], *made[3:])
    for function in (eager_gated_product, launch_gated_product):
        with pytest.raises(ValueError, match=r"got shape \(\)"):
            function(made[0], made[1][0, 0], *made[2:])
    fakes = [torch.empty_like(t, device="meta") if isinstance(t, Tensor) else t for t in made]
    with pytest.raises(TypeError, match="dtype must be"):
        torch.ops.quest.gated_product(*fakes[:-1], torch.float32)
    with pytest.raises(ValueError, match="b must hold as many rows"):
        torch.ops.quest.gated_product(fakes[0], fakes[1][1:], *fakes[2:])


def test_what_the_kernel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a product that it ends in a gate, and of no other."""
    told: list[dict[str, Any]] = []

    def kernel(a: Tensor, b: Tensor, out: torch.dtype, **how: Any) -> Tensor:
        told.append(how)
        return a.new_empty((a.shape[0], b.shape[0]), dtype=out)

    monkeypatch.setattr(product, "product", kernel)
    monkeypatch.setattr(lowbit, "require_product", lambda _: None)
    made = operands_of("w4a4", torch.randn(3, 128), torch.randn(8, 128), None, torch.bfloat16)
    for launch, gate in ((lowbit.launch_product, False), (launch_gated_product, True)):
        assert launch(*made).dtype == torch.bfloat16
        assert told.pop()["gate"] is gate
        assert not told


@pytest.mark.whole
@pytest.mark.parametrize("shape", [(3, 8), (0, 8), (3, 0)], ids=str)
def test_opcheck(shape: tuple[int, int]) -> None:
    made = operands_of(
        "w4a4", torch.randn(shape[0], 128), torch.randn(shape[1], 128), None, HALVES[0]
    )
    torch.library.opcheck(torch.ops.quest.gated_product.default, tuple(made))
    assert gated_product(*made).shape == (shape[0], shape[1] // 2)


# --- on a GPU ---------------------------------------------------------------------------------


def _require_hopper() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if (
        reason := hopper.unavailable(torch.device("cuda", torch.cuda.current_device()))
    ) is not None:
        pytest.skip(reason)


@pytest.mark.whole
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("processors", [2, 6, 132])
@pytest.mark.parametrize(("name", "tiles"), kinds_of("w1a1", "w4a4", "w4a8"))
def test_it_is_the_product_and_its_gate(
    name: str, tiles: str, processors: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: of few and many tiles, ragged ones, biases, and rows near and far."""
    _require_hopper()
    monkeypatch.setattr(cuda, "processors", lambda _: processors)
    for rows, columns, width in ((1, 128, 128), (257, 384, 400), (700, 1152, 1168)):
        g = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, width, generator=g)
        x *= torch.tensor([1.0, 1e32, 1e-32])[torch.arange(rows) % 3, None]
        w = torch.randn(2 * columns, width, generator=g) / width**0.5
        w *= torch.tensor([1.0, 1e-32, 1e32, 4.0])[torch.arange(2 * columns) % 4, None]
        bias = torch.randn(2 * columns, generator=g)
        for added in (None, bias, bias.to(dtype)):
            made = [
                t.cuda() if isinstance(t, Tensor) else t
                for t in operands_of(name, x, w, added, dtype)
            ]
            with product.only(product.KINDS[tiles]):
                y, found = lowbit.product(*made), gated_product(*made)
            spec, kind = quest.recipe("w4a4").activation.spec, "integers"
            shown = prologue.gated_encode_shown(y[:, :columns], y[:, columns:], spec, kind)[3]
            assert torch.equal(found.view(torch.int16), shown.view(torch.int16))
            judges.gated(y[:, :columns].cpu(), y[:, columns:].cpu(), found.cpu()).require()


@pytest.mark.whole
def test_columns_that_fill_no_tile() -> None:
    """A gate's last tile reads rows of the value: what comes of them is written nowhere."""
    _require_hopper()
    for columns in (1, 5, 63, 65, 127, 129, 200):
        for name in ("w1a1", "w4a4"):
            x, w = torch.randn(70, 256), torch.randn(2 * columns, 256) / 16
            made = [
                t.cuda() if isinstance(t, Tensor) else t
                for t in operands_of(name, x, w, torch.randn(2 * columns), torch.bfloat16)
            ]
            memory = torch.full((72 * columns,), 7.0, dtype=torch.bfloat16, device="cuda")
            terms = lowbit.terms(*made[7:9], 256)
            a, b, at = made[0], made[1], cuda.pointer
            for tiles in product.KINDS.values():
                memory.fill_(7.0)
                with product.only(tiles):
                    product.launch(
                        memory[columns:].data_ptr(), at(a), at(b), 70, columns, a.shape[1],
                        memory.device.index, torch.bfloat16, name == "w1a1",
                        hopper.CORRECTED if terms.corrected else hopper.PLAIN, terms.length,
                        terms.factor, at(made[2]), at(made[3]), at(made[6]),
                        at(made[4]) if terms.rows else 0, at(made[5]) if terms.columns else 0,
                        False, hopper.bias_type(made[6]), True,
                    )  # fmt: skip
                found = memory.view(72, columns)
                assert bool((found[0] == 7.0).all() and (found[-1] == 7.0).all())
                y = lowbit.product(*made)
                gate, value = (t.cpu() for t in y.split(columns, -1))
                judges.gated(gate, value, found[1:-1].cpu()).require()


@pytest.mark.whole
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("recipe", ["w1a1", "w4a4", "w8a8", "w4a4-2:4"])
@pytest.mark.parametrize("rows", [3, 40, 600])
def test_a_swiglu_on_hopper(rows: int, recipe: str, bias: bool, compiled: bool) -> None:
    """Its bits are those of gate and up, their gate, and down: eager, recorded and compiled."""
    _require_hopper()
    torch.manual_seed(0)
    width, hidden, half = 512, 384, HALVES[0]
    with torch.no_grad():
        layers = [
            quest.Linear(inside, out, bias, recipe).to("cuda", half).eval().freeze()
            for inside, out in ((width, hidden), (width, hidden), (hidden, width))
        ]
        both, down = layers[:2], layers[2]
        assert joint.stack(both)
        norm = nn.RMSNorm(width, 1e-5, dtype=half, device="cuda")
        x, residual = (torch.randn(rows, width, device="cuda").to(half) for _ in range(2))
        one = joint.whole(both)
        assert one is not None
        taken = one.gates(x)
        packed, sparse = one.packed is not None, recipe == "w4a4-2:4"
        assert taken == (not (packed and rows == 3) and not (sparse and rows == 600))

        def expected(gate: Tensor, up: Tensor) -> Tensor:
            if not taken:
                return quest.gated(gate, up, down)
            held = down.current()
            assert held is not None
            kind = held.kinds.partition(",")[0]
            y: Tensor = down(prologue.gated_encode_shown(gate, up, held.spec, kind)[3])
            return y

        def plain(x: Tensor) -> Tensor:
            return quest.swiglu(x, both[0], both[1], down)

        def behind(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            return quest.normed_swiglu(x, norm, both[0], both[1], down, residual)

        gate, up = quest.together(x, both)
        h, made = quest.normed(x, norm, both, residual)
        wanted, further = expected(gate, up), expected(*made)
        if compiled:
            plain, behind = torch.compile(plain), torch.compile(behind)
        for _ in range(4):
            y, (given, z) = plain(x), behind(x, residual)
            if taken or not compiled:  # whose gate before few rows is the compiler's
                assert torch.equal(y, wanted)
            judges.added(x.cpu(), residual.cpu(), given.cpu()).require()
            assert (z.shape, z.dtype) == (further.shape, further.dtype)
            if not compiled:  # whose norm is the compiler's: codes may be others, by no bound
                assert torch.equal(z, further)
                assert torch.equal(given, h)


# --- who takes it -----------------------------------------------------------------------------

WIDTH, HIDDEN, ROWS = 256, 384, 60


class Layers:
    """Gate and up as on Hopper, stacked, a down and a norm, on a CPU whose kernels are fakes."""

    def __init__(self, patch: pytest.MonkeyPatch, recipe: str = "w4a4", bias: bool = True) -> None:
        torch.manual_seed(0)
        direct._plan.cache_clear()
        self.kernels = Kernels(patch)
        self.kernels.activation = quest.recipe(recipe).activation
        Stream(patch)
        patch.setattr(paths, "has_integers", lambda *_: True)
        patch.setattr(prologue, "has_kernel", lambda *_: True)
        self.both = [self.layer(WIDTH, HIDDEN, bias, recipe) for _ in range(2)]
        self.down = self.layer(HIDDEN, WIDTH, bias, recipe)
        assert joint.stack(self.both)
        self.norm = nn.RMSNorm(WIDTH, 1e-5, dtype=HALVES[0])
        room = direct.Joined.room

        def kept(
            joined: direct.Joined, biases: list[Tensor], x: Tensor, *stay: bool
        ) -> Tensor | None:
            found = room(joined, biases, x, *stay)
            self.kernels.memory += [] if found is None else [found]
            return found

        patch.setattr(direct.Joined, "room", kept)

    @staticmethod
    def layer(width: int, out: int, bias: bool, recipe: str) -> quest.Linear:
        return quest.Linear(width, out, bias, recipe).to(HALVES[0]).eval().freeze()

    def reads(self) -> None:
        """Let the kernels read what there is."""
        for layer in (*self.both, self.down):
            held = layer._frozen
            assert held is not None
            one = held if held.whole is None else held.whole.frozen
            found = (one.operand, one.packed, one.scale, one.sums, layer.bias)
            self.kernels.memory += [t for t in found if t is not None]

    def seen(self, run: Callable[[], Any]) -> list[str]:
        """What was launched, or "again" for each recorded call that was queued."""
        self.reads()
        self.kernels.take()
        before = len(Kept.all)
        self.made = run()
        return ["again"] * (len(Kept.all) - before) + self.kernels.take()


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Layers]:
    with torch.no_grad():
        yield Layers(monkeypatch)
    direct._plan.cache_clear()


def _input(rows: int = ROWS, dtype: torch.dtype = HALVES[0]) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.whole
@pytest.mark.parametrize("recipe", ["w1a1", "w4a4", "w8a8"])
@pytest.mark.parametrize("bias", [False, True])
def test_gate_and_up_are_one_product(
    recipe: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its numbers are those of both and their gate; at the third call it is recorded."""
    with torch.no_grad():
        made = Layers(monkeypatch, recipe, bias)
        for lead in ((ROWS,), (2, ROWS)):
            x = (
                _input(ROWS * (len(lead) + 1))
                .view(-1)[: ROWS * WIDTH * len(lead)]
                .view(*lead, WIDTH)
            )
            other = x.flip(0).contiguous()
            made.reads()
            made.kernels.memory += [x, other]
            expected = quest.gated(*quest.together(x, made.both), made.down)
            h, parts = quest.normed(x, made.norm, made.both, other)
            wanted = quest.gated(*parts, made.down)
            last = made.down.current()
            assert last is not None
            last.calls.clear()  # a recorded call writes nothing here
            alone = quest.gated(*quest.normed(x, made.norm, made.both)[1], made.down)
            for run, first, like in (
                (lambda: (x, quest.swiglu(x, *made.both, made.down)), "blocks", (x, expected)),  # noqa: B023
                (lambda: quest.normed_swiglu(x, made.norm, *made.both, made.down, other), "added",  # noqa: B023
                 (h, wanted)),
                (lambda: quest.normed_swiglu(x, made.norm, *made.both, made.down), "normed",  # noqa: B023
                 (x, alone)),
            ):  # fmt: skip
                last.calls.clear()
                assert made.seen(run) == [first, "gated product", "blocks", "product"]
                for t, other_ in zip(made.made, like, strict=True):
                    torch.testing.assert_close(t, other_)
                made.seen(run)
                assert made.seen(run) == ["again", "again"]
                for t, other_ in zip(made.made, like, strict=True):
                    assert (t.shape, t.dtype) == (other_.shape, other_.dtype)
                # The first reads x and writes what the second reads, which writes y.
                (_, outer), (_, inner) = Kept.all[-2:]
                assert outer[0] == x.data_ptr()
                assert inner == (outer[1 + (first == "added")], made.made[1].data_ptr())
                assert outer[2:] == (
                    (inner[0], made.made[0].data_ptr()) if first == "added" else ()
                )
    direct._plan.cache_clear()


@pytest.mark.whole
def test_calls_with_and_without_a_gate_are_two(layers: Layers) -> None:
    """Of one weight and one input: a recorded call of one is none of the other."""
    x = _input()

    def both() -> tuple[Tensor, ...]:
        return quest.together(x, layers.both)

    def one() -> tuple[Tensor, ...]:
        return joint.projected(x, layers.both, True)

    for _ in range(3):
        layers.seen(both)
    assert [t.shape for t in layers.made] == [(ROWS, HIDDEN)] * 2
    assert layers.seen(one) == ["blocks", "gated product"]
    assert [t.shape for t in layers.made] == [(ROWS, HIDDEN)]
    layers.seen(one)
    assert layers.seen(one) == ["again"]
    assert [t.shape for t in layers.made] == [(ROWS, HIDDEN)]
    assert layers.seen(both) == ["again"]
    assert [t.shape for t in layers.made] == [(ROWS, HIDDEN)] * 2


@pytest.mark.whole
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [3, ROWS])
@torch.no_grad()
def test_a_recorded_call_is_found_by_what_it_was(
    rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a gate where there is one, without one for few rows, whose weights are read packed.

    And before anything is checked, but for what is no tensor.
    """
    layers = Layers(monkeypatch, bias=bias)
    x = _input(rows)
    gate, one = layers.both[0], joint.whole(layers.both)
    assert one is not None
    held = joint.gates(x, layers.both, one)
    assert held == (rows == ROWS)

    def plain() -> Tensor:
        return quest.swiglu(x, gate, layers.both[1], layers.down)

    def behind() -> tuple[Tensor, Tensor]:
        return quest.normed_swiglu(x, layers.norm, gate, layers.both[1], layers.down)

    layers.reads()
    layers.kernels.memory.append(x)
    expected = quest.gated(*quest.together(x, layers.both), layers.down)
    wanted = quest.gated(*quest.normed(x, layers.norm, layers.both)[1], layers.down)
    last = layers.down.current()
    assert last is not None
    for run, like in ((plain, expected), (behind, wanted)):
        one.calls.clear()  # a recorded call writes nothing here
        last.calls.clear()
        layers.seen(run)
        made = layers.made if isinstance(layers.made, Tensor) else layers.made[1]
        torch.testing.assert_close(made, like)
        layers.seen(run)
        with monkeypatch.context() as patch:
            patch.setattr(quest.Linear, "check", lambda *_: pytest.fail("checked again"))
            assert layers.seen(run) == ["again", "again"]
    wrong: Any = "rows"
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got str"):
        quest.swiglu(wrong, gate, layers.both[1], layers.down)
    with pytest.raises(TypeError, match=r"residual must be a torch\.Tensor, got str"):
        quest.normed_swiglu(x, layers.norm, gate, layers.both[1], layers.down, wrong)
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got str"):
        quest.normed_swiglu(wrong, layers.norm, gate, layers.both[1], layers.down, x)
    with pytest.raises(ValueError, match="x must"):
        quest.swiglu(x[0, 0], gate, layers.both[1], layers.down)
    none: Any = None
    with pytest.raises(TypeError, match=r"layer must be a torch\.nn\.Module, got NoneType"):
        quest.swiglu(x, gate, layers.both[1], none)


def test_what_has_been_gated_is_half_as_wide() -> None:
    def shapes(width: int, *outs: int, gate: bool = True) -> list[int]:
        layers = [SimpleNamespace(out_features=n) for n in outs]
        return [t.shape[-1] for t in joint.split(torch.ones(3, width), layers, gate)]

    assert shapes(8, 8, 8) == [8]
    assert shapes(16, 8, 8) == [8, 8]
    assert shapes(8, 8, 0) == [8, 0]
    assert shapes(8, 0, 8) == [0, 8]
    assert shapes(12, 4, 8) == [4, 8]
    assert shapes(8, 4, 4, gate=False) == [4, 4]
    assert shapes(0, 0, 0, gate=False) == [0, 0]
    assert len(joint.split(torch.ones(3, 0), [SimpleNamespace(out_features=0)] * 2)) == 2
    assert shapes(8, 8) == [8]


@pytest.mark.whole
def test_which_inputs_may_be_gated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any rows of 16 bits where weights are not read packed; a row by itself; no scalar."""
    with torch.no_grad():
        one = joint.whole(Layers(monkeypatch, "w8a8").both)
    assert one is not None
    x = _input()
    assert one.packed is None
    assert all(map(one.gates, (x, x[0], x[None], x[:0], x.half())))
    assert not one.gates(x[0, 0])
    assert not one.gates(x.float())


def test_values_have_no_gated_product() -> None:
    """Where layers multiply values, as on a CPU: gate and up apart, and `quest.gated`."""
    with torch.no_grad():
        both = [quest.Linear(WIDTH, HIDDEN).to(HALVES[0]).eval().freeze() for _ in range(2)]
        down = quest.Linear(HIDDEN, WIDTH).to(HALVES[0]).eval().freeze()
        assert joint.stack(both)
        one, x = joint.whole(both), _input()
        assert one is not None
        assert one.path == "values"
        assert not one.gates(x)
        expected = quest.gated(*quest.together(x, both), down)
        assert torch.equal(quest.swiglu(x, both[0], both[1], down), expected)


@pytest.mark.whole
@pytest.mark.parametrize("case", ["few rows", "float32", "two widths", "watched"])
def test_who_does_not_take_it(case: str, layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, dtype = 3 if case == "few rows" else ROWS, HALVES[0]
    x, given = _input(rows, torch.float32 if case == "float32" else dtype), list(layers.both)
    if case == "float32":
        for layer in (*layers.both, layers.down):
            layer.float().freeze()
        joint.stack(layers.both)
    elif case == "two widths":
        given[1] = layers.layer(WIDTH, 2 * HIDDEN, True, "w4a4")
        joint.stack([layer.freeze() for layer in given])
    if case == "watched":
        monkeypatch.setattr(ops, "direct", lambda _: False)
        calls: list[str] = []
        real = frozen.gated_product
        monkeypatch.setattr(frozen, "gated_product", lambda *g: (calls.append("op"), real(*g))[1])
        made = joint.projected(x, given, True)
        assert (calls, len(made)) == (["op"], 1)
        h, (rows,) = prologue.behind_norm(x, layers.norm, given, x, True)
        assert (calls, rows.shape) == (["op", "op"], (ROWS, HIDDEN))
        _, both = prologue.behind_norm(x, layers.norm, given, x, False)
        assert torch.equal(rows, eager.gated(*both))
        assert torch.equal(h, x + x)
        return
    monkeypatch.setattr(frozen, "gated_product", lambda *_: pytest.fail("taken"))
    monkeypatch.setattr(frozen, "launch_gated_product", lambda *_: pytest.fail("taken"))
    for layer in given:
        layers.kernels.memory += [t for t in (layer.bias,) if t is not None]
    held = given[0].current()
    assert held is not None
    assert held.whole is not None or case == "two widths"
    layers.both = given if case != "two widths" else layers.both
    one = joint.whole(given)
    assert one is not None
    layers.kernels.memory += [
        t for t in (one.operand, one.packed, one.scale, one.sums) if t is not None
    ]
    assert not joint.gates(x, given, one)
    seen = layers.seen(lambda: joint.projected(x, given, True))
    assert "gated product" not in seen
    assert len(layers.made) == 2
