"""The block Hadamard transform, against a dense product with the block's matrix."""

from __future__ import annotations

import pytest

from quest import ops
from quest.conformance import examine
from quest.conformance.lanes import Lane
from quest.conformance.verdict import Verdict

from . import baselines, cases, gate
from .timed import Timed


def judge_of_transform(width: int, order: int) -> gate.Judge:
    """For `gate.open_for`: rows of this width in blocks of this order."""

    def judge(lane: Lane, name: str) -> list[Verdict]:
        return examine.transform(lane, gate.normal(gate.ROWS, width, name), order)

    return judge


@pytest.mark.parametrize(("width", "order"), cases.transforms())
def test_hadamard(timed: Timed, width: int, order: int) -> None:
    """y = x H."""
    h = baselines.matrix(order, cases.DEVICE, cases.DTYPE)
    timed(
        spec=f"hadamard{order}",
        shape=(cases.ROWS, width),
        key=("hadamard", order, width),
        judge=judge_of_transform(width, order),
        run=lambda x: ops.hadamard(x, order, False),
        baseline=lambda x: baselines.rotate(x, h),
    )
