"""A whole Llama against itself in bfloat16: a step of training, and prefill.

The blocks of both are compiled. A step is the trainer's: float32 weights, bfloat16 products by
autocast, the gradient clipped, AdamW. It is timed twice: as it is queued call by call, where the
host's time counts if it can't keep ahead; and, "graph", captured whole as one CUDA graph that is
replayed, both models alike, which is the device's time. Peak memory is that of the first, whose
memory no graph holds. Prefill has bfloat16 weights, ours frozen, and on CUDA it is a graph that is
replayed. What is a graph is also timed by itself, as a model runs (`timing.alone`).
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import quest
from quest import operands
from quest.conformance import examine
from quest.conformance.lanes import Lane
from quest.conformance.verdict import Verdict
from quest.models import Llama, LlamaConfig
from quest.models.llama import rope_angles
from quest.train.loop import token_loss
from quest.train.optimizer import adamw, capturable
from quest.train.step import WARM_UP, CudaGraphs, Step

from . import cases, gate
from .bench_linear import judge_of_frozen, judge_of_layer, path_of
from .timed import Timed

DEVICE = torch.device(cases.DEVICE)


def _llama(config: LlamaConfig, recipe: str, dtype: torch.dtype) -> Llama:
    torch.manual_seed(0)
    with DEVICE:
        model = Llama(config).to(dtype)
    quest.quantize_(model, recipe)
    return model


def _compile_blocks(model: Llama) -> None:
    # One block is compiled and serves for all: minutes less than the whole.
    for block in model.layers:
        block.compile()


def _tokens(config: LlamaConfig, sequences: int, length: int) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (sequences, length), generator=g).to(DEVICE)


def _widths(config: LlamaConfig) -> tuple[tuple[int, int, int], ...]:
    """(in, out, layers that share the input) of a block: q, k and v; o; gate and up; down."""
    d, hidden = config.width, config.hidden
    return (d, d, 3), (d, d, 1), (d, hidden, 2), (hidden, d, 1)


def _held() -> int:
    return torch.cuda.memory_allocated() if cases.CUDA else 0


def _trainer(config: LlamaConfig, recipe: str, recompute: bool | int = False) -> Step:
    """The trainer's step of a new model."""
    model = _llama(config, recipe, torch.float32).recompute_(recompute)
    _compile_blocks(model)
    return Step(model, adamw(model), lambda windows: token_loss(model, windows, DEVICE))


def _plain(
    config: LlamaConfig, recipe: str, windows: Tensor, recompute: bool | int = False
) -> tuple[Callable[[], Tensor], int]:
    """A function that trains a step and returns the loss, and the most bytes that it held."""
    gc.collect()  # what earlier cases left must not be freed meanwhile
    before = _held()
    step = _trainer(config, recipe, recompute)

    def run() -> Tensor:
        step.run(windows, len(windows))
        return step.total

    run()  # makes the optimizer's state
    if cases.CUDA:
        torch.cuda.reset_peak_memory_stats()
    run()
    return run, (torch.cuda.max_memory_allocated() if cases.CUDA else 0) - before


def _captured(
    config: LlamaConfig, recipe: str, windows: Tensor, recompute: bool | int = False
) -> Callable[[], Tensor]:
    """The same as one graph: gradients set aside, forward, backward, clipping and update."""
    gc.collect()
    graphs, step = CudaGraphs(DEVICE), _trainer(config, recipe, recompute)
    whole = functools.partial(step.run, windows, len(windows))
    for _ in range(WARM_UP):
        graphs.aside(whole)
    step.optimizer.zero_grad()  # made again, in the graph's memory
    with capturable(step.optimizer):
        replay = graphs.capture(whole)

    def run() -> Tensor:
        replay()
        return step.total

    return run


