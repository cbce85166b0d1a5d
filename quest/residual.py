"""A residual that a layer's output is added to, in the product's kernel.

`added` is what models call. On Hopper the kernel of `lowbit.product` reads the residual while it
finishes a tile and writes the sum in place of its product, which saves a kernel that reads and
writes as much again. The numbers are those of two operations, bit for bit.
Source: He et al., arXiv 1512.03385; QuEST (arXiv 2502.05003), section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import frozen, ops
from .joint import again, alike
from .prologue import check_layer


def added(x: Tensor, layer: nn.Module, residual: Tensor) -> Tensor:
    """residual + layer(x), for x (..., in).

    Where no gradient is asked for, `layer` is a frozen `quest.Linear` without hooks that multiplies
    integers, and the residual (..., out) has x's dtype and device and the shape of what comes out,
    one kernel multiplies, rounds as the layer does, adds in float32 and rounds once; but not of few
    rows, whose weights are read packed, nor of many with 2:4 sparse weights. Elsewhere these are
    two operations, whatever the residual's dtype and shape; the numbers are the same. Raises
    TypeError for a layer that is no module and for a residual that is no tensor, and what the layer
    and the sum raise.
    """
    made, rest = apart(x, layer, residual)
    return made if rest is None else rest + made


def apart(x: Tensor, layer: nn.Module, residual: Tensor) -> tuple[Tensor, Tensor | None]:
    """(residual + layer(x), None) where one kernel makes it; else (layer(x), residual).

    For what adds them itself, as a norm's kernel does. Otherwise as `added`.
    """
    if (found := again((x, residual), (layer,), added=True)) is not None:
        return found[0], None
    check_layer(layer)
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual must be a torch.Tensor, got {type(residual).__name__}")
    y = _one(x, layer, residual)
    return (layer(x), residual) if y is None else (y, None)


def _one(x: Tensor, layer: nn.Module, residual: Tensor) -> Tensor | None:
    """The sum by one kernel; None where there is none."""
    plain = None if torch.is_grad_enabled() else alike((layer,))
    if plain is None:
        return None
    (one,) = plain
    one.check(x)
    ops.check_tangents(residual)
    held = one.current()
    if held is None or one.out_dtype(x) != x.dtype or not held.adds(x, residual):
        return None
    return frozen.linear(x, held, one.bias, one.recipe, residual=residual)
