"""A frozen layer's forward on Hopper with the least host time, for layers that nothing watches.

In eager mode few tokens take the device less time than checks, operators and tensors take the host.
Here nothing is checked that freezing a weight and `Linear` have settled, and operand, scale and
sums of the input are addresses in one allocation. The kernels and the numbers are those of
`lowbit.operand`, or of a prologue's operator, and then `lowbit.product` or `packed.packed_product`.

What a second call of a kind launches is recorded, and a call like it (`again`) gives the same
launches the addresses of its inputs and its outputs, and does nothing else. All recorded calls of a
thread and a stream share the memory between their kernels: there one ends before the next begins
(or a quantizer that began early, while it is recorded, goes on).

`linear` is the layer, to which a residual may be added; `behind` the layer behind a gate or a norm
(see `prologue`). The rotary embedding may turn what comes out of either.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import grids, operands, ops, paths
from .kernels import outputs, product

if TYPE_CHECKING:
    from .frozen import Frozen

# Kinds of calls that are kept for a weight, each with one graph or two of up to 0.1 MB of the
# device's memory.
MOST_CALLS = 64
MOST_STREAMS = 64  # whose memory for joined biases is kept
# Elements of an input whose calls are recorded: with more the device takes longer than the host.
MOST_ELEMENTS = 2**23


Call = tuple[Any, tuple[Tensor, ...], tuple[Tensor | None, ...]]


class Told(NamedTuple):
    """How a call is made of its inputs, which their number does not say.

    eps: of a norm. gate: whether the product ends in one. added: whether the last input is added to
    what the layer makes of the first. turned: how many columns of that are turned, by angles that
    are the last two inputs.
    """

    eps: float | None = None
    gate: bool = False
    added: bool = False
    turned: int = 0


PLAIN = Told()


def how(eps: float | None, gate: bool, added: bool, rotary: product.Turned | None) -> Told:
    """How a call with `inputs` is made of them."""
    return Told(eps, gate, added, 0 if rotary is None else rotary.columns)


def inputs(xs: tuple[Tensor, ...], rotary: product.Turned | None) -> tuple[Tensor, ...]:
    """What a call reads that may lie elsewhere in the next one: xs, and the angles behind them."""
    return xs if rotary is None else (*xs, rotary.cos, rotary.sin)


class Calls(dict[tuple[object, ...], Call | None]):
    """(launches, what comes out, memory) by kind of call; of no use to a copy.

    Of what comes out each has the dtype, the device and the shape, and memory for one element. The
    memory is that between kernels, and that of joined biases.

    None for a kind that was seen once: to record takes as long as a call, and shapes may not recur.
    NEVER for one that can't be recorded.

    It is held here, too: a thread may end, and another get its number; and no other biases are
    joined at an address to which a call copies its own.
    """

    def __reduce__(self) -> tuple[type[Calls], tuple[()]]:
        return Calls, ()


NEVER: Call = None, (), ()


Like = tuple[tuple[torch.dtype, torch.Size, int, bool], ...]


class Joined(dict[int, tuple[Like, Tensor]]):
    """Memory for the biases of layers whose weights lie stacked, by stream; of no use to a copy.

    (of which biases, the memory). Recorded launches read them there, joined anew before each. Of a
    stream, because no other waits until they are written.
    """

    def __reduce__(self) -> tuple[type[Joined], tuple[()]]:
        return Joined, ()

    def room(self, biases: list[Tensor], x: Tensor, stay: bool = True) -> Tensor | None:
        """Where these lie once they are joined (out,), for an input on CUDA: always the same.

        None where something watches, or they can't lie there. stay: they are parameters, and none
        was made for this call.
        """
        if not keeps(x) or any(type(b) not in ops.OWN or b.device != x.device for b in biases):
            return None
        like = tuple(
            (b.dtype, b.shape, b.data_ptr() if stay else 0, stay and b.is_contiguous())
            for b in biases
        )
        stream = torch._C._cuda_getCurrentRawStream(x.get_device())
        found = self.get(stream)
        if found is None or found[0] != like:
            dtype = functools.reduce(torch.promote_types, (b.dtype for b in biases))
            count = sum(b.numel() for b in biases)
            if len(self) >= MOST_STREAMS:
                self.clear()
            with torch.inference_mode(False):  # what is made there can't be written elsewhere
                found = like, torch.empty(count, dtype=dtype, device=x.device)
            self[stream] = found
        return found[1]

    def copies(self, room: Tensor | None) -> list[tuple[int, int, int]]:
        """(to, from, bytes) of each bias in that memory; none where they are more than copied.

        As for another memory than what `room` has given for a stream.
        """
        made: list[tuple[int, int, int]] = []
        for like, memory in self.values() if room is not None else ():
            if memory is room and all(t == memory.dtype and whole for t, _, _, whole in like):
                to = memory.data_ptr()
                for _, shape, address, _ in like:
                    made.append((to, address, shape.numel() * memory.element_size()))
                    to += made[-1][2]
        return [each for each in made if each[2]]


class State(tuple[object, ...]):
    """What `state` said; of no use to a copy, since another may lie at that address by then."""

    __slots__ = ()

    def __reduce__(self) -> tuple[type[State], tuple[()]]:
        return State, ()


def state(t: Tensor) -> tuple[object, ...]:
    """What changes where a tensor is written in place, moved, converted or looked at otherwise.

    Not its device: no two have an address in common.
    """
    version = None if t.is_inference() else t._version
    return version, t.data_ptr(), t.dtype, t.shape, t.stride()


def keeps(x: Tensor) -> bool:
    """Whether memory that calls share may be made and used for x: nothing watches or captures."""
    return (
        ops.direct(x)
        and x.get_device() == torch._C._cuda_getDevice()
        and not torch._C._cuda_isCurrentStreamCapturing()
    )


def fits(t: Tensor | None, x: Tensor, columns: int) -> bool:
    """Whether kernels can read a bias of so many columns, or a norm's weight, where it lies."""
    return t is None or (
        type(t) in ops.OWN
        and t.dtype in ops.DTYPES
        and t.shape == (columns,)
        and t.is_contiguous()
        and t.device == x.device
    )


