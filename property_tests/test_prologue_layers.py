"""Which layers have a prologue in their quantizer's kernel, and that their numbers stay."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quest
from property_tests.prologues import HALVES, halves, on_hopper
from quest import direct, frozen, joint, lowbit, operands, paths, prologue
from quest.kernels import rows as by_row
from quest.models import Llama, LlamaConfig
from quest.models.llama import Block


def _layer(recipe: str = "w4a4", dtype: torch.dtype = torch.bfloat16) -> quest.Linear:
    torch.manual_seed(0)
    return quest.Linear(256, 24, True, recipe, dtype=dtype)


def _on_integers(layer: quest.Linear) -> quest.Linear:
    """Frozen as on Hopper, where its weight lies as integers; this one on a CPU."""
    made, w = layer.recipe, layer.weight.detach()
    kinds = operands.kinds(made.activation, made.weight)
    assert kinds is not None
    operand, scale, _, sums = lowbit.encode(w, made.weight.spec, kinds[1])
    narrow = kinds in (("bits", "bits"), ("integers", "integers"))
    packed = made.weight.pack(w).codes if narrow and made.weight.sparsity is None else None
    names = ",".join(q.require_grid().name for q in (made.activation, made.weight))
    held = frozen.Frozen(
        None, operand, scale, sums, packed, names=names, kinds=",".join(kinds),
        spec=made.activation.spec, weight=layer.weight, state=direct.state(layer.weight),
    )  # fmt: skip
    layer.hold(held)
    return layer.eval()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The gates that the operator gets, on a machine whose kernel is its CPU implementation."""
    seen: list[Tensor] = []
    for name in ("gated_encode", "normed_encode"):
        real: Callable[..., Any] = getattr(prologue, name)
        monkeypatch.setattr(prologue, name, lambda *a, real=real: seen.append(a[0]) or real(*a))
    monkeypatch.setattr(
        prologue, "has_kernel",
        lambda spec, x: x.dtype in HALVES and spec.index("/") > 0,
    )  # fmt: skip
    return seen


def _pair(dtype: torch.dtype = torch.bfloat16, rows: int = 5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return halves(torch.randn(rows, 1, 512, generator=g).to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("recipe", ["w4a4", "w1a1", "w8a8", "w4a4-2:4", "w4a8"])
def test_a_frozen_layer_takes_it(recipe: str, dtype: torch.dtype, taken: list[Tensor]) -> None:
    layer = _on_integers(_layer(recipe, dtype))
    gate, up = _pair(dtype)
    held = layer.current()
    assert held is not None
    with torch.no_grad():
        y = quest.gated(gate, up, layer)
    assert [t.data_ptr() for t in taken] == [gate.data_ptr()]
    x = prologue.gated_encode_shown(gate, up, held.spec, held.kinds.partition(",")[0])[3]
    assert y.shape == (5, 1, 24)
    assert torch.equal(y, frozen.linear(x, held, layer.bias, layer.recipe))


def test_an_input_that_does_not_fit_is_refused(taken: list[Tensor]) -> None:
    gate, up = (t[..., :128] for t in _pair())
    with torch.no_grad(), pytest.raises(ValueError, match="x must have 256 columns"):
        quest.gated(gate, up, _on_integers(_layer()))
    assert not taken


@pytest.mark.parametrize(
    "case",
    [
        "gradient", "not frozen", "float32", "values", "hook", "global hook", "forward", "subclass",
        "another module", "autocast", "no kernel", "forced", "trains",
    ],
)  # fmt: skip
def test_who_does_not_take_it(
    case: str, taken: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """These are called as they always were, with the same bits."""
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    layer: Any = _layer("w4a16" if case == "no kernel" else "w4a4", dtype).eval()
    if case not in ("no kernel", "not frozen"):
        _on_integers(layer)
    gate, up = _pair(dtype)
    seen: list[int] = []
    hooks = []
    if case in ("values", "no kernel"):
        layer.freeze()
    elif case == "hook":
        hooks.append(layer.register_forward_hook(lambda *_: seen.append(1)))
    elif case == "global hook":
        hooks.append(nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1)))
    elif case == "forward":
        real = layer.forward
        monkeypatch.setattr(layer, "forward", lambda x: seen.append(1) or real(x))
    elif case == "subclass":
        layer.__class__ = type("Other", (quest.Linear,), {})
    elif case == "another module":
        layer = nn.Sequential(layer)
    elif case == "trains":
        layer.train()
    context: Any = torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast")
    with torch.set_grad_enabled(case == "gradient"), context:
        if case == "forced":
            with paths.only("values"):
                y = quest.gated(gate, up, layer)
                expected = layer(F.silu(gate) * up)
        else:
            y = quest.gated(gate, up, layer)
            calls = len(seen)
            expected = layer(F.silu(gate) * up)
            assert calls == (case in ("hook", "global hook", "forward"))
    for hook in hooks:
        hook.remove()
    assert not taken
    assert torch.equal(y, expected)
    assert y.requires_grad == (case == "gradient")


def _stacked(recipe: str, dtype: torch.dtype) -> list[quest.Linear]:
    """Three layers whose frozen weights lie stacked, one of them without a bias."""
    layers = []
    for seed, outs in enumerate((8, 8, 16)):
        torch.manual_seed(seed)
        layers.append(_on_integers(quest.Linear(256, outs, seed != 1, recipe, dtype=dtype)))
    assert joint.stack(layers)
    return layers


def _norm(dtype: torch.dtype = torch.bfloat16, **options: Any) -> nn.RMSNorm:
    norm = nn.RMSNorm(256, **({"eps": 1e-5} | options)).to(dtype)
    if norm.weight is not None:
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(2))
    return norm.eval()


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("recipe", ["w4a4", "w1a1", "w8a8"])
def test_layers_behind_a_norm_take_it(
    recipe: str, dtype: torch.dtype, adds: bool, taken: list[Tensor]
) -> None:
    layers, norm = _stacked(recipe, dtype), _norm(dtype)
    x, other = _pair(dtype)
    residual = other if adds else None
    held = layers[0].current()
    assert held is not None
    with torch.no_grad():
        for some in (layers, [_on_integers(_layer(recipe, dtype))]):
            taken.clear()
            h, made = quest.normed(x, norm, some, residual)
            assert [t.data_ptr() for t in taken] == [x.data_ptr()]
            assert torch.equal(h, other + x if adds else x)
            assert adds or h is x
            rows = prologue.normed_encode_shown(
                x, residual, norm.weight, 1e-5, held.spec, held.kinds.partition(",")[0]
            )[-1]
            expected = quest.together(rows, some) if len(some) > 1 else (some[0](rows),)
            assert len(made) == len(expected)
            for y, z in zip(made, expected, strict=True):
                assert torch.equal(y, z)


