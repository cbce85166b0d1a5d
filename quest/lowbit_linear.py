"""The differentiable layer on the integer path, for one weight or several that share an input.

quest::low_bit_linear(x, weights, biases, ...) -> [y of each weight, ..., what the backward reads]
quest::low_bit_linear_backward(...) -> [dx, dw of each weight, ...]

The input, or with a gate silu(gate) * x, is quantized once; on CUDA the quantizer's kernel makes
that product. Operands and mask bits are saved, not values; operands of 2 to 4 bits are packed for
that time (`operands.saved`), on CUDA by the quantizer itself. Inside, the parts are called as
functions: an operator of their own each costs the host more than most take on a GPU.
Source: method, section 5; QuEST (arXiv 2502.05003), Algorithm 1; SwiGLU, arXiv 2002.05202.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import eager, flops, lowbit, operands, ops, packed, paths

if TYPE_CHECKING:
    from .quantizer import Quantizer

_Made = tuple[Tensor, Tensor, Tensor]  # operand, or packed codes; scale; sums


class Parts(NamedTuple):
    """Functions of one kind of device.

    operand, gated_operand, codes: for inference; encode_saved, encode_gated: for a backward.
    packed: the product of what is left as codes.
    """

    operand: Callable[..., tuple[Tensor, ...]]
    gated_operand: Callable[..., tuple[Tensor, ...]]
    codes: Callable[..., tuple[Tensor, ...]]
    encode_saved: Callable[..., tuple[Tensor, ...]]
    encode_gated: Callable[..., tuple[Tensor, ...]]
    decode: Callable[..., Tensor]
    product: Callable[..., Tensor]
    packed: Callable[..., Tensor]
    masked_transpose: Callable[..., Tensor]


def _eager_gated_operand(gate: Tensor, value: Tensor, q: Quantizer, kind: str) -> _Made:
    return lowbit.eager_operand(eager.gated(gate, value), q, kind)


def _launch_gated_operand(gate: Tensor, value: Tensor, q: Quantizer, kind: str) -> _Made:
    from . import prologue  # which is made of layers

    return prologue.launch_gated_encode(gate, value, q.spec, kind)[:3]


def _launch_encode_gated(*arguments: Any) -> tuple[Tensor, ...]:
    from . import prologue

    return prologue.launch_encode_gated(*arguments)


_CPU = Parts(
    lowbit.eager_operand, _eager_gated_operand, packed.eager_codes, eager.encode_saved,
    eager.encode_gated, eager.decode, lowbit.eager_product, packed.eager_packed,
    eager.masked_transpose,
)  # fmt: skip
_CUDA = Parts(
    lowbit.launch_operand, _launch_gated_operand, packed.launch_codes, lowbit.launch_encode_saved,
    _launch_encode_gated, lowbit.launch_decode, lowbit.launch_product, packed.launch_packed,
    ops.launch_masked_transpose,
)  # fmt: skip


def parts(x: Tensor) -> Parts:
    """The functions for where x lies."""
    return _CUDA if x.is_cuda else _CPU


class Pair(NamedTuple):
    """What two specs say: quantizers and kinds of activation and weight; names for a product.

    saved: the kinds in which the operands are kept for the backward. packed: bits of the weight's
    codes, where few rows are multiplied with these and not with its operand; or 0. (Of single bits
    both are the same bytes.)
    """

    activation: Quantizer
    weight: Quantizer
    kinds: tuple[str, str]
    saved: tuple[str, str]
    names: str
    packed: int


@functools.cache
def pair(activation: str, weight: str) -> Pair:
    """What two specs say. Raises ValueError where there is no product of these."""
    q = ops.quantizer(activation), ops.quantizer(weight)
    kinds = operands.kinds(*q)
    if kinds is None:
        raise ValueError(f"there is no integer product for {activation} x {weight}")
    if q[0].transform != q[1].transform:
        raise ValueError(
            f"activation and weight must use the same transform, got {activation} and {weight}"
        )
    saved = operands.saved(q[0], kinds[0]).kind, operands.saved(q[1], kinds[1]).kind
    names = ",".join(t.require_grid().name for t in q)
    bits = packed.bits_of(names, ",".join(kinds)) if q[1].sparsity is None else 0
    return Pair(*q, kinds, saved, names, bits if bits > 1 else 0)


def check(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], made: Pair,
    gate: Tensor | None,
) -> None:  # fmt: skip
    """TypeError or ValueError unless these are what `low_bit_linear` takes."""
    if not weights:
        raise ValueError("weights must hold at least one weight, got none")
    made.activation.check(x)
    if gate is not None:
        lowbit.check_vector("gate", gate, x.dtype, tuple(x.shape), x)
    for w in weights:
        ops.check_input(w, "a weight")
        if w.ndim != 2 or w.shape[1] != x.shape[-1] or w.device != x.device:
            raise ValueError(
                f"a weight must be (out, {x.shape[-1]}) on {x.device}, got shape {tuple(w.shape)} "
                f"on {w.device}"
            )
        if w.dtype != weights[0].dtype:
            raise TypeError(f"weights must have one dtype, got {weights[0].dtype} and {w.dtype}")
    made.weight.check(weights[0])
    if biases and len(biases) != len(weights):
        raise ValueError(
            f"biases must be none or one for each of {len(weights)} weights, got {len(biases)}"
        )


def saves(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> bool:
    """Whether a gradient will be asked of `low_bit_linear` for any of these."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights, *biases))


