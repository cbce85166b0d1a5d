"""What `torch.utils.flop_counter.FlopCounterMode` counts for the operators that multiply.

Products of integers count as those of the values that they stand for, 2 M N K for (M, K) and
(N, K), zeros of a sparse weight included: a layer counts the same on either path, and the same as
`torch.nn.Linear`. Transforms and quantizers count nothing, as on the path of the values.

The counter hooks every module, so that layers are called one by one: `quest.swiglu` with
`recompute` is then the checkpoint that other layers get. Its backward makes `down` again as well,
where layers multiply integers, and that is counted: three products, and not two as elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def counted(operator: Any, formula: Callable[..., int]) -> None:
    """The counter counts so many for a call of this one of torch.ops.quest.

    formula: of the arguments as it is called with them, and `out_val`, what came out.
    """
    register_flop_formula(operator, get_raw=True)(formula)


def accumulate(a: Tensor, b: Tensor, **_: Any) -> int:
    """Of `lowbit.accumulate`: eight entries in a byte of bits."""
    return 2 * a.numel() * (8 if a.dtype == torch.uint8 else 1) * b.shape[0]


def product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, a_sums: Tensor, b_sums: Tensor,
    bias: Tensor | None, grid_names: str, kinds: str, width: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Of `lowbit.product` and those that take the same arguments first."""
    return 2 * a.shape[0] * b.shape[0] * width


def sparse(a: Tensor, values: Tensor, *_: Any, **__: Any) -> int:
    """Of `sparse_product`, as if the weight were dense: its values are half of the entries."""
    return 2 * a.shape[0] * 2 * values.numel()


def linear(x: Tensor, weights: Sequence[Tensor], *_: Any, **__: Any) -> int:
    """Of `lowbit_linear.low_bit_linear`."""
    return sum(2 * x.numel() * w.shape[0] for w in weights)


def linear_backward(
    grads: Sequence[Tensor], read: Sequence[Tensor], activation: str, weight: str, width: int,
    x_dtype: torch.dtype, w_dtype: torch.dtype, needs_x: bool, needs_w: Sequence[bool], **_: Any,
) -> int:  # fmt: skip
    """Of `lowbit_linear.low_bit_linear_backward`: a product for each gradient that is needed."""
    needed = [*grads] * needs_x + [g for i, g in enumerate(grads) if needs_w[i]]
    return sum(2 * g.numel() * width for g in needed)


def swiglu(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], down: Tensor, *_: Any,
    out_val: Sequence[Tensor], **__: Any,
) -> int:  # fmt: skip
    """Of `mlp.low_bit_swiglu`: gate, up and down."""
    return linear(x, weights) + 2 * out_val[0].numel() * down.shape[1]


def again(
    after: Tensor, read: Sequence[Tensor], biases: Sequence[Tensor], activation: str, weight: str,
    width: int, *, out_val: Sequence[Tensor],
) -> int:  # fmt: skip
    """Of `mlp.low_bit_again`: gate and up once more."""
    return sum(2 * y.numel() * width for y in out_val)
