"""What one training run computes: everything that its numbers depend on, and how often it looks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quest.models import SIZES
from quest.train.errors import UserError

EVALUATIONS = 12  # in a run, unless one says how often
CHECKPOINTS = 5
SEEDS = 2**64  # that torch's generators take


@dataclass(frozen=True)
class TrainConfig:
    """Settings that all recipes of a run share.

    ``batch`` is in sequences of ``seq`` tokens a step, computed ``micro_batch`` at a time to bound
    memory. ``eval_every`` and ``save_every`` are in steps; the last step always does both.
    ``eval_windows`` is how many held-out sequences a validation scores.
    """

    size: str
    steps: int
    batch: int
    micro_batch: int
    seq: int
    lr: float
    seed: int
    eval_every: int
    save_every: int
    eval_windows: int = 64

    @classmethod
    def for_size(
        cls,
        size: str,
        *,
        steps: int | None = None,
        batch: int | None = None,
        micro_batch: int | None = None,
        seq: int | None = None,
        lr: float | None = None,
        seed: int = 0,
        eval_every: int | None = None,
        save_every: int | None = None,
    ) -> TrainConfig:
        """The settings of ``size`` (a key of ``quest.models.SIZES``), where none are given.

        Without ``steps`` the run sees the tokens that its size was published with, whatever the
        batch. Raises `UserError` for an unknown size and a seed that torch does not take.
        """
        if size not in SIZES:
            raise UserError(f"size is {size!r}: must be one of {', '.join(SIZES)}")
        if not 0 <= seed < SEEDS:
            raise UserError(f"seed must be from 0 to 2^64 - 1, got {seed}")
        preset = SIZES[size]
        batch = batch or preset.batch
        seq = seq or preset.seq
        steps = steps or max(1, preset.tokens // (batch * seq))
        return cls(
            size=size,
            steps=steps,
            batch=batch,
            micro_batch=min(batch, micro_batch or 64),
            seq=seq,
            lr=lr or preset.lr,
            seed=seed,
            eval_every=eval_every or math.ceil(steps / EVALUATIONS),
            save_every=save_every or math.ceil(steps / CHECKPOINTS),
        )
