"""Train one model with one recipe."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quest.linear import quantize_
from quest.models import SIZES, Llama, LlamaConfig
from quest.train import checkpoint
from quest.train.checkpoint import Checkpoint
from quest.train.config import TrainConfig
from quest.train.data import Dataset
from quest.train.errors import UserError
from quest.train.folder import RunFolder
from quest.train.metrics import Metrics, Row
from quest.train.optimizer import adamw, learning_rate, restore, state_of
from quest.train.step import CapturedStep, CudaGraphs, Step
from quest.train.stopping import Stopped, heard


class DivergedError(RuntimeError):
    """A loss or a gradient is no number any more."""


class Watcher(Protocol):
    """Whoever wants to see each step; `quest.train.progress` has two."""

    def start(self, recipe: str, step: int, steps: int, tokens_per_step: int) -> None: ...

    def step(self, row: Row) -> None: ...

    def stop(self) -> None: ...


@dataclass(frozen=True)
class Job:
    """What `train` needs besides the recipe: the same for all recipes of a run."""

    config: TrainConfig
    data: Dataset
    folder: RunFolder
    metrics: Metrics
    device: torch.device
    compile: bool
    graph: bool = True
    recompute: bool | int = False

    @property
    def architecture(self) -> LlamaConfig:
        return SIZES[self.config.size].architecture(self.data.vocab_size)


@dataclass(frozen=True)
class Outcome:
    """How a recipe ended; losses as in `Row`, ``seconds`` and ``tokens`` over all resumed parts."""

    recipe: str
    parameters: int
    steps: int
    tokens: int
    seconds: float
    val_loss: float
    val_loss_per_byte: float


def build(job: Job, recipe: str) -> Llama:
    """The model before its first step: for one seed the same weights whatever the recipe.

    Raises `UserError` where the recipe does not fit the architecture.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.config.seed)
        model = Llama(job.architecture)
    try:
        quantize_(model, recipe)
    except ValueError as error:
        raise UserError(str(error)) from error
    return model.to(job.device).recompute_(job.recompute)


def token_loss(model: nn.Module, windows: Tensor, device: torch.device) -> Tensor:
    """Mean nats a token over ``windows`` ``(B, seq + 1)``; matrix products in bfloat16 on a GPU."""
    windows = windows.to(device)
    with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def validate(model: nn.Module, job: Job) -> float:
    """Mean nats a token over the held-out windows, which are the same at every call."""
    config = job.config
    windows = job.data.held_out_windows(config.eval_windows, config.seq)
    model.eval()
    total = 0.0
    for part in torch.split(windows, config.micro_batch):
        total += token_loss(model, part, job.device).item() * len(part)
    model.train()
    return total / len(windows)


def stepper(model: nn.Module, optimizer: torch.optim.Optimizer, job: Job) -> Step | CapturedStep:
    """What does an update: captured as CUDA graphs on a GPU, unless ``job`` forbids it."""
    plain = Step(model, optimizer, lambda windows: token_loss(model, windows, job.device))
    if job.graph and job.device.type == "cuda":
        return CapturedStep(plain, CudaGraphs(job.device))
    return plain


def _require(recipe: str, step: int, value: float, what: str) -> None:
    if not math.isfinite(value):
        raise DivergedError(f"recipe {recipe}: the {what} is {value} at step {step}")


def train(job: Job, recipe: str, watcher: Watcher, *, resume: bool) -> Outcome:
    """Train ``recipe`` to the end, from its checkpoint where ``resume`` and there is one.

    Raises `DivergedError` for a loss, on held-out text or not, or a gradient that is not finite;
    the last checkpoint is then of a step before it. Raises `Stopped` where a signal asked for it,
    after a step that is saved.
    """
    config, data = job.config, job.data
    identity = checkpoint.identity(recipe, job.architecture, config, data)
    path = job.folder.checkpoint(recipe)
    model = build(job, recipe)
    optimizer = adamw(model)
    done, before = 0, 0.0
    if resume and path.exists():
        last = checkpoint.load(path, identity)
        model.load_state_dict(last.model)
        restore(optimizer, last.optimizer)
        done, before = last.step, last.seconds
        del last
    if job.compile:
        model.compile()
    update = stepper(model, optimizer, job)
    tokens_per_step = config.batch * config.seq
    val_loss = validate(model, job) if done == config.steps else math.nan
    seconds = before
    began = time.perf_counter() - before
    watcher.start(recipe, done, config.steps, tokens_per_step)
    with ExitStack() as ends:
        ends.callback(watcher.stop)
        signals = ends.enter_context(heard())
        for step in range(done + 1, config.steps + 1):
            rate = learning_rate(step - 1, config.steps, config.lr)
            batch = data.batch(config.seed, step - 1, config.batch, config.seq)
            loss, norm = update(batch, config.micro_batch, rate)
            _require(recipe, step, loss, "loss")
            _require(recipe, step, norm, "gradient's norm")
            last_step = step == config.steps
            measured = last_step or step % config.eval_every == 0
            if measured:
                val_loss = validate(model, job)
                _require(recipe, step, val_loss, "loss on held-out text")
            seconds = time.perf_counter() - began
            row = Row(
                recipe=recipe,
                step=step,
                loss=loss,
                val_loss=val_loss if measured else None,
                val_loss_per_byte=val_loss / data.bytes_per_token if measured else None,
                lr=rate,
                tokens=step * tokens_per_step,
                seconds=seconds,
                grad_norm=norm,
            )
            job.metrics.add(row)
            stops = signals[:1]
            if last_step or stops or step % config.save_every == 0:
                state = Checkpoint(identity, step, seconds, model.state_dict(), state_of(optimizer))
                checkpoint.save(path, state)
            watcher.step(row)
            if stops:
                raise Stopped(stops[0], f"after step {step} of {recipe}, which is saved")
        if signals:  # while the last step was saved
            raise Stopped(signals[0], f"after step {config.steps} of {recipe}, which is saved")
    return Outcome(
        recipe=recipe,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        steps=config.steps,
        tokens=config.steps * tokens_per_step,
        seconds=seconds,
        val_loss=val_loss,
        val_loss_per_byte=val_loss / data.bytes_per_token,
    )
