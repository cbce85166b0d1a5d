"""Which layers share an input's quantization, and which are called alone; one case of each kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

import quest
from property_tests.calls import counted, shapes
from quest import frozen, joint, paths

pytestmark = pytest.mark.whole

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
PLAIN = quest.Identity()


def _layers(*outs: int, bias: bool = False, dtype: torch.dtype | None = None) -> list[quest.Linear]:
    torch.manual_seed(0)
    return [quest.Linear(16, n, bias, "w4a4", dtype=dtype).eval() for n in outs]


def _alone(layers: list[quest.Linear]) -> list[Tensor]:
    return [layer(X) for layer in layers]


def _same(made: tuple[Tensor, ...], expected: list[Tensor]) -> None:
    for y, z in zip(made, expected, strict=True):
        torch.testing.assert_close(y, z)  # products of stacked weights may sum in another order


@pytest.mark.parametrize("path", paths.PATHS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("outs", [(4,), (4, 5)])
def test_one_or_two_layers_that_are_not_frozen(
    outs: tuple[int, ...], grad: bool, path: str
) -> None:
    layers = _layers(*outs, bias=True)
    with paths.only(path), torch.set_grad_enabled(grad):
        made = quest.together(X, layers)
        for y, z in zip(made, _alone(layers), strict=True):
            assert torch.equal(y, z)
            assert y.requires_grad == grad


@pytest.mark.parametrize("lacks", [0, 1])
def test_layers_of_two_widths_of_which_one_has_no_bias(lacks: int) -> None:
    layers = _layers(4, 5, bias=True)
    layers[lacks].bias = None
    with paths.only("integers"):
        for y, z in zip(quest.together(X, layers), _alone(layers), strict=True):
            assert torch.equal(y, z)
    assert [len(b) for b in joint.biases_of(layers)] == [4, 5]


@pytest.mark.parametrize("outs", [(4,), (4, 5), (4, 5, 6)])
@pytest.mark.parametrize("bias", [False, True])
def test_frozen_layers_quantize_the_input_once(
    bias: bool, outs: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = counted(monkeypatch)
    layers = [layer.freeze() for layer in _layers(*outs, bias=bias)]
    with torch.no_grad():
        expected = _alone(layers)
        assert joint.stack(layers) == (len(outs) > 1)
        quantized.clear()
        _same(quest.together(X, layers), expected)
    assert shapes(quantized) == [(3, 16)]


def test_a_stack_beside_a_layer_that_is_not_frozen() -> None:
    """What is frozen is a whole stack, and yet not all layers."""
    layers = _layers(4, 5, 6, bias=True)
    assert joint.stack([layer.freeze() for layer in layers[:2]])
    with torch.no_grad():
        _same(quest.together(X, layers), _alone(layers))


def test_a_stack_takes_no_part_of_another() -> None:
    layers = [layer.freeze() for layer in _layers(4, 5, 6)]
    assert joint.stack(layers[:2])
    held = [layer.current() for layer in layers]
    assert not joint.stack(layers[1:])
    assert [layer.current() for layer in layers] == held


def test_weights_of_two_dtypes_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = counted(monkeypatch)
    layers = [*_layers(4), *_layers(5, dtype=torch.bfloat16)]
    with torch.autocast("cpu", torch.bfloat16):
        with paths.only("integers"):
            for y, z in zip(quest.together(X, layers), _alone(layers), strict=True):
                assert torch.equal(y, z)
        quantized.clear()
        quest.together(X, layers)
    assert shapes(quantized).count((3, 16)) == 2
    for layer in layers:
        layer.freeze()
    assert not joint.stack(layers)


def test_the_bias_of_one_layer_is_not_copied() -> None:
    layers, one, x = _layers(4, 5, bias=True), frozen.Frozen(), torch.zeros(1)
    assert joint.joined(layers[:1], one, x) is layers[0].bias
    both = joint.joined(layers, one, x)
    assert both is not None
    assert torch.equal(both, torch.cat([layer.bias for layer in layers]))
    assert joint.joined(_layers(4), one, x) is joint.joined(_layers(4, 5), one, x) is None


def _global(kind: str) -> Callable[[nn.Module, Any], Any]:
    register = getattr(modules, f"register_module_{kind}_hook")
    return lambda _, hook: register(hook)


KINDS = ("forward", "forward_pre", "full_backward", "full_backward_pre")
WATCHES: dict[str, Callable[[nn.Module, Any], Any]] = {
    **{kind: getattr(nn.Module, f"register_{kind}_hook") for kind in KINDS},
    **{f"all {kind}": _global(kind) for kind in KINDS},
}


@pytest.mark.parametrize("watch", WATCHES.values(), ids=WATCHES)
def test_every_hook_sees_its_calls(watch: Callable[[nn.Module, Any], Any]) -> None:
    """Those of one layer, and those of all modules; until they are removed."""
    layers, seen = _layers(4, 5), list[nn.Module]()
    handle = watch(layers[1], lambda module, *_: seen.append(module))
    try:
        assert joint.hooked(layers[1])
        made = torch.cat(quest.together(X.clone().requires_grad_(), layers), -1)
        torch.autograd.backward(made.sum())
    finally:
        handle.remove()
    assert seen.count(layers[1]) == 1
    assert not joint.hooked(layers[1])


def test_a_layer_that_was_compiled_or_replaced_sees_its_calls() -> None:
    for name in ("_compiled_call_impl", "forward"):
        layers, seen = _layers(4, 5), list[str]()
        real = layers[1].forward

        def call(x: Tensor, seen: list[str] = seen, real: Any = real) -> Tensor:
            seen.append("called")
            made: Tensor = real(x)
            return made

        assert not joint.hooked(layers[1])
        setattr(layers[1], name, call)
        quest.together(X, layers)
        assert seen == ["called"], name


@pytest.mark.parametrize(
    ("x", "layers", "error", "told"),
    [
        (X, [nn.Linear(16, 4), 3], TypeError, r"layers must hold torch\.nn\.Modules, got int"),
        (X, [quest.Linear(16, 4), quest.Linear(8, 4)], ValueError, r"x must have 8 columns"),
        (X.double(), _layers(4, 5), TypeError, "x must have the weight's dtype torch.float32"),
        (X.to("meta"), _layers(4, 5), ValueError, "x is on meta, the weight on cpu"),
    ],
)
def test_what_does_not_fit(x: Tensor, layers: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        quest.together(x, layers)


def test_a_norm_before_no_layers() -> None:
    with torch.no_grad(), pytest.raises(ValueError, match="layers must name at least one layer"):
        quest.normed(X, nn.RMSNorm(16, 1e-5), [])


def test_recipes_of_one_name_are_two() -> None:
    """What was changed of a recipe stands in its parts."""
    changed = [quest.recipe("w4a4", estimator=quest.STE()), quest.recipe("w4a4", transform=PLAIN)]
    assert changed[0].name == changed[1].name
    layers = _layers(4, 4)
    for layer, made in zip(layers, changed, strict=True):
        layer.set_recipe(made)
    assert joint.alike(layers) is None
    for y, z in zip(quest.together(X, layers), _alone(layers), strict=True):
        assert torch.equal(y, z)


def test_a_bias_alone_asks_for_a_gradient() -> None:
    layers = _layers(4, 5, bias=True)
    for layer in layers:
        layer.weight.requires_grad_(False)
    layers[0].bias.requires_grad_(False)
    with paths.only("integers"):
        sum(y.sum() for y in quest.together(X, layers)).backward()
    assert layers[0].bias.grad is None
    assert layers[1].bias.grad is not None
    assert torch.equal(layers[1].bias.grad, torch.full((5,), float(len(X))))


def test_a_frozen_layer_beside_another_is_not_the_whole() -> None:
    layers = _layers(4, 4)
    layers[0].freeze()
    assert joint.whole(layers) is joint.whole(layers[::-1]) is joint.whole(layers[1:]) is None
    assert joint.whole(layers[:1]) is layers[0].current()
