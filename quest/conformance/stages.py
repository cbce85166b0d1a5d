"""The stages: what each calls of production code, by the operators of a lane's backend.

A stage takes a lane, tensors and what is static, and gives back what was written, by name.
`lanes.run` calls it, guarded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import backends

if TYPE_CHECKING:
    from quest.linear import Linear

    from .lanes import Lane

Outputs = dict[str, Tensor]


class GuardError(AssertionError):
    """A lane broke a rule that holds for every operator, whatever it computes."""


def storage_bytes(t: Tensor) -> bytes:
    """All bytes of a tensor's storage, gaps included."""
    flat = torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())
    return flat.cpu().numpy().tobytes()


def _hadamard(lane: Lane, x: Tensor, *, order: int, transpose: bool) -> Outputs:
    return {"y": backends.operators(lane.backend).hadamard(x, order, transpose)}


def _quantize(lane: Lane, x: Tensor, *, q: Any, packed: bool = False) -> Outputs:
    codes, scale, mask, keep = backends.operators(lane.backend).quantize(x, q, packed)
    return {"codes": codes, "scale": scale, "mask": mask, "keep": keep}


def _fake_quantize(lane: Lane, x: Tensor, *, q: Any) -> Outputs:
    values, mask = backends.operators(lane.backend).fake_quantize(x, q)
    return {"values": values, "mask": mask}


def _masked_transpose(lane: Lane, grad: Tensor, mask: Tensor, *, order: int) -> Outputs:
    return {"dx": backends.operators(lane.backend).masked_transpose(grad, mask, order)}


def _encode(lane: Lane, x: Tensor, *, q: Any, kind: str) -> Outputs:
    names = ("operand", "scale", "mask", "sums")
    return dict(zip(names, backends.operators(lane.backend).encode(x, q, kind), strict=True))


def _operand(lane: Lane, x: Tensor, *, q: Any, kind: str) -> Outputs:
    names = ("operand", "scale", "sums")
    return dict(zip(names, backends.operators(lane.backend).operand(x, q, kind), strict=True))


def _gated(lane: Lane, gate: Tensor, value: Tensor, *, q: Any, kind: str) -> Outputs:
    """What is made of silu(gate) * value, which is shown; nothing may change where it is not."""
    f = backends.operators(lane.backend)
    pair = f.gated_encode_shown, f.gated_encode
    return _prologue(lane, pair, ("operand", "scale", "sums", "x"), gate, value, q.spec, kind)


def _normed(
    lane: Lane, x: Tensor, weight: Tensor, *residual: Tensor, q: Any, kind: str, eps: float
) -> Outputs:
    """What is made of the norm of x, or of residual + x, which is shown, too."""
    f = backends.operators(lane.backend)
    names, added = ("operand", "scale", "sums", "h", "x"), residual[0] if residual else None
    pair = f.normed_encode_shown, f.normed_encode
    return _prologue(lane, pair, names, x, added, weight, eps, q.spec, kind)


def _prologue(
    lane: Lane,
    pair: tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]],
    names: tuple[str, ...],
    *arguments: Any,
) -> Outputs:
    """The outputs of the first, by name; the second makes all but the last."""
    made = dict(zip(names, pair[0](*arguments), strict=True))
    for name, t in zip(names[:-1], pair[1](*arguments), strict=True):
        if storage_bytes(t) != storage_bytes(made[name]):
            raise GuardError(f"{lane}: {name} is another where the rows of a prologue are shown")
    return made


def _decode(lane: Lane, operand: Tensor, scale: Tensor, *, q: Any, **static: Any) -> Outputs:
    f = backends.operators(lane.backend).decode
    return {"values": f(operand, scale, q, static["kind"], static["width"], static["dtype"])}


def _pack_operand(lane: Lane, operand: Tensor, *, q: Any) -> Outputs:
    return {"packed": backends.operators(lane.backend).pack_operand(operand, q)}


def _compress(lane: Lane, operand: Tensor) -> Outputs:
    values, metadata = backends.operators(lane.backend).compress(operand)
    return {"values": values, "metadata": metadata}


def _accumulate(lane: Lane, a: Tensor, b: Tensor) -> Outputs:
    return {"accumulators": backends.operators(lane.backend).accumulate(a, b)}


