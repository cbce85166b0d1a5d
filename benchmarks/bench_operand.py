"""What a layer keeps for its backward: int8 operands packed into 2 or 4 bits, and decoded.

Torch has no packing of bits: its own is a shift and a sum of the entries that share a byte, eager.
"""

from __future__ import annotations

import pytest
from torch import Tensor

from quest import lowbit, operands
from quest.conformance import examine
from quest.conformance.lanes import Lane
from quest.conformance.verdict import Verdict

from . import baselines, cases, gate
from .timed import Timed


@pytest.mark.parametrize(("rows", "width", "grid"), cases.packed_operands())
def test_pack_operand(timed: Timed, rows: int, width: int, grid: str) -> None:
    """Bytes of an operand that is there; a layer's forward does this once an operand."""
    q = cases.quantizer(grid, "dense")
    form = operands.saved(q, "integers")

    def judge(lane: Lane, name: str) -> list[Verdict]:
        return examine.encoded(lane, gate.normal(gate.ROWS, width, name), q, "integers")

    timed(
        spec=q.spec,
        shape=(rows, width),
        key=("pack_operand", q.spec, width),
        judge=judge,
        prepare=lambda x: (lowbit.encode(x, q.spec, "integers")[0],),
        run=lambda _, operand: lowbit.pack_operand(operand, q.spec),
        baseline=lambda _, operand: baselines.pack_operand(operand, form),
    )


@pytest.mark.parametrize(("rows", "width", "grid", "kind"), cases.decoded_operands())
def test_decode(timed: Timed, rows: int, width: int, grid: str, kind: str) -> None:
    """Values of an operand in the kind that a layer keeps, and as int8; the backward's share."""
    q = cases.quantizer(grid, "dense")
    form = operands.readable(q, kind)
    made = kind if kind in operands.KINDS else "integers"

    def judge(lane: Lane, name: str) -> list[Verdict]:
        return examine.encoded(lane, gate.normal(gate.ROWS, width, name), q, made)

    def prepare(x: Tensor) -> tuple[Tensor, ...]:
        operand, scale, _, _ = lowbit.encode(x, q.spec, made)
        return operand if kind == made else lowbit.pack_operand(operand, q.spec), scale

    timed(
        spec=q.spec,
        shape=(rows, width),
        key=("decode", q.spec, kind, width),
        judge=judge,
        prepare=prepare,
        run=lambda _, operand, scale: lowbit.decode(
            operand, scale, q.spec, kind, width, cases.DTYPE
        ),
        baseline=lambda _, operand, scale: baselines.decode(operand, scale, form, width),
    )