def _kind(
    xs: Sequence[Any], reads: Sequence[Tensor | None], told: Told
) -> tuple[object, ...] | None:
    """What a recorded call depends on besides its weight; None where it is not to be recorded.

    xs: inputs, at least one. reads: a bias, or a norm's weight, which is read where it lies at each
    call; one that is no tensor of its own is not recorded.
    """
    kind: list[object] = []
    for x in xs:
        if not ops.direct(x) or x.data_ptr() % 16:
            return None
        kind += x.shape, x.stride(), x.dtype, x.get_device()
    index = xs[0].get_device()
    if (
        index != torch._C._cuda_getDevice()
        or torch._C._cuda_isCurrentStreamCapturing()  # a graph's memory is its own
        or outputs.poisons()
        or product.forced() is not None
        or not paths.allows("integers")
    ):
        return None
    for t in reads:
        if t is not None:  # as a transform of torch.func, which `ops.direct` sees, has no address
            if not fits(t, xs[0], t.numel()):
                return None
            kind += t.data_ptr(), t.dtype, t.shape
    # Outside of autocast a weight of another dtype is an error, which must not be passed over.
    cast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled() else None
    kind += torch._C._cuda_getCurrentRawStream(index), get_ident(), cast, told
    return tuple(kind)


def again(
    held: Frozen, xs: Sequence[Any], reads: Sequence[Tensor | None], told: Told = PLAIN,
    before: Callable[[], object] | None = None,
) -> tuple[Tensor, ...] | None:  # fmt: skip
    """What comes out, by launches that were recorded for such inputs; None without them.

    Where no gradient is asked for, and xs and what is read fit; see `_kind`. before: called where
    there are launches without copies of their own, to queue what they wait for.
    """
    kind = _kind(xs, reads, told) if held.calls else None
    found = None if kind is None else held.calls.get(kind)
    if found is None or found is NEVER:
        return None
    launches, likes, _ = found
    if before is not None and not launches.copies:
        before()
    made = [torch.empty_like(like) for like in likes]
    launches.queue(*[t.data_ptr() for t in (*xs, *made)])
    return tuple(made)


