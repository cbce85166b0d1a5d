"""What is judged of an implementation: each property calls it once and asks the court's judges.

Every function takes the implementation and its inputs and gives verdicts; a stage that consumes
another one's output is judged on the output that the implementation really wrote.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quest import grids
from quest.conformance import judges, oracle, propagated
from quest.conformance.oracle import lift
from quest.conformance.stages import Outputs
from quest.conformance.verdict import Verdict
from quest.estimators import STE
from quest.quantizer import Quantizer
from quest.recipes import Recipe
from quest.reference import bounds, packing, quantize
from quest.transforms import Identity

from .adapter import Implementation
from .capabilities import ACCUMULATORS


def transform(impl: Implementation, x: Tensor, block: int) -> list[Verdict]:
    """T1 of x H; x (..., d)."""
    return _rotated(impl, "hadamard", x, block, False)


def transpose(impl: Implementation, x: Tensor, block: int) -> list[Verdict]:
    """T1 of x H^T; x (..., d)."""
    return _rotated(impl, "hadamard_transpose", x, block, True)


def _rotated(
    impl: Implementation, function: str, x: Tensor, block: int, turned: bool
) -> list[Verdict]:
    y = impl.call(function, x, order=block)["y"]
    form = judges.form("transform", y, tuple(x.shape), x.dtype)
    if form.failure:
        return [form]
    return [judges.rotated(x, y, block, turned, impl.capabilities.sums(block))]


def scale(impl: Implementation, x: Tensor, block: int) -> list[Verdict]:
    """T2 of sigma; x (..., d)."""
    made = impl.call("scale", x, order=block)["scale"]
    form = judges.form("scale", made, (*x.shape[:-1], 1), torch.float32)
    return (
        [form] if form.failure else [judges.scaled(x, made, block, impl.capabilities.sums(block))]
    )


def _integers(stage: str, t: Tensor, shape: tuple[int, ...]) -> Verdict:
    """Shape, and any integer dtype."""
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        told = f"has dtype {t.dtype}; an integer dtype is needed"
        return Verdict(stage, 0, float("inf"), failure=told)
    return judges.form(stage, t, shape, t.dtype)


def _coding(impl: Implementation, x: Tensor, q: Quantizer) -> tuple[Outputs, list[Verdict]]:
    """What `quantize` and `select` wrote, and verdicts on its form."""
    out = impl.call("quantize", x, q=q)
    found = [
        _integers("codes", out["codes"], tuple(x.shape)),
        judges.form("scale", out["scale"], (*x.shape[:-1], 1), torch.float32),
    ]
    keep, wrong = _keeping(impl, x, q)
    out |= {} if keep is None else {"keep": keep}
    return out, [v for v in (*found, *wrong) if v.failure is not None]


def _keeping(impl: Implementation, x: Tensor, q: Quantizer) -> tuple[Tensor | None, list[Verdict]]:
    """What `select` wrote, None for a dense quantizer, and a verdict on its form."""
    if q.sparsity is None:
        return None, []
    keep = impl.call("select", x, q=q)["keep"]
    form = judges.form("keep", keep, tuple(x.shape), torch.bool)
    return keep, [form] if form.failure else []


def codes(
    impl: Implementation, x: Tensor, q: Quantizer, *, conclusive: bool = True
) -> list[Verdict]:
    """T2 of the scale and T3 of the codes given it; with sparsity, T5 and the pruned codes, too."""
    out, wrong = _coding(impl, x, q)
    if wrong:
        return wrong
    keep = out.get("keep")
    order = q.transform.order(x.shape[-1])
    sums = impl.capabilities.sums(order)
    found = [judges.scaled(x, out["scale"], order, sums)]
    if keep is not None:
        found += [judges.selected(x, q, keep, sums), judges.pruned(q, out["codes"], keep)]
    coded = judges.coded(x, q, out["codes"], out["scale"], keep, conclusive=conclusive, sums=sums)
    return [*found, coded]


def exact(impl: Implementation, x: Tensor, q: Quantizer) -> list[Verdict]:
    """T0 of scale and codes, for rows whose arithmetic is exact: ties bit for bit."""
    out, wrong = _coding(impl, x, q)
    if wrong:
        return wrong
    expected = quantize.quantize(oracle.lift(x), **oracle.arguments(q, x.shape[-1]))
    return [
        judges.exact("exact scale", lift(out["scale"]), expected.scale),
        judges.exact("exact codes", lift(out["codes"]), expected.codes),
    ]


def values(
    impl: Implementation, x: Tensor, q: Quantizer, *, conclusive: bool = True
) -> list[Verdict]:
    """T6 of the dequantized values; given the codes where `quantize` shows them, else T2 to T6.

    With sparsity given what `select` keeps, too: what it drops is exactly 0.
    """
    made = impl.call("fake_quantize", x, q=q)["values"]
    form = judges.form("values", made, tuple(x.shape), x.dtype)
    if form.failure:
        return [form]
    if not impl.has("quantize"):
        keep, wrong = _keeping(impl, x, q)
        sums = impl.capabilities.sums(q.transform.order(x.shape[-1]))
        return wrong or [propagated.valued(x, q, made, keep, conclusive=conclusive, sums=sums)]
    out, wrong = _coding(impl, x, q)
    return wrong or [judges.dequantized(q, out["codes"], out["scale"], out.get("keep"), made)]


def mask(
    impl: Implementation, x: Tensor, q: Quantizer, *, conclusive: bool = True
) -> list[Verdict]:
    """T4 of the gradient's mask, jointly with the codes and, with sparsity, what `select` keeps."""
    out, wrong = _coding(impl, x, q)
    made = impl.call("mask", x, q=q)["mask"]
    form = judges.form("mask", made, tuple(x.shape), torch.bool)
    if wrong or form.failure:
        return [*wrong, form]
    sums = impl.capabilities.sums(q.transform.order(x.shape[-1]))
    shown = (out["codes"], out["scale"])
    coded = judges.coded(x, q, *shown, out.get("keep"), conclusive=conclusive, sums=sums)
    if coded.failure:
        return [coded]  # the mask can't be judged against codes that are wrong
    return [judges.masked(x, q, *shown, made, out.get("keep"), sums=sums)]


