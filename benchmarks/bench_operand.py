"""What a layer keeps for its backward: integers packed into 2 or 4 bits, and decoded.

Torch has no packing of bits: its own is a shift and a sum of the entries that share a byte, eager.
"""

from __future__ import annotations

import pytest
from torch import Tensor

from quest import eager, lowbit, operands
from quest.conformance import examine, judges
from quest.conformance.lanes import Lane
from quest.conformance.verdict import Verdict

from . import baselines, cases, gate
from .timed import Timed


@pytest.mark.parametrize(("rows", "width", "grid"), cases.packed_operands())
def test_pack_operand(timed: Timed, rows: int, width: int, grid: str) -> None:
    """Bytes of an operand that is there; for what `blocks.cu` does not quantize."""
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


@pytest.mark.parametrize(("rows", "width", "grid"), cases.packed_operands())
def test_encode_saved(timed: Timed, rows: int, width: int, grid: str) -> None:
    """Operand, scale, mask and packed bytes, as a layer asks for them: on CUDA in one pass.

    The baseline is the quantizer and then `pack`, which is what was done before.
    """
    q = cases.quantizer(grid, "dense")
    made, encode, pack = (
        (lowbit.launch_encode_saved, lowbit.launch_encode, lowbit.launch_pack)
        if cases.CUDA
        else (eager.encode_saved, eager.encode, eager.pack_operand)
    )
    stride = operands.saved(q, "integers").stride

    def judge(lane: Lane, name: str) -> list[Verdict]:
        x = gate.normal(gate.ROWS, width, name)
        operand, *_, saved = (t.cpu() for t in made(x.to(cases.DEVICE), q, "integers"))
        codes = operand // stride  # of stride times code + 1/2, rounded down
        return [*examine.encoded(lane, x, q, "integers"), judges.packed(q, codes, saved)]

    timed(
        spec=q.spec,
        shape=(rows, width),
        key=("encode_saved", q.spec, width),
        judge=judge,
        run=lambda x: made(x, q, "integers"),
        baseline=lambda x: pack(encode(x, q, "integers")[0], q),
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
