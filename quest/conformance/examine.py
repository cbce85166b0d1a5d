"""One call of a lane on one input, with every judge that applies to it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quest import operands
from quest.estimators import STE
from quest.quantizer import Quantizer
from quest.recipes import Recipe, recipe
from quest.reference.bounds import BUTTERFLY, Sums
from quest.sparsity import NM

from . import inputs, judges
from .lanes import Lane
from .verdict import Verdict

# The transform of kernels/rotate.cuh: sixteen terms on the tensor cores, which cut what lies 2^-24
# below the largest and the sum to float32, 7.5 roundings at the most, and three additions.
TENSOR_CORES = Sums(roundings=11)


def sums_of(lane: Lane, x: Tensor, q: Quantizer) -> Sums:
    """How the quantizer of a lane takes the sums of the transform of an input like x (..., d).

    kernels/blocks.cu and rows.cu transform 16 bits on the tensor cores. Where a device, an
    estimator or a width is Triton's, the bound is wider than need be.
    """
    compiled = lane.name == "triton-cuda" or lane.backend == "emulated"
    halves = x.dtype is torch.bfloat16 or x.dtype is torch.float16
    taken = q.grid is not None and q.grid.step is not None and q.sparsity is None
    at_once = q.transform.order(x.shape[-1]) == 128
    return TENSOR_CORES if compiled and halves and taken and at_once else BUTTERFLY


def turned_by(lane: Lane, dtype: torch.dtype, order: int) -> Sums:
    """How a lane takes the sums of gradients of a dtype that are rotated back behind a mask.

    kernels/masked.cu does it on the tensor cores. Where a device is Triton's the bound is wider
    than need be.
    """
    compiled = lane.name == "triton-cuda" or lane.backend == "emulated"
    halves = dtype is torch.bfloat16 or dtype is torch.float16
    return TENSOR_CORES if compiled and halves and order == 128 else BUTTERFLY


def transform(lane: Lane, x: Tensor, order: int, transpose: bool = False) -> list[Verdict]:
    """T1 of the Hadamard transform."""
    y = lane.call("hadamard", x, order=order, transpose=transpose)["y"]
    return [
        judges.form("transform", y, tuple(x.shape), x.dtype),
        judges.rotated(x, y, order, transpose),
    ]


def quantizer(lane: Lane, x: Tensor, q: Quantizer, *, conclusive: bool = True) -> list[Verdict]:
    """T2 to T6 of codes, scale, mask and selection; T0 of their packing; values against codes."""
    d, order = x.shape[-1], q.transform.order(x.shape[-1])
    lead = tuple(x.shape[:-1])
    out = lane.call("quantize", x, q=q)
    codes, scale, mask = out["codes"], out["scale"], out["mask"]
    keep = out["keep"] if q.sparsity is not None else None
    found = [
        judges.form("codes", codes, (*lead, d), q.code_dtype),
        judges.form("scale", scale, (*lead, 1), torch.float32),
        judges.form("mask", mask, (*lead, d), torch.bool),
        judges.form("keep", out["keep"], (0,) if keep is None else (*lead, d), torch.bool),
    ]
    if any(v.failure for v in found):
        return found
    sums = sums_of(lane, x, q)
    found.append(judges.scaled(x, scale, order, sums))
    if keep is not None:
        found += [judges.selected(x, q, keep), judges.pruned(q, codes, keep)]
    found.append(judges.coded(x, q, codes, scale, keep, conclusive=conclusive, sums=sums))
    if found[-1].failure is not None:
        return found  # what follows reads the codes
    found.append(judges.masked(x, q, codes, scale, mask, keep, sums=sums))
    return found + _stored(lane, x, q, out)


def _stored(lane: Lane, x: Tensor, q: Quantizer, out: dict[str, Tensor]) -> list[Verdict]:
    """The packed and the dequantized form of the same quantization."""
    keep = out["keep"] if q.sparsity is not None else None
    packed, values = lane.call("pack", x, q=q), lane.call("fake_quantize", x, q=q)
    form = judges.form("values", values["values"], tuple(x.shape), x.dtype)
    found = [
        judges.packed(q, out["codes"], packed["codes"]),
        judges.exact("packed scale", judges.bits(packed["scale"]), judges.bits(out["scale"])),
        judges.packed_bits("packed mask", out["mask"], packed["mask"]),
        judges.packed_bits("values' mask", out["mask"], values["mask"]),
        form,
    ]
    if keep is not None:
        found.append(judges.packed_bits("packed keep", keep, packed["keep"]))
    if form.failure is None:
        found.append(judges.dequantized(q, out["codes"], out["scale"], keep, values["values"]))
    return found


def backward(lane: Lane, grad: Tensor, mask: Tensor, order: int) -> list[Verdict]:
    """T7 of the fused backward; mask (..., ceil(d / 8)) uint8."""
    by = turned_by(lane, grad.dtype, order)
    dx = lane.call("masked_transpose", grad, mask, order=order)["dx"]
    form = judges.form("backward", dx, tuple(grad.shape), grad.dtype)
    return [form] if form.failure else [form, judges.transposed(grad, mask, dx, order, by)]


def encoded(lane: Lane, x: Tensor, q: Quantizer, kind: str) -> list[Verdict]:
    """T0 of an operand against the codes of the same lane, and T6 of what it decodes to."""
    lead, d = tuple(x.shape[:-1]), x.shape[-1]
    codes, out = lane.call("quantize", x, q=q), lane.call("encode", x, q=q, kind=kind)
    bits, dtype = -(-d // 8), torch.uint8 if kind == "bits" else torch.int8
    found = [
        judges.form("operand", out["operand"], (*lead, bits if kind == "bits" else d), dtype),
        judges.form("operand scale", out["scale"], (*lead, 1), torch.float32),
        judges.form("operand mask", out["mask"], (*lead, bits), torch.uint8),
        judges.form("operand sums", out["sums"], (*lead, 1), torch.int32),
    ]
    if any(v.failure for v in found):
        return found
    keep = codes["keep"] if q.sparsity is not None else None
    found += judges.encoded(q, kind, codes["codes"], keep, out["operand"], out["sums"])
    found += [
        judges.exact("operand scale", judges.bits(out["scale"]), judges.bits(codes["scale"])),
        judges.packed_bits("operand mask", codes["mask"], out["mask"]),
    ]
    # A wrong operand need not have a compressed form.
    if q.sparsity == NM(2, 4) and not any(v.failure for v in found):
        found += compressed(lane, out["operand"].reshape(-1, d))
    static = {"q": q, "kind": kind, "width": d, "dtype": x.dtype}
    values = lane.call("decode", out["operand"], out["scale"], **static)["values"]
    form = judges.form("decoded", values, tuple(x.shape), x.dtype)
    if form.failure is None:
        found.append(judges.dequantized(q, codes["codes"], out["scale"], keep, values))
        # As for the compressed form: a wrong operand need not have a packed one.
        if operands.saved(q, kind).kind in operands.PACKED and not any(v.failure for v in found):
            found += packed_operand(lane, q, codes["codes"], out["operand"], out["scale"], values)
    return [*found, form]


def operand(lane: Lane, x: Tensor, q: Quantizer, kind: str) -> list[Verdict]:
    """T2, T3 and T0 of an operand without a mask; T0 against `encode` where the grid is a table."""
    out = lane.call("operand", x, q=q, kind=kind)
    shown = (out["operand"], out["scale"], out["sums"])
    if q.require_grid().step is not None and q.sparsity is None:
        by = sums_of(lane, x, q)
        return _quantized(x, q, kind, shown, "operand", by)
    same = lane.call("encode", x, q=q, kind=kind)
    return [
        judges.exact(f"operand's {name}", judges.bits(out[name]), judges.bits(same[name]))
        for name in ("operand", "scale", "sums")
    ]


def packed_operand(
    lane: Lane, q: Quantizer, codes: Tensor, operand: Tensor, scale: Tensor, values: Tensor
) -> list[Verdict]:
    """T0 of an operand of integers in the form that is saved, and of what it decodes to.

    codes (..., d) and values (..., d): those of the operand.
    """
    d, form = operand.shape[-1], operands.saved(q, "integers")
    packed = lane.call("pack_operand", operand, q=q)["packed"]
    shape = (*operand.shape[:-1], -(-d * form.bits // 8))
    found = [judges.form("packed operand", packed, shape, torch.uint8)]
    if found[0].failure is not None:
        return found
    static = {"q": q, "kind": form.kind, "width": d, "dtype": values.dtype}
    again = lane.call("decode", packed, scale, **static)["values"]
    same = judges.form("decoded from packed", again, tuple(values.shape), values.dtype)
    if same.failure is None:
        same = judges.exact("decoded from packed", judges.bits(again), judges.bits(values))
    return [*found, judges.packed(q, codes, packed), same]


def gated(
    lane: Lane, gate: Tensor, value: Tensor, q: Quantizer, kind: str, *, conclusive: bool = True
) -> list[Verdict]:
    """T1 of x = silu(gate) * value as it is shown, and given that x T2, T3 and T0 of its operand.

    q: of a uniform grid that has an operand of this kind, and without sparsity.
    """
    out = lane.call("gated", gate, value, q=q, kind=kind)
    form = judges.form("gated", out["x"], tuple(gate.shape), gate.dtype)
    if form.failure is not None:
        return [form]
    shown = (out["operand"], out["scale"], out["sums"])
    by = sums_of(lane, out["x"], q)
    inside = _quantized(out["x"], q, kind, shown, "gated", by, conclusive)
    return [form, judges.gated(gate, value, out["x"]), *inside]


def normed(
    lane: Lane,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    q: Quantizer,
    kind: str,
    *,
    conclusive: bool = True,
) -> list[Verdict]:
    """T0 of h = residual + x; given h T1 of its norm, and given that T2, T3 and T0 of its operand.

    q: as in `gated`.
    """
    extra = () if residual is None else (residual,)
    out = lane.call("normed", x, weight, *extra, q=q, kind=kind, eps=eps)
    shape = tuple(x.shape)
    forms = [
        judges.form("added", out["h"], shape if extra else (0,), x.dtype),
        judges.form("normed", out["x"], shape, x.dtype),
    ]
    if any(v.failure for v in forms):
        return forms
    sums = [] if residual is None else [judges.added(x, residual, out["h"])]
    h = x if residual is None else out["h"]
    shown = (out["operand"], out["scale"], out["sums"])
    by = sums_of(lane, out["x"], q)
    inside = _quantized(out["x"], q, kind, shown, "normed", by, conclusive)
    return [*forms, *sums, judges.normed(h, weight, eps, out["x"]), *inside]


def compressed(lane: Lane, operand: Tensor) -> list[Verdict]:
    """T0 of the compressed form of a 2:4 sparse operand (rows, d) int8."""
    out = lane.call("compress", operand)
    return judges.compressed(operand, out["values"], out["metadata"])


def product(
    lane: Lane,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    made: Recipe,
    dtype: torch.dtype,
    compressed: bool = False,
    gate: bool = False,
    residual: Tensor | None = None,
    rotary: tuple[Tensor, Tensor, int] | None = None,
) -> list[Verdict]:
    """T0 of the accumulators and T6 of the product of two operands, x (n, in), w (out, in).

    compressed: the product reads w, 2:4 sparse, in its compressed form. gate: T6 of what a gated
    product makes of it, (n, out / 2). residual: (n, out) of `dtype`; T0, too, of what a product
    makes that adds it; not with the other two. rotary: (cos, sin, turned), the tables as
    `rotated_product` takes them; T0, too, of what a product makes that turns its first columns;
    not with the others.
    """
    kinds = operands.kinds(made.activation, made.weight)
    if kinds is None:
        raise ValueError(f"recipe {made} has no integer product")
    pairs = tuple(zip((made.activation, made.weight), kinds, strict=True))
    a, b = (
        lane.call("encode", t, q=q, kind=kind) for t, (q, kind) in zip((x, w), pairs, strict=True)
    )
    acc = lane.call("accumulate", a["operand"], b["operand"])["accumulators"]
    extra = () if bias is None else (bias,)
    stage = "gated_product" if gate else "product"
    weight: tuple[Tensor, ...] = (b["operand"],)
    if compressed:
        form = lane.call("compress", b["operand"])
        stage, weight = "sparse_product", (form["values"], form["metadata"])
    given = (a["operand"], *weight, a["scale"], b["scale"], a["sums"], b["sums"], *extra)
    static: dict[str, Any] = {
        "grids": ",".join(q.require_grid().name for q, _ in pairs), "kinds": ",".join(kinds),
        "width": x.shape[-1], "dtype": dtype,
    }  # fmt: skip
    y = lane.call(stage, *given, **static)["y"]
    shape, made_shape = (x.shape[0], w.shape[0]), (x.shape[0], w.shape[0] // (1 + gate))
    forms = [
        judges.form("accumulators", acc, shape, torch.int32),
        judges.form("gated product" if gate else "product", y, made_shape, dtype),
    ]
    sums = []
    if residual is not None:
        h = lane.call("added_product", residual, *given, **static)["h"]
        forms.append(judges.form("added", h, shape, dtype))
        sums = [judges.added(y, residual, h)] if forms[-1].failure is None else []
    if rotary is not None:
        cos, sin, turned = rotary
        h = lane.call("rotated_product", cos, sin, *given, **static, turned=turned)["h"]
        forms.append(judges.form("turned", h, shape, dtype))
        sums = [judges.turned_heads(y, *rotary, h)] if forms[-1].failure is None else []
    if any(v.failure for v in forms):
        return forms
    d = x.shape[-1]
    whole = tuple(
        judges.whole(t["operand"], kind, d) for t, kind in zip((a, b), kinds, strict=True)
    )
    units = tuple(operands.form(q.require_grid(), kind).unit for q, kind in pairs)
    return [
        *forms,
        judges.accumulated(a["operand"], b["operand"], acc),
        (judges.gated_product if gate else judges.multiplied)(
            (whole[0], whole[1]), (units[0], units[1]), (a["scale"], b["scale"]), bias, y
        ),
        *sums,
    ]


def accumulators(lane: Lane) -> list[Verdict]:
    """T0 of sums that float32 can't count, of unlike terms: equal ones it adds exactly."""
    a, b = (inputs.integers("coherent", n, 4096, n) for n in (3, 5))
    acc = lane.call("accumulate", a, b)["accumulators"]
    formed = judges.form("accumulators", acc, (3, 5), torch.int32)
    return [formed] if formed.failure else [formed, judges.accumulated(a, b, acc)]


