"""How a time is taken: candidate, baseline and copy in turn, in one process, round after round.

A round calls each function once, on the round's own inputs; every second round turns the order
around. What drifts (clocks, temperature, a neighbour's load) then meets all of them alike. Medians
over rounds are reported, and the interval of a ratio comes from resampling whole rounds.

What draws much power is the exception: in turn, two models share the power that a GPU may draw, and
the one that needs less of it may pay for the other's. `alone` times one by itself, at the clock
that its own load leaves it, as whoever runs that model will have it.

A round is `quest.gate.clock`'s: events on CUDA, the thread's own time on the CPU. Inputs rotate
through more memory than the cache holds.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from torch import Tensor

from quest.gate.clock import Call, CudaRound, cpu_round, input_sets

BUDGET = 0.8  # seconds of rounds for a case
ROUNDS = (15, 101)  # fewest and most
RESAMPLES = 1000
SUSTAINED = 2.5  # seconds by itself, of which the later half counts
CHUNK = 0.05  # seconds of calls between two events


@dataclass(frozen=True)
class Times:
    """Seconds of each round: of what is benchmarked, of torch's own, and of the copy.

    host_bound: Python was too slow to keep the device busy, and the times are its own.
    """

    ours: list[float]
    baseline: list[float]
    copy: list[float]
    host_bound: bool

    @property
    def ratio(self) -> float:
        """The baseline's median over ours: above 1 we are faster."""
        return median(self.baseline) / median(self.ours)

    def of_one(self, calls: int) -> Times:
        """The same where each round made so many calls of ours and of the baseline.

        And copied the bytes of all of them, at once: a chain of calls has no launch for each.
        """
        each = ([t / calls for t in times] for times in (self.ours, self.baseline, self.copy))
        return Times(*each, self.host_bound)

    def interval(self) -> tuple[float, float]:
        """95% bootstrap interval of `ratio`, rounds resampled as wholes."""
        g = np.random.default_rng(0)
        rounds = g.integers(len(self.ours), size=(RESAMPLES, len(self.ours)))
        ours, baseline = (
            np.median(np.asarray(t)[rounds], axis=1) for t in (self.ours, self.baseline)
        )
        low, high = np.quantile(baseline / ours, (0.025, 0.975))
        return float(low), float(high)


def copier(moved: int, device: str) -> Call:
    """A call that copies, reading and writing `moved` bytes together."""
    half = max(moved // 512, 1) * 256  # a size that copies at full speed
    sets = min(4, input_sets(moved, device))
    pairs = [
        [torch.empty(half, dtype=torch.uint8, device=device).random_() for _ in range(2)]
        for _ in range(sets)
    ]

    def copy(i: int) -> None:
        source, target = pairs[i % sets]
        target.copy_(source)

    return copy


def interleave(calls: Sequence[Call], device: str) -> tuple[list[list[float]], bool]:
    """Seconds of every round for each of `calls`, and whether the host was too slow to tell.

    call(i) is to use the inputs of round i.
    """
    for i, call in itertools.product(range(2), calls):
        call(i)
    cuda = CudaRound() if device == "cuda" else None
    one_round = cuda or cpu_round
    start = time.perf_counter()
    one_round(calls, 0)
    once = time.perf_counter() - start
    rounds = min(ROUNDS[1], max(ROUNDS[0], int(BUDGET / once)))
    taken = [one_round(calls, i) for i in range(1, rounds + 1)]
    columns = [list(column) for column in zip(*taken, strict=True)]
    return columns, cuda is not None and cuda.host_bound


def alone(call: Call, device: str, seconds: float = SUSTAINED) -> float:
    """Seconds of a call that is made over and over for so long: the median of the later half."""

    def chunk(first: int, count: int) -> float:
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
        began = time.perf_counter()
        for i in range(first, first + count):
            call(i)
        if device != "cuda":
            return (time.perf_counter() - began) / count
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    count = max(1, int(CHUNK / chunk(0, 1)))
    taken: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or not taken:
        taken.append(chunk(count * len(taken), count))
    return median(taken[len(taken) // 2 :])


def measure(
    run: Callable[..., object],
    baseline: Callable[..., object],
    sets: Sequence[tuple[Tensor, ...]],
    moved: int,
    device: str,
) -> Times:
    """Times of `run` and `baseline` on rotating `sets` of inputs, and of copying `moved` bytes."""
    calls = (
        lambda i: run(*sets[i % len(sets)]),
        lambda i: baseline(*sets[i % len(sets)]),
        copier(moved, device),
    )
    (ours, theirs, copy), host_bound = interleave(calls, device)
    return Times(ours, theirs, copy, host_bound)


class Replay:
    """A timer for pytest-benchmark that only `advance` moves: it hands over times taken before."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        """Seconds so far; pytest-benchmark's `timer`."""
        return self.now

    def advance(self, seconds: float) -> None:
        """What pytest-benchmark calls and times."""
        self.now += seconds