def exact_mask(impl: Implementation, x: Tensor, q: Quantizer) -> list[Verdict]:
    """T0 of the gradient's mask, for rows whose arithmetic is exact: thresholds are inside."""
    made = impl.call("mask", x, q=q)["mask"]
    form = judges.form("mask", made, tuple(x.shape), torch.bool)
    if form.failure:
        return [form]
    expected = quantize.quantize(oracle.lift(x), **oracle.arguments(q, x.shape[-1]))
    return [judges.exact("exact mask", lift(made), expected.mask)]


def selection(impl: Implementation, x: Tensor, q: Quantizer) -> list[Verdict]:
    """T5 of the entries that a sparse operand keeps."""
    made = impl.call("select", x, q=q)["keep"]
    form = judges.form("selection", made, tuple(x.shape), torch.bool)
    sums = impl.capabilities.sums(q.transform.order(x.shape[-1]))
    return [form] if form.failure else [judges.selected(x, q, made, sums)]


def packed(impl: Implementation, unsigned: Tensor, bits: int) -> list[Verdict]:
    """T0 of the bytes of (..., d) integers in [0, 2^bits)."""
    made = impl.call("pack", unsigned, bits=bits)["packed"]
    shape = (*unsigned.shape[:-1], -(-unsigned.shape[-1] * bits // 8))
    form = judges.form("packed codes", made, shape, torch.uint8)
    if form.failure:
        return [form]
    grid = grids.uniform(bits)
    q = Quantizer(grid, Identity(), STE())
    return [judges.packed(q, unsigned.to(torch.int16) - grid.offset, made)]


def unpacked(impl: Implementation, unsigned: Tensor, bits: int) -> list[Verdict]:
    """T0 of the integers that the specification's bytes of (..., d) unpack to."""
    data = torch.from_numpy(packing.pack(lift(unsigned), bits))
    made = impl.call("unpack", data, bits=bits, width=unsigned.shape[-1])["codes"]
    form = _integers("unpacked codes", made, tuple(unsigned.shape))
    return [form] if form.failure else [judges.exact("unpacked codes", lift(made), lift(unsigned))]


def product(impl: Implementation, a: Tensor, b: Tensor) -> list[Verdict]:
    """T0 of a b^T; a (n, k), b (m, k) int8."""
    made = impl.call("product", a, b)["accumulators"]
    form = judges.form("accumulators", made, (len(a), len(b)), torch.int32)
    return [form] if form.failure else [judges.accumulated(a, b, made)]


def scaled_product(
    impl: Implementation, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor
) -> list[Verdict]:
    """T6 of (a b^T) * a_scale * b_scale^T; a (n, k), b (m, k) int8, scales (n, 1), (m, 1)."""
    made = impl.call("scaled_product", a, b, a_scale, b_scale)["y"]
    form = judges.form("product", made, (len(a), len(b)), torch.float32)
    if form.failure:
        return [form]
    return [judges.multiplied((lift(a), lift(b)), (1.0, 1.0), (a_scale, b_scale), None, made)]


def _operands(
    impl: Implementation, x: Tensor, w: Tensor, made: Recipe
) -> tuple[Outputs, list[Verdict]]:
    """The values that the layer multiplied, and verdicts on them where they are wrong."""
    out: Outputs = {}
    wrong: list[Verdict] = []
    for name, t, q in (("x_hat", x, made.activation), ("w_hat", w, made.weight)):
        wrong += [v for v in values(impl, t, q, conclusive=False) if v.failure]
        out |= {name: impl.call("fake_quantize", t, q=q)["values"]}
    return out, wrong


def _unit(impl: Implementation) -> float:
    accumulator = impl.capabilities.accumulator
    return bounds.U32 if accumulator is None else ACCUMULATORS[accumulator]


def forward(
    impl: Implementation, x: Tensor, w: Tensor, bias: Tensor | None, made: Recipe
) -> list[Verdict]:
    """T1 of y = x_hat w_hat^T + bias, given `fake_quantize`'s values; x (n, in), w (out, in)."""
    extra = () if bias is None else (bias,)
    y = impl.call("linear", x, w, *extra, recipe=made)["y"]
    out, wrong = _operands(impl, x, w, made)
    form = judges.form("layer y", y, (len(x), len(w)), x.dtype)
    if wrong or form.failure:
        return [form, *wrong]
    return [judges.values_product(x.dtype, bias, out | {"y": y}, _unit(impl), "layer y")]


def backward(
    impl: Implementation, x: Tensor, w: Tensor, grad: Tensor, made: Recipe
) -> list[Verdict]:
    """T7 of dx and dw, given `fake_quantize`'s values and `mask`'s masks; grad (n, out)."""
    given = impl.call("linear_backward", x, w, grad, recipe=made)
    forms = [judges.form(f"layer {n}", given[n], tuple(t.shape), t.dtype)
             for n, t in (("dx", x), ("dw", w))]  # fmt: skip
    out, wrong = _operands(impl, x, w, made)
    pairs = ((x, made.activation), (w, made.weight))
    for t, q in pairs:
        wrong += [v for v in mask(impl, t, q, conclusive=False) if v.failure]
    wrong += [v for v in forms if v.failure]
    if wrong:
        return wrong
    x_mask, w_mask = (impl.call("mask", t, q=q)["mask"] for t, q in pairs)
    # The product of the operands is exact to `layer`'s first verdict: only gradients are asked.
    y = torch.from_numpy(np.asarray(lift(out["x_hat"]) @ lift(out["w_hat"]).T)).to(x.dtype)
    found = judges.layer(
        x, w, grad, None, made, out | given | {"y": y}, (x_mask, w_mask), _unit(impl),
        sums=impl.capabilities.sums(made.weight.transform.order(x.shape[-1])),
    )  # fmt: skip
    return found[1:]
