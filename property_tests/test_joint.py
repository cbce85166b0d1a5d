"""Layers that share an input: what is quantized once, who is called alone, and errors."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import quest
from property_tests.calls import counted, shapes
from quest import frozen, joint, lowbit, lowbit_linear, ops, paths
from quest.models import Llama, LlamaConfig
from quest.quantizer import Quantizer
from quest.reference import bounds
from quest.reference import hadamard as reference_hadamard

# Two of one shape: one may be taken for the other.
OUTS = (6, 6, 3)


def _layers(name: str = "w4a4", bias: bool = False) -> list[quest.Linear]:
    torch.manual_seed(0)
    return [quest.Linear(32, n, bias=bias, recipe=name) for n in OUTS]


def _x() -> Tensor:
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(1))


def _home(path: str, part: str, values: tuple[Any, str]) -> tuple[Any, str]:
    """Where what a path calls is found: of the integers', a part of its operator."""
    return (lowbit_linear, part) if path == "integers" else values


@pytest.mark.parametrize("path", paths.PATHS)
def test_the_input_is_quantized_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, x = _layers(), _x()
    seen = counted(monkeypatch, *_home(path, "encode_saved", (Quantizer, "__call__")))
    with paths.only(path):
        made = quest.together(x, layers)
    assert [tuple(y.shape) for y in made] == [(5, n) for n in OUTS]
    assert shapes(seen).count((5, 32)) == 1
    assert len(seen) == 4
    with paths.only(path):
        for y, layer in zip(made, layers, strict=True):
            assert torch.equal(y, layer(x))


@pytest.mark.parametrize("path", paths.PATHS)
def test_the_gradient_is_turned_back_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, x = _layers(), _x().requires_grad_()
    home = _home(path, "masked_transpose", (ops, "masked_transpose"))
    seen = counted(monkeypatch, *home)
    with paths.only(path):
        sum(y.square().sum() for y in quest.together(x, layers)).backward()
    assert shapes(seen).count((5, 32)) == 1
    assert len(seen) == 4
    assert all(layer.weight.grad is not None for layer in layers)


@pytest.mark.whole
@pytest.mark.parametrize("path", paths.PATHS)
def test_the_gradient_of_the_input_is_the_sum_of_all(path: str) -> None:
    """Each weight with its own scale: those of one shape are far apart."""
    layers, x = _layers(), _x().requires_grad_()
    with torch.no_grad():
        for layer, factor in zip(layers, (1.0, 100.0, 0.01), strict=True):
            layer.weight *= factor
    grads = [torch.randn(5, n, generator=torch.Generator().manual_seed(n)) for n in OUTS]
    with paths.only(path):
        torch.autograd.backward(quest.together(x, layers), grads)
    total, size = np.zeros((5, 32)), np.zeros((5, 32))
    for layer, g in zip(layers, grads, strict=True):
        w_hat = layer.recipe.weight(layer.weight.detach()).double().numpy()
        total += g.double().numpy() @ w_hat
        size += g.abs().double().numpy() @ np.abs(w_hat)
    q = layers[0].recipe.activation
    order = q.transform.order(32)
    mask = q.quantize(x.detach()).mask.numpy()
    expected = reference_hadamard.apply_transpose(total * mask, order)
    # The values, the terms of all products, two sums that are stored, the rotation and its store.
    count = bounds.VALUE_ROUNDINGS + sum(OUTS) + 2
    count += bounds.additions(order) + bounds.normalisations(order) + 1
    bound = bounds.gamma(count, bounds.U32) * bounds.absolute_sum(size, order)
    assert x.grad is not None
    assert (np.abs(x.grad.double().numpy() - expected) <= bound).all()


@pytest.mark.parametrize("path", paths.PATHS)
def test_outputs_that_nobody_uses(path: str) -> None:
    """Their weights get no gradient, or zeros; the others get theirs."""
    layers, x = _layers(bias=True), _x().requires_grad_()
    with paths.only(path):
        quest.together(x, layers)[1].sum().backward()
        alone = copy.deepcopy(layers[1])
        alone.zero_grad()
        z = _x().requires_grad_()
        alone(z).sum().backward()
    for mine, theirs in (
        (x.grad, z.grad),
        (layers[1].weight.grad, alone.weight.grad),
        (layers[1].bias.grad, alone.bias.grad),
    ):
        assert mine is not None
        assert theirs is not None
        assert torch.equal(mine, theirs)
    for layer in (layers[0], layers[2]):
        assert layer.weight.grad is None or not layer.weight.grad.any()


