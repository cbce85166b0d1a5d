"""The quantizer, fused: rotation, scale, rounding, mask; and selection for sparse weights.

Against the same steps in plain torch: a dense product, a norm, floor and clamp (or bucketize).
"""

from __future__ import annotations

import pytest

from quest import Quantizer, ops
from quest.conformance import examine
from quest.conformance.lanes import Lane
from quest.conformance.verdict import Verdict

from . import baselines, cases, gate
from .timed import Timed


def _judge(q: Quantizer, width: int) -> gate.Judge:
    def judge(lane: Lane, name: str) -> list[Verdict]:
        x = gate.normal(gate.ROWS, width, name)
        return examine.quantizer(lane, x, q, conclusive=name == "gaussian")

    return judge


@pytest.mark.parametrize(("rows", "width", "grid", "pattern"), cases.quantizers())
def test_quantize(timed: Timed, rows: int, width: int, grid: str, pattern: str) -> None:
    """Packed codes, scale, packed mask; what a low-bit product and the backward read."""
    q = cases.quantizer(grid, pattern)
    h = baselines.matrix(cases.BLOCK, cases.DEVICE, cases.DTYPE)
    timed(
        spec=q.spec,
        shape=(rows, width),
        key=("quantizer", q.spec, width),
        judge=_judge(q, width),
        run=lambda x: ops.quantize(x, q.spec, True),
        baseline=lambda x: baselines.quantize(x, h, q),
    )


@pytest.mark.parametrize(("rows", "width", "grid", "pattern"), cases.quantizers())
def test_fake_quantize(timed: Timed, rows: int, width: int, grid: str, pattern: str) -> None:
    """Values in the input's dtype and packed mask; what a layer of values multiplies."""
    q = cases.quantizer(grid, pattern)
    h = baselines.matrix(cases.BLOCK, cases.DEVICE, cases.DTYPE)
    timed(
        spec=q.spec,
        shape=(rows, width),
        key=("quantizer", q.spec, width),
        judge=_judge(q, width),
        run=lambda x: ops.fake_quantize(x, q.spec),
        baseline=lambda x: baselines.fake_quantize(x, h, q),
    )
