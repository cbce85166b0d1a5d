"""The layer of few rows on a packed weight in one kernel, as operators.

quest::few_linear(x, w, ...) -> y
quest::few_linear_shown(x, w, ...) -> (y, operand, scale, sums)     with what it multiplied

The same function as `lowbit.encode` and then `packed.packed_product`, for the quantizers that
layers have: Hadamard blocks of 128 and uniform grids. Sums of squares are added in another order
than in `encode`, so a scale may differ from its in the last bit, and where an element lies on a
midpoint its code may too. CPU: these two, in plain PyTorch. CUDA: `quest.kernels.few.linear`.

Functions of a `torch.library.Library`, and not `custom_op`s: calls of few rows are short, and that
wrapper alone takes more host time than the kernel takes on the device.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import grids, lowbit, operands, ops
from .packed import odd, packed_product
from .transforms import Hadamard

if TYPE_CHECKING:
    from .kernels.few import Grid
    from .quantizer import Quantizer

ORDER = 128
_ARGUMENTS = (
    "(Tensor x, Tensor w, Tensor w_scale, Tensor w_sums, Tensor? bias, str activation, "
    "str weight_grid, ScalarType dtype, bool settled)"
)
_library: Any = torch.library.Library("quest", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _results in (
    ("few_linear", "Tensor"),
    ("few_linear_shown", "(Tensor, Tensor, Tensor, Tensor)"),
):
    _library.define(f"{_name}{_ARGUMENTS} -> {_results}", tags=(torch.Tag.pt2_compliant_tag,))


@functools.lru_cache(maxsize=256)
def pairs(activation: Quantizer, weight: grids.Grid) -> str | None:
    """The kind of both operands where the kernel has them: "bits" or "integers"; None otherwise."""
    grid, transform = activation.grid, activation.transform
    blocks = transform.block if isinstance(transform, Hadamard) else 0
    if grid is None or activation.sparsity is not None or blocks not in (None, ORDER):
        return None
    if grid.step is not None and grid.levels == weight.levels == 2:
        return "bits"
    # Codes of 2^16 entries, of which one block is not 0, are 2^8 / step at the most, and fit 16
    # bits. From about 1.001 on, what a block is multiplied with may be 2^-150 or less, and so 0,
    # where others are 2^146 times as large; below 1 there is room for its roundings.
    fits = grid.step is not None and 2.0**-6 <= grid.step < 1
    return "integers" if fits and odd(grid) and odd(weight) else None


@functools.lru_cache(maxsize=256)
def _parts(activation: str, weight_grid: str) -> tuple[str, int, float, Grid, int]:
    """(kind, bits of the weight's codes, factor, the grid of the rows, the spread of theirs).

    The kernel multiplies what `operands.Form` spreads as it was before; factor: the product of both
    units of that.
    """
    from .kernels.few import Grid

    q, weight = ops.quantizer(activation), grids.parse(weight_grid)
    kind = pairs(q, weight)
    if kind is None:
        raise ValueError(
            "one kernel quantizes and multiplies in Hadamard blocks of 128, with 1 bit on both "
            "sides or uniform grids of 2 and 4 bits, that of the input with a step from 2^-6 and "
            f"below 1, got {activation!r} and {weight_grid!r}"
        )
    grid = q.require_grid()
    assert grid.step is not None  # `pairs` has seen it
    forms = operands.form(grid, kind), operands.form(weight, kind)
    factor = math.prod(form.unit * form.spread for form in forms)
    # Of bits the signs alone count: any step that the kernel has will do.
    step = 0.5 if kind == "bits" else grid.step
    return kind, weight.storage_bits, factor, Grid(grid.levels, step), forms[0].spread


def _check(
    x: Tensor, w: Tensor, w_scale: Tensor, w_sums: Tensor, bias: Tensor | None, bits: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Raise ValueError or TypeError where an argument is not what the rest asks for."""
    ops.check_input(x)
    width = x.shape[-1]
    if width % ORDER:
        raise ValueError(f"x must have rows of a multiple of {ORDER} entries, got {width}")
    if w.ndim != 2 or w.dtype != torch.uint8 or w.shape[1] * 8 != width * bits:
        raise ValueError(
            f"w must be uint8 of shape (out, {width * bits // 8}) for {bits} bits and width "
            f"{width}, got {w.dtype} of shape {tuple(w.shape)}"
        )
    if x.device != w.device:
        raise ValueError(f"x must lie where w lies, {w.device}; got {x.device}")
    columns = w.shape[0]
    lowbit.check_vector("w_scale", w_scale, torch.float32, (columns, 1), w)
    lowbit.check_vector("w_sums", w_sums, torch.int32, (columns, 1), w)
    if bias is not None:
        ops.check_input(bias, "bias")
        lowbit.check_vector("bias", bias, bias.dtype, (columns,), w)
    if dtype not in ops.DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")


def _on_cpu(
    x: Tensor, w: Tensor, w_scale: Tensor, w_sums: Tensor, bias: Tensor | None, activation: str,
    weight_grid: str, dtype: torch.dtype, settled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    kind, bits, *_ = _parts(activation, weight_grid)
    _check(x, w, w_scale, w_sums, bias, bits, dtype)
    width = x.shape[-1]
    a, scale, _, sums = lowbit.encode(lowbit.as_rows(x), activation, kind)
    names = f"{ops.quantizer(activation).require_grid().name},{weight_grid}"
    y = packed_product(
        a, w, scale, w_scale, sums, w_sums, bias, names, f"{kind},{kind}", width, dtype
    )
    lead = x.shape[:-1]
    return tuple(t.reshape(*lead, t.shape[-1]) for t in (y, a, scale, sums))


def _on_cuda(
    x: Tensor, w: Tensor, w_scale: Tensor, w_sums: Tensor, bias: Tensor | None, activation: str,
    weight_grid: str, dtype: torch.dtype, settled: bool, show: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    from .kernels import few

    bits = _parts(activation, weight_grid)[1]
    _check(x, w, w_scale, w_sums, bias, bits, dtype)
    lowbit.require_product(x.device)
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    if rows and not few.quantizes(x.dtype, rows, width, bits):
        raise ValueError(
            f"one kernel quantizes and multiplies up to {few.LIMIT} rows of bfloat16 or float16 "
            f"that fit shared memory, got {rows} of {width} entries of {x.dtype}"
        )
    return _launch(
        x, w, w_scale.contiguous(), w_sums.contiguous(),
        None if bias is None else bias.contiguous(), activation, weight_grid, dtype, settled, show,
    )  # fmt: skip


def _launch(
    x: Tensor, w: Tensor, w_scale: Tensor, w_sums: Tensor, bias: Tensor | None, activation: str,
    weight_grid: str, dtype: torch.dtype, settled: bool, show: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    from .kernels import few

    _, bits, factor, grid, spread = _parts(activation, weight_grid)
    with ops.device_of(x):
        y, a, scale, sums = few.linear(
            x, w, bits, dtype, grid=grid, factor=factor, w_scale=w_scale, w_sum=w_sums, bias=bias,
            settled=settled, show=show,
        )  # fmt: skip
        if show:
            a, sums = (None if t is None else spread * t for t in (a, sums))
        return y, a, scale, sums


def unchecked(
    x: Tensor, w: Tensor, w_scale: Tensor, w_sums: Tensor, bias: Tensor | None, activation: str,
    weight_grid: str, dtype: torch.dtype, settled: bool,
) -> Tensor:  # fmt: skip
    """`few_linear` on CUDA for arguments that are known to fit, contiguous vectors among them.

    Checking and dispatching them takes longer than the kernel.
    """
    return _launch(
        x, w, w_scale, w_sums, bias, activation, weight_grid, dtype, settled, False
    )[0]  # fmt: skip


def _fake(
    x: Tensor, w: Tensor, w_scale: Tensor, w_sums: Tensor, bias: Tensor | None, activation: str,
    weight_grid: str, dtype: torch.dtype, settled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    kind, bits, *_ = _parts(activation, weight_grid)
    _check(x, w, w_scale, w_sums, bias, bits, dtype)
    lead, width = x.shape[:-1], x.shape[-1]
    small, a = (width // 8, torch.uint8) if kind == "bits" else (width, torch.int8)
    return (
        x.new_empty((*lead, w.shape[0]), dtype=dtype),
        x.new_empty((*lead, small), dtype=a),
        x.new_empty((*lead, 1), dtype=torch.float32),
        x.new_empty((*lead, 1), dtype=torch.int32),
    )


_library.impl("few_linear", lambda *arguments: _on_cpu(*arguments)[0], "CPU")
_library.impl("few_linear", lambda *arguments: _on_cuda(*arguments)[0], "CUDA")
_library.impl("few_linear_shown", _on_cpu, "CPU")
_library.impl("few_linear_shown", functools.partial(_on_cuda, show=True), "CUDA")
torch.library.register_fake(
    "quest::few_linear", lambda *arguments: _fake(*arguments)[0], lib=_library
)
torch.library.register_fake("quest::few_linear_shown", _fake, lib=_library)


def few_linear(
    x: Tensor, w: Tensor, w_scale: Tensor, w_sums: Tensor, bias: Tensor | None, activation: str,
    weight_grid: str, dtype: torch.dtype, settled: bool = False,
) -> Tensor:  # fmt: skip
    """y (..., out) of `dtype` = Q(x H) values(w)^T + bias, without a gradient.

    x (..., in), `in` a multiple of 128: on CUDA at most 64 rows of bfloat16 or float16. w (out, in
    bits / 8) uint8: codes of 1, 2 or 4 bits as `Quantizer.pack` makes them, on `weight_grid`;
    w_scale (out, 1) float32 and w_sums (out, 1) int32 as `lowbit.encode` makes them. bias (out,).
    activation: the spec of the quantizer of x. settled: see `quest.kernels.few.linear`; False is
    always right.
    """
    y: Tensor = torch.ops.quest.few_linear.default(
        x, w, w_scale, w_sums, bias, activation, weight_grid, dtype, settled
    )
    return y


def few_linear_shown(
    x: Tensor, w: Tensor, w_scale: Tensor, w_sums: Tensor, bias: Tensor | None, activation: str,
    weight_grid: str, dtype: torch.dtype, settled: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`few_linear` with the operand of x, its scale and sums as `lowbit.encode` gives them."""
    found: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.quest.few_linear_shown.default(
        x, w, w_scale, w_sums, bias, activation, weight_grid, dtype, settled
    )
    return found
