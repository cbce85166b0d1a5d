"""Lanes: one implementation of the operators on one device each.

A lane runs a stage on tensors and gives back what it wrote, on the CPU. Every call is guarded: it
runs twice, with outputs poisoned by two different bytes, and fails unless both runs agree bit for
bit (nothing unwritten, deterministic) and the inputs' storage is untouched, gaps included.

Triton's interpreter has to be chosen before Triton is imported, so its lane lives in a process of
its own (`worker`); everything else about it is the same.
"""

from __future__ import annotations

import atexit
import functools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

if TYPE_CHECKING:
    from quest.linear import Linear

Outputs = dict[str, Tensor]
POISON = (0xFF, 0x55)


class GuardError(AssertionError):
    """A lane broke a rule that holds for every operator, whatever it computes."""


@dataclass(frozen=True)
class Lane:
    """An implementation on a device.

    backend: "dispatch" (the registered operators), "eager" (plain PyTorch) or "launch" (the
    kernels' launchers). remote: runs in a process with Triton's interpreter.
    """

    name: str
    device: str
    backend: str
    remote: bool = False

    def call(self, stage: str, *tensors: Tensor, **static: Any) -> Outputs:
        """The outputs of a stage, guarded; raises GuardError, or what the stage raises."""
        if self.remote:
            return _interpreter().call(self, stage, tensors, static)
        return run(self, stage, tensors, static)

    def supports(self, stage: str, static: dict[str, Any]) -> bool:
        """Whether the lane has an implementation of its own for this call."""
        if self.backend != "dispatch" and (stage == "frozen" or static.get("path") == "integers"):
            return False  # the layer of the other lanes is composed, of values
        products = (
            "accumulate", "product", "added_product", "gated_product", "rotated_product",
            "sparse_product",
        )  # fmt: skip
        if stage in products or static.get("path") == "integers":
            return self.backend != "launch" and no_product(self) is None
        q = static.get("q")
        if self.backend == "launch" and q is not None and q.sparsity is not None:
            from quest.kernels.quantize import GROUP_UNITS
            from quest.sparsity import Pairwise

            return q.sparsity.m // (2 if isinstance(q.sparsity, Pairwise) else 1) in GROUP_UNITS
        return True

    def __str__(self) -> str:
        return self.name


def all_lanes() -> tuple[Lane, ...]:
    """Every lane there is."""
    return (
        Lane("torch-cpu", "cpu", "dispatch"),
        Lane("triton-interpreter", "cpu", "launch", remote=True),
        Lane("torch-cuda", "cuda", "eager"),
        Lane("triton-cuda", "cuda", "dispatch"),
    )


def missing(lane: Lane) -> str | None:
    """Why a lane can't run on this machine; None where it can."""
    if lane.device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    if lane.remote or lane.name == "triton-cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "Triton is not installed"
    return None


def no_product(lane: Lane) -> str | None:
    """Why a lane that runs here has no integer product; None where it has one."""
    if lane.backend == "launch":
        return "the low-bit product is CUDA C++, which Triton's interpreter can't run"
    if lane.name != "triton-cuda":
        return None
    from quest.kernels.hopper import unavailable

    return unavailable(torch.device("cuda"))


def transfer(t: Tensor, device: str) -> Tensor:
    """t on `device` with its strides, offset and gaps; a copy of the whole storage."""
    flat = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return flat.to(device, copy=True).as_strided(t.size(), t.stride(), t.storage_offset())


def _bytes(t: Tensor) -> bytes:
    flat = torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())
    return flat.cpu().numpy().tobytes()


def run(lane: Lane, stage: str, tensors: tuple[Tensor, ...], static: dict[str, Any]) -> Outputs:
    """`Lane.call` in this process."""
    from quest.kernels import outputs

    made = functools.partial(_STAGES[stage], lane, **static)
    return guarded(f"{lane} {stage}", lane.device, made, tensors, outputs.poisoned)


