"""A layer's life: made, frozen, called again, moved, trained and checked; one case of each kind."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed import tensor as sharded
from torch.nn.utils import parametrize

import quest
from property_tests.calls import counted, shapes
from quest import direct, paths

pytestmark = pytest.mark.whole

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def _layer(recipe: str = "w4a4", bias: bool = False) -> quest.Linear:
    torch.manual_seed(0)
    return quest.Linear(16, 4, bias, recipe).eval()


def _weights(seen: list[Tensor]) -> int:
    return shapes(seen).count((4, 16))


def test_a_block_or_a_group_must_divide_the_width() -> None:
    block = quest.recipe("w4a4", transform=quest.Hadamard(32))
    plain = quest.recipe("w4a4-4:8", transform=quest.Identity())
    for recipe, width, told in (
        (block, 48, "width 48 is not divisible by the Hadamard block 32"),
        (plain, 12, "width 12 is not divisible by"),
    ):
        with pytest.raises(ValueError, match=told):
            quest.Linear(width, 4, recipe=recipe)
        layer = quest.Linear(width, 4, recipe="bf16")
        with pytest.raises(ValueError, match=told):
            layer.set_recipe(recipe)
        assert layer.recipe == quest.recipe("bf16")
    # Of the input, too, where a layer was given another weight.
    dense = nn.Linear(48, 4)
    dense.weight = nn.Parameter(torch.ones(4, 64))
    with pytest.raises(ValueError, match="width 48 is not divisible by the Hadamard block 32"):
        quest.Linear.from_linear(dense, block)


def test_registries_are_not_shared_with_the_layer_it_was_made_of() -> None:
    dense, seen = nn.Linear(16, 4), list[str]()
    dense.register_forward_hook(lambda *_: seen.append("before"))
    layer: Any = quest.Linear.from_linear(dense, "w4a4")
    layer.register_forward_hook(lambda *_: seen.append("own"))
    layer.bias = None
    layer.register_buffer("more", X)
    assert dense.bias is not None
    assert list(dense.buffers()) == []
    dense(X)
    assert seen == ["before"]
    layer(X)
    assert seen == ["before", "before", "own"]


def test_hooks_on_loading_are_the_new_layer_s() -> None:
    """They get the layer that is loaded, also where the one it was made of is gone."""
    dense, seen = nn.Linear(16, 4), list[object]()
    dense.register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    layer = quest.Linear.from_linear(dense, "w4a4")
    state = dense.state_dict()
    dense.load_state_dict(state)
    assert seen == [dense]
    del dense
    seen.clear()
    gc.collect()
    layer.load_state_dict(state)
    assert seen == [layer]


def test_a_copy_of_a_compiled_layer_is_not_compiled() -> None:
    """What was compiled calls the layer that it was compiled of."""
    dense = nn.Linear(16, 4)
    dense.compile(backend="eager")
    layer = quest.Linear.from_linear(dense, "w1a1")
    assert torch.equal(layer(X), layer.forward(X))
    assert not torch.equal(layer(X), dense(X))


def test_what_no_layer_is_made_of() -> None:
    other: Any = nn.Conv1d(16, 4, 1)
    with pytest.raises(TypeError, match=r"linear must be a torch\.nn\.Linear, got Conv1d"):
        quest.Linear.from_linear(other, "w4a4")
    dense = nn.Linear(16, 4)
    dense.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="its forward was replaced"):
        quest.Linear.from_linear(dense, "w4a4")


def test_nothing_that_a_layer_computes_is_lost() -> None:
    class Doubled(quest.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    doubled = Doubled(16, 4)
    with pytest.raises(ValueError, match="and Doubled has one of its own, which would be lost"):
        quest.Linear.from_linear(doubled, "w4a4")
    assert torch.equal(Doubled.from_linear(doubled, "w4a4")(X), doubled(X))
    for name in ("weight", "bias"):
        for layer in (nn.Linear(16, 4), quest.Linear(16, 4, bias=True)):
            parametrize.register_parametrization(layer, name, nn.Identity())
            with pytest.raises(ValueError, match="linear must hold its parameters"):
                quest.Linear.from_linear(layer, "w4a4")


# torch's own forward mode asks for it.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_forward_mode_is_refused() -> None:
    """torch's custom operators drop tangents, and a derivative of 0 would be silent."""
    layer, norm = quest.Linear(16, 16, bias=True), nn.RMSNorm(16, eps=1e-5)
    x, v = torch.randn(2, 16), torch.randn(2, 16)
    frozen = quest.Linear(16, 16).eval().freeze()
    quantizer = quest.recipe("w4a4").activation
    functions: list[Callable[[Tensor], object]] = [
        layer, frozen, quantizer, quest.Hadamard(16).apply, quest.Hadamard(16).transpose,
        quest.recipe("w4a16").activation,
        lambda t: quest.together(t, (layer, layer))[1],
        lambda t: quest.gated(t, x, layer), lambda t: quest.gated(x, t, layer),
        lambda t: quest.added(t, layer, x), lambda t: quest.normed(t, norm, (layer,))[1][0],
        lambda t: torch.func.functional_call(layer, {"bias": t[0]}, (x,)),
        lambda t: torch.func.functional_call(layer, {"weight": t.repeat(8, 1)}, (x,)),
    ]  # fmt: skip
    for function in functions:
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
            torch.func.jvp(function, (x,), (v,))
        with (
            pytest.raises(NotImplementedError, match="no forward-mode derivatives"),
            torch.autograd.forward_ad.dual_level(),
        ):
            function(torch.autograd.forward_ad.make_dual(x, v))
    with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        torch.func.jacfwd(layer)(x)
    # Which torch.no_grad does not turn off.
    with (
        torch.no_grad(), paths.only("integers"),
        pytest.raises(NotImplementedError, match="no forward-mode derivatives"),
        torch.autograd.forward_ad.dual_level(),
    ):  # fmt: skip
        quest.gated(x, torch.autograd.forward_ad.make_dual(x, v), layer)
    # What asks for none may be computed meanwhile.
    y, dy = torch.func.jvp(lambda t: layer(x) + t, (x,), (v,))
    assert torch.equal(y, layer(x) + x)
    assert torch.equal(dy, v)
    with torch.autograd.forward_ad.dual_level():
        assert quantizer.quantize(torch.autograd.forward_ad.make_dual(x, v)).codes.shape == x.shape