# torch.compile itself looks at the gradient of a block's input.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("config", "sequences", "length", "recipe", "graph", "recompute"), cases.trained()
)
def test_train_step(
    timed: Timed, config: LlamaConfig, sequences: int, length: int, recipe: str, graph: bool,
    recompute: bool | int,
) -> None:  # fmt: skip
    """Forward, backward, clipping and the optimizer's update; bf16 never computes twice."""
    made = quest.recipe(recipe)
    windows = _tokens(config, sequences, length + 1)
    tokens = sequences * length

    def judge(lane: Lane, name: str) -> list[Verdict]:
        found = []
        for inside, outside, together in _widths(config):
            path = path_of(tokens, inside, made)
            for dtype in {torch.float32, cases.DTYPE}:  # weights, and some inputs, are float32
                judged = judge_of_layer(tokens, inside, outside, made, path, dtype, together)
                found += judged(lane, name)
        return found

    torch.compiler.reset()
    dense_bytes, bytes_ = 0, 0
    if graph:
        dense = _captured(config, "bf16", windows)
        ours = _captured(config, recipe, windows, recompute)
    else:
        dense, dense_bytes = _plain(config, "bf16", windows)
        ours, bytes_ = _plain(config, recipe, windows, recompute)
    timed(
        spec=made.spec,
        shape=(tokens, config.layers, config.width),
        key=("model", made.spec, tokens, config, *["graph"] * graph, *["recompute"] * recompute),
        judge=judge,
        draw=((1,),),
        run=lambda _: ours(),
        baseline=lambda _: dense(),
        memory=(bytes_, dense_bytes),
        alone=graph,
    )


def _replayed(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same from a CUDA graph: the device's time, and none of the host's.

    A graph does not hold what it reads: the model lives as long as `run`, which is kept.
    """
    for _ in range(3):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()

    def replay(_: Callable[[], Tensor] = run) -> Tensor:
        graph.replay()
        return y

    return replay


@pytest.mark.parametrize(("config", "sequences", "length", "recipe"), cases.prefilled())
def test_prefill(
    timed: Timed, config: LlamaConfig, sequences: int, length: int, recipe: str
) -> None:
    """Logits of whole sequences, nothing cached."""
    made = quest.recipe(recipe)
    tokens = _tokens(config, sequences, length)
    rows = sequences * length
    kinds = operands.kinds(made.activation, made.weight) or ("", "")

    def judge(lane: Lane, name: str) -> list[Verdict]:
        found = []
        for inside, outside, together in _widths(config):
            judged = judge_of_frozen(rows, inside, together * outside, made, together)
            found += judged(lane, name)
        # There norms are the quantizers', gate and up end in a gate, queries and keys are turned,
        # and down adds the residual.
        if cases.CUDA:
            d, columns = config.width, 2 * config.hidden
            x, w = gate.normal(gate.ROWS, d, name), gate.normal(columns, d, "gaussian", seed=1)
            h, weight = gate.normal(gate.ROWS, d, name, seed=2), gate.normal(1, d, "gaussian")[0]
            for residual in (None, h):
                found += examine.normed(
                    lane, x, residual, weight, config.norm_eps, made.activation, kinds[0],
                    conclusive=name == "gaussian",
                )  # fmt: skip
            wide = gate.normal(gate.ROWS, config.hidden, name)
            down = gate.normal(d, config.hidden, "gaussian", seed=1)
            with gate.tiles_of(made, rows, d, config.hidden):
                found += examine.product(lane, wide, down, None, made, cases.DTYPE, residual=h)
            with gate.tiles_of(made, rows, columns, d):
                found += examine.product(lane, x, w, None, made, cases.DTYPE, gate=True)
            rotary = (*rope_angles(config, gate.ROWS, torch.device("cpu")), 2 * d)
            with gate.tiles_of(made, rows, 3 * d, d, turned=True):
                found += examine.product(
                    lane, x, w[: 3 * d], None, made, cases.DTYPE, rotary=rotary
                )
        return found

    def ready(recipe: str) -> Callable[[], Tensor]:
        model = _llama(config, recipe, cases.DTYPE).eval()
        if recipe != "bf16":
            quest.freeze_(model)

        @torch.no_grad()
        def logits() -> Tensor:
            y: Tensor = model(tokens)
            return y

        _compile_blocks(model)
        return _replayed(logits) if cases.CUDA else logits

    torch.compiler.reset()
    dense, ours = ready("bf16"), ready(recipe)
    timed(
        spec=made.spec,
        shape=(rows, config.layers, config.width),
        key=("prefill", made.spec, rows, config),
        judge=judge,
        draw=((1,),),
        run=lambda _: ours(),
        baseline=lambda _: dense(),
        alone=True,
    )
