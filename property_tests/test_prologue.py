"""What stands before a layer in its quantizer's kernel: judged in all lanes."""

from __future__ import annotations

import re
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
from property_tests.prologues import DEVICES, HALVES, SPECS, apart, halves
from quest import eager, lowbit, prologue
from quest.conformance import examine, inputs, judges
from quest.conformance.lanes import Lane
from quest.conformance.strategies import SEEDS, widths
from quest.quantizer import parse

# What the kernel leaves to the two that stand for it elsewhere.
OTHERS = {
    "order 32": ("uniform4/hadamard32/trust1.0/dense", "integers"),
    "no transform": ("uniform4/identity/trust0.5/dense", "integers"),
}


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
        gate, value = apart(gate, value)
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
    gate, value = halves(torch.randn(2, 3, 512, dtype=torch.bfloat16, device=device))
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
    x, residual = halves(torch.randn(2, 3, 512, dtype=torch.bfloat16, device=device))
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
    if position < 2 and "float" not in told:  # the operations themselves take other dtypes
        with pytest.raises(error, match=re.escape(told)):
            quest.normed(given_[0], nn.RMSNorm(256), [nn.Linear(256, 4)], given_[1])


def test_errors_around_a_norm() -> None:
    x, norm = NORM[0], nn.RMSNorm(256)
    with pytest.raises(TypeError, match=r"residual must be of floats, got torch\.int32"):
        quest.normed(x, norm, [nn.Linear(256, 4)], x.int())
    with pytest.raises(TypeError, match=r"up must be of floats, got torch\.int32"):
        quest.gated(x, x.int(), nn.Linear(256, 4))
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
    if "float" not in told:  # the operations themselves take other dtypes
        with pytest.raises(error, match=re.escape(told.replace("value", "up"))):
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