def test_only_the_input_or_only_a_weight_asks_for_a_gradient() -> None:
    layers = _layers()
    for layer in layers:
        layer.weight.requires_grad_(False)
    x = _x().requires_grad_()
    with paths.only("integers"):
        quest.together(x, layers)[0].sum().backward()
        assert x.grad is not None
        layers[2].weight.requires_grad_()
        made = quest.together(_x(), layers)
    (made[0].sum() + made[2].sum()).backward()
    assert [layer.weight.grad is None for layer in layers] == [True, True, False]


@pytest.mark.parametrize("recipe", ["bf16", "w4a4", "w4a16"])
def test_a_stacked_model_is_copied(recipe: str) -> None:
    layers = torch.nn.ModuleList(quest.Linear(16, n, recipe=recipe).eval() for n in (3, 5))
    for layer in layers:
        layer.freeze()
    assert joint.stack(list(layers))
    x = torch.randn(2, 16)
    with torch.no_grad():
        twins = list(copy.deepcopy(layers))
        both = (quest.together(x, list(layers)), quest.together(x, twins))
        for y, z in zip(*both, strict=True):
            torch.testing.assert_close(y, z)  # frozen anew, and apart
            assert not y.requires_grad


def test_layers_that_come_one_by_one() -> None:
    layers = [quest.Linear(16, n, recipe="w4a4") for n in (3, 5)]
    x = torch.randn(2, 16)
    made: Any = quest.together(x, (layer for layer in layers))  # type: ignore[arg-type]
    assert [y.shape[-1] for y in made] == [3, 5]


def test_biases_of_some() -> None:
    layers = _layers(bias=True)
    layers[1].bias = None
    with torch.no_grad():
        layers[0].bias.fill_(3.0)
    for path in paths.PATHS:
        with paths.only(path):
            for y, layer in zip(quest.together(_x(), layers), layers, strict=True):
                assert torch.equal(y, layer(_x()))


def test_the_gradient_of_a_float32_weight_is_rounded_once() -> None:
    """Under autocast: the product is stored in bfloat16, what H^T makes of it in float32."""
    (layer,) = _layers()[:1]
    # One row: products of two bfloat16 are exact in float32, and there is one way to store them.
    x, grad = _x()[:1], torch.randn(1, OUTS[0])
    with torch.autocast("cpu", torch.bfloat16), paths.only("integers"):
        y = layer(x.bfloat16())
    y.backward(grad.bfloat16())
    q = layer.recipe.activation
    x_hat = q(x.bfloat16()).double()
    product = (grad.bfloat16().double().t() @ x_hat).bfloat16().double()
    mask = layer.recipe.weight.quantize(layer.weight.detach()).mask
    order = q.transform.order(32)
    exact = reference_hadamard.apply_transpose(np.where(mask, product, 0.0), order)
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    bound = bounds.rotation(np.where(mask, product, 0.0), order, transpose=True)
    bound = bounds.output(exact, bound, "float32")
    assert (np.abs(layer.weight.grad.double().numpy() - exact) <= bound).all()


@pytest.mark.parametrize("path", paths.PATHS)
@pytest.mark.parametrize("grad", [False, True])
def test_together_under_autocast(path: str, grad: bool) -> None:
    """The input is rounded once for all, as each layer rounds it."""
    layers, x = _layers(), _x()
    with torch.autocast("cpu", torch.bfloat16), paths.only(path), torch.set_grad_enabled(grad):
        for y, layer in zip(quest.together(x, layers), layers, strict=True):
            assert y.dtype == torch.bfloat16
            assert torch.equal(y, layer(x))