class Operand(NamedTuple):
    """What is kept of quantized rows for the backward, in the form in which it waits."""

    stored: Tensor
    scale: Tensor
    mask: Tensor
    sums: Tensor


def products(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], made: Pair,
    dtype: torch.dtype, saves: bool, gate: Tensor | None = None,
) -> tuple[list[Tensor], list[Operand]]:  # fmt: skip
    """y of each weight; and, if it `saves`, of x, or of silu(gate) * x, and of each weight what
    the backward reads.

    Else no mask is made where a kernel can do without, and few rows are multiplied with codes of 2
    or 4 bits that stay packed.
    """
    f, d, kinds = parts(x), x.shape[-1], ",".join(made.kinds)
    rows, read = lowbit.as_rows(x), []

    def keep(encoded: tuple[Tensor, ...]) -> _Made:
        operand, scale, mask, sums, stored = encoded
        read.append(Operand(stored, scale, mask, sums))
        return operand, scale, sums

    one = (rows, made.activation, made.kinds[0])
    if gate is None:
        a = keep(f.encode_saved(*one)) if saves else f.operand(*one)
    else:
        both = (lowbit.as_rows(gate), *one)
        a = keep(f.encode_gated(*both)) if saves else f.gated_operand(*both)
    stays = not saves and paths.reads_packed(len(rows), made.packed, d)
    product, ys = f.packed if stays else f.product, []
    for i, w in enumerate(weights):
        if stays:
            b = f.codes(w, made.weight, made.packed)
        else:
            other = (w, made.weight, made.kinds[1])
            b = keep(f.encode_saved(*other)) if saves else f.operand(*other)
        scales, sums, bias = (a[1], b[1]), (a[2], b[2]), biases[i] if biases else None
        y = product(a[0], b[0], *scales, *sums, bias, made.names, kinds, d, dtype)
        # No view for autograd, which would let nobody write to what comes out in place.
        ys.append(torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], w.shape[0]]))
    return ys, read


@torch.library.custom_op("quest::low_bit_linear", mutates_args=())
def low_bit_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    weight: str,
    dtype: torch.dtype,
    saves: bool,
    gate: Tensor | None = None,
) -> list[Tensor]:
    """y = Q(x H) Q(w H)^T + b (..., out) of `dtype` for each weight, by products of integers.

    x (..., in), quantized once; weights (out, in) each, of one dtype; biases: none at all, or one
    (out,) for each weight; activation, weight: specs of quantizers that `operands.kinds` can pair.
    gate: like x; then x stands for silu(gate) * x, computed in float32 and rounded once to their
    dtype, which the backward does not keep. Gradients of both are rounded once each.
    After the y's come what the backward reads, if it `saves` that: operand, in the kind of
    `operands.saved`, scale and packed mask of x, as rows, and of each weight.
    """
    made = pair(activation, weight)
    check(x, weights, biases, made, gate)
    ys, operands_ = products(x, weights, biases, made, dtype, saves, gate)
    return ys + [t for operand in operands_ for t in operand[:3]] if saves else ys


@low_bit_linear.register_fake
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    weight: str,
    dtype: torch.dtype,
    saves: bool,
    gate: Tensor | None = None,
) -> list[Tensor]:
    made = pair(activation, weight)
    check(x, weights, biases, made, gate)
    ys = [x.new_empty((*x.shape[:-1], w.shape[0]), dtype=dtype) for w in weights]
    if not saves:
        return ys
    read = read_like(lowbit.as_rows(x), made.kinds[0], made.saved[0])
    for w in weights:
        read += read_like(w, made.kinds[1], made.saved[1])
    return ys + read


def read_like(x: Tensor, kind: str, saved: str) -> list[Tensor]:
    """What the backward reads of rows (n, d), by shape and dtype alone."""
    operand, scale, mask, _ = eager.encoded_like(x, kind)
    if saved in operands.PACKED:
        operand = eager.packed_like(operand, operands.PACKED[saved])
    return [operand, scale, mask]


@torch.library.custom_op("quest::low_bit_linear_backward", mutates_args=())
def low_bit_linear_backward(
    grads: Sequence[Tensor],
    read: Sequence[Tensor],
    activation: str,
    weight: str,
    width: int,
    x_dtype: torch.dtype,
    w_dtype: torch.dtype,
    needs_x: bool,
    needs_w: Sequence[bool],
) -> list[Tensor]:
    """dx (n, in) of x_dtype, and dw (out, in) of w_dtype of each weight, of those that are needed.

    grads: (n, out) of each weight. read: what `low_bit_linear` returned for these weights.
    The gradients of y = x_hat w_hat^T, then the mask and H^T of each operand. Those that reach
    x_hat are summed first, and turned back once.
    """
    with torch.autocast(grads[0].device.type, enabled=False):
        return _gradients(
            grads, read, pair(activation, weight), width, x_dtype, w_dtype, needs_x, needs_w
        )


