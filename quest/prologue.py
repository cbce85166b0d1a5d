"""What stands before a layer and ends in its quantizer's kernel, for inference: SwiGLU's gate.

quest::gated_encode(gate, value, spec, kind) -> (operand, scale, sums)
quest::gated_encode_shown(gate, value, spec, kind) -> (operand, scale, sums, x)

x = silu(gate) * value is computed in float32 and rounded once to the dtype of both, as inductor
does it, and quantized as `lowbit.encode` does, without a mask. CPU: plain PyTorch. CUDA: one
kernel for 16 bits, blocks of 128, uniform grids and no sparsity, which saves writing x and reading
it again; else one after the other. gate and value may be columns of one wider tensor: no copy is
made.

`gated` is what models call.
Source: SwiGLU, arXiv 2002.05202; QuEST (arXiv 2502.05003), Algorithm 1.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from . import eager, frozen, lowbit, operands, ops, paths
from .joint import hooked
from .linear import Linear

_ARGUMENTS = "(Tensor gate, Tensor value, str spec, str kind)"
_library: Any = torch.library.Library("quest", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _results in (
    ("gated_encode", "(Tensor, Tensor, Tensor)"),
    ("gated_encode_shown", "(Tensor, Tensor, Tensor, Tensor)"),
):
    _library.define(
        f"{_name}{_ARGUMENTS} -> {_results}",
        tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
    )


def _check_pair(gate: Tensor, value: Tensor) -> None:
    """Raise TypeError or ValueError unless both are (..., d) floats alike."""
    for name, t in (("gate", gate), ("value", value)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if t.dtype not in ops.DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got {t.dtype}")
    if gate.dtype != value.dtype:
        raise TypeError(f"value must have the dtype of gate, {gate.dtype}, got {value.dtype}")
    if gate.shape != value.shape or gate.ndim == 0:
        raise ValueError(
            "gate and value must have one shape with at least one axis, got "
            f"{tuple(gate.shape)} and {tuple(value.shape)}"
        )
    if gate.device != value.device:
        raise ValueError(f"value must lie where gate lies, {gate.device}; got {value.device}")


def _check(gate: Tensor, value: Tensor, spec: str, kind: str) -> None:
    _check_pair(gate, value)
    q = ops.quantizer(spec)
    q.check(gate)
    operands.form_of(q, kind)


def eager_gated_encode(
    gate: Tensor, value: Tensor, spec: str, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(operand, scale, sums, x) in plain PyTorch, on any device."""
    _check(gate, value, spec, kind)
    x = eager.gated(gate, value)
    operand, scale, _, sums = eager.encode(x, ops.quantizer(spec), kind)
    return operand, scale, sums, x