@pytest.mark.parametrize("gated", [False, True])
def test_a_checkpoint(gated: bool) -> None:
    """What is saved is unpacked once, which is all that a checkpoint allows."""
    layers, x, gate = _layers(), _x().requires_grad_(), torch.randn_like(_x()).requires_grad_()
    specs = layers[0].recipe.activation.spec, layers[0].recipe.weight.spec
    weights = [layer.weight for layer in layers]

    def run(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        made = lowbit_linear.low_bit_linear(
            x, weights, [], *specs, x.dtype, True, gate if gated else None
        )
        return torch.cat(made[: len(layers)], -1).square().sum()

    found = []
    for call in (run, functools.partial(checkpoint, run, use_reentrant=False)):
        inputs = [x, *weights, *([gate] if gated else [])]
        found.append(torch.autograd.grad(call(x, gate), inputs))
    for plain, kept in zip(*found, strict=True):
        assert torch.equal(plain, kept)


def test_layers_that_are_called_one_after_another() -> None:
    """Other modules, recipes and dtypes."""
    x = _x()
    layers = _layers()
    half = quest.Linear(32, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        both = quest.together(x, (layers[0], half))
        assert torch.equal(both[0], layers[0](x))
        assert torch.equal(both[1], half(x))
    mixed: list[nn.Module] = [nn.Linear(32, 4), *layers, quest.Linear(32, 4, recipe="w1a1")]
    # With a module of another kind, and with another recipe alone.
    for chosen in (mixed, mixed[1:]):
        for y, layer in zip(quest.together(x, chosen), chosen, strict=True):
            assert torch.equal(y, layer(x))


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_see_their_calls(kind: str) -> None:
    layers, seen = _layers(), []
    getattr(layers[1], f"register_{kind}_hook")(lambda *_: seen.append(kind))
    sum(y.sum() for y in quest.together(_x().requires_grad_(), layers)).backward()
    assert seen == [kind]


def test_frozen_weights_lie_stacked() -> None:
    layers, x = [layer.freeze() for layer in _layers(bias=True)], _x()
    with torch.no_grad():
        expected = [layer(x) for layer in layers]
        assert all(map(torch.equal, quest.together(x, layers), expected))  # not stacked yet
        assert joint.stack(layers)
        assert not joint.stack(layers)
        assert not joint.stack(layers[:2])
        made = quest.together(x, layers)
        held = [layer.current() for layer in layers]
        whole = frozen.stacked([h for h in held if h is not None])
        assert whole is not None
        assert whole.values is not None
        for h in held:
            assert h is not None
            assert h.values is not None
            # One storage: nothing is held twice.
            assert (
                h.values.untyped_storage().data_ptr() == whole.values.untyped_storage().data_ptr()
            )
        again = quest.together(x, layers)
        assert frozen.stacked([h for h in map(quest.Linear.current, layers) if h]) is whole
        for y, z, one, layer in zip(made, again, expected, layers, strict=True):
            assert torch.equal(y, z)
            torch.testing.assert_close(y, one)
            torch.testing.assert_close(layer(x), one)
        # A part, or another order, is not the whole.
        assert frozen.stacked([held[1], held[0], held[2]]) is None  # type: ignore[list-item]
        assert frozen.stacked(held[:2]) is None  # type: ignore[arg-type]
        # Nor is a mixture of two.
        other = frozen.stack([frozen.freeze(y.weight, y.recipe) for y in layers])
        assert frozen.stacked([held[0], other[1], held[2]]) is None  # type: ignore[list-item]
        # A weight that changes is frozen anew, and leaves the stack.
        layers[1].weight.mul_(-1)
        changed = quest.together(x, layers)
        torch.testing.assert_close(changed[0], made[0])
        for y, layer in zip(changed, layers, strict=True):
            torch.testing.assert_close(y, layer(x))
        assert not torch.allclose(changed[1], made[1])


def test_what_is_not_stacked() -> None:
    layers = _layers()
    assert not joint.stack(layers)  # not frozen
    layers[0].freeze()
    assert not joint.stack(layers)
    for layer in layers:
        layer.freeze()
    assert not joint.stack([layers[0], layers[0]])
    assert not joint.stack(layers[:1])
    assert not joint.stack([*layers, nn.Linear(32, 4)])
    assert not joint.stack([*layers, quest.Linear(32, 4, recipe="w1a1").freeze()])
    assert joint.stack(layers)


@pytest.mark.parametrize("path", ["values", "integers"])
@pytest.mark.parametrize("heights", [(4, 8), (4, 12)])
def test_weights_of_other_heights_than_the_layers(path: str, heights: tuple[int, int]) -> None:
    """As of rows that were pruned by hand, which torch.nn.Linear takes."""
    one, other = (quest.Linear(16, 8, bias) for bias in (True, False))
    for layer, height in zip((one, other), heights, strict=True):
        layer.weight = nn.Parameter(torch.randn(height, 16))
    one.bias = nn.Parameter(torch.randn(heights[0]))
    model = nn.ModuleDict({"one": one, "other": other})
    model.shared_inputs = (("one", "other"),)  # type: ignore[assignment]
    x = torch.randn(3, 16)
    with paths.only(path):
        want = one(x), other(x)
        assert all(map(torch.equal, quest.together(x, (one, other)), want))
        quest.freeze_(model)
        with torch.no_grad():
            assert all(map(torch.equal, quest.together(x, (one, other)), want))


def test_frozen_beside_one_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, x = _layers(), _x()
    for layer in layers[:2]:
        layer.freeze()
    seen = counted(monkeypatch)
    with torch.no_grad():
        quest.together(x, layers)
    weights = [tuple(t.shape) for t in seen if len(t) != len(x)]
    assert weights == [(OUTS[2], 32)]


def test_a_frozen_model_is_stacked() -> None:
    model = Llama(LlamaConfig(vocab_size=64, layers=1, width=64, heads=2))
    quest.quantize_(model, "w4a4")
    tokens = torch.zeros(2, 3, dtype=torch.long)
    with torch.no_grad():
        expected = model(tokens)
        quest.freeze_(model)
        torch.testing.assert_close(model(tokens), expected)
    attention = model.layers[0].self_attn
    held = [getattr(attention, f"{n}_proj").current() for n in "qkv"]
    assert frozen.stacked(held) is not None
    copied = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(copied(tokens), model(tokens))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens), expected)


