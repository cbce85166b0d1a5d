"""How often the gate is wrong, by simulation: false alarms, and slowdowns that it finds.

The model of one turn's time, seeded:

    seconds = 0.01 s * (1 + slowdown, on the change's side) * exp(drift + process + noise) * stall

- drift: clocks, temperature, neighbors. Gauss-Markov (AR(1)), standard deviation DRIFT = 3%, and a
  memory of MEMORY = 100 turns; both sides meet the same drift, each at its own moment.
- process: where memory lies; normal, PROCESS = 0.3%, drawn for each process and kept for its life.
- noise: normal, for each turn; NOISE = 2% is what the promise is made for, NOISES are shown.
- stall: one turn in 20 takes longer, by an exponential share of 20% on average.

The gate takes no more pairs than of its slowest benchmarks, whose time is over: faster ones have as
many or more.

Beside the gate stands what it replaces: a stored time of an earlier run, the median of 30 turns
under its own drift, and an alarm where the median of now exceeds it by 5%.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from . import pairs

DRIFT, MEMORY = 0.03, 100
PROCESS = 0.003
NOISE, NOISES = 0.02, (0.01, 0.02, 0.03, 0.05)
STALLS, STALL = 0.05, 0.2
STORED_TURNS, STORED_ALARM = 30, 1.05
TRIALS = 200
PLANTED = 0.05
LEAST_FOUND = 0.9
GATE, STORED = "gate, in turn", "stored time + 5%"
METHODS = len(NOISES) + 1


class Machine:
    """A simulated machine whose drift goes on from turn to turn, whoever's turn it is."""

    def __init__(self, g: np.random.Generator, noise: float) -> None:
        self.g, self.noise, self.keep = g, noise, math.exp(-1 / MEMORY)
        self.drift = DRIFT * g.standard_normal()

    def process(self, slowdown: float) -> Callable[[int], float]:
        """A new process of code that is slower by `slowdown`; each call is a turn, in seconds."""
        own = PROCESS * self.g.standard_normal()

        def turn(_: int) -> float:
            fresh = math.sqrt(1 - self.keep**2) * DRIFT * self.g.standard_normal()
            self.drift = self.keep * self.drift + fresh
            noise = self.noise * self.g.standard_normal()
            stall = 1 + STALL * self.g.exponential() * (self.g.random() < STALLS)
            return 0.01 * (1 + slowdown) * math.exp(self.drift + own + noise) * stall

        return turn


def gate_alarms(g: np.random.Generator, slowdown: float, noise: float = NOISE) -> bool:
    """Does the gate fail a change that is slower by `slowdown`?"""
    machine = Machine(g, noise)

    def look() -> pairs.Comparison:
        return pairs.compare(machine.process(0.0), machine.process(slowdown), budget=0.0)

    return all(look().verdict == "slower" for _ in range(pairs.LOOKS))


def stored_alarms(g: np.random.Generator, slowdown: float, noise: float = NOISE) -> bool:
    """Does a stored time with a threshold of 5% fail it?"""
    then, now = (
        np.median([turn(i) for i in range(STORED_TURNS)])
        for turn in (Machine(g, noise).process(0.0), Machine(g, noise).process(slowdown))
    )
    return bool(now > STORED_ALARM * then)


@dataclass(frozen=True)
class Power:
    """Of `trials` comparisons each: alarms with equal sides, and with the planted slowdown."""

    method: str
    noise: float
    trials: int
    false_alarms: int
    found: int


def measure(trials: int = TRIALS, seed: int = 0) -> Iterator[Power]:
    """The gate at each of NOISES, and a stored time at NOISE; METHODS of them."""
    cases = [(GATE, gate_alarms, noise) for noise in NOISES]
    for name, alarms, noise in (*cases, (STORED, stored_alarms, NOISE)):

        def count(kind: int, slowdown: float) -> int:
            drawn = (np.random.default_rng((seed, kind, i)) for i in range(trials))
            return sum(alarms(g, slowdown, noise) for g in drawn)  # noqa: B023  (called below)

        yield Power(name, noise, trials, count(0, 0.0), count(1, PLANTED))


def kept(found: Sequence[Power]) -> bool:
    """Does the gate at NOISE have no false alarm, and find LEAST_FOUND of what is planted?"""
    one = next(each for each in found if each.method == GATE and each.noise == NOISE)
    return one.false_alarms == 0 and one.found >= LEAST_FOUND * one.trials
