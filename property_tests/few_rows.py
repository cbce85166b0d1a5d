"""Rows that few.cu quantizes and multiplies: what it shows of them, and what is judged of that."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import quest
from property_tests.places import Place
from quest import operands, packing
from quest.conformance import examine, inputs, judges
from quest.kernels import hopper, outputs


def weight(recipe: str, columns: int, width: int) -> tuple[Tensor, ...]:
    """(packed codes, scale, sums, integers) on the CPU."""
    bits = quest.recipe(recipe).weight.require_grid().storage_bits
    codes = inputs.unsigned(bits, (columns, width), width).long()
    whole = 2 * codes - (2**bits - 1)
    scale = torch.arange(columns)[:, None] / columns + 0.5
    return packing.pack(codes, bits), scale, whole.sum(1, keepdim=True).int(), whole


def shown(place: Place, x: Tensor, spec: str, recipe: str, *w: Tensor) -> list[Tensor]:
    """(y, operand, scale, sums) on the CPU, of rows by `spec` and a weight by `recipe`.

    Skips the test where the kernel doesn't run.
    """
    if reason := hopper.unavailable(torch.device(place.device)):
        pytest.skip(reason)
    rows, *rest = (t.to(place.device) for t in (x, *w))
    grid = quest.recipe(recipe).weight.require_grid().name
    made = place.few_linear_shown(rows, *rest, None, spec, grid, torch.float32)
    return [t.cpu() for t in made]


def judged(place: Place, x: Tensor, recipe: str, columns: int = 16) -> None:
    """T2, T3, T0 and T6 of what the kernel shows of x; it writes every byte, twice the same."""
    made, width = quest.recipe(recipe), x.shape[-1]
    kinds = operands.kinds(made.activation, made.weight)
    assert kinds is not None
    *w, whole = weight(recipe, columns, width)
    seen = []
    for byte in (0xFF, 0x55):
        with outputs.poisoned(byte):
            seen.append(shown(place, x, made.activation.spec, recipe, *w))
    for first, second in zip(*seen, strict=True):
        assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))
    y, a, scale, sums = seen[0]
    integers = judges.whole(a, kinds[0], width)
    forms = [
        operands.form(q.require_grid(), kind)
        for q, kind in zip((made.activation, made.weight), kinds, strict=True)
    ]
    spread = forms[0].spread
    codes = torch.from_numpy((integers // spread - 1) // 2).to(torch.int8)
    by = examine.TENSOR_CORES
    for verdict in (
        judges.exact("odd", integers % (2 * spread), np.full_like(integers, spread)),
        judges.scaled(x, scale, 128, by),
        judges.coded(x, made.activation, codes, scale, conclusive=False, sums=by),
        judges.exact("sums", sums.numpy(), integers.sum(-1, keepdims=True)),
        judges.multiplied(
            (integers, forms[1].spread * whole.numpy()),
            (forms[0].unit, forms[1].unit),
            (scale, w[1]),
            None,
            y,
        ),
    ):
        verdict.require()