def launch_gated_encode(
    gate: Tensor, value: Tensor, spec: str, kind: str, show: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`eager_gated_encode` by the kernels; x is None unless `show`."""
    _check(gate, value, spec, kind)
    q, d = ops.quantizer(spec), gate.shape[-1]
    if not (gate.numel() and has_kernel(spec, gate)):
        x = eager.gated(gate, value)
        operand, scale, _, sums = lowbit.launch_encode(x, q, kind)
        return operand, scale, sums, x if show else None
    from .kernels import blocks

    program, _ = lowbit.plan(q, kind, (gate.dtype, d, gate.device))
    form, bits = (blocks.PACKED, 1) if kind == "bits" else (blocks.FORMS[kind], 0)
    with ops.device_of(gate):
        *made, shown = blocks.gated(
            lowbit.as_rows(gate), lowbit.as_rows(value), program, form=form, bits=bits, show=show
        )
    operand, scale, sums = (t.view(*gate.shape[:-1], t.shape[-1]) for t in made)
    return operand, scale, sums, None if shown is None else shown.view(gate.shape)


def has_kernel(spec: str, x: Tensor) -> bool:
    """Whether one kernel makes rows like x (..., d) and quantizes them by this spec."""
    halves = x.dtype is torch.bfloat16 or x.dtype is torch.float16
    return halves and x.is_cuda and _fits(spec, x.shape[-1], str(x.device))


# A constant for torch.compile, which need not read how it is found.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _fits(spec: str, width: int, device: str) -> bool:
    return _fits_there(spec, width, device)


@functools.cache
def _fits_there(spec: str, width: int, device: str) -> bool:
    from .kernels import blocks

    like = torch.empty(0, width, dtype=torch.bfloat16, device=device)
    return blocks.supports(ops.program(ops.quantizer(spec), like), like)


def _fake(
    gate: Tensor, value: Tensor, spec: str, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(gate, value, spec, kind)
    operand, scale, _, sums = eager.encoded_like(gate, kind)
    return operand, scale, sums, gate.new_empty(gate.shape)


_library.impl("gated_encode", lambda *arguments: eager_gated_encode(*arguments)[:3], "CPU")
_library.impl("gated_encode", lambda *arguments: launch_gated_encode(*arguments)[:3], "CUDA")
_library.impl("gated_encode_shown", eager_gated_encode, "CPU")
_library.impl("gated_encode_shown", functools.partial(launch_gated_encode, show=True), "CUDA")
torch.library.register_fake(
    "quest::gated_encode", lambda *arguments: _fake(*arguments)[:3], lib=_library
)
torch.library.register_fake("quest::gated_encode_shown", _fake, lib=_library)


def gated_encode(
    gate: Tensor, value: Tensor, spec: str, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(operand, scale, sums) of x = silu(gate) * value as `lowbit.encode` makes them of x.

    gate, value: (..., d) float32, bfloat16 or float16, alike; rows of either may lie apart. spec:
    of the quantizer, whose estimator does not count here; kind: see `quest.operands`. No gradient.
    Raises TypeError and ValueError for what does not fit.
    """
    made: tuple[Tensor, Tensor, Tensor] = torch.ops.quest.gated_encode.default(
        gate, value, spec, kind
    )
    return made


def gated_encode_shown(
    gate: Tensor, value: Tensor, spec: str, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gated_encode`, and x as it was quantized."""
    made: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.quest.gated_encode_shown.default(
        gate, value, spec, kind
    )
    return made


def _held(layer: nn.Module, x: Tensor) -> frozen.Frozen | None:
    """The frozen weight of a layer that a prologue can stand before; x: like its input.

    Not where one kernel quantizes few rows and multiplies them, nor where something must see the
    layer's call or another dtype.
    """
    if torch.is_grad_enabled() or type(layer) is not Linear or hooked(layer):
        return None
    layer.check(x)
    held = layer.current()
    if held is None or held.operand is None or paths.fuses(x, held.few):
        return None
    alike = x.dtype == layer.weight.dtype and not torch.is_autocast_enabled(x.device.type)
    return held if alike and has_kernel(held.spec, x) else None


def gated(gate: Tensor, up: Tensor, layer: nn.Module) -> Tensor:
    """layer(silu(gate) * up), for gate and up (..., in) of one dtype and shape.

    Where no gradient is asked for and `layer` is a frozen `quest.Linear` without hooks that
    multiplies integers, one kernel makes the product, rounded once, and quantizes it; gate and up
    may be halves of one tensor. Elsewhere it is these three operations, one after another, and in
    16 bits silu(gate) is rounded by itself. Raises TypeError and ValueError for a gate and an up
    that differ or what is no module, and what the layer raises.
    """
    _check_pair(gate, up)
    if not isinstance(layer, nn.Module):
        raise TypeError(f"layer must be a torch.nn.Module, got {type(layer).__name__}")
    held = _held(layer, gate)
    if held is None:
        y: Tensor = layer(nn.functional.silu(gate) * up)
        return y
    assert isinstance(layer, Linear)
    kind = held.kinds.partition(",")[0]
    direct = ops.direct(gate) and ops.direct(up)
    encode = launch_gated_encode if direct else gated_encode
    a, scale, sums = encode(gate, up, held.spec, kind)[:3]
    rows = (lowbit.as_rows(a), lowbit.as_rows(scale), lowbit.as_rows(sums))
    y = frozen.multiply(rows, held, layer.bias, gate.shape[-1], gate.dtype, direct)
    return y.view(*gate.shape[:-1], layer.out_features)
