"""AdamW and its learning rate, as the published runs set them (method.md, section 8)."""

from __future__ import annotations

import math

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
    """AdamW over all parameters of ``model``; its rate is to be set before each step.

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
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=True)