def test_a_recipe_is_no_bias() -> None:
    """It stands behind the bias, and any text is as good as True there."""
    for name in ("w1a1", quest.recipe("w1a1")):
        with pytest.raises(TypeError, match=r"bias must be True or False, got .*recipe="):
            quest.Linear(16, 4, name)
    assert quest.Linear(16, 4, 1).bias is not None  # as torch.nn.Linear takes it


def test_an_assigned_recipe_is_the_layer_s() -> None:
    """What was frozen for the one before it is dropped."""
    layer, other = _layer().freeze(), _layer("w1a1")
    layer.recipe = "w1a1"
    assert layer.recipe == quest.recipe("w1a1")
    with torch.no_grad():
        assert torch.equal(layer(X), other(X))
    with pytest.raises(ValueError, match="recipe must be"):
        layer.recipe = "w9a9"
    with pytest.raises(ValueError, match="width 16 is not divisible"):
        layer.recipe = quest.recipe("w4a4", transform=quest.Hadamard(32))
    assert layer.recipe == quest.recipe("w1a1")
    for made in (copy.deepcopy(layer), quest.Linear.from_linear(layer, layer.recipe)):
        assert made.recipe == layer.recipe


@pytest.mark.parametrize("path", ["values", "integers"])
def test_second_derivatives_are_refused(path: str) -> None:
    layer, x = _layer(), X.clone().requires_grad_()
    with paths.only(path):
        (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        dx.sum().backward()


@pytest.mark.parametrize("path", ["values", "integers"])
@pytest.mark.parametrize("lead", [(3,), (3, 1), ()])
def test_what_comes_out_can_be_written_to(path: str, lead: tuple[int, ...]) -> None:
    """As by torch.nn.ReLU(inplace=True) behind a layer."""
    layers = [_layer(bias=True).train(), quest.Linear(16, 4), quest.Linear(16, 4)]
    up, down = layers[1], quest.Linear(4, 16)
    for call in (
        lambda x: (layers[0](x),),
        lambda x: quest.together(x, layers),
        lambda x: (quest.swiglu(x, layers[0], up, down),),
    ):
        found = []
        for write in (lambda y: torch.relu(y + 1), lambda y: y.add_(1).relu_()):
            x = X[: 3 if lead else 1].reshape(*lead, 16).clone().requires_grad_()
            with paths.only(path):
                made = [write(y) for y in call(x)]
            sum(y.square().sum() for y in made).backward()
            found.append([*made, x.grad])
        assert all(map(torch.equal, *found))


@pytest.mark.parametrize("path", ["values", "integers"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_changes_no_gradient(path: str, dtype: torch.dtype) -> None:
    layers = _layer(bias=True), _layer("w1a8"), _layer("w4a4-2:4")
    found = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            for layer in layers:
                x = X.clone().requires_grad_()
                with paths.only(path):
                    layer(x).square().sum().backward()
                found.append((x.grad, layer.weight.grad))
                layer.zero_grad()
        finally:
            torch.set_default_dtype(torch.float32)
    for before, after in zip(found[:3], found[3:], strict=True):
        assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("path", ["values", "integers"])
def test_derivatives_by_torch_func_are_refused(path: str) -> None:
    layer = _layer()

    def loss(x: Tensor) -> Tensor:
        return layer(x).square().sum()

    def of_weight(w: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": w}, (X,)).sum()

    told = "no derivatives by torch.func"
    with paths.only(path):
        for asked, at in (
            (torch.func.grad(loss), X),
            (torch.func.jacrev(layer), X),
            (torch.func.grad(of_weight), layer.weight),
            (torch.func.vmap(torch.func.grad(loss)), X),
            (torch.func.grad(lambda x: torch.func.vmap(layer)(x).sum()), X),
        ):
            with pytest.raises(NotImplementedError, match=told):
                asked(at)
        # What asks for none may be computed meanwhile.
        assert torch.equal(torch.func.grad(lambda x: (layer(X) * x.sum()).sum())(X[0]),
                           layer(X).sum().expand(16))  # fmt: skip

        def beside(x: Tensor) -> Tensor:
            with torch.no_grad():
                known = layer(x).sum()
            return (x * known).sum()

        with torch.no_grad():
            known = layer(X).sum()
        assert torch.equal(torch.func.grad(beside)(X), known.expand_as(X))


def _near(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """The same but for the order of sums, of fewer than 64 products of float32 each."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= 64 * 2.0**-24 * b.norm()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("path", paths.PATHS)
def test_layers_under_vmap(path: str) -> None:
    """Of inputs, weights and gradients, of layers on one input; gradients are asked for outside."""
    layers = _layer(bias=True), _layer(bias=True)
    torch.nn.init.normal_(layers[1].weight)
    x = torch.stack([X, 2 * X.flip(0)]).expand(3, 2, 3, 16).clone().requires_grad_()
    wanted = [x, *(p for layer in layers for p in layer.parameters())]

    def run(t: Tensor) -> tuple[Tensor, ...]:
        return quest.together(t, layers)

    def of_weight(w: Tensor) -> Tensor:
        return torch.func.functional_call(layers[0], {"weight": w}, (X,))

    def gradients(ys: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad([y.square().sum() for y in ys], wanted, retain_graph=True)

    with paths.only(path):
        ys = run(x)
        once = torch.func.vmap(run, in_dims=1, out_dims=1)(x)
        twice = torch.func.vmap(torch.func.vmap(run))(x)
        for made in (once, twice):
            _near(made, ys)
            _near(gradients(made), gradients(ys))

        weights = torch.stack([layer.weight for layer in layers])
        _near((torch.func.vmap(of_weight)(weights),), (torch.stack([*map(of_weight, weights)]),))

        def of_gradient(grad: Tensor) -> Tensor:
            return torch.autograd.grad(ys[0], x, grad, retain_graph=True)[0]

        grads = torch.stack([ys[0], ys[0].cos()]).detach()
        expected = torch.stack([*map(of_gradient, grads)])
        _near((torch.func.vmap(of_gradient)(grads),), (expected,))
        with torch.no_grad():
            assert not torch.func.vmap(layers[0])(x).requires_grad


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("path", paths.PATHS)
def test_a_layer_under_vmap_is_compiled(path: str) -> None:
    """The compiler reads the layer's name, as it is printed."""
    torch.compiler.reset()
    layer = _layer()
    x = torch.stack([X, -X])
    with paths.only(path):
        made = torch.compile(torch.func.vmap(layer), fullgraph=True, backend="aot_eager")(x)
        _near((made,), (layer(x),))


def test_what_vmap_lacks_where_layers_multiply_integers() -> None:
    layer = _layer()
    with paths.only("integers"):
        with pytest.raises(ValueError, match="must have entries, got an axis of length 0"):
            torch.func.vmap(layer)(X.new_empty(0, 3, 16))
        y = layer(X.clone().requires_grad_())
        for ask in (
            lambda: torch.autograd.grad(y, layer.weight, y[None], is_grads_batched=True),
            lambda: torch.autograd.functional.jacobian(layer, X, vectorize=True),
        ):
            with pytest.raises(NotImplementedError, match="no batches of gradients"):
                ask()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_inputs_that_are_not_dense_are_refused() -> None:
    layer = _layer()
    for x, told in (
        (X.to_sparse(), "must be dense, got a torch.sparse_coo one"),
        (torch.nested.nested_tensor([X, X[:1]], layout=torch.jagged), "got a nested one"),
        (torch.nested.nested_tensor([X, X[:1]], layout=torch.strided), "got a nested one"),
    ):
        with pytest.raises(TypeError, match=told):
            layer(x)


def test_a_weight_that_is_split_among_processes_is_refused(tmp_path: Path) -> None:
    """By name, and before anything has changed."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        layer = _layer()
        model = torch.nn.Sequential(_layer(), layer).train()
        layer.weight = torch.nn.Parameter(sharded.distribute_tensor(layer.weight, mesh))
        for refused in (lambda: quest.freeze_(model), layer.freeze, lambda: layer(X)):
            with pytest.raises(ValueError, match="the weight is a DTensor"):
                refused()
        assert model.training
        assert model[0]._frozen is None
        # What was frozen before is dropped, and what comes behind it is reached.
        model[0].eval().freeze()
        model[0].weight = layer.weight
        model[0]._load_from_state_dict({}, "", {}, False, [], [], [])
        assert model[0]._frozen is None
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["flat", "freed"])
def test_a_shard_is_not_frozen(kind: str) -> None:
    """As FullyShardedDataParallel leaves weights between forwards; reading freed memory crashes."""
    layer = _layer()
    shard = layer.weight.detach().clone()
    if kind == "freed":
        shard.untyped_storage().resize_(0)
    shard = shard if kind == "freed" else shard.flatten()[:40]
    model = torch.nn.Sequential(_layer().freeze(), layer).train()
    whole, layer.weight = layer.weight, nn.Parameter(shard)
    for refused in (lambda: quest.freeze_(model), layer.freeze):
        with pytest.raises(ValueError, match="the weight is a shard"):
            refused()
    assert model.training
    # What was frozen before is dropped where it is looked for, and is there with another freeze.
    layer.weight = whole
    layer.eval().freeze()
    layer.weight = nn.Parameter(shard)
    assert layer.current() is None
    layer.weight = whole
    with torch.no_grad():
        assert torch.equal(layer.freeze()(X), _layer()(X))


class Marked(torch.nn.Parameter):
    """A weight of a class of somebody's own, which lies here as a whole."""


def test_a_weight_of_another_class_is_multiplied_and_frozen() -> None:
    layer = _layer()
    expected = layer(X)
    layer.weight = Marked(layer.weight.detach())
    assert torch.equal(layer(X), expected)
    with torch.no_grad():
        assert torch.equal(layer.freeze()(X), expected)


def test_what_is_frozen_is_used_without_gradients_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = counted(monkeypatch)
    layer = _layer().freeze()
    with torch.no_grad():
        layer(X)
        assert _weights(quantized) == 1
    layer(X).sum().backward()
    assert _weights(quantized) == 2
    assert layer.weight.grad is not None


def test_a_layer_that_moves_is_frozen_again(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = counted(monkeypatch)
    layer = _layer().freeze()
    layer.bfloat16()
    layer.load_state_dict(copy.deepcopy(layer.state_dict()))
    quantized.clear()
    with torch.no_grad():
        y = layer(X.bfloat16())
    assert _weights(quantized) == 0
    assert torch.equal(y, layer(X.bfloat16()))


def test_another_weight_is_frozen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = counted(monkeypatch)
    layer = _layer().freeze()
    before = layer.current()
    assert before is not None
    assert layer.current() is before
    with torch.no_grad():
        layer.weight.neg_()
        other = _layer()
        other.weight.neg_()
        expected = other(X)
        quantized.clear()
        assert torch.equal(layer(X), expected)
        assert torch.equal(layer(X), expected)
    assert _weights(quantized) == 1
    layer.weight = nn.Parameter(layer.weight.detach().double())
    assert layer.current() is None
    assert layer.bfloat16().current() is None  # not again by itself


def test_a_compiled_call_reads_what_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As documented: not the state of the weight, nor what other calls have recorded."""
    layer = _layer().freeze()
    before = layer.current()
    with torch.no_grad():
        expected = layer(X)
        layer.weight.neg_()
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        monkeypatch.setattr(quest.Linear, "_again", None)
        assert layer.current() is before
        assert torch.equal(layer(X), expected)


def test_a_forced_path_has_no_other_path_s_weight() -> None:
    layer = _layer().freeze()
    held = layer.current()
    assert held is not None
    for path in paths.PATHS:
        with paths.only(path):
            assert (layer.current() is held) == (path == held.path)
    assert layer.current() is held


class Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("change", "made_again"),
    [
        ("nothing", True), ("no calls", False), ("not frozen", False), ("a gradient", False),
        ("a bias", True), ("no place for a bias", False), ("another weight", False),
        ("computed", False),
    ],
)  # fmt: skip
def test_which_calls_are_made_again(
    change: str, made_again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`direct` is asked where it may know an answer, and of a call that is like the recorded."""
    layer: Any = _layer(bias=change == "a bias").freeze()
    expected = layer(X).detach()
    answer, asked = torch.zeros(3, 4), list[tuple[Any, Any, Any]]()

    def again(held: Any, xs: Any, reads: Any) -> tuple[Tensor]:
        (x,), (bias,) = xs, reads
        asked.append((x, held, bias))
        return (answer,)

    monkeypatch.setattr(direct, "again", again)
    held = layer._frozen
    assert held is not None
    if change != "no calls":
        held.calls[("a kind",)] = None
    if change == "not frozen":
        layer.train().eval()
    elif change == "no place for a bias":
        del layer._parameters["bias"]
        layer.bias = None
    elif change == "another weight":
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    elif change == "computed":
        parametrize.register_parametrization(layer, "weight", Same())
    with torch.set_grad_enabled(change == "a gradient"):
        y = layer(X)
    if made_again:
        assert y is answer
        (told,) = asked
        assert all(a is b for a, b in zip(told, (X, held, layer.bias), strict=True))
    else:
        assert not asked
        assert torch.equal(y, expected)


def test_training_mode_is_the_default_of_train() -> None:
    layer = _layer().freeze()
    assert layer.eval() is layer
    assert layer.current() is not None
    assert layer.train() is layer
    assert layer.training
    assert layer.current() is None
    assert layer.freeze().train(False).current() is not None


def test_modules_inside_a_layer_move_with_it() -> None:
    layer: Any = _layer()
    layer.adapter = nn.Linear(16, 4)
    assert layer.bfloat16().adapter.weight.dtype == layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_integers_are_those_of_one_layer(bias: bool, grad: bool) -> None:
    """And nothing is saved for a backward that nobody asks for."""
    layer = _layer(bias=bias)
    with torch.set_grad_enabled(grad), paths.only("integers"):
        y = layer(X)
        assert torch.equal(y, quest.together(X, [layer])[0])
    assert (y.shape, y.requires_grad) == ((3, 4), grad)
    torch.testing.assert_close(y, layer(X))


def test_what_autocast_rounds() -> None:
    """Floats that the layer takes; others stay, for the error that says so."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32)
    given = {dtype: X.to(dtype) for dtype in dtypes}
    assert all(quest.Linear.out_dtype(x) == dtype for dtype, x in given.items())
    with torch.autocast("cpu", torch.float16):
        rounded = {dtype: quest.Linear.cast(x).dtype for dtype, x in given.items()}
    assert rounded == {t: t for t in dtypes} | dict.fromkeys(dtypes[:3], torch.float16)


@pytest.mark.parametrize(
    ("x", "error", "told"),
    [
        (3, TypeError, r"x must be a torch\.Tensor, got int"),
        (torch.tensor(1.0), ValueError, r"x must have 16 columns \(in_features\), got shape \(\)"),
        (torch.ones(16, 3), ValueError, r"x must have 16 columns .*, got shape \(16, 3\)"),
        (X.to("meta"), ValueError, "x is on meta, the weight on cpu"),
        (X.half(), TypeError, r"x must have the weight's dtype torch\.float32 outside autocast"),
    ],
)
def test_what_does_not_fit(x: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        _layer()(x)


def test_what_fits() -> None:
    layer = _layer()
    for shape in ((16,), (1, 16), (2, 1, 16), (0, 16)):
        assert layer(torch.ones(shape)).shape == (*shape[:-1], 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(X.half()).dtype == torch.bfloat16
        assert torch.equal(layer(X.half()), layer(X.half().bfloat16()))


@pytest.mark.parametrize("padded", [False, True])
def test_a_transformer_s_padding_takes_the_plain_path(padded: bool) -> None:
    """The fused path would read the weights from nested tensors, and go past the layers."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder: Any = nn.TransformerEncoder(block, 2).eval()
    assert encoder.use_nested_tensor
    quest.quantize_(encoder, "w8a8")
    padding = torch.tensor([[False] * 3, [False, False, padded]])
    x = torch.randn(2, 3, 16)
    expected = encoder(x, src_key_padding_mask=padding).detach()  # with gradients: never fused
    with torch.no_grad():
        y = encoder(x, src_key_padding_mask=padding)
    assert not encoder.use_nested_tensor
    torch.testing.assert_close(y[~padding], expected[~padding])


def test_a_frozen_model_has_the_stacks_that_it_names() -> None:
    class Pair(nn.Module):
        shared_inputs = (("a", "b"),)

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(16, n) for n in (4, 5, 6))

    model = nn.Sequential(Pair())
    assert quest.freeze_(quest.quantize_(model, "w4a4")) is model
    pair: Any = model[0]
    assert not pair.training
    held = [layer.current() for layer in (pair.a, pair.b, pair.c)]
    assert [h.place if h.whole else None for h in held] == [0, 1, None]
    assert held[0].whole is held[1].whole


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which torch itself asks for
@pytest.mark.parametrize("path", paths.PATHS)
def test_compiled_autograd_traces_the_backward(path: str) -> None:
    """Without a break; to the same gradients."""
    layer, x = _layer(), X.clone().requires_grad_()
    compiled = torch.compile(backend="aot_eager", fullgraph=True)
    with paths.only(path):
        expected = torch.autograd.grad(layer(x).sum(), (x, layer.weight))
        with torch._dynamo.compiled_autograd._enable(compiled):
            layer(x).sum().backward()
    _near((x.grad, layer.weight.grad), expected)  # type: ignore[arg-type]
    torch._dynamo.reset()
