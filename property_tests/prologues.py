"""What the tests of prologues share: specs of what layers multiply, and halves of a tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quest.kernels.hopper import unavailable

HOPPER = torch.cuda.is_available() and unavailable(torch.device("cuda")) is None
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU and cuda-core")
HALVES = [torch.bfloat16, torch.float16]
# Spec and kind of the operands that layers multiply.
SPECS = {
    "w1a1": ("uniform1/hadamard128/ste/dense", "bits"),
    "w2a2": ("uniform2/hadamard128/ste/dense", "integers"),
    "w4a4": ("uniform4/hadamard128/ste/dense", "integers"),
    "w8a8": ("uniform8/hadamard128/ste/dense", "codes"),
    "ternary": ("ternary/hadamard128/ste/dense", "integers"),
}


def halves(wide: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of one tensor: no row of either follows the row before."""
    gate, value = wide.tensor_split(2, -1)
    return gate, value


def apart(gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return halves(torch.cat((gate, value), -1))
