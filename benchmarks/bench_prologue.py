"""Quantizers that make their rows themselves, against the rows made first.

The baseline is what models did before: the rows by torch.compile, in one kernel, then our quantizer
without a prologue. Both read halves of one tensor, as a stacked product leaves them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import quest
from quest import eager, lowbit, operands, prologue
from quest.conformance import examine, judges
from quest.conformance.lanes import Lane
from quest.conformance.oracle import lift
from quest.conformance.verdict import Verdict
from quest.kernels import rows as by_row

from . import cases, gate
from .timed import Timed


def _halves(wide: Tensor) -> tuple[Tensor, Tensor]:
    left, right = wide.tensor_split(2, -1)
    return left, right


def _judge(name: str, kind: str, width: int) -> gate.Judge:
    def judge(lane: Lane, distribution: str) -> list[Verdict]:
        q = quest.recipe(name).activation
        wide = gate.normal(gate.ROWS, 2 * width, distribution)
        # Gates of other magnitudes leave rows of near zeros, which say nothing of ties.
        return examine.gated(lane, *_halves(wide), q, kind, conclusive=distribution == "gaussian")

    return judge


def _rows_of(wide: Tensor) -> Tensor:
    left, right = _halves(wide)
    return F.silu(left) * right


def _time(
    timed: Timed, name: str, rows: int, spec: str, width: int, judge: gate.Judge,
    run: Callable[[Tensor, Tensor], object], encode: Callable[[Tensor], object],
) -> None:  # fmt: skip
    """run of both halves, against a compiled gate and `encode` of its rows."""
    torch.compiler.reset()
    made: Callable[[Tensor], Tensor] = torch.compile(_rows_of)
    timed(
        spec=spec,
        shape=(rows, width),
        key=(name, spec, width),
        judge=judge,
        draw=((rows, 2 * width),),
        run=lambda wide: run(*_halves(wide)),
        baseline=lambda wide: encode(made(wide)),
    )


@pytest.mark.parametrize(("rows", "width", "recipe"), cases.gates())
def test_gated(timed: Timed, rows: int, width: int, recipe: str) -> None:
    """silu(gate) * value, quantized: operand, scale and sums; no mask, as in a frozen layer."""
    q = quest.recipe(recipe, estimator=quest.STE()).activation
    kind = (operands.kinds(q, q) or ("",))[0]
    _time(
        timed, "gated", rows, q.spec, width, _judge(recipe, kind, width),
        lambda left, right: prologue.gated_encode(left, right, q.spec, kind),
        lambda x: lowbit.encode(x, q.spec, kind),
    )  # fmt: skip


@pytest.mark.parametrize(("rows", "width", "recipe"), cases.gates())
def test_gated_saved(timed: Timed, rows: int, width: int, recipe: str) -> None:
    """The same in training: with the mask, and the operand packed for the backward."""
    q = quest.recipe(recipe).activation
    kind = (operands.kinds(q, q) or ("",))[0]
    run, encode = (
        (prologue.launch_encode_gated, lowbit.launch_encode_saved)
        if cases.CUDA
        else (eager.encode_gated, eager.encode_saved)
    )

    def judge(lane: Lane, name: str) -> list[Verdict]:
        """What is written beside the operand: that of the rows that are judged."""
        wide = gate.normal(gate.ROWS, 2 * width, name)
        shown = prologue.gated_encode_shown(*_halves(wide.to(cases.DEVICE)), q.spec, kind)[3]
        found = run(*_halves(wide.to(cases.DEVICE)), q, kind)
        with by_row.only(False):  # whose scales may differ in their last bit
            expected = encode(shown, q, kind)
        same = [
            judges.exact("saved", *(lift(t.view(torch.uint8)) for t in pair))
            for pair in zip(found, expected, strict=True)
        ]
        return [*_judge(recipe, kind, width)(lane, name), *same]

    _time(
        timed, "gated_saved", rows, q.spec, width, judge,
        lambda left, right: run(left, right, q, kind), lambda x: encode(x, q, kind),
    )  # fmt: skip
