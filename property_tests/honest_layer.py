"""An honest layer and its gradients in float64, and what judges of a layer are given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import quest
from property_tests.honest import HONEST, Array, pack_bits, run, tensor
from quest.conformance import inputs, judges, oracle
from quest.conformance.verdict import Verdict
from quest.reference import bounds, hadamard


def transposed_case(order: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Array, Tensor]:
    grad = inputs.draw("gaussian", (6, 3 * order), dtype, seed)
    flags = np.random.default_rng(seed).random(grad.shape) < 0.7
    return grad, flags, torch.from_numpy(pack_bits(flags, 1))


@dataclass(frozen=True)
class Layer:
    """One call: inputs, operands as they were multiplied, masks; all rows by columns."""

    x: Tensor
    w: Tensor
    grad: Tensor
    bias: Tensor | None
    recipe: quest.Recipe
    x_out: dict[str, Tensor]
    w_out: dict[str, Tensor]

    @property
    def order(self) -> int:
        return self.recipe.weight.transform.order(self.x.shape[-1])

    @property
    def hats(self) -> tuple[Array, Array]:
        return oracle.lift(self.x_out["values"]), oracle.lift(self.w_out["values"])

    def judge(self, out: dict[str, Array]) -> list[Verdict]:
        tensors = {k: tensor(v, self.x.dtype) for k, v in out.items()}
        tensors |= {"x_hat": self.x_out["values"], "w_hat": self.w_out["values"]}
        masks = self.x_out["mask"], self.w_out["mask"]
        return judges.layer(
            self.x, self.w, self.grad, self.bias, self.recipe, tensors, masks, bounds.U32
        )


@functools.cache
def layer_case(
    recipe: str, order: int, dtype: torch.dtype, bias: bool, seed: int, square: bool = False
) -> Layer:
    made = quest.recipe(recipe, transform=quest.Hadamard(order))
    rows, columns, width = (48, 48, 48) if square else (7, 11, 4 * order)
    x = inputs.draw("gaussian", (rows, width), dtype, seed)
    w = inputs.draw("heavy", (columns, width), dtype, seed + 1)
    grad = inputs.draw("gaussian", (rows, columns), dtype, seed + 2)
    b = inputs.draw("gaussian", (columns,), dtype, seed + 3) if bias else None
    parts = run(x, made.activation, HONEST), run(w, made.weight, HONEST)
    return Layer(x, w, grad, b, made, *parts)


def gradients(c: Layer, product: Callable[[Array, Array], Array] = np.matmul) -> dict[str, Array]:
    """The layer in float64, but for the product."""
    (xh, wh), g = c.hats, oracle.lift(c.grad)
    out = {"y": product(xh, wh.T)}
    for name, a, m, t in (("dx", g, wh, c.x_out), ("dw", g.T, xh, c.w_out)):
        inner = product(a, m) * t["mask"].numpy()
        out[name] = hadamard.apply_transpose(inner.astype(np.float64), c.order)
    if c.bias is not None:
        out["y"] = out["y"] + oracle.lift(c.bias)
        out["db"] = g.sum(0)
    return out
