"""A SwiGLU at its edges: operands of different bits and dtypes, no gradient, what is let go."""

from __future__ import annotations

import gc
import weakref
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quest
from quest import mlp, operands, paths, prologue
from quest.conformance import inputs
from quest.kernels import decode
from quest.lowbit_linear import low_bit_linear, pair, products
from quest.mlp import low_bit_again, low_bit_swiglu

# Activations and weights wait in different forms: as codes, packed in 4 bits or in 2, as int8.
UNLIKE = ("w4a8", "w8a4", "w2a4", "w3a1.58", "w1a8", "w4a1", "w2a8-2:4")
WIDTH, HIDDEN, OUT = 128, 256, 24
NAMES = ("x", "gate", "up", "down", "gate bias", "up bias", "down bias")
SHAPES = (
    (2, 3, WIDTH), (HIDDEN, WIDTH), (HIDDEN, WIDTH), (OUT, HIDDEN), (HIDDEN,), (HIDDEN,), (OUT,),
)  # fmt: skip


def _specs(name: str) -> tuple[str, str]:
    made = quest.recipe(name)
    return made.activation.spec, made.weight.spec


def _drawn(biases: bool = True, **dtypes: torch.dtype) -> dict[str, Tensor]:
    """What the layer takes, with gradients: float32, or of the dtypes of these names."""
    return {
        n: inputs.draw("gaussian", s, dtypes.get(n, torch.float32), i).requires_grad_()
        for i, (n, s) in enumerate(zip(NAMES, SHAPES, strict=True)) if biases or "bias" not in n
    }  # fmt: skip


def _arguments(t: dict[str, Tensor], first: str, last: str, saves: bool = True) -> tuple[Any, ...]:
    biases = [t[n] for n in NAMES[4:6] if n in t]
    specs = *_specs(first), *_specs(last)
    return t["x"], [t["gate"], t["up"]], biases, t["down"], t.get("down bias"), *specs, saves


def _kept(t: dict[str, Tensor], first: str, last: str) -> tuple[Tensor, Tensor, Tensor]:
    """gate(x), up(x) and y, of operators that keep the first two."""
    x, weights, biases, down, bias, *_ = _arguments(t, first, last)
    gate, up = low_bit_linear(x, weights, biases, *_specs(first), x.dtype, True)[:2]
    given = [down], [] if bias is None else [bias]
    return gate, up, low_bit_linear(up, *given, *_specs(last), x.dtype, True, gate)[0]


def _same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def _gradients(y: Tensor, t: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(y, list(t.values()), torch.ones_like(y)))


def _faked(function: Any, arguments: tuple[Any, ...]) -> list[Tensor]:
    with torch._subclasses.FakeTensorMode() as mode:
        made: list[Tensor] = function(
            *torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, arguments)
        )
    return made


def _looks(tensors: list[Tensor]) -> list[tuple[Any, ...]]:
    return [(t.shape, t.stride(), t.dtype, t.device) for t in tensors]


def test_activations_and_weights_of_different_bits() -> None:
    """y and every gradient are those with gate and up kept, and both come again."""
    for biases, (first, last) in product(
        (False, True), zip(UNLIKE, UNLIKE[1:] + UNLIKE[:1], strict=True)
    ):
        t = _drawn(biases)
        y, *read = low_bit_swiglu(*_arguments(t, first, last))
        gate, up, expected = _kept(t, first, last)
        _same([y, *_gradients(y, t)], [expected, *_gradients(expected, t)])
        given = [t[n] for n in NAMES[4:6] if n in t]
        again = low_bit_again(torch.empty(6, 0), read[: mlp._FIRST], given, *_specs(first), WIDTH)
        _same(again, [gate.view(6, HIDDEN), up.view(6, HIDDEN)])


def test_fakes_look_like_what_is_made() -> None:
    """What torch.compile and FSDP plan with: as many tensors, of the same shapes and dtypes."""
    for biases, saves, (first, last) in product(
        (False, True), (False, True), zip(UNLIKE, UNLIKE[1:] + UNLIKE[:1], strict=True)
    ):
        t = {n: v.detach() for n, v in _drawn(biases).items()}
        arguments = _arguments(t, first, last, saves)
        assert _looks(_faked(low_bit_swiglu, arguments)) == _looks(low_bit_swiglu(*arguments))