def recorded(
    held: Frozen, xs: Sequence[Tensor], reads: Sequence[Tensor | None],
    run: Callable[[], tuple[Tensor, ...] | None], told: Told = PLAIN,
) -> tuple[Tensor, ...] | None:  # fmt: skip
    """run(), what comes out or None; at the second of a kind its launches are kept for `again`.

    Between its kernels it may use no memory but that of `_between`, what the weight holds, and what
    it reads. Inputs whose rows lie apart are recorded where kernels read them there.
    """
    from .kernels import cuda
    from .kernels.recorded import Again

    small = 0 < xs[0].numel() <= MOST_ELEMENTS
    kind = _kind(xs, reads, told) if small and all(map(_in_rows, xs)) else None
    if kind is None:
        return run()
    if (known := held.calls.get(kind, False)) is not None:
        if known is False:
            _keep(held.calls, kind, None)
        return run()
    stream = torch._C._cuda_getCurrentRawStream(xs[0].get_device())
    _memory.shared, _memory.used = True, None
    try:
        with cuda.recording() as taken:
            made = run()
    finally:
        _memory.shared = False
    if made is None:
        return None
    room = reads[0] if reads else None
    copies = held.biases.copies(room)
    try:
        launches = Again(taken, stream, *(t.data_ptr() for t in (*xs, *made)), copies=copies)
    except ValueError:  # something was copied or converted on the way, or is given twice
        _keep(held.calls, kind, NEVER)
        return made
    # One element, and the shape of all: torch makes a tensor like another sooner than from a shape.
    likes = tuple(t.new_empty(()).expand(t.shape) for t in made)
    _keep(held.calls, kind, (launches, likes, (_memory.used, room if copies else None)))
    return made


def _in_rows(x: Tensor) -> bool:
    """Whether rows of x (..., d) are a view of it, each in one piece and at 16 bytes."""
    if x.is_contiguous():
        return True
    try:
        rows = x.view(-1, x.shape[-1])
    except RuntimeError:
        return False
    return rows.stride(1) == 1 and rows.stride(0) * x.element_size() % 16 == 0


def _keep(calls: Calls, kind: tuple[object, ...], call: Call | None) -> None:
    """Put a call in the place of the oldest where there are many; of one seen once, if any."""
    while len(calls) >= MOST_CALLS and kind not in calls:
        there = tuple(calls.items())
        oldest = next((known for known, held in there if held is None), there[0][0])
        calls.pop(oldest, None)
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
    whether sums of rows and columns count: of the product. spread: of the weight's operand, see
    `operands.Form`; its packed codes have none.
    """

    program: Any
    kind: str
    form: int
    bits: int
    bytes: int
    terms: operands.Terms
    epilogue: int
    spread: int


@functools.lru_cache(maxsize=1024)
def _plan(
    spec: str, names: str, kinds: str, width: int, dtype: torch.dtype, device: torch.device
) -> _Plan | None:
    """None where these kernels don't do it."""
    from .kernels import blocks, forms, hopper

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
    form, bits = forms.OPERANDS[kind]
    return _Plan(
        program, kind, form, bits, width // 8 if kind == "bits" else width, terms,
        hopper.CORRECTED if terms.corrected else hopper.PLAIN, pair[1].spread,
    )  # fmt: skip


def linear(
    x: Tensor, held: Frozen, bias: Tensor | None, dtype: torch.dtype, gate: bool = False,
    residual: Tensor | None = None, rotary: product.Turned | None = None,
) -> tuple[Tensor] | None:  # fmt: skip
    """(y,), y (..., out) of `dtype` for x (..., in) on CUDA; None where there is another way.

    held has an operand; bias is contiguous and lies where x does. gate, residual, rotary: as in
    `frozen.linear`.
    """
    from .kernels import blocks, layout

    made = _room(x, held, dtype, gate)
    if made is None:
        return None
    y, plan, n, a, scale, sums, _ = made
    if y.numel():
        x, width = layout.aligned(x), x.shape[-1]
        # A copy has an address that no recorded call knows: such a call is made anew each time.
        residual = None if residual is None else layout.aligned(residual)
        with ops.device_of(x):
            blocks.launch(x, plan.program, plan.form, plan.bits, n, width, a, scale, 0, sums)
            _multiply(made, held, bias, width, gate, residual, rotary)
    return (y,)


def behind(
    xs: tuple[Tensor, ...], held: Frozen, bias: Tensor | None,
    norm: tuple[Tensor, float] | None = None, gate: bool = False,
    rotary: product.Turned | None = None,
) -> tuple[Tensor, ...] | None:  # fmt: skip
    """y (..., out) of a layer behind a prologue, in xs's dtype; None where there is another way.

    Without a norm (y,), xs being a gate and a value; with its weight and eps (y,) for xs (x,), and
    (y, h) for x and a residual. gate, rotary: as in `frozen.linear`. For all of them
    `prologue.has_kernel` is to hold, and `fits` for the bias and the norm's weight.
    """
    weight, eps = (None, None) if norm is None else norm
    reads, told, given = (bias, weight), how(eps, gate, False, rotary), inputs(xs, rotary)
    made = again(held, given, reads, told)
    if made is None:
        run = functools.partial(_behind, xs, held, bias, weight, eps, gate, rotary)
        made = recorded(held, given, reads, run, told)
    return made


