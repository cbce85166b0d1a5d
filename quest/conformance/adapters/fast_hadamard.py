"""The CUDA fast Hadamard transform, `fast_hadamard_transform.hadamard_transform`.

Written from its documentation and not run: it needs a CUDA device and its own build. Its orders
with a factor of 12, 20, 28 or 40 are not declared, since their matrices were not compared with the
specification's; its backward there is known to apply H where H^T is due.
"""

from __future__ import annotations

import importlib.util
from typing import Any, ClassVar

import torch


class Adapter:
    """Powers of two up to 32768, each block a row of the library's transform."""

    capabilities: ClassVar[dict[str, Any]] = {
        "device": "cuda",
        "dtypes": ["float32", "bfloat16", "float16"],
        # It pads a last axis below 8 with zeros.
        "blocks": [2**k for k in range(3, 16)],
        "deterministic": True,
    }
    departures: ClassVar[list[str]] = [
        "orders 12, 20, 28 and 40 times 2^k: the backward applies H where H^T is due"
    ]

    def unavailable(self) -> str | None:
        """Why it can't run here."""
        if importlib.util.find_spec("fast_hadamard_transform") is None:
            return "fast_hadamard_transform is not installed"
        return None

    def hadamard(self, x: torch.Tensor, block: int) -> torch.Tensor:
        """x (..., d); d a multiple of block."""
        from fast_hadamard_transform import hadamard_transform

        made: torch.Tensor = hadamard_transform(x.reshape(-1, block), scale=block**-0.5)
        return made.reshape(x.shape)

    def hadamard_transpose(self, x: torch.Tensor, block: int) -> torch.Tensor:
        """What its autograd gives for the gradient x."""
        zero = torch.zeros_like(x, requires_grad=True)
        (grad,) = torch.autograd.grad(self.hadamard(zero, block), zero, x)
        return grad
