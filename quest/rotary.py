"""The rotary embedding of queries and keys, and which layers' outputs it turns.

A head's components i and i + d_head / 2 are a pair, which turns by its position's angle i, as in
Hugging Face's Llama. It is computed in the dtype that components and angles promote to, which with
float32 angles is float32 at the least, and rounded once to that of the components. Where the layers
are frozen, on Hopper, the product's kernel does it while it finishes a tile (`rotated_product`),
with the same bits.
Source: RoPE, arXiv 2104.09864.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .kernels.product import Turned


class Rotary(NamedTuple):
    """How the outputs of the first of several layers on one input are turned.

    cos, sin: (T, d_head / 2) floats, of the angles by position; kernels take float32. layers: how
    many, 2 of q, k and v. Their outputs (..., T, out) are heads of width d_head side by side.
    """

    cos: Tensor
    sin: Tensor
    layers: int


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., d_head), its pairs turned by angles (..., d_head / 2), in x's dtype."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


def rotate_heads(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """y (..., T, n), heads side by side, each turned by the angles (T, d_head / 2) of its row.

    Raises ValueError where n is no multiple of d_head.
    """
    head = 2 * cos.shape[-1]
    _check_width(y.shape[-1], head)
    heads = torch.unflatten(y, -1, (y.shape[-1] // head, head))  # (..., T, h, d_head)
    return rotate(heads, cos[:, None], sin[:, None]).flatten(-2)


def _check_width(width: int, head: int) -> None:
    if width % head:
        raise ValueError(
            f"layers that rotary turns must have a multiple of {head} outputs, heads of twice as "
            f"many as cos has columns; got {width}"
        )


def check(rotary: Rotary, x: Tensor, layers: Sequence[nn.Module]) -> None:
    """Raise TypeError or ValueError unless these are angles for the layers' outputs on x."""
    if not isinstance(rotary, Rotary):
        raise TypeError(f"rotary must be a quest.Rotary, got {type(rotary).__name__}")
    cos, sin, count = rotary
    for name, t in (("x", x), ("cos", cos), ("sin", sin)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{name} must be of floats, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name} must lie where x lies, {x.device}; got {t.device}")
    ops.check_tangents(cos, sin)
    if x.ndim < 2:
        raise ValueError(f"x must be (..., T, in) to be turned, got shape {tuple(x.shape)}")
    if cos.ndim != 2 or cos.shape[0] != x.shape[-2] or cos.shape[1] == 0:
        raise ValueError(
            f"cos must have shape (T, d_head / 2) for the {x.shape[-2]} rows of a sequence in x, "
            f"got {tuple(cos.shape)}"
        )
    if sin.dtype != cos.dtype or sin.shape != cos.shape:
        raise ValueError(
            f"sin must be like cos, {cos.dtype} of shape {tuple(cos.shape)}, got {sin.dtype} of "
            f"shape {tuple(sin.shape)}"
        )
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"rotary.layers must be an int, got {type(count).__name__}")
    if not 1 <= count <= len(layers):
        raise ValueError(f"rotary.layers must be 1 to {len(layers)}, as there are, got {count}")
    for layer in layers[:count]:
        width = getattr(layer, "out_features", None)
        if isinstance(width, int):
            _check_width(width, 2 * cos.shape[1])


def columns(rotary: Rotary, layers: Sequence[Any]) -> Turned:
    """The columns that it turns of the product of these `Linear`s, stacked."""
    return Turned(*rotary[:2], sum(layer.out_features for layer in layers[: rotary.layers]))


def turn(made: tuple[Tensor, ...], rotary: Rotary | None) -> tuple[Tensor, ...]:
    """The outputs of the layers, the first of them turned."""
    if rotary is None:
        return made
    cos, sin, count = rotary
    return (*(rotate_heads(y, cos, sin) for y in made[:count]), *made[count:])


def turn_(y: Tensor, turned: Turned) -> None:
    """Turn the first columns of y (..., T, n) in place: less for the host than a tensor a layer."""
    first = y[..., : turned.columns]
    first.copy_(rotate_heads(first, turned.cos, turned.sin))