def _behind(
    xs: tuple[Tensor, ...], held: Frozen, bias: Tensor | None, weight: Tensor | None,
    eps: float | None, gate: bool, rotary: product.Turned | None,
) -> tuple[Tensor, ...] | None:  # fmt: skip
    from .kernels import blocks, cuda

    x, alone = xs[0], len(xs) == 1
    width = x.shape[-1]
    made = _room(x, held, x.dtype, gate)
    # Without columns nothing is launched, and a sum with a residual is to be made all the same.
    if made is None or (x.numel() and not made.y.numel()):
        return None
    y, plan, _, a, scale, sums, _ = made
    prologue, h = blocks.GATED, None
    if weight is not None:
        prologue = blocks.NORMED if alone else blocks.ADDED
        h = None if alone else outputs.empty(x.shape, x.dtype, x.device)
    if y.numel():
        rows = [t.reshape(-1, width) for t in xs]
        with ops.device_of(x):
            blocks.launch_prologue(
                rows[0], None if alone else rows[1], plan.program, plan.form, plan.bits, prologue,
                a, scale, sums, cuda.pointer(h), weight, eps or 0.0,
            )  # fmt: skip
            _multiply(made, held, bias, width, gate, rotary=rotary)
    return (y,) if h is None else (y, h)


class _Room(NamedTuple):
    """y, of which kernels, for so many rows; and addresses of their operand, scale and sums.

    memory: where these lie. Let go before the last launch is queued, it would be given to another.
    """

    y: Tensor
    plan: _Plan
    rows: int
    operand: int
    scale: int
    sums: int
    memory: Tensor


def _room(x: Tensor, held: Frozen, dtype: torch.dtype, gate: bool) -> _Room | None:
    """For x (..., in); None where these kernels don't do it."""
    width, w = x.shape[-1], held.operand
    plan = _plan(held.spec, held.names, held.kinds, width, x.dtype, x.device)
    if plan is None:
        return None
    assert w is not None
    n = x.numel() // width
    if held.form(n, width) == "compressed":
        return None
    y = outputs.empty((*x.shape[:-1], w.shape[0] // (1 + gate)), dtype, x.device)
    size = n * plan.bytes
    memory = _between(size + 8 * n, x.device)
    a = memory.data_ptr()
    return _Room(y, plan, n, a, a + size, a + size + 4 * n, memory)


def _multiply(
    made: _Room, held: Frozen, bias: Tensor | None, width: int, gate: bool,
    residual: Tensor | None = None, rotary: product.Turned | None = None,
) -> None:  # fmt: skip
    """Launch the product that writes y. residual, rotary: where `Frozen.adds` and `turns`."""
    from .kernels import cuda, few, hopper

    y, plan, n, a, scale, sums, _ = made
    w, packed, terms, device = held.operand, held.packed, plan.terms, y.device.index
    assert w is not None
    assert held.scale is not None
    assert held.sums is not None
    columns, at = y.shape[-1], (held.scale.data_ptr(), held.sums.data_ptr())
    # Settled: `freeze` and `stack` queue another kernel after those that write the weight.
    if held.form(n, width) == "packed":
        assert packed is not None
        assert residual is None  # `Frozen.adds` and `turns` are of the operand's product
        assert rotary is None
        few.launch(
            y.data_ptr(), a, packed.data_ptr(), n, columns, width,
            packed.shape[1] * 8 // width, device, y.dtype, terms.factor * plan.spread,
            terms.length, scale, at[0], sums, at[1], bias, True,
        )  # fmt: skip
    else:
        product.launch(
            y.data_ptr(), a, w.data_ptr(), n, columns, plan.bytes, device, y.dtype,
            plan.kind == "bits", plan.epilogue, terms.length, terms.factor, scale, at[0],
            0 if bias is None else bias.data_ptr(), sums if terms.rows else 0,
            at[1] if terms.columns else 0, True, hopper.bias_type(bias), gate,
            cuda.pointer(residual), rotary,
        )  # fmt: skip
