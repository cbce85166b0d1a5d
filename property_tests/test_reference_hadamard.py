"""The Hadamard matrices and the blockwise transform (method, 1. Notation)."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from quest.reference import hadamard

LEGAL = sorted(m << k for m in (1, 12, 20, 28) for k in range(10) if m << k <= 640)


@pytest.mark.parametrize("order", LEGAL)
def test_rows_are_orthogonal_signs(order: int) -> None:
    h = hadamard.matrix(order)
    assert h.shape == (order, order)
    assert h.dtype == np.float64
    assert np.array_equal(np.abs(h), np.ones((order, order)))
    assert np.array_equal(h @ h.T, order * np.eye(order))  # integers below 2^53: exact


@pytest.mark.parametrize("order", [2**k for k in range(10)])
def test_powers_of_two_are_in_natural_order(order: int) -> None:
    assert np.array_equal(hadamard.matrix(order), scipy.linalg.hadamard(order))


@pytest.mark.parametrize("order", [12, 20, 28, 24, 40, 56, 160])
def test_other_orders_are_not_symmetric(order: int) -> None:
    h = hadamard.matrix(order)
    assert not np.array_equal(h, h.T)


@pytest.mark.parametrize("order", LEGAL)
def test_base_is_the_outer_factor(order: int) -> None:
    m, power = hadamard.split(order)
    assert m * power == order
    assert m in (1, 12, 20, 28)
    corners = hadamard.matrix(order)[::power, ::power]  # Sylvester's corner is +1
    assert np.array_equal(corners, hadamard.base(m))
    assert np.array_equal(hadamard.matrix(order)[:power, :power], scipy.linalg.hadamard(power))


def test_legal_orders_are_the_stated_ones() -> None:
    assert [n for n in range(-4, 641) if hadamard.is_order(n)] == LEGAL
    assert hadamard.split(40) == (20, 2)


@given(
    block=st.sampled_from([1, 2, 8, 12, 20, 24, 28, 40, 128]),
    rows=st.integers(0, 5),
    blocks=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_transform_is_the_dense_block_diagonal_product(
    block: int, rows: int, blocks: int, seed: int
) -> None:
    x = np.random.default_rng(seed).standard_normal((2, rows, blocks * block))
    h = hadamard.matrix(block) / np.sqrt(block)
    dense = scipy.linalg.block_diag(*[h] * blocks) if blocks else np.zeros((0, 0))
    # gamma of a dot product of `block` terms, times the sum of their magnitudes
    bound = (block + 4) * 2.0**-52 * (np.abs(x) @ np.abs(dense)) + 1e-300
    assert (np.abs(hadamard.apply(x, block) - x @ dense) <= bound).all()
    assert (np.abs(hadamard.apply_transpose(x, block) - x @ dense.T) <= bound).all()
    back = hadamard.apply_transpose(hadamard.apply(x, block), block)
    np.testing.assert_allclose(back, x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("order", [1, 2, 4, 12, 24, 28, 40, 56, 128, 320, 448, 2048])
def test_sums_of_integers_are_those_of_the_matrix(order: int) -> None:
    """Bit for bit, though it is applied as two factors; infinities and NaN spread as there."""
    x = np.random.default_rng(order).integers(-1000, 1000, (4, 2 * order)).astype(np.float64)
    x[1, 0], x[2, -1], x[3, [0, -1]] = np.inf, np.nan, (-np.inf, np.inf)
    x[3, order // 2] = np.inf
    h = hadamard.matrix(order)
    for turn, m in ((hadamard.apply, h), (hadamard.apply_transpose, h.T)):
        with np.errstate(invalid="ignore"):
            dense = (x.reshape(4, 2, order) @ m / np.sqrt(order)).reshape(x.shape)
        np.testing.assert_array_equal(turn(x, order), dense)


@pytest.mark.parametrize("row", [0, 1, 2**14, 12345, 32767])
def test_orders_whose_matrix_is_not_made(row: int) -> None:
    """Sylvester's entry (i, j) is the parity of the bits that i and j share.

    2^7.5, the root of the order and their quotient round once each; sums of zeros don't.
    """
    x = np.zeros((1, 2**15))
    x[0, row] = 2.0**7.5
    shared = np.bitwise_count(row & np.arange(2**15))
    signs = (1.0 - 2 * (shared % 2))[None]
    for turn in (hadamard.apply, hadamard.apply_transpose):
        np.testing.assert_allclose(turn(x, 2**15), signs, rtol=4 * 2.0**-53)


def test_a_nan_stays_in_its_row() -> None:
    x = np.ones((3, 8))
    clean = hadamard.apply(x, 4)
    x[1, 2] = np.nan
    rotated = hadamard.apply(x, 4)
    assert np.array_equal(rotated[[0, 2]], clean[[0, 2]])
    assert np.isnan(rotated[1, :4]).all()


def test_input_is_unchanged() -> None:
    x = np.arange(8.0).reshape(2, 4)
    hadamard.apply(x, 4)
    hadamard.apply(x, 1)
    assert np.array_equal(x, np.arange(8.0).reshape(2, 4))


@pytest.mark.parametrize("order", [0, -2, 3, 6, 10, 36, 44, 60])
def test_illegal_orders_say_which_are_legal(order: int) -> None:
    with pytest.raises(ValueError, match=rf"order is {order}; 2\^k, 12\*2\^k.*28\*2\^k"):
        hadamard.matrix(order)


def test_errors_name_the_argument() -> None:
    with pytest.raises(TypeError, match=r"order is 4\.0; an int"):
        hadamard.matrix(4.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="m is 16; 1, 12, 20 and 28"):
        hadamard.base(16)
    with pytest.raises(ValueError, match="x has width 6; a multiple of the block 4"):
        hadamard.apply(np.ones((2, 6)), 4)
    with pytest.raises(TypeError, match="x has dtype complex128"):
        hadamard.apply(np.ones((2, 4), dtype=np.complex128), 4)
    with pytest.raises(ValueError, match="x is a scalar"):
        hadamard.apply(1.0, 1)
