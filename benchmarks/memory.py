"""What a step of training holds at its peak: `python -m benchmarks.memory`, a table in GB.

    python -m benchmarks.memory                  # the 800M step of the benchmark, three recipes
    python -m benchmarks.memory --size 30M --sequences 64 --recipe bf16 --recipe w8a8

The step runs on fake tensors, which have shapes and no contents, so any machine can tell, in
seconds. Its blocks are compiled as far as the partition into forward and backward, which says what
is saved. Every storage counts once, from the operator that makes it to its end, as
  parameters, optimizer   float32, and AdamW's two averages
  gradients               what `.grad` holds
  saved, by kind          what autograd keeps for the backward; told apart by dtype and shape
  at work                 all else
and the table is the moment at which the sum is largest. Layers of ours take the integers' path, as
on Hopper. What this does not see: rounding to the allocator's blocks, workspaces of libraries, and
which temporaries inductor fuses away. Where there is a GPU the real step runs too, and its
`max_memory_allocated` stands beside the sum.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import click
import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import quest
from quest import mlp, operands, paths, prologue
from quest.models import SIZES, Llama, LlamaConfig
from quest.train.optimizer import adamw
from quest.train.step import Step

from . import cases

PARAMETERS, OPTIMIZER, GRADIENTS, AT_WORK = "parameters", "optimizer", "gradients", "at work"
LOGITS, WEIGHTS = "saved: logits and loss", "saved: bf16 copies of weights"
ATTENTION, GATED = "saved: q, k, v, attention's output", "saved: gate, up, their product"
RESIDUAL, INPUTS = "saved: residual stream, float32", "saved: other activations, bf16"
OURS, OURS_WEIGHTS = "saved: operands and masks, activations", "saved: operands and masks, weights"
SMALL = "saved: scales, norms, tokens"


@dataclass(frozen=True)
class Shape:
    """A step: an architecture, and sequences of so many tokens."""

    config: LlamaConfig
    sequences: int
    length: int

    @property
    def tokens(self) -> int:
        """Of a batch."""
        return self.sequences * self.length

    def kind(self, t: Tensor) -> str:
        """What a saved tensor is."""
        c, n = self.config, self.tokens
        rows = math.prod(t.shape[:-1])
        d, hidden = c.width, c.hidden
        weights = ((d, d), (hidden, d), (d, hidden), (c.vocab_size, d))
        if t.dtype == torch.bfloat16 and tuple(t.shape) in (*weights, *(w[::-1] for w in weights)):
            return WEIGHTS
        if t.dtype in (torch.uint8, torch.int8):
            return OURS if rows == n else OURS_WEIGHTS
        if t.numel() <= max(n, self.length * c.head_width, n * c.heads):
            return SMALL
        if t.numel() == n * c.vocab_size:
            return LOGITS
        if t.numel() == n * c.hidden:
            return GATED
        if t.ndim == 4:
            return ATTENTION
        return RESIDUAL if t.dtype == torch.float32 else INPUTS


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, by kind, and keeps them at the peak."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self._shape = shape
        self._kinds: dict[int, tuple[str, int]] = {}
        self._ends: dict[int, Any] = {}
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled blocks stay compiled: torch would run them eagerly under another mode."""
        return True

    def call(self, t: Tensor, kind: str) -> None:
        """Count t's storage as `kind`, whatever it was before."""
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._kinds:
            self._drop(key)
        else:
            self._ends[key] = weakref.ref(storage, lambda _: self._end(key))
        self._kinds[key] = kind, storage.nbytes()
        self.now[kind] += storage.nbytes()
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()

    def gradient(self, p: Tensor) -> None:
        """What autograd calls on a parameter whose gradient is there."""
        if p.grad is not None:
            self.call(p.grad, GRADIENTS)

    def kind_of(self, t: Tensor) -> str | None:
        """What t's storage counts as."""
        found = self._kinds.get(t.untyped_storage()._cdata)
        return found and found[0]

    def _drop(self, key: int) -> None:
        kind, bytes_ = self._kinds.pop(key)
        self.now[kind] -= bytes_

    def _end(self, key: int) -> None:
        self._drop(key)
        del self._ends[key]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **kwargs or {})
        for t in pytree.tree_leaves(made):
            if isinstance(t, Tensor) and self.kind_of(t) is None:
                self.call(t, AT_WORK)
        return made

    def keep(self, t: Tensor) -> Tensor:
        """What autograd calls on a tensor that it saves."""
        if self.kind_of(t) in (AT_WORK, None):
            self.call(t, self._shape.kind(t))
        return t.detach()


