"""One round of timed calls, on a CPU or on CUDA: the instrument of benchmarks and gate alike.

On CUDA a pair of events stands around each call. Before a round the device gets enough filler work
that the host has queued the whole round by the time the device comes to it, which is checked:
events then measure the device and not Python. The filler also flushes the L2 cache. On the CPU it
is `time.perf_counter` less the time for which the thread was ready and had no core, which Linux
tells: a neighbor's work is not counted as ours.

This file imports nothing of quest's: the gate loads it into processes whose `quest` is another
version's.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Call = Callable[[int], object]
Round = Callable[[Sequence[Call], int], list[float]]

CPU_CACHE = 16 * 2**20  # bytes; nothing portable tells the last-level cache that one core gets
MOST_FILLS = 256


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


@functools.cache
def _schedstat() -> int | None:
    """A file that stays open, so that reading it takes a microsecond; None where there is none."""
    try:
        return os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def _queued() -> float:
    """Seconds that the timing thread has waited for a core so far; 0 where nothing tells."""
    file = _schedstat()
    # proc(5): nanoseconds on a CPU, nanoseconds in a queue, turns
    return 0.0 if file is None else int(os.pread(file, 100, 0).split()[1]) / 1e9


def cpu_round(calls: Sequence[Call], i: int) -> list[float]:
    """Seconds of each call(i), on the CPU; odd rounds go backwards."""
    taken = [0.0] * len(calls)
    for k in _order(len(calls), i):
        waited, start = _queued(), time.perf_counter()
        calls[k](i)
        wall = time.perf_counter() - start
        waited = _queued() - waited
        # More than all of it: the wait was before the start.
        taken[k] = wall - waited if waited < wall else wall
    return taken


def _order(n: int, i: int) -> range:
    return range(n) if i % 2 == 0 else range(n - 1, -1, -1)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class CudaRound:
    """Rounds on CUDA, queued behind a filler that grows until the host stays ahead.

    host_bound: it did not even behind the longest filler, and the times are Python's own.
    """

    def __init__(self) -> None:
        self.filler = torch.empty(4 * cache("cuda"), dtype=torch.uint8, device="cuda")
        self.fills = 4
        self.host_bound = False

    def __call__(self, calls: Sequence[Call], i: int) -> list[float]:
        """Seconds of each call(i) on the device; odd rounds go backwards."""
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
