"""A SwiGLU whose backward computes gate and up again: bit for bit what it is with both kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quest
from property_tests.prologues import on_hopper
from quest import grids, mlp, paths, prologue
from quest.conformance import inputs
from quest.conformance.strategies import DTYPES
from quest.lowbit_linear import low_bit_linear
from quest.mlp import low_bit_again, low_bit_swiglu
from quest.models import Llama, LlamaConfig

ROOT = Path(__file__).resolve().parents[1]
DEVICES = ["cpu", pytest.param("cuda", marks=on_hopper)]
RECIPES = ("w1a1", "w1.58a1.58", "w2a2", "w3a3", "w4a4", "w8a8", "w4a8", "w4a4-2:4", "fp4")
WIDTH, HIDDEN, OUT = 256, 384, 24


def _specs(name: str, last: str | None = None) -> tuple[str, str, str, str]:
    found = (quest.recipe(n) for n in (name, last or name))
    return tuple(s for r in found for s in (r.activation.spec, r.weight.spec))  # type: ignore[return-value]


def _drawn(
    dtype: torch.dtype, device: str = "cpu", lead: tuple[int, ...] = (2, 5), biases: bool = False
) -> dict[str, Tensor]:
    """x, three weights and three biases, all with gradients."""
    made = {
        "x": inputs.draw("heavy", (*lead, WIDTH), dtype, 0),
        "gate": inputs.draw("gaussian", (HIDDEN, WIDTH), dtype, 1),
        "up": inputs.draw("gaussian", (HIDDEN, WIDTH), dtype, 2),
        "down": inputs.draw("gaussian", (OUT, HIDDEN), dtype, 3),
    }
    if biases:
        shapes = {"gate bias": HIDDEN, "up bias": HIDDEN, "down bias": OUT}
        made |= {n: inputs.draw("gaussian", (d,), dtype, d) for n, d in shapes.items()}
    return {name: t.to(device).requires_grad_() for name, t in made.items()}


def _again(t: dict[str, Tensor], specs: tuple[str, ...], saves: bool = True) -> list[Tensor]:
    biases = [t["gate bias"], t["up bias"]] if "gate bias" in t else []
    made: list[Tensor] = low_bit_swiglu(
        t["x"], [t["gate"], t["up"]], biases, t["down"], t.get("down bias"), *specs, saves
    )
    return made


def _kept(t: dict[str, Tensor], specs: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """gate(x), up(x) and y, of operators that keep the first two."""
    dtype = t["x"].dtype
    biases = [t["gate bias"], t["up bias"]] if "gate bias" in t else []
    bias = [t["down bias"]] if "down bias" in t else []
    gate, up = low_bit_linear(t["x"], [t["gate"], t["up"]], biases, *specs[:2], dtype, True)[:2]
    y = low_bit_linear(up, [t["down"]], bias, *specs[2:], dtype, True, gate)[0]
    return gate, up, y


def _gradients(y: Tensor, t: dict[str, Tensor]) -> dict[str, Tensor]:
    grad = inputs.draw("gaussian", tuple(y.shape), y.dtype, 9).to(y.device)
    return dict(zip(t, torch.autograd.grad(y, list(t.values()), grad), strict=True))


def _same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, t in found.items():
        assert t.dtype == expected[name].dtype
        assert torch.equal(t, expected[name]), name


@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", RECIPES)
def test_it_is_what_it_is_with_gate_and_up_kept(
    name: str, device: str, dtype: torch.dtype, biases: bool
) -> None:
    """y and every gradient, bit for bit, and both of them again."""
    specs, t = _specs(name), _drawn(dtype, device, biases=biases)
    y, *read = _again(t, specs)
    gate, up, expected = _kept(t, specs)
    assert torch.equal(y, expected)
    _same(_gradients(y, t), _gradients(expected, t))
    given = [t["gate bias"], t["up bias"]] if biases else []
    after = torch.empty(10, 0, dtype=dtype, device=device)
    made = low_bit_again(after, read[: mlp._FIRST], given, *specs[:2], WIDTH)
    for again, before in zip(made, (gate, up), strict=True):
        assert torch.equal(again, before.reshape(10, HIDDEN))


UNPACKS = """
import torch
from quest import eager, grids, mlp, operands, quantizer
from quest.conformance import addresses
addresses.watch()
for name in ("ternary", "uniform2", "uniform3", "uniform4"):
    q = quantizer.parse(f"{name}/identity/ste/dense")
    form = operands.saved(q, "integers")
    every = form.stride * torch.arange(q.grid.levels) - form.top
    for width in (1, 5, 4101):
        rows = every.repeat(width).view(-1, width).to(torch.int8)
        made = mlp.launch_unpack(eager.pack_operand(rows, q), form, width)
        assert made.dtype == torch.int8 and torch.equal(made, rows), (name, width)
