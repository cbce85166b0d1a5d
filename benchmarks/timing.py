"""How a time is taken: candidate, baseline and copy in turn, in one process, round after round.

A round calls each function once, on the round's own inputs; every second round turns the order
around. What drifts (clocks, temperature, a neighbour's load) then meets all of them alike. Medians
over rounds are reported, and the interval of a ratio comes from resampling whole rounds.

On CUDA a pair of events stands around each call. Before a round the device gets enough filler work
that the host has queued the whole round by the time the device comes to it, which is checked:
events then measure the device and not Python. The filler also flushes the L2 cache; inputs rotate
through more memory than it holds. On the CPU it is `time.perf_counter`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from torch import Tensor

Call = Callable[[int], object]

CPU_CACHE = 16 * 2**20  # bytes; nothing portable tells the last-level cache that one core gets
BUDGET = 0.8  # seconds of rounds for a case
ROUNDS = (15, 101)  # fewest and most
RESAMPLES = 1000
MOST_FILLS = 256


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

    def interval(self) -> tuple[float, float]:
        """95% bootstrap interval of `ratio`, rounds resampled as wholes."""
        g = np.random.default_rng(0)
        rounds = g.integers(len(self.ours), size=(RESAMPLES, len(self.ours)))
        ours, baseline = (
            np.median(np.asarray(t)[rounds], axis=1) for t in (self.ours, self.baseline)
        )
        low, high = np.quantile(baseline / ours, (0.025, 0.975))
        return float(low), float(high)


def size(tensors: object) -> int:
    """Bytes of a tensor, or of all tensors of a tuple."""
    if isinstance(tensors, Tensor):
        return tensors.nbytes
    return sum(map(size, tensors)) if isinstance(tensors, tuple) else 0


def cache(device: str) -> int:
    """Bytes of the cache that inputs must not fit in."""
    if device == "cpu":
        return CPU_CACHE
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def input_sets(each: int, device: str) -> int:
    """How many sets of inputs of `each` bytes rotate, so that one is cold when its turn comes."""
    return min(64, max(2, math.ceil(3 * cache(device) / max(each, 1))))


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


def _cpu_round(calls: Sequence[Call], i: int) -> list[float]:
    taken = [0.0] * len(calls)
    for k in _order(len(calls), i):
        start = time.perf_counter()
        calls[k](i)
        taken[k] = time.perf_counter() - start
    return taken


def _order(n: int, i: int) -> range:
    return range(n) if i % 2 == 0 else range(n - 1, -1, -1)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class _CudaRound:
    """Rounds on CUDA, queued behind a filler that grows until the host stays ahead."""

    def __init__(self) -> None:
        self.filler = torch.empty(4 * cache("cuda"), dtype=torch.uint8, device="cuda")
        self.fills = 4
        self.host_bound = False

    def __call__(self, calls: Sequence[Call], i: int) -> list[float]:
        while True:
            taken, ahead = self._queue(calls, i)
            if ahead or self.fills >= MOST_FILLS:
                self.host_bound |= not ahead
                return taken
            self.fills *= 2

    def _queue(self, calls: Sequence[Call], i: int) -> tuple[list[float], bool]:
        events = [(_event(), _event()) for _ in calls]
        order = _order(len(calls), i)
        for _ in range(self.fills):
            self.filler.zero_()
        # Not timed: the first function must find the cache as its successors do, full of a
        # function's output, and not of the filler.
        calls[-1](i + 1)
        for k in order:
            events[k][0].record()
            calls[k](i)
            events[k][1].record()
        ahead = not events[order[0]][0].query()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events], ahead


def interleave(calls: Sequence[Call], device: str) -> tuple[list[list[float]], bool]:
    """Seconds of every round for each of `calls`, and whether the host was too slow to tell.

    call(i) is to use the inputs of round i.
    """
    for i, call in itertools.product(range(2), calls):
        call(i)
    cuda = _CudaRound() if device == "cuda" else None
    one_round = cuda or _cpu_round
    start = time.perf_counter()
    one_round(calls, 0)
    once = time.perf_counter() - start
    rounds = min(ROUNDS[1], max(ROUNDS[0], int(BUDGET / once)))
    taken = [one_round(calls, i) for i in range(1, rounds + 1)]
    columns = [list(column) for column in zip(*taken, strict=True)]
    return columns, cuda is not None and cuda.host_bound


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
