"""The block Hadamard transform, against a dense product with the block's matrix."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from quest import ops
from quest.conformance import examine
from quest.conformance.lanes import Lane
from quest.conformance.verdict import Verdict

from . import baselines, cases, gate
from .timed import Timed


def time_transform(
    timed: Timed, width: int, order: int, baseline: Callable[[Tensor], Tensor]
) -> None:
    """y = x H, of ROWS rows, against another way to it."""

    def judge(lane: Lane, name: str) -> list[Verdict]:
        return examine.transform(lane, gate.normal(gate.ROWS, width, name), order)

    timed(
        spec=f"hadamard{order}",
        shape=(cases.ROWS, width),
        key=("hadamard", order, width),
        judge=judge,
        run=lambda x: ops.hadamard(x, order, False),
        baseline=baseline,
    )


@pytest.mark.parametrize(("width", "order"), cases.transforms())
def test_hadamard(timed: Timed, width: int, order: int) -> None:
    """y = x H."""
    h = baselines.matrix(order, cases.DEVICE, cases.DTYPE)
    time_transform(timed, width, order, lambda x: baselines.rotate(x, h))