def guarded(
    told: str,
    device: str,
    function: Callable[..., Outputs],
    tensors: tuple[Tensor, ...],
    poisoned: Callable[[int], AbstractContextManager[None]],
    deterministic: bool = True,
) -> Outputs:
    """What `function` makes of copies of the tensors; GuardError. told: names it in messages.

    poisoned: fills fresh memory with a byte while entered. deterministic: both runs must agree.
    """
    first: Outputs = {}
    for byte in POISON:
        inputs = tuple(transfer(t, device) for t in tensors)
        before = [_bytes(t) for t in inputs]
        with poisoned(byte), full_sums():
            made = function(*inputs)
        for i, (t, b) in enumerate(zip(inputs, before, strict=True)):
            if _bytes(t) != b:
                raise GuardError(f"{told}: input {i} was changed")
        for name, t in made.items():
            if t.device.type != device:
                raise GuardError(f"{told}: {name} is on {t.device}, not {device}")
        made = {k: v.detach().cpu().contiguous() for k, v in made.items()}
        for name, t in first.items():
            if deterministic and _bytes(t) != _bytes(made[name]):
                why = "part of it was never written, or the result is not deterministic"
                raise GuardError(
                    f"{told}: {name} differs between two runs on the same inputs: {why}"
                )
        first = made
    return first


@contextmanager
def full_sums() -> Iterator[None]:
    """torch's own products of 16 bits keep their partial sums in float32.

    By default cuBLAS may round those of a split K to 16 bits, which no bound of ours allows.
    """
    allowed = torch.backends.cuda.matmul
    before = (
        allowed.allow_bf16_reduced_precision_reduction,
        allowed.allow_fp16_reduced_precision_reduction,
    )
    allowed.allow_bf16_reduced_precision_reduction = False
    allowed.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        (
            allowed.allow_bf16_reduced_precision_reduction,
            allowed.allow_fp16_reduced_precision_reduction,
        ) = before


@functools.cache
def operators(backend: str) -> Any:
    """The functions of a backend by operator name."""
    from quest import (
        compression,
        eager,
        gated_product,
        lowbit,
        ops,
        prologue,
        rotated_product,
        sparse_product,
    )

    if backend == "dispatch":
        return SimpleNamespace(
            compress=compression.compress,
            gated_encode=prologue.gated_encode,
            gated_encode_shown=prologue.gated_encode_shown,
            normed_encode=prologue.normed_encode,
            normed_encode_shown=prologue.normed_encode_shown,
            encode=lambda x, q, kind: lowbit.encode(x, q.spec, kind),
            operand=lambda x, q, kind: lowbit.operand(x, q.spec, kind),
            pack_operand=lambda a, q: lowbit.pack_operand(a, q.spec),
            decode=lambda a, scale, q, *rest: lowbit.decode(a, scale, q.spec, *rest),
            accumulate=lowbit.accumulate,
            product=lowbit.product,
            gated_product=gated_product.gated_product,
            rotated_product=rotated_product.rotated_product,
            sparse_product=sparse_product.sparse_product,
            hadamard=ops.hadamard,
            masked_transpose=ops.masked_transpose,
            fake_quantize=lambda x, q: ops.fake_quantize(x, q.spec),
            quantize=lambda x, q, packed: ops.quantize(x, q.spec, packed),
        )
    if backend not in ("eager", "launch"):
        raise ValueError(f"there is no backend {backend!r}")
    functions = (
        (
            eager.hadamard, eager.masked_transpose, eager.quantize, eager.encode, eager.decode,
            compression.eager_compress, lowbit.eager_operand, eager.pack_operand,
            prologue.eager_gated_encode, prologue.eager_normed_encode,
        )
        if backend == "eager"
        else (
            ops.launch_hadamard, ops.launch_masked_transpose, ops.launch_quantize,
            lowbit.launch_encode, lowbit.launch_decode, compression.launch_compress,
            lowbit.launch_operand, lowbit.launch_pack,
            functools.partial(prologue.launch_gated_encode, show=True),
            functools.partial(prologue.launch_normed_encode, show=True),
        )
    )  # fmt: skip
    return SimpleNamespace(
        compress=functions[5],
        gated_encode=lambda *arguments: functions[8](*arguments)[:3],
        gated_encode_shown=functions[8],
        normed_encode=lambda *arguments: functions[9](*arguments)[:4],
        normed_encode_shown=functions[9],
        encode=functions[3],
        operand=functions[6],
        pack_operand=functions[7],
        decode=functions[4],
        accumulate=eager.accumulate,
        product=lowbit.eager_product,
        gated_product=gated_product.eager_gated_product,
        rotated_product=rotated_product.eager_rotated_product,
        sparse_product=sparse_product.eager_sparse_product,
        hadamard=functions[0],
        masked_transpose=functions[1],
        fake_quantize=lambda x, q: functions[2](x, q, values=True, codes=False, packed=True)[::3],
        quantize=lambda x, q, packed: functions[2](x, q, values=False, codes=True, packed=packed)[
            1:
        ],
    )


