"""N:M and pairwise selections (method, 6. Sparsity)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quest.reference import sparsity

SMALL = st.integers(-3, 3)  # few values: many ties


def best_subset(energies: list[int], count: int) -> set[int]:
    """The subset of largest total; `combinations` yields lower indices first and max keeps them."""
    subsets = combinations(range(len(energies)), count)
    return set(max(subsets, key=lambda subset: sum(energies[i] for i in subset)))


@given(data=st.data(), m=st.integers(1, 8), groups=st.integers(0, 3))
def test_nm_is_the_best_of_all_subsets(data: st.DataObject, m: int, groups: int) -> None:
    n = data.draw(st.integers(1, m))
    row = data.draw(st.lists(SMALL, min_size=groups * m, max_size=groups * m))
    keep = sparsity.keep_nm(np.array(row, dtype=np.float64), n, m)
    assert keep.shape == (groups * m,)
    for group in range(groups):
        entries = [abs(v) for v in row[group * m : (group + 1) * m]]
        kept = set(np.flatnonzero(keep[group * m : (group + 1) * m]).tolist())
        assert kept == best_subset(entries, n)


@given(
    row=st.integers(0, 3).flatmap(
        lambda groups: st.lists(st.integers(-9, 9), min_size=groups * 8, max_size=groups * 8)
    )
)
def test_pairwise_is_the_best_of_all_pairs(row: list[int]) -> None:
    keep = sparsity.keep_pairwise(np.array(row, dtype=np.float64), 4, 8)
    assert keep.shape == (len(row),)
    for start in range(0, len(row), 8):
        group = row[start : start + 8]
        energies = [group[2 * i] ** 2 + group[2 * i + 1] ** 2 for i in range(4)]
        chosen = best_subset(energies, 2)
        assert keep[start : start + 8].tolist() == [i // 2 in chosen for i in range(8)]


@given(
    pattern=st.sampled_from([("nm", 2, 4), ("nm", 1, 4), ("pairwise", 4, 8), ("pairwise", 2, 8)]),
    exponent=st.integers(-1000, 1000),
    seed=st.integers(0, 2**32 - 1),
)
def test_counts_and_scale_invariance(pattern: sparsity.Pattern, exponent: int, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((2, 3, 32))
    keep = sparsity.keep(x, pattern)
    _, n, m = pattern
    assert (keep.reshape(2, 3, 32 // m, m).sum(axis=-1) == n).all()
    assert np.array_equal(sparsity.keep(np.ldexp(x, exponent), pattern), keep)


def test_pairs_beat_entries() -> None:
    # The largest entry stands in a pair that loses; N:M would keep it.
    row = [5, 0, 4, 4, 4, 4, 1, 1]
    expected = [False, False, True, True, True, True, False, False]
    assert sparsity.keep_pairwise(row, 4, 8).tolist() == expected


def test_pairs_of_extreme_magnitudes() -> None:
    row = [1e-200, 0, 3e-200, 0, 1e200, 0, 2e-200, 0]
    kept = [False, False, True, True, True, True, False, False]
    assert sparsity.keep_pairwise(row, 4, 8).tolist() == kept


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_row_is_a_row_of_zeros(bad: float) -> None:
    x = np.array([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, bad], np.arange(8.0)])
    assert sparsity.keep_nm(x, 2, 4).tolist() == [
        [True, True, False, False] * 2,
        [False, False, True, True] * 2,
    ]
    halves = np.repeat([[True, False], [False, True]], 4, axis=1)
    assert np.array_equal(sparsity.keep_pairwise(x, 4, 8), halves)


def test_no_pattern_keeps_everything() -> None:
    assert sparsity.keep(np.zeros((2, 3)), None).tolist() == [[True] * 3] * 2


@pytest.mark.parametrize("function", [sparsity.keep_nm, sparsity.keep_pairwise])
def test_errors_name_the_argument(function: Callable[..., np.ndarray]) -> None:
    with pytest.raises(ValueError, match="x has width 6; a multiple of m = 4"):
        function(np.ones((2, 6)), 2, 4)
    for n, m in ((0, 4), (5, 4), (-1, 4), (0, 0)):
        with pytest.raises(ValueError, match=f"n is {n} and m is {m}; 1 <= n <= m"):
            function(np.ones((2, 8)), n, m)
    with pytest.raises(TypeError, match=r"n is 2\.0; an int"):
        function(np.ones((2, 8)), 2.0, 4)
    with pytest.raises(TypeError, match="m is True; an int"):
        function(np.ones((2, 8)), 1, True)


def test_pairs_need_even_numbers_and_patterns_a_known_kind() -> None:
    for n, m in ((1, 4), (1, 3), (3, 4)):
        with pytest.raises(ValueError, match=f"n is {n} and m is {m}; even numbers"):
            sparsity.keep_pairwise(np.ones(12), n, m)
    with pytest.raises(ValueError, match="kind 'block'; 'nm' and 'pairwise'"):
        sparsity.keep(np.ones(8), ("block", 2, 4))