def _loss(model: nn.Module, windows: Tensor) -> Tensor:
    """As `quest.train.loop.token_loss` on a GPU."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


class Partitioned:
    """A backend of torch.compile: the partition that inductor makes, and no kernels.

    calls: of compiled forwards. torch runs blocks eagerly under modes that it thinks strange.
    """

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        made = lookup_backend("aot_eager_decomp_partition")(graph, inputs)

        def run(*args: Any) -> Any:
            self.calls += 1
            return made(*args)

        return run


def _has_kernel(spec: str, rows: Tensor) -> bool:
    return True  # a function: a compiled block can't look into a mock


def at_peak(
    shape: Shape, recipe: str, compiled: bool = True, recompute: bool = False
) -> Counter[str]:
    """Bytes by kind at the peak of a step, the second one: the optimizer has its state.

    recompute: but for bf16, the backward computes gate and up again; see `quest.swiglu`.
    """
    torch.compiler.reset()
    live, backend = Live(shape), Partitioned()
    chosen = nullcontext() if recipe == "bf16" else paths.only("integers")
    # As on the GPU, where a kernel makes the rows of a gate.
    here, there = (mock.patch.object(m, "has_kernel", _has_kernel) for m in (mlp, prologue))
    with FakeTensorMode(allow_non_fake_inputs=True), chosen, here, there:
        model = Llama(shape.config).recompute_(recompute and recipe != "bf16")
        quest.quantize_(model, recipe)
        windows = torch.zeros(shape.sequences, shape.length + 1, dtype=torch.long)
        for block in model.layers if compiled else ():
            block.compile(backend=backend)
        step = Step(model, adamw(model), partial(_loss, model))
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(live.gradient)
        hooks = torch.autograd.graph.saved_tensors_hooks(live.keep, lambda t: t)
        step.run(windows, shape.sequences)  # compiles, and makes the optimizer's state
        step.optimizer.zero_grad()
        for p in model.parameters():
            live.call(p, PARAMETERS)
        for state in step.optimizer.state.values():
            for t in state.values():
                live.call(t, OPTIMIZER)
        before = backend.calls
        with live, hooks:
            step.run(windows, shape.sequences)
    if compiled and backend.calls - before != shape.config.layers:
        raise RuntimeError("this torch does not run compiled blocks where storages are counted")
    return live.peak


def measured(shape: Shape, recipe: str, recompute: bool = False) -> int:
    """The most bytes that the real step holds on this machine's GPU, by its allocator."""
    from .bench_model import _plain

    torch.compiler.reset()
    windows = torch.zeros(
        shape.sequences, shape.length + 1, dtype=torch.long, device=cases.DEVICE
    ).random_(shape.config.vocab_size)
    bytes_ = _plain(shape.config, recipe, windows, recompute and recipe != "bf16")[1]
    gc.collect()
    torch.cuda.empty_cache()
    return bytes_


def table(columns: dict[str, Counter[str]], real: dict[str, int]) -> str:
    """Kinds down, recipes across, in GB (10^9 bytes); each sum over that of the first recipe."""
    saved = {k for c in columns.values() for k in c if c[k] and k.startswith("saved")}
    kinds = [PARAMETERS, OPTIMIZER, GRADIENTS, AT_WORK, *sorted(saved)]
    width = max(map(len, (*kinds, "over " + next(iter(columns)))))

    def line(name: str, cells: Sequence[str]) -> str:
        return name.ljust(width) + "".join(cell.rjust(10) for cell in cells)

    sums = [c.total() for c in columns.values()]
    lines = [line("GB at the peak", list(columns))]
    lines += [line(k, [f"{c[k] / 1e9:.2f}" for c in columns.values()]) for k in kinds]
    lines += [line("sum", [f"{s / 1e9:.2f}" for s in sums])]
    lines += [line("over " + next(iter(columns)), [f"{s / sums[0]:.3f}" for s in sums])]
    if real:
        first = next(iter(real.values()))
        lines += [line("max_memory_allocated", [f"{b / 1e9:.2f}" for b in real.values()])]
        lines += [line("over " + next(iter(real)), [f"{b / first:.3f}" for b in real.values()])]
    return "\n".join(lines)


@click.command()
@click.option("--size", type=click.Choice(list(SIZES)), default="800M", show_default=True)
@click.option("--sequences", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--length", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--vocabulary", type=click.IntRange(1, 2**31 - 1), default=32000, show_default=True)
@click.option(
    "--recipe", "recipes", multiple=True, default=("bf16", "w4a4", "w1a1"), show_default=True
)
@click.option("--eager", is_flag=True, help="Blocks that are not compiled.")
@click.option("--recompute", is_flag=True, help="Gate and up again in the backward; not of bf16.")
def main(
    size: str, sequences: int, length: int, vocabulary: int, recipes: tuple[str, ...], eager: bool,
    recompute: bool,
) -> None:  # fmt: skip
    """What a step of training holds at its peak."""
    shape = Shape(SIZES[size].architecture(vocabulary), sequences, length)
    config = shape.config
    if shape.tokens in (config.width, config.hidden, vocabulary):
        raise click.UsageError(
            f"{shape.tokens} tokens are as many as the model's width, hidden width or vocabulary: "
            "what is a weight and what an activation could not be told apart"
        )
    for name in recipes:
        try:
            made = quest.recipe(name)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--recipe") from None
        if name != "bf16" and operands.kinds(made.activation, made.weight) is None:
            raise click.BadParameter(f"{name} has no product of integers", param_hint="--recipe")
    columns = {recipe: at_peak(shape, recipe, not eager, recompute) for recipe in recipes}
    gpu = cases.CUDA and not eager
    real = {r: measured(shape, r, recompute) for r in recipes} if gpu else {}
    click.echo(
        f"{size}, {sequences} x {length} tokens, blocks {'eager' if eager else 'compiled'}"
        f"{', gate and up again in the backward (not in bf16)' * recompute}"
    )
    click.echo(table(columns, real))


if __name__ == "__main__":
    main()
