"""Several layers on one input, which is quantized once: q, k and v, or gate and up.

Rows of a weight are quantized apart, so that layers that share an input are one layer with their
weights stacked. Nothing is copied for that in training: the products and the weights' gradients
stay apart, and the gradients that reach the input are summed before its mask and H^T. Frozen
weights can lie stacked, and one product serves them all: `quest.freeze_` stacks those that a module
names in `shared_inputs`, groups of the names of its layers that it calls together.
Source: method, section 5; QuEST (arXiv 2502.05003), Algorithm 1.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from . import direct, frozen, paths
from .kernels.product import Turned
from .linear import Linear
from .lowbit_linear import low_bit_linear, saves
from .rotary import Rotary, check, columns, turn, turn_


def together(
    x: Tensor, layers: Sequence[nn.Module], rotary: Rotary | None = None
) -> tuple[Tensor, ...]:
    """(layer(x) for each layer), with x (..., in) quantized once where it can be.

    That is where all are `quest.Linear` with the same recipe and dtype and without hooks, which
    must see their own calls; other layers are called one after another. What comes out has the
    bounds of the single layers, though not always their bits: the gradient of x is summed before it
    is turned back.

    rotary: the outputs of its first layers come turned, for x (..., T, in); see `quest.Rotary`. Of
    frozen layers that lie stacked, and x of 16 bits, one kernel on Hopper multiplies, rounds and
    turns heads of 32, 64 or 128 by angles in float32; but not of few rows, whose weights are read
    packed, nor of many with 2:4 sparse weights. Elsewhere they are turned behind the layers; the
    numbers are the same, but where torch's compiler turns them: it rounds once less. Raises
    ValueError for no layers and for angles that don't fit x and the layers, TypeError for what is
    no module and no angles, and what the layers raise.
    """
    return projected(x, layers, False, rotary)


def projected(
    x: Tensor, layers: Sequence[nn.Module], gate: bool, rotary: Rotary | None = None
) -> tuple[Tensor, ...]:
    """`together`; with a gate, of two layers, silu(first) second alone where one kernel makes it.

    See `gated_product`.
    """
    if isinstance(layers, nn.Module):
        raise TypeError(f"layers must be a sequence of layers, got a {type(layers).__name__}")
    layers = tuple(layers)
    if not layers:
        raise ValueError("layers must name at least one layer, got none")
    if rotary is not None:
        check(rotary, x, layers)
    if (made := again((x,), layers, gate=gate, rotary=rotary)) is not None:
        return split(made[0], layers, gate)
    for layer in layers:
        if not isinstance(layer, nn.Module):
            raise TypeError(f"layers must hold torch.nn.Modules, got {type(layer).__name__}")
    plain = alike(layers)
    if plain is None:
        return turn(tuple(layer(x) for layer in layers), rotary)
    for layer in plain:
        layer.check(x)
    x = Linear.cast(x)
    if torch.is_grad_enabled():
        return turn(_live(x, plain), rotary)
    held = [h for h in (layer.current() for layer in plain) if h is not None]
    if not held:
        return turn(_live(x, plain), rotary)
    one = frozen.stacked(held) if len(held) == len(plain) else None
    if one is None:
        return turn(tuple(layer(x) for layer in plain), rotary)
    gate = gate and gates(x, plain, one)
    turned = turns(x, plain, one, rotary)
    y = frozen.linear(x, one, joined(plain, one, x), plain[0].recipe, gate, rotary=turned)
    return turn(split(y, plain, gate), rotary if turned is None else None)


def gates(x: Tensor, layers: Sequence[Any], one: frozen.Frozen) -> bool:
    """Whether one kernel makes a gate of two `Linear`s on x; their weights lie stacked in `one`."""
    return layers[0].out_features == layers[1].out_features and one.gates(x)


def turns(
    x: Tensor, layers: Sequence[Any], one: frozen.Frozen, rotary: Rotary | None
) -> Turned | None:
    """What one kernel turns of `Linear`s on x, stacked in `one`; None where it turns nothing."""
    found = None if rotary is None else columns(rotary, layers)
    if found is None or not one.turns(x, found):
        return None
    assert one.operand is not None
    # Of weights that lie stacked each is as high as its layer says; see `stack`.
    return found if len(layers) > 1 or found.columns == len(one.operand) else None


def again(
    xs: tuple[Tensor, ...], layers: Sequence[nn.Module], weight: Tensor | None = None,
    eps: float | None = None, *, gate: bool = False, added: bool = False,
    rotary: Rotary | None = None,
) -> tuple[Tensor, ...] | None:  # fmt: skip
    """What comes out of layers whose call with such inputs was checked and recorded; else None.

    xs: their input, or what a gate or a norm with this weight and eps makes it of; see `direct`.
    gate: what comes out may be gated, see `projected`. added: the last of xs is added to it.
    rotary: what comes out is turned; it is checked, for a tensor.
    All that is looked at here is what may have changed since: nothing is raised, and nothing
    queued but the biases of several layers, joined, and what was recorded.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    found: list[frozen.Frozen] = []
    biases: list[Tensor | None] = []
    for layer in layers:
        held = None if type(layer) is not Linear or hooked(layer) else layer.settled()
        if held is None:
            return None
        found.append(held)
        biases.append(layer._parameters["bias"])
    one = _one(found)
    if one is None or not one.calls:
        return None
    bias, join = biases[0], None
    if len(biases) > 1 and (several := [b for b in biases if b is not None]):
        whole = len(several) == len(biases) and isinstance(xs[0], Tensor)
        bias = one.biases.room(several, xs[0]) if whole else None
        if bias is None:
            return None
        join = functools.partial(torch.cat, several, out=bias)
    gate = gate and isinstance(xs[0], Tensor) and gates(xs[0], layers, one)
    turned = turns(xs[0], layers, one, rotary)
    given, told = direct.inputs(xs, turned), direct.how(eps, gate, added, turned)
    made = direct.again(one, given, (bias, weight), told, join)
    if made is not None and rotary is not None and turned is None:
        turn_(made[0], columns(rotary, layers))  # nobody else has it yet
    return made


