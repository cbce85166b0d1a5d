"""A gate in the operator of a trained layer: its numbers, its gradients, and who takes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import quest
from property_tests.ledger import LEDGER
from property_tests.prologues import DEVICES, HALVES, apart, halves, on_hopper
from quest import eager, lowbit_linear, ops, packing, paths, prologue
from quest.conformance import inputs, judges
from quest.conformance.lanes import Lane
from quest.conformance.strategies import DTYPES, SEEDS
from quest.kernels import rows as by_row
from quest.lowbit_linear import low_bit_linear

RECIPES = ("w1a1", "w1.58a1.58", "w2a2", "w4a4", "w8a8", "w4a8", "w4a4-2:4")


def _specs(name: str) -> tuple[str, str]:
    made = quest.recipe(name)
    return made.activation.spec, made.weight.spec


def _drawn(
    dtype: torch.dtype, device: str = "cpu", lead: tuple[int, ...] = (2, 5), width: int = 256
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(gate, up, weight, gradient of y); gate and up are columns of one tensor."""
    gate, up = (inputs.draw("heavy", (*lead, width), dtype, i) for i in range(2))
    w = inputs.draw("gaussian", (24, width), dtype, 2)
    grad = inputs.draw("gaussian", (*lead, 24), dtype, 3)
    return *(t.to(device) for t in apart(gate, up)), w.to(device), grad.to(device)


def _rows(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """What the operator quantizes: on CUDA as the kernel shows it."""
    made = quest.recipe(name)
    kind = lowbit_linear.pair(made.activation.spec, made.weight.spec).kinds[0]
    return prologue.gated_encode_shown(gate, up, made.activation.spec, kind)[3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_hopper)])
@pytest.mark.parametrize("name", RECIPES)
def test_it_is_the_layer_of_its_rows(name: str, device: str, dtype: torch.dtype) -> None:
    """Bit for bit, with what is saved; and the gradients are those of that row tensor."""
    gate, up, w, grad = (t.requires_grad_() for t in _drawn(dtype, device))
    bias = torch.ones(24, dtype=dtype, device=device, requires_grad=True)
    rest = ([w], [bias], *_specs(name), dtype, True)
    with torch.no_grad():
        rows = _rows(gate, up, name)
    rows.requires_grad_()
    made, expected = low_bit_linear(up, *rest, gate), low_bit_linear(rows, *rest)
    for t, other in zip(made, expected, strict=True):
        assert torch.equal(t, other)
    found = torch.autograd.grad(made[0], (w, bias, gate, up), grad.detach())
    dw, db, to_rows = torch.autograd.grad(expected[0], (w, bias, rows), grad.detach())
    assert torch.equal(found[0], dw)
    assert torch.equal(found[1], db)
    for t, other in zip(found[2:], eager.gated_backward(to_rows, gate, up), strict=True):
        assert torch.equal(t, other)
        assert t.dtype == dtype
    assert device == "cuda" or torch.equal(rows, eager.gated(gate, up))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@given(
    left=st.sampled_from(sorted(inputs.DISTRIBUTIONS)),
    right=st.sampled_from(sorted(inputs.DISTRIBUTIONS)),
    times=st.sampled_from([1.0, 4.0, 0.01]),
    seed=SEEDS,
)
def test_gradients_are_judged(
    device: str, dtype: torch.dtype, left: str, right: str, times: float, seed: int
) -> None:
    gate = inputs.draw(left, (3, 256), dtype, seed) * times
    value = inputs.draw(right, (3, 256), dtype, seed + 1)
    grad = inputs.draw("heavy", (3, 256), dtype, seed + 2)
    made = eager.gated_backward(grad.to(device), gate.to(device), value.to(device))
    found = judges.gated_backward(grad, gate, value, *(t.cpu() for t in made))
    lane = Lane("torch-cpu" if device == "cpu" else "torch-cuda", device, "dispatch")
    LEDGER.judge(lane, found, f"{left}, {right}, times {times}, {dtype}, seed {seed}")


def _loss(gate: Tensor, up: Tensor, w: Tensor, name: str = "w4a4") -> Tensor:
    y: Tensor = low_bit_linear(up, [w], [], *_specs(name), w.dtype, True, gate)[0]
    return y.float().square().sum()


