"""The linear layer, forward and backward (method, 5. The linear layer; QuEST, arXiv 2502.05003).

y  = X̂ Ŵ^T + b                   X̂ = Q(x H), Ŵ = Q(w H): H cancels in the product
dx = ((G Ŵ) * M_x) H^T           G = dL/dy; scales are constants
dw = ((G^T X̂) * M_w) H^T
db = sum of G over rows
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from . import hadamard, quantize, sparsity
from .arrays import Bool, Float64, real
from .grids import Grid


@dataclass(frozen=True, eq=False)
class Operand:
    """How an operand is treated; the fields are the arguments of `quantize.quantize`.

    grid=None rotates without rounding: the activations of a weight-only layer, or, with a sparsity,
    sparse weights in full precision. Its mask is 1 everywhere, and estimator and parameter are
    ignored.
    """

    grid: Grid | None
    block: int
    estimator: str = "ste"
    parameter: float = 1.0
    sparsity: sparsity.Pattern | None = None


def _matrix(name: str, value: npt.ArrayLike) -> Float64:
    array = real(name, value)
    if array.ndim != 2:
        raise ValueError(f"{name} has shape {array.shape}; two axes are allowed")
    return array


def _operands(
    x: npt.ArrayLike, w: npt.ArrayLike, activation: Operand, weight: Operand
) -> tuple[Float64, Float64]:
    x, w = _matrix("x", x), _matrix("w", w)
    if x.shape[1] != w.shape[1]:
        raise ValueError(f"w has width {w.shape[1]}; the width of x, {x.shape[1]}, is allowed")
    if activation.block != weight.block:
        raise ValueError(
            f"weight has block {weight.block}; the block of the activation,"
            f" {activation.block}, is allowed, since only then does H cancel"
        )
    return x, w


def _values_and_mask(x: Float64, operand: Operand) -> tuple[Float64, Bool]:
    """X̂ and its mask, both of the shape of x."""
    if operand.grid is None:
        rotated = hadamard.apply(x, operand.block)
        keep = sparsity.keep(rotated, operand.sparsity)
        return np.where(keep, rotated, 0.0), np.ones(x.shape, dtype=np.bool_)
    q = quantize.quantize(
        x, operand.grid, operand.block, operand.estimator, operand.parameter, operand.sparsity
    )
    return q.values, q.mask


def forward(
    x: npt.ArrayLike,
    w: npt.ArrayLike,
    bias: npt.ArrayLike | None,
    activation: Operand,
    weight: Operand,
) -> Float64:
    """y = X̂ Ŵ^T + b, float64 (rows, out).

    x: real (rows, in). w: real (out, in). bias: real (out,) or None.
    Raises ValueError for operands of different blocks or widths and for a bias of another shape.
    """
    x, w = _operands(x, w, activation, weight)
    x_hat, _ = _values_and_mask(x, activation)
    w_hat, _ = _values_and_mask(w, weight)
    with np.errstate(invalid="ignore", over="ignore"):
        y = x_hat @ w_hat.T
    if bias is None:
        return y
    bias = real("bias", bias)
    if bias.shape != (w.shape[0],):
        raise ValueError(f"bias has shape {bias.shape}; ({w.shape[0]},) is allowed")
    return y + bias


def backward(
    g: npt.ArrayLike,
    x: npt.ArrayLike,
    w: npt.ArrayLike,
    activation: Operand,
    weight: Operand,
) -> tuple[Float64, Float64, Float64]:
    """(dx, dw, db), float64 of shapes (rows, in), (out, in) and (out,).

    g: dL/dy, real (rows, out). x: real (rows, in). w: real (out, in).
    Raises ValueError for operands of different blocks or widths and for a g of another shape.
    """
    x, w = _operands(x, w, activation, weight)
    g = _matrix("g", g)
    if g.shape != (x.shape[0], w.shape[0]):
        raise ValueError(f"g has shape {g.shape}; ({x.shape[0]}, {w.shape[0]}) is allowed")
    x_hat, x_mask = _values_and_mask(x, activation)
    w_hat, w_mask = _values_and_mask(w, weight)
    with np.errstate(invalid="ignore", over="ignore"):
        # What is masked is 0, also where it is not finite: a mask selects.
        dx = hadamard.apply_transpose(np.where(x_mask, g @ w_hat, 0.0), activation.block)
        dw = hadamard.apply_transpose(np.where(w_mask, g.T @ x_hat, 0.0), weight.block)
    return dx, dw, g.sum(axis=0)
