"""The operators, through torch.library: the device of the tensor chooses the implementation.

quest::hadamard(x, order, transpose) -> y            differentiable
quest::fake_quantize(x, spec) -> (values, mask)      differentiable; mask packed, one bit an element
quest::quantize(x, spec, packed) -> (codes, scale, mask, keep)
quest::masked_transpose(grad, mask, order) -> dx     the backward of fake_quantize

CPU: plain PyTorch (`eager`). CUDA: the kernels. `spec` is `Quantizer.spec`. Every operator checks
its input before anything runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from . import eager, packing, transforms
from .estimators import STE
from .sparsity import Pairwise

if TYPE_CHECKING:
    from .quantizer import Quantizer

OWN = Tensor, torch.nn.Parameter  # torch's own classes of tensors
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_ENTRIES = 2**30  # of a row: kernels count its entries, and a tile beyond them, in 32 bits


def check_input(x: Tensor, name: str = "x") -> None:
    """Raise TypeError or ValueError unless x, so named, is (..., d) of one of `DTYPES`.

    d is at most MOST_ENTRIES.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")
    if x.ndim == 0:
        raise ValueError(f"{name} must have at least one axis, got a scalar")
    if x.shape[-1] > MOST_ENTRIES:
        raise ValueError(f"{name} must have rows of at most 2^30 entries, got {x.shape[-1]}")


