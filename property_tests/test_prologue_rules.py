"""Which layers a gate or a norm can stand before, each case by itself; no GPU.

Weights are frozen and multiplied as integers here, as on Hopper, by what stands for it on a CPU.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quest
from property_tests.fake_launches import Stream
from property_tests.prologues import HALVES, halves
from quest import direct, eager, frozen, lowbit_linear, ops, paths, prologue
from quest.quantizer import parse

pytestmark = pytest.mark.whole

HALF, WIDTH = torch.bfloat16, 256


class Seen:
    """What ran: "gated" and "normed" for operators, "launch ..." without, "live" in a layer's."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.unwatched: list[bool] = []
        self.behind: list[tuple[Any, ...]] = []

    def none(self) -> bool:
        return not self.calls


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    made = Seen()

    def note(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*given: Any) -> Any:
            made.calls.append(name)
            return real(*given)

        return noted

    for name in ("gated", "normed"):
        operator = getattr(prologue, f"{name}_encode")
        monkeypatch.setattr(prologue, f"{name}_encode", note(name, operator))
        # Of as many results as a launch gives.
        shown = getattr(prologue, f"{name}_encode_shown")
        monkeypatch.setattr(prologue, f"launch_{name}_encode", note(f"launch {name}", shown))
    parts = lowbit_linear._CPU
    live = {name: note("live", getattr(parts, name)) for name in ("encode_gated", "gated_operand")}
    monkeypatch.setattr(lowbit_linear, "_CPU", parts._replace(**live))
    real: Callable[..., Tensor] = frozen.multiply

    def multiply(*given: Any, **how: Any) -> Tensor:
        made.unwatched.append(given[5])
        return real(*given[:5], False, *given[6:], **how)

    monkeypatch.setattr(frozen, "multiply", multiply)
    monkeypatch.setattr(direct, "behind", lambda *given: made.behind.append(given))
    _there(monkeypatch)
    return made


def _there(monkeypatch: pytest.MonkeyPatch, there: bool = True) -> None:
    monkeypatch.setattr(
        prologue, "has_kernel",
        lambda spec, x: bool(parse(spec)) and x.dtype in HALVES and there,
    )  # fmt: skip


def _layer(recipe: str = "w4a4", out: int = 24, dtype: torch.dtype = HALF) -> quest.Linear:
    torch.manual_seed(out)
    return quest.Linear(WIDTH, out, True, recipe, dtype=dtype)


def _frozen(
    monkeypatch: pytest.MonkeyPatch, recipe: str = "w4a4", outs: tuple[int, ...] = (24,),
    dtype: torch.dtype = HALF,
) -> list[quest.Linear]:  # fmt: skip
    """Layers whose weights are held as integers; stacked, if there are several."""
    layers = []
    with monkeypatch.context() as patch:
        patch.setattr(paths, "has_integers", lambda *_: True)
        for out in outs:
            layer = _layer(recipe, out, dtype).eval().freeze()
            layers.append(layer)
    assert quest.joint.stack(layers) == (len(outs) > 1)
    return layers


def _pair(rows: int = 5, dtype: torch.dtype = HALF) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return halves(torch.randn(rows, 2 * WIDTH, generator=g).to(dtype))


def _norm(eps: float | None = 1e-5, dtype: torch.dtype = HALF) -> nn.RMSNorm:
    norm = nn.RMSNorm(WIDTH, eps=eps, dtype=dtype)
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(2))
    return norm.eval()