def _hadamard(lane: Lane, x: Tensor, *, order: int, transpose: bool) -> Outputs:
    return {"y": operators(lane.backend).hadamard(x, order, transpose)}


def _quantize(lane: Lane, x: Tensor, *, q: Any, packed: bool = False) -> Outputs:
    codes, scale, mask, keep = operators(lane.backend).quantize(x, q, packed)
    return {"codes": codes, "scale": scale, "mask": mask, "keep": keep}


def _fake_quantize(lane: Lane, x: Tensor, *, q: Any) -> Outputs:
    values, mask = operators(lane.backend).fake_quantize(x, q)
    return {"values": values, "mask": mask}


def _masked_transpose(lane: Lane, grad: Tensor, mask: Tensor, *, order: int) -> Outputs:
    return {"dx": operators(lane.backend).masked_transpose(grad, mask, order)}


def _encode(lane: Lane, x: Tensor, *, q: Any, kind: str) -> Outputs:
    names = ("operand", "scale", "mask", "sums")
    return dict(zip(names, operators(lane.backend).encode(x, q, kind), strict=True))


def _operand(lane: Lane, x: Tensor, *, q: Any, kind: str) -> Outputs:
    names = ("operand", "scale", "sums")
    return dict(zip(names, operators(lane.backend).operand(x, q, kind), strict=True))


def _gated(lane: Lane, gate: Tensor, value: Tensor, *, q: Any, kind: str) -> Outputs:
    """What is made of silu(gate) * value, which is shown; nothing may change where it is not."""
    f = operators(lane.backend)
    pair = f.gated_encode_shown, f.gated_encode
    return _prologue(lane, pair, ("operand", "scale", "sums", "x"), gate, value, q.spec, kind)


def _normed(
    lane: Lane, x: Tensor, weight: Tensor, *residual: Tensor, q: Any, kind: str, eps: float
) -> Outputs:
    """What is made of the norm of x, or of residual + x, which is shown, too."""
    f = operators(lane.backend)
    names, added = ("operand", "scale", "sums", "h", "x"), residual[0] if residual else None
    pair = f.normed_encode_shown, f.normed_encode
    return _prologue(lane, pair, names, x, added, weight, eps, q.spec, kind)


def _prologue(
    lane: Lane,
    pair: tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]],
    names: tuple[str, ...],
    *arguments: Any,
) -> Outputs:
    """The outputs of the first, by name; the second makes all but the last."""
    made = dict(zip(names, pair[0](*arguments), strict=True))
    for name, t in zip(names[:-1], pair[1](*arguments), strict=True):
        if _bytes(t) != _bytes(made[name]):
            raise GuardError(f"{lane}: {name} is another where the rows of a prologue are shown")
    return made


def _decode(lane: Lane, operand: Tensor, scale: Tensor, *, q: Any, **static: Any) -> Outputs:
    f = operators(lane.backend).decode
    return {"values": f(operand, scale, q, static["kind"], static["width"], static["dtype"])}


def _pack_operand(lane: Lane, operand: Tensor, *, q: Any) -> Outputs:
    return {"packed": operators(lane.backend).pack_operand(operand, q)}


def _compress(lane: Lane, operand: Tensor) -> Outputs:
    values, metadata = operators(lane.backend).compress(operand)
    return {"values": values, "metadata": metadata}


def _accumulate(lane: Lane, a: Tensor, b: Tensor) -> Outputs:
    return {"accumulators": operators(lane.backend).accumulate(a, b)}


def _product(lane: Lane, *tensors: Tensor, stage: str = "product", **static: Any) -> Outputs:
    # a, b, their scales and sums, and a bias or none.
    bias = tensors[6] if len(tensors) > 6 else None
    y = getattr(operators(lane.backend), stage)(
        *tensors[:6], bias, static["grids"], static["kinds"], static["width"], static["dtype"]
    )
    return {"y": y}


def _added_product(lane: Lane, residual: Tensor, *tensors: Tensor, **static: Any) -> Outputs:
    # As for `_product`, behind what is added to it.
    bias = tensors[6] if len(tensors) > 6 else None
    h = operators(lane.backend).product(
        *tensors[:6], bias, static["grids"], static["kinds"], static["width"], static["dtype"],
        residual,
    )  # fmt: skip
    return {"h": h}


def _rotated_product(
    lane: Lane, cos: Tensor, sin: Tensor, *tensors: Tensor, turned: int, **static: Any
) -> Outputs:
    # As for `_product`, behind the angles by which its first columns are turned.
    bias = tensors[6] if len(tensors) > 6 else None
    h = operators(lane.backend).rotated_product(
        *tensors[:6], bias, static["grids"], static["kinds"], static["width"], static["dtype"],
        cos, sin, turned,
    )  # fmt: skip
    return {"h": h}


