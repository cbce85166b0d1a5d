"""torchao's fake quantizer of integers, symmetric and per row: `IntxFakeQuantizer`.

It stands where QuEST's quantizer does in other people's training. It rotates nothing (block 1) and
has its own grid: the integers from -2^(bits-1) to 2^(bits-1) - 1 times the row's largest magnitude
over 2^(bits-1) - 1/2.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, ClassVar

import torch

BITS = (2, 3, 4, 8)


@functools.cache
def _fake_quantizer(bits: int) -> Any:
    from torchao.quantization.granularity import PerAxis
    from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

    dtype = getattr(torch, f"int{bits}")
    return IntxFakeQuantizer(IntxFakeQuantizeConfig(dtype, PerAxis(0), is_symmetric=True))


class Adapter:
    """Values only: the fake quantizer keeps its codes to itself."""

    capabilities: ClassVar[dict[str, Any]] = {
        "dtypes": ["float32", "bfloat16", "float16"],
        "blocks": [1],
        "grids": [f"uniform{b}" for b in BITS],
        "inputs": ["non_finite"],
        "width_multiple": 2,  # a group of one entry is refused
        "ties": "even",
        "deterministic": True,
    }
    departures: ClassVar[list[str]] = [
        "the scale is the row's largest magnitude, not its root mean square times the optimal "
        "factor for a Gaussian",
        "the grid holds 0 and is not symmetric: integers, and not the odd multiples of a half",
        "no rotation, and the gradient's mask is that of clamping",
    ]

    def unavailable(self) -> str | None:
        """Why it can't run here."""
        return None if importlib.util.find_spec("torchao") else "torchao is not installed"

    def fake_quantize(self, x: torch.Tensor, format: Any) -> torch.Tensor:
        """x (rows, d) to values of the same dtype."""
        made: torch.Tensor = _fake_quantizer(format.levels.bit_length() - 1)(x)
        return made
