"""What Hopper's tensor cores do at the most, from registers and shared memory alone.

Measured on an H100 80GB HBM3 with `wgmma` in a loop: 1976 TOP/s of int8 and 15,800 of single bits
(kernels/README.md, Product); 2:4 sparse int8 does twice the operations of a dense product.
"""

from __future__ import annotations

import torch

from quest import Recipe, operands
from quest.sparsity import NM

INT8, BITS = 1976.0, 15_800.0
SPARSE = 2 * INT8


def of(made: Recipe, compressed: bool = False) -> float:
    """TOP/s of a recipe's product of integers; 0 where it has none, or on another GPU.

    compressed: a 2:4 sparse weight is multiplied in its compressed form.
    """
    kinds = operands.kinds(made.activation, made.weight)
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    if kinds is None or not hopper:
        return 0.0
    if kinds[0] == "bits":
        return BITS
    return SPARSE if compressed and made.weight.sparsity == NM(2, 4) else INT8
