"""The product of few rows with a weight that stays packed, as an operator.

quest::packed_product(a, w, ...) -> y

A layer of few rows waits for its weight to arrive: packed codes are 4 to 16 times fewer bytes than
bfloat16. CPU: unpacked, in plain PyTorch. CUDA: `quest.kernels.few`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import eager, flops, grids, lowbit, operands, ops, packing

if TYPE_CHECKING:
    from .quantizer import Quantizer


def bits_of(grid_names: str, kinds: str) -> int:
    """Bits of a dense weight's codes, of which there is such a product; 0 where there is none."""
    names, kind = grid_names.split(","), kinds.split(",")
    if len(names) == len(kind) == 2:
        if kind == ["bits", "bits"]:
            return 1
        made = [grids.parse(name) for name in names]
        if kind == ["integers", "integers"] and all(odd(g) for g in made):
            return made[1].storage_bits
    return 0


@functools.lru_cache(maxsize=1024)
def _spread(grid_names: str, kinds: str) -> int:
    """What odd integers of the weight are multiplied by in its operand, and not in its codes."""
    name, kind = (both.rpartition(",")[2] for both in (grid_names, kinds))
    return operands.form(grids.parse(name), kind).spread


def eager_codes(w: Tensor, q: Quantizer, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, sums) of a weight (N, width), as `packed_product` takes them; no gradient.

    bits: of a code, 2 or 4. In plain PyTorch, on any device.
    """
    _, codes, scale, *_ = eager.quantize(w, q, values=False, codes=True, packed=True)
    return codes, scale, _no_sums(scale)


def launch_codes(w: Tensor, q: Quantizer, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """`eager_codes` by the kernels, without a mask where there is one that asks for none."""
    from .kernels import blocks, forms

    q.check(w)
    program, _ = lowbit.plan(q, "integers", (w.dtype, w.shape[-1], w.device))
    if not blocks.supports(program, w):
        _, codes, scale, *_ = ops.launch_quantize(w, q, values=False, codes=True, packed=True)
        return codes, scale, _no_sums(scale)
    with ops.device_of(w):
        codes, scale, *_ = blocks.quantize(w, program, form=forms.PACKED, bits=bits, masked=False)
    return codes, scale, _no_sums(scale)


def _no_sums(scale: Tensor) -> Tensor:
    """Where sums would be: of integers none count (`operands.terms`), and none are made."""
    return torch.empty_like(scale, dtype=torch.int32)


def odd(grid: grids.Grid) -> bool:
    """Whether the points are odd integers times a unit, and their codes fill 2 or 4 bits."""
    return grid.step is not None and grid.levels in (4, 16)


@torch.library.custom_op("quest::packed_product", mutates_args=(), device_types="cpu")
def packed_product(
    a: Tensor,
    w: Tensor,
    a_scale: Tensor,
    w_scale: Tensor,
    a_sums: Tensor,
    w_sums: Tensor,
    bias: Tensor | None,
    grid_names: str,
    kinds: str,
    width: int,
    dtype: torch.dtype,
    settled: bool = False,
) -> Tensor:
    """y (M, N) of `dtype` = values(a) values(w)^T + bias, as `lowbit.product`, for a packed weight.

    a (M, bytes): an operand as `lowbit.encode` makes it. w (N, width bits / 8) uint8: codes of 1, 2
    or 4 bits as `Quantizer.pack` makes them. settled: see `quest.kernels.few.product`; False is
    always right. The rest as in `lowbit.product`.
    """
    return eager_packed(
        a, w, a_scale, w_scale, a_sums, w_sums, bias, grid_names, kinds, width, dtype
    )


def eager_packed(
    a: Tensor, w: Tensor, a_scale: Tensor, w_scale: Tensor, a_sums: Tensor, w_sums: Tensor,
    bias: Tensor | None, grid_names: str, kinds: str, width: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`packed_product` in plain PyTorch, on any device."""
    bits = _check(a, w, a_scale, w_scale, a_sums, w_sums, bias, grid_names, kinds, width, dtype)
    if bits == 1:
        operand = w
    else:
        odds = 2 * packing.unpack(w, bits, width).to(torch.int8) - (2**bits - 1)
        operand = _spread(grid_names, kinds) * odds
    return lowbit.eager_product(
        a, operand, a_scale, w_scale, a_sums, w_sums, bias, grid_names, kinds, width, dtype
    )