def accumulation(lane: Lane) -> float:
    """Unit roundoff of the lane's products: tensor cores truncate, which costs a bit."""
    return 2.0**-23 if lane.device == "cuda" else 2.0**-24


def layer(
    lane: Lane,
    x: Tensor,
    w: Tensor,
    grad: Tensor,
    bias: Tensor | None,
    made: Recipe,
    path: str = "values",
    parts: tuple[int, ...] = (),
) -> list[Verdict]:
    """T1 (T6 on the path of the integers, without a gradient as well) and T7 of the linear layer.

    x (n, in), w (out, in), grad (n, out). path: see `quest.paths`. parts: the rows of w of each of
    several layers that are called together, where it is not one.
    """
    extra = () if bias is None else (bias,)
    static = {"recipe": made, "path": path} | ({"parts": parts} if parts else {})
    out = lane.call("linear", x, w, grad, *extra, **static)
    pairs = ((x, made.activation), (w, made.weight))
    rows = ((), parts)  # x is one tensor; of w each layer has its own
    codes = [
        None if q.grid is None else _by_parts(lane, "quantize", t, each, q=q)
        for (t, q), each in zip(pairs, rows, strict=True)
    ]
    masks = tuple(None if c is None else c["mask"] for c in codes)
    both, unit = (masks[0], masks[1]), accumulation(lane)
    order = made.activation.transform.order(x.shape[-1])
    by = turned_by(lane, grad.dtype, order) if masks != (None, None) else BUTTERFLY
    found = judges.layer(x, w, grad, bias, made, out, both, unit, parts, by)
    if path == "integers":
        # The first verdict is of the values' product, rounded to the dtype first.
        return _integers(pairs, bias, out, codes) + found[1:]
    # The operands themselves: what the quantizer's own judge admits, or the plain rotation.
    for (t, q), each, name in zip(pairs, rows, ("x_hat", "w_hat"), strict=True):
        if q.grid is None:
            found.append(judges.rotated(t, out[name], q.transform.order(t.shape[-1]), False))
        else:
            values = _by_parts(lane, "fake_quantize", t, each, q=q)["values"]
            found.append(judges.exact(f"layer {name}", judges.bits(out[name]), judges.bits(values)))
    return found


