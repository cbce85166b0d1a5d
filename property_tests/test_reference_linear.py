"""The linear layer's forward and backward (method, 5. The linear layer)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quest.reference import grids, hadamard, linear, quantize, sparsity

SEEDS = st.integers(0, 2**32 - 1)
BLOCKS = st.sampled_from([1, 4, 12, 20, 28])  # the last three are not symmetric

GRIDS = st.sampled_from([grids.uniform(2), grids.ternary(), grids.uniform(16), grids.e2m1()])
ESTIMATORS = st.sampled_from([("ste", 1.0), ("clip", 1.3), ("trust", 1.0), ("trust", 0.5)])


@st.composite
def operands(draw: st.DrawFn) -> linear.Operand:
    """An operand, whose block the test sets."""
    name, parameter = draw(ESTIMATORS)
    grid = draw(st.none() | GRIDS)
    return linear.Operand(grid, 1, name, parameter, draw(st.sampled_from([None, ("nm", 2, 4)])))


def at(operand: linear.Operand, block: int) -> linear.Operand:
    return linear.Operand(
        operand.grid, block, operand.estimator, operand.parameter, operand.sparsity
    )


def layer(seed: int, width: int) -> tuple[np.ndarray, ...]:
    """g (5, 3), x (5, width), w (3, width), bias (3,): rectangular, so that swaps show."""
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(s) for s in ((5, 3), (5, width), (3, width), (3,)))


def frozen(x: np.ndarray, o: linear.Operand) -> tuple[np.ndarray, np.ndarray]:
    """Values and mask of an operand, from the parts that have tests of their own."""
    if o.grid is None:
        rotated = hadamard.apply(x, o.block)
        return rotated * sparsity.keep(rotated, o.sparsity), np.ones(x.shape)
    q = quantize.quantize(x, o.grid, o.block, o.estimator, o.parameter, o.sparsity)
    return q.values, q.mask.astype(np.float64)


@given(seed=SEEDS, block=BLOCKS, activation=operands(), weight=operands())
def test_forward_and_backward_are_the_dense_formulas(
    seed: int, block: int, activation: linear.Operand, weight: linear.Operand
) -> None:
    width = 2 * block if block > 1 else 8
    g, x, w, bias = layer(seed, width)
    a, b = at(activation, block), at(weight, block)
    h = np.kron(np.eye(width // block), hadamard.matrix(block)) / np.sqrt(block)
    (x_hat, x_mask), (w_hat, w_mask) = frozen(x, a), frozen(w, b)

    y = linear.forward(x, w, bias, a, b)
    np.testing.assert_allclose(y, np.einsum("ri,oi->ro", x_hat, w_hat) + bias, atol=1e-12)
    assert np.array_equal(linear.forward(x, w, None, a, b) + bias, y)

    dx, dw, db = linear.backward(g, x, w, a, b)
    upstream_x = np.einsum("ro,oi->ri", g, w_hat) * x_mask
    upstream_w = np.einsum("ro,ri->oi", g, x_hat) * w_mask
    np.testing.assert_allclose(dx, np.einsum("rj,ij->ri", upstream_x, h), atol=1e-12)
    np.testing.assert_allclose(dw, np.einsum("oj,ij->oi", upstream_w, h), atol=1e-12)
    np.testing.assert_allclose(db, g.sum(axis=0), atol=1e-14)


@given(seed=SEEDS, block=BLOCKS, activation=operands(), weight=operands())
def test_backward_is_the_derivative_of_the_surrogate(
    seed: int, block: int, activation: linear.Operand, weight: linear.Operand
) -> None:
    """With codes, scales and masks frozen, Q(x_h) moves by M * (move of x_h).

    The surrogate is quadratic in (x, w) together, so central differences are exact up to rounding.
    """
    width = 2 * block if block > 1 else 8
    g, x, w, bias = layer(seed, width)
    a, b = at(activation, block), at(weight, block)
    parts = [frozen(x, a), frozen(w, b)]

    def loss(x2: np.ndarray, w2: np.ndarray, bias2: np.ndarray) -> float:
        moved = [
            value + mask * hadamard.apply(new - old, block)
            for (value, mask), new, old in zip(parts, (x2, w2), (x, w), strict=True)
        ]
        return float((g * (moved[0] @ moved[1].T + bias2)).sum())

    gradients = linear.backward(g, x, w, a, b)
    point = (x, w, bias)
    rng = np.random.default_rng(seed + 1)
    directions = [rng.standard_normal(p.shape) for p in point]
    for i, (gradient, direction) in enumerate(zip(gradients, directions, strict=True)):
        up, down = (
            loss(*(p + step * direction if j == i else p for j, p in enumerate(point)))
            for step in (0.5, -0.5)
        )
        assert up - down == pytest.approx(float((gradient * direction).sum()), rel=1e-9, abs=1e-9)


@given(seed=SEEDS, block=BLOCKS)
def test_without_grids_the_layer_is_dense(seed: int, block: int) -> None:
    g, x, w, bias = layer(seed, 2 * block if block > 1 else 8)
    none = linear.Operand(None, block)
    np.testing.assert_allclose(
        linear.forward(x, w, bias, none, none), x @ w.T + bias, rtol=0, atol=1e-12
    )
    dx, dw, _ = linear.backward(g, x, w, none, none)
    np.testing.assert_allclose(dx, g @ w, rtol=0, atol=1e-12)
    np.testing.assert_allclose(dw, g.T @ x, rtol=0, atol=1e-12)


def test_a_nan_row_stays_in_its_output_row_and_zero_rows_in_the_bias() -> None:
    _, x, w, bias = layer(0, 8)
    operand = linear.Operand(grids.uniform(16), 8, "trust", 1.0)
    clean = linear.forward(x, w, bias, operand, operand)
    x[2, 3] = np.nan
    x[4] = 0.0
    y = linear.forward(x, w, bias, operand, operand)
    assert np.isnan(y[2]).all()
    assert np.array_equal(y[4], bias)
    np.testing.assert_allclose(y[[0, 1, 3]], clean[[0, 1, 3]], rtol=0, atol=1e-14)


def test_a_mask_selects() -> None:
    """Of what it leaves out nothing comes through, also where that is not finite."""
    g, x, w, _ = layer(0, 8)
    none = linear.Operand(grids.uniform(16), 8, "clip", 1e-9)  # no entry is so small
    g[2, 0] = np.inf
    for made in linear.backward(g, x, w, none, none)[:2]:
        np.testing.assert_array_equal(made, 0.0)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("out", [0, 3])
def test_empty_gives_empty(rows: int, out: int) -> None:
    operand = linear.Operand(grids.uniform(4), 4, "trust", 1.0)
    x, w, g = np.zeros((rows, 8)), np.zeros((out, 8)), np.zeros((rows, out))
    assert linear.forward(x, w, np.zeros(out), operand, operand).shape == (rows, out)
    dx, dw, db = linear.backward(g, x, w, operand, operand)
    assert (dx.shape, dw.shape, db.shape) == ((rows, 8), (out, 8), (out,))


def test_errors_name_the_argument() -> None:
    g, x, w, _ = layer(0, 8)
    four, eight = (linear.Operand(grids.uniform(4), block) for block in (4, 8))
    blocks = "weight has block 8; the block of the activation, 4"
    with pytest.raises(ValueError, match=blocks):
        linear.forward(x, w, None, four, eight)
    with pytest.raises(ValueError, match=blocks):
        linear.backward(g, x, w, four, eight)
    with pytest.raises(ValueError, match="w has width 4; the width of x, 8"):
        linear.forward(x, w[:, :4], None, four, four)
    with pytest.raises(ValueError, match=r"bias has shape \(5,\); \(3,\) is allowed"):
        linear.forward(x, w, np.zeros(5), four, four)
    with pytest.raises(ValueError, match=r"g has shape \(3, 5\); \(5, 3\) is allowed"):
        linear.backward(g.T, x, w, four, four)
    with pytest.raises(ValueError, match=r"x has shape \(8,\); two axes"):
        linear.forward(x[0], w, None, four, four)
