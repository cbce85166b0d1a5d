"""What stands before a layer and ends in its quantizer's kernel: gates, and norms in inference.

quest::gated_encode(gate, value, spec, kind) -> (operand, scale, sums)
quest::gated_encode_shown(gate, value, spec, kind) -> (operand, scale, sums, rows)
quest::normed_encode(x, residual, weight, eps, spec, kind) -> (operand, scale, sums, h)
quest::normed_encode_shown(...) -> (operand, scale, sums, h, rows)

Rows are silu(gate) * value, or (h / sqrt(mean(h^2) + eps)) weight of h = residual + x, which is
given back where there is a residual. They are computed in float32 and rounded once to the inputs'
dtype, as inductor does it, and quantized as `lowbit.encode` does, without a mask. CPU: PyTorch.
CUDA: one kernel for 16 bits, blocks of 128, uniform grids and no sparsity, which saves writing the
rows and reading them again; else one after the other. Inputs may be columns of a wider tensor: no
copy is made.

`gated` and `normed` are what models call. A gate that is trained is a part of the layer's operator,
`lowbit_linear.low_bit_linear`.
Source: SwiGLU, arXiv 2002.05202; RMSNorm, arXiv 1910.07467; QuEST (arXiv 2502.05003), Algorithm 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import direct, eager, frozen, lowbit, operands, ops, paths
from .joint import again, alike, gates, hooked, joined, projected, split, turns, whole
from .linear import Linear
from .lowbit_linear import low_bit_linear, saves
from .rotary import Rotary, check, turn

if TYPE_CHECKING:
    from .kernels.blocks import Made
    from .quantizer import Quantizer

_GATED = "(Tensor gate, Tensor value, str spec, str kind)"
_NORMED = "(Tensor x, Tensor? residual, Tensor weight, float eps, str spec, str kind)"
_library: Any = torch.library.Library("quest", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _arguments, _results in (
    ("gated_encode", _GATED, 3),
    ("gated_encode_shown", _GATED, 4),
    ("normed_encode", _NORMED, 4),
    ("normed_encode_shown", _NORMED, 5),
):
    _library.define(
        f"{_name}{_arguments} -> ({', '.join(['Tensor'] * _results)})",
        tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
    )


def _check_pair(
    first: Tensor, second: Tensor, names: tuple[str, str] = ("gate", "value"), plain: bool = False
) -> None:
    """Raise TypeError or ValueError unless both are (..., d) floats alike.

    plain: of whatever dtypes torch's own operations take.
    """
    for name, t in zip(names, (first, second), strict=True):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if not (t.is_floating_point() if plain else t.dtype in ops.DTYPES):
            wanted = "of floats" if plain else "float32, bfloat16 or float16"
            raise TypeError(f"{name} must be {wanted}, got {t.dtype}")
    one, other = names
    if first.dtype != second.dtype and not plain:
        raise TypeError(f"{other} must have the dtype of {one}, {first.dtype}, got {second.dtype}")
    if first.shape != second.shape or first.ndim == 0:
        raise ValueError(
            f"{one} and {other} must have one shape with at least one axis, got "
            f"{tuple(first.shape)} and {tuple(second.shape)}"
        )
    if first.device != second.device:
        raise ValueError(f"{other} must lie where {one} lies, {first.device}; got {second.device}")


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
    q = ops.quantizer(spec)
    if not (gate.numel() and has_kernel(spec, gate)):
        x = eager.gated(gate, value)
        return *lowbit.launch_operand(x, q, kind), x if show else None
    made = _launch_gated(gate, value, q, kind, show=show)
    operand, scale, sums = (t.view(*gate.shape[:-1], t.shape[-1]) for t in made[:3])
    return operand, scale, sums, None if made.rows is None else made.rows.view(gate.shape)


def _launch_gated(gate: Tensor, value: Tensor, q: Quantizer, kind: str, **how: Any) -> Made:
    """`quest.kernels.blocks.gated` of inputs (..., d) for which there is a kernel."""
    from .kernels import blocks, forms

    program, _ = lowbit.plan(q, kind, (gate.dtype, gate.shape[-1], gate.device))
    form, bits = forms.OPERANDS[kind]
    with ops.device_of(gate):
        return blocks.gated(
            lowbit.as_rows(gate), lowbit.as_rows(value), program, form=form, bits=bits, **how
        )


def launch_encode_gated(
    gate: Tensor, value: Tensor, q: Quantizer, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`eager.encode_gated` of rows (n, d) by the kernels."""
    if not (gate.numel() and has_kernel(q.spec, gate)):
        return lowbit.launch_encode_saved(eager.gated(gate, value), q, kind)
    packed = operands.PACKED.get(operands.saved(q, kind).kind, 0)
    made = _launch_gated(gate, value, q, kind, masked=True, saved=packed)
    assert made.mask is not None
    kept = made.out if made.saved is None else made.saved
    return made.out, made.scale, made.mask, made.sums, kept


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

    q, like = ops.quantizer(spec), torch.empty(0, width, dtype=torch.bfloat16, device=device)
    return q.grid is not None and blocks.supports(ops.program(q, like), like)


