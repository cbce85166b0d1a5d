"""What tests of a product give it: its operands, and each kind of tile of the kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import quest
from quest import lowbit, operands
from quest.kernels import product

# Whether operands are bits, and the kinds of tile that their products take: what is compiled.
COMPILED = [(binary, name) for binary in product.COSTS for name, tiles in product.KINDS.items()
            if tiles in product.COSTS[binary]]  # fmt: skip


def kinds_of(*recipes: str) -> list[tuple[str, str]]:
    """(recipe, kind of tile) for each kind that its products take."""
    return [
        (name, tiles) for name in recipes for bits, tiles in COMPILED if bits == (name == "w1a1")
    ]


def operands_of(
    name: str, x: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> list[Any]:
    """What `lowbit.product` of x and w takes by a recipe."""
    made = quest.recipe(name)
    kinds = operands.kinds(made.activation, made.weight)
    assert kinds is not None
    a, a_scale, _, a_sums = lowbit.encode(x, made.activation.spec, kinds[0])
    b, b_scale, _, b_sums = lowbit.encode(w, made.weight.spec, kinds[1])
    grids = ",".join(q.require_grid().name for q in (made.activation, made.weight))
    return [a, b, a_scale, b_scale, a_sums, b_sums, bias, grids, ",".join(kinds), x.shape[1], dtype]
