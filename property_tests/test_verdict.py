"""The rules that add verdicts up: exact levels of false alarm, and power."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from quest.conformance.verdict import (
    AMBIGUOUS_SHARE,
    LEVEL,
    Rejected,
    Tally,
    Verdict,
    inconclusive,
    one_sided,
    worst,
)


def first_count(n: int) -> int:
    """The least number of ambiguous elements among n that is called inconclusive."""
    low, high = 0, n + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if inconclusive(middle, n) else (middle + 1, high)
    return low


@pytest.mark.parametrize("n", [1, 3, 10, 100, 1000, 4096, 50_000, 10**6])
def test_inconclusive_false_alarms_stay_below_the_level(n: int) -> None:
    """At a share of exactly 1 in 1000 the chance of an alarm is at most LEVEL."""
    count = first_count(n)
    alarm = binom.sf(count - 1, n, AMBIGUOUS_SHARE)
    assert alarm <= LEVEL * (1 + 1e-9)
    # And no slacker than it must be: one fewer would be above the level, or below the share.
    if count <= n:
        one_fewer = binom.sf(count - 2, n, AMBIGUOUS_SHARE)
        assert one_fewer >= LEVEL * (1 - 1e-9) or count - 1 <= AMBIGUOUS_SHARE * n


@pytest.mark.parametrize(("n", "share"), [(1000, 0.03), (10**4, 0.006), (10**5, 0.002)])
def test_inconclusive_has_power(n: int, share: float) -> None:
    assert binom.sf(first_count(n) - 1, n, share) > 0.999


def test_inconclusive_never_below_the_share() -> None:
    assert not inconclusive(0, 0)
    assert not inconclusive(1000, 10**6)
    assert not inconclusive(1, 1)
    assert not inconclusive(1, 10)
    assert inconclusive(3, 3)
    assert inconclusive(10**4, 10**6)


@pytest.mark.parametrize("n", [0, 1, 5, 19, 20, 21, 40, 100, 1001])
def test_one_sided_false_alarms_stay_below_the_level(n: int) -> None:
    alarms = [k for k in range(n + 1) if one_sided(k, n - k)]
    assert math.fsum(binom.pmf(alarms, n, 0.5)) <= LEVEL * (1 + 1e-9)
    # Both directions alike, and the tails without holes.
    assert alarms == sorted(n - k for k in alarms)
    lower = [k for k in alarms if 2 * k < n]
    assert lower == list(range(len(lower)))


def test_one_sided_has_power() -> None:
    # 2 * 2^-n < 1e-6 from n = 21 on.
    assert not one_sided(20, 0)
    assert not one_sided(0, 20)
    assert one_sided(21, 0)
    assert one_sided(0, 21)
    assert not one_sided(60, 40)
    # Flips that go up in 60% of the cases are seen in 1000 of them.
    alarm = sum(binom.pmf(k, 1000, 0.6) for k in range(500, 1001) if one_sided(k, 1000 - k))
    assert alarm > 0.9


def test_worst() -> None:
    assert worst(np.array([]), np.array([])) == (0.0, -1)
    assert worst(np.array([1.0, 3.0, 1.0]), np.array([2.0, 4.0, 1.0])) == (1.0, 2)
    # 0 / 0 is no error, anything / 0 is all of it, NaN never hides.
    assert worst(np.array([0.0]), np.array([0.0]))[0] == 0
    assert worst(np.array([0.5, 5e-324]), np.array([1.0, 0.0])) == (math.inf, 1)
    assert worst(np.array([0.5, math.nan]), np.array([1.0, 1.0])) == (math.inf, 1)
    assert worst(np.array([0.5, 0.1]), np.array([1.0, math.nan])) == (math.inf, 1)
    assert worst(np.array([[0.0, 1.0], [2.0, 0.0]]), np.ones((2, 2))) == (2.0, 2)


@given(
    error=st.lists(st.floats(0, 1e300), min_size=1, max_size=6), scale=st.floats(1e-3, 1e3)
)  # fmt: skip
def test_worst_is_the_largest_ratio(error: list[float], scale: float) -> None:
    ratio, index = worst(np.array(error), np.full(len(error), scale))
    assert ratio == max(e / scale for e in error)
    assert error[index] == max(error)


def test_require() -> None:
    good = Verdict("codes", 3, 0.5)
    assert good.require() is good
    with pytest.raises(Rejected, match=r"^codes: two are wrong$"):
        Verdict("codes", 3, 2.0, failure="two are wrong").require()
    assert issubclass(Rejected, AssertionError)


def test_tally_adds_up() -> None:
    tally = Tally()
    tally.add(Verdict("codes", 1000, 0.25, ambiguous=2, up=1, down=1))
    tally.add(Verdict("codes", 500, 0.75, ambiguous=1, up=0, down=1))
    tally.add(Verdict("codes", 10, 0.5))
    assert (tally.calls, tally.elements, tally.ratio) == (3, 1510, 0.75)
    assert (tally.ambiguous, tally.coded, tally.up, tally.down) == (3, 1510, 1, 2)
    assert tally.problems() == []


def test_tally_keeps_failures() -> None:
    tally = Tally()
    tally.add(Verdict("mask", 5, math.inf, failure="a bit is wrong"))
    tally.add(Verdict("scale", 5, 0.5))
    assert tally.problems() == ["mask: a bit is wrong"]
    assert tally.ratio == math.inf


def test_tally_sees_what_no_single_call_shows() -> None:
    """Five flips up a call are chance; 50 of 50 are not."""
    leaning, ambiguous = Tally(), Tally()
    for _ in range(10):
        assert not one_sided(5, 0)
        leaning.add(Verdict("codes", 100_000, 0.9, ambiguous=5, up=5, down=0))
        assert not inconclusive(4, 1000)
        ambiguous.add(Verdict("codes", 1000, 0.9, ambiguous=4, up=2, down=2))
    assert leaning.problems() == ["one-sided: 50 ambiguous codes went up, 0 down"]
    assert ambiguous.problems() == ["inconclusive: 40 of 10000 codes are ambiguous"]


def test_tally_leaves_out_what_is_made_of_ties() -> None:
    tally = Tally()
    tally.add(Verdict("codes", 100, 0.9, ambiguous=100, up=100, down=0), conclusive=False)
    assert (tally.elements, tally.coded, tally.ambiguous, tally.up) == (100, 0, 0, 0)
    assert tally.problems() == []
    tally.add(Verdict("codes", 100, 1.5, failure="wrong"), conclusive=False)
    assert tally.problems() == ["codes: wrong"]


def test_false_alarms_of_a_fair_tally() -> None:
    """1000 simulated runs of an honest lane: at most one alarm at 1e-6 each is already unlikely."""
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(1000):
        tally = Tally()
        for _ in range(5):
            ambiguous = int(rng.binomial(2000, AMBIGUOUS_SHARE))
            flipped = int(rng.binomial(ambiguous, 0.5))
            up = int(rng.binomial(flipped, 0.5))
            tally.add(Verdict("codes", 2000, 0.9, ambiguous, up, flipped - up))
        alarms += bool(tally.problems())
    assert alarms == 0
