"""`scipy.linalg.hadamard`, a matrix of ±1 in Sylvester's order, as a block transform.

SciPy gives powers of two only, and does not normalise: a product with block**-0.5 follows. Rows
are multiplied by it in their own dtype.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.linalg

Array = npt.NDArray[np.floating]


class Adapter:
    """x H in blocks, a dense product in NumPy; float16 is computed in float32."""

    capabilities = {
        "arrays": "numpy",
        "dtypes": ["float32", "float16"],
        "blocks": [2**k for k in range(11)],
        "inputs": ["extremes", "non_finite", "empty", "axes", "layouts"],
        "deterministic": True,
    }

    def hadamard(self, x: Array, block: int) -> Array:
        """x (..., d) float32 or float16."""
        matrix = scipy.linalg.hadamard(block).astype(np.float32) * np.float32(block**-0.5)
        blocks = x.reshape(*x.shape[:-1], -1, block).astype(np.float32)
        return (blocks @ matrix).reshape(x.shape).astype(x.dtype)