print("the same")
"""


def test_the_kernel_that_unpacks_in_the_interpreter() -> None:
    """Every integer in every place of a byte: exactly, and nothing beside them is touched."""
    told = subprocess.run(
        [sys.executable, "-c", UNPACKS], cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.stdout == "the same\n", told.stderr


def test_two_recipes() -> None:
    """Of gate and up, and of down."""
    for names in (("w4a4", "w1a1"), ("w1a1", "w8a8")):
        specs, t = _specs(*names), _drawn(torch.float32)
        y, expected = _again(t, specs)[0], _kept(t, specs)[2]
        assert torch.equal(y, expected)
        _same(_gradients(y, t), _gradients(expected, t))


def test_what_waits_for_the_backward() -> None:
    """Operands, scales, masks and sums; nothing of the hidden width in 16 bits, nor the input."""
    t = _drawn(torch.bfloat16, biases=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        made = _again(t, _specs("w4a4"))
    rows, shapes = 10, [tuple(k.shape) for k in kept]
    assert shapes == [
        (HIDDEN,), (HIDDEN,),
        *((n, d) for n in (rows, HIDDEN, HIDDEN) for d in (WIDTH // 2, 1, WIDTH // 8, 1)),
        *((n, d) for n in (rows, OUT) for d in (HIDDEN // 2, 1, HIDDEN // 8)),
    ]  # fmt: skip
    assert not any(k.requires_grad for k in made[1:])
    assert len(_again({n: v.detach() for n, v in t.items()}, _specs("w4a4"), False)) == 1


@pytest.mark.parametrize("asks", [*_drawn(torch.float32, biases=True), "none"])
def test_one_alone_asks_for_a_gradient(asks: str) -> None:
    specs, t = _specs("w4a4"), _drawn(torch.float32, biases=True)
    whole = _gradients(_again(t, specs)[0], t)
    one = {name: v.detach().requires_grad_(name == asks) for name, v in t.items()}
    y = _again(one, specs)[0]
    assert y.requires_grad == (asks != "none")
    if y.requires_grad:
        grad = inputs.draw("gaussian", tuple(y.shape), y.dtype, 9)
        (made,) = torch.autograd.grad(y, one[asks], grad)
        assert torch.equal(made, whole[asks])


def test_what_nobody_needs_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither gate and up, nor a product, where only the last weight or bias asks."""
    ran: list[str] = []
    for name in ("low_bit_again", "low_bit_linear_backward"):
        real = getattr(mlp, name)
        monkeypatch.setattr(mlp, name, lambda *a, n=name, r=real: ran.append(n) or r(*a))
    t = {n: v.detach() for n, v in _drawn(torch.float32, biases=True).items()}
    last = ["low_bit_linear_backward"]
    for asks, expected in (
        ("down bias", []), ("down", last), ("gate bias", [*last, "low_bit_again"]),
        ("up", [*last, "low_bit_again", *last]),
    ):  # fmt: skip
        ran.clear()
        one = t | {asks: t[asks].clone().requires_grad_()}
        _again(one, _specs("w4a4"))[0].sum().backward()
        assert ran == expected, asks