def _product(lane: Lane, *tensors: Tensor, stage: str = "product", **static: Any) -> Outputs:
    # a, b, their scales and sums, and a bias or none.
    bias = tensors[6] if len(tensors) > 6 else None
    y = getattr(backends.operators(lane.backend), stage)(
        *tensors[:6], bias, static["grids"], static["kinds"], static["width"], static["dtype"]
    )
    return {"y": y}


def _added_product(lane: Lane, residual: Tensor, *tensors: Tensor, **static: Any) -> Outputs:
    # As for `_product`, behind what is added to it.
    bias = tensors[6] if len(tensors) > 6 else None
    h = backends.operators(lane.backend).product(
        *tensors[:6], bias, static["grids"], static["kinds"], static["width"], static["dtype"],
        residual,
    )  # fmt: skip
    return {"h": h}


def _rotated_product(
    lane: Lane, cos: Tensor, sin: Tensor, *tensors: Tensor, turned: int, **static: Any
) -> Outputs:
    # As for `_product`, behind the angles by which its first columns are turned.
    bias = tensors[6] if len(tensors) > 6 else None
    h = backends.operators(lane.backend).rotated_product(
        *tensors[:6], bias, static["grids"], static["kinds"], static["width"], static["dtype"],
        cos, sin, turned,
    )  # fmt: skip
    return {"h": h}


def _sparse_product(lane: Lane, a: Tensor, *tensors: Tensor, **static: Any) -> Outputs:
    # As for `_product`, but for b: its values and metadata.
    bias = tensors[6] if len(tensors) > 6 else None
    y = backends.operators(lane.backend).sparse_product(
        a, *tensors[:6], bias, static["grids"], static["kinds"], static["width"], static["dtype"]
    )
    return {"y": y}


def _linear(
    lane: Lane,
    x: Tensor,
    w: Tensor,
    grad: Tensor,
    *bias: Tensor,
    recipe: Any,
    path: str = "values",
    parts: tuple[int, ...] = (),
) -> Outputs:
    """Forward and backward of the layer, and the operands that it multiplied.

    path: see `quest.paths`. For "integers" the operands are given as such, too. parts: the rows of
    w of each of several layers on one input, where it is not one layer; outputs as of that one.
    """
    if lane.backend == "dispatch":
        return _linear_module(lane, x, w, grad, bias, recipe, path, parts)
    # The same composition, out of the lane's operators.
    f = backends.operators(lane.backend)
    hats: list[Tensor] = []
    masks: list[Tensor | None] = []
    for t, q in ((x, recipe.activation), (w, recipe.weight)):
        order = q.transform.order(t.shape[-1])
        if q.grid is None:
            hats.append(f.hadamard(t, order, False))
            masks.append(None)
        else:
            values, mask = f.fake_quantize(t, q)
            hats.append(values)
            masks.append(mask)
    y = torch.nn.functional.linear(hats[0], hats[1], *bias)
    rotated = (grad @ hats[1], grad.t() @ hats[0])
    order = recipe.weight.transform.order(x.shape[-1])
    dx, dw = (
        f.hadamard(r, order, True) if m is None else f.masked_transpose(r, m, order)
        for r, m in zip(rotated, masks, strict=True)
    )
    out = {"y": y, "dx": dx, "dw": dw, "x_hat": hats[0], "w_hat": hats[1]}
    return out | ({"db": grad.sum(0)} if bias else {})


def _linear_module(
    lane: Lane,
    x: Tensor,
    w: Tensor,
    grad: Tensor,
    bias: tuple[Tensor, ...],
    recipe: Any,
    path: str,
    parts: tuple[int, ...],
) -> Outputs:
    from quest import operands, paths

    layers = _layers(w, bias, recipe, parts)
    x = x.detach().requires_grad_()
    with paths.only(path):
        y = _outputs(x, layers)
    torch.autograd.backward(y, grad)
    made: Outputs = {}
    if path == "integers":
        # By other kernels: nothing is kept.
        with torch.no_grad(), paths.only(path):
            made["inferred"] = _outputs(x.detach(), layers)
    # The rows of each layer by themselves: where a near tie goes may depend on where they lie.
    rows = [layer.weight for layer in layers]
    with torch.no_grad():
        if path == "integers":
            f, pair = backends.operators(lane.backend), (recipe.activation, recipe.weight)
            kinds = operands.kinds(*pair) or ()
            hats: tuple[Tensor, ...] = ()
            for name, t, q, kind in zip("ab", ((x,), rows), pair, kinds, strict=True):
                operand, scale = _encoded(f, t, q, kind)
                hats += (f.decode(operand, scale, q, kind, x.shape[-1], grad.dtype),)
                made |= {name: operand, f"{name}_scale": scale}
        else:
            hats = recipe.activation(x), torch.cat([recipe.weight(r) for r in rows])
    dx, dws = x.grad, [layer.weight.grad for layer in layers]
    if dx is None or any(dw is None for dw in dws):
        raise GuardError(f"{lane} linear: a gradient is missing")
    dw = torch.cat([dw for dw in dws if dw is not None])
    made |= {"y": y, "dx": dx, "dw": dw, "x_hat": hats[0], "w_hat": hats[1]}
    dbs = [layer.bias.grad for layer in layers if layer.bias is not None]
    if bias:
        made["db"] = torch.cat([db for db in dbs if db is not None])
    return made