def frozen(
    lane: Lane,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    made: Recipe,
    parts: tuple[int, ...] = (),
) -> list[Verdict]:
    """The forward of a layer whose weight (out, in) is frozen, on rows x (n, in): T6, or T1.

    parts: as in `layer`.
    On the integers' path T2, T3 and T0 of the operand of x, too, which no other stage has seen.
    """
    extra = () if bias is None else (bias,)
    static = {"recipe": made} | ({"parts": parts} if parts else {})
    out = lane.call("frozen", x, w, *extra, **static)
    form = judges.form("frozen y", out["y"], (x.shape[0], w.shape[0]), x.dtype)
    if form.failure is not None:
        return [form]
    pairs = ((x, made.activation), (w, made.weight))
    if "a" in out:
        inside = _of_rows(lane, x, made, out) if "a_sums" in out else []
        if any(v.failure for v in inside):
            return inside
        found = [dataclasses.replace(v, stage="frozen y") for v in _products(pairs, bias, out)]
        return found + inside
    return [judges.values_product(x.dtype, bias, out, accumulation(lane), "frozen y")]


def _of_rows(lane: Lane, x: Tensor, made: Recipe, out: dict[str, Tensor]) -> list[Verdict]:
    """What a frozen layer multiplied with its weight."""
    kinds = operands.kinds(made.activation, made.weight)
    if kinds is None:
        raise ValueError(f"recipe {made} has no integer product")
    by = sums_of(lane, x, made.activation)
    shown = (out["a"], out["a_scale"], out["a_sums"])
    return _quantized(x, made.activation, kinds[0], shown, "frozen", by)


