"""What stands before a layer in its quantizer's kernel: judged in all lanes, and who takes it."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import quest
from property_tests.lane_marks import every_dtype, every_lane, fewer
from property_tests.ledger import LEDGER
from quest import eager, frozen, joint, lowbit, operands, ops, paths, prologue
from quest.conformance import examine, inputs, judges
from quest.conformance.lanes import Lane
from quest.conformance.strategies import SEEDS, widths
from quest.kernels import blocks, cuda, outputs
from quest.kernels.product import unavailable
from quest.models import Llama, LlamaConfig
from quest.models.llama import Block
from quest.quantizer import parse

HOPPER = torch.cuda.is_available() and unavailable(torch.device("cuda")) is None
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU and cuda-core")
HALVES = [torch.bfloat16, torch.float16]
# Spec and kind of the operands that layers multiply.
SPECS = {
    "w1a1": ("uniform1/hadamard128/ste/dense", "bits"),
    "w2a2": ("uniform2/hadamard128/ste/dense", "integers"),
    "w4a4": ("uniform4/hadamard128/ste/dense", "integers"),
    "w8a8": ("uniform8/hadamard128/ste/dense", "codes"),
    "ternary": ("ternary/hadamard128/ste/dense", "integers"),
}
# What the kernel leaves to the two that stand for it elsewhere.
OTHERS = {
    "order 32": ("uniform4/hadamard32/trust1.0/dense", "integers"),
    "no transform": ("uniform4/identity/trust0.5/dense", "integers"),
}


def _halves(wide: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of one tensor: no row of either follows the row before."""
    gate, value = wide.tensor_split(2, -1)
    return gate, value


def _apart(gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return _halves(torch.cat((gate, value), -1))


@every_dtype
@every_lane
@pytest.mark.parametrize("name", [*SPECS, *OTHERS])
@fewer
@given(data=st.data())
def test_gated(name: str, lane: Lane, dtype: torch.dtype, data: st.DataObject) -> None:
    spec, kind = (SPECS | OTHERS)[name]
    width = data.draw(widths(128), label="width")
    lead = data.draw(st.sampled_from([(3,), (1,), (17,), (2, 3), (), (0,)]), label="lead")
    left = data.draw(st.sampled_from(sorted(inputs.DISTRIBUTIONS)), label="gate")
    right = data.draw(st.sampled_from(["gaussian", *sorted(inputs.DISTRIBUTIONS)]), label="value")
    layout = data.draw(st.sampled_from(("halves", *inputs.LAYOUTS[:-1])), label="layout")
    seed = data.draw(SEEDS, label="seed")
    gate = inputs.draw(left, (*lead, width), dtype, seed)
    value = inputs.draw(right, (*lead, width), dtype, seed + 1)
    if layout == "halves":
        gate, value = _apart(gate, value)
    else:
        gate, value = (inputs.lay_out(t, layout) for t in (gate, value))
    # Gates of 0 and infinity leave rows of few values, which flip together.
    conclusive = left == right == "gaussian"
    found = examine.gated(lane, gate, value, parse(spec), kind, conclusive=conclusive)
    told = f"{lead}, {width}, {left}, {right}, {layout}, {dtype}, seed {seed}, {spec}"
    LEDGER.judge(lane, found, told, conclusive)


@every_dtype
@every_lane
@pytest.mark.parametrize("name", [*SPECS, *OTHERS])
@fewer
@given(data=st.data())
def test_normed(name: str, lane: Lane, dtype: torch.dtype, data: st.DataObject) -> None:
    spec, kind = (SPECS | OTHERS)[name]
    width = data.draw(widths(128), label="width")
    lead = data.draw(st.sampled_from([(3,), (1,), (17,), (2, 3), (), (0,)]), label="lead")
    names = sorted(inputs.DISTRIBUTIONS)
    left = data.draw(st.sampled_from(["gaussian", *names]), label="x")
    right = data.draw(st.sampled_from([None, "gaussian", *names]), label="residual")
    layout = data.draw(st.sampled_from(inputs.LAYOUTS[:-1]), label="layout")
    eps = data.draw(st.sampled_from([1e-5, 1e-6, 1.0]), label="eps")
    seed = data.draw(SEEDS, label="seed")
    x = inputs.lay_out(inputs.draw(left, (*lead, width), dtype, seed), layout)
    weight = inputs.draw("gaussian", (width,), dtype, seed + 2)
    residual = None
    if right is not None:
        residual = inputs.lay_out(inputs.draw(right, (*lead, width), dtype, seed + 1), layout)
    conclusive = left == "gaussian" and right in (None, "gaussian")
    found = examine.normed(lane, x, residual, weight, eps, parse(spec), kind, conclusive=conclusive)
    told = f"{lead}, {width}, {left}, {right}, {layout}, {eps}, {dtype}, seed {seed}, {spec}"
    LEDGER.judge(lane, found, told, conclusive)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_norm_of_torch_s_is_judged_too(dtype: torch.dtype, device: str) -> None:
    """What runs where the operator does not: rounded once or, before its weight, twice."""
    weight = inputs.draw("gaussian", (384,), dtype, 2)
    norm = nn.RMSNorm(384, eps=1e-5, device=device, dtype=dtype)
    with torch.no_grad():
        norm.weight.copy_(weight)
        for i, name in enumerate(("gaussian", "heavy", "mixed_rows", "outlier")):
            h = inputs.draw(name, (9, 384), dtype, i)
            judges.normed(h, weight, 1e-5, norm(h.to(device)).cpu(), dtype).require()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_the_composition_is_judged_too(dtype: torch.dtype, device: str) -> None:
    """What runs where the operator does not: in 16 bits silu is stored before the product."""
    for i, (left, right) in enumerate([("heavy", "gaussian"), ("mixed_rows", "outlier")]):
        gate, value = (inputs.draw(n, (9, 384), dtype, i + j) for j, n in enumerate((left, right)))
        x = (F.silu(gate.to(device)) * value.to(device)).cpu()
        judges.gated(gate, value, x, dtype).require()


@pytest.mark.parametrize("name", SPECS)
def test_it_is_encode_of_what_it_shows(name: str) -> None:
    spec, kind = SPECS[name]
    gate, value = (inputs.draw("heavy", (2, 3, 256), torch.bfloat16, i) for i in range(2))
    *made, x = prologue.gated_encode_shown(gate, value, spec, kind)
    operand, scale, _, sums = lowbit.encode(x, spec, kind)
    for t, expected in zip(made, (operand, scale, sums), strict=True):
        assert torch.equal(t, expected)
    # Of bfloat16 and float32: x is rounded, and once.
    assert torch.equal(x, (F.silu(gate.double()) * value.double()).float().bfloat16())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 256), (3, 0, 256), (5, 0)])