@pytest.mark.parametrize("where", ["all", "one"])
def test_hooks_of_all_modules_and_forwards_of_one(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, x, seen = _layers(), _x(), []
    if where == "all":
        hook = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    else:
        real = layers[0].forward
        monkeypatch.setattr(layers[0], "forward", lambda x: seen.append(1) or real(x))
    quest.together(x, layers)
    if where == "all":
        hook.remove()
    assert len(seen) == (3 if where == "all" else 1)


def test_a_backward_under_autocast() -> None:
    layers, x = _layers(), _x().requires_grad_()
    with paths.only("integers"):
        made = torch.cat(quest.together(x, layers), -1).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        made.backward()
    mine = x.grad
    x.grad = None
    with paths.only("integers"):
        torch.cat(quest.together(x, layers), -1).square().sum().backward()
    assert mine is not None
    assert torch.equal(mine, x.grad)


def test_operands_are_stacked_too() -> None:
    """Where layers multiply integers; here by hand, since only Hopper has such layers."""
    q = quest.recipe("w4a4").weight
    weights = [layer.weight.detach() for layer in _layers()]
    parts = []
    for w in weights:
        operand, scale, _, sums = lowbit.encode(w, q.spec, "integers")
        packed = q.pack(w).codes
        parts.append(frozen.Frozen(None, operand, scale, sums, packed, names="n", kinds="k"))
    rows = frozen.stack(parts)
    whole = frozen.stacked(rows)
    assert whole is not None
    for name in ("operand", "scale", "sums", "packed"):
        stacked = getattr(whole, name)
        assert torch.equal(stacked, torch.cat([getattr(p, name) for p in parts]))
        assert all(
            torch.equal(getattr(r, name), getattr(p, name))
            for r, p in zip(rows, parts, strict=True)
        )
    assert whole.values is None
    assert (whole.names, whole.kinds, whole.path) == ("n", "k", "integers")
    bits = [frozen.Frozen(None, p.packed, p.scale, p.sums, p.packed) for p in parts]
    twins = frozen.stack(bits)
    assert all(t.packed is t.operand for t in twins)


def test_a_model_calls_them_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Llama(LlamaConfig(vocab_size=64, layers=1, width=64, heads=2))
    quest.quantize_(model, "w4a4")
    seen = counted(monkeypatch)
    model(torch.zeros(2, 3, dtype=torch.long)).sum().backward()
    made = shapes(seen)
    # q, k and v; o; gate and up; down.
    assert len([s for s in made if len(s) == 3]) == 4
    assert len(made) == 4 + 7


def test_compiled() -> None:
    layers, x = _layers(), _x()

    def loss(x: Tensor) -> Tensor:
        return torch.cat(quest.together(x, layers), -1).square().mean()

    torch.compiler.reset()
    expected = loss(x)
    expected.backward()
    grads = [layer.weight.grad for layer in layers]
    for layer in layers:
        layer.weight.grad = None
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(x)
    got.backward()
    torch.testing.assert_close(got, expected)
    for layer, grad in zip(layers, grads, strict=True):
        torch.testing.assert_close(layer.weight.grad, grad)


@pytest.mark.parametrize(
    ("x", "layers", "error", "told"),
    [
        (torch.ones(2, 32), [], ValueError, "layers must name at least one layer"),
        (torch.ones(2, 32), nn.Linear(32, 4), TypeError, "a sequence of layers, got a Linear"),
        (torch.ones(2, 32), [torch.nn.Linear(32, 4), 3], TypeError, "Modules, got int"),
        (torch.ones(2, 31), _layers(), ValueError, "x must have 32 columns"),
        (torch.ones(2, 32).double(), _layers(), TypeError, "x must have the weight's dtype"),
        ([1.0], _layers(), TypeError, "x must be a torch.Tensor"),
    ],
)
def test_errors(x: Any, layers: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=re.escape(told)):
        quest.together(x, layers)
