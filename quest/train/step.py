"""One update of a model: plain calls or, on CUDA, graphs that are captured once and replayed.

A step of a large model queues thousands of kernels, and Python can need longer for that than a GPU
for the work. A CUDA graph is the same kernels on the same addresses, queued by one call: the
numbers are those of the plain step. The cut follows the step. The first micro-batch makes the
gradients, the others add to them, the update clips and moves the weights: a graph each, which share
one pool of memory and are replayed in the order in which they were captured.

What changes between steps lies where the graphs read it: the tokens in tensors that are written
before each replay, the learning rate in a tensor on the GPU (see `optimizer`). Nothing inside a
graph asks the device for a value.
Source: PyTorch, "CUDA semantics", CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from quest.train.errors import UserError
from quest.train.optimizer import CLIP, capturable, set_rate

WARM_UP = 3  # steps before the capture: compilers, handles and the optimizer's state


class Step:
    """An update of ``model`` by plain calls; ``loss`` is the mean over the windows it is given."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[Tensor], Tensor]
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self._loss = loss
        device = next(model.parameters()).device
        self.total = torch.zeros((), device=device)
        self.norm = torch.zeros((), device=device)

    def first(self, windows: Tensor, share: float) -> None:
        """Begin a step with a micro-batch, which is ``share`` of the batch."""
        self.optimizer.zero_grad()
        self.total.zero_()
        self.more(windows, share)

    def more(self, windows: Tensor, share: float) -> None:
        """Add a micro-batch's gradients and loss."""
        loss = self._loss(windows) * share
        loss.backward()  # type: ignore[no-untyped-call]
        self.total += loss.detach()

    def end(self) -> None:
        """Clip and update."""
        self.norm.copy_(nn.utils.clip_grad_norm_(self.model.parameters(), CLIP))
        self.optimizer.step()

    def run(self, batch: Tensor, micro_batch: int) -> None:
        """The whole update, with the rate that the optimizer has."""
        for i, part in enumerate(torch.split(batch, micro_batch)):
            (self.more if i else self.first)(part, len(part) / len(batch))
        self.end()

    def __call__(self, batch: Tensor, micro_batch: int, rate: float) -> tuple[float, float]:
        """Update by ``batch`` ``(B, seq + 1)``; its loss, and the norm of the gradient before
        clipping."""
        set_rate(self.optimizer, rate)
        self.run(batch, micro_batch)
        return self.total.item(), self.norm.item()


class Graphs(Protocol):
    """What captures; tests have one for the CPU."""

    def aside(self, run: Callable[[], None]) -> None:
        """Run off the default stream, as a capture will."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Take down what ``run`` queues, without doing it; returns what does it."""


class CudaGraphs:
    """CUDA graphs on ``device``, which share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def aside(self, run: Callable[[], None]) -> None:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._side.wait_stream(current)
            with torch.cuda.stream(self._side):
                run()
            current.wait_stream(self._side)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self._device):
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                    run()
            except RuntimeError as error:
                # Ending a capture that failed raises as well; what failed stands before it.
                reason = error.__context__ or error
                raise UserError(
                    f"the step can't be captured as a CUDA graph ({reason}): "
                    "--no-graph trains without one"
                ) from error
        return graph.replay


class CapturedStep:
    """The updates of ``step``: the first ones plain, then as graphs. All batches have one shape."""

    def __init__(self, step: Step, graphs: Graphs) -> None:
        self._step = step
        self._graphs = graphs
        self._done = 0
        self._parts: list[tuple[Tensor, Callable[[], None]]] = []
        self._end: Callable[[], None] | None = None
        self._asked: tuple[torch.Size, int] | None = None

    def __call__(self, batch: Tensor, micro_batch: int, rate: float) -> tuple[float, float]:
        """As of `Step`."""
        asked = (batch.shape, micro_batch)
        if self._asked not in (None, asked):
            raise ValueError(
                f"a captured step takes batches of one shape and part: {self._asked}, got {asked}"
            )
        self._asked = asked
        # At once: a copy from the host that waits for the graph before it would stall both.
        batch = batch.to(self._step.total.device)
        set_rate(self._step.optimizer, rate)
        if self._done < WARM_UP:
            self._graphs.aside(partial(self._step.run, batch, micro_batch))
        else:
            if self._end is None:
                self._end = self._capture(batch, micro_batch)
            for part, (windows, replay) in zip(
                torch.split(batch, micro_batch), self._parts, strict=True
            ):
                windows.copy_(part)
                replay()
            self._end()
        self._done += 1
        return self._step.total.item(), self._step.norm.item()

    def _capture(self, batch: Tensor, micro_batch: int) -> Callable[[], None]:
        """Fill in the parts; returns the update."""
        step = self._step
        # The gradients are made again, in the graphs' memory.
        step.optimizer.zero_grad()
        made: dict[tuple[bool, int], tuple[Tensor, Callable[[], None]]] = {}
        windows: dict[int, Tensor] = {}
        for i, part in enumerate(torch.split(batch, micro_batch)):
            kind = (i == 0, len(part))
            if kind not in made:
                still = windows.setdefault(len(part), part.clone())
                run = partial(step.more if i else step.first, still, len(part) / len(batch))
                made[kind] = still, self._graphs.capture(run)
            self._parts.append(made[kind])
        with capturable(step.optimizer):
            return self._graphs.capture(step.end)
