"""`scipy.linalg.hadamard`, a matrix of ±1 in Sylvester's order, as a block transform.

SciPy gives powers of two only, and does not normalise: a product with block**-0.5 follows.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import scipy.linalg

Array = npt.NDArray[np.floating]


class Adapter:
    """x H in blocks, a dense product in float32; H is symmetric."""

    capabilities: ClassVar[dict[str, Any]] = {
        "arrays": "numpy",
        "dtypes": ["float32", "float16"],
        "blocks": [2**k for k in range(11)],
        "inputs": ["non_finite", "empty", "axes", "layouts"],
        "rotation": "product",
        "deterministic": True,
    }

    def hadamard(self, x: Array, block: int) -> Array:
        """x (..., d) float32 or float16; d a multiple of block."""
        matrix = scipy.linalg.hadamard(block).astype(np.float32)
        blocks = x.reshape(*x.shape[:-1], x.shape[-1] // block, block).astype(np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            # The factor comes last: what cancels is then exactly 0.
            y = (blocks @ matrix) * np.float32(block**-0.5)
            return y.reshape(x.shape).astype(x.dtype)

    hadamard_transpose = hadamard