def split(y: Tensor, layers: Sequence[Any], gate: bool = False) -> tuple[Tensor, ...]:
    """What each `Linear` gives, of all side by side; y: (..., all of their out_features).

    gate: y may be half as wide, and is then what is made of two; see `projected`.
    """
    widths = [layer.out_features for layer in layers]
    if len(widths) == 1 or (gate and 2 * y.shape[-1] == sum(widths)):
        return (y,)
    made: tuple[Tensor, ...] = y.split_with_sizes(widths, -1)
    return made


def alike(layers: Sequence[nn.Module]) -> list[Linear] | None:
    """These layers, if they are `quest.Linear`s with one recipe and dtype that nothing watches."""
    plain = [layer for layer in layers if type(layer) is Linear and not hooked(layer)]
    if len(plain) < len(layers) or any(not _alike(p, plain[0]) for p in plain):
        return None
    return plain


def whole(layers: list[Linear]) -> frozen.Frozen | None:
    """The frozen weight of one layer, or the one in which those of several lie stacked."""
    held = [h for h in (layer.current() for layer in layers) if h is not None]
    return _one(held) if len(held) == len(layers) else None


def _one(held: list[frozen.Frozen]) -> frozen.Frozen | None:
    """These frozen weights as one; None where they don't lie stacked, or there are none."""
    if len(held) < 2:
        return held[0] if held else None
    return frozen.stacked(held)


def joined(layers: list[Linear], one: frozen.Frozen, x: Tensor) -> Tensor | None:
    """The biases of layers in one, for the weights that lie stacked in `one`, and their input.

    As they are now: what writes them may not count it. Where nothing watches, they are joined in
    the same memory at each call.
    """
    if len(layers) == 1:
        return layers[0].bias
    biases = biases_of(layers)
    if not biases:
        return None
    room = one.biases.room(biases, x, all(layer.bias is not None for layer in layers))
    return torch.cat(biases) if room is None else torch.cat(biases, out=room)


def stack(layers: Sequence[nn.Module]) -> bool:
    """Lay the frozen weights of layers that are called together on top of each other.

    Nothing is held twice. Here and not in a forward: a captured CUDA graph reads a weight where it
    was. False, and nothing done, where they are not frozen `quest.Linear`s alike, are stacked with
    others, or have weights of other heights than their out_features. A weight that is frozen again
    leaves the stack.
    """
    plain = [layer for layer in layers if type(layer) is Linear]
    held = [h for h in (layer.current() for layer in plain) if h is not None]
    alone = len(set(map(id, plain))) == len(held) == len(layers) > 1
    if not alone or any(h.whole is not None for h in held):
        return False
    if any(not _alike(layer, plain[0]) for layer in plain):
        return False
    # By these a layer's part of what comes out is found, and another weight may stand there.
    if any(len(layer.weight) != layer.out_features for layer in plain):
        return False
    for layer, part in zip(plain, frozen.stack(held), strict=True):
        layer.hold(part)
    return True


def _alike(a: Linear, b: Linear) -> bool:
    return (a.recipe, a.in_features, a.weight.dtype) == (b.recipe, b.in_features, b.weight.dtype)


def hooked(layer: nn.Module) -> bool:
    """Whether something must see the calls of this module."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or layer._compiled_call_impl is not None  # compiled by itself
        or "forward" in vars(layer)  # replaced for this one, as libraries that move weights do
        or modules._global_forward_hooks
        or modules._global_forward_pre_hooks
        or modules._global_backward_hooks
        or modules._global_backward_pre_hooks
    )


def _live(x: Tensor, layers: list[Linear]) -> tuple[Tensor, ...]:
    """Weights quantized for this call."""
    recipe = layers[0].recipe
    if paths.choose(x, recipe) == "integers":
        specs = recipe.activation.spec, recipe.weight.spec
        weights, biases = [layer.weight for layer in layers], biases_of(layers)
        made = low_bit_linear(x, weights, biases, *specs, x.dtype, saves(x, weights, biases))
        return tuple(made[: len(layers)])
    values = recipe.activation(x)
    return tuple(
        nn.functional.linear(values, recipe.weight(layer.weight), layer.bias) for layer in layers
    )


def biases_of(layers: list[Linear]) -> list[Tensor]:
    """The biases of layers: none at all, or one for each."""
    if all(layer.bias is None for layer in layers):
        return []
    return [
        layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
        for layer in layers
    ]
