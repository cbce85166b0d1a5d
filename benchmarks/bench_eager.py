"""Frozen layers in eager mode as models call them: stacked, behind a gate or a norm, in autocast.

Against the same of `torch.nn`, call after call from Python as `test_frozen_eager` of bench_linear:
the time is the host's where it can't queue calls as fast as the device makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quest
from quest import Recipe, frozen, joint, operands
from quest.conformance import examine
from quest.conformance.lanes import Lane
from quest.conformance.verdict import Verdict

from . import cases, ceilings, gate
from .bench_linear import in_a_row, judge_of_frozen, layers
from .timed import Timed

OUTSIDE, INSIDE = cases.FROZEN[0]
EPS = 1e-5


def _frozen(
    made: Recipe, count: int = 1, bias: bool = False
) -> tuple[list[quest.Linear], list[nn.Linear], tuple[Tensor, ...]]:
    """So many layers, those of torch, and what ours read of their weights."""
    pairs = [layers(INSIDE, OUTSIDE, made, bias) for _ in range(count)]
    ours, dense = [one.freeze() for one, _ in pairs], [other for _, other in pairs]
    held = frozen.freeze(torch.cat([layer.weight.detach() for layer in dense]), made)
    if count > 1:
        assert joint.stack(ours)
    return ours, dense, held.read()


def _time(
    timed: Timed, name: str, tokens: int, made: Recipe, count: int, judge: gate.Judge,
    run: Callable[..., object], baseline: Callable[..., object], read: tuple[Tensor, ...],
    inputs: int = 1,
) -> None:  # fmt: skip
    """count: of layers. inputs: how many `run` takes, (tokens, INSIDE) each."""

    def quiet(call: Callable[..., object]) -> Callable[..., Any]:
        return torch.no_grad()(in_a_row(call))

    timed(
        spec=made.spec,
        shape=(tokens, INSIDE, count * OUTSIDE),
        draw=((tokens, INSIDE),) * inputs,
        key=(name, made.spec, tokens),
        judge=judge,
        run=quiet(run),
        baseline=quiet(baseline),
        constant=read,
        operations=2.0 * tokens * INSIDE * OUTSIDE * count,
        ceiling=ceilings.of(made),
        calls=cases.EAGER_CALLS,
    )


def _kind(made: Recipe) -> str:
    return (operands.kinds(made.activation, made.weight) or ("",))[0]


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("tokens", "recipe"), cases.around())
def test_together(timed: Timed, tokens: int, recipe: str, bias: bool) -> None:
    """q, k and v: three layers on one input, whose weights lie stacked."""
    made = quest.recipe(recipe)
    ours, dense, read = _frozen(made, 3, bias)
    _time(
        timed, f"together{bias}", tokens, made, 3,
        judge_of_frozen(tokens, INSIDE, 3 * OUTSIDE, made, 3, bias),
        lambda x: quest.together(x, ours), lambda x: tuple(layer(x) for layer in dense), read,
    )  # fmt: skip


@pytest.mark.parametrize(("tokens", "recipe"), cases.around())
def test_autocast(timed: Timed, tokens: int, recipe: str) -> None:
    """One layer under autocast to the dtype that its input has."""
    made = quest.recipe(recipe)
    (ours,), (dense,), read = _frozen(made)

    def cast(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            with torch.autocast(cases.DEVICE, torch.bfloat16):
                y: Tensor = layer(x)
            return y

        return call

    _time(
        timed, "autocast", tokens, made, 1, judge_of_frozen(tokens, INSIDE, OUTSIDE, made),
        cast(ours), cast(dense), read,
    )  # fmt: skip


@pytest.mark.parametrize(("tokens", "recipe"), cases.around())
def test_behind_a_gate(timed: Timed, tokens: int, recipe: str) -> None:
    """A layer on silu(gate) * up."""
    made = quest.recipe(recipe)
    (ours,), (dense,), read = _frozen(made)
    layer = judge_of_frozen(tokens, INSIDE, OUTSIDE, made)

    def judge(lane: Lane, name: str) -> list[Verdict]:
        pair = [gate.normal(gate.ROWS, INSIDE, name, seed) for seed in (0, 1)]
        sure = name == "gaussian"  # as in bench_prologue
        found = examine.gated(lane, pair[0], pair[1], made.activation, _kind(made), conclusive=sure)
        return [*found, *layer(lane, name)]

    _time(
        timed, "behind a gate", tokens, made, 1, judge,
        lambda left, right: quest.gated(left, right, ours),
        lambda left, right: dense(F.silu(left) * right), read, inputs=2,
    )  # fmt: skip


@pytest.mark.parametrize(("tokens", "recipe"), cases.around())
def test_behind_a_norm(timed: Timed, tokens: int, recipe: str) -> None:
    """q, k and v behind the addition of a residual and an RMSNorm."""
    made = quest.recipe(recipe)
    ours, dense, read = _frozen(made, 3)
    norm = nn.RMSNorm(INSIDE, EPS, device=cases.DEVICE, dtype=cases.DTYPE)
    stack = judge_of_frozen(tokens, INSIDE, 3 * OUTSIDE, made, 3)

    def judge(lane: Lane, name: str) -> list[Verdict]:
        x, residual = (gate.normal(gate.ROWS, INSIDE, name, seed) for seed in (0, 1))
        weight = gate.normal(1, INSIDE, "gaussian", seed=2)[0]
        found = examine.normed(lane, x, residual, weight, EPS, made.activation, _kind(made))
        return [*found, *stack(lane, name)]

    def plain(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        h = residual + x
        normed = norm(h)
        return h, *(layer(normed) for layer in dense)

    _time(
        timed, "behind a norm", tokens, made, 3, judge,
        lambda x, residual: quest.normed(x, norm, ours, residual)[1], plain, read, inputs=2,
    )  # fmt: skip