def test_dtypes_of_inputs_and_weights_may_differ() -> None:
    """As under autocast: each gradient has the dtype of what it is of."""
    t = _drawn(torch.float32, biases=True)
    t["x"] = t["x"].detach().bfloat16().requires_grad_()
    specs = _specs("w4a4")
    y, expected = _again(t, specs)[0], _kept(t, specs)[2]
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    _same(_gradients(y, t), _gradients(expected, t))


@pytest.mark.parametrize("lead", [(0,), (3, 0)])
def test_no_rows(lead: tuple[int, ...]) -> None:
    t = _drawn(torch.float32, lead=lead)
    y = _again(t, _specs("w4a4"))[0]
    assert y.shape == (*lead, OUT)
    found = torch.autograd.grad(y.sum(), list(t.values()))
    assert [g.shape for g in found] == [v.shape for v in t.values()]
    assert not any(g.any() for g in found)


@pytest.mark.parametrize("saves", [True, False])
def test_vmap(saves: bool) -> None:
    """Of inputs, with the gradients outside; and of gradients."""
    t, specs = _drawn(torch.float32, biases=True), _specs("w4a4")
    y = _again(t, specs)[0]
    made = torch.func.vmap(lambda x: _again({**t, "x": x}, specs, saves)[0])(t["x"])
    assert torch.equal(made, y)

    def of(grad: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, list(t.values()), grad, retain_graph=True)

    grads = torch.stack([torch.ones_like(y), y.detach()])
    expected = [torch.stack(each) for each in zip(*map(of, grads), strict=True)]
    alone = torch.autograd.grad(made, list(t.values()), grads[1])
    for a, b in zip(torch.func.vmap(of)(grads), expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    for a, b in zip(alone, expected, strict=True):
        assert (a - b[1]).norm() <= 1e-5 * b.norm()
    with pytest.raises(NotImplementedError, match="no batches of gradients"):
        torch.autograd.grad(y, list(t.values()), grads, is_grads_batched=True)


@pytest.mark.parametrize("saves", [True, False])
@pytest.mark.parametrize("name", ["w1a1", "w4a4", "w8a8"])
def test_opcheck(name: str, saves: bool) -> None:
    specs, t = _specs(name), _drawn(torch.float32, biases=True)
    if not saves:
        t = {n: v.detach() for n, v in t.items()}
    arguments = (
        t["x"], [t["gate"], t["up"]], [t["gate bias"], t["up bias"]], t["down"], t["down bias"],
        *specs, saves,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.quest.low_bit_swiglu, arguments)
    read = [r.detach() for r in low_bit_swiglu(*arguments)[1 : 1 + mlp._FIRST]]
    if saves:
        torch.library.opcheck(
            torch.ops.quest.low_bit_again, (torch.ones(10, 3), read, [], *specs[:2], WIDTH)
        )


def test_errors() -> None:
    t, specs = _drawn(torch.float32), _specs("w4a4")
    x, gate, up, down = (t[n].detach() for n in ("x", "gate", "up", "down"))
    for change, told in (
        ({"weights": [gate]}, "weights must be those of gate and up, got 1"),
        ({"weights": [gate, up, up]}, "weights must be those of gate and up, got 3"),
        ({"weights": [gate, up[:-1]]}, "gate must be torch.float32 of shape"),
        ({"weights": [gate, up[:, :-1]]}, "a weight must be"),
        ({"down": down[:, :-128]}, "a weight must be"),
        ({"biases": [gate[:, 0]]}, "biases must be none or one for each of 2 weights, got 1"),
        ({"last_weight": quest.Quantizer(grids.lloyd_max(4)).spec}, "there is no integer product"),
    ):
        asked: dict[str, Any] = {
            "x": x, "weights": [gate, up], "biases": [], "down": down, "bias": None,
            "activation": specs[0], "weight": specs[1], "last_activation": specs[2],
            "last_weight": specs[3], "saves": True,
        } | change  # fmt: skip
        with pytest.raises(ValueError, match=told):
            low_bit_swiglu(**asked)
        with torch._subclasses.FakeTensorMode() as mode:
            faked = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, asked)
            with pytest.raises(ValueError, match=told):
                low_bit_swiglu(**faked)
    with pytest.raises(RuntimeError, match="was told to save nothing, and a gradient is asked"):
        _again(_drawn(torch.float32), specs, False)


