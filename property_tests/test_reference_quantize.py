"""Scale, rounding and the whole quantizer (method, 1, 3 and 6)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quest.reference import estimators, grids, hadamard, quantize, sparsity

GRIDS = [
    *(grids.uniform(levels) for levels in (2, 3, 4, 5, 8, 16, 256)),
    grids.ternary(),
    grids.e2m1(),
    grids.lloyd_max(4),
    grids.lloyd_max(7),
    grids.table([-1.0, -0.5, 2.0]),
]
# Points and midpoints are exact in float64, so that ties are ties.
EXACT = [
    *(grids.uniform(levels, (levels - 1) / 2) for levels in (2, 3, 4, 16, 17, 256)),
    grids.e2m1(1.0),
    grids.table([-3.0, -1.0, 0.0, 0.5, 4.0]),
]
ESTIMATORS = [("ste", 1.0), ("clip", 1.3), ("trust", 1.0), ("trust", 0.5)]

SEEDS = st.integers(0, 2**32 - 1)


def index(codes: np.ndarray, grid: grids.Grid) -> np.ndarray:
    return codes + grid.levels // 2 if grid.centred else codes


def nearest(t: float, points: np.ndarray) -> int:
    """Index of the nearest point, the upper one of two."""
    best = 0
    for i, point in enumerate(points):
        if abs(point - t) <= abs(points[best] - t):
            best = i
    return best


@given(grid=st.sampled_from(EXACT), eighths=st.lists(st.integers(-1100, 1100), max_size=20))
def test_encode_is_nearest_with_midpoints_up(grid: grids.Grid, eighths: list[int]) -> None:
    t = np.concatenate([np.array(eighths) / 8, grid.points, grid.midpoints])
    codes = quantize.encode(t, grid)
    assert codes.dtype == np.int64
    assert index(codes, grid).tolist() == [nearest(v, grid.points) for v in t]


@given(grid=st.sampled_from(GRIDS), seed=SEEDS)
def test_encode_is_nearest_on_gaussians(grid: grids.Grid, seed: int) -> None:
    t = 1.5 * np.random.default_rng(seed).standard_normal((3, 5))
    distance = np.abs(t - quantize.decode(quantize.encode(t, grid), grid))
    least = np.abs(t[..., np.newaxis] - grid.points).min(axis=-1)
    np.testing.assert_allclose(distance, least, rtol=0, atol=1e-14)


@pytest.mark.parametrize("grid", GRIDS)
def test_decode_gives_the_points(grid: grids.Grid) -> None:
    low, high = quantize.code_range(grid)
    values = quantize.decode(np.arange(low, high + 1), grid)
    np.testing.assert_allclose(values, grid.points, rtol=1e-14, atol=1e-15)
    assert np.array_equal(quantize.encode(values, grid), np.arange(low, high + 1))


def test_code_ranges_are_the_stated_ones() -> None:
    assert quantize.code_range(grids.uniform(16)) == (-8, 7)
    assert quantize.code_range(grids.ternary()) == (-1, 1)
    assert quantize.code_range(grids.e2m1()) == (0, 14)


@pytest.mark.parametrize("grid", GRIDS)
def test_special_values_encode(grid: grids.Grid) -> None:
    codes = quantize.encode([np.nan, -np.inf, np.inf, -1e300, 1e300], grid)
    low, high = quantize.code_range(grid)
    assert codes.tolist() == [0, low, high, low, high]


def test_zero_goes_up() -> None:
    for levels in (2, 4, 16, 256):
        grid = grids.uniform(levels)
        for zero in (0.0, -0.0):
            assert quantize.decode(quantize.encode([zero], grid), grid)[0] == grid.step / 2


@given(seed=SEEDS, width=st.integers(1, 40), exponent=st.integers(-900, 900))
def test_scale_is_the_rms_at_any_magnitude(seed: int, width: int, exponent: int) -> None:
    x = np.random.default_rng(seed).standard_normal((2, 3, width)) + 0.5
    rms = np.sqrt(np.mean(x**2, axis=-1, keepdims=True))
    sigma = quantize.scale(np.ldexp(x, exponent))
    assert sigma.shape == (2, 3, 1)
    np.testing.assert_allclose(np.ldexp(sigma, -exponent), rms, rtol=(width + 4) * 2.0**-53)


def test_scale_of_special_rows() -> None:
    rows = [[0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0], [3.0, -4.0], [1e-310, 1e-310], [1e308, 1e308]]
    expected = [[0.0], [np.nan], [np.nan], [np.sqrt(12.5)], [1e-310], [1e308]]
    np.testing.assert_allclose(quantize.scale(rows), expected, rtol=1e-12)
    assert np.array_equal(quantize.scale(np.zeros((2, 0))), np.zeros((2, 1)))


@given(
    grid=st.sampled_from(GRIDS),
    block=st.sampled_from([1, 8, 12, 16]),
    estimator=st.sampled_from(ESTIMATORS),
    pattern=st.sampled_from([None, ("nm", 2, 4), ("pairwise", 4, 8)]),
    seed=SEEDS,
)
def test_quantize_is_its_parts(
    grid: grids.Grid,
    block: int,
    estimator: tuple[str, float],
    pattern: sparsity.Pattern | None,
    seed: int,
) -> None:
    x = np.random.default_rng(seed).standard_normal((2, 3, 48))
    before = x.copy()
    q = quantize.quantize(x, grid, block, *estimator, pattern)
    assert np.array_equal(x, before)
    h = np.kron(np.eye(48 // block), hadamard.matrix(block)) / np.sqrt(block)
    np.testing.assert_allclose(q.rotated, x @ h, rtol=0, atol=1e-13)
    np.testing.assert_allclose(q.scale[..., 0], np.sqrt((x**2).mean(axis=-1)), rtol=1e-13)
    assert np.array_equal(q.keep, sparsity.keep(q.rotated, pattern))
    kept, zero = quantize.encode(q.rotated / q.scale, grid), quantize.encode([0.0], grid)[0]
    assert np.array_equal(q.codes, np.where(q.keep, kept, zero))
    assert (q.values[~q.keep] == 0).all()
    points = grid.points[index(q.codes, grid)] * q.scale
    np.testing.assert_allclose(q.values[q.keep], points[q.keep], rtol=1e-14, atol=1e-15)
    again = estimators.mask(q.rotated, q.values, q.scale, grid, *estimator, q.keep)
    assert np.array_equal(q.mask, again)


@given(
    grid=st.sampled_from(GRIDS),
    exponent=st.integers(-300, 300),
    estimator=st.sampled_from(ESTIMATORS),
    pattern=st.sampled_from([None, ("nm", 2, 4), ("pairwise", 4, 8)]),
    seed=SEEDS,
)
def test_a_power_of_two_scales_through(
    grid: grids.Grid,
    exponent: int,
    estimator: tuple[str, float],
    pattern: sparsity.Pattern | None,
    seed: int,
) -> None:
    x = np.random.default_rng(seed).standard_normal((3, 16))
    q = quantize.quantize(x, grid, 8, *estimator, pattern)
    r = quantize.quantize(np.ldexp(x, exponent), grid, 8, *estimator, pattern)
    for field in ("codes", "keep", "mask"):
        assert np.array_equal(getattr(q, field), getattr(r, field))
    for field in ("rotated", "scale", "values"):
        assert np.array_equal(np.ldexp(getattr(q, field), exponent), getattr(r, field))


@given(
    grid=st.sampled_from(GRIDS),
    estimator=st.sampled_from(ESTIMATORS),
    pattern=st.sampled_from([None, ("nm", 2, 4), ("pairwise", 4, 8)]),
    bad=st.sampled_from([np.nan, np.inf, -np.inf]),
    seed=SEEDS,
)
def test_zero_and_non_finite_rows(
    grid: grids.Grid,
    estimator: tuple[str, float],
    pattern: sparsity.Pattern | None,
    bad: float,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((5, 16))
    x[1] = 0.0
    clean = quantize.quantize(x, grid, 8, *estimator, pattern)
    x[3, rng.integers(16)] = bad
    q = quantize.quantize(x, grid, 8, *estimator, pattern)

    zero_code = quantize.encode([0.0], grid)[0]
    first = sparsity.keep(np.zeros((1, 16)), pattern)[0]
    assert q.scale[1, 0] == 0
    assert (q.values[1] == 0).all()
    assert (q.codes[1] == zero_code).all()
    assert q.mask[1].all()
    assert np.array_equal(q.keep[1], first)

    assert np.isnan(q.scale[3, 0])
    assert np.isnan(q.values[3]).all()
    assert (q.codes[3] == zero_code).all()
    assert (q.mask[3] == (estimator[0] == "ste")).all()
    assert np.array_equal(q.keep[3], first)

    others = [0, 1, 2, 4]
    for field in ("rotated", "codes", "scale", "keep", "mask", "values"):
        assert np.array_equal(getattr(q, field)[others], getattr(clean, field)[others])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 8)])
@pytest.mark.parametrize("pattern", [None, ("nm", 2, 4), ("pairwise", 4, 8)])
def test_empty_gives_empty(shape: tuple[int, ...], pattern: sparsity.Pattern | None) -> None:
    q = quantize.quantize(np.zeros(shape), grids.uniform(16), 8, "trust", 1.0, pattern)
    assert q.codes.shape == q.values.shape == q.mask.shape == q.keep.shape == shape
    assert q.scale.shape == (*shape[:-1], 1)


@pytest.mark.parametrize("levels", [2, 4, 16, 256])
def test_error_on_gaussians_is_the_grids(levels: int) -> None:
    grid = grids.uniform(levels)
    x = np.random.default_rng(levels).standard_normal((16, 4096))
    q = quantize.quantize(x, grid, 128, "ste", 1.0)
    squares = (q.values - q.rotated) ** 2
    # Five standard errors of the mean; the RMS of a row adds less than 1e-3 of it.
    assert abs(squares.mean() - grid.mse) < 5 * squares.std() / 256 + 1e-3 * grid.mse


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="codes holds values from -9 to 7; -8 to 7 are allowed"):
        quantize.decode([-9, 7], grids.uniform(16))
    with pytest.raises(ValueError, match="codes holds values from 0 to 15; 0 to 14 are allowed"):
        quantize.decode([0, 15], grids.e2m1())
    with pytest.raises(TypeError, match="codes has dtype float64"):
        quantize.decode([0.0], grids.e2m1())
    for function in (quantize.scale, lambda x: quantize.encode(x, grids.uniform(4))):
        with pytest.raises(TypeError, match="has dtype complex128; real"):
            function(np.ones(4, dtype=np.complex128))
    with pytest.raises(ValueError, match="estimator is 'lsq'; 'ste', 'clip' and 'trust'"):
        quantize.quantize(np.ones((1, 4)), grids.uniform(4), 4, "lsq", 1.0)
    with pytest.raises(ValueError, match="x has width 6; a multiple of the block 4"):
        quantize.quantize(np.ones((1, 6)), grids.uniform(4), 4, "ste", 1.0)