def _encoded(f: Any, tensors: Sequence[Tensor], q: Any, kind: str) -> tuple[Tensor, Tensor]:
    """Operand and scale of each of these, below each other."""
    made = [f.encode(t, q, kind) for t in tensors]
    return torch.cat([m[0] for m in made]), torch.cat([m[1] for m in made])


def _layers(
    w: Tensor, bias: tuple[Tensor, ...], recipe: Any, parts: tuple[int, ...]
) -> list[Linear]:
    """One layer with this weight and bias; with `parts`, one for each so many of their rows."""
    from quest.linear import Linear

    sizes = list(parts or (w.shape[0],))
    made = []
    for i, rows in enumerate(torch.split(w.detach(), sizes)):
        layer = Linear(
            w.shape[1], len(rows), bool(bias), recipe=recipe, device=w.device, dtype=w.dtype
        )
        layer.weight = torch.nn.Parameter(rows)
        if bias:
            layer.bias = torch.nn.Parameter(torch.split(bias[0].detach(), sizes)[i])
        made.append(layer)
    return made


def _outputs(x: Tensor, layers: list[Linear]) -> Tensor:
    """What one layer returns, or what several do together, side by side."""
    from quest.joint import together

    return layers[0](x) if len(layers) == 1 else torch.cat(together(x, layers), -1)


def _frozen(
    lane: Lane, x: Tensor, w: Tensor, *bias: Tensor, recipe: Any, parts: tuple[int, ...] = ()
) -> Outputs:
    """The forward of a layer with a frozen weight, and the operands that it multiplied.

    parts: as in `_linear`. a_sums: only of uniform grids.
    """
    from quest import lowbit, operands
    from quest.joint import stack

    layers = [layer.freeze() for layer in _layers(w, bias, recipe, parts)]
    if parts and not stack(layers):
        raise GuardError(f"{lane} frozen: the weights of layers alike can't be stacked")
    held = layers[0]._frozen
    if held is None:
        raise GuardError(f"{lane} frozen: there is nothing frozen")
    with torch.no_grad():
        made: Outputs = {"y": _outputs(x, layers)}
        if held.values is not None:
            # Not what was frozen: that is under judgement.
            weights = torch.cat([recipe.weight(layer.weight) for layer in layers])
            return made | {"x_hat": recipe.activation(x), "w_hat": weights}
        kinds = operands.kinds(recipe.activation, recipe.weight) or ("", "")
        own = [layer.weight for layer in layers]
        b, b_scale = _encoded(backends.operators(lane.backend), own, recipe.weight, kinds[1])
        a, a_scale, a_sums = lowbit.operand(x, held.spec, kinds[0])
        made |= {"a": a, "a_scale": a_scale, "b": b, "b_scale": b_scale}
        if recipe.activation.require_grid().step is not None:
            made["a_sums"] = a_sums
    return made


STAGES: dict[str, Callable[..., Outputs]] = {
    "hadamard": _hadamard,
    "quantize": _quantize,
    "pack": functools.partial(_quantize, packed=True),
    "fake_quantize": _fake_quantize,
    "masked_transpose": _masked_transpose,
    "linear": _linear,
    "frozen": _frozen,
    "encode": _encode,
    "operand": _operand,
    "gated": _gated,
    "normed": _normed,
    "decode": _decode,
    "pack_operand": _pack_operand,
    "compress": _compress,
    "accumulate": _accumulate,
    "product": _product,
    "gated_product": functools.partial(_product, stage="gated_product"),
    "added_product": _added_product,
    "rotated_product": _rotated_product,
    "sparse_product": _sparse_product,
}
