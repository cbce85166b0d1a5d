"""The gate: no time without every judge's consent.

The lane that is timed runs on a few rows of the very width and dtype that is timed, so that it is
the same compiled kernel, and `quest.conformance.examine` judges what it wrote. Of the two kernels
that quantize rows, which is chosen by how many they are, both are judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from quest import Recipe, operands
from quest.conformance import lanes
from quest.conformance.inputs import draw
from quest.conformance.lanes import Lane
from quest.conformance.verdict import Rejected, Verdict

from .cases import CUDA, DTYPE

# A multiple of 16, like the rows that are timed: Triton compiles another kernel for others.
ROWS = 16
DISTRIBUTIONS = ("gaussian", "heavy", "mixed_rows")


class RedGateError(AssertionError):
    """A judge refused what the lane wrote: its time means nothing."""


@dataclass(frozen=True)
class Passed:
    """An open gate. worst_ratio: the worst error over its bound, at most 1. elements: judged."""

    lane: str
    worst_ratio: float
    elements: int


Judge = Callable[[Lane, str], list[Verdict]]

_passed: dict[tuple[object, ...], Passed] = {}
_refused: dict[tuple[object, ...], str] = {}


def lane() -> Lane:
    """The lane that is timed on this machine."""
    name = "triton-cuda" if CUDA else "torch-cpu"
    return next(each for each in lanes.all_lanes() if each.name == name)


@contextmanager
def tiles_of(
    made: Recipe, rows: int, columns: int, width: int, turned: bool = False
) -> Iterator[None]:
    """Makes the integers' products of the gate's few rows the very kernels that are timed.

    width: entries of a row of either operand. turned: some of their columns are, by the rotary
    embedding.
    """
    from quest.kernels import cuda, product, sparse

    kinds = operands.kinds(made.activation, made.weight)
    if not CUDA or kinds is None:
        yield
        return
    processors = cuda.processors(torch.cuda.current_device())
    bits = kinds[0] == "bits"
    bytes_ = -(-width // 8) if bits else width
    dense = product.shape(bits, rows, columns, bytes_, processors, turned)
    with product.only(dense), sparse.only(sparse.shape(columns, rows, processors)):
        yield


def _quantizers() -> list[AbstractContextManager[None]]:
    """The gate's few rows by the kernel for such, and on CUDA by that of many, too."""
    if not CUDA:
        return [nullcontext()]
    from quest.kernels import rows

    return [nullcontext(), rows.only(False)]


def normal(
    rows: int, width: int, distribution: str, seed: int = 0, dtype: torch.dtype = DTYPE
) -> torch.Tensor:
    """A CPU tensor for a judge, in the dtype that is timed."""
    return draw(distribution, (rows, width), dtype, seed)


def open_for(key: tuple[object, ...], judge: Judge) -> Passed:
    """Run judge(lane, distribution) for every distribution, once for each key.

    Raises RedGateError where a verdict is a failure or the lane breaks a rule.
    """
    __tracebackhide__ = True
    if key in _refused:
        raise RedGateError(_refused[key])
    if key not in _passed:
        try:
            verdicts = []
            for name in DISTRIBUTIONS:
                for kernels in _quantizers():
                    with kernels:
                        verdicts += [v.require() for v in judge(lane(), name)]
        except (Rejected, lanes.GuardError) as error:
            _refused[key] = (
                f"no time is reported, {lane()} is wrong for {' '.join(map(str, key))}: {error}"
            )
            raise RedGateError(_refused[key]) from None
        _passed[key] = Passed(
            lane().name, max(v.ratio for v in verdicts), sum(v.elements for v in verdicts)
        )
    return _passed[key]
