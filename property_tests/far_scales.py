"""What kernels/scales.cuh promises, bit for bit: rows near and far, and sums to try it with.

Near, where factor times scale lies from 2^-100 to 2^90, products are rounded to float32 one by one;
far, only the last one is, after float64.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

LOW, HIGH = 2.0**-100, 2.0**90
# One that is no power of two; of bits it has all, so that products with it are rounded.
FACTOR = float(np.float32(9.5186e-4))


def rows(factor: float) -> torch.Tensor:
    """Scales (64,) float32: both sides of what is near, the ends of float32, and far ones alone."""
    # Past both ends on either side, whichever way factor times scale is rounded.
    ends = [end / factor * (1 + n * 2.0**-23) for end in (LOW, HIGH) for n in range(-4, 5)]
    more = [2.0**p * m for p in (-149, -140, -126, -70, 0, 64, 100, 126) for m in (1.0, 1.999999)]
    # All rows of a warp; as powers of two they would show nothing.
    far = [1.9999998 * 2.0**126] * 28
    return torch.tensor([*ends, *more, 0.0, 3.4028234663852886e38, *far], dtype=torch.float32)


def columns(n: int) -> torch.Tensor:
    """Scales (n,) float32 of any power of two, subnormal ones too."""
    g = torch.Generator().manual_seed(n)
    power = torch.randint(-149, 128, (n,), generator=g).double()
    return ((1 + torch.rand(n, generator=g)).double() * torch.exp2(power - 1)).float()


def dequantized(
    p: NDArray[np.int64], factor: float, row: torch.Tensor, column: torch.Tensor
) -> torch.Tensor:
    """y (M, N) float32 of sums p (M, N) below 2^24 in size, and scales (M,), (N,) float32."""
    scale, of_column = row.numpy()[:, None], column.numpy().astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        near = np.float32(factor) * scale
        inside = (near >= np.float32(LOW)) & (near <= np.float32(HIGH))
        # In float64 the product of two float32 is exact.
        y = ((p.astype(np.float32) * near).astype(np.float64) * of_column).astype(np.float32)
        wide = p * (np.float64(np.float32(factor)) * scale.astype(np.float64)) * of_column
        return torch.from_numpy(np.where(inside, y, wide.astype(np.float32)))