def test_any_number_of_weights_again() -> None:
    """Of rows that differ in number, too; each as from the product that was first."""
    sizes, specs = (3, 8, 1, 5, 24), _specs("w4a8")
    x, *weights = (
        inputs.draw("gaussian", (n, WIDTH), torch.float32, i) for i, n in enumerate((6, *sizes))
    )
    ys, read = products(x, weights, [], pair(*specs), torch.float32, True)
    arguments: Any = torch.empty(6, 0), [t for o in read for t in o], [], *specs, WIDTH
    made = low_bit_again(*arguments)
    _same(made, ys)
    assert _looks(_faked(low_bit_again, arguments)) == _looks(made)
    with pytest.raises(TypeError):  # nothing is left over
        low_bit_again(arguments[0], [*arguments[1], x], *arguments[2:])


def test_on_a_gpu_the_kernel_unpacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is packed; what waits as products take it is taken as it is."""
    stored: Any = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(mlp, "launch_unpack", lambda t, form, width: (t, form.kind, width))
    q = quest.recipe("w4a4").weight
    assert mlp._operand(stored, q, "integers", "packed4", WIDTH) == (stored, "packed4", WIDTH)
    assert mlp._operand(stored, q, "integers", "integers", WIDTH) is stored


def test_the_kernel_that_unpacks_is_given_scales_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 as ever, whatever dtype new tensors have: another one is another kernel."""
    given: list[tuple[Any, ...]] = []
    monkeypatch.setattr(decode, "decode", lambda *told, **how: given.append((*told, how)))
    stored = torch.zeros(3, 64, dtype=torch.uint8)
    form = operands.saved(quest.recipe("w4a4").weight, "integers")
    torch.set_default_dtype(torch.bfloat16)
    try:
        mlp.launch_unpack(stored, form, WIDTH)
    finally:
        torch.set_default_dtype(torch.float32)
    ((rows, scale, *rest, how),) = given
    assert rows is stored
    assert (scale.dtype, scale.tolist()) == (torch.float32, [[1.0]] * 3)
    assert rest == [WIDTH, 1.0, torch.int8]
    assert how == {"bits": 4, "stride": form.stride, "top": form.top}


@pytest.mark.whole
@pytest.mark.parametrize("other", NAMES)
def test_each_gradient_has_the_dtype_of_what_it_is_of(other: str) -> None:
    """Weights of gate and up have one dtype."""
    names = {"gate", "up"} if other in ("gate", "up") else {other}
    t = _drawn(**dict.fromkeys(names, torch.bfloat16))
    y, expected = low_bit_swiglu(*_arguments(t, "w4a4", "w4a4"))[0], _kept(t, "w4a4", "w4a4")[2]
    found = _gradients(y, t)
    assert [g.dtype for g in found] == [v.dtype for v in t.values()]
    _same([y, *found], [expected, *_gradients(expected, t)])


class _Cut(torch.autograd.Function):
    """Lets values through, and no gradient back."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:  # type: ignore[override]
        return None


def test_no_gradient_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing comes back from behind it: not zeros, and no product is computed."""
    t = _drawn()
    y = low_bit_swiglu(*_arguments(t, "w4a4", "w4a4"))[0]
    for name in ("low_bit_again", "low_bit_linear_backward"):
        monkeypatch.delattr(mlp, name)
    _Cut.apply(y).sum().backward()
    assert all(v.grad is None for v in t.values())


