"""Outputs of kernels and layers that do not follow their input: the judges notice each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import quest
from property_tests.honest import (
    HONEST,
    NM24,
    PAIRS,
    UNIFORM,
    Q,
    failing,
    pack_bits,
    run,
    tensor,
)
from property_tests.honest_layer import gradients, layer_case, transposed_case
from property_tests.scripted import Scripted
from quest import operands
from quest.conformance import examine, inputs, lanes, oracle
from quest.reference import hadamard


def deaf(honest: Tensor, other: Tensor) -> Iterator[Tensor]:
    """Constants of many values, and what was right for another input."""
    assert honest.unique().numel() > 1
    # Every code, byte and truth value that occurs; of floats an entry, their mean, 0, 1 and NaN.
    values = honest.unique().tolist()
    if honest.is_floating_point():
        values = [values[0], float(honest.double().mean()), 0.0, 1.0, math.nan]
    yield from (torch.full_like(honest, v) for v in values)
    assert not torch.equal(honest, other)
    yield other


def written(x: Tensor, q: quest.Quantizer) -> dict[str, dict[str, Tensor]]:
    """What an honest lane writes in the three stages of a sparse quantizer, and more."""
    out = run(x, q, HONEST)
    keep = torch.from_numpy(pack_bits(out["keep"].numpy(), 1))
    return {
        "quantize": out | {"codes": out["codes"].to(q.code_dtype)},
        "pack": out | {"codes": out["packed"], "mask": out["bits"], "keep": keep},
        "fake_quantize": out | {"mask": out["bits"]},
    }


# Stage, output, and the judge that must notice.
HEARD = (
    ("quantize", "codes", "codes"),
    ("quantize", "scale", "scale"),
    ("quantize", "mask", "mask"),
    ("quantize", "keep", "selection"),
    ("pack", "codes", "packed codes"),
    ("pack", "scale", "packed scale"),
    ("pack", "mask", "packed mask"),
    ("pack", "keep", "packed keep"),
    ("fake_quantize", "values", "values"),
    ("fake_quantize", "mask", "values' mask"),
)


@pytest.mark.parametrize(
    ("grid", "sparsity"), [(UNIFORM[1], NM24), (UNIFORM[4], PAIRS), (quest.grids.e2m1(), NM24)]
)
def test_quantizer_that_does_not_hear_its_input(grid: Any, sparsity: Any) -> None:
    """Every element has a bound on both sides, so "not constant" needs no judge of its own."""
    q = Q(grid, quest.Hadamard(16), quest.Clip(0.6), sparsity)
    x, another = (inputs.draw("heavy", (8, 48), torch.float32, seed) for seed in (0, 1))
    honest, other = written(x, q), written(another, q)
    assert not failing(examine.quantizer(Scripted(lambda at, _: honest[at]), x, q))
    for stage, name, judge_ in HEARD:
        for wrong in deaf(honest[stage][name], other[stage][name]):
            out = honest | {stage: honest[stage] | {name: wrong}}
            found = examine.quantizer(Scripted(lambda at, _, out=out: out[at]), x, q)
            assert judge_ in failing(found), (stage, name, wrong)


def test_pruned_codes_have_a_verdict_of_their_own() -> None:
    q = Q(UNIFORM[4], quest.Hadamard(16), quest.Clip(0.6), NM24)
    x = inputs.draw("heavy", (8, 48), torch.float32, 0)
    honest = written(x, q)
    codes = torch.where(honest["quantize"]["keep"], honest["quantize"]["codes"], 1)
    out = honest | {"quantize": honest["quantize"] | {"codes": codes.to(torch.int8)}}
    assert "pruned codes" in failing(examine.quantizer(Scripted(lambda at, _: out[at]), x, q))


def test_a_transform_in_another_dtype_is_refused() -> None:
    # By its values alone it would be more than good enough.
    x = inputs.draw("gaussian", (8, 48), torch.bfloat16, 0)
    y = tensor(hadamard.apply(oracle.lift(x), 16), torch.float32)
    assert failing(examine.transform(Scripted(lambda *_: {"y": y}), x, 16)) == {"transform"}


def test_an_operand_of_a_table_that_does_not_hear_its_input() -> None:
    """It is held to what `encode` makes: to all of it."""
    q, cpu = quest.recipe("fp4").activation, lanes.all_lanes()[0]
    (kind, _) = operands.kinds(q, q) or ("", "")
    x, another = (inputs.draw("heavy", (8, 256), torch.float32, seed) for seed in range(2))
    honest, other = (cpu.call("operand", t, q=q, kind=kind) for t in (x, another))
    same = cpu.call("encode", x, q=q, kind=kind)
    for output in ("operand", "scale", "sums"):
        for wrong in (honest[output], *deaf(honest[output], other[output])):
            made = {"encode": same, "operand": honest | {output: wrong}}
            found = failing(examine.operand(Scripted(lambda at, _, m=made: m[at]), x, q, kind))
            assert found == (set() if wrong is honest[output] else {f"operand's {output}"})


@pytest.mark.parametrize("name", ["w1a1", "w4a4", "w8a8", "w4a4-2:4"])
def test_operand_and_product_that_do_not_hear_their_input(name: str) -> None:
    made = quest.recipe(name, estimator=quest.Clip(0.6))  # which masks some
    q = made.weight
    kinds = operands.kinds(made.activation, q)
    assert kinds is not None
    packs = operands.saved(q, kinds[1]).kind in operands.PACKED
    static = {"q": q, "kind": kinds[1], "width": 48, "dtype": torch.float32}
    cpu = lanes.all_lanes()[0]

    def honest_of(x: Tensor, w: Tensor) -> dict[str, dict[str, Tensor]]:
        a = cpu.call("encode", x, q=made.activation, kind=kinds[0])
        b = cpu.call("encode", w, q=q, kind=kinds[1])
        names = ",".join(p.require_grid().name for p in (made.activation, q))
        vectors = (a["scale"], b["scale"], a["sums"], b["sums"])
        return {
            "quantize": cpu.call("quantize", w, q=q),
            "encode": b,
            "decode": cpu.call("decode", b["operand"], b["scale"], **static),
            "left": a,
            "pack_operand": cpu.call("pack_operand", b["operand"], q=q) if packs else {},
            "compress": cpu.call("compress", b["operand"]) if q.sparsity else {},
            "accumulate": cpu.call("accumulate", a["operand"], b["operand"]),
            "product": cpu.call("product", a["operand"], b["operand"], *vectors, grids=names,
                                kinds=",".join(kinds), width=48, dtype=torch.float32),
        }  # fmt: skip

    x, w, x2, w2 = (inputs.draw("heavy", (8, 48), torch.float32, seed) for seed in range(4))
    honest, other = honest_of(x, w), honest_of(x2, w2)
    for stage, output, judge_ in (
        ("encode", "operand", "operand"),
        ("encode", "scale", "operand scale"),
        ("encode", "mask", "operand mask"),
        ("encode", "sums", "operand sums"),
        ("decode", "values", "values"),
        *([("pack_operand", "packed", "packed codes")] if packs else []),
        ("accumulate", "accumulators", "accumulators"),
        ("product", "y", "product"),
    ):
        for wrong in (honest[stage][output], *deaf(honest[stage][output], other[stage][output])):
            out = honest | {stage: honest[stage] | {output: wrong}}

            def write(at: str, t: Tensor, out: dict[str, dict[str, Tensor]] = out) -> Any:
                return out["left" if at == "encode" and t is x else at]

            lane = Scripted(write)
            found = (
                examine.encoded(lane, w, q, kinds[1])
                if stage in ("encode", "decode", "pack_operand")
                else examine.product(lane, x, w, None, made, torch.float32)
            )
            good = wrong is honest[stage][output]
            assert (judge_ not in failing(found)) == good, (stage, output, wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotation_that_does_not_hear_its_input(dtype: torch.dtype) -> None:
    x, another = (inputs.draw("gaussian", (8, 48), dtype, seed) for seed in (0, 1))
    honest, other = (tensor(hadamard.apply(oracle.lift(t), 16), dtype) for t in (x, another))
    assert not failing(examine.transform(Scripted(lambda *_: {"y": honest}), x, 16))
    for wrong in deaf(honest, other):
        found = examine.transform(Scripted(lambda *_, y=wrong: {"y": y}), x, 16)
        assert failing(found) == {"transform"}, wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backward_that_does_not_hear_its_input(dtype: torch.dtype) -> None:
    (grad, flags, mask), (grad2, flags2, _) = (transposed_case(16, seed, dtype) for seed in (0, 1))
    honest, other = (
        tensor(hadamard.apply_transpose(oracle.lift(g) * m, 16), dtype)
        for g, m in ((grad, flags), (grad2, flags2))
    )
    assert not failing(examine.backward(Scripted(lambda *_: {"dx": honest}), grad, mask, 16))
    for wrong in deaf(honest, other):
        found = examine.backward(Scripted(lambda *_, dx=wrong: {"dx": dx}), grad, mask, 16)
        assert failing(found) == {"backward"}, wrong


@pytest.mark.parametrize("name", ["y", "dx", "dw", "db", "x_hat", "w_hat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", ["w4a4", "w1a1"])
def test_layer_that_does_not_hear_its_input(recipe: str, dtype: torch.dtype, name: str) -> None:
    c, c2 = (layer_case(recipe, 12, dtype, True, seed) for seed in (0, 1))
    honest, other = (
        {k: tensor(v, dtype) for k, v in gradients(each).items()}
        | {"x_hat": each.x_out["values"], "w_hat": each.w_out["values"]}
        for each in (c, c2)
    )

    def failing_with(out: dict[str, Tensor]) -> set[str]:
        def write(stage: str, t: Tensor) -> dict[str, Tensor]:
            return out if stage == "linear" else c.x_out if t.shape == c.x.shape else c.w_out

        return failing(examine.layer(Scripted(write), c.x, c.w, c.grad, c.bias, c.recipe))

    assert not failing_with(honest)
    for wrong in deaf(honest[name], other[name]):
        assert f"layer {name}" in failing_with(honest | {name: wrong}), wrong
