"""A frozen layer's forward on Hopper with the least host time, for layers that nothing watches.

In eager mode few tokens take the device less time than checks, operators and tensors take the host.
Here nothing is checked that freezing a weight and `Linear` have settled, and operand, scale and
sums of the input are addresses in one allocation. The kernels and the numbers are those of
`lowbit.operand` and then `lowbit.product` or `packed.packed_product`.

What a second call of a kind launches is recorded, and a call like it (`again`) gives the same
launches the addresses of its input and its output, and does nothing else. Both calls of a thread
share the memory between their kernels with every other on their stream, where one ends before the
next begins.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import grids, operands, ops, paths
from .kernels import outputs, product

if TYPE_CHECKING:
    from .frozen import Frozen

MOST_CALLS = 64  # kinds of calls that are kept for a weight
# Elements of an input whose calls are recorded: with more the device takes longer than the host.
MOST_ELEMENTS = 2**23


class Calls(dict[tuple[object, ...], tuple[Any, Tensor, Tensor | None] | None]):
    """(launches, what y is like, memory between kernels) by kind of call; of no use to a copy.

    None for a kind that was seen once: to record takes as long as a call, and shapes may not recur.

    The memory is held here, too: a thread may end, and another get its number.
    """

    def __reduce__(self) -> tuple[type[Calls], tuple[()]]:
        return Calls, ()


def fits(bias: Tensor | None, x: Tensor, columns: int) -> bool:
    """Whether kernels can read a bias of a layer of so many columns where it lies."""
    return bias is None or (
        type(bias) in (Tensor, torch.nn.Parameter)
        and bias.dtype in ops.DTYPES
        and bias.shape == (columns,)
        and bias.is_contiguous()
        and bias.device == x.device
    )


def _kind(x: Any, bias: Tensor | None) -> tuple[object, ...] | None:
    """What a recorded call depends on besides its weight; None where it is not to be recorded.

    A bias is read where it lies at each call; one that is no tensor of its own is not recorded.
    """
    if not isinstance(x, Tensor):
        return None
    index = x.get_device()
    if (
        not ops.direct(x)
        or index != torch._C._cuda_getDevice()
        or not x.is_contiguous()
        or x.data_ptr() % 16
        or torch._C._cuda_isCurrentStreamCapturing()  # a graph's memory is its own
        or outputs.poisons()
        or product.forced() is not None
        or not paths.allows("integers")
    ):
        return None
    lies: tuple[object, ...] = ()
    if bias is not None:  # as a transform of torch.func, which `ops.direct` sees, has no address
        if not fits(bias, x, bias.numel()):
            return None
        lies = bias.data_ptr(), bias.dtype, bias.shape
    # Outside of autocast a weight of another dtype is an error, which must not be passed over.
    cast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled() else None
    stream = torch._C._cuda_getCurrentRawStream(index)
    return x.shape, x.dtype, index, stream, get_ident(), cast, lies


def again(x: Tensor, held: Frozen, bias: Tensor | None) -> Tensor | None:
    """y (..., out) of x's dtype by launches that were recorded for such an x; None without them.

    Where no gradient is asked for, and x and the bias fit.
    """
    kind = _kind(x, bias) if held.calls else None
    if kind is None or (found := held.calls.get(kind)) is None:
        return None
    launches, like, _ = found
    y = torch.empty_like(like)
    launches.queue(x.data_ptr(), y.data_ptr())
    return y


def recorded(
    x: Tensor, held: Frozen, bias: Tensor | None, run: Callable[[], Tensor | None]
) -> Tensor | None:
    """run(), which is y for x or None; at the second of a kind its launches are kept for `again`.

    Between its kernels it may use no memory but that of `_between`, what the weight holds, and the
    bias.
    """
    from .kernels import cuda
    from .kernels.recorded import Again

    kind = _kind(x, bias) if 0 < x.numel() <= MOST_ELEMENTS else None
    if kind is None:
        return run()
    if kind not in held.calls:
        _keep(held.calls, kind, None)
        return run()
    stream = torch._C._cuda_getCurrentRawStream(x.get_device())
    _memory.shared, _memory.used = True, None
    try:
        with cuda.recording() as taken:
            y = run()
    finally:
        _memory.shared = False
    if y is None:
        return None
    try:
        launches = Again(taken, stream, x.data_ptr(), y.data_ptr())
    except ValueError:  # something was copied or converted on the way
        return y
    # One element, and the shape of all: torch makes a tensor like another sooner than from a shape.
    like = y.new_empty(()).expand(y.shape)
    _keep(held.calls, kind, (launches, like, _memory.used))
    return y


def _keep(
    calls: Calls, kind: tuple[object, ...], call: tuple[Any, Tensor, Tensor | None] | None
) -> None:
    """Put a call in the place of the oldest where there are many."""
    while len(calls) >= MOST_CALLS and kind not in calls:
        calls.pop(next(iter(tuple(calls))), None)
    calls[kind] = call


# Of a thread: `shared`, whether a call is being recorded; `used`, what it got between its kernels;
# and `held`, that memory by device, stream and size.
_memory = threading.local()


def _between(size: int, device: torch.device) -> Tensor:
    """Uninitialised bytes, at least `size`, that the first kernel writes and the second reads."""
    if not getattr(_memory, "shared", False):
        return outputs.empty((size,), torch.uint8, device)
    size = 1 << (size - 1).bit_length()
    key = (device.index, torch._C._cuda_getCurrentRawStream(device.index), size)
    all_ = _memory.__dict__.setdefault("held", {})
    if key not in all_:
        all_[key] = torch.empty(size, dtype=torch.uint8, device=device)
    kept: Tensor = all_[key]
    _memory.used = kept
    return kept


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
    from .kernels import blocks, hopper

    kind, other = kinds.split(",")
    like = torch.empty((1, width), dtype=dtype, device=device)
    program = ops.program(ops.quantizer(spec), like)
    pair = [
        operands.form(grids.parse(name), each)
        for name, each in zip(names.split(","), (kind, other), strict=True)
    ]
    terms = operands.terms(pair[0], pair[1], width)
    whole = {terms.rows, terms.columns} <= {0, 1}  # no sum is to be doubled
    if not (whole and blocks.supports(program, like) and hopper.unavailable(device) is None):
        return None
    form, bits = blocks.OPERANDS[kind]
    return _Plan(
        program, kind, form, bits, width // 8 if kind == "bits" else width, terms,
        hopper.CORRECTED if terms.corrected else hopper.PLAIN,
    )  # fmt: skip


def linear(x: Tensor, held: Frozen, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """y (..., out) of `dtype` for x (..., in) on CUDA; None where there is another way to take.

    held has an operand; bias is contiguous and lies where x does.
    """
    from .kernels import blocks, few, hopper, layout, rows

    width, w = x.shape[-1], held.operand
    plan = _plan(held.spec, held.names, held.kinds, width, x.dtype, x.device)
    if plan is None:
        return None
    assert w is not None
    assert held.scale is not None
    assert held.sums is not None
    columns, count = w.shape[0], x.numel() // width
    form = held.form(count, width)
    if form == "compressed":
        return None
    y = outputs.empty((*x.shape[:-1], columns), dtype, x.device)
    if y.numel() == 0:
        return y
    x = layout.aligned(x)
    size = count * plan.bytes
    made = _between(size + 8 * count, x.device)
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
        if form == "packed":
            packed = held.packed
            assert packed is not None
            few.launch(
                y.data_ptr(), a, packed.data_ptr(), count, columns, width,
                packed.shape[1] * 8 // width, device, dtype, terms.factor, terms.length, scale,
                at[0], sums, at[1], bias, True,
            )  # fmt: skip
        else:
            product.launch(
                y.data_ptr(), a, w.data_ptr(), count, columns, plan.bytes, device, dtype,
                plan.kind == "bits", plan.epilogue, terms.length, terms.factor, scale, at[0],
                0 if bias is None else bias.data_ptr(), sums if terms.rows else 0,
                at[1] if terms.columns else 0, True, hopper.bias_type(bias),
            )  # fmt: skip
    return y