def _layers(recipe: str | None, bias: bool = False) -> list[nn.Linear]:
    torch.manual_seed(0)
    made = [nn.Linear(*s, bias=bias) for s in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, OUT))]
    return made if recipe is None else [quest.Linear.from_linear(m, recipe) for m in made]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a GPU with the kernels: layers multiply integers. Counts calls of the operator."""
    calls: list[int] = []
    real = mlp.low_bit_swiglu
    for module in (mlp, prologue):
        monkeypatch.setattr(module, "has_kernel", lambda *_: True)
    monkeypatch.setattr(mlp, "low_bit_swiglu", lambda *a: calls.append(1) or real(*a))
    monkeypatch.setattr(paths, "choose", lambda x, recipe: "integers")
    return calls


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("recipe", [None, "w4a4", "w1a1", "w4a16"])
def test_layers_that_are_called_again(recipe: str | None, bias: bool) -> None:
    """By a checkpoint where no kernel multiplies: y and gradients are the same."""
    _compared(_layers(recipe, bias))


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("recipe", ["w4a4", "w1a1"])
def test_layers_that_multiply_integers(recipe: str, bias: bool, fused: list[int]) -> None:
    layers = _layers(recipe, bias)
    if bias:  # of some
        layers[1].bias = None
    _compared(layers)
    assert fused == [1]


def _compared(layers: list[nn.Linear]) -> None:
    found = []
    for recompute in (False, True):
        x = inputs.draw("heavy", (2, 5, WIDTH), torch.float32, 0).requires_grad_()
        y = quest.swiglu(x, *layers, recompute=recompute)
        given = [x, *(p for layer in layers for p in layer.parameters())]
        found.append([y, *torch.autograd.grad(y.square().sum(), given)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_who_takes_the_operator(fused: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not without a gradient, with a hook, another path, shape or recipe, nor without a kernel."""
    x = inputs.draw("heavy", (2, 5, WIDTH), torch.float32, 0)

    def taken(layers: list[nn.Linear], recompute: bool = True) -> bool:
        fused.clear()
        quest.swiglu(x, *layers, recompute=recompute)
        return bool(fused)

    assert taken(_layers("w4a4"))
    assert not taken(_layers("w4a4"), recompute=False)
    with torch.no_grad():
        assert not taken(_layers("w4a4"))
    two = _layers("w4a4")
    two[2] = quest.Linear.from_linear(two[2], "w1a1")
    assert taken(two)
    assert not taken(_layers(None))
    other = _layers("w4a4")
    other[0] = quest.Linear.from_linear(other[0], "w1a1")
    assert not taken(other)
    for hooked in range(3):
        layers = _layers("w4a4")
        layers[hooked].register_forward_hook(lambda *_: None)
        assert not taken(layers)
    with torch.autocast("cpu", torch.bfloat16):
        assert taken(_layers("w4a4"))
    for which in (WIDTH, HIDDEN):
        with monkeypatch.context() as patch:
            patch.setattr(
                paths, "choose", lambda x, _, w=which: "values" if x.shape[-1] == w else "integers"
            )
            assert not taken(_layers("w4a4"))
    with monkeypatch.context() as patch:
        patch.setattr(mlp, "has_kernel", lambda spec, rows: rows.shape != (2, 5, HIDDEN))
        assert not taken(_layers("w4a4"))


