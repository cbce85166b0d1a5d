"""A product whose first columns the rotary embedding turns, as an operator: q and k of q, k and v.

quest::rotated_product(a, b, ..., cos, sin, turned) -> y

The weights of queries, keys and values lie stacked. On Hopper the kernel of `lowbit.product` turns
the heads of the first `turned` columns while it finishes a tile, which saves a kernel that reads
and writes them once more. The numbers are those of that product and `rotary.rotate`, bit for bit.
CPU: plain PyTorch.
Source: RoPE, arXiv 2104.09864; QuEST (arXiv 2502.05003), section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import flops, lowbit
from .gated_product import HALVES
from .kernels.product import HEADS, Turned
from .rotary import rotate_heads


@torch.library.custom_op("quest::rotated_product", mutates_args=(), device_types="cpu")
def rotated_product(
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
    cos: Tensor,
    sin: Tensor,
    turned: int,
) -> Tensor:
    """y (M, N) of `dtype`, float16 or bfloat16, its first `turned` columns turned.

    The arguments and y are `lowbit.product`'s. cos, sin: (T, d_head / 2) float32, for heads of 32,
    64 or 128 columns; row r is at position r % T. y is rounded to `dtype`, turned in float32 and
    rounded once. No gradient. Raises TypeError for another dtype, ValueError for tables, rows or
    columns that don't fit, and what `lowbit.product` raises.
    """
    return eager_rotated_product(
        a, b, a_scale, b_scale, a_sums, b_sums, bias, grid_names, kinds, width, dtype, cos, sin,
        turned,
    )  # fmt: skip


def eager_rotated_product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, a_sums: Tensor, b_sums: Tensor,
    bias: Tensor | None, grid_names: str, kinds: str, width: int, dtype: torch.dtype,
    cos: Tensor, sin: Tensor, turned: int,
) -> Tensor:  # fmt: skip
    """`rotated_product` in plain PyTorch, on any device."""
    _check(a, b, dtype, cos, sin, turned)
    y = lowbit.eager_product(
        a, b, a_scale, b_scale, a_sums, b_sums, bias, grid_names, kinds, width, dtype
    )
    if not len(y):
        return y
    first, rest = y.tensor_split([turned], -1)
    sequences = torch.unflatten(first, 0, (-1, len(cos)))  # (M / T, T, turned)
    return torch.cat((rotate_heads(sequences, cos, sin).flatten(0, 1), rest), -1)


def fits(turned: Turned) -> bool:
    """Whether the kernel takes such tables."""
    return turned.cos.dtype == torch.float32 and 2 * turned.cos.shape[1] in HEADS


def _check(a: Tensor, b: Tensor, dtype: torch.dtype, cos: Tensor, sin: Tensor, turned: int) -> None:
    if dtype not in HALVES:
        raise TypeError(f"dtype must be bfloat16 or float16, got {dtype}")
    if cos.ndim != 2 or 2 * cos.shape[1] not in HEADS:
        raise ValueError(
            f"cos must be (T, d_head / 2) for heads of {', '.join(map(str, HEADS))} columns, got "
            f"shape {tuple(cos.shape)}"
        )
    for name, t in (("cos", cos), ("sin", sin)):
        lowbit.check_vector(name, t, torch.float32, tuple(cos.shape), a)
    head, positions = 2 * cos.shape[1], cos.shape[0]
    if a.ndim and a.shape[0] and (positions == 0 or a.shape[0] % positions):
        raise ValueError(f"a must have whole sequences of {positions} rows, got {a.shape[0]}")
    if b.ndim and (turned % head or not 0 <= turned <= b.shape[0]):
        raise ValueError(
            f"turned must be a multiple of {head} up to {b.shape[0]}, as b has rows, got {turned}"
        )


@rotated_product.register_kernel("cuda")
def launch_rotated_product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, a_sums: Tensor, b_sums: Tensor,
    bias: Tensor | None, grid_names: str, kinds: str, width: int, dtype: torch.dtype,
    cos: Tensor, sin: Tensor, turned: int,
) -> Tensor:  # fmt: skip
    """`rotated_product` by the kernel."""
    _check(a, b, dtype, cos, sin, turned)
    y: Tensor = lowbit.launch_product(
        a, b, a_scale, b_scale, a_sums, b_sums, bias, grid_names, kinds, width, dtype,
        rotary=Turned(cos, sin, turned),
    )  # fmt: skip
    return y


@rotated_product.register_fake
def _(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, a_sums: Tensor, b_sums: Tensor,
    bias: Tensor | None, grid_names: str, kinds: str, width: int, dtype: torch.dtype,
    cos: Tensor, sin: Tensor, turned: int,
) -> Tensor:  # fmt: skip
    _check(a, b, dtype, cos, sin, turned)
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


flops.counted(torch.ops.quest.rotated_product, flops.product)
