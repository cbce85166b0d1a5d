"""The product of two low-bit operands, also gated or added, against bf16's of the same shape.

A 2:4 sparse weight is read in its compressed form; its operations are counted as if it were dense.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import quest
from quest import compression, lowbit, operands
from quest.conformance import examine
from quest.conformance.lanes import Lane, no_product
from quest.conformance.verdict import Verdict
from quest.gated_product import gated_product
from quest.sparse_product import sparse_product
from quest.sparsity import NM

from . import cases, ceilings, gate
from .timed import Timed

GATE_ROWS, GATE_COLUMNS = 140, 264  # more than one tile each way, and none of them whole


@pytest.mark.parametrize(("rows", "width", "columns", "recipe"), cases.products())
def test_product(timed: Timed, rows: int, width: int, columns: int, recipe: str) -> None:
    """y = values(a) values(b)^T in bf16, of operands that are there."""
    _time(timed, rows, width, columns, recipe)


@pytest.mark.parametrize(("rows", "width", "columns", "recipe"), cases.gated_products())
def test_gated_product(timed: Timed, rows: int, width: int, columns: int, recipe: str) -> None:
    """silu(gate) value of two such products side by side, against bf16's and a compiled gate."""
    torch.compiler.reset()
    _time(timed, rows, width, 2 * columns, recipe, torch.compile(_gate))


@pytest.mark.parametrize(("rows", "width", "columns", "recipe"), cases.added_products())
def test_added_product(timed: Timed, rows: int, width: int, columns: int, recipe: str) -> None:
    """residual + y in one kernel, against bf16's product and addition, compiled."""
    torch.compiler.reset()
    _time(timed, rows, width, columns, recipe, add=torch.compile(_add))


def _add(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return residual + F.linear(x, weight)


def _gate(y: Tensor) -> Tensor:
    first, second = y.tensor_split(2, -1)
    return F.silu(first) * second


def _time(
    timed: Timed, rows: int, width: int, columns: int, recipe: str,
    gate_of: Callable[[Tensor], Tensor] | None = None,
    add: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> None:  # fmt: skip
    if no_product(gate.lane()) is not None:
        pytest.skip(str(no_product(gate.lane())))
    made = quest.recipe(recipe)
    pair = (made.activation, made.weight)
    kinds = operands.kinds(*pair) or ("", "")
    names = ",".join(q.require_grid().name for q in pair)
    dense = torch.randn(columns, width, device=cases.DEVICE, dtype=cases.DTYPE)
    b, b_scale, _, b_sums = lowbit.encode(dense, pair[1].spec, kinds[1])
    compressed = pair[1].sparsity == NM(2, 4)
    weight = compression.compress(b) if compressed else (b,)
    multiply = sparse_product if compressed else gated_product if gate_of else lowbit.product

    def judge(lane: Lane, name: str) -> list[Verdict]:
        x = gate.normal(GATE_ROWS, width, name)
        w = gate.normal(GATE_COLUMNS, width, "gaussian", seed=1)
        with gate.tiles_of(made, rows, columns):
            gated = gate_of is not None
            beside = gate.normal(GATE_ROWS, GATE_COLUMNS, name, seed=2) if add else None
            return examine.product(lane, x, w, None, made, cases.DTYPE, compressed, gated, beside)

    def prepare(x: Tensor, *beside: Tensor) -> tuple[Tensor, ...]:
        a, scale, _, sums = lowbit.encode(x, pair[0].spec, kinds[0])
        return a, scale, sums, *beside

    def run(*given: Tensor) -> Tensor:
        a, scale, sums, *beside = given[2 if add else 1 :]
        y: Tensor = multiply(
            a, *weight, scale, b_scale, sums, b_sums, None, names, ",".join(kinds), width,
            cases.DTYPE, *beside,
        )  # fmt: skip
        return y

    def baseline(x: Tensor, *given: Tensor) -> Tensor:
        if add:
            return add(given[0], x, dense)
        return (gate_of or (lambda y: y))(F.linear(x, dense))

    timed(
        spec=made.spec,
        shape=(rows, width, columns),
        draw=((rows, width), (rows, columns)) if add else ((rows, width),),
        key=("product", made.spec, rows, width, columns, gate_of is None, add is None),
        judge=judge,
        run=run,
        baseline=baseline,
        constant=(*weight, b_scale),
        prepare=prepare,
        operations=2.0 * rows * width * columns,
        ceiling=ceilings.of(made, compressed),
    )
