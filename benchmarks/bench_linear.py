"""The linear layer in eager mode, against `torch.nn.Linear` with the same weight and dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quest
from quest import Recipe, frozen, paths
from quest.conformance import examine
from quest.conformance.lanes import Lane
from quest.conformance.verdict import Verdict
from quest.gate.clock import input_sets, size

from . import cases, ceilings, gate
from .timed import Timed

GATE_FEATURES = 48  # rectangular, and a multiple of 16 like every size that is timed


def layers(
    inside: int, outside: int, made: Recipe, bias: bool = False
) -> tuple[quest.Linear, nn.Linear]:
    torch.manual_seed(0)
    dense = nn.Linear(inside, outside, bias, cases.DEVICE, cases.DTYPE)
    return quest.Linear.from_linear(dense, made), dense


def forward(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = layer(x)
    return y


def judge_of_layer(
    tokens: int,
    inside: int,
    outside: int,
    made: Recipe,
    path: str,
    dtype: torch.dtype = cases.DTYPE,
    together: int = 1,
) -> gate.Judge:
    """For `gate.open_for`: the layer, with a gradient and without, by the kernels that are timed.

    together: how many layers of so many outputs share their input.
    """
    parts = (GATE_FEATURES,) * together if together > 1 else ()
    features = GATE_FEATURES * together

    def judge(lane: Lane, name: str) -> list[Verdict]:
        # As few as are timed, or more than are multiplied with packed codes (`paths.FEW_ROWS`).
        rows = min(tokens, 4 * gate.ROWS)
        x = gate.normal(rows, inside, name, dtype=dtype)
        w = gate.normal(features, inside, "gaussian", seed=1, dtype=dtype)
        grad = gate.normal(rows, features, "gaussian", seed=2, dtype=dtype)
        with gate.tiles_of(made, tokens, outside, inside):
            return examine.layer(lane, x, w, grad, None, made, path, parts)

    return judge


def judge_of_frozen(
    tokens: int, inside: int, outside: int, made: Recipe, together: int = 1, bias: bool = False
) -> gate.Judge:
    """The same, of layers whose weights are frozen, and stacked to so many outputs in all.

    bias: whether they have one, of the dtype that is timed.
    """
    rows = min(tokens, 4 * gate.ROWS)
    parts = (GATE_FEATURES,) * together if together > 1 else ()

    def judge(lane: Lane, name: str) -> list[Verdict]:
        w = gate.normal(GATE_FEATURES * together, inside, "gaussian", seed=1)
        b = gate.normal(1, len(w), "gaussian", seed=2)[0] if bias else None
        with gate.tiles_of(made, tokens, outside, inside):
            return examine.frozen(lane, gate.normal(rows, inside, name), w, b, made, parts)

    return judge


def path_of(tokens: int, inside: int, made: Recipe) -> str:
    """The path of the layer that is timed: the gate must see the same."""
    return paths.choose(torch.empty(tokens, inside, device=cases.DEVICE, dtype=cases.DTYPE), made)


@pytest.mark.parametrize(("tokens", "inside", "outside", "recipe"), cases.layers() + cases.live())
def test_forward(timed: Timed, tokens: int, inside: int, outside: int, recipe: str) -> None:
    """y = Q(x H) Q(w H)^T, no gradient kept; the weight is quantized each time."""
    made = quest.recipe(recipe)
    path = path_of(tokens, inside, made)
    ours, dense = layers(inside, outside, made)

    timed(
        spec=made.spec,
        shape=(tokens, inside, outside),
        draw=((tokens, inside),),
        key=("layer", made.spec, tokens, inside, outside, path),
        judge=judge_of_layer(tokens, inside, outside, made, path),
        run=lambda x: forward(ours, x),
        baseline=lambda x: forward(dense, x),
        constant=(dense.weight.detach(),),
        operations=2.0 * tokens * inside * outside,
        ceiling=ceilings.of(made) if path == "integers" else 0.0,
    )


def time_frozen(
    timed: Timed,
    made: Recipe,
    layer: quest.Linear,
    tokens: int,
    run: Callable[..., object],
    baseline: Callable[..., object],
    calls: int = 1,
) -> None:
    """Both run so many calls of a frozen layer, on one input of so many tokens."""
    (outside, inside), bias = layer.weight.shape, layer.bias is not None
    shape, held = (tokens, inside, outside), frozen.freeze(layer.weight, made)
    timed(
        spec=made.spec,
        shape=shape,
        draw=((tokens, inside),),
        key=("frozen", made.spec, *shape, *(["bias"] if bias else [])),
        judge=judge_of_frozen(*shape, made, bias=bias),
        run=run,
        baseline=baseline,
        constant=held.read(),
        operations=2.0 * math.prod(shape),
        ceiling=ceilings.of(made, held.form(tokens, inside) == "compressed"),
        calls=calls,
    )


@pytest.mark.parametrize(("tokens", "inside", "outside", "recipe"), cases.frozen())
def test_frozen(timed: Timed, tokens: int, inside: int, outside: int, recipe: str) -> None:
    """The forward of a layer whose weight is frozen: inference."""
    made = quest.recipe(recipe)
    ours, dense = layers(inside, outside, made)
    ours.freeze()
    time_frozen(timed, made, ours, tokens, lambda x: forward(ours, x), lambda x: forward(dense, x))


@pytest.mark.parametrize(("tokens", "inside", "outside", "recipe", "bias"), cases.eager())
def test_frozen_eager(
    timed: Timed, tokens: int, inside: int, outside: int, recipe: str, bias: bool
) -> None:
    """The same, call after call from Python, and the host waits before the first.

    The time is the host's where it can't queue calls as fast as the device makes them.
    """

    made, calls = quest.recipe(recipe), in_a_row(forward)
    ours, dense = layers(inside, outside, made, bias)
    ours.freeze()
    time_frozen(
        timed, made, ours, tokens, lambda x: calls(ours, x), lambda x: calls(dense, x),
        cases.EAGER_CALLS,
    )  # fmt: skip


def in_a_row(call: Callable[..., Any]) -> Callable[..., Any]:
    """EAGER_CALLS calls, before which the host waits for the device."""

    def calls(*arguments: Any) -> Any:
        if cases.CUDA:
            torch.cuda.synchronize()
        for _ in range(cases.EAGER_CALLS):
            y = call(*arguments)
        return y

    return calls


@pytest.mark.parametrize(("tokens", "inside", "outside", "recipe"), cases.graphs())
def test_frozen_graph(timed: Timed, tokens: int, inside: int, outside: int, recipe: str) -> None:
    """A call of such layers in turn, whose weights the cache can't hold, as one CUDA graph.

    Of no fewer layers than a model has: how a graph begins and ends is in its time.
    """
    made = quest.recipe(recipe)
    ours, dense = layers(inside, outside, made)
    held = size(frozen.freeze(ours.weight, made).read())
    many = max(input_sets(held, cases.DEVICE), cases.PREFILLED[0].layers)
    pairs = [(ours, dense), *(layers(inside, outside, made) for _ in range(many - 1))]
    mine, theirs = zip(*((one.freeze(), other) for one, other in pairs), strict=True)
    x = torch.randn(tokens, inside, device=cases.DEVICE, dtype=cases.DTYPE)

    def captured(chain: Sequence[nn.Linear]) -> Callable[[Tensor], Tensor]:
        for layer in chain:
            forward(layer, x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ys = [forward(layer, x) for layer in chain]

        def replay(_: Tensor) -> Tensor:
            graph.replay()
            return ys[-1]

        return replay

    time_frozen(timed, made, ours, tokens, captured(mine), captured(theirs), many)


@pytest.mark.parametrize(("tokens", "inside", "outside", "recipe"), cases.layers())
def test_forward_backward(
    timed: Timed, tokens: int, inside: int, outside: int, recipe: str
) -> None:
    """Forward, and the gradients of input and weight."""
    made = quest.recipe(recipe)
    path = path_of(tokens, inside, made)
    ours, dense = layers(inside, outside, made)

    def step(layer: nn.Linear, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        y = layer(x)
        return y.detach(), *torch.autograd.grad(y, (x, layer.weight), grad)

    timed(
        spec=made.spec,
        shape=(tokens, inside, outside),
        draw=((tokens, inside), (tokens, outside)),
        key=("layer", made.spec, tokens, inside, outside, path),
        judge=judge_of_layer(tokens, inside, outside, made, path),
        run=lambda x, grad: step(ours, x, grad),
        baseline=lambda x, grad: step(dense, x, grad),
        constant=(dense.weight.detach(),),
    )