def _gradients(
    grads: Sequence[Tensor],
    read: Sequence[Tensor],
    made: Pair,
    width: int,
    x_dtype: torch.dtype,
    w_dtype: torch.dtype,
    needs_x: bool,
    needs_w: Sequence[bool],
) -> list[Tensor]:
    f = parts(grads[0])
    order = made.activation.transform.order(width)
    (a, a_scale, a_mask), rest = read[:3], read[3:]
    out: list[Tensor] = []
    if needs_x:
        total: Tensor | None = None
        for i, g in enumerate(grads):
            w_hat = f.decode(*rest[3 * i : 3 * i + 2], made.weight, made.saved[1], width, g.dtype)
            total = g @ w_hat if total is None else total.addmm_(g, w_hat)
        assert total is not None
        out.append(f.masked_transpose(total, a_mask, order, x_dtype))
    if any(needs_w):
        x_hat = f.decode(a, a_scale, made.activation, made.saved[0], width, grads[0].dtype)
        for i, g in enumerate(grads):
            if needs_w[i]:
                out.append(f.masked_transpose(g.t() @ x_hat, rest[3 * i + 2], order, w_dtype))
    return out


@low_bit_linear_backward.register_fake
def _(
    grads: Sequence[Tensor],
    read: Sequence[Tensor],
    activation: str,
    weight: str,
    width: int,
    x_dtype: torch.dtype,
    w_dtype: torch.dtype,
    needs_x: bool,
    needs_w: Sequence[bool],
) -> list[Tensor]:
    out = [grads[0].new_empty((grads[0].shape[0], width), dtype=x_dtype)] if needs_x else []
    for g, needed in zip(grads, needs_w, strict=True):
        if needed:
            out.append(g.new_empty((g.shape[1], width), dtype=w_dtype))
    return out


def _context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases, ctx.activation, ctx.weight, _, saves, gate = inputs
    if not saves:
        raise RuntimeError("low_bit_linear was told to save nothing, and a gradient is asked for")
    read = output[len(weights) :]
    ctx.save_for_backward(*read, *(() if gate is None else (gate, x)))
    ctx.mark_non_differentiable(*read)
    ctx.set_materialize_grads(False)
    ctx.shape, ctx.dtype, ctx.count, ctx.gated = x.shape, x.dtype, len(weights), gate is not None
    ctx.w_dtype = weights[0].dtype
    ctx.biases = [b.dtype for b in biases]


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    ops.check_single(grads)
    n, d = ctx.count, ctx.shape[-1]
    dws: list[Tensor | None] = [None] * n
    dbs: list[Tensor | None] = [None] * len(ctx.biases)
    # Outputs that nobody used have no gradient, and their weights nothing to do with x's.
    used = [i for i in range(n) if grads[i] is not None]
    rows = [lowbit.as_rows(g) for g in grads[:n] if g is not None]
    # The dispatcher passes no gate where it is None, which is its default.
    needs_x = any(ctx.needs_input_grad[i] for i in (0, 7)[: 1 + ctx.gated])
    needs_w = [bool(ctx.needs_input_grad[1][i]) for i in used]
    dx = dgate = None
    if used and (needs_x or any(needs_w)):
        saved = ctx.saved_tensors  # once: every look unpacks all, which a checkpoint allows once
        read = list(saved[:3])
        for i in used:
            read += saved[3 + 3 * i : 6 + 3 * i]
        made = low_bit_linear_backward(
            rows, read, ctx.activation, ctx.weight, d, ctx.dtype, ctx.w_dtype, needs_x, needs_w
        )
        left = iter(made)
        dx = next(left).view(ctx.shape) if needs_x else None
        if ctx.gated and dx is not None:
            dgate, dx = eager.gated_backward(dx, *saved[-2:])
        for i, needed in zip(used, needs_w, strict=True):
            dws[i] = next(left) if needed else None
    for i, g in zip(used, rows, strict=True):
        if dbs and ctx.needs_input_grad[2][i]:
            dbs[i] = g.sum(0).to(ctx.biases[i])
    made_of = (dx, dws, dbs, None, None, None, None, dgate)
    return made_of[: len(ctx.needs_input_grad)]


low_bit_linear.register_autograd(_backward, setup_context=_context)
flops.counted(torch.ops.quest.low_bit_linear, flops.linear)
flops.counted(torch.ops.quest.low_bit_linear_backward, flops.linear_backward)
low_bit_linear_backward.register_autograd(ops.refuse_second)
ops.each_apart(low_bit_linear, saves=6)
ops.each_apart(low_bit_linear_backward)
