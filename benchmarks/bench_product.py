"""The product of two low-bit operands, also gated, added or turned, against bf16's of its shape.

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
from quest.kernels.product import Turned
from quest.rotary import rotate_heads
from quest.rotated_product import rotated_product
from quest.sparse_product import sparse_product
from quest.sparsity import NM

from . import cases, ceilings, gate
from .timed import Timed

GATE_ROWS, GATE_COLUMNS = 140, 264  # more than one tile each way, and none of them whole
POSITIONS, HEAD = 512, 128  # of a sequence whose queries and keys are turned


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


@pytest.mark.parametrize(("rows", "width", "columns", "recipe"), cases.rotated_products())
def test_rotated_product(timed: Timed, rows: int, width: int, columns: int, recipe: str) -> None:
    """q, k and v, two of them turned, in one kernel; bf16's product and a compiled rotation."""
    torch.compiler.reset()
    angles = torch.randn(POSITIONS, HEAD // 2, device=cases.DEVICE)
    turned = Turned(angles.cos(), angles.sin(), columns // 3 * 2)
    _time(timed, rows, width, columns, recipe, torch.compile(_turn(turned)), turned=turned)


def _turn(turned: Turned) -> Callable[[Tensor], Tensor]:
    cos, sin, columns = turned

    def run(y: Tensor) -> Tensor:
        first, rest = y.tensor_split([columns], -1)
        heads = rotate_heads(first.view(-1, POSITIONS, columns), cos, sin)
        return torch.cat((heads.flatten(0, 1), rest), -1)

    return run


def _add(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return residual + F.linear(x, weight)


def _tables(turned: Turned | None) -> tuple[object, ...]:
    return () if turned is None else (POSITIONS, HEAD, turned.columns)


def _gate(y: Tensor) -> Tensor:
    first, second = y.tensor_split(2, -1)
    return F.silu(first) * second


def _time(
    timed: Timed, rows: int, width: int, columns: int, recipe: str,
    after: Callable[[Tensor], Tensor] | None = None,
    add: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None, turned: Turned | None = None,
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
    gated = after is not None and turned is None
    multiply = sparse_product if compressed else gated_product if gated else lowbit.product
    if turned is not None:
        multiply = rotated_product

    def judge(lane: Lane, name: str) -> list[Verdict]:
        x = gate.normal(GATE_ROWS, width, name)
        w = gate.normal(GATE_COLUMNS, width, "gaussian", seed=1)
        with gate.tiles_of(made, rows, columns, width, turned is not None):
            beside = gate.normal(GATE_ROWS, GATE_COLUMNS, name, seed=2) if add else None
            rotary = None
            if turned is not None:  # of two sequences a head, and what is none
                rotary = (*(t[: GATE_ROWS // 2].cpu() for t in turned[:2]), HEAD)
            return examine.product(
                lane, x, w, None, made, cases.DTYPE, compressed, gated, beside, rotary
            )

    def prepare(x: Tensor, *beside: Tensor) -> tuple[Tensor, ...]:
        a, scale, _, sums = lowbit.encode(x, pair[0].spec, kinds[0])
        return a, scale, sums, *beside

    def run(*given: Tensor) -> Tensor:
        a, scale, sums, *beside = given[2 if add else 1 :]
        y: Tensor = multiply(
            a, *weight, scale, b_scale, sums, b_sums, None, names, ",".join(kinds), width,
            cases.DTYPE, *beside, *(turned or ()),
        )  # fmt: skip
        return y

    def baseline(x: Tensor, *given: Tensor) -> Tensor:
        if add:
            return add(given[0], x, dense)
        return (after or (lambda y: y))(F.linear(x, dense))

    timed(
        spec=made.spec,
        shape=(rows, width, columns),
        draw=((rows, width), (rows, columns)) if add else ((rows, width),),
        key=("product", made.spec, rows, width, columns, not gated, add is None, *_tables(turned)),
        judge=judge,
        run=run,
        baseline=baseline,
        constant=(*weight, b_scale),
        prepare=prepare,
        operations=2.0 * rows * width * columns,
        ceiling=ceilings.of(made, compressed),
    )
