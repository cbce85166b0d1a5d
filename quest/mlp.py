"""A SwiGLU, down(silu(gate(x)) * up(x)), and one whose backward computes gate and up again.

quest::low_bit_swiglu(x, weights, biases, ...) -> [y, what the backward reads]
quest::low_bit_again(after, read, biases, ...) -> [gate(x), up(x)]

Trained as `quest.together` and `quest.gated`, such a layer keeps its two wide activations for the
backward, 4 bytes for each entry of the hidden width. They are products of operands that are kept
anyway, 1 to 8 bits an entry, so that two products of integers give them back, bit for bit: a
checkpoint (Chen et al., arXiv 1604.06174) without the quantizer and without the input in 16 bits.
Source: SwiGLU, arXiv 2002.05202; QuEST (arXiv 2502.05003), Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import eager, flops, lowbit, operands, ops, paths
from .joint import alike, biases_of, projected
from .linear import Linear
from .lowbit_linear import (
    Operand,
    Pair,
    check,
    low_bit_linear_backward,
    pair,
    parts,
    products,
    read_like,
    saves,
)
from .prologue import behind_norm, check_layer, gated, has_kernel
from .quantizer import Quantizer
from .residual import added

# Of x, gate and up with their sums, which the products need again.
_FIRST = 3 * len(Operand._fields)


@torch.library.custom_op("quest::low_bit_swiglu", mutates_args=())
def low_bit_swiglu(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    down: Tensor,
    bias: Tensor | None,
    activation: str,
    weight: str,
    last_activation: str,
    last_weight: str,
    saves: bool,
) -> list[Tensor]:
    """y (..., out) of x's dtype: `low_bit_linear` of gate and up, and of down on them.

    x (..., in); weights: gate and up, (hidden, in) each; biases: none at all, or (hidden,) of each;
    down (out, hidden); bias (out,). activation, weight: specs of the quantizers of x and of gate
    and up; last_activation, last_weight: of the rows silu(gate) * up and of down.
    After y comes what the backward reads, if it `saves` that: operand, scale, packed mask and sums
    of x, gate and up, and operand, scale and mask of the rows and of down.
    """
    specs = activation, weight, last_activation, last_weight
    first, second = _pairs(x, weights, biases, *specs)
    (gate, up), outer = products(x, weights, biases, first, x.dtype, saves)
    last = [] if bias is None else [bias]
    check(up, [down], last, second, gate)
    (y,), inner = products(up, [down], last, second, x.dtype, saves, gate)
    read = [*(t for o in outer for t in o), *(t for o in inner for t in o[:3])]
    return [y, *read] if saves else [y]


def _pairs(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *specs: str
) -> tuple[Pair, Pair]:
    """What the specs say, of gate and up, and of down; the first are checked."""
    if len(weights) != 2:
        raise ValueError(f"weights must be those of gate and up, got {len(weights)}")
    first, second = pair(*specs[:2]), pair(*specs[2:])
    check(x, weights, biases, first, None)
    return first, second


@low_bit_swiglu.register_fake
def _(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], down: Tensor,
    bias: Tensor | None, *how: Any,
) -> list[Tensor]:  # fmt: skip
    *specs, saves = how
    first, second = _pairs(x, weights, biases, *specs)
    gate, up = (x.new_empty((*x.shape[:-1], w.shape[0])) for w in weights)
    check(up, [down], [], second, gate)
    made = [x.new_empty((*x.shape[:-1], down.shape[0]))]
    for i, t in enumerate((lowbit.as_rows(x), *weights)):
        read = read_like(t, first.kinds[i > 0], first.saved[i > 0])
        made += [*read, torch.empty_like(read[1], dtype=torch.int32)]
    for i, t in enumerate((lowbit.as_rows(up), down)):
        made += read_like(t, second.kinds[i], second.saved[i])
    return made if saves else made[:1]


@torch.library.custom_op("quest::low_bit_again", mutates_args=())
def low_bit_again(
    after: Tensor,
    read: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    weight: str,
    width: int,
) -> list[Tensor]:
    """y (n, out) of `after`'s dtype for each weight, bit for bit as from `low_bit_linear`.

    read: operand, scale, mask and sums of x (n, in) and of each weight, as `low_bit_swiglu` returns
    them; biases: none or one for each weight; width: in. after: (n, ...), what must be there
    before. It is not read: it keeps torch.compile from computing these in the forward, to save
    them.
    """
    made = pair(activation, weight)
    x, *weights = (Operand(*read[i : i + 4]) for i in range(0, len(read), 4))
    f, kinds = parts(after), ",".join(made.kinds)
    a = _operand(x.stored, made.activation, made.kinds[0], made.saved[0], width)
    ys = []
    for i, w in enumerate(weights):
        b = _operand(w.stored, made.weight, made.kinds[1], made.saved[1], width)
        ys.append(f.product(
            a, b, x.scale, w.scale, x.sums, w.sums, biases[i] if biases else None, made.names,
            kinds, width, after.dtype,
        ))  # fmt: skip
    return ys


@low_bit_again.register_fake
def _(
    after: Tensor,
    read: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    weight: str,
    width: int,
) -> list[Tensor]:
    return [after.new_empty((after.shape[0], w.shape[0])) for w in read[4::4]]


def _operand(stored: Tensor, q: Quantizer, kind: str, saved: str, width: int) -> Tensor:
    """An operand as products take it, of the form in which it waits."""
    if saved == kind:
        return stored
    form = operands.readable(q, saved)
    if stored.is_cuda:
        return launch_unpack(stored, form, width)
    return eager.integers(stored, form, width).to(torch.int8)


def launch_unpack(stored: Tensor, form: operands.Form, width: int) -> Tensor:
    """The integers (n, width) int8 of packed rows, by the kernel."""
    from .kernels import decode as kernel

    with ops.device_of(stored):
        ones = torch.ones(stored.shape[0], 1, dtype=torch.float32, device=stored.device)
        return kernel.decode(
            stored, ones, width, 1.0, torch.int8, bits=form.bits, stride=form.stride, top=form.top
        )


def _context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases, down, bias, *ctx.specs, saves = inputs
    if not saves:
        raise RuntimeError("low_bit_swiglu was told to save nothing, and a gradient is asked for")
    read = output[1:]
    ctx.save_for_backward(*biases, *read)
    ctx.mark_non_differentiable(*read)
    ctx.set_materialize_grads(False)
    ctx.shape, ctx.dtype = x.shape, x.dtype
    ctx.w_dtypes, ctx.hidden = (weights[0].dtype, down.dtype), down.shape[1]
    ctx.b_dtypes = [b.dtype for b in biases], None if bias is None else bias.dtype


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    ops.check_single(grads)
    needs_x, needs_w, needs_b, needs_down, needs_bias = ctx.needs_input_grad[:5]
    first, grad = any((needs_x, *needs_w, *needs_b)), grads[0]
    dx = ddown = dbias = None
    dws: list[Tensor | None] = [None, None]
    dbs: list[Tensor | None] = [None] * len(needs_b)
    if grad is None:
        return dx, dws, dbs, ddown, dbias, None, None, None, None, None
    rows = lowbit.as_rows(grad)
    saved = ctx.saved_tensors  # once: every look unpacks all, which a checkpoint allows once
    biases, read = list(saved[: len(needs_b)]), list(saved[len(needs_b) :])
    outer, inner = read[:_FIRST], read[_FIRST:]
    activation, weight, *last = ctx.specs
    if needs_bias:
        dbias = rows.sum(0).to(ctx.b_dtypes[1])
    made = low_bit_linear_backward(
        [rows], inner, *last, ctx.hidden, ctx.dtype, ctx.w_dtypes[1], first,
        [needs_down],
    ) if first or needs_down else []  # fmt: skip
    if needs_down:
        ddown = made[-1]
    if first:
        width = ctx.shape[-1]
        both = low_bit_again(made[0], outer, biases, activation, weight, width)
        both[:] = eager.gated_backward(made[0], *both)
        made = []  # the next products need the room
        for i, needed in enumerate(needs_b):
            if needed:
                dbs[i] = both[i].sum(0).to(ctx.b_dtypes[0][i])
        if needs_x or any(needs_w):
            kept = [t for i, t in enumerate(outer) if i % 4 < 3]  # no sums
            left = iter(low_bit_linear_backward(
                both, kept, activation, weight, width, ctx.dtype, ctx.w_dtypes[0], needs_x,
                list(needs_w),
            ))  # fmt: skip
            dx = next(left).view(ctx.shape) if needs_x else None
            dws = [next(left) if needed else None for needed in needs_w]
    return dx, dws, dbs, ddown, dbias, None, None, None, None, None


low_bit_swiglu.register_autograd(_backward, setup_context=_context)
flops.counted(torch.ops.quest.low_bit_swiglu, flops.swiglu)
flops.counted(torch.ops.quest.low_bit_again, flops.again)
ops.each_apart(low_bit_swiglu, saves=9)
ops.each_apart(low_bit_again)


def swiglu(
    x: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module, *, recompute: bool = False
) -> Tensor:
    """down(silu(gate(x)) * up(x)) for x (..., in): `quest.together`, then `quest.gated`.

    Where no gradient is asked for, and gate and up are frozen `quest.Linear`s that lie stacked, one
    kernel multiplies and makes silu(gate) * up of 16 bits, computed in float32 and rounded once, as
    `quest.gated` does (`gated_product`); but not of few rows, whose weights are read packed, nor
    with 2:4 sparse weights. `down` then quantizes rows as it does by itself.
    recompute: the backward computes gate(x) and up(x) again, and between the two nothing as wide is
    kept: less memory in a model of several such layers, for two products more. Of `quest.Linear`s
    that multiply integers it takes the operands that are kept in any case, and their numbers are
    the same, bit for bit; a bias that is changed in place before the backward is an error. Other
    layers are called once more, by `torch.utils.checkpoint`: weights, `quest.paths.only` and all
    else that they read must then be as they were, or the gradients are wrong, and `torch.func` does
    not take it. Raises what those two raise.
    """
    if not (recompute and torch.is_grad_enabled()):
        return _composed(x, gate, up, down)
    live = _live(x, gate, up, down)
    if live is not None:
        return live

    # What it raises is raised behind the checkpoint: one that an error leaves goes on, in PyTorch
    # 2.11, to take whatever other layers save.
    raised: list[Exception] = []
    again = False

    def call(*given: Any) -> Tensor:
        try:
            return _composed(*given)
        except Exception as error:
            if again:
                raise
            raised.append(error)
            return x

    y: Tensor = checkpoint(call, x, gate, up, down, use_reentrant=False)
    again = True
    if raised:
        raise raised.pop()  # no part of `call` then: the error holds all that was computed
    return y


def _composed(x: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
    return _down(projected(x, (gate, up), True), down)


def _down(made: tuple[Tensor, ...], down: nn.Module, residual: Tensor | None = None) -> Tensor:
    """The last layer, of gate and up or of what was made of both; added to a residual."""
    if len(made) > 1:
        y = gated(made[0], made[1], down)
        return y if residual is None else residual + y
    if residual is not None:
        return added(made[0], down, residual)
    check_layer(down)
    last: Tensor = down(made[0])
    return last


def normed_swiglu(
    x: Tensor, norm: nn.Module, gate: nn.Module, up: nn.Module, down: nn.Module,
    residual: Tensor | None = None, *, add: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(h, `swiglu(norm(h), gate, up, down)`), for h = residual + x, or h = x without a residual.

    The norm and both layers behind it as in `quest.normed`, the rest as in `swiglu` without
    `recompute`. add: h + that in its place; behind one kernel for gate and up as `quest.added`
    makes it. Raises what those three raise.
    """
    h, made = behind_norm(x, norm, (gate, up), residual, True)
    return h, _down(made, down, h if add else None)


def _live(x: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module) -> Tensor | None:
    """`swiglu` in one operator; None where `together` and `gated` would not multiply integers."""
    plain, last = alike((gate, up)), alike((down,))
    if plain is None or last is None or plain[0].weight.shape != plain[1].weight.shape:
        return None
    for layer in plain:
        layer.check(x)
    x = Linear.cast(x)
    recipe, (one,) = plain[0].recipe, last
    # Like what comes out of them, without its memory.
    rows = x.new_empty(1).expand(*x.shape[:-1], len(plain[0].weight))
    one.check(rows)
    integers = paths.choose(x, recipe) == paths.choose(rows, one.recipe) == "integers"
    inner = one.recipe.activation.spec
    if not (integers and has_kernel(inner, rows)):
        return None
    weights, biases = [layer.weight for layer in plain], biases_of(plain)
    bias = [] if one.bias is None else [one.bias]
    specs = recipe.activation.spec, recipe.weight.spec, inner, one.recipe.weight.spec
    asked = saves(x, [*weights, one.weight], [*biases, *bias])
    y: Tensor = low_bit_swiglu(x, weights, biases, one.weight, one.bias, *specs, asked)[0]
    return y
