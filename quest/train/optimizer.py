"""AdamW and its learning rate, as the published runs set them (method.md, section 8)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

WARM_UP = 0.1  # share of the steps
FINAL = 0.1  # share of the peak that the cosine ends at
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
CLIP = 1.0


def learning_rate(step: int, steps: int, peak: float) -> float:
    """The rate of update ``step`` (from 0) of ``steps``.

    Linear over the first 10% up to ``peak``, then ``peak * (0.1 + 0.9 (1 + cos(pi p)) / 2)`` with
    ``p`` from 0 to, but not including, 1.
    """
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * progress)))


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """AdamW over all parameters of ``model``; `set_rate` is to set its rate before each step.

    On CUDA the rate is a float32 tensor there, with a captured step and without.

    Weights of linear layers decay. Norms and the token embedding do not: their scale is no
    capacity, and rows of rare tokens would fade without ever being read.
    """
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        stays = parameter.ndim < 2 or "embed_tokens" in name
        (keep if stays else decay).append(parameter)
    groups = [
        {"params": decay, "weight_decay": WEIGHT_DECAY},
        {"params": keep, "weight_decay": 0.0},
    ]
    device = next(model.parameters()).device
    rate = torch.zeros((), device=device) if device.type == "cuda" else 0.0
    return torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next update, in place where a graph may read it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@contextmanager
def capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let a CUDA graph capture ``step()`` inside the block.

    The fused update does the same either way; outside a capture torch would warn of the flag.
    """
    before = [group["capturable"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group, flag in zip(optimizer.param_groups, before, strict=True):
            group["capturable"] = flag


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint keeps; the same on every device, captured or not."""
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["lr"] = float(group["lr"])
    return state


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take over what `state_of` gave; the rate stays where it lies."""
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
