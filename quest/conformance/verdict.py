"""What a judge says, and how verdicts add up over a run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import binomtest

# Level of the statistical rules: a false alarm in a million judgements (verification, T8).
LEVEL = 1e-6
AMBIGUOUS_SHARE = 1e-3
BINS = 20  # of a spread: twentieths of the bound


# Who is told of every error and its bound, element by element; see `observed`.
_observers: list[Callable[[np.ndarray, np.ndarray], None]] = []


class Rejected(AssertionError):
    """An output is outside what the oracle admits."""


@dataclass(frozen=True)
class Verdict:
    """One judge's word on one stage of one call.

    elements: how many were judged. ratio: worst error over its bound; admissible is <= 1. Exact
    stages have 0 or infinity. ambiguous: elements with more than one admissible code or mask.
    up, down: ambiguous elements whose code lies above or below the code of the exact value.
    spread: elements by error over bound, in BINS equal parts of [0, 1] (the last takes what is
    over); empty for exact stages and codes. failure: None, or what is wrong and where.
    """

    stage: str
    elements: int
    ratio: float = 0.0
    ambiguous: int = 0
    up: int = 0
    down: int = 0
    failure: str | None = None
    spread: tuple[int, ...] = ()

    def require(self) -> Verdict:
        """This verdict; raises `Rejected` where it is a failure."""
        if self.failure is not None:
            raise Rejected(f"{self.stage}: {self.failure}")
        return self


def one_sided(up: int, down: int) -> bool:
    """Whether flips lean one way beyond chance: a sign test at LEVEL."""
    n = up + down
    return n > 0 and bool(binomtest(up, n, 0.5).pvalue < LEVEL)


def inconclusive(ambiguous: int, elements: int) -> bool:
    """Whether more than 1 in 1000 elements are ambiguous, beyond chance in a small sample."""
    if ambiguous <= AMBIGUOUS_SHARE * elements:
        return False
    test = binomtest(ambiguous, elements, AMBIGUOUS_SHARE, alternative="greater")
    return bool(test.pvalue < LEVEL)


@dataclass
class Tally:
    """Verdicts of one kind added up; the statistical rules apply to the whole, too."""

    calls: int = 0
    elements: int = 0
    ratio: float = 0.0
    ambiguous: int = 0
    coded: int = 0
    up: int = 0
    down: int = 0
    failures: list[str] = field(default_factory=list)
    spread: list[int] = field(default_factory=lambda: [0] * BINS)

    def add(self, verdict: Verdict, conclusive: bool = True) -> None:
        """Add a verdict; `conclusive=False` leaves its ambiguous elements out of the rules."""
        self.calls += 1
        self.elements += verdict.elements
        self.ratio = max(self.ratio, verdict.ratio)
        if conclusive:
            self.ambiguous += verdict.ambiguous
            self.coded += verdict.elements
            self.up += verdict.up
            self.down += verdict.down
        if verdict.failure is not None:
            self.failures.append(f"{verdict.stage}: {verdict.failure}")
        self._spread(verdict.spread)

    def merge(self, other: Tally) -> None:
        """Add another tally of the same kind, failures included."""
        for name in ("calls", "elements", "ambiguous", "coded", "up", "down"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.ratio = max(self.ratio, other.ratio)
        self.failures += other.failures
        self._spread(other.spread)

    def _spread(self, counts: Sequence[int]) -> None:
        for i, count in enumerate(counts):
            self.spread[i] += count

    def problems(self) -> list[str]:
        """Failures, and what only the sum shows."""
        found = list(self.failures)
        if inconclusive(self.ambiguous, self.coded):
            found.append(f"inconclusive: {self.ambiguous} of {self.coded} codes are ambiguous")
        if one_sided(self.up, self.down):
            found.append(f"one-sided: {self.up} ambiguous codes went up, {self.down} down")
        return found


@contextlib.contextmanager
def observed(observer: Callable[[np.ndarray, np.ndarray], None]) -> Iterator[None]:
    """Call `observer(error, bound)` for the arrays of every judgement made inside."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def worst(error: np.ndarray, bound: np.ndarray) -> tuple[float, int]:
    """(largest error / bound, its flat index); 0 / 0 counts as 0, more than 0 / 0 as infinite."""
    ratio = ratios(error, bound)
    if ratio.size == 0:
        return 0.0, -1
    for observer in _observers:
        observer(error, bound)
    index = int(np.argmax(ratio))
    return float(ratio.flat[index]), index


def ratios(error: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """error / bound; 0 / 0 is 0, and what is not a number is infinite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(error == 0, 0.0, error / bound)
    return np.where(np.isnan(ratio), math.inf, ratio)


def spread(ratio: np.ndarray) -> tuple[int, ...]:
    """How many ratios lie in each of BINS equal parts of [0, 1]; the last takes all above."""
    index = (np.minimum(ratio, 1.0) * BINS).astype(np.int64).ravel()
    counts = np.bincount(np.minimum(index, BINS - 1), minlength=BINS)
    return tuple(int(n) for n in counts)
