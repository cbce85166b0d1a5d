"""The linear layer, forward and backward (T1, T7)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import quest
from quest.conformance import inputs
from quest.conformance.public import properties
from quest.conformance.public.capabilities import DTYPES, GRIDS
from quest.conformance.public.court import Court
from quest.conformance.strategies import SEEDS
from quest.recipes import Recipe

from . import drawing

ROWS, OUTS = st.sampled_from((1, 2, 5, 13)), st.sampled_from((1, 3, 7, 48))


def _layer(court: Court, grid: str, data: st.DataObject) -> tuple[Recipe, int]:
    """The same quantizer for both operands, and a width."""
    capabilities = court.impl.capabilities
    block = drawing.block(court, data)
    q = quest.Quantizer(quest.grids.parse(grid), quest.Hadamard(block),
                        drawing.estimator(grid, capabilities))  # fmt: skip
    return Recipe(grid, q, q), data.draw(drawing.widths(block, capabilities), label="width")


def _tensors(
    dtype: str, width: int, data: st.DataObject
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """x (rows, width), w (outs, width), grad (rows, outs), bias (outs,), and their Python."""
    rows, outs = data.draw(ROWS, label="rows"), data.draw(OUTS, label="outs")
    kind = data.draw(st.sampled_from(drawing.PLAIN), label="distribution")
    seed = data.draw(SEEDS, label="seed")
    drawn = {
        "x": (kind, (rows, width), seed),
        "w": ("gaussian", (outs, width), seed + 1),
        "grad": ("gaussian", (rows, outs), seed + 2),
        "bias": ("gaussian", (outs,), seed + 3),
    }
    made = {n: inputs.draw(k, s, drawing.dtype_of(dtype), i) for n, (k, s, i) in drawn.items()}
    code = {n: f"inputs.draw({k!r}, {s}, torch.{dtype}, {i})" for n, (k, s, i) in drawn.items()}
    return made, code


def _recipe(made: Recipe) -> str:
    q = drawing.quantizer(made.weight.spec)
    return f"quest.recipe('bf16', weight={q}, activation={q})"


@pytest.mark.judges("linear", "fake_quantize", declares=("blocks", "accumulator"), dtype=DTYPES,
                    grid=GRIDS)  # fmt: skip
@given(data=st.data())
def test_forward(court: Court, dtype: str, grid: str, data: st.DataObject) -> None:
    recipe, width = _layer(court, grid, data)
    t, code = _tensors(dtype, width, data)
    court.judge(properties.forward, {n: code[n] for n in "xw"}, (t["x"], t["w"], None, recipe),
                f"None, {_recipe(recipe)}")  # fmt: skip


@pytest.mark.judges("linear", "fake_quantize", declares=("blocks", "accumulator", "bias", "grids"),
                    dtype=DTYPES)  # fmt: skip
@given(data=st.data())
def test_bias(court: Court, dtype: str, data: st.DataObject) -> None:
    grid = drawing.grid(court, data)
    recipe, width = _layer(court, grid, data)
    t, code = _tensors(dtype, width, data)
    names = ("x", "w", "bias")
    court.judge(properties.forward, {n: code[n] for n in names}, (*(t[n] for n in names), recipe),
                _recipe(recipe))  # fmt: skip


@pytest.mark.judges("linear_backward", "fake_quantize", "quantize", "mask",
                    declares=("blocks", "accumulator"), dtype=DTYPES, grid=GRIDS)  # fmt: skip
@given(data=st.data())
def test_backward(court: Court, dtype: str, grid: str, data: st.DataObject) -> None:
    recipe, width = _layer(court, grid, data)
    t, code = _tensors(dtype, width, data)
    names = ("x", "w", "grad")
    court.judge(properties.backward, {n: code[n] for n in names},
                (*(t[n] for n in names), recipe), _recipe(recipe))  # fmt: skip
