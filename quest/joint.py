"""Several layers on one input, which is quantized once: q, k and v, or gate and up.

Rows of a weight are quantized apart, so that layers that share an input are one layer with their
weights stacked. Nothing is copied for that in training: the products and the weights' gradients
stay apart, and the gradients that reach the input are summed before its mask and H^T. Frozen
weights do lie stacked, and few rows meet them in one product.
Source: method, section 5; QuEST (arXiv 2502.05003), Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import frozen, paths
from .linear import Linear
from .lowbit_linear import low_bit_linear


def together(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """(layer(x) for each layer), with x (..., in) quantized once where it can be.

    That is where all are `quest.Linear` with the same recipe and dtype and without hooks, which
    must see their own calls; other layers are called one after another. What comes out has the
    bounds of the single layers, though not always their bits: the gradient of x is summed before it
    is turned back. Raises ValueError for no layers, TypeError for what is no module, and what the
    layers raise.
    """
    layers = tuple(layers)
    if not layers:
        raise ValueError("layers must name at least one layer, got none")
    for layer in layers:
        if not isinstance(layer, nn.Module):
            raise TypeError(f"layers must hold torch.nn.Modules, got {type(layer).__name__}")
    plain = [layer for layer in layers if type(layer) is Linear and not _hooked(layer)]
    if len(plain) < len(layers) or any(not _alike(p, plain[0]) for p in plain):
        return tuple(layer(x) for layer in layers)
    for layer in plain:
        layer.check(x)
    if not torch.is_grad_enabled():
        held = [layer.current() for layer in plain]
        ready = [h for h in held if h is not None]
        if len(ready) == len(plain):
            return _frozen(x, plain, ready)
    return _live(x, plain)


def _alike(a: Linear, b: Linear) -> bool:
    return a.recipe == b.recipe and a.weight.dtype == b.weight.dtype


def _hooked(layer: nn.Module) -> bool:
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )


def _live(x: Tensor, layers: list[Linear]) -> tuple[Tensor, ...]:
    """Weights quantized for this call."""
    recipe = layers[0].recipe
    if paths.choose(x, recipe) == "integers":
        specs = recipe.activation.spec, recipe.weight.spec
        weights = [layer.weight for layer in layers]
        made = low_bit_linear(x, weights, _biases(layers), *specs, layers[0].out_dtype(x))
        return tuple(made[: len(layers)])
    values = recipe.activation(x)
    return tuple(
        nn.functional.linear(values, recipe.weight(layer.weight), layer.bias) for layer in layers
    )


def _biases(layers: list[Linear]) -> list[Tensor]:
    """None at all, or one for each layer."""
    if all(layer.bias is None for layer in layers):
        return []
    return [
        layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
        for layer in layers
    ]


def _frozen(x: Tensor, layers: list[Linear], held: list[frozen.Frozen]) -> tuple[Tensor, ...]:
    """Weights that are quantized already, stacked at their first call together."""
    whole = frozen.stacked(held)
    if whole is None and not torch.compiler.is_compiling():
        parts = frozen.stack(held)
        for layer, part in zip(layers, parts, strict=True):
            layer.hold(part)
        whole = frozen.stacked(parts)
    dtype = layers[0].out_dtype(x)
    if whole is None:
        return tuple(
            frozen.linear(x, part, layer.bias, layer.recipe, dtype)
            for layer, part in zip(layers, held, strict=True)
        )
    biases = _biases(layers)
    y = frozen.linear(x, whole, torch.cat(biases) if biases else None, layers[0].recipe, dtype)
    return torch.split(y, [layer.out_features for layer in layers], -1)