def test_what_the_backward_lets_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the rows, of the hidden width, before the last products: they need room."""
    made: list[weakref.ref[Tensor]] = []
    real, alive = mlp.low_bit_linear_backward, []

    def watched(*arguments: Any) -> list[Tensor]:
        alive.append(sum(ref() is not None for ref in made))
        found = real(*arguments)
        made.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(mlp, "low_bit_linear_backward", watched)
    low_bit_swiglu(*_arguments(_drawn(), "w4a4", "w4a4"))[0].sum().backward()
    assert alive == [0, 0]


def _layers(hidden: tuple[int, int] = (HIDDEN, HIDDEN), bias: bool = True) -> list[nn.Linear]:
    torch.manual_seed(0)
    shapes = (WIDTH, hidden[0]), (WIDTH, hidden[1]), (hidden[0], OUT)
    return [quest.Linear(*s, bias=bias) for s in shapes]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """As on a GPU with the kernels. Of each call of the operator: whether it saves."""
    calls: list[bool] = []
    real = mlp.low_bit_swiglu
    for module in (mlp, prologue):
        monkeypatch.setattr(module, "has_kernel", lambda *_: True)
    monkeypatch.setattr(mlp, "low_bit_swiglu", lambda *a: calls.append(a[-1]) or real(*a))
    monkeypatch.setattr(paths, "choose", lambda x, recipe: "integers")
    return calls


def test_gate_and_up_are_kept_unless_told_otherwise(fused: list[bool]) -> None:
    x, layers = torch.ones(3, WIDTH), _layers()
    quest.swiglu(x, *layers)
    assert fused == []
    quest.swiglu(x, *layers, recompute=True)
    assert fused == [True]


def test_gate_and_up_of_two_widths(fused: list[bool]) -> None:
    """Refused in the same words, again or not."""
    layers, told = _layers((HIDDEN, 2 * HIDDEN)), []
    for recompute in (False, True):
        with pytest.raises(ValueError, match="gate and up must have one shape") as error:
            quest.swiglu(torch.ones(3, WIDTH), *layers, recompute=recompute)
        told.append(str(error.value))
    assert told[0] == told[1]


def test_an_error_leaves_no_checkpoint_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes through none, of which some versions would go on; in the backward it may."""
    layers, returned = [nn.Linear(WIDTH, n) for n in (HIDDEN, 2 * HIDDEN)], []

    def noted(call: Any, *given: Any, use_reentrant: bool) -> Tensor:
        returned.append(call(*given))
        return returned[-1]

    monkeypatch.setattr(mlp, "checkpoint", noted)
    with pytest.raises(ValueError, match="gate and up must have one shape"):
        quest.swiglu(torch.ones(3, WIDTH), *layers, nn.Linear(HIDDEN, OUT), recompute=True)
    assert len(returned) == 1
    monkeypatch.undo()
    whole = [nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUT)]
    y = quest.swiglu(torch.ones(3, WIDTH), *whole, recompute=True)
    monkeypatch.setattr(mlp, "gated", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        y.sum().backward()  # type: ignore[no-untyped-call]


def test_a_layer_that_draws_draws_the_same_again() -> None:
    """As dropout does: the backward is that of what came out."""
    gate = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Dropout(0.5))
    layers, x = [gate, nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUT)], torch.randn(3, WIDTH)
    made: list[tuple[Tensor, ...]] = []
    for recompute in (False, True):
        torch.manual_seed(1)
        given = x.clone().requires_grad_()
        y = quest.swiglu(given, *layers, recompute=recompute)
        made.append((y, *torch.autograd.grad(y.square().sum(), given)))
    for kept, again in zip(*made, strict=True):
        assert torch.equal(kept, again)


def test_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other layers save is theirs, and nothing that was computed is held."""
    layers = [nn.Linear(WIDTH, n) for n in (HIDDEN, HIDDEN, OUT)]
    made: list[weakref.ref[Tensor]] = []

    def fails(gate: Tensor, *_: Any) -> Tensor:
        made.append(weakref.ref(gate))
        raise ValueError("on purpose")

    monkeypatch.setattr(mlp, "gated", fails)
    x = torch.ones(3, WIDTH, requires_grad=True)
    # Held until the end: so is what a checkpoint left, in the versions that leave one.
    with pytest.raises(ValueError, match="on purpose") as error:
        quest.swiglu(x, *layers, recompute=True)
    (grad,) = torch.autograd.grad(nn.functional.silu(x).sum(), x)
    assert grad.isfinite().all()
    assert made[0]() is not None
    del error
    gc.collect()
    assert made[0]() is None


def test_under_autocast(fused: list[bool]) -> None:
    """x is rounded to its dtype, y has that, and gradients those of what they are of."""
    layers = _layers()
    x = inputs.draw("gaussian", (3, WIDTH), torch.float32, 0).requires_grad_()
    given = [x, *(p for layer in layers for p in layer.parameters())]
    with torch.autocast("cpu", torch.bfloat16):
        y, kept = (quest.swiglu(x, *layers, recompute=again) for again in (True, False))
    assert fused == [True]
    assert y.dtype == torch.bfloat16
    _same([y], [kept])
    _same(*(list(torch.autograd.grad(made.sum(), given)) for made in (y, kept)))


@pytest.mark.whole
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_one_parameter_alone_is_trained(bias: bool, fused: list[bool]) -> None:
    """As adapters and bias-only tuning do it; and the input alone, and nothing."""
    layers = _layers(bias=bias)
    x = inputs.draw("gaussian", (3, WIDTH), torch.float32, 0)
    given = [x, *(p for layer in layers for p in layer.parameters())]
    for trained in (*given, None):
        for t in given:
            t.requires_grad_(t is trained)
        fused.clear()
        y, kept = (quest.swiglu(x, *layers, recompute=again) for again in (True, False))
        assert fused == [trained is not None] == [y.requires_grad]
        assert torch.equal(y, kept)
        if trained is not None:
            _same(*(list(torch.autograd.grad(made.square().sum(), trained)) for made in (y, kept)))
