"""What stands before a quantizer in an MLP: SwiGLU's gate (arXiv 2002.05202, section 2).

x = silu(gate) * value, silu(g) = g / (1 + exp(-g)). The fused operator computes x in float32 and
rounds it once to the dtype of its inputs; the quantizer's definition then applies to that x.
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