@pytest.mark.parametrize("recipe", ["w4a4", "w1a1", "w4a8"])
def test_a_gate_before_a_frozen_layer(
    recipe: str, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers are those of the rows."""
    (layer,), (gate, up) = _frozen(monkeypatch, recipe), (t[:, None] for t in _pair())
    with torch.no_grad():
        y = quest.gated(gate, up, layer)
        assert (seen.calls, seen.unwatched) == (["gated"], [False])
        assert torch.equal(y, layer(eager.gated(gate, up)))


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("recipe", ["w4a4", "w1a1", "w4a8"])
def test_a_norm_before_frozen_layers(
    recipe: str, adds: bool, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, norm = _frozen(monkeypatch, recipe, (8, 16)), _norm()
    x, other = (t[:, None] for t in _pair())
    residual = other if adds else None
    with torch.no_grad():
        h, made = quest.normed(x, norm, layers, residual)
        assert (seen.calls, seen.unwatched) == (["normed"], [False])
        total, rows = eager.normed(x, residual, norm.weight, 1e-5)
        assert torch.equal(h, total)
        for y, expected in zip(made, quest.together(rows, layers), strict=True):
            assert torch.equal(y, expected)


def test_what_nothing_watches_is_launched(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without operators, where that holds for every tensor; and the product with it."""
    (layer,), norm, (x, other) = _frozen(monkeypatch), _norm(), _pair()
    alone: list[Tensor] = []
    monkeypatch.setattr(ops, "direct", lambda t: any(t is one for one in alone))
    tensors, held, bias = [x, other, norm.weight], layer.current(), layer.bias
    with torch.no_grad():
        for among in (tensors, tensors[:2], tensors[1:], [x, norm.weight], []):
            alone[:] = among
            for run, needs, name, asked in (
                (lambda: quest.gated(x, other, layer), tensors[:2], "gated",
                 ((x, other), held, bias)),
                (lambda: quest.normed(x, norm, [layer]), [x, norm.weight], "normed",
                 ((x,), held, bias, (norm.weight, 1e-5), False, None)),
                (lambda: quest.normed(x, norm, [layer], other), tensors, "normed",
                 ((x, other), held, bias, (norm.weight, 1e-5), False, None)),
            ):  # fmt: skip
                every = all(any(t is one for one in among) for t in needs)
                for noted in (seen.calls, seen.unwatched, seen.behind):
                    noted.clear()
                run()
                assert seen.calls == ["launch " * every + name]
                assert seen.unwatched == [every]
                # Where it may, with the least host time; which has another way to take here.
                assert seen.behind == ([asked] if every else [])


@pytest.mark.parametrize("height", [16, 32])
def test_a_bias_is_as_long_as_the_weight_is_high(
    height: int, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not as out_features says, of rows pruned by hand: a kernel would read beyond."""
    (layer,), norm, (x, other) = _frozen(monkeypatch, outs=(height,)), _norm(), _pair()
    layer.out_features = 24
    monkeypatch.setattr(ops, "direct", lambda _: True)
    with torch.no_grad():
        for run in (lambda: quest.gated(x, other, layer), lambda: quest.normed(x, norm, [layer])):
            layer.bias = nn.Parameter(torch.zeros(height, dtype=HALF))
            run()
            assert len(seen.behind) == 1
            seen.behind.clear()
            layer.bias = nn.Parameter(torch.zeros(24, dtype=HALF))
            with pytest.raises(ValueError, match="bias"):
                run()
            assert not seen.behind


def test_launches_that_give_all(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes out of them is what is returned, and nothing else runs."""
    layers, norm, (x, other) = _frozen(monkeypatch, outs=(8, 16)), _norm(), _pair()
    Stream(monkeypatch)
    y, h, biases = torch.randn(5, 24), torch.randn(5, WIDTH), [layer.bias for layer in layers]
    gives: list[tuple[Tensor, ...]] = []
    monkeypatch.setattr(direct, "behind", lambda *given: (seen.behind.append(given), gives[0])[1])
    with torch.no_grad():
        gives[:] = [(y,)]
        alone = _frozen(monkeypatch)[0]
        assert quest.gated(x, other, alone) is y
        same, made = quest.normed(x, norm, layers)
        assert same is x
        gives[:] = [(y, h)]
        added, again = quest.normed(x, norm, layers, other)
        assert added is h
        for both in (made, again):
            assert [t.shape[-1] for t in both] == [8, 16]
            assert torch.equal(torch.cat(both, -1), y)
        first, second = (given[2] for given in seen.behind[1:])
        assert torch.equal(first, torch.cat(biases))
        assert first.data_ptr() == second.data_ptr()  # so that calls can be recorded
        # A bias, or a norm's weight, that no kernel can read where it lies.
        wide = torch.randn(24, 2, dtype=HALF)
        alone.bias = nn.Parameter(wide[:, 0])
        apart = _norm()
        apart.weight = nn.Parameter(torch.stack([norm.weight, norm.weight], -1)[..., 0])
        odd = _norm()
        odd.weight = nn.Parameter(torch.empty(WIDTH + 1, dtype=HALF)[1:].copy_(norm.weight))
        assert odd.weight.data_ptr() % 16  # and would be copied, to where no later call may look
        seen.calls.clear()
        seen.behind.clear()
        quest.gated(x, other, alone)
        quest.normed(x, apart, layers)
        quest.normed(x, odd, layers)
        quest.normed(x, norm, [alone])
        assert seen.calls == ["launch gated", *["launch normed"] * 3]
        assert not seen.behind


# --- who is called as ever --------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", ["values", "another device's kernel", "autocast", "autocast of a float32"]
)
def test_what_keeps_a_frozen_layer_from_it(
    case: str, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a gate or a norm, these give what they give one after another."""
    dtype = torch.float32 if case == "autocast of a float32" else HALF
    layers = _frozen(monkeypatch, dtype=dtype)
    norm, (x, other) = _norm(), _pair()
    if case == "values":
        layers = [_layer().eval().freeze()]
    elif case == "another device's kernel":
        _there(monkeypatch, False)
    cast: Any = contextlib.nullcontext()
    if "autocast" in case:
        cast = torch.autocast("cpu", HALF if dtype == torch.float32 else torch.float16)
    with torch.no_grad(), cast:
        y = quest.gated(x, other, layers[0])
        assert torch.equal(y, layers[0](F.silu(x) * other))
        h, (z,) = quest.normed(x, norm, layers, other)
        assert torch.equal(h, other + x)
        assert torch.equal(z, layers[0](norm(other + x)))
    assert seen.none()


@pytest.mark.parametrize("few", [False, True])
def test_a_compiled_norm_of_a_sum_before_few_rows_is_called(
    few: bool, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled, it is part of a kernel that adds; a norm by itself, and a gate, have their own."""
    (layer,), norm, (x, other) = _frozen(monkeypatch), _norm(), _pair()
    monkeypatch.setattr(paths, "SUM_ELEMENTS", x.numel() - (not few))
    with torch.no_grad():
        quest.normed(x, norm, [layer], other)
        assert seen.calls == ["normed"]
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        h, (y,) = quest.normed(x, norm, [layer], other)
        assert seen.calls == ["normed"] * (1 if few else 2)
        if few:
            assert torch.equal(h, other + x)
            assert torch.equal(y, layer(norm(other + x)))
        seen.calls.clear()
        quest.normed(x, norm, [layer])
        quest.gated(x, other, layer)
        assert seen.calls == ["normed", "gated"]


def test_norms_that_are_called(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before layers that another norm could take over: torch's own eps, and a float32 stream."""
    (layer,), (x, other) = _frozen(monkeypatch), _pair()
    with torch.no_grad():
        for norm, residual in ((_norm(None), None), (_norm(None), other)):
            h, (y,) = quest.normed(x, norm, [layer], residual)
            assert torch.equal(h, x if residual is None else residual + x)
            assert torch.equal(y, layer(norm(h)))
        assert seen.none()
        single = _norm(dtype=torch.float32)
        with torch.autocast("cpu", HALF):
            h, (y,) = quest.normed(x, single, [layer], other.float())
            assert h.dtype == torch.float32
            assert torch.equal(h, other.float() + x)
            assert torch.equal(y, layer(single(h)))
        assert seen.none()


def test_what_a_norm_must_be(seen: Seen) -> None:
    """Of torch's class and not watched, with a weight like x and an eps that the operator takes."""
    x = _pair()[0]
    norm = _norm()
    assert prologue._weight(norm, x) is norm.weight
    for eps in (1e-300, 0.5, 2.0):
        assert prologue._weight(_norm(eps), x) is not None
    for other in (None, 0.0, -0.5, math.inf, math.nan):
        assert prologue._weight(_norm(other), x) is None
    for kind in (torch.float32, torch.float16):
        assert prologue._weight(_norm(dtype=kind), x) is None
    assert prologue._weight(_norm().to("meta"), x) is None
    assert prologue._weight(nn.RMSNorm((5, WIDTH), 1e-5, dtype=HALF), x) is None
    assert prologue._weight(nn.RMSNorm(WIDTH, 1e-5, False), x) is None
    assert prologue._weight(nn.LayerNorm(WIDTH, 1e-5, dtype=HALF), x) is None
    norm.register_forward_hook(lambda *_: None)
    assert prologue._weight(norm, x) is None
    other_class: Any = _norm()
    other_class.__class__ = type("Other", (nn.RMSNorm,), {})
    assert prologue._weight(other_class, x) is None


@pytest.mark.parametrize("grows", [False, True])
def test_layers_that_are_none(grows: bool) -> None:
    """Told as `together` tells it, with a norm that has a kernel and with one that has none."""
    x, norm = _pair()[0], _norm(None if grows else 1e-5)
    with torch.no_grad(), pytest.raises(TypeError, match="a sequence of layers, got a Linear"):
        quest.normed(x, norm, _layer())  # type: ignore[arg-type]


def test_rows_of_another_width(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those before a frozen layer are refused as the layer refuses them, and nothing runs."""
    (layer,), (x, other) = _frozen(monkeypatch), (t[:, :128] for t in _pair())
    norm = nn.RMSNorm(128, 1e-5, dtype=HALF)
    for run in (
        lambda: quest.gated(x, other, layer), lambda: quest.normed(x, norm, [layer], other),
    ):  # fmt: skip
        with torch.no_grad(), pytest.raises(ValueError, match="x must have 256 columns"):
            run()
    assert seen.none()


def test_inputs_of_other_floats() -> None:
    """They are what torch's operations take: float64, and two dtypes."""
    x, other = _pair(dtype=torch.float64)
    layer = nn.Linear(WIDTH, 4, dtype=torch.float64)
    norm = _norm(dtype=torch.float64)
    for second in (other, other.float()):
        assert torch.equal(quest.gated(x, second, layer), layer(F.silu(x) * second))
        h, (y,) = quest.normed(x, norm, [layer], second)
        assert torch.equal(h, second + x)
        assert torch.equal(y, layer(norm(h)))


def test_pairs_that_do_not_fit() -> None:
    x, norm, layer = _pair()[0], _norm(), _layer()
    for other, error, told in (
        (x.int(), TypeError, "{} must be of floats, got torch.int32"),
        (x[:1], ValueError, "{1} and {0} must have one shape with at least one axis, got "),
        (x.to("meta"), ValueError, "{} must lie where {} lies, cpu; got meta"),
    ):
        with pytest.raises(error, match=told.format("up", "gate")):
            quest.gated(x, other, layer)
        with pytest.raises(error, match=told.format("residual", "x")):
            quest.normed(x, norm, [layer], other)
    for modules, told in (((F.silu, layer), "norm"), ((norm, F.silu), "layers")):
        with pytest.raises(TypeError, match=rf"{told} must .*torch\.nn\.Modules?, got"):
            quest.normed(x, modules[0], [modules[1]])  # type: ignore[arg-type,list-item]
    for run, told in (
        (lambda: quest.gated(x.sum(), x.sum(), layer), "gate and up must have one shape"),
        (lambda: quest.normed(x.sum(), norm, [layer]), "x and residual must have one shape"),
    ):
        with pytest.raises(ValueError, match=told):
            run()


# --- weights quantized for the call -----------------------------------------------------------


@pytest.mark.parametrize("recipe", ["w4a4", "w4a8"])
@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("holds", [False, True])
def test_a_gate_in_the_operator_of_a_layer(
    holds: bool, asks: bool, recipe: str, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a gradient is asked for, or no frozen weight is there to be read."""
    layer = _frozen(monkeypatch, recipe)[0] if holds else _layer(recipe)
    gate, up = _pair()
    with paths.only("integers"), torch.set_grad_enabled(asks):
        y = quest.gated(gate, up, layer)
        assert seen.calls == ["live" if asks or not holds else "gated"]
        assert torch.equal(y, layer(eager.gated(gate, up)))
    assert y.requires_grad == asks


def test_what_keeps_a_gate_from_it(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other path, another dtype of the result, or no kernel."""
    layer, (gate, up) = _layer(), _pair()
    with paths.only("values"):
        assert torch.equal(quest.gated(gate, up, layer), layer(F.silu(gate) * up))
    with paths.only("integers"):
        with torch.autocast("cpu", torch.float16):
            y = quest.gated(gate, up, layer)
            assert y.dtype == torch.float16
            assert torch.equal(y, layer(F.silu(gate) * up))
        _there(monkeypatch, False)
        assert torch.equal(quest.gated(gate, up, layer), layer(F.silu(gate) * up))
    assert seen.none()