@pytest.mark.parametrize(
    "case",
    [
        "gradient", "not stacked", "not frozen", "some", "float32", "hook", "hook of the norm",
        "another norm", "subclass", "no weight", "eps", "no eps", "weight's dtype",
        "weight's shape", "autocast", "residual's dtype", "no layers alike",
    ],
)  # fmt: skip
def test_what_a_norm_keeps(case: str, taken: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """These are called one after another, with the same bits."""
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    layers: list[Any] = _stacked("w4a4", dtype)
    norm: Any = _norm(dtype)
    x, residual = _pair(dtype)
    seen: list[int] = []
    if case == "not stacked":
        layers = [_on_integers(_layer()), _on_integers(_layer())]
    elif case == "not frozen":
        layers = [_layer().eval() for _ in range(2)]
    elif case == "some":
        layers = layers[:2]
    elif case == "hook":
        layers[1].register_forward_hook(lambda *_: seen.append(1))
    elif case == "hook of the norm":
        norm.register_forward_hook(lambda *_: seen.append(1))
    elif case == "another norm":
        norm = nn.LayerNorm(256, dtype=dtype)
    elif case == "subclass":
        norm.__class__ = type("Other", (nn.RMSNorm,), {})
    elif case == "no weight":
        norm = _norm(elementwise_affine=False)
    elif case in ("eps", "no eps"):
        norm.eps = None if case == "no eps" else 0.0
    elif case == "weight's dtype":
        norm.weight = nn.Parameter(norm.weight.float())
    elif case == "weight's shape":
        norm = nn.RMSNorm((1, 256), eps=1e-5, dtype=dtype)
    elif case == "residual's dtype":
        residual = residual.float()  # as that of a model under autocast
    elif case == "no layers alike":
        layers = [*layers, nn.Linear(256, 4, dtype=dtype)]
    cast = case in ("autocast", "residual's dtype")
    context: Any = torch.autocast("cpu", torch.bfloat16, enabled=cast)
    with torch.set_grad_enabled(case == "gradient"), context, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a weight of another dtype
        h, made = quest.normed(x, norm, layers, residual)
        calls = len(seen)
        assert torch.equal(h, residual + x)
        expected = quest.together(norm(residual + x), layers)
    assert not taken
    assert calls == ("hook" in case)
    for y, z in zip(made, expected, strict=True):
        assert torch.equal(y, z)
        assert y.requires_grad == (case == "gradient")


def test_gradients_pass() -> None:
    layer, alone = _layer(dtype=torch.float32), _layer(dtype=torch.float32)
    gate, up = (t.requires_grad_() for t in _pair(torch.float32))
    quest.gated(gate, up, layer).square().sum().backward()
    other, more = (t.requires_grad_() for t in _pair(torch.float32))
    alone(F.silu(other) * more).square().sum().backward()
    for mine, theirs in ((gate, other), (up, more), (layer.weight, alone.weight)):
        assert mine.grad is not None
        assert torch.equal(mine.grad, theirs.grad)


def _config() -> LlamaConfig:
    return LlamaConfig(vocab_size=64, layers=1, width=128, heads=2)


@pytest.mark.parametrize("recipe", ["w4a4", "bf16"])
def test_a_model_is_the_same_on_a_cpu(recipe: str) -> None:
    """Bit for bit what `down(silu(gate) * up)` gives: trained, frozen and in bfloat16."""

    class Plain(Block):
        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            x = x + self.self_attn(self.input_layernorm(x), cos, sin)
            mlp = self.mlp
            gate, up = quest.together(
                self.post_attention_layernorm(x), (mlp.gate_proj, mlp.up_proj)
            )
            y: Tensor = x + mlp.down_proj(F.silu(gate) * up)
            assert torch.equal(y, x + mlp(self.post_attention_layernorm(x)))
            return y

    torch.manual_seed(0)
    model = Llama(_config())
    quest.quantize_(model, recipe)
    tokens = torch.arange(24).reshape(2, 12)

    def plainly(run: Callable[[], Any]) -> Any:
        block = model.layers[0]
        block.__class__ = Plain
        made = run()
        block.__class__ = Block
        return made

    def step() -> list[Tensor]:
        model.zero_grad()
        model(tokens).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for mine, theirs in zip(step(), plainly(step), strict=True):
        assert torch.equal(mine, theirs)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        for made in (model.eval(), quest.freeze_(model)):
            with torch.no_grad():
                assert torch.equal(made(tokens), plainly(lambda: model(tokens)))


@pytest.mark.parametrize("few", [False, True])
def test_a_model_takes_it(few: bool, taken: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """But the norm of a sum, compiled before few rows."""
    monkeypatch.setattr(paths, "SUM_ELEMENTS", 24 * 128 - (not few))
    torch.manual_seed(0)
    model = Llama(_config()).bfloat16()
    quest.quantize_(model, "w4a4")
    tokens = torch.arange(24).reshape(2, 12)
    expected = quest.freeze_(model)(tokens)
    block = model.layers[0]
    for layers in ("q_proj", "k_proj", "v_proj"), ("o_proj",):
        made = [_on_integers(getattr(block.self_attn, name)) for name in layers]
        assert joint.stack(made) == (len(made) > 1)
    for layers in ("gate_proj", "up_proj"), ("down_proj",):
        made = [_on_integers(getattr(block.mlp, name)) for name in layers]
        assert joint.stack(made) == (len(made) > 1)
    with torch.no_grad():
        y = model(tokens)
        assert len(taken) == 3  # two norms and a gate
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens)
    assert len(taken) == (5 if few else 6)
    assert y.isfinite().all()
    # One more rounding here and there, and values instead of integers: no judge, only the place.
    assert (y - expected).abs().mean() < 0.1 * expected.abs().mean()
    assert (compiled - y).abs().mean() <= 0.1 * few * y.abs().mean()
    torch.compiler.reset()


def _multiplied(operand: list[Tensor], held: frozen.Frozen, bias: Tensor | None) -> Tensor:
    """What a prologue's (operand, scale, sums) gives with a weight.

    Not what the layer makes of the rows shown: rows behind a gate or a sum are quantized by another
    kernel, which adds squares in another order, and a scale may differ in its last bit.
    """
    a, scale, sums = operand
    return frozen.multiply((a, scale, sums), held, bias, 256, torch.bfloat16, True)


def _close(compiled: Tensor, eager: Tensor) -> None:
    """Two layers' outputs for rows that inductor rounds once, and torch after every operation.

    A quarter of a row's elements then differ in the last of their 8 bits, and codes beside a
    midpoint flip by a whole step, which no bound of an element allows. But they are few: of normal
    rows one bit in 1200 and one code of 4 bits in 150, as counted on a CPU, which makes differences
    of 0.06 and 0.03 in the norm. Rows must be so many that flips have their share.
    """
    assert (compiled - eager).norm() < 0.1 * eager.norm()


def _check_norm(
    x: Tensor, norm: nn.RMSNorm, layers: list[quest.Linear], residual: Tensor | None,
    whole: frozen.Frozen,
) -> None:  # fmt: skip
    """`quest.normed` has the bits of the operand made alone."""
    h, made = quest.normed(x, norm, layers, residual)
    assert torch.equal(h, x if residual is None else residual + x)
    assert norm.eps is not None
    *operand, _, _ = prologue.normed_encode_shown(
        x, residual, norm.weight, norm.eps, whole.spec, whole.kinds.partition(",")[0]
    )
    biases = [layer.bias for layer in layers if layer.bias is not None]
    y = _multiplied(operand, whole, torch.cat(biases) if biases else None)
    assert torch.equal(torch.cat(made, -1), y)


@on_hopper
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("recipe", ["w4a4", "w1a1"])
@pytest.mark.parametrize("rows", [40, 100, paths.SUM_ELEMENTS // 256 + 8, by_row.MOST // 1024 + 8])
def test_layers_behind_a_norm_on_hopper(rows: int, recipe: str, bias: bool) -> None:
    """Eagerly, compiled and from a graph: the same bits, those of the operand made alone.

    But compiled where another kernel quantizes few rows.
    """
    layers = [quest.Linear(256, n, bias, recipe) for n in (48, 48, 16)]
    for layer in layers:
        layer.to("cuda", torch.bfloat16).eval().freeze()
    assert joint.stack(layers)
    norm = _norm().cuda()
    x, residual = torch.randn(2, rows, 256, device="cuda").bfloat16()
    with torch.no_grad():
        h, made = quest.normed(x, norm, layers, residual)
        assert torch.equal(h, residual + x)
        y, few = torch.cat(made, -1), paths.compiles_sums(x)
        whole = joint.whole(layers)
        assert whole is not None
        for other in (residual, residual.neg(), None, x, None):  # call after call is recorded
            for t in (x, x.roll(1)):
                _check_norm(t, norm, layers, other, whole)
        assert None not in whole.calls.values()
        torch.compiler.reset()
        compiled = torch.compile(lambda a, b: quest.normed(a, norm, layers, b), fullgraph=True)
        other, again = compiled(x, residual)
        assert torch.equal(other, h)
        if few:
            _close(torch.cat(again, -1), y)
        else:
            assert torch.equal(torch.cat(again, -1), y)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            h, made = quest.normed(x, norm, layers, residual)
        x.normal_()
        graph.replay()
        fresh, expected = quest.normed(x, norm, layers, residual)
        assert torch.equal(h, fresh)
        for y, z in zip(made, expected, strict=True):
            assert torch.equal(y, z)
    torch.compiler.reset()


@on_hopper
@pytest.mark.parametrize("recipe", ["w4a4", "w1a1", "w8a8", "w4a4-2:4", "fp4"])
@pytest.mark.parametrize("rows", [16, 40, 100, 512])
def test_a_layer_on_hopper(rows: int, recipe: str) -> None:
    """Eagerly, compiled and from a graph: the same bits, those of the operand made alone.

    Where the layer has no operand for it, they are the layer's on x.
    """
    layer = _layer(recipe).cuda().eval().freeze()
    held = layer.current()
    assert held is not None
    wide = torch.randn(rows, 512, device="cuda").bfloat16()
    gate, up = halves(wide)
    with torch.no_grad():
        y = quest.gated(gate, up, layer)
        if recipe == "fp4":
            assert torch.equal(y, layer(F.silu(gate) * up))
        else:
            kind = held.kinds.partition(",")[0]
            for first, second in ((gate, up), (up, gate), (gate, up)):  # recorded, and made again
                *operand, _ = prologue.gated_encode_shown(first, second, held.spec, kind)
                expected = _multiplied(operand, held, layer.bias)
                assert torch.equal(quest.gated(first, second, layer), expected)
                assert torch.equal(y, expected) == (first is gate)
        torch.compiler.reset()
        compiled = torch.compile(lambda w: quest.gated(*halves(w), layer), fullgraph=True)(wide)
        if recipe == "fp4":
            _close(compiled, y)
        else:
            assert torch.equal(compiled, y)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = quest.gated(gate, up, layer)
        for seed in range(2):
            torch.manual_seed(seed)
            wide.copy_(torch.randn(rows, 512))
            graph.replay()
            assert torch.equal(replayed, quest.gated(gate, up, layer))
    torch.compiler.reset()
