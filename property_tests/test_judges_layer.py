"""The judges of a layer and its gradients hold and bite."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import quest
from property_tests.honest import BF16, F32, Array, failing, grid_of, tensor
from property_tests.honest_layer import Layer, gradients, layer_case
from quest import frozen, paths
from quest.conformance import examine, inputs, judges, lanes, oracle
from quest.recipes import Recipe
from quest.reference import bounds, hadamard


def lift_of(a: Array) -> Array:
    """float32 values, in float64."""
    return np.asarray(a, dtype=np.float32).astype(np.float64)


@pytest.mark.parametrize("order", [1, 8])
@pytest.mark.parametrize("name", ["y", "dx", "dw", "db"])
def test_a_fifth_over_the_layers_bound_is_too_far(name: str, order: int) -> None:
    """The bounds counted again, term by term: one of them ten times as wide would let this pass."""
    g = np.random.default_rng(order)
    n, d, outs, u = 9, 16, 11, 2.0**-24
    xh, wh, grad = (lift_of(g.standard_normal(shape)) for shape in ((n, d), (outs, d), (n, outs)))
    bias = lift_of(g.standard_normal(outs))
    made = quest.recipe("w4a4", transform=quest.Hadamard(order) if order > 1 else quest.Identity())

    def turned(a: Array, b: Array) -> tuple[Array, Array]:
        """(a b H^T, its bound): the product, stored; the butterfly's additions and the factor."""
        inner, terms = a @ b, a.shape[-1]
        first = bounds.gamma(terms, u) * (np.abs(a) @ np.abs(b))
        first = first + u * (np.abs(inner) + first) + 2.0**-150
        k = (int(np.log2(order)) + bounds.normalisations(order)) if order > 1 else 0
        largest = bounds.absolute_sum(np.abs(inner) + first, order)
        total = bounds.absolute_sum(first, order) + (bounds.gamma(k, u) * largest if k else 0.0)
        exact = hadamard.apply_transpose(inner, order)
        return exact, total + u * (np.abs(exact) + total) + 2.0**-150

    y = xh @ wh.T
    error = bounds.gamma(d, u) * (np.abs(xh) @ np.abs(wh).T)
    error = error + u * (np.abs(y) + error) + u * np.abs(bias)
    error = error + u * (np.abs(y + bias) + error) + 2.0**-150
    sums, off = grad.sum(0), bounds.gamma(n, u) * np.abs(grad).sum(0)
    exact = {
        "y": (y + bias, error),
        "dx": turned(grad, wh),
        "dw": turned(grad.T, xh),
        "db": (sums, off + u * (np.abs(sums) + off) + 2.0**-150),
    }
    out = {k: tensor(v[0]) for k, v in exact.items()} | {"x_hat": tensor(xh), "w_hat": tensor(wh)}

    def judged(out: dict[str, Tensor]) -> set[str]:
        x, w = torch.zeros(n, d), torch.zeros(outs, d)
        given = (tensor(grad), tensor(bias), made, out, (None, None), u)
        return failing(judges.layer(x, w, *given))

    assert not judged(out)
    value, bound = exact[name]
    assert judged(out | {name: tensor(value + 1.2 * bound)}) == {f"layer {name}"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_a_bias_a_product_is_rounded_once(dtype: torch.dtype) -> None:
    """One term's product is exact; both roundings lead as far as the next number."""
    one = torch.ones(1, 1, dtype=dtype)
    out = {"x_hat": one, "w_hat": one, "y": (one.view(torch.int16) + 1).view(dtype)}
    for bias, wrong in ((None, True), (0 * one[0], False)):
        found = judges.values_product(dtype, bias, out, bounds.U32, "layer y")
        assert (found.failure is not None) == wrong


def test_what_is_masked_lends_nothing_to_its_block() -> None:
    """Its product is large, and is not part of what is rotated back: nor is its rounding."""
    d = order = 8
    wh, grad = np.full((1, d), 1000.0), np.ones((1, 1))
    wh[0, 3] = 1.0
    mask = torch.zeros(1, d, dtype=torch.bool)
    mask[0, 3] = True
    made = quest.recipe("w4a4", transform=quest.Hadamard(order))
    exact = hadamard.apply_transpose(np.where(mask.numpy(), grad @ wh, 0.0), order)
    out = {
        "y": tensor(np.full((1, 1), 7001.0)), "x_hat": tensor(np.ones((1, d))),
        "w_hat": tensor(wh), "dw": tensor(hadamard.apply_transpose(np.ones((1, d)), order)),
    }  # fmt: skip
    x, w, g = (tensor(a) for a in (np.ones((1, d)), wh, grad))
    for far, wrong in ((0.0, set()), (16 * 2.0**-24, {"layer dx"})):
        out["dx"] = tensor(exact * (1 + far))
        found = judges.layer(x, w, g, None, made, out, (mask, None), bounds.U32)
        assert failing(found) == wrong


def test_what_overflows_frees_its_own_block_alone() -> None:
    """A product beyond float16 may be infinite or NaN, and what is rotated with it."""
    n, d, order = 2, 16, 8
    xh, wh, grad = np.ones((n, d)), np.ones((1, d)), np.array([[2.0], [1.0625]])
    wh[0, 0] = 60000.0  # the second row's product is the last but one tenth before the end
    made = quest.recipe("w4a4", transform=quest.Hadamard(order))
    exact = {
        "y": xh @ wh.T, "dx": hadamard.apply_transpose(grad @ wh, order),
        "dw": hadamard.apply_transpose(grad.T @ xh, order), "x_hat": xh, "w_hat": wh,
    }  # fmt: skip
    out = {name: tensor(a, torch.float16) for name, a in exact.items()}
    x, w, g = (tensor(a, torch.float16) for a in (xh, wh, grad))
    for row, column in np.ndindex(n, d):
        out["dx"] = tensor(exact["dx"], torch.float16)
        out["dx"][row, column] = math.nan
        found = failing(judges.layer(x, w, g, None, made, out, (None, None), bounds.U32))
        assert found == (set() if (row, column // order) == (0, 0) else {"layer dx"})


def product32(a: Array, b: Array) -> Array:
    return (a.astype(F32) @ b.astype(F32)).astype(np.float64)


def product_in_chunks(a: Array, b: Array) -> Array:
    """Split K in four, last chunk first, float32 sums."""
    cuts = np.array_split(np.arange(a.shape[1]), 4)
    total = np.zeros((len(a), b.shape[1]), F32)
    for cut in reversed(cuts):
        total += a[:, cut].astype(F32) @ b[cut].astype(F32)
    return total.astype(np.float64)


def product_one_by_one(a: Array, b: Array) -> Array:
    total = np.zeros((len(a), b.shape[1]), F32)
    for k in reversed(range(a.shape[1])):
        total += a[:, k : k + 1].astype(F32) * b[k : k + 1].astype(F32)
    return total.astype(np.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", ["w4a4", "w1a1", "w8a8", "fp4", "w1.58a1.58-2:4", "w4a4-4:8"])
@given(seed=st.integers(0, 2**16))
def test_layer_holds(recipe: str, dtype: torch.dtype, seed: int) -> None:
    order = (8, 12, 32)[seed % 3] if "-" not in recipe else 16
    c = layer_case.__wrapped__(recipe, order, dtype, bool(seed % 2), seed)
    ways = (np.matmul, product32, product_in_chunks, product_one_by_one)
    for product in ways:
        for verdict in c.judge(gradients(c, product)):
            assert verdict.failure is None, (product, verdict)
    # Torch's own product and its rounding to the dtype between the product and the rotation.
    stored = gradients(c, lambda a, b: (tensor(a, dtype) @ tensor(b, dtype)).double().numpy())
    assert not failing(c.judge(stored))


def swapped_scales(c: Layer) -> dict[str, Array]:
    """y = (codes product) * row scale * column scale, with the two vectors exchanged."""
    sx, sw = c.x_out["scale"].double().numpy(), c.w_out["scale"].double().numpy()
    xh, wh = c.hats
    return gradients(c) | {"y": (xh / sx * np.resize(sw, sx.shape)) @ (wh / sw * sx).T}


def half_step_missing(c: Layer) -> dict[str, Array]:
    """Integer codes multiplied without the 1/2 of (code + 1/2) on one side."""
    q, (_, wh) = c.recipe.activation, c.hats
    codes, s = c.x_out["codes"].numpy(), c.x_out["scale"].double().numpy()
    return gradients(c) | {"y": (codes * grid_of(q).step * s) @ wh.T}


def without(product: Callable[[Array, Array], Array], *names: str) -> Callable[..., Any]:
    """The layer with another product in some of its outputs."""
    return lambda c: gradients(c) | {k: v for k, v in gradients(c, product).items() if k in names}


def drop_last(a: Array, b: Array) -> Array:
    return a[:, :-8] @ b[:-8]


def last_split_only(a: Array, b: Array) -> Array:
    """Split-K that stores where it should add."""
    half = a.shape[1] // 2
    return a[:, half:] @ b[half:]


def half_accumulator(a: Array, b: Array) -> Array:
    total = np.zeros((len(a), b.shape[1]), np.float16)
    for k in range(a.shape[1]):
        total += (a[:, k : k + 1] * b[k : k + 1]).astype(np.float16)
    return total.astype(np.float64)


def rotated_back(c: Layer, name: str, inner: Array) -> dict[str, Array]:
    return gradients(c) | {name: hadamard.apply_transpose(inner, c.order)}


def inner(c: Layer) -> tuple[Array, Array]:
    (xh, wh), g = c.hats, oracle.lift(c.grad)
    return g @ wh, g.T @ xh


def masks(c: Layer) -> tuple[Array, Array]:
    return c.x_out["mask"].numpy(), c.w_out["mask"].numpy()


def through_the_scale(c: Layer) -> dict[str, Array]:
    """dx with the term that a differentiable sigma would add."""
    x, g = oracle.lift(c.x), inner(c)[0]
    sigma = c.x_out["scale"].double().numpy()
    points = c.hats[0] / sigma
    extra = (g * points).sum(-1, keepdims=True) * x / (sigma * x.shape[-1])
    return gradients(c) | {"dx": gradients(c)["dx"] + extra}


ROUGH_DW = without(half_accumulator, "dw")
LAYER_FAULTS: list[tuple[str, Callable[[Layer], dict[str, Array]], str]] = [
    ("last K tile missing", without(drop_last, "y"), "layer y"),
    ("last K tile missing in dx", without(drop_last, "dx"), "layer dx"),
    ("last K tile missing in dw", without(drop_last, "dw"), "layer dw"),
    ("split K stored, not added", without(last_split_only, "y"), "layer y"),
    ("float16 accumulator", without(half_accumulator, "y"), "layer y"),
    ("float16 accumulator in dw", ROUGH_DW, "layer dw"),
    ("scales swapped", swapped_scales, "layer y"),
    ("K/2 correction missing", half_step_missing, "layer y"),
    ("operands not quantized",
     lambda c: gradients(c) | {"y": oracle.lift(c.x) @ oracle.lift(c.w).T}, "layer y"),
    ("bias left out", lambda c: gradients(c) | {"y": c.hats[0] @ c.hats[1].T}, "layer y"),
    ("bias twice", lambda c: gradients(c) | {"y": gradients(c)["y"] + oracle.lift(c.bias)},
     "layer y"),
    ("H^T left out in dx", lambda c: gradients(c) | {"dx": inner(c)[0] * masks(c)[0]}, "layer dx"),
    ("H^T left out in dw", lambda c: gradients(c) | {"dw": inner(c)[1] * masks(c)[1]}, "layer dw"),
    ("H for H^T in dx",
     lambda c: gradients(c) | {"dx": hadamard.apply(inner(c)[0] * masks(c)[0], c.order)},
     "layer dx"),
    ("H for H^T in dw",
     lambda c: gradients(c) | {"dw": hadamard.apply(inner(c)[1] * masks(c)[1], c.order)},
     "layer dw"),
    ("mask of the weight in dx", lambda c: rotated_back(c, "dx", inner(c)[0] * masks(c)[1]),
     "layer dx"),
    ("mask of the activation in dw", lambda c: rotated_back(c, "dw", inner(c)[1] * masks(c)[0]),
     "layer dw"),
    ("no mask in dx", lambda c: rotated_back(c, "dx", inner(c)[0]), "layer dx"),
    ("no mask in dw", lambda c: rotated_back(c, "dw", inner(c)[1]), "layer dw"),
    ("x for X in dw", lambda c: rotated_back(
        c, "dw", (oracle.lift(c.grad).T @ oracle.lift(c.x)) * masks(c)[1]), "layer dw"),
    ("w for W in dx", lambda c: rotated_back(
        c, "dx", (oracle.lift(c.grad) @ oracle.lift(c.w)) * masks(c)[0]), "layer dx"),
    ("dw scaled by the rows", lambda c: gradients(c) | {"dw": gradients(c)["dw"] / len(c.x)},
     "layer dw"),
    ("gradient through the scale", through_the_scale, "layer dx"),
    ("db averaged", lambda c: gradients(c) | {"db": oracle.lift(c.grad).mean(0)}, "layer db"),
    ("db over the wrong axis", lambda c: gradients(c) | {"db": oracle.lift(c.grad).sum(1)},
     "layer db"),
    ("NaN in one element", lambda c: gradients(c) | {"y": np.where(
        np.arange(48) == 47, math.nan, gradients(c)["y"])}, "layer y"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "stage"), [f[1:] for f in LAYER_FAULTS], ids=[f[0] for f in LAYER_FAULTS]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_bites(
    wrong: Callable[[Layer], dict[str, Array]], stage: str, dtype: torch.dtype
) -> None:
    if dtype == BF16 and wrong is ROUGH_DW:
        pytest.skip("float16 sums of 48 terms are finer than the bfloat16 they end in")
    # Square, since wrong operands and axes of rectangular shapes would fail by themselves.
    c = layer_case("w4a4", 12, dtype, True, 5, square=True)
    assert not failing(c.judge(gradients(c)))
    assert failing(c.judge(wrong(c))) == {stage}


def test_layer_bites_on_narrowed_integers() -> None:
    """int32 sums of 8-bit codes narrowed to float16: 65504 is passed within a few hundred terms."""
    x = torch.ones(3, 128) * 127.5
    w = torch.ones(2, 128) * 127.5
    made = quest.recipe("w8a8", transform=quest.Identity())
    total = (oracle.lift(x) @ oracle.lift(w).T).astype(np.float64)
    with np.errstate(over="ignore"):
        narrowed = total.astype(np.float16).astype(np.float64)
    ones = torch.ones(3, 128, dtype=torch.bool), torch.ones(2, 128, dtype=torch.bool)
    g = torch.zeros(3, 2)
    out = {"y": total, "dx": np.zeros((3, 128)), "dw": np.zeros((2, 128))}
    for y, expected in ((total, set()), (narrowed, {"layer y"})):
        tensors = {k: tensor(v) for k, v in (out | {"y": y}).items()} | {"x_hat": x, "w_hat": w}
        assert failing(judges.layer(x, w, g, None, made, tensors, ones, bounds.U32)) == expected


@pytest.mark.parametrize("name", ["values", "operand", "scale", "sums"])
@pytest.mark.parametrize("parts", [(), (24, 16)], ids=["one", "stacked"])
def test_a_weight_that_is_frozen_wrong_is_no_judge_of_itself(
    name: str, parts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any of what a layer holds of it; on the path of the integers as a GPU would take it."""
    lane, recipe = lanes.all_lanes()[0], quest.recipe("w8a8")
    x, w = (inputs.draw("gaussian", (40, 256), torch.float32, seed) for seed in range(2))
    monkeypatch.setattr(paths, "has_integers", lambda *_: name != "values")
    real = frozen.freeze
    for wrong in (False, True):

        def freeze(weight: Tensor, made: Recipe, wrong: bool = wrong) -> frozen.Frozen:
            held = real(weight, made)
            rolled = getattr(held, name).roll(1, 0)
            return dataclasses.replace(held, **({name: rolled} if wrong else {}))

        monkeypatch.setattr(frozen, "freeze", freeze)
        found = examine.frozen(lane, x, w, None, recipe, parts)
        assert failing(found) == ({"frozen y"} if wrong else set())
