"""The CUDA fast Hadamard transform, `fast_hadamard_transform.hadamard_transform`.

Of Dao-AILab/fast-hadamard-transform 1.1.0, read at commit e7706fa; all its orders have run on
an H100. Its transform of powers of two is x H, H in Sylvester's order and without a factor:
the adapter passes n^-1/2 as its `scale`, which is applied in float32 before the one rounding to the
input's dtype. H is symmetric there, so that the backward may apply it again.

Orders 12, 20, 28 and 40 times 2^k, 4 <= 2^k <= 1024, are functions of their own that the package
does not export (`fast_hadamard_transform_interface.hadamard_transform_12N`, `..._20N`, `..._28N`,
`..._40N`). They are not declared: they give x M^T with other Hadamard matrices M, kron(base,
Sylvester) as the specification's but with another base, and the orders that the court asks of
everyone (12, 20, 28, 40) are below their smallest. M of order 12 times 2^k is symmetric (Paley's
second construction). The other three are not, and their backward applies M^T again where M is due.
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
        # Below 8 it pads with zeros and cuts the result: H_1, H_2 and H_4 are corners of H_8.
        "blocks": [2**k for k in range(16)],
        "inputs": ["non_finite", "axes"],
        "deterministic": True,
    }
    departures: ClassVar[list[str]] = [
        "a width that is no power of two is no error: the row is padded with zeros and the result "
        "cut, which is no orthogonal transform",
        "orders 12, 20, 28 and 40 times 2^k, by functions that are not exported, have other "
        "matrices than the specification's; below 4 times 12, 20, 28 and 40 they pad and cut",
        "the backward of orders 20, 28 and 40 times 2^k applies H where H^T is due; that of orders "
        "12 times 2^k is right, since the matrix is symmetric",
        "its build asks for --use_fast_math: subnormal float32 values become 0",
        "rows that do not begin at multiples of 16 bytes are read there all the same: an error of "
        "CUDA, after which the process can use the device no more",
        "a tensor without rows is an error of CUDA",
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