def _quantized(
    x: Tensor,
    q: Quantizer,
    kind: str,
    shown: tuple[Tensor, Tensor, Tensor],
    stage: str,
    by: Sums,
    conclusive: bool = False,
) -> list[Verdict]:
    """T2, T3 and T0 of x's (operand, scale, sums), of uniform grids, whatever made them."""
    operand, scale, sums = shown
    lead, d, bits = tuple(x.shape[:-1]), x.shape[-1], kind == "bits"
    forms = [
        judges.form(
            f"{stage} operand",
            operand,
            (*lead, -(-d // 8) if bits else d),
            torch.uint8 if bits else torch.int8,
        ),
        judges.form(f"{stage} scale", scale, (*lead, 1), torch.float32),
        judges.form(f"{stage} sums", sums, (*lead, 1), torch.int32),
    ]
    if any(v.failure for v in forms):
        return forms
    whole = judges.whole(operand, kind, d)
    # Of an even number of levels a point is half of an odd number of steps.
    even, spread = q.require_grid().levels % 2 == 0, operands.form_of(q, kind).spread
    index, rest = np.divmod(whole - spread * even, spread * (1 + even))
    if rest.any():
        told = f"an integer that is no {'odd ' if even else ''}multiple of {spread}"
        return [*forms, Verdict(f"{stage} operand", whole.size, math.inf, failure=told)]
    codes = torch.from_numpy(index).to(torch.int16)
    order = q.transform.order(d)
    return [
        *forms,
        dataclasses.replace(judges.scaled(x, scale, order, by), stage=f"{stage} scale"),
        dataclasses.replace(
            judges.coded(x, q, codes, scale, conclusive=conclusive, sums=by), stage=f"{stage} codes"
        ),
        judges.exact(f"{stage} sums", sums.numpy(), whole.sum(-1, keepdims=True)),
    ]


def _products(
    pairs: tuple[tuple[Tensor, Quantizer], ...], bias: Tensor | None, out: dict[str, Tensor]
) -> list[Verdict]:
    """T6 of y, given its operands a and b."""
    kinds = operands.kinds(pairs[0][1], pairs[1][1])
    if kinds is None:
        raise ValueError(f"{pairs[0][1]} x {pairs[1][1]} has no integer product")
    whole = [
        judges.whole(out[name], kind, t.shape[-1])
        for (t, _), kind, name in zip(pairs, kinds, "ab", strict=True)
    ]
    units = [operands.form_of(q, kind).unit for (_, q), kind in zip(pairs, kinds, strict=True)]
    scales = (out["a_scale"], out["b_scale"])
    return [judges.multiplied((whole[0], whole[1]), (units[0], units[1]), scales, bias, out["y"])]


def _by_parts(
    lane: Lane, stage: str, t: Tensor, parts: tuple[int, ...], q: Quantizer
) -> dict[str, Tensor]:
    """A stage on each so many rows of t, put together: where a near tie goes may depend on them."""
    if not parts:
        return lane.call(stage, t, q=q)
    made = [lane.call(stage, rows, q=q) for rows in torch.split(t, list(parts))]
    return {name: torch.cat([each[name] for each in made]) for name in made[0]}


def _integers(
    pairs: tuple[tuple[Tensor, Quantizer], ...],
    bias: Tensor | None,
    out: dict[str, Tensor],
    codes: list[dict[str, Tensor] | None],
) -> list[Verdict]:
    """T6 of y, with a gradient and without, given its operands, T0 of these given the codes, T6 of
    what the backward reads.
    """
    kinds = operands.kinds(pairs[0][1], pairs[1][1])
    if kinds is None:
        raise ValueError(f"{pairs[0][1]} x {pairs[1][1]} has no integer product")
    found = [
        dataclasses.replace(v, stage=stage)
        for stage, y in (("layer y", out["y"]), ("layer y, inference", out["inferred"]))
        for v in _products(pairs, bias, out | {"y": y})
    ]
    hats = ("x_hat", "w_hat")
    for (t, q), kind, made, name, hat in zip(pairs, kinds, codes, "ab", hats, strict=True):
        assert made is not None  # integers are quantized
        keep = made["keep"] if q.sparsity is not None else None
        sums = judges.whole(out[name], kind, t.shape[-1]).sum(-1, keepdims=True)
        found += judges.encoded(q, kind, made["codes"], keep, out[name], torch.from_numpy(sums))[:1]
        found.append(judges.dequantized(q, made["codes"], made["scale"], keep, out[hat]))
    return found


def adjoint(lane: Lane, x: Tensor, w: Tensor, grad: Tensor, block: int) -> list[Verdict]:
    """T7: <g, J v> = <J^T g, v> where nothing is rounded and nothing masked."""
    from quest.transforms import Hadamard

    free = Quantizer(None, Hadamard(block), STE())
    made = dataclasses.replace(recipe("bf16"), name="rotated", weight=free, activation=free)
    out = lane.call("linear", x, w, grad, recipe=made)
    return [judges.adjoint(x, w, grad, out, block, accumulation(lane))]