def test_the_mask_is_that_of_the_rows() -> None:
    """A rotated entry beyond the trusted range gets no gradient: its adjoint is as without it."""
    gate, up, w, _ = (t.requires_grad_() for t in _drawn(torch.float32))
    made = low_bit_linear(up, [w], [], *_specs("w4a4"), torch.float32, True, gate)
    mask = packing.unpack(made[3], 1, 256).bool()
    assert not mask.all()
    (dup,) = torch.autograd.grad(made[0].sum(), up)
    order = quest.recipe("w4a4").activation.transform.order(256)
    to_rows = dup / F.silu(gate)
    turned = ops.hadamard(to_rows, order, False).reshape(mask.shape)
    size = turned.abs().amax(-1, keepdim=True)
    # What should be 0 errs by some ten roundings, 2^-24 each, of a block's norm, which is at most
    # 128^0.5 times its largest entry: 7e-6.
    assert (turned.abs() < 1e-4 * size)[~mask].all()
    assert (turned.abs() > 1e-4 * size)[mask].float().mean() > 0.9


def test_what_waits_for_the_backward() -> None:
    """Gate, up, packed operands, scales and masks; not the rows."""
    gate, up, w, _ = (t.requires_grad_() for t in _drawn(torch.bfloat16))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        low_bit_linear(up, [w], [], *_specs("w4a4"), torch.bfloat16, True, gate)
    wide = [t for t in kept if t.dtype == torch.bfloat16]
    assert [t.data_ptr() for t in wide] == [gate.data_ptr(), up.data_ptr()]
    others = [tuple(t.shape) for t in kept if t.dtype != torch.bfloat16]
    # Operand at 4 bits, scale and mask, of the rows and of the weight.
    assert others == [(10, 128), (10, 1), (10, 32), (24, 128), (24, 1), (24, 32)]


@pytest.mark.parametrize("asks", ["gate", "up", "weight"])
def test_one_alone_asks_for_a_gradient(asks: str) -> None:
    drawn = dict(zip(("gate", "up", "weight"), _drawn(torch.float32)[:3], strict=True))
    everything = {name: t.clone().requires_grad_() for name, t in drawn.items()}
    whole = torch.autograd.grad(_loss(*everything.values()), list(everything.values()))
    one = drawn[asks].requires_grad_()
    _loss(*drawn.values()).backward()
    assert torch.equal(one.grad, whole[list(drawn).index(asks)])  # type: ignore[arg-type]


def test_a_gate_that_is_its_own_value() -> None:
    gate, _, w, _ = _drawn(torch.float32)
    x = gate.clone().requires_grad_()
    both = [gate.clone().requires_grad_() for _ in range(2)]
    _loss(x, x, w).backward()
    _loss(*both, w).backward()
    assert torch.allclose(x.grad, both[0].grad + both[1].grad)  # type: ignore[arg-type,operator]


@pytest.mark.parametrize("shape", [(0, 256), (3, 0, 256)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_hopper)])
def test_no_rows(shape: tuple[int, ...], device: str) -> None:
    gate, up = (torch.ones(shape, device=device, requires_grad=True) for _ in range(2))
    w = torch.ones(4, 256, device=device, requires_grad=True)
    _loss(gate, up, w).backward()
    for t in (gate, up, w):
        assert t.grad is not None
        assert t.grad.shape == t.shape
        assert not t.grad.any()


@pytest.mark.parametrize(
    "gate",
    [torch.ones(2, 128), torch.ones(512), torch.ones(2, 256).half(),
     torch.ones(2, 256, device="meta")],
)  # fmt: skip
def test_errors(gate: Tensor) -> None:
    x, w = torch.ones(2, 256), torch.ones(4, 256)
    with pytest.raises(ValueError, match=r"gate must be torch.float32 of shape \(2, 256\) on cpu"):
        low_bit_linear(x, [w], [], *_specs("w4a4"), torch.float32, False, gate)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_hopper)])
@pytest.mark.parametrize("name", ["w1a1", "w4a4"])
def test_opcheck(name: str, device: str) -> None:
    gate, up, w, _ = (t.requires_grad_() for t in _drawn(torch.float32, device))
    given_ = (up, [w], [], *_specs(name), torch.float32, True)
    torch.library.opcheck(low_bit_linear, (*given_, gate))
    torch.library.opcheck(low_bit_linear, given_)


