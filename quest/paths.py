"""Which product a layer uses: that of the values, in their dtype, or that of the integers.

The rule of `choose`, in order:

1. Under `only(path)`: that one.
2. "values" where the recipe has no integer product (16-bit operands, Lloyd-Max tables), where a
   row is too wide for an int32 accumulator, and where the device lacks the kernel.
3. "values" below MIN_ROWS rows, where both operands' quantization outweighs the product. (A frozen
   weight is not quantized again, and always goes the integers' path: see `frozen`.)
4. "integers" otherwise: on Hopper the int8 product runs at twice bf16's rate, single bits at ten
   times.

Both paths multiply the same operands. That of the integers is exact up to the dequantization; that
of the values rounds each to its dtype first, and sums in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import operands
from .recipes import Recipe

PATHS = ("values", "integers")
# Of the input; measured, see benchmarks/NOTES.md.
MIN_ROWS = 512

_forced: str | None = None


@contextmanager
def only(path: str) -> Iterator[None]:
    """Layers inside the block use this path, "values" or "integers", whatever the shape.

    A layer that can't raises RuntimeError or ValueError, which says why. Not for `torch.compile`
    across the block: it is read when a layer is called.
    """
    global _forced
    if path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {path!r}")
    before, _forced = _forced, path
    try:
        yield
    finally:
        _forced = before


@functools.cache
def _lacking(device: torch.device) -> str | None:
    from .kernels import product

    return product.unavailable(device)


def has_integers(t: Tensor, recipe: Recipe) -> bool:
    """Whether t (..., d), an operand of a layer, can go the integers' path where it lies."""
    return (
        t.device.type == "cuda"
        and operands.kinds(recipe.activation, recipe.weight) is not None
        and t.shape[-1] <= operands.MAX_WIDTH
        and _lacking(t.device) is None
    )


def choose(x: Tensor, recipe: Recipe) -> str:
    """ "values" or "integers" for x (..., d); see above."""
    if _forced is not None:
        return _forced
    enough = math.prod(x.shape[:-1]) >= MIN_ROWS
    return "integers" if enough and has_integers(x, recipe) else "values"