def _sparse_product(lane: Lane, a: Tensor, *tensors: Tensor, **static: Any) -> Outputs:
    # As for `_product`, but for b: its values and metadata.
    bias = tensors[6] if len(tensors) > 6 else None
    y = operators(lane.backend).sparse_product(
        a, *tensors[:6], bias, static["grids"], static["kinds"], static["width"], static["dtype"]
    )
    return {"y": y}


def _linear(
    lane: Lane,
    x: Tensor,
    w: Tensor,
    grad: Tensor,
    *bias: Tensor,
    recipe: Any,
    path: str = "values",
    parts: tuple[int, ...] = (),
) -> Outputs:
    """Forward and backward of the layer, and the operands that it multiplied.

    path: see `quest.paths`. For "integers" the operands are given as such, too. parts: the rows of
    w of each of several layers on one input, where it is not one layer; outputs as of that one.
    """
    if lane.backend == "dispatch":
        return _linear_module(lane, x, w, grad, bias, recipe, path, parts)
    # The same composition, out of the lane's operators.
    f = operators(lane.backend)
    hats: list[Tensor] = []
    masks: list[Tensor | None] = []
    for t, q in ((x, recipe.activation), (w, recipe.weight)):
        order = q.transform.order(t.shape[-1])
        if q.grid is None:
            hats.append(f.hadamard(t, order, False))
            masks.append(None)
        else:
            values, mask = f.fake_quantize(t, q)
            hats.append(values)
            masks.append(mask)
    y = torch.nn.functional.linear(hats[0], hats[1], *bias)
    rotated = (grad @ hats[1], grad.t() @ hats[0])
    order = recipe.weight.transform.order(x.shape[-1])
    dx, dw = (
        f.hadamard(r, order, True) if m is None else f.masked_transpose(r, m, order)
        for r, m in zip(rotated, masks, strict=True)
    )
    out = {"y": y, "dx": dx, "dw": dw, "x_hat": hats[0], "w_hat": hats[1]}
    return out | ({"db": grad.sum(0)} if bias else {})


def _linear_module(
    lane: Lane,
    x: Tensor,
    w: Tensor,
    grad: Tensor,
    bias: tuple[Tensor, ...],
    recipe: Any,
    path: str,
    parts: tuple[int, ...],
) -> Outputs:
    from quest import operands, paths

    layers = _layers(w, bias, recipe, parts)
    x = x.detach().requires_grad_()
    with paths.only(path):
        y = _outputs(x, layers)
    torch.autograd.backward(y, grad)
    made: Outputs = {}
    if path == "integers":
        # By other kernels: nothing is kept.
        with torch.no_grad(), paths.only(path):
            made["inferred"] = _outputs(x.detach(), layers)
    # The rows of each layer by themselves: where a near tie goes may depend on where they lie.
    rows = [layer.weight for layer in layers]
    with torch.no_grad():
        if path == "integers":
            f, pair = operators(lane.backend), (recipe.activation, recipe.weight)
            kinds = operands.kinds(*pair) or ()
            hats: tuple[Tensor, ...] = ()
            for name, t, q, kind in zip("ab", ((x,), rows), pair, kinds, strict=True):
                operand, scale = _encoded(f, t, q, kind)
                hats += (f.decode(operand, scale, q, kind, x.shape[-1], grad.dtype),)
                made |= {name: operand, f"{name}_scale": scale}
        else:
            hats = recipe.activation(x), torch.cat([recipe.weight(r) for r in rows])
    dx, dws = x.grad, [layer.weight.grad for layer in layers]
    if dx is None or any(dw is None for dw in dws):
        raise GuardError(f"{lane} linear: a gradient is missing")
    dw = torch.cat([dw for dw in dws if dw is not None])
    made |= {"y": y, "dx": dx, "dw": dw, "x_hat": hats[0], "w_hat": hats[1]}
    dbs = [layer.bias.grad for layer in layers if layer.bias is not None]
    if bias:
        made["db"] = torch.cat([db for db in dbs if db is not None])
    return made


def _encoded(f: Any, tensors: Sequence[Tensor], q: Any, kind: str) -> tuple[Tensor, Tensor]:
    """Operand and scale of each of these, below each other."""
    made = [f.encode(t, q, kind) for t in tensors]
    return torch.cat([m[0] for m in made]), torch.cat([m[1] for m in made])


