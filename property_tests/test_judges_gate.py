"""The judges of a gate before a quantizer, and of its gradients, hold and bite."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

import quest
from property_tests.honest import F32, SEEDS, Array, failing, rounded, tensor
from property_tests.scripted import Scripted
from quest import operands
from quest.conformance import backends, examine, inputs, judges, lanes, oracle
from quest.conformance.verdict import Rejected


def swish(g: Array) -> Array:
    with np.errstate(over="ignore"):
        return g / (1 + np.exp(-g))


def gates(dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    gate = inputs.draw("heavy", (8, 256), dtype, seed) * 4
    return gate, inputs.draw("gaussian", (8, 256), dtype, seed + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(seed=SEEDS)
def test_gated_holds(dtype: torch.dtype, seed: int) -> None:
    gate, value = gates(dtype, seed % 2**31)
    g, v = oracle.lift(gate), oracle.lift(value)
    single = gate.float()
    in_float32 = (single / (1 + (-single).exp()) * value.float()).double().numpy()
    for x in (swish(g) * v, in_float32, v * (g * np.exp(-np.logaddexp(0, -g)))):
        judges.gated(gate, value, tensor(x, dtype)).require()
    between = tensor(rounded(swish(g), dtype) * v, dtype)
    judges.gated(gate, value, between, dtype).require()


def test_gated_of_what_is_not_finite() -> None:
    """Infinite or NaN, as it comes, but not finite; and a product beyond the range is infinite."""
    inf, nan = math.inf, math.nan
    gate = torch.tensor([[inf, -inf, nan, 1.0, -120.0, 3e38, 3e38, 1.0]])
    value = torch.tensor([[1.0, 1.0, 1.0, -inf, inf, 3e38, -3e38, 1.0]])
    x = torch.tensor([[inf, nan, nan, -inf, -inf, inf, -inf, 1 / (1 + math.exp(-1))]])
    judges.gated(gate, value, x).require()
    judges.gated(gate, value, torch.where(x.isfinite() | (gate == 3e38), x, nan)).require()
    for at in range(8):
        wrong = x.clone()
        wrong[0, at] = 0.0
        with pytest.raises(Rejected, match=r"^gated: at \(0, "):
            judges.gated(gate, value, wrong).require()
    wrong = x.clone()
    wrong[0, 5] = -inf
    with pytest.raises(Rejected, match=r"^gated"):
        judges.gated(gate, value, wrong).require()


GATE_FAULTS: dict[str, Callable[[Array, Array], Array]] = {
    "the sigmoid alone": lambda g, v: swish(g) / g * v,
    "gelu": lambda g, v: g * 0.5 * (1 + np.tanh(0.79788456 * (g + 0.044715 * g**3))) * v,
    "gelu by a sigmoid": lambda g, v: g / (1 + np.exp(-1.702 * g)) * v,
    "relu": lambda g, v: np.maximum(g, 0) * v,
    "gate and value swapped": lambda g, v: swish(v) * g,
    "exp of the gate, not of its negative": lambda g, v: g / (1 + np.exp(g)) * v,
    "a power of two for exp": lambda g, v: g / (1 + np.exp2(-g)) * v,
    "log2(e) in bfloat16": lambda g, v: g / (1 + np.exp2(-1.4453125 * g)) * v,
    "the value left out": lambda g, v: swish(g),
    "silu of the product": lambda g, v: swish(g * v),
    "the next value": lambda g, v: swish(g) * np.roll(v, 1, -1),
    "values of the next row": lambda g, v: swish(g) * np.roll(v, 1, 0),
    "the last block's gate is 0": lambda g, v: np.where(np.arange(256) < 128, swish(g) * v, 0.0),
    "tanh with 11 bits": lambda g, v: g / 2 * (1 + np.tanh(g / 2) * (1 + 2.0**-9)) * v,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", GATE_FAULTS)
def test_gated_bites(name: str, dtype: torch.dtype) -> None:
    gate, value = gates(dtype, 0)
    with np.errstate(over="ignore", invalid="ignore"):
        x = GATE_FAULTS[name](oracle.lift(gate), oracle.lift(value))
    with pytest.raises(Rejected, match=r"^gated: at \(\d, \d+\) it is"):
        judges.gated(gate, value, tensor(x, dtype)).require()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gated_bites_what_is_rounded_twice(dtype: torch.dtype) -> None:
    gate, value = gates(dtype, 0)
    g, v = oracle.lift(gate), oracle.lift(value)
    twice = tensor(rounded(swish(g), dtype) * v, dtype)
    judges.gated(gate, value, twice, dtype).require()
    with pytest.raises(Rejected, match=r"^gated"):
        judges.gated(gate, value, twice).require()
    truncated = tensor(np.nextafter((swish(g) * v).astype(F32), F32(0)), dtype)
    judges.gated(gate, value, truncated).require()
    bits = {torch.bfloat16: 16, torch.float16: 13}[dtype]
    cut = (swish(g) * v).astype(F32).view(np.int32) >> bits << bits
    with pytest.raises(Rejected, match=r"^gated"):
        judges.gated(gate, value, tensor(cut.view(F32), dtype)).require()


def steep(g: Array) -> Array:
    """The slope of silu."""
    with np.errstate(over="ignore"):
        s = 1 / (1 + np.exp(-g))
    return s * (1 + g * (1 - s))


def slopes(dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return inputs.draw("gaussian", (8, 256), dtype, seed + 2), *gates(dtype, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(seed=SEEDS)
def test_gradients_of_a_gate_hold(dtype: torch.dtype, seed: int) -> None:
    given_ = slopes(dtype, seed % 2**31)
    d, g, v = map(oracle.lift, given_)
    single = given_[1].float()
    s = single.sigmoid()
    in_float32 = s * (1 + single * (1 - s)) * given_[0].float() * given_[2].float()
    to_value = tensor(d * swish(g), dtype)
    for to_gate in (tensor(d * v * steep(g), dtype), in_float32.to(dtype)):
        for verdict in judges.gated_backward(*given_, to_gate, to_value):
            verdict.require()


def test_gradients_of_a_gate_that_are_not_finite() -> None:
    inf, nan = math.inf, math.nan
    gate = torch.tensor([[inf, -inf, nan, 1.0, 1.0, 20.0, 1.0]])
    value = torch.tensor([[1.0, 1.0, 1.0, -inf, 1.0, 3e38, 1.0]])
    grad = torch.tensor([[1.0, 1.0, 1.0, 1.0, inf, 3e38, 1.0]])
    right = torch.tensor([[nan, nan, nan, -inf, inf, inf, float(steep(np.ones(1))[0])]])
    to_value = torch.tensor([[inf, nan, nan, 0.7310586, inf, inf, 0.7310586]])
    for at in range(7):
        for verdict in judges.gated_backward(grad, gate, value, right, to_value):
            verdict.require()
        wrong = right.clone()
        wrong[0, at] = 0.0
        with pytest.raises(Rejected, match=r"^gradient of the gate: at \(0, "):
            judges.gated_backward(grad, gate, value, wrong, to_value)[0].require()
    for far in (inf, nan):  # where all inputs are finite, and their product
        wrong = right.clone()
        wrong[0, 6] = far
        with pytest.raises(Rejected, match=r"^gradient of the gate: at \(0, 6\)"):
            judges.gated_backward(grad, gate, value, wrong, to_value)[0].require()


GRADIENT_FAULTS: dict[str, Callable[[Array, Array, Array], tuple[Array, Array]]] = {
    "the sigmoid for the slope": lambda d, g, v: (d * v / (1 + np.exp(-g)), d * swish(g)),
    "the slope of the sigmoid": lambda d, g, v: (
        d * v * np.exp(-np.abs(g)) / (1 + np.exp(-np.abs(g))) ** 2,
        d * swish(g),
    ),
    "the second term has another sign": lambda d, g, v: (
        d * v * (2 / (1 + np.exp(-g)) - steep(g)),
        d * swish(g),
    ),
    "the value is left out": lambda d, g, v: (d * steep(g), d * swish(g)),
    "the gradient is left out": lambda d, g, v: (v * steep(g), d * swish(g)),
    "both swapped": lambda d, g, v: (d * swish(g), d * v * steep(g)),
    "the value's is the gate's": lambda d, g, v: (d * v * steep(g), d * g),
    "the value's of the value": lambda d, g, v: (d * v * steep(g), d * swish(v)),
    "the next row's value": lambda d, g, v: (d * np.roll(v, 1, 0) * steep(g), d * swish(g)),
    "silu of the next column": lambda d, g, v: (d * v * steep(g), d * swish(np.roll(g, 1, -1))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", GRADIENT_FAULTS)
def test_gradients_of_a_gate_bite(name: str, dtype: torch.dtype) -> None:
    given_ = slopes(dtype, 0)
    with np.errstate(over="ignore"):
        made = [tensor(t, dtype) for t in GRADIENT_FAULTS[name](*map(oracle.lift, given_))]
    found = judges.gated_backward(*given_, *made)
    assert any(verdict.failure for verdict in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_a_gate_are_rounded_once(dtype: torch.dtype) -> None:
    given_ = slopes(dtype, 0)
    d, g, v = map(oracle.lift, given_)
    twice = tensor(rounded(d * v, dtype) * steep(g), dtype), tensor(d * swish(g), dtype)
    assert judges.gated_backward(*given_, *twice)[0].failure
    stored = tensor(d * v * steep(g), dtype), tensor(d * rounded(swish(g), dtype), dtype)
    assert judges.gated_backward(*given_, *stored)[1].failure


def test_a_fifth_over_the_bound_of_a_gates_gradient_is_too_far() -> None:
    grad, gate, value = slopes(torch.float32, 3)
    d, g, v = map(oracle.lift, (grad, gate, value))
    u, s = 2.0**-24, 1 / (1 + np.exp(-g))
    a = (2 * np.abs(g) + 4) * u * (1 - s) + 3 * u
    slope = np.abs(1 + g * (1 - s))
    error = np.abs(g) * (s * a + 2 * u * (1 - s)) + u * slope
    exact = d * v * steep(g)
    bound = np.abs(d * v) * s * (a * slope + error) + 4 * u * np.abs(exact)
    to_value = tensor(d * swish(g))
    judges.gated_backward(grad, gate, value, tensor(exact + 0.8 * bound), to_value)[0].require()
    with pytest.raises(Rejected, match=r"^gradient of the gate"):
        judges.gated_backward(grad, gate, value, tensor(exact + 1.2 * bound), to_value)[0].require()


def test_a_fifth_over_the_gates_bound_is_too_far() -> None:
    gate, value = gates(torch.float32, 3)
    g, v = oracle.lift(gate), oracle.lift(value)
    exact = swish(g) * v
    sigmoid = 1 / (1 + np.exp(-g))
    u = 2.0**-24
    bound = np.abs(exact) * ((2 * np.abs(g) + 4) * u * (1 - sigmoid) + 5 * u + u)
    judges.gated(gate, value, tensor(exact + 0.8 * bound)).require()
    with pytest.raises(Rejected, match=r"^gated"):
        judges.gated(gate, value, tensor(exact + 1.2 * bound)).require()


@pytest.mark.parametrize("name", ["w1a1", "w4a4", "w8a8", "w1.58a1.58"])
def test_gated_operand_that_is_wrong(name: str) -> None:
    """Each output by itself, what belongs to other inputs, and x that is not what was quantized."""
    q = quest.recipe(name).activation
    kind = (operands.kinds(q, q) or ("",))[0]
    cpu = lanes.all_lanes()[0]
    gate, value = gates(torch.bfloat16, 0)
    honest = cpu.call("gated", gate, value, q=q, kind=kind)
    other = cpu.call("gated", value, gate, q=q, kind=kind)

    def failing_with(**wrong: Tensor) -> set[str]:
        lane = Scripted(lambda *_: honest | wrong)
        return failing(examine.gated(lane, gate, value, q, kind))

    assert not failing_with()
    assert failing_with(operand=honest["operand"][:, :-1]) == {"gated operand"}
    assert failing_with(scale=honest["scale"][:, 0]) == {"gated scale"}
    assert failing_with(sums=honest["sums"].long()) == {"gated sums"}
    assert failing_with(x=honest["x"].float()) == {"gated"}
    assert "gated codes" in failing_with(operand=other["operand"])
    assert "gated scale" in failing_with(scale=other["scale"])
    assert failing_with(sums=other["sums"]) == {"gated sums"}
    assert failing_with(sums=honest["sums"] + 2) == {"gated sums"}
    # Of silu in 16 bits: right by itself, and not once.
    twice = torch.nn.functional.silu(gate) * value
    assert failing_with(**(cpu.call("encode", twice, q=q, kind=kind) | {"x": twice})) == {"gated"}
    # The operand is of another x than the one that is shown.
    found = failing_with(**cpu.call("encode", value, q=q, kind=kind))
    assert {"gated scale", "gated codes"} <= found
    form, even = operands.form_of(q, kind), q.require_grid().levels % 2 == 0
    turned = honest["operand"].clone()
    if kind == "integers":  # to a neighbour
        turned[3, 5] += (-1 if turned[3, 5] > 0 else 1) * form.spread * (1 + even)
    else:  # or one further off
        turned[3, 5] ^= 127 if kind == "bits" else 2
    assert "gated codes" in failing_with(operand=turned)
    if kind == "integers":
        for by in (1, form.spread)[: 1 + even]:  # between two, and the even multiple
            apart = honest["operand"] - by * honest["operand"].sign()
            assert failing_with(operand=apart) == {"gated operand"}


def test_what_is_not_shown_must_be_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, value = gates(torch.bfloat16, 0)
    static = {"q": quest.recipe("w4a4").activation, "kind": "integers"}
    f = backends.operators("dispatch")
    for i in range(3):

        def other(*given: Any, i: int = i) -> list[Tensor]:
            made = list(f.gated_encode_shown(*given)[:3])
            made[i] = made[i] + 1
            return made

        changed = SimpleNamespace(**(vars(f) | {"gated_encode": other}))
        with monkeypatch.context() as patch:
            patch.setattr(backends, "operators", lambda _, changed=changed: changed)
            with pytest.raises(lanes.GuardError, match="is another where the rows"):
                lanes.all_lanes()[0].call("gated", gate, value, **static)
