"""The fused backward of the quantizer, (grad * mask) H^T, against a select and a dense product.

Ours reads the mask as bits, torch's as bool: one byte an element.
"""

from __future__ import annotations

import pytest
import torch

from quest import ops, packing
from quest.conformance import examine
from quest.conformance.lanes import Lane
from quest.conformance.verdict import Verdict

from . import baselines, cases, gate
from .timed import Timed


@pytest.mark.parametrize(("width", "order"), cases.transforms())
def test_masked_transpose(timed: Timed, width: int, order: int) -> None:
    """dx = (grad * mask) H^T with half of the bits set."""
    h = baselines.matrix(order, cases.DEVICE, cases.DTYPE)
    g = torch.Generator(cases.DEVICE).manual_seed(0)
    size = (cases.ROWS, width // 8)
    mask = torch.randint(256, size, generator=g, dtype=torch.uint8, device=cases.DEVICE)
    flags = packing.unpack(mask, 1, width).bool()

    def judge(lane: Lane, name: str) -> list[Verdict]:
        grad = gate.normal(gate.ROWS, width, name)
        return examine.backward(lane, grad, mask[: gate.ROWS].cpu(), order)

    timed(
        spec=f"hadamard{order}",
        shape=(cases.ROWS, width),
        key=("masked_transpose", order, width),
        judge=judge,
        run=lambda grad: ops.masked_transpose(grad, mask, order),
        baseline=lambda grad: baselines.masked_transpose(grad, flags, h),
        constant=(mask,),
    )