def _check(
    a: Tensor, w: Tensor, a_scale: Tensor, w_scale: Tensor, a_sums: Tensor, w_sums: Tensor,
    bias: Tensor | None, grid_names: str, kinds: str, width: int, dtype: torch.dtype,
) -> int:  # fmt: skip
    """Bits of the weight's codes; raises where an argument is not what the rest asks for."""
    bits = bits_of(grid_names, kinds)
    if not bits:
        raise ValueError(
            "packed weights have 1 bit on both sides, or uniform grids of 2 and 4 bits, got "
            f"{grid_names!r} as {kinds!r}"
        )
    if w.ndim != 2 or w.dtype != torch.uint8 or w.shape[1] != -(-width * bits // 8):
        raise ValueError(
            f"w must be uint8 of shape (out, {-(-width * bits // 8)}) for {bits} bits and width "
            f"{width}, got {w.dtype} of shape {tuple(w.shape)}"
        )
    if a.ndim != 2 or a.device != w.device:
        raise ValueError(
            f"a must have two axes and lie where w lies, {w.device}; got shape {tuple(a.shape)} on "
            f"{a.device}"
        )
    lowbit.check_decode(a, a_scale, kinds.partition(",")[0], width, dtype, ("a", "a_scale"))
    lowbit.check_vector("a_sums", a_sums, torch.int32, (a.shape[0], 1), a)
    lowbit.check_vector("w_scale", w_scale, torch.float32, (w.shape[0], 1), a)
    lowbit.check_vector("w_sums", w_sums, torch.int32, (w.shape[0], 1), a)
    if bias is not None:
        ops.check_input(bias, "bias")
        lowbit.check_vector("bias", bias, bias.dtype, (w.shape[0],), a)
    return bits


@packed_product.register_kernel("cuda")
def launch_packed(
    a: Tensor, w: Tensor, a_scale: Tensor, w_scale: Tensor, a_sums: Tensor, w_sums: Tensor,
    bias: Tensor | None, grid_names: str, kinds: str, width: int, dtype: torch.dtype,
    settled: bool = False,
) -> Tensor:  # fmt: skip
    """`packed_product` by the kernel."""
    from .kernels import few

    bits = _check(a, w, a_scale, w_scale, a_sums, w_sums, bias, grid_names, kinds, width, dtype)
    lowbit.require_product(a.device)
    if not few.supports(a.shape[0], width, bits):
        raise ValueError(
            f"packed weights are multiplied with up to {few.LIMIT} rows of a multiple of 128 "
            f"entries, got {a.shape[0]} of {width}"
        )
    terms = lowbit.terms(grid_names, kinds, width)
    packed = w.contiguous()
    with ops.device_of(a):
        return few.product(
            a.contiguous(), packed, bits, dtype,
            factor=terms.factor * _spread(grid_names, kinds), length=terms.length,
            a_scale=a_scale.contiguous(), w_scale=w_scale.contiguous(),
            a_sum=a_sums.contiguous(), w_sum=w_sums.contiguous(),
            bias=None if bias is None else bias.contiguous(),
            settled=settled and packed is w,  # a copy has just been written
        )  # fmt: skip


@packed_product.register_fake
def _(
    a: Tensor, w: Tensor, a_scale: Tensor, w_scale: Tensor, a_sums: Tensor, w_sums: Tensor,
    bias: Tensor | None, grid_names: str, kinds: str, width: int, dtype: torch.dtype,
    settled: bool = False,
) -> Tensor:  # fmt: skip
    return a.new_empty((a.shape[0], w.shape[0]), dtype=dtype)


flops.counted(torch.ops.quest.packed_product, flops.product)
