"""What stands before a quantizer in a transformer: SwiGLU's gate, and RMSNorm.

Gate (arXiv 2002.05202, section 2): x = silu(gate) * value, silu(g) = g / (1 + exp(-g)).
Its gradients: of the gate grad value s (1 + g (1 - s)), s its sigmoid; of the value grad silu(g).
Norm (arXiv 1910.07467, equation 4): x = (h / sqrt(mean(h^2) + eps)) weight, along the last axis.
The fused operators compute x in float32 and round it once to the dtype of their inputs; the
quantizer's definition then applies to that x.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .arrays import Float64, real


def sigmoid(g: npt.ArrayLike) -> Float64:
    """1 / (1 + exp(-g)): real (..., d) to float64; 0 and 1 at the infinities."""
    g = real("g", g)
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-g)), dtype=np.float64)


def gated(gate: npt.ArrayLike, value: npt.ArrayLike) -> Float64:
    """silu(gate) * value: real (..., d) each, of one shape, to float64.

    A gate of minus infinity gives NaN: minus infinity times 0. Raises ValueError for two shapes.
    """
    gate, value = real("gate", gate), real("value", value)
    if gate.shape != value.shape:
        raise ValueError(f"value has shape {value.shape}; that of gate, {gate.shape}, is allowed")
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(gate * sigmoid(gate) * value, dtype=np.float64)


def gated_backward(
    grad: npt.ArrayLike, gate: npt.ArrayLike, value: npt.ArrayLike
) -> tuple[Float64, Float64]:
    """Gradients of gate and value for that of `gated`: real (..., d) each, alike, to float64.

    1 - s is the sigmoid of the negative, which cancels nothing. Raises ValueError for two shapes.
    """
    grad, gate, value = real("grad", grad), real("gate", gate), real("value", value)
    to_value = gated(gate, grad)
    if gate.shape != value.shape:
        raise ValueError(f"value has shape {value.shape}; that of gate, {gate.shape}, is allowed")
    with np.errstate(invalid="ignore", over="ignore"):
        slope = sigmoid(gate) * (1 + gate * sigmoid(-gate))
        return np.asarray(grad * value * slope, dtype=np.float64), to_value


def normed(h: npt.ArrayLike, weight: npt.ArrayLike, eps: float) -> Float64:
    """(h / sqrt(mean(h^2) + eps)) weight: real (..., d) and (d,) to float64 (..., d).

    A row with an infinity is 0 but for NaN in its place; one with a NaN is NaN. Raises ValueError
    for a weight of another width, or an eps that is not positive.
    """
    h, weight = real("h", h), real("weight", weight)
    if weight.shape != h.shape[-1:]:
        raise ValueError(f"weight has shape {weight.shape}; {h.shape[-1:]} is allowed")
    if not eps > 0:
        raise ValueError(f"eps is {eps}; positive numbers are allowed")
    with np.errstate(invalid="ignore", over="ignore"):
        mean = (h**2).sum(-1, keepdims=True) / max(h.shape[-1], 1)
        return np.asarray(h / np.sqrt(mean + eps) * weight, dtype=np.float64)