def test_what_does_not_fit_is_said(fused: list[int]) -> None:
    layers = _layers("w4a4")
    with pytest.raises(ValueError, match="x must have 256 columns"):
        quest.swiglu(torch.ones(3, 128), *layers, recompute=True)
    with pytest.raises(ValueError, match=r"x must have 256 columns .*384"):
        quest.swiglu(torch.ones(3, WIDTH), layers[0], layers[1], layers[0], recompute=True)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        quest.swiglu(torch.ones(3, WIDTH), layers[0], layers[1], None, recompute=True)  # type: ignore[arg-type]


def test_a_model_keeps_less(fused: list[int]) -> None:
    """The same loss and gradients, and nothing of the hidden width in floats waits."""
    config = LlamaConfig(64, 1, 128, 2)
    torch.manual_seed(0)
    model = quest.quantize_(Llama(config), "w4a4")
    tokens = torch.arange(16)[None]
    hidden = config.hidden

    def run() -> tuple[list[Tensor], int]:
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            loss = model(tokens).float().square().mean()
        wide = sum(t.is_floating_point() and t.shape[-1] == hidden and t.ndim > 1 for t in kept)
        return list(torch.autograd.grad(loss, list(model.parameters()))), wide

    plain, before = run()
    assert model.recompute_() is model
    again, after = run()
    assert fused == [1]
    assert (before > 1, after) == (True, 0)
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)
    model.recompute_(False)
    assert run()[1] == before
    with pytest.raises(ValueError, match="blocks is 2: must be from 0 to 1"):
        model.recompute_(2)


def test_some_blocks_make_again() -> None:
    """The first."""
    model = Llama(LlamaConfig(16, 3, 128, 2))

    def told(blocks: bool | int) -> list[bool]:
        model.recompute_(blocks)
        return [block.mlp.recompute for block in model.layers]

    assert told(2) == [True, True, False]
    assert told(1) == [True, False, False]
    assert told(True) == told(3) == [True] * 3
    assert told(False) == told(0) == [False] * 3
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=f"blocks is {wrong}: must be from 0 to 3"):
            model.recompute_(wrong)
    with pytest.raises(TypeError, match="integer"):
        model.recompute_(1.5)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_an_input_without_columns(fused: list[int]) -> None:
    """Which layer it goes to is asked before anything runs."""
    layers = [quest.Linear(0, 128), quest.Linear(0, 128), quest.Linear(128, 3)]
    for layer in layers[:2]:
        layer.set_recipe(quest.recipe("w8a8", transform=quest.Identity()))
    assert quest.swiglu(torch.ones(4, 0), *layers, recompute=True).shape == (4, 3)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("recipe", ["w4a4", "w1a1"])
def test_compiled(recipe: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers, of rows that lie apart, too; and gate and up are not saved."""
    for module in (mlp, prologue):
        monkeypatch.setattr(module, "has_kernel", _always)
    monkeypatch.setattr(paths, "choose", _integers)
    layers = _layers(recipe, True)
    torch.compiler.reset()
    run = torch.compile(quest.swiglu, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    wide = inputs.draw("heavy", (2, 5, 2 * WIDTH), torch.float32, 0)
    found = []
    for function in (quest.swiglu, run):
        x = wide[..., :WIDTH].detach().requires_grad_()
        y = function(x, *layers, recompute=True)
        given = [x, *(p for layer in layers for p in layer.parameters())]
        found.append([y, *torch.autograd.grad(y.square().sum(), given)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def _always(spec: str, rows: Tensor) -> bool:
    return True


def _integers(x: Tensor, recipe: quest.Recipe) -> str:
    return "integers"


def test_a_bias_that_changes_before_the_backward_is_an_error() -> None:
    """It is needed again. Weights are not: their operands wait."""
    specs, t = _specs("w4a4"), _drawn(torch.float32, biases=True)
    y = _again(t, specs)[0]
    expected = _gradients(_again(t, specs)[0], t)
    with torch.no_grad():
        t["gate"].mul_(2)
    _same(_gradients(y, t), expected)
    y = _again(t, specs)[0]
    with torch.no_grad():
        t["gate bias"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
