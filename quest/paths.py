"""Which product a layer uses: that of the values, in their dtype, or that of the integers.

The rule of `choose`, in order:

1. Under `only(path)`: that one.
2. "values" where the recipe has no integer product (16-bit operands, Lloyd-Max tables), where a
   row is too wide for an int32 accumulator, and where the device lacks the kernel.
3. "integers" otherwise: on Hopper the int8 product runs at twice bf16's rate, single bits at ten
   times; and of few rows, whose time is that of the weight's bytes, operands have fewer. Where no
   gradient is asked for few rows are multiplied with codes of 2 or 4 bits that are still packed (of
   a frozen weight, with 1 bit as well), and of a frozen weight many with its 2:4 sparse form
   compressed.

How many rows there are changes the kernels, and what comes out of a row where its scale then
differs in the last bit, as of large inputs (`quest.kernels.rows.takes`): with that a code at a near
tie, too. Both paths multiply the same operands. That of the integers is exact up to the
dequantization; that of the values rounds each to its dtype first, and sums in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import operands
from .quantizer import parse
from .recipes import Recipe

PATHS = ("values", "integers")
# By the bits of a weight's codes, 4 also for 2: where the times of the products with packed codes
# and with the operand cross on the 7B shapes, of frozen weights (the records' tuning.txt,
# 2026-11-25). A weight that is quantized for the call crosses sooner at 4096 x 4096, where 32 rows
# take 7 percent longer with 4 bits than 64 with its operand, and later at larger ones (the H200's
# live.txt, part 2).
FEW_ROWS = {1: 16, 4: 32}
# From where on the product with a compressed 2:4 sparse weight was faster than the dense one at all
# four 7B shapes (kernels/README.md); at 384 rows it is at 0.93 to 1.19, below mostly slower.
SPARSE_ROWS = 512

# Elements of an input up to which a compiled sum and its norm before a quantizer are the
# compiler's: its kernel and a quantizer took less than one for all three (the H200's prefill.txt).
SUM_ELEMENTS = 2**21

_forced: str | None = None


@contextmanager
def only(path: str) -> Iterator[None]:
    """Layers inside the block use this path, "values" or "integers", whatever the shape.

    A layer that can't raises RuntimeError or ValueError, which says why; a weight that is frozen
    for the other path is quantized each time. Not for `torch.compile`
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


# A constant for torch.compile, which need not read how it is found.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _possible(activation: str, weight: str, device: str) -> bool:
    from .kernels import hopper

    pair = operands.kinds(parse(activation), parse(weight))
    return pair is not None and hopper.unavailable(torch.device(device)) is None


def has_integers(t: Tensor, recipe: Recipe) -> bool:
    """Whether t (..., d), an operand of a layer, can go the integers' path where it lies."""
    return (
        t.device.type == "cuda"
        and t.shape[-1] <= operands.MAX_WIDTH
        and _possible(recipe.activation.spec, recipe.weight.spec, str(t.device))
    )


def allows(path: str) -> bool:
    """Whether `only` lets a layer use this path."""
    return _forced is None or _forced == path


def reads_packed(rows: int, bits: int, width: int) -> bool:
    """Whether so many rows are multiplied with a weight's packed codes, and not with its operand.

    bits: of a code. Few rows wait for the weight to arrive, and packed it is the fewest bytes.
    Single bits are packed either way: there the large product is as fast sooner.
    """
    from .kernels import few

    return rows <= FEW_ROWS[1 if bits == 1 else 4] and few.supports(rows, width, bits)


def reads_compressed(rows: int) -> bool:
    """Whether so many rows are multiplied with a 2:4 sparse weight's compressed form.

    Fewer rows are multiplied with its dense operand, which a frozen weight holds beside it.
    """
    return rows >= SPARSE_ROWS


def compiles_sums(x: Tensor) -> bool:
    """Whether a sum and its norm, of x (..., d), are left to the compiler; see SUM_ELEMENTS."""
    return x.numel() <= SUM_ELEMENTS


def choose(x: Tensor, recipe: Recipe) -> str:
    """ "values" or "integers" for x (..., d); see above."""
    if _forced is not None:
        return _forced
    return "integers" if has_integers(x, recipe) else "values"
