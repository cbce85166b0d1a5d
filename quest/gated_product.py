"""Two products that end in a gate, as an operator: gate and up of a SwiGLU.

quest::gated_product(a, b, ...) -> silu(gate) value

The weights of a gate and a value lie stacked. On Hopper the kernel of `lowbit.product` writes
silu(gate) value in place of both, so that the next quantizer reads half as much and makes no gate.
The numbers are those of that product and of `prologue.gated_encode`'s
rows, bit for bit. CPU: plain PyTorch.
Source: SwiGLU, arXiv 2002.05202; QuEST (arXiv 2502.05003), Algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import eager, flops, lowbit

HALVES = (torch.bfloat16, torch.float16)


@torch.library.custom_op("quest::gated_product", mutates_args=(), device_types="cpu")
def gated_product(
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
) -> Tensor:
    """silu(gate) value (M, N / 2) of `dtype`, float16 or bfloat16, for y = (gate, value) (M, N).

    The arguments and y are `lowbit.product`'s. y is rounded to `dtype`, silu(gate) value computed
    in float32 and rounded once. No gradient. Raises ValueError for an odd N, TypeError for another
    dtype, and what `lowbit.product` raises.
    """
    return eager_gated_product(
        a, b, a_scale, b_scale, a_sums, b_sums, bias, grid_names, kinds, width, dtype
    )


def eager_gated_product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, a_sums: Tensor, b_sums: Tensor,
    bias: Tensor | None, grid_names: str, kinds: str, width: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`gated_product` in plain PyTorch, on any device."""
    _check(b, dtype)
    y = lowbit.eager_product(
        a, b, a_scale, b_scale, a_sums, b_sums, bias, grid_names, kinds, width, dtype
    )
    return eager.gated(*y.chunk(2, -1)) if y.numel() else like(a, b, dtype)


def _check(b: Tensor, dtype: torch.dtype) -> None:
    if dtype not in HALVES:
        raise TypeError(f"dtype must be bfloat16 or float16, got {dtype}")
    if b.ndim == 0 or b.shape[0] % 2:
        raise ValueError(
            f"b must hold as many rows for the gate as for the value, got shape {tuple(b.shape)}"
        )


def like(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for the result."""
    return a.new_empty((a.shape[0], b.shape[0] // 2), dtype=dtype)


@gated_product.register_kernel("cuda")
def launch_gated_product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, a_sums: Tensor, b_sums: Tensor,
    bias: Tensor | None, grid_names: str, kinds: str, width: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`gated_product` by the kernel."""
    _check(b, dtype)
    x: Tensor = lowbit.launch_product(
        a, b, a_scale, b_scale, a_sums, b_sums, bias, grid_names, kinds, width, dtype, gate=True
    )
    return x


@gated_product.register_fake
def _(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, a_sums: Tensor, b_sums: Tensor,
    bias: Tensor | None, grid_names: str, kinds: str, width: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _check(b, dtype)
    return like(a, b, dtype)


flops.counted(torch.ops.quest.gated_product, flops.product)
