"""The operators of the integer path: exact products of low-bit operands.

quest::encode(x, spec, kind) -> (operand, scale, mask, sums)
quest::operand(x, spec, kind) -> (operand, scale, sums)     of an input in inference, without a mask
quest::pack_operand(operand, spec) -> packed         integers in 2 or 4 bits
quest::decode(operand, scale, spec, kind, width, dtype) -> values
quest::accumulate(a, b) -> int32                     exact products of operands
quest::product(a, b, ...) -> y                       the same, dequantized, or residual + y

CPU: plain PyTorch (`eager`). CUDA: the kernels; products need Hopper (`unavailable` says why not).
`kind` is one of `operands.KINDS`; `decode` also reads `operands.PACKED`.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import eager, flops, grids, operands, ops

if TYPE_CHECKING:
    from .kernels.product import Turned
    from .quantizer import Quantizer


@torch.library.custom_op("quest::encode", mutates_args=(), device_types="cpu")
def encode(x: Tensor, spec: str, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(operand, scale, mask, sums) of x (..., d); see `quest.kernels.quantize.encode`."""
    q = ops.quantizer(spec)
    q.check(x)
    return eager.encode(x, q, kind)


@torch.library.custom_op("quest::operand", mutates_args=(), device_types="cpu")
def operand(x: Tensor, spec: str, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """(operand, scale, sums) of x (..., d), as `encode` gives them, without a mask."""
    return eager_operand(x, ops.quantizer(spec), kind)


def eager_operand(x: Tensor, q: Quantizer, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """`operand` in plain PyTorch, on any device."""
    q.check(x)
    return _without_mask(eager.encode(x, q, kind))


def _without_mask(made: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return made[0], made[1], made[3]


def _check_operand(name: str, t: Tensor, kind: str, width: int) -> None:
    bits = 1 if kind == "bits" else operands.PACKED.get(kind, 8)
    bytes_, dtype = -(-width * bits // 8), torch.int8 if bits == 8 else torch.uint8
    if t.dtype != dtype or t.ndim == 0 or t.shape[-1] != bytes_:
        raise ValueError(
            f"{name} must be {dtype} with {bytes_} columns for {kind} of width {width}, got "
            f"{t.dtype} of shape {tuple(t.shape)}"
        )


@torch.library.custom_op("quest::pack_operand", mutates_args=(), device_types="cpu")
def pack_operand(operand: Tensor, spec: str) -> Tensor:
    """An operand of integers (..., d) int8 in fewer bits, (..., ceil(d bits / 8)) uint8.

    spec: of a quantizer for which `operands.saved` names packed integers. See
    `quest.kernels.pack`.
    """
    q = ops.quantizer(spec)
    _check_pack(operand, q)
    return eager.pack_operand(operand, q)


def _check_pack(operand: Tensor, q: Quantizer) -> operands.Form:
    form = operands.saved(q, "integers")
    if form.kind not in operands.PACKED:
        raise ValueError(f"the integers of quantizer {q} have no packed form")
    if operand.ndim == 0:
        raise ValueError("operand must have at least one axis, got a scalar")
    if operand.dtype != torch.int8:
        raise TypeError(f"operand must be torch.int8, got {operand.dtype}")
    return form


@torch.library.custom_op("quest::decode", mutates_args=(), device_types="cpu")
def decode(
    operand: Tensor, scale: Tensor, spec: str, kind: str, width: int, dtype: torch.dtype
) -> Tensor:
    """The values (..., width) of an operand (..., bytes) and its scale (..., 1), as `dtype`."""
    check_decode(operand, scale, kind, width, dtype)
    return eager.decode(operand, scale, ops.quantizer(spec), kind, width, dtype)


def check_decode(
    operand: Tensor,
    scale: Tensor,
    kind: str,
    width: int,
    dtype: torch.dtype,
    names: tuple[str, str] = ("operand", "scale"),
) -> None:
    """Raise ValueError or TypeError unless this operand and its scale decode to `dtype`."""
    _check_operand(names[0], operand, kind, width)
    check_vector(names[1], scale, torch.float32, (*operand.shape[:-1], 1), operand)
    if dtype not in ops.DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")


def check_vector(
    name: str, t: Tensor, dtype: torch.dtype, shape: tuple[int, ...], beside: Tensor
) -> None:
    """Raise ValueError unless t has this dtype and shape, on the device of `beside`."""
    if t.dtype != dtype or t.shape != shape or t.device != beside.device:
        raise ValueError(
            f"{name} must be {dtype} of shape {tuple(shape)} on {beside.device}, got {t.dtype} of "
            f"shape {tuple(t.shape)} on {t.device}"
        )


def _check_pair(a: Tensor, b: Tensor) -> None:
    for name, t in (("a", a), ("b", b)):
        if t.ndim != 2 or t.dtype not in (torch.int8, torch.uint8):
            raise ValueError(
                f"{name} must be int8, or uint8 for bits, of two axes, got {t.dtype} of shape "
                f"{tuple(t.shape)}"
            )
    if a.dtype != b.dtype or a.shape[1] != b.shape[1] or a.device != b.device:
        raise ValueError(
            "a and b must have the same dtype, columns and device, got "
            f"{a.dtype} {tuple(a.shape)} on {a.device} and {b.dtype} {tuple(b.shape)} on {b.device}"
        )
    width = a.shape[1] * (8 if a.dtype == torch.uint8 else 1)
    if width > operands.MAX_WIDTH:
        raise ValueError(
            f"rows have {width} entries; {operands.MAX_WIDTH} fit an int32 accumulator"
        )


@torch.library.custom_op("quest::accumulate", mutates_args=(), device_types="cpu")
def accumulate(a: Tensor, b: Tensor) -> Tensor:
    """(M, N) int32, exact: a b^T for int8 (M, K) and (N, K); for uint8, the bits rows share."""
    _check_pair(a, b)
    return eager.accumulate(a, b)


@torch.library.custom_op("quest::product", mutates_args=(), device_types="cpu")
def product(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_sums: Tensor,
    b_sums: Tensor,
    bias: Tensor | None,
    grid_names: str,
    kinds: str,
    width: int,
    dtype: torch.dtype,
    residual: Tensor | None = None,
) -> Tensor:
    """y (M, N) of `dtype` = values(a) values(b)^T + bias, for operands as `encode` makes them.

    a (M, bytes), b (N, bytes); scales (M, 1), (N, 1) float32; sums (M, 1), (N, 1) int32; bias (N,).
    grid_names and kinds: of a and b, with a comma between. residual: (M, N) of `dtype`; then
    residual + y, for y rounded to `dtype`. No gradient.
    """
    return eager_product(
        a, b, a_scale, b_scale, a_sums, b_sums, bias, grid_names, kinds, width, dtype, residual
    )


def eager_product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, a_sums: Tensor, b_sums: Tensor,
    bias: Tensor | None, grid_names: str, kinds: str, width: int, dtype: torch.dtype,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`product` in plain PyTorch, on any device."""
    terms = check_product(
        a, b, a_scale, b_scale, a_sums, b_sums, bias, grid_names, kinds, width, dtype
    )
    _check_residual(residual, a, b, dtype)
    scales, sums = (a_scale[:, 0], b_scale[:, 0]), (a_sums[:, 0], b_sums[:, 0])
    y = eager.product(a, b, scales, sums, bias, terms, dtype)
    return y if residual is None else residual.contiguous() + y


def _check_residual(residual: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    if residual is not None:
        check_vector("residual", residual, dtype, (a.shape[0], b.shape[0]), a)


def check_product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, a_sums: Tensor, b_sums: Tensor,
    bias: Tensor | None, grid_names: str, kinds: str, width: int, dtype: torch.dtype,
    names: tuple[str, str] = ("a", "b"),
) -> operands.Terms:  # fmt: skip
    """What makes y of the accumulators; raises where an argument is not what `product` asks for.

    names: of a and b, for messages.
    """
    _check_pair(a, b)
    forms, terms = _terms(grid_names, kinds, width)
    for name, t, s, n, f in (
        (names[0], a, a_scale, a_sums, forms[0]),
        (names[1], b, b_scale, b_sums, forms[1]),
    ):
        check_decode(t, s, f.kind, width, dtype, (name, f"{name}_scale"))
        check_vector(f"{name}_sums", n, torch.int32, s.shape, a)
    if bias is not None:
        ops.check_input(bias, "bias")
        check_vector("bias", bias, bias.dtype, (b.shape[0],), a)
    return terms


@functools.lru_cache(maxsize=1024)
def _terms(
    grid_names: str, kinds: str, width: int
) -> tuple[tuple[operands.Form, operands.Form], operands.Terms]:
    """What the names of a product say; made once, since a layer asks in every call."""
    pairs = list(zip(grid_names.split(","), kinds.split(","), strict=False))
    if len(pairs) != 2 or grid_names.count(",") != 1 or kinds.count(",") != 1:
        raise ValueError(
            f"grid_names and kinds must name two of each, got {grid_names!r} and {kinds!r}"
        )
    a, b = (operands.form(grids.parse(g), kind) for g, kind in pairs)
    return (a, b), operands.terms(a, b, width)


def terms(grid_names: str, kinds: str, width: int) -> operands.Terms:
    """What makes a product's results of its accumulators; names and kinds as `product` takes."""
    return _terms(grid_names, kinds, width)[1]


@functools.lru_cache(maxsize=1024)
def plan(q: Quantizer, kind: str, like: tuple[torch.dtype, int, torch.device]) -> tuple[Any, Any]:
    """(program, form) of `launch_encode` for rows of this dtype, width and device.

    Made once: finding them takes longer than a launch.
    """
    dtype, d, device = like
    form = operands.form_of(q, kind)
    return ops.program(q, torch.empty((0, d), dtype=dtype, device=device)), form


def launch_encode(x: Tensor, q: Quantizer, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`eager.encode` by the kernels; sparsity groups that they lack run in plain PyTorch."""
    from .kernels import blocks, forms
    from .kernels import quantize as kernel

    q.check(x)
    program, form = plan(q, kind, (x.dtype, x.shape[-1], x.device))
    if blocks.supports(program, x):
        chosen, bits = forms.OPERANDS[kind]
        with ops.device_of(x):
            return blocks.quantize(x, program, form=chosen, bits=bits, sums=True)[:4]
    if not kernel.supports(program):
        return eager.encode(x, q, kind)
    with ops.device_of(x):
        return kernel.encode(x, program, kind=kind, integer=form.integer)


def launch_encode_saved(
    x: Tensor, q: Quantizer, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`eager.encode_saved` by the kernels: in one pass where `quest.kernels.blocks` supports it."""
    from .kernels import blocks, forms

    q.check(x)
    packed = operands.PACKED.get(operands.saved(q, kind).kind, 0)
    program, _ = plan(q, kind, (x.dtype, x.shape[-1], x.device))
    if packed and blocks.supports(program, x):
        form, bits = forms.OPERANDS[kind]
        with ops.device_of(x):
            return blocks.quantize(x, program, form=form, bits=bits, sums=True, saved=packed)
    made = launch_encode(x, q, kind)
    return *made, launch_pack(made[0], q) if packed else made[0]


def launch_operand(x: Tensor, q: Quantizer, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """`operand` by the kernels."""
    from .kernels import blocks, forms

    q.check(x)
    program, _ = plan(q, kind, (x.dtype, x.shape[-1], x.device))
    if not blocks.supports(program, x):
        return _without_mask(launch_encode(x, q, kind))
    with ops.device_of(x):
        form, bits = forms.OPERANDS[kind]
        made = blocks.quantize(x, program, form=form, bits=bits, sums=True, masked=False)
        return _without_mask(made[:4])


def launch_pack(operand: Tensor, q: Quantizer) -> Tensor:
    """`eager.pack_operand` by the kernel."""
    from .kernels import pack as kernel

    form = _check_pack(operand, q)
    with ops.device_of(operand):
        return kernel.pack(operand, form.bits, form.stride, form.top)


def launch_decode(
    operand: Tensor, scale: Tensor, q: Quantizer, kind: str, width: int, dtype: torch.dtype
) -> Tensor:
    """`decode` by the kernel."""
    from .kernels import decode as kernel

    check_decode(operand, scale, kind, width, dtype)
    form = operands.readable(q, kind)
    with ops.device_of(operand):
        return kernel.decode(
            operand, scale, width, form.unit, dtype,
            bits=form.bits, stride=form.stride, top=form.top,
        )  # fmt: skip


def require_product(device: torch.device) -> None:
    """RuntimeError where the low-bit product can't run on `device`; the message says why."""
    from .kernels import hopper

    reason = hopper.unavailable(device)
    if reason is not None:
        raise RuntimeError(f"the low-bit product can't run here: {reason}")


@accumulate.register_kernel("cuda")
def launch_accumulate(a: Tensor, b: Tensor) -> Tensor:
    """`accumulate` by the kernel."""
    from .kernels import hopper
    from .kernels import product as kernel

    _check_pair(a, b)
    require_product(a.device)
    with ops.device_of(a):
        return kernel.product(a, b, torch.int32, epilogue=hopper.RAW)


@product.register_kernel("cuda")
def launch_product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, a_sums: Tensor, b_sums: Tensor,
    bias: Tensor | None, grid_names: str, kinds: str, width: int, dtype: torch.dtype,
    residual: Tensor | None = None, *, gate: bool = False, rotary: Turned | None = None,
) -> Tensor:  # fmt: skip
    """`eager_product` by the kernel.

    gate: `gated_product.eager_gated_product`; rotary: `rotated_product.eager_rotated_product`.
    """
    from .kernels import hopper
    from .kernels import product as kernel

    terms = check_product(
        a, b, a_scale, b_scale, a_sums, b_sums, bias, grid_names, kinds, width, dtype
    )
    _check_residual(residual, a, b, dtype)
    require_product(a.device)

    def scaled(sums: Tensor, by: int) -> Tensor | None:
        return None if by == 0 else sums.contiguous() if by == 1 else by * sums

    with ops.device_of(a):
        return kernel.product(
            a, b, dtype,
            epilogue=hopper.CORRECTED if terms.corrected else hopper.PLAIN,
            length=terms.length, factor=terms.factor,
            row_scale=a_scale.contiguous(), column_scale=b_scale.contiguous(),
            row_sum=scaled(a_sums, terms.rows), column_sum=scaled(b_sums, terms.columns),
            bias=None if bias is None else bias.contiguous(), gate=gate, residual=residual,
            rotary=rotary,
        )  # fmt: skip


@encode.register_kernel("cuda")
def _(x: Tensor, spec: str, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch_encode(x, ops.quantizer(spec), kind)


@operand.register_kernel("cuda")
def _(x: Tensor, spec: str, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    return launch_operand(x, ops.quantizer(spec), kind)


@decode.register_kernel("cuda")
def _(
    operand: Tensor, scale: Tensor, spec: str, kind: str, width: int, dtype: torch.dtype
) -> Tensor:
    return launch_decode(operand, scale, ops.quantizer(spec), kind, width, dtype)


@pack_operand.register_kernel("cuda")
def _(operand: Tensor, spec: str) -> Tensor:
    return launch_pack(operand, ops.quantizer(spec))


@pack_operand.register_fake
def _(operand: Tensor, spec: str) -> Tensor:
    return eager.packed_like(operand, _check_pack(operand, ops.quantizer(spec)).bits)


@encode.register_fake
def _(x: Tensor, spec: str, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return eager.encoded_like(x, kind)


@operand.register_fake
def _(x: Tensor, spec: str, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    return _without_mask(eager.encoded_like(x, kind))


@decode.register_fake
def _(
    operand: Tensor, scale: Tensor, spec: str, kind: str, width: int, dtype: torch.dtype
) -> Tensor:
    return scale.new_empty((*operand.shape[:-1], width), dtype=dtype)


@accumulate.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)


@product.register_fake
def _(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, a_sums: Tensor, b_sums: Tensor,
    bias: Tensor | None, grid_names: str, kinds: str, width: int, dtype: torch.dtype,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    _check_residual(residual, a, b, dtype)
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


def as_rows(x: Tensor) -> Tensor:
    """x (..., d) as (rows, d)."""
    # Not -1: it can't be told where another axis is empty.
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


flops.counted(torch.ops.quest.accumulate, flops.accumulate)
flops.counted(torch.ops.quest.product, flops.product)
