"""The oracle's gate: what its formula implies."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quest.reference import prologue

FINITE = st.floats(-700, 700)


@given(g=FINITE, v=FINITE)
def test_gated_is_the_formula(g: float, v: float) -> None:
    exact = g / (1 + math.exp(-g)) * v
    assert prologue.gated([g], [v])[0] == pytest.approx(exact, rel=1e-14, abs=1e-300)


@given(g=FINITE)
def test_silu_and_its_mirror(g: float) -> None:
    """silu(g) - silu(-g) = g, and the sigmoids of both add up to 1."""
    up, down = prologue.gated([g], [1.0])[0], prologue.gated([-g], [1.0])[0]
    assert up - down == pytest.approx(g, rel=1e-14, abs=1e-300)
    assert prologue.sigmoid([g])[0] + prologue.sigmoid([-g])[0] == pytest.approx(1, rel=1e-15)


def test_ends() -> None:
    inf, nan = math.inf, math.nan
    gate = np.array([0.0, -0.0, 1e308, -1e308, inf, -inf, nan, 1.0, inf])
    value = np.array([3.0, 3.0, 1.0, 1.0, 2.0, 2.0, 2.0, inf, 0.0])
    expected = [0.0, -0.0, 1e308, -0.0, inf, nan, nan, inf, nan]
    np.testing.assert_array_equal(prologue.gated(gate, value), expected)
    np.testing.assert_array_equal(prologue.sigmoid([-inf, 0.0, inf]), [0.0, 0.5, 1.0])


@given(d=st.floats(-9, 9), g=st.floats(-30, 30), v=st.floats(-9, 9))
def test_the_gradients_are_slopes(d: float, g: float, v: float) -> None:
    """Of grad silu(gate) value, by central differences."""
    # They err by step^2 / 6 of the third derivative, 1e-9 at most here, and by some 2^-53 / step of
    # |d g v|, which is below 30 times the slope, or small with it: 1e-9 of either.
    step = 1e-5
    to_gate, to_value = (t[0] for t in prologue.gated_backward([d], [g], [v]))
    ends = [d * prologue.gated([g + h], [v])[0] for h in (step, -step)]
    assert to_gate == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6, abs=1e-7)
    ends = [d * prologue.gated([g], [v + h])[0] for h in (step, -step)]
    assert to_value == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6, abs=1e-7)


def test_slopes_far_out() -> None:
    """Linear above, flat below, and the formula where its two terms cancel."""
    gate = np.array([1e308, 700.0, -1e308, -700.0, 0.0, -1.2784645427610738])
    one = np.ones(6)
    to_gate, to_value = prologue.gated_backward(one, gate, 3 * one)
    expected = [3.0, 3.0, 0.0, -3 * 699 * math.exp(-700), 1.5, 0.0]
    np.testing.assert_allclose(to_gate, expected, rtol=1e-13, atol=1e-15)
    np.testing.assert_array_equal(to_value, prologue.gated(gate, one))


@given(row=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=9), eps=st.floats(1e-6, 10))
def test_normed_is_the_formula(row: list[float], eps: float) -> None:
    mean = math.fsum(v * v for v in row) / len(row)
    weight = np.arange(1.0, len(row) + 1)
    expected = [v / math.sqrt(mean + eps) * w for v, w in zip(row, weight, strict=True)]
    found = prologue.normed([row, row[::-1]], weight, eps)
    np.testing.assert_allclose(found[0], expected, rtol=1e-13, atol=1e-300)
    np.testing.assert_allclose(found[1] / weight, (found[0] / weight)[::-1], rtol=1e-13)


def test_ends_of_a_norm() -> None:
    inf, nan = math.inf, math.nan
    rows = [[0.0, -0.0, 0.0], [1.0, inf, -1.0], [1.0, nan, 2.0], [1e200, 0.0, 0.0]]
    expected = [[0.0, -0.0, 0.0], [0.0, nan, -0.0], [nan, nan, nan], [0.0, 0.0, 0.0]]
    np.testing.assert_array_equal(prologue.normed(rows, np.ones(3), 1e-5), expected)
    assert prologue.normed(np.zeros((2, 0)), np.zeros(0), 1e-5).shape == (2, 0)


def test_errors_of_a_norm() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \(3,\); \(2,\) is allowed"):
        prologue.normed([1.0, 2.0], [1.0, 2.0, 3.0], 1e-5)
    for eps in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"eps is .*; positive numbers are allowed"):
            prologue.normed([1.0], [1.0], eps)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"value has shape \(3,\); that of gate, \(2,\), is"):
        prologue.gated([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"value has shape \(2,\); that of gate, \(1,\), is"):
        prologue.gated_backward([1.0], [1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"value has shape \(2,\); that of gate, \(1,\), is"):
        prologue.gated_backward([1.0, 2.0], [1.0], [1.0])
    with pytest.raises(TypeError, match="gate has dtype bool"):
        prologue.gated([True], [1.0])
    with pytest.raises(ValueError, match="value is a scalar"):
        prologue.gated([1.0], 1.0)