def test_an_empty_axis(shape: tuple[int, ...], device: str) -> None:
    gate = torch.randn(shape, dtype=torch.bfloat16, device=device)
    spec = SPECS["w4a4"][0] if shape[-1] else "uniform4/identity/ste/dense"
    operand, scale, sums, x = prologue.gated_encode_shown(gate, gate, spec, "integers")
    assert operand.shape == x.shape == shape
    assert scale.shape == sums.shape == (*shape[:-1], 1)
    assert not scale.any()
    assert not sums.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["w1a1", "w4a4", "w8a8"])
def test_opcheck(name: str, device: str) -> None:
    gate, value = _halves(torch.randn(2, 3, 512, dtype=torch.bfloat16, device=device))
    for operator in ("gated_encode", "gated_encode_shown"):
        overload = getattr(torch.ops.quest, operator).default
        torch.library.opcheck(overload, (gate, value, *SPECS[name]))
        # Dense, but no row in one piece: what comes out lies as ever.
        torch.library.opcheck(
            overload, (*(t.mT.contiguous().mT for t in (gate, value)), *SPECS[name])
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("adds", [False, True])
def test_opcheck_of_a_norm(adds: bool, device: str) -> None:
    x, residual = _halves(torch.randn(2, 3, 512, dtype=torch.bfloat16, device=device))
    weight = torch.randn(256, dtype=torch.bfloat16, device=device)
    for operator in ("normed_encode", "normed_encode_shown"):
        overload = getattr(torch.ops.quest, operator).default
        for a, b in ((x, residual), (x.mT.contiguous().mT, residual.mT.contiguous().mT)):
            given_ = (a, b if adds else None, weight, 1e-5, *SPECS["w4a4"])
            torch.library.opcheck(overload, given_)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_a_norm_is_encode_of_what_it_shows(name: str, adds: bool) -> None:
    spec, kind = SPECS[name]
    x, residual = (inputs.draw("heavy", (2, 3, 256), torch.bfloat16, i) for i in range(2))
    weight = inputs.draw("gaussian", (256,), torch.bfloat16, 2)
    given_ = (x, residual if adds else None, weight, 1e-5)
    *made, h, rows = prologue.normed_encode_shown(*given_, spec, kind)
    operand, scale, _, sums = lowbit.encode(rows, spec, kind)
    for t, expected in zip(made, (operand, scale, sums), strict=True):
        assert torch.equal(t, expected)
    assert torch.equal(h, residual + x if adds else x.new_empty(0))


NORM = (torch.ones(2, 256), torch.ones(2, 256), torch.ones(256), 1e-5)


@pytest.mark.parametrize(
    ("position", "value", "error", "told"),
    [
        (0, [1.0], TypeError, "x must be a torch.Tensor, got list"),
        (1, torch.ones(2, 256).int(), TypeError, "residual must be float32, bfloat16 or float16"),
        (1, torch.ones(2, 256).half(), TypeError, "residual must have the dtype of x, torch.float"),
        (1, torch.ones(256), ValueError, "x and residual must have one shape with at least one ax"),
        (1, torch.ones(2, 256, device="meta"), ValueError, "residual must lie where x lies, cpu"),
        (
            2,
            torch.ones(128),
            ValueError,
            "weight must be torch.float32 of shape (256,) on cpu, got",
        ),
        (
            2,
            torch.ones(256).half(),
            ValueError,
            "weight must be torch.float32 of shape (256,) on c",
        ),
        (3, 0.0, ValueError, "eps must be positive and finite, got 0.0"),
        (3, float("nan"), ValueError, "eps must be positive and finite, got nan"),
    ],
)
def test_errors_of_a_norm(
    position: int, value: Any, error: type[Exception], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(eager, "normed")
    given_: list[Any] = list(NORM)
    given_[position] = value
    for run in (prologue.eager_normed_encode, prologue.launch_normed_encode, prologue._fake_norm):
        with pytest.raises(error, match=re.escape(told)):
            run(*given_, *SPECS["w4a4"])
    if position < 2 and "dtype" not in told:  # the operations themselves take other dtypes
        with pytest.raises(error, match=re.escape(told)):
            quest.normed(given_[0], nn.RMSNorm(256), [nn.Linear(256, 4)], given_[1])


def test_errors_around_a_norm() -> None:
    x, norm = NORM[0], nn.RMSNorm(256)
    with pytest.raises(TypeError, match=r"norm must be a torch\.nn\.Module, got function"):
        quest.normed(x, F.silu, [nn.Linear(256, 4)])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a sequence of layers, got a Linear"):
        quest.normed(x, norm, nn.Linear(256, 4))  # type: ignore[arg-type]
    with torch.no_grad(), pytest.raises(ValueError, match="layers must name at least one layer"):
        quest.normed(x, norm, [])
    with pytest.raises(ValueError, match="width 192 is not divisible"):
        prologue.normed_encode(x[:, :192], None, torch.ones(192), 1e-5, *SPECS["w4a4"])
    with pytest.raises(ValueError, match="has no operand of kind 'bits'"):
        prologue.normed_encode(x, None, torch.ones(256), 1e-5, SPECS["w4a4"][0], "bits")


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_call_copies_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor hands on the halves of a product as they lie."""
    spec, kind = SPECS["w4a4"]
    w = torch.randn(512, 64, dtype=torch.bfloat16, device=device)
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16, device=device)
    seen: list[tuple[Any, ...]] = []
    name = "eager_gated_encode" if device == "cpu" else "launch_gated_encode"
    real = getattr(prologue, name)

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return prologue.gated_encode(*torch.split(F.linear(x, w), 256, -1), spec, kind)

    def seeing(gate: Tensor, value: Tensor, *rest: Any) -> Any:
        seen.append((gate.stride(), value.stride(), value.data_ptr() - gate.data_ptr()))
        return real(gate, value, *rest)

    expected = run(x)
    torch.compiler.reset()
    monkeypatch.setattr(prologue, name, seeing)
    made = torch.compile(run, fullgraph=True)(x)
    for t, other in zip(made, expected, strict=True):
        assert torch.equal(t, other)
    assert seen == [((2560, 512, 1), (2560, 512, 1), 512)]
    torch.compiler.reset()


PAIR = (torch.ones(2, 256), torch.ones(2, 256))


@pytest.mark.parametrize(
    ("position", "value", "error", "told"),
    [
        (0, [1.0], TypeError, "gate must be a torch.Tensor, got list"),
        (1, 3, TypeError, "value must be a torch.Tensor, got int"),
        (0, torch.ones(2, 256).double(), TypeError, "gate must be float32, bfloat16 or float16"),
        (1, torch.ones(2, 256).int(), TypeError, "value must be float32, bfloat16 or float16"),
        (1, torch.ones(2, 256).half(), TypeError, "value must have the dtype of gate, torch.float"),
        (1, torch.ones(256), ValueError, "gate and value must have one shape with at least one ax"),
        (1, torch.ones(2, 256, device="meta"), ValueError, "value must lie where gate lies, cpu"),
    ],
)
def test_errors(position: int, value: Any, error: type[Exception], told: str) -> None:
    """Of `quest.gated`, and of the operator, which the dispatcher guards from what is no tensor."""
    pair = list(PAIR)
    pair[position] = value
    with pytest.raises(error, match=re.escape(told)):
        quest.gated(*pair, nn.Linear(256, 4))
    with pytest.raises(error, match=re.escape(told)):
        prologue.eager_gated_encode(*pair, *SPECS["w4a4"])
    with pytest.raises(error, match=re.escape(told)):
        prologue.launch_gated_encode(*pair, *SPECS["w4a4"])


@pytest.mark.parametrize(
    ("spec", "kind", "told"),
    [
        ("uniform4/hadamard128/ste/dense", "integers", "width 192 is not divisible"),
        ("uniform4/identity/ste/dense", "bits", "has no operand of kind 'bits'"),
    ],
)
def test_errors_of_a_spec(spec: str, kind: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is computed."""
    monkeypatch.delattr(eager, "gated")
    x = torch.ones(2, 192)
    for run in (
        prologue.gated_encode, prologue.gated_encode_shown, prologue.launch_gated_encode,
        prologue._fake,
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            run(x, x, spec, kind)


def test_errors_of_a_layer() -> None:
    with pytest.raises(TypeError, match=r"layer must be a torch\.nn\.Module, got function"):
        quest.gated(*PAIR, F.silu)  # type: ignore[arg-type]
    with torch.no_grad(), pytest.raises(ValueError, match="x must have 128 columns"):
        quest.gated(*PAIR, quest.Linear(128, 4))
    with pytest.raises(ValueError, match=r"scalar|one axis"):
        quest.gated(torch.ones(()), torch.ones(()), nn.Linear(1, 1))
    with pytest.raises(ValueError, match="a prologue makes no form 1 with 4 bits"):
        blocks.gated(*PAIR, None, form=blocks.PACKED, bits=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a prologue makes no form 0 with 0 bits"):
        blocks.gated(*PAIR, None, form=blocks.VALUES)  # type: ignore[arg-type]


# --- which layers take it ----------------------------------------------------------------------


def _layer(recipe: str = "w4a4", dtype: torch.dtype = torch.bfloat16) -> quest.Linear:
    torch.manual_seed(0)
    return quest.Linear(256, 24, True, recipe, dtype=dtype)


def _on_integers(layer: quest.Linear, few: int = 0) -> quest.Linear:
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
        spec=made.activation.spec, few=few, weight=layer.weight, state=frozen._state(layer.weight),
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
        lambda spec, x, weighted=False: x.dtype in HALVES and spec.index("/") > 0,
    )  # fmt: skip
    return seen


def _pair(dtype: torch.dtype = torch.bfloat16, rows: int = 5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return _halves(torch.randn(rows, 1, 512, generator=g).to(dtype))


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
    assert torch.equal(y, frozen.linear(x, held, layer.bias, layer.recipe, dtype))


def test_an_input_that_does_not_fit_is_refused(taken: list[Tensor]) -> None:
    gate, up = (t[..., :128] for t in _pair())
    with torch.no_grad(), pytest.raises(ValueError, match="x must have 256 columns"):
        quest.gated(gate, up, _on_integers(_layer()))
    assert not taken


def test_few_rows_keep_their_kernel(taken: list[Tensor]) -> None:
    layer = _on_integers(_layer(), few=4)
    for rows in (0, 1, 4, 5):
        gate, up = _pair(rows=rows)
        taken.clear()
        with torch.no_grad():
            y = quest.gated(gate, up, layer)
            assert len(taken) == (rows in (0, 5))
            if not taken:
                assert torch.equal(y, layer(F.silu(gate) * up))


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
        "weight's shape", "autocast", "residual's dtype", "few", "no layers alike",
    ],
)  # fmt: skip
def test_what_a_norm_keeps(case: str, taken: list[Tensor]) -> None:
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
    elif case == "few":
        for layer in layers:
            held = layer.current()
            layer.hold(dataclasses.replace(held, few=64, whole=None))
        joint.stack(layers)
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


def test_a_model_takes_it(taken: list[Tensor]) -> None:
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
    assert len(taken) == 6
    assert y.isfinite().all()
    # One more rounding here and there, and values instead of integers: no judge, only the place.
    assert (y - expected).abs().mean() < 0.1 * expected.abs().mean()
    assert torch.equal(compiled, y)
    torch.compiler.reset()


# --- the kernel's launcher ---------------------------------------------------------------------


def test_what_the_kernel_reads_in_place() -> None:
    wide = torch.zeros(5, 520, dtype=torch.bfloat16)
    assert wide.data_ptr() % 16 == 0
    for t in (wide, wide[:, :256], wide[:, 8:264], wide[2:, 256:512], wide[:1].expand(5, -1)):
        assert blocks.readable(t) is t
    for t in (wide[:, 4:260], wide[:, :512:2], wide.t(), wide.as_strided((5, 256), (257, 1))):
        made = blocks.readable(t)
        assert made.is_contiguous()
        assert torch.equal(made, t)
        assert made.data_ptr() % 16 == 0
    gate, value = _halves(torch.zeros(2, 3, 512, dtype=torch.bfloat16))
    for t in (gate, value):
        rows = lowbit.as_rows(t)
        assert blocks.readable(rows).data_ptr() == t.data_ptr()


def test_no_kernel_on_a_cpu() -> None:
    x = torch.ones(2, 256, dtype=torch.bfloat16)
    assert not prologue.has_kernel(SPECS["w4a4"][0], x)


def _needs_kernel() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reason = cuda.unavailable(torch.device("cuda", torch.cuda.current_device()))
    if reason is not None:
        pytest.skip(reason)


# As in test_blocks: rows that share a warp, that have one, and that have a team.
WIDTHS = (128, 256, 512, 1536, 2048, 4224, 5632, 11008, 49152)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_rows_of_a_kernel(name: str, dtype: torch.dtype, width: int) -> None:
    """Judged, and bit for bit what the kernel without a prologue makes of the rows it shows."""
    _needs_kernel()
    lane, (spec, kind) = Lane("triton-cuda", "cuda", "dispatch"), SPECS[name]
    q = parse(spec)
    pairs = [("gaussian", "heavy"), ("non_finite", "gaussian"), ("mixed_rows", "outlier"),
             ("huge", "huge"), ("tiny", "subnormal"), ("zeros", "gaussian")]  # fmt: skip
    assert prologue.has_kernel(spec, torch.empty(1, width, dtype=dtype, device="cuda"))
    for i, (left, right) in enumerate(pairs):
        rows = (1, 9, 33)[i % 3] if width < 10000 else 5
        gate, value = _apart(
            inputs.draw(left, (rows, width), dtype, i), inputs.draw(right, (rows, width), dtype, 9)
        )
        told = f"{left}, {right}, {rows} rows of {width}, {spec}"
        LEDGER.judge(lane, examine.gated(lane, gate, value, q, kind, conclusive=i == 0), told)
        *made, x = prologue.gated_encode_shown(*_apart(gate.cuda(), value.cuda()), spec, kind)
        operand, scale, _, sums = lowbit.launch_encode(x, q, kind)
        for t, expected in zip(made, (operand, scale, sums), strict=True):
            assert torch.equal(t.view(torch.uint8), expected.view(torch.uint8)), told


@pytest.mark.parametrize("width", [128, 256, 2048, 5632, 11008])
@pytest.mark.parametrize("name", ["w1a1", "w4a4"])
def test_many_turns_of_a_block(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One multiprocessor has all rows, special ones among them: the same as by themselves."""
    _needs_kernel()
    g = torch.Generator("cuda").manual_seed(0)
    wide = torch.randn(500, 2 * width, device="cuda", generator=g)
    wide[::7] *= 1e-15
    wide[3::11] = 0
    wide[5::13, 0] = torch.nan
    wide[6::17] *= 1e15
    gate, value = _halves(wide.bfloat16())
    spec, kind = SPECS[name]
    form, bits = (blocks.PACKED, 1) if kind == "bits" else (blocks.FORMS[kind], 0)
    program = ops.program(parse(spec), gate)
    apart = [
        blocks.gated(a, b, program, form=form, bits=bits, show=True)
        for a, b in zip(gate.split(20), value.split(20), strict=True)
    ]
    for processors in (1, 132):
        for show in (True, False):
            with monkeypatch.context() as patch, outputs.poisoned(0xA5):
                patch.setattr(cuda, "processors", lambda _, n=processors: n)
                made = blocks.gated(gate, value, program, form=form, bits=bits, show=show)
            for i, t in enumerate(made):
                if t is None:
                    continue
                expected = torch.cat([each[i] for each in apart])
                assert torch.equal(t.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("width", [w for w in WIDTHS if w < 40000])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["w1a1", "w4a4", "w8a8"])
def test_norms_of_a_kernel(name: str, dtype: torch.dtype, width: int) -> None:
    """As `test_rows_of_a_kernel`, with a residual and without."""
    _needs_kernel()
    lane, (spec, kind) = Lane("triton-cuda", "cuda", "dispatch"), SPECS[name]
    q, probe = parse(spec), torch.empty(1, width, dtype=dtype, device="cuda")
    assert prologue.has_kernel(spec, probe, True)
    weight = inputs.draw("gaussian", (width,), dtype, 5)
    pairs = [("gaussian", None), ("heavy", "gaussian"), ("non_finite", None), ("huge", None),
             ("mixed_rows", "outlier"), ("tiny", "zeros"), ("zeros", None)]  # fmt: skip
    for i, (left, right) in enumerate(pairs):
        rows = (1, 9, 33)[i % 3] if width < 10000 else 5
        x = inputs.draw(left, (rows, width), dtype, i)
        residual = None if right is None else inputs.draw(right, (rows, width), dtype, 9)
        found = examine.normed(lane, x, residual, weight, 1e-5, q, kind, conclusive=i == 0)
        told = f"{left}, {right}, {rows} rows of {width}, {spec}"
        LEDGER.judge(lane, found, told)
        given_ = (x.cuda(), None if residual is None else residual.cuda(), weight.cuda(), 1e-5)
        *made, _, shown = prologue.normed_encode_shown(*given_, spec, kind)
        operand, scale, _, sums = lowbit.launch_encode(shown, q, kind)
        for t, expected in zip(made, (operand, scale, sums), strict=True):
            assert torch.equal(t.view(torch.uint8), expected.view(torch.uint8)), told


def test_a_weight_that_leaves_no_room() -> None:
    _needs_kernel()
    spec = SPECS["w4a4"][0]
    probe = torch.empty(1, 49152, dtype=torch.bfloat16, device="cuda")
    assert prologue.has_kernel(spec, probe)
    assert not prologue.has_kernel(spec, probe, True)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("width", [128, 256, 2048, 4096, 5632, 8192])
def test_many_turns_of_a_norm(width: int, adds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One multiprocessor has all rows: the same as by themselves, sums of two kinds in turn."""
    _needs_kernel()
    g = torch.Generator("cuda").manual_seed(0)
    wide = torch.randn(500, 2 * width, device="cuda", generator=g)
    wide[::7] *= 1e-15
    wide[3::11] = 0
    wide[5::13, 0] = torch.nan
    wide[6::17] *= 1e25
    x, other = _halves(wide.bfloat16())
    weight = torch.randn(width, device="cuda", generator=g).bfloat16()
    program = ops.program(parse(SPECS["w4a4"][0]), x)

    def run(x: Tensor, other: Tensor, show: bool) -> tuple[Tensor | None, ...]:
        residual = other if adds else None
        return blocks.normed(x, residual, weight, 1e-5, program, form=blocks.INTEGERS, show=show)

    apart = [run(a, b, True) for a, b in zip(x.split(20), other.split(20), strict=True)]
    for processors in (1, 132):
        for show in (True, False):
            with monkeypatch.context() as patch, outputs.poisoned(0xA5):
                patch.setattr(cuda, "processors", lambda _, n=processors: n)
                made = run(x, other, show)
            for i, t in enumerate(made):
                if t is None:
                    continue
                expected = torch.cat([each[i] for each in apart])
                assert torch.equal(t.view(torch.uint8), expected.view(torch.uint8))


@on_hopper
@pytest.mark.parametrize("recipe", ["w4a4", "w1a1"])
@pytest.mark.parametrize("rows", [40, paths.MIN_ROWS])
def test_layers_behind_a_norm_on_hopper(rows: int, recipe: str) -> None:
    """Eagerly, compiled and from a graph: the same bits."""
    layers = [quest.Linear(256, n, recipe=recipe) for n in (48, 48, 16)]
    for layer in layers:
        layer.to("cuda", torch.bfloat16).eval().freeze()
    assert joint.stack(layers)
    norm = _norm().cuda()
    x, residual = torch.randn(2, rows, 256, device="cuda").bfloat16()
    held = layers[0].current()
    assert held is not None
    with torch.no_grad():
        h, made = quest.normed(x, norm, layers, residual)
        assert torch.equal(h, residual + x)
        kind = held.kinds.partition(",")[0]
        shown = prologue.normed_encode_shown(x, residual, norm.weight, 1e-5, held.spec, kind)[-1]
        for y, z in zip(made, quest.together(shown, layers), strict=True):
            assert torch.equal(y, z)
        torch.compiler.reset()
        compiled = torch.compile(lambda a, b: quest.normed(a, norm, layers, b), fullgraph=True)
        other, again = compiled(x, residual)
        assert torch.equal(other, h)
        for y, z in zip(again, made, strict=True):
            assert torch.equal(y, z)
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


def test_layouts_of_a_kernel() -> None:
    """Rows that lie apart, off a multiple of 16 bytes, or on one another: the same bits."""
    _needs_kernel()
    spec, kind = SPECS["w4a4"]
    for width in (128, 256, 384, 2048):
        gate, value = torch.randn(2, 9, width, device="cuda").bfloat16()
        expected = prologue.gated_encode_shown(gate, value, spec, kind)
        around = torch.full((9, 2 * width + 24), torch.nan, dtype=torch.bfloat16, device="cuda")
        for at, other in ((0, width), (8, width + 16), (4, width + 8), (1, width + 1)):
            a, b = around[:, at : at + width], around[:, other : other + width]
            around.fill_(torch.nan)
            a.copy_(gate)
            b.copy_(value)
            made = prologue.gated_encode_shown(a, b, spec, kind)
            for t, right in zip(made, expected, strict=True):
                assert torch.equal(t, right)
        same = prologue.gated_encode_shown(gate[:1].expand(9, -1), value, spec, kind)
        again = prologue.gated_encode_shown(gate[:1].repeat(9, 1), value, spec, kind)
        for t, right in zip(same, again, strict=True):
            assert torch.equal(t, right)


@on_hopper
@pytest.mark.parametrize("recipe", ["w4a4", "w1a1", "w8a8", "w4a4-2:4", "fp4"])
@pytest.mark.parametrize("rows", [3, 40, paths.MIN_ROWS])
def test_a_layer_on_hopper(rows: int, recipe: str) -> None:
    """Eagerly, compiled and from a graph: the same bits, those of the layer on the x it shows."""
    layer = _layer(recipe).cuda().eval().freeze()
    held = layer.current()
    assert held is not None
    wide = torch.randn(rows, 512, device="cuda").bfloat16()
    gate, up = _halves(wide)
    with torch.no_grad():
        y = quest.gated(gate, up, layer)
        if recipe == "fp4" or paths.fuses(gate, held.few):
            assert torch.equal(y, layer(F.silu(gate) * up))
        else:
            kind = held.kinds.partition(",")[0]
            x = prologue.gated_encode_shown(gate, up, held.spec, kind)[3]
            assert torch.equal(y, layer(x))
        torch.compiler.reset()
        compiled = torch.compile(lambda w: quest.gated(*_halves(w), layer), fullgraph=True)(wide)
        if recipe == "fp4" or paths.fuses(gate, held.few):
            torch.testing.assert_close(compiled, y)  # inductor rounds silu's product once
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