def _layers(
    w: Tensor, bias: tuple[Tensor, ...], recipe: Any, parts: tuple[int, ...]
) -> list[Linear]:
    """One layer with this weight and bias; with `parts`, one for each so many of their rows."""
    from quest.linear import Linear

    sizes = list(parts or (w.shape[0],))
    made = []
    for i, rows in enumerate(torch.split(w.detach(), sizes)):
        layer = Linear(
            w.shape[1], len(rows), bool(bias), recipe=recipe, device=w.device, dtype=w.dtype
        )
        layer.weight = torch.nn.Parameter(rows)
        if bias:
            layer.bias = torch.nn.Parameter(torch.split(bias[0].detach(), sizes)[i])
        made.append(layer)
    return made


def _outputs(x: Tensor, layers: list[Linear]) -> Tensor:
    """What one layer returns, or what several do together, side by side."""
    from quest.joint import together

    return layers[0](x) if len(layers) == 1 else torch.cat(together(x, layers), -1)


def _frozen(
    lane: Lane, x: Tensor, w: Tensor, *bias: Tensor, recipe: Any, parts: tuple[int, ...] = ()
) -> Outputs:
    """The forward of a layer with a frozen weight, and the operands that it multiplied.

    parts: as in `_linear`. a_sums: only of uniform grids.
    """
    from quest import lowbit, operands
    from quest.joint import stack

    layers = [layer.freeze() for layer in _layers(w, bias, recipe, parts)]
    if parts and not stack(layers):
        raise GuardError(f"{lane} frozen: the weights of layers alike can't be stacked")
    held = layers[0]._frozen
    if held is None:
        raise GuardError(f"{lane} frozen: there is nothing frozen")
    with torch.no_grad():
        made: Outputs = {"y": _outputs(x, layers)}
        if held.values is not None:
            # Not what was frozen: that is under judgement.
            weights = torch.cat([recipe.weight(layer.weight) for layer in layers])
            return made | {"x_hat": recipe.activation(x), "w_hat": weights}
        kinds = operands.kinds(recipe.activation, recipe.weight) or ("", "")
        own = [layer.weight for layer in layers]
        b, b_scale = _encoded(operators(lane.backend), own, recipe.weight, kinds[1])
        a, a_scale, a_sums = lowbit.operand(x, held.spec, kinds[0])
        made |= {"a": a, "a_scale": a_scale, "b": b, "b_scale": b_scale}
        if recipe.activation.require_grid().step is not None:
            made["a_sums"] = a_sums
    return made


_STAGES: dict[str, Callable[..., Outputs]] = {
    "hadamard": _hadamard,
    "quantize": _quantize,
    "pack": functools.partial(_quantize, packed=True),
    "fake_quantize": _fake_quantize,
    "masked_transpose": _masked_transpose,
    "linear": _linear,
    "frozen": _frozen,
    "encode": _encode,
    "operand": _operand,
    "gated": _gated,
    "normed": _normed,
    "decode": _decode,
    "pack_operand": _pack_operand,
    "compress": _compress,
    "accumulate": _accumulate,
    "product": _product,
    "gated_product": functools.partial(_product, stage="gated_product"),
    "added_product": _added_product,
    "rotated_product": _rotated_product,
    "sparse_product": _sparse_product,
}


class _Interpreter:
    """The process with Triton's interpreter, and the pipe to it."""

    def __init__(self) -> None:
        # The interpreter computes with NumPy, which warns of what floats may do.
        env = os.environ | {
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore::RuntimeWarning",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "quest.conformance.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
        )
        atexit.register(self.close)

    def close(self) -> None:
        """End the process; without it the worker would wait for its next call."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(timeout=30)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def call(
        self, lane: Lane, stage: str, tensors: tuple[Tensor, ...], static: dict[str, Any]
    ) -> Outputs:
        send(self.process.stdin, (lane, stage, tensors, static))
        error, result = receive(self.process.stdout)
        if error is not None:
            raise error
        return dict(result)


@functools.cache
def _interpreter() -> _Interpreter:
    return _Interpreter()


def send(stream: BinaryIO | Any, message: Any) -> None:
    """Write a message: its length in 8 bytes, then its pickle."""
    data = pickle.dumps(message)
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def receive(stream: BinaryIO | Any) -> Any:
    """Read what `send` wrote; EOFError at the end of the stream."""
    size = stream.read(8)
    if len(size) < 8:
        raise EOFError("the other process closed the pipe")
    return pickle.loads(stream.read(int.from_bytes(size, "little")))
