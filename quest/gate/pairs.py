"""Two sides timed in turn, and what the pairs say of their ratio.

A pair is one turn of each side, one right after the other; every second pair goes backwards (A B,
B A, ...), so that what drifts steadily favors neither. The ratio is change over base: the
interquartile mean of the pairs' log ratios, which a stalled turn does not move, and its interval is
a percentile bootstrap (Efron and Tibshirani, 1993, chapter 13) that resamples whole pairs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

SLOWER = 1.03  # the lower bound of the ratio that a change must not exceed
SEEN = 1.05  # the slowdown that a comparison is to tell from none
PRECISION = 0.005  # half of the interval's width at which there is no need of more pairs
FEWEST, MOST = 20, 150  # pairs
TELLING = 98  # pairs in which a slowdown of 5% is found, by `power`; time ends none sooner
STEP = 26  # pairs between two looks at the precision
BUDGET = 8.0  # seconds for the pairs of a case, once TELLING are there
RESAMPLES = 1000
LEVEL = 0.95
# Where its memory lies can make one process a few percent slower than another of the same code.
# Slower is what is slower in this many pairs of processes; a look that finds none is the last.
LOOKS = 3
TRIM = 0.25  # of the pairs at each end

Turn = Callable[[int], float]  # seconds of the turn in a pair of this number


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """(ratio, low, high) of paired ratios, all positive: the estimate and its 95% interval."""
    logs = np.log(np.asarray(ratios, dtype=np.float64))
    draws = np.random.default_rng(0).integers(len(logs), size=(RESAMPLES, len(logs)))
    means = stats.trim_mean(logs[draws], TRIM, axis=1)
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return math.exp(stats.trim_mean(logs, TRIM)), math.exp(low), math.exp(high)


@dataclass(frozen=True)
class Comparison:
    """Seconds of each turn of both sides, pair by pair, and the ratio change over base."""

    base: tuple[float, ...]
    change: tuple[float, ...]
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """slower (the gate fails), faster, ok, or unclear: a slowdown of 5% can't be ruled out."""
        if self.low > SLOWER:
            return "slower"
        if self.high < 1 / SLOWER:
            return "faster"
        return "ok" if self.high <= SEEN else "unclear"


def compare(base: Turn, change: Turn, most: int = MOST, budget: float = BUDGET) -> Comparison:
    """Take pairs until the interval is narrow, `most` are there, or TELLING and time is over.

    The width alone ends it, and not the verdict: to stop at the first look that says "slower"
    would raise the false alarms.
    """
    started = time.perf_counter()
    a: list[float] = []
    b: list[float] = []
    while True:
        pair = len(a)
        if pair % 2 == 0:
            a.append(base(pair))
            b.append(change(pair))
        else:
            b.append(change(pair))
            a.append(base(pair))
        enough = min(FEWEST, most)
        if len(a) < enough or (len(a) < most and (len(a) - enough) % STEP):
            continue
        found = interval([y / x for x, y in zip(a, b, strict=True)])
        narrow = math.log(found[2] / found[1]) / 2 <= PRECISION
        late = len(a) >= TELLING and time.perf_counter() - started > budget
        if narrow or late or len(a) >= most:
            return Comparison(tuple(a), tuple(b), *found)