# --- quest.gated ------------------------------------------------------------------------------


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, bool]]:
    """(gate, saves) of each call, on a machine whose kernel is its CPU implementation."""
    seen: list[tuple[Tensor, bool]] = []
    saving, other = lowbit_linear._CPU.encode_gated, lowbit_linear._CPU.gated_operand
    counted = lowbit_linear._CPU._replace(
        encode_gated=lambda *a: seen.append((a[0], True)) or saving(*a),
        gated_operand=lambda *a: seen.append((a[0], False)) or other(*a),
    )
    monkeypatch.setattr(lowbit_linear, "_CPU", counted)
    monkeypatch.setattr(prologue, "has_kernel", lambda _, x: x.dtype in HALVES)
    return seen


def _layer(dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> quest.Linear:
    torch.manual_seed(0)
    return quest.Linear(256, 24, bias, "w4a4", dtype=dtype)


def _pair(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    return _drawn(dtype)[:2]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_that_is_trained_takes_it(
    bias: bool, dtype: torch.dtype, gates: list[tuple[Tensor, bool]]
) -> None:
    layer, (gate, up) = _layer(dtype, bias), _pair(dtype)
    with paths.only("integers"):
        y = quest.gated(gate, up, layer)
        expected = layer(eager.gated(gate, up))
    assert [(t.data_ptr(), saves) for t, saves in gates] == [(gate.data_ptr(), True)]
    assert y.shape == (2, 5, 24)
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert layer.weight.grad is not None
    assert not bias or layer.bias.grad is not None


@pytest.mark.parametrize("asks", [False, True])
def test_evaluation_between_steps_takes_it(asks: bool, gates: list[tuple[Tensor, bool]]) -> None:
    """Without a gradient nothing is saved; that of a gate is one, where weights ask for none."""
    layer, (gate, up) = _layer(), _pair()
    layer.requires_grad_(False)
    gate = gate.detach().requires_grad_(asks)
    with paths.only("integers"), torch.set_grad_enabled(asks):
        y = quest.gated(gate, up, layer)
        assert torch.equal(y, layer(eager.gated(gate, up)))
    assert [saves for _, saves in gates] == [asks]
    assert y.requires_grad == asks


@pytest.mark.parametrize("asks", [False, True])
def test_under_autocast(asks: bool, gates: list[tuple[Tensor, bool]]) -> None:
    """Gates come in bfloat16 from other layers, and the weight is float32."""
    layer, (gate, up) = _layer(torch.float32), _pair()
    gate, up = (t.requires_grad_(asks) for t in (gate, up))
    with torch.autocast("cpu", torch.bfloat16), paths.only("integers"):
        y = quest.gated(gate, up, layer)
        assert torch.equal(y, layer(eager.gated(gate, up)))
        assert len(gates) == 1
        assert y.dtype == torch.bfloat16
        with torch.autocast("cpu", torch.float16):
            assert quest.gated(gate, up, layer).dtype == torch.float16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32  # type: ignore[union-attr]
    for t in (gate, up):
        assert (t.grad is None) != asks
        assert not asks or t.grad.dtype == torch.bfloat16  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "case",
    ["values", "float32", "other dtypes", "hook", "subclass", "another module", "frozen", "bf16"],
)
def test_who_does_not_take_it(case: str, gates: list[tuple[Tensor, bool]]) -> None:
    """These are called as they always were, with the same bits."""
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    layer: Any = _layer(dtype)
    gate, up = _pair(dtype)
    if case == "other dtypes":
        up = up.float()
    elif case == "hook":
        layer.register_forward_hook(lambda *_: None)
    elif case == "subclass":
        layer.__class__ = type("Other", (quest.Linear,), {})
    elif case == "another module":
        layer = nn.Sequential(layer)
    elif case == "frozen":
        layer.eval().freeze()
    elif case == "bf16":
        layer.set_recipe("bf16")
    path = "values" if case in ("values", "frozen", "bf16") else "integers"
    cast = torch.autocast("cpu", torch.bfloat16, enabled=case == "other dtypes")
    with paths.only(path), torch.set_grad_enabled(case != "frozen"), cast:
        y, expected = quest.gated(gate, up, layer), layer(F.silu(gate) * up)
    assert not gates
    assert torch.equal(y, expected)


def test_errors_are_the_layers(gates: list[tuple[Tensor, bool]]) -> None:
    gate, up = _pair()
    for layer, error, told in (
        (quest.Linear(128, 4, dtype=torch.bfloat16), ValueError, "x must have 256|128 columns"),
        (_layer(torch.float32), TypeError, "x must have the weight's dtype"),
    ):
        with paths.only("integers"), pytest.raises(error, match=told):
            quest.gated(gate, up, layer)
    assert not gates


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(
    backend: str, gates: list[tuple[Tensor, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One operator in the graph, the same bits, and halves of a product are read in place."""
    monkeypatch.setattr(paths, "choose", lambda *_: "integers")
    layer = _layer(torch.float32, bias=False)
    first = torch.randn(512, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(2)).bfloat16()

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return quest.gated(*torch.split(F.linear(x, first), 256, -1), layer)

    def results(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        layer.zero_grad()
        given_ = x.clone().requires_grad_()
        y = run(given_)
        y.float().square().sum().backward()
        return [y, given_.grad, layer.weight.grad]  # type: ignore[list-item]

    expected = results(run)
    torch.compiler.reset()
    gates.clear()
    made = results(torch.compile(run, fullgraph=True, backend=backend))
    assert [t.stride() for t, _ in gates] == [(512, 1)]
    assert torch.equal(made[0], expected[0])
    assert torch.equal(made[2], expected[2])
    # Of x: inductor's exp is another, and rounded to bfloat16 before the product with `first`.
    assert (made[1] - expected[1]).norm() < 0.01 * expected[1].norm()
    torch.compiler.reset()


# --- on a GPU ---------------------------------------------------------------------------------


class Middle(nn.Module):
    """An MLP of a model that is trained."""

    shared_inputs = (("gate", "up"),)

    def __init__(self, recipe: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = (quest.Linear(256, 1408, recipe=recipe) for _ in range(2))
        self.down = quest.Linear(1408, 256, recipe=recipe)

    def forward(self, x: Tensor) -> Tensor:
        return quest.gated(*quest.together(x, (self.gate, self.up)), self.down)


@on_hopper
@pytest.mark.parametrize("recipe", ["w1a1", "w2a2", "w4a4", "w8a8"])
def test_a_model_in_training(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eagerly, captured in a graph, and compiled: one kernel for the gate, and the same numbers."""
    from quest.kernels import blocks

    model = Middle(recipe).cuda()
    x = torch.randn(2, 512, 256, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    seen: list[int] = []
    real = blocks.gated
    monkeypatch.setattr(blocks, "gated", lambda *a, **k: seen.append(1) or real(*a, **k))

    def step(run: Callable[[Tensor], Tensor] = model) -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            y = run(x)
        grads = torch.autograd.grad(y.float().square().sum(), list(model.parameters()))
        return [y.detach(), *grads]

    expected = step()
    assert len(seen) == 1
    assert all(t.isfinite().all() for t in expected)
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.compiler.reset()
    for made in (captured, step(torch.compile(model, fullgraph=True))):
        assert torch.equal(made[0], expected[0])
        # cuBLAS may sum in another order, and inductor's exp is another.
        for t, other in zip(made[1:], expected[1:], strict=True):
            assert (t - other).norm() < 0.01 * other.norm()
    torch.compiler.reset()


@on_hopper
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("width", [128, 256, 1536, 4224, 5632])
@pytest.mark.parametrize("name", ["w1a1", "w1.58a1.58", "w2a2", "w3a3", "w4a4", "w8a8"])
def test_a_kernel_with_a_mask(
    name: str, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that it writes is what the quantizer writes of the rows that it shows."""
    monkeypatch.setattr(by_row, "takes", lambda *_: False)  # which adds in another order
    q = quest.recipe(name).activation
    kind = lowbit_linear.pair(*_specs(name)).kinds[0]
    for i, (left, right) in enumerate(
        [("gaussian", "heavy"), ("non_finite", "gaussian"), ("mixed_rows", "outlier"),
         ("huge", "huge"), ("tiny", "subnormal"), ("zeros", "gaussian")]
    ):  # fmt: skip
        gate = inputs.draw(left, (9, width), dtype, i).cuda()
        gate, up = halves(torch.cat((gate, inputs.draw(right, (9, width), dtype, 9).cuda()), -1))
        made = prologue.launch_encode_gated(gate, up, q, kind)
        rows = prologue.gated_encode_shown(gate, up, q.spec, kind)[3]
        expected = lowbit_linear._CUDA.encode_saved(rows, q, kind)
        for t, other in zip(made, expected, strict=True):
            assert torch.equal(t.view(torch.uint8), other.view(torch.uint8))
