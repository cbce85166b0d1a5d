"""The product with a compressed 2:4 sparse weight, as an operator.

quest::sparse_product(a, values, metadata, ...) -> y

On Hopper the sparse tensor cores skip the half of the weight that is zero. CPU: decompressed, in
plain PyTorch. CUDA: `quest.kernels.sparse`. The numbers are `lowbit.product`'s of the same operand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import compression, flops, lowbit, operands, ops


@torch.library.custom_op("quest::sparse_product", mutates_args=(), device_types="cpu")
def sparse_product(
    a: Tensor,
    values: Tensor,
    metadata: Tensor,
    a_scale: Tensor,
    w_scale: Tensor,
    a_sums: Tensor,
    w_sums: Tensor,
    bias: Tensor | None,
    grid_names: str,
    kinds: str,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """y (M, N) of `dtype` = values(a) values(w)^T + bias, as `lowbit.product`, for a sparse weight.

    a (M, width) int8: an operand of integers or codes. values (N, width / 2) int8 and metadata
    (N, 8 ceil(width / 256)) int32: those of a weight of integers, as `compression.compress` makes
    them. The rest as in `lowbit.product`.
    """
    return eager_sparse_product(
        a, values, metadata, a_scale, w_scale, a_sums, w_sums, bias, grid_names, kinds, width, dtype
    )


def eager_sparse_product(
    a: Tensor, values: Tensor, metadata: Tensor, a_scale: Tensor, w_scale: Tensor, a_sums: Tensor,
    w_sums: Tensor, bias: Tensor | None, grid_names: str, kinds: str, width: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`sparse_product` in plain PyTorch, on any device."""
    _check(
        a, values, metadata, a_scale, w_scale, a_sums, w_sums, bias, grid_names, kinds, width, dtype
    )
    operand = compression.decompress(values, metadata)
    return lowbit.eager_product(
        a, operand, a_scale, w_scale, a_sums, w_sums, bias, grid_names, kinds, width, dtype
    )


def _check(
    a: Tensor, values: Tensor, metadata: Tensor, a_scale: Tensor, w_scale: Tensor, a_sums: Tensor,
    w_sums: Tensor, bias: Tensor | None, grid_names: str, kinds: str, width: int,
    dtype: torch.dtype,
) -> operands.Terms:  # fmt: skip
    """What makes y of the accumulators; raises where an argument is not what the rest asks for."""
    if kinds not in ("integers,integers", "codes,integers"):
        raise ValueError(f"kinds must be integers or codes, and integers, got {kinds!r}")
    rows = values.shape[0] if values.ndim else 0
    words = 8 * -(-width // compression.BLOCK)
    for name, t, shape, kind in (
        ("values", values, (rows, width // 2), torch.int8),
        ("metadata", metadata, (rows, words), torch.int32),
    ):
        if width % 4 or t.shape != shape or t.dtype != kind or t.device != a.device:
            raise ValueError(
                f"{name} must be {kind} of shape {shape} on {a.device} for a width of {width}, a "
                f"multiple of 4, got {t.dtype} of shape {tuple(t.shape)} on {t.device}"
            )
    # The weight that they stand for has the shape of this view, which holds no memory of its own.
    w = values.as_strided((rows, width), (0, 0))
    return lowbit.check_product(
        a, w, a_scale, w_scale, a_sums, w_sums, bias, grid_names, kinds, width, dtype, ("a", "w")
    )


@sparse_product.register_kernel("cuda")
def launch_sparse_product(
    a: Tensor, values: Tensor, metadata: Tensor, a_scale: Tensor, w_scale: Tensor, a_sums: Tensor,
    w_sums: Tensor, bias: Tensor | None, grid_names: str, kinds: str, width: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`eager_sparse_product` by the kernel."""
    from .kernels import hopper, sparse

    terms = _check(
        a, values, metadata, a_scale, w_scale, a_sums, w_sums, bias, grid_names, kinds, width, dtype
    )
    lowbit.require_product(a.device)
    with ops.device_of(a):
        return sparse.product(
            values, metadata, a, dtype,
            epilogue=hopper.CORRECTED if terms.corrected else hopper.PLAIN, factor=terms.factor,
            feature_scale=w_scale.contiguous(), token_scale=a_scale.contiguous(),
            feature_sum=(terms.columns * w_sums).contiguous() if terms.corrected else None,
            bias=None if bias is None else bias.contiguous(),
        )  # fmt: skip


@sparse_product.register_fake
def _(
    a: Tensor, values: Tensor, metadata: Tensor, a_scale: Tensor, w_scale: Tensor, a_sums: Tensor,
    w_sums: Tensor, bias: Tensor | None, grid_names: str, kinds: str, width: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return a.new_empty((a.shape[0], values.shape[0]), dtype=dtype)


flops.counted(torch.ops.quest.sparse_product, flops.sparse)
