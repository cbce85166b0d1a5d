"""A frozen layer's forward on Hopper with the least host time, for layers that nothing watches.

In eager mode few tokens take the device less time than checks, operators and tensors take the host.
Here nothing is checked that freezing a weight and `Linear` have settled, and operand, scale and
sums of the input are addresses in one allocation. The kernels and the numbers are those of
`lowbit.operand` and then `lowbit.product` or `packed.packed_product`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import grids, operands, ops, paths

if TYPE_CHECKING:
    from .frozen import Frozen


@dataclass(frozen=True)
class _Plan:
    """What does not depend on the number of rows.

    program, form, bits: of the kernels that quantize. bytes: of a row's operand. epilogue, and
    whether sums of rows and columns count: of the product.
    """

    program: Any
    kind: str
    form: int
    bits: int
    bytes: int
    terms: operands.Terms
    epilogue: int


@functools.lru_cache(maxsize=1024)
def _plan(
    spec: str, names: str, kinds: str, width: int, dtype: torch.dtype, device: torch.device
) -> _Plan | None:
    """None where these kernels don't do it."""
    from .kernels import blocks, product

    kind, other = kinds.split(",")
    like = torch.empty((1, width), dtype=dtype, device=device)
    program = ops.program(ops.quantizer(spec), like)
    pair = [
        operands.form(grids.parse(name), each)
        for name, each in zip(names.split(","), (kind, other), strict=True)
    ]
    terms = operands.terms(pair[0], pair[1], width)
    whole = {terms.rows, terms.columns} <= {0, 1}  # no sum is to be doubled
    if not (whole and blocks.supports(program, like) and product.unavailable(device) is None):
        return None
    form, bits = blocks.OPERANDS[kind]
    return _Plan(
        program, kind, form, bits, width // 8 if kind == "bits" else width, terms,
        product.CORRECTED if terms.corrected else product.PLAIN,
    )  # fmt: skip


def linear(x: Tensor, held: Frozen, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """y (..., out) of `dtype` for x (..., in) on CUDA; None where there is another way to take.

    held has an operand; bias is contiguous and lies where x does.
    """
    from .kernels import blocks, few, outputs, product, rows

    width, w = x.shape[-1], held.operand
    plan = _plan(held.spec, held.names, held.kinds, width, x.dtype, x.device)
    if plan is None or w is None or held.scale is None or held.sums is None:
        return None
    columns = w.shape[0]
    y = outputs.empty((*x.shape[:-1], columns), dtype, x.device)
    if y.numel() == 0:
        return y
    count = x.numel() // width
    packed = held.packed
    if packed is not None and not paths.reads_packed(count, packed, width):
        packed = None
    if held.kept is not None and paths.reads_compressed(count):
        return None
    x = blocks.aligned(x)
    size = count * plan.bytes
    made = outputs.empty((size + 8 * count,), torch.uint8, x.device)
    a = made.data_ptr()
    scale, sums = a + size, a + size + 4 * count
    terms, device = plan.terms, x.device.index
    at = (held.scale.data_ptr(), held.sums.data_ptr())
    with ops.device_of(x):
        if paths.has_few_rows(x):
            rows.launch(x, plan.program, plan.kind, count, width, a, scale, sums)
        else:
            blocks.launch(
                x, plan.program, plan.form, plan.bits, count, width, a, scale, 0, sums
            )  # fmt: skip
        # That launch lies between what wrote the weight and these, which makes it settled.
        if packed is not None:
            few.launch(
                y.data_ptr(), a, packed.data_ptr(), count, columns, width,
                packed.shape[1] * 8 // width, device, dtype, terms.factor, terms.length, scale,
                at[0], sums, at[1], bias, True,
            )  # fmt: skip
        else:
            b = None if bias is None else bias.float()
            product.launch(
                y.data_ptr(), a, w.data_ptr(), count, columns, plan.bytes, device, dtype,
                plan.kind == "bits", plan.epilogue, terms.length, terms.factor, scale, at[0],
                0 if b is None else b.data_ptr(), sums if terms.rows else 0,
                at[1] if terms.columns else 0, True,
            )  # fmt: skip
    return y