def _check_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, spec: str, kind: str
) -> None:
    _check_pair(x, x if residual is None else residual, ("x", "residual"))
    if weight.dtype != x.dtype or weight.device != x.device or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight must be {x.dtype} of shape {tuple(x.shape[-1:])} on {x.device}, got "
            f"{weight.dtype} of shape {tuple(weight.shape)} on {weight.device}"
        )
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, got {eps}")
    q = ops.quantizer(spec)
    q.check(x)
    operands.form_of(q, kind)


def eager_normed_encode(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, spec: str, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(operand, scale, sums, h, rows) in plain PyTorch; h has shape (0,) without a residual."""
    _check_norm(x, residual, weight, eps, spec, kind)
    h, rows = eager.normed(x, residual, weight, eps)
    operand, scale, _, sums = eager.encode(rows, ops.quantizer(spec), kind)
    return operand, scale, sums, _given(h, residual), rows


def _given(h: Tensor, residual: Tensor | None) -> Tensor:
    """h as operators return it: nothing where it is an input."""
    return h.new_empty(0) if residual is None else h.contiguous()


def launch_normed_encode(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, spec: str, kind: str,
    show: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """`eager_normed_encode` by the kernels; rows are None unless `show`."""
    _check_norm(x, residual, weight, eps, spec, kind)
    q, d = ops.quantizer(spec), x.shape[-1]
    if not (x.numel() and has_kernel(spec, x)):
        h, rows = eager.normed(x, residual, weight, eps)
        encoded = lowbit.launch_operand(rows, q, kind)
        return *encoded, _given(h, residual), rows if show else None
    from .kernels import blocks, forms

    program, _ = lowbit.plan(q, kind, (x.dtype, d, x.device))
    form, bits = forms.OPERANDS[kind]
    with ops.device_of(x):
        beside = None if residual is None else lowbit.as_rows(residual)
        *made, _, _, added, shown = blocks.normed(
            lowbit.as_rows(x), beside, weight, eps, program, form=form, bits=bits, show=show
        )
    operand, scale, sums = (t.view(*x.shape[:-1], t.shape[-1]) for t in made)
    given = x.new_empty(0) if added is None else added.view(x.shape)
    return operand, scale, sums, given, None if shown is None else shown.view(x.shape)


def _fake_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, spec: str, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_norm(x, residual, weight, eps, spec, kind)
    operand, scale, _, sums = eager.encoded_like(x, kind)
    given = x.new_empty(0 if residual is None else x.shape)
    return operand, scale, sums, given, x.new_empty(x.shape)


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
_library.impl("normed_encode", lambda *arguments: eager_normed_encode(*arguments)[:4], "CPU")
_library.impl("normed_encode", lambda *arguments: launch_normed_encode(*arguments)[:4], "CUDA")
_library.impl("normed_encode_shown", eager_normed_encode, "CPU")
_library.impl("normed_encode_shown", functools.partial(launch_normed_encode, show=True), "CUDA")
torch.library.register_fake(
    "quest::normed_encode", lambda *arguments: _fake_norm(*arguments)[:4], lib=_library
)
torch.library.register_fake("quest::normed_encode_shown", _fake_norm, lib=_library)


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


def normed_encode(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, spec: str, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(operand, scale, sums, h) of rows = (h / sqrt(mean(h^2) + eps)) weight, h = residual + x.

    x, residual: (..., d) float32, bfloat16 or float16, alike; without a residual h is x, and what
    is given back in its place has shape (0,). weight: (d,) of that dtype. The rest as in
    `gated_encode`.
    """
    made: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.quest.normed_encode.default(
        x, residual, weight, eps, spec, kind
    )
    return made


def normed_encode_shown(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, spec: str, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`normed_encode`, and the rows as they were quantized."""
    made: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = (
        torch.ops.quest.normed_encode_shown.default(x, residual, weight, eps, spec, kind)
    )
    return made


def _held(layers: Sequence[nn.Module], x: Tensor, summed: bool = False) -> frozen.Frozen | None:
    """The frozen weight of layers that a prologue can stand before; x: like their input.

    summed: by a norm of a sum. Not where something must see a layer's call or another dtype; nor,
    compiled, of a sum and its norm with few rows, where the compiler's one kernel and a quantizer
    behind it take less.
    """
    if torch.is_grad_enabled():
        return None
    plain = alike(layers)
    if plain is None:
        return None
    for layer in plain:
        layer.check(x)
    held = whole(plain)
    if held is None or held.operand is None:
        return None
    if torch.compiler.is_compiling() and summed and paths.compiles_sums(x):
        return None
    # Without autocast x has the weight's dtype: `check` has looked.
    casts = torch.is_autocast_enabled(x.device.type)
    return held if not casts and has_kernel(held.spec, x) else None


def gated(gate: Tensor, up: Tensor, layer: nn.Module) -> Tensor:
    """layer(silu(gate) * up), for gate and up (..., in), floats of one shape.

    Where both have one dtype of 16 bits and `layer` is a `quest.Linear` without hooks that
    multiplies integers, one kernel makes the product, rounded once, and quantizes it; gate and up
    may be halves of one tensor. Trained, the backward has the mask of those rows, and its gradients
    of gate and up are computed in float32 and rounded once each. Elsewhere it is these three
    operations, one after another, and in 16 bits silu(gate) is rounded by itself. Raises TypeError
    and ValueError for a gate and an up of other shapes or devices, for what is no module, and what
    the layer raises.
    """
    if (found := again((gate, up), (layer,))) is not None:
        return found[0]
    _check_pair(gate, up, ("gate", "up"), plain=True)
    ops.check_tangents(gate, up)
    check_layer(layer)
    same = gate.dtype == up.dtype
    held = _held((layer,), gate) if same else None
    if held is None:
        live = _live(gate, up, layer) if same else None
        y: Tensor = layer(nn.functional.silu(gate) * up) if live is None else live
        return y
    assert isinstance(layer, Linear)
    bias, unwatched = layer.bias, ops.direct(gate) and ops.direct(up)
    assert held.operand is not None
    if unwatched and direct.fits(bias, gate, len(held.operand)):
        made = direct.behind((gate, up), held, bias)
        if made is not None:
            return made[0]
    kind = held.kinds.partition(",")[0]
    encode = launch_gated_encode if unwatched else gated_encode
    a, scale, sums = encode(gate, up, held.spec, kind)[:3]
    rows = (lowbit.as_rows(a), lowbit.as_rows(scale), lowbit.as_rows(sums))
    y = frozen.multiply(rows, held, bias, gate.shape[-1], gate.dtype, unwatched)
    return y.view(*gate.shape[:-1], y.shape[-1])


def check_layer(layer: object) -> None:
    """Raise TypeError unless this is a module, which stands behind a gate."""
    if not isinstance(layer, nn.Module):
        raise TypeError(f"layer must be a torch.nn.Module, got {type(layer).__name__}")


def _live(gate: Tensor, up: Tensor, layer: nn.Module) -> Tensor | None:
    """`gated` with the weight quantized for this call, in one operator; None where it has none."""
    plain = alike((layer,))
    if plain is None:
        return None
    (one,) = plain
    one.check(gate)
    recipe = one.recipe
    if not torch.is_grad_enabled() and one.current() is not None:
        return None
    dtype = one.out_dtype(gate)
    if dtype != gate.dtype or paths.choose(gate, recipe) != "integers":
        return None
    if not has_kernel(recipe.activation.spec, gate):
        return None
    bias = [] if one.bias is None else [one.bias]
    y: Tensor = low_bit_linear(
        up, [one.weight], bias, recipe.activation.spec, recipe.weight.spec, dtype,
        saves(up, [one.weight, gate], bias), gate,
    )[0]  # fmt: skip
    return y


def normed(
    x: Tensor, norm: nn.Module, layers: Sequence[nn.Module], residual: Tensor | None = None,
    rotary: Rotary | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """(h, together(norm(h), layers, rotary)), for h = residual + x, or h = x without a residual.

    x, residual: (..., in) floats of one shape. Where no gradient is asked for, both have one dtype,
    `norm` is a `torch.nn.RMSNorm` with a weight and without hooks, and `layers` are frozen
    `quest.Linear`s, stacked if several, that multiply integers, one kernel adds, normalises, rounds
    once and quantizes; not compiled where there are a residual and few rows
    (`paths.compiles_sums`). Elsewhere these are operations one after another, as in
    `quest.together`, and h has the dtype of a sum: under autocast a residual stream is float32.
    Raises TypeError and ValueError for an x and a residual of other shapes or devices, for a norm
    that is no module, and what `quest.together` raises.
    """
    return behind_norm(x, norm, layers, residual, False, rotary)


def behind_norm(
    x: Tensor, norm: nn.Module, layers: Sequence[nn.Module], residual: Tensor | None, gate: bool,
    rotary: Rotary | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """`normed`; with a gate, what comes out of the layers as in `joint.projected`."""
    layers = layers if isinstance(layers, nn.Module) else tuple(layers)
    if rotary is not None and not isinstance(layers, nn.Module):
        check(rotary, x, layers)
    if (found := _again(x, norm, layers, residual, gate, rotary)) is not None:
        return found
    _check_pair(x, x if residual is None else residual, ("x", "residual"), plain=True)
    if not isinstance(norm, nn.Module):
        raise TypeError(f"norm must be a torch.nn.Module, got {type(norm).__name__}")
    weight = _weight(norm, x) if residual is None or residual.dtype == x.dtype else None
    held = None
    if weight is not None and not isinstance(layers, nn.Module):
        held = _held(layers, x, residual is not None)
    if held is None:
        h = x if residual is None else residual + x
        return h, projected(norm(h), layers, gate, rotary)
    assert isinstance(norm, nn.RMSNorm)
    assert weight is not None
    assert norm.eps is not None
    plain = [layer for layer in layers if isinstance(layer, Linear)]
    assert held.operand is not None
    bias, columns = joined(plain, held, x), len(held.operand)
    gate = gate and gates(x, plain, held)
    turned = turns(x, plain, held, rotary)
    later = rotary if turned is None else None
    xs = (x,) if residual is None else (x, residual)
    ops.check_tangents(*xs, weight)
    unwatched = all(map(ops.direct, direct.inputs((*xs, weight), turned)))
    fits = unwatched and direct.fits(bias, x, columns) and direct.fits(weight, x, x.shape[-1])
    # A weight that lies off a multiple of 16 bytes is copied, to where no later call may look.
    if fits and weight.data_ptr() % 16 == 0:
        made = direct.behind(xs, held, bias, (weight, norm.eps), gate, turned)
        if made is not None:
            return made[-1] if len(made) > 1 else x, turn(split(made[0], plain, gate), later)
    kind = held.kinds.partition(",")[0]
    encode = launch_normed_encode if unwatched else normed_encode
    a, scale, sums, h = encode(x, residual, weight, norm.eps, held.spec, kind)[:4]
    rows = (lowbit.as_rows(a), lowbit.as_rows(scale), lowbit.as_rows(sums))
    y = frozen.multiply(
        rows, held, bias, x.shape[-1], x.dtype, unwatched, gate, rotary=turned
    )  # fmt: skip
    y = y.view(*x.shape[:-1], y.shape[-1])
    return x if residual is None else h, turn(split(y, plain, gate), later)


def _again(
    x: Tensor, norm: nn.Module, layers: Sequence[nn.Module], residual: Tensor | None, gate: bool,
    rotary: Rotary | None,
) -> tuple[Tensor, tuple[Tensor, ...]] | None:  # fmt: skip
    """`behind_norm`, where a call like this one was checked and recorded."""
    if type(norm) is not nn.RMSNorm or hooked(norm) or isinstance(layers, nn.Module):
        return None
    weight = norm._parameters.get("weight")
    if weight is None or not isinstance(norm.eps, float):
        return None
    xs = (x,) if residual is None else (x, residual)
    made = again(xs, layers, weight, norm.eps, gate=gate, rotary=rotary)
    if made is None:
        return None
    return x if residual is None else made[1], split(made[0], layers, gate)


def _weight(norm: nn.Module, x: Tensor) -> Tensor | None:
    """The weight of a norm that the kernel can take over; None where it can't."""
    if type(norm) is not nn.RMSNorm or hooked(norm) or norm.weight is None:
        return None
    weight: Tensor = norm.weight
    fits = weight.shape == x.shape[-1:] and weight.dtype == x.dtype and weight.device == x.device
    # Not torch's own eps, nor one of 0, which makes NaN of a row of zeros, nor one that may change.
    return weight if fits and isinstance(norm.eps, float) and 0 < norm.eps < math.inf else None