def check_tangents(*tensors: Tensor) -> None:
    """Raise NotImplementedError where forward mode or torch.func asks for a derivative by these.

    torch's custom operators pass no tangent on, and a derivative of 0 would be taken for the truth;
    nor has what `register_autograd` makes a rule for torch.func.
    """
    # Outside of these, and in what a compiler traces, nothing else is asked.
    if torch.compiler.is_compiling():
        return
    unpack: Any = forward_ad.unpack_dual
    if forward_ad._current_level >= 0 and any(unpack(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "quest has no forward-mode derivatives (torch.func.jvp, jacfwd): use the backward"
        )
    if torch._C._functorch.peek_interpreter_stack() is None or not torch.is_grad_enabled():
        return
    if any(map(_transformed, tensors)):
        raise NotImplementedError(
            "quest has no derivatives by torch.func (grad, vjp, jacrev): use the backward"
        )


def _transformed(t: Tensor) -> bool:
    """Whether a transform of torch.func asks for a derivative by t, at any of its levels."""
    functorch: Any = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        if t.requires_grad:  # as none of vmap's does
            return True
        t = functorch.get_unwrapped(t)
    return False


def _check_order(x: Tensor, order: int, mask: Tensor | None = None) -> None:
    # Operators are reachable without the classes in front of them.
    check_input(x)
    d = x.shape[-1]
    transforms.split(order)
    if d % order:
        raise ValueError(f"width {d} is not divisible by the Hadamard order {order}")
    if mask is not None and (
        mask.dtype != torch.uint8 or mask.shape != (*x.shape[:-1], -(-d // 8))
    ):
        raise ValueError(
            f"mask must be uint8 of shape {(*x.shape[:-1], -(-d // 8))}, got {mask.dtype} of "
            f"shape {tuple(mask.shape)}"
        )
    if mask is not None and mask.device != x.device:
        raise ValueError(f"mask must lie where its input lies, {x.device}; got {mask.device}")


def quantizer(spec: str) -> Quantizer:
    from .quantizer import parse

    return parse(spec)


@torch.library.custom_op("quest::hadamard", mutates_args=(), device_types="cpu")
def hadamard(x: Tensor, order: int, transpose: bool) -> Tensor:
    """x H (or x H^T) blockwise along the last axis; x (..., d), d divisible by order."""
    _check_order(x, order)
    return eager.hadamard(x, order, transpose)


@torch.library.custom_op("quest::masked_transpose", mutates_args=(), device_types="cpu")
def masked_transpose(grad: Tensor, mask: Tensor, order: int) -> Tensor:
    """(grad * mask) H^T; grad (..., d), mask (..., ceil(d/8)) uint8."""
    _check_order(grad, order, mask)
    return eager.masked_transpose(grad, mask, order)


@torch.library.custom_op("quest::fake_quantize", mutates_args=(), device_types="cpu")
def fake_quantize(x: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    """(values of x's shape and dtype, mask (..., ceil(d/8)) uint8)."""
    q = quantizer(spec)
    q.check(x)
    values, _, _, mask, _ = eager.quantize(x, q, values=True, codes=False, packed=True)
    return values, mask


@torch.library.custom_op("quest::quantize", mutates_args=(), device_types="cpu")
def quantize(x: Tensor, spec: str, packed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, scale, mask, keep); keep has shape (0,) without sparsity."""
    q = quantizer(spec)
    q.check(x)
    return eager.quantize(x, q, values=False, codes=True, packed=packed)[1:]


def program(q: Quantizer, x: Tensor) -> Any:
    from .kernels import quantize as kernel

    grid, order = q.require_grid(), q.transform.order(x.shape[-1])
    points, midpoints = (None, None) if grid.step is not None else eager.table(grid, x.device)
    inside, pruned, edge = q.thresholds()
    estimator = kernel.EDGE if edge else kernel.DISTANCE
    if isinstance(q.estimator, STE):
        estimator = kernel.STE
    s = q.sparsity
    return kernel.Program(
        order=order,
        base=transforms.base(transforms.split(order)[0], x.device),
        levels=grid.levels,
        step=1.0 if grid.step is None else grid.step,
        points=points,
        midpoints=midpoints,
        zero_code=grid.zero_code,
        offset=grid.offset,
        bits=grid.storage_bits,
        estimator=estimator,
        threshold=inside,
        pruned_threshold=pruned,
        group=None if s is None else (s.n, s.m, isinstance(s, Pairwise)),
    )


_HERE: AbstractContextManager[None] = nullcontext()


def device_of(t: Tensor) -> AbstractContextManager[None]:
    """Make t's device the current one, which is where kernels launch; nothing for the CPU."""
    if not t.is_cuda or t.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(t.device.index)


def direct(x: Tensor) -> bool:
    """Whether a kernel may be launched on x without the dispatcher, which costs the host more.

    Nothing watches calls of operators: no compiler, no trace, no transform of torch.func, no
    forward-mode derivative, no tensor subclass, no dispatch mode.
    """
    return (
        type(x) in OWN
        and x.is_cuda
        and forward_ad._current_level < 0
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def launch_hadamard(x: Tensor, order: int, transpose: bool) -> Tensor:
    """`hadamard` by the kernel, on CUDA or in Triton's interpreter."""
    from .kernels import hadamard as kernel

    _check_order(x, order)
    base = transforms.base(transforms.split(order)[0], x.device)
    with device_of(x):
        return kernel.hadamard(x, order, base, transpose)


def launch_masked_transpose(
    grad: Tensor, mask: Tensor, order: int, dtype: torch.dtype | None = None
) -> Tensor:
    """`eager.masked_transpose` by the kernels."""
    from .kernels import hadamard as kernel
    from .kernels import masked

    _check_order(grad, order, mask)
    if masked.supports(grad, order, dtype):
        with device_of(grad):
            return masked.transpose(grad, mask, dtype)
    base = transforms.base(transforms.split(order)[0], grad.device)
    with device_of(grad):
        return kernel.hadamard(grad, order, base, transpose=True, mask=mask, dtype=dtype)


def launch_quantize(
    x: Tensor, q: Quantizer, *, values: bool, codes: bool, packed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`eager.quantize` by the kernels; sparsity groups that they lack run in plain PyTorch."""
    from .kernels import blocks
    from .kernels import quantize as kernel

    q.check(x)
    made = program(q, x)
    if blocks.supports(made, x) and values != codes:
        return _quantize_blocks(x, made, codes=codes, packed=packed)
    if not kernel.supports(made):
        return eager.quantize(x, q, values=values, codes=codes, packed=packed)
    with device_of(x):
        return kernel.quantize(x, made, values=values, codes=codes, packed=packed)


def _quantize_blocks(
    x: Tensor, made: Any, *, codes: bool, packed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`launch_quantize` for what `quest.kernels.blocks` supports."""
    from .kernels import blocks, forms

    form, bits = forms.VALUES, 0
    if codes:
        form, bits = (forms.PACKED, made.bits) if packed else (forms.CODES, 0)
    with device_of(x):
        out, scale, mask, none, _ = blocks.quantize(x, made, form=form, bits=bits)
    # One element a flag is for the eye: nothing that has to be fast asks for it.
    flags = mask if packed else packing.unpack(mask, 1, x.shape[-1]).bool()
    keep = none.new_empty((0,), dtype=flags.dtype)
    if codes:
        return x.new_empty((0,)), out, scale, flags, keep
    return out, out.new_empty((0,), dtype=torch.int8), scale, flags, keep


hadamard.register_kernel("cuda")(launch_hadamard)


@masked_transpose.register_kernel("cuda")
def _(grad: Tensor, mask: Tensor, order: int) -> Tensor:
    return launch_masked_transpose(grad, mask, order)


@fake_quantize.register_kernel("cuda")
def _(x: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    values, _, _, mask, _ = launch_quantize(
        x, quantizer(spec), values=True, codes=False, packed=True
    )
    return values, mask


@quantize.register_kernel("cuda")
def _(x: Tensor, spec: str, packed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch_quantize(x, quantizer(spec), values=False, codes=True, packed=packed)[1:]


@hadamard.register_fake
def _(x: Tensor, order: int, transpose: bool) -> Tensor:
    return x.new_empty(x.shape)


@masked_transpose.register_fake
def _(grad: Tensor, mask: Tensor, order: int) -> Tensor:
    return grad.new_empty(grad.shape)


@fake_quantize.register_fake
def _(x: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    out = eager.like(x, quantizer(spec), values=True, codes=False, packed=True)
    return out[0], out[3]


@quantize.register_fake
def _(x: Tensor, spec: str, packed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return eager.like(x, quantizer(spec), values=False, codes=True, packed=packed)[1:]


def each_apart(operator: Any, saves: int | None = None) -> None:
    """Call this operator, which takes lists, for one entry of vmap after another.

    As torch does it for operators without lists: a weight that all entries share is quantized, and
    its operand saved, for each of them. saves: which of its arguments says whether a gradient will
    be asked for, which tensors inside of vmap do not tell. Raises ValueError for no entries.
    """

    def apart(info: Any, dims: Any, *given: Any) -> tuple[list[Tensor], list[int]]:
        if info.batch_size == 0:
            raise ValueError("vmap must have entries, got an axis of length 0")
        leaves, tree = pytree.tree_flatten(given)
        axes = pytree.tree_leaves(dims)
        asked = torch.is_grad_enabled() and any(
            isinstance(t, Tensor) and t.requires_grad for t in leaves
        )
        made = []
        for i in range(info.batch_size):
            one = [t if d is None else t.select(d, i) for t, d in zip(leaves, axes, strict=True)]
            arguments = list(pytree.tree_unflatten(one, tree))
            if saves is not None and asked:
                arguments[saves] = True
            made.append(operator(*arguments))
        return [torch.stack(ts) for ts in zip(*made, strict=True)], [0] * len(made[0])

    operator.register_vmap(apart)


def check_single(grads: Sequence[Tensor | None]) -> None:
    """Raise NotImplementedError where autograd asks for a batch of gradients at once.

    It does that by an older vmap, for which operators that take lists can have no rule.
    """
    if torch.compiler.is_compiling():  # compiled autograd, which could not trace what is asked here
        return
    legacy: Any = torch._C._functorch.is_legacy_batchedtensor
    if any(g is not None and legacy(g) for g in grads):
        raise NotImplementedError(
            "quest has no batches of gradients (is_grads_batched=True, vectorize=True) where "
            "layers multiply integers: use torch.func.vmap of torch.autograd.grad"
        )


def _hadamard_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.order, ctx.transpose = inputs


def _hadamard_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return hadamard(grad, ctx.order, not ctx.transpose), None, None


def _fake_quantize_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    x, spec = inputs
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.order = quantizer(spec).transform.order(x.shape[-1])


def _fake_quantize_backward(ctx: Any, grad: Tensor, _mask: Tensor) -> tuple[Tensor, None]:
    (mask,) = ctx.saved_tensors
    return masked_transpose(grad, mask, ctx.order), None


def refuse_second(ctx: Any, *grads: Any) -> Any:
    """The backward of a backward: there is none."""
    raise NotImplementedError(
        "quest has no second derivatives: its backward can't be differentiated (create_graph=True)"
    )


masked_transpose.register_autograd(refuse_second)
hadamard.register_autograd(_hadamard_backward, setup_context=_hadamard_context)
fake_quantize.register_autograd(_fake_quantize_backward, setup_context=_fake_quantize_context)
