"""The bounds against brute force: never exceeded, exact where they say so, and not vacuous."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quest.reference import bounds, hadamard, prologue, quantize

Array = np.ndarray
F32 = np.float32
SEEDS = st.integers(0, 2**32 - 1)
U32 = bounds.U32


@pytest.mark.parametrize("u", bounds.UNIT.values())
@given(k=st.integers(0, 100))
def test_gamma_is_what_k_roundings_add_up_to(u: float, k: int) -> None:
    exact, unit = Fraction(bounds.gamma(k, u)), Fraction(u)
    slack = Fraction(1, 2**50) * exact  # the bound itself is computed in float64
    assert (1 + unit) ** k - 1 <= exact + slack
    assert 1 / (1 - unit) ** k - 1 <= exact + slack
    assert abs(exact - k * unit / (1 - k * unit)) <= slack


def test_gamma_ends_where_it_has_no_meaning() -> None:
    assert bounds.gamma(0, 0.5) == 0
    for k, u in ((2, 0.5), (256, 2.0**-8), (2**24, 2.0**-24), (3, 1.0)):
        with pytest.raises(ValueError, match="k u must be below 1"):
            bounds.gamma(k, u)


@pytest.mark.whole
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_constants_are_the_dtypes_own(dtype: torch.dtype) -> None:
    name, info = str(dtype).removeprefix("torch."), torch.finfo(dtype)
    assert bounds.UNIT[name] == info.eps / 2
    assert bounds.LARGEST[name] == info.max
    assert bounds.SMALLEST[name] == info.smallest_normal * info.eps


@pytest.mark.whole
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(seed=SEEDS)
def test_output_bounds_rounding_to_a_dtype(dtype: torch.dtype, seed: int) -> None:
    name, rng = str(dtype).removeprefix("torch."), np.random.default_rng(seed)
    low = math.log2(bounds.SMALLEST[name]) - 2
    exact = rng.standard_normal(2000) * 2.0 ** rng.uniform(low, 12, 2000)
    error = np.abs(exact) * 2.0 ** rng.uniform(-30, -6, 2000)
    off = exact + error * rng.choice([-1.0, 0.0, 1.0], 2000)
    rounded = torch.from_numpy(off).to(dtype).double().numpy()
    bound = bounds.output(exact, error, name)
    assert (np.abs(rounded - exact) <= bound * (1 + 2.0**-50)).all()
    plain = bounds.output(exact, np.zeros_like(exact), name)
    stored = torch.from_numpy(exact).to(dtype).double().numpy()
    # Half a unit in the last place is reached to within its width of 2.
    assert 0.45 < (np.abs(stored - exact) / plain).max() <= 1


# --- rotations ----------------------------------------------------------------------------------


def adversarial_sums(terms: Array, signs: tuple[int, ...]) -> float:
    """A butterfly's sum of 2^k terms in which addition i is off by the factor 1 + signs[i] u."""
    values, i = [float(t) for t in terms], 0
    while len(values) > 1:
        pairs = list(zip(values[::2], values[1::2], strict=True))
        values = [(a + b) * (1 + signs[i + n] * U32) for n, (a, b) in enumerate(pairs)]
        i += len(pairs)
    return values[0]


@pytest.mark.parametrize("order", [2, 4, 8])
def test_rotation_holds_for_every_direction_of_every_rounding(order: int) -> None:
    """All 2^(n+1) ways in which n - 1 additions, a constant and a product can round away."""
    rng = np.random.default_rng(order)
    h = hadamard.matrix(order)
    worst = 0.0
    for _ in range(4):
        x = rng.standard_normal(order) * 10.0 ** rng.integers(-2, 3, order)
        bound = bounds.rotation(x[np.newaxis], order)[0]
        for column in range(order):
            exact = float(x @ h[:, column]) * order**-0.5
            for signs in itertools.product((-1, 1), repeat=order + 1):
                got = adversarial_sums(x * h[:, column], signs)
                for s in signs[order - 1 :]:
                    got *= 1 + s * U32 * bool(bounds.normalisations(order))
                got *= order**-0.5
                worst = max(worst, abs(got - exact) / bound[column])
    assert 0.3 < worst <= 1


def butterfly(x: Array, order: int, stages: list[int]) -> Array:
    y = x.reshape(-1, order).astype(F32)
    for s in stages:
        pairs = y.reshape(-1, order // (2 << s), 2, 1 << s)
        y = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2)
    return y.reshape(x.shape)


def float32_rotations(x: Array, order: int, rng: np.random.Generator) -> Iterator[Array]:
    """x H in float32: stages and base terms in random orders, either factor first."""
    m, power = hadamard.split(order)
    base, norm = hadamard.base(m).astype(F32), F32(order**-0.5)

    def product(y: Array) -> Array:
        y = y.reshape(-1, m, power).astype(F32)
        out = np.zeros_like(y)
        for j in rng.permutation(m):
            out += base[j][:, np.newaxis] * y[:, j : j + 1]
        return out.reshape(x.shape)

    stages = [int(s) for s in rng.permutation(int(math.log2(power)))]
    yield butterfly(product(x) if m > 1 else x, power, stages) * norm
    turned = butterfly(x, power, stages)
    yield (product(turned) if m > 1 else turned) * norm


@pytest.mark.parametrize("order", [2, 8, 16, 128, 1024, 12, 24, 20, 28, 40, 112])
@given(seed=SEEDS)
def test_rotation_is_never_exceeded_by_float32(order: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((4, 2 * order)) * 2.0 ** rng.integers(-6, 7, (4, 1))).astype(F32)
    if seed % 3 == 0:
        x[:, 0] *= 1e4
    if seed % 3 == 1:
        x = np.abs(x)
    x64 = x.astype(np.float64)
    exact, bound = hadamard.apply(x64, order), bounds.rotation(x64, order)
    for y in float32_rotations(x, order, rng):
        assert (np.abs(y - exact) <= bound).all()


@pytest.mark.parametrize("order", [8, 16, 128, 1024, 12, 40, 112])
def test_rotation_is_not_vacuous(order: int) -> None:
    rng = np.random.default_rng(order)
    x = rng.standard_normal((512, order)).astype(F32)
    x64 = x.astype(np.float64)
    exact, bound = hadamard.apply(x64, order), bounds.rotation(x64, order)
    assert not bounds.exact_sums(x64, order).any()
    reached = max(
        float((np.abs(y - exact) / bound).max()) for y in float32_rotations(x, order, rng)
    )
    assert reached > 0.02
    # Not far above one unit of the row: a 4-bit step is 5 million of them.
    rms = np.sqrt(np.mean(x64**2, -1, keepdims=True))
    assert (bound / rms).max() < 64 * 2 * math.sqrt(order) * U32


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 5))
def test_a_sum_that_is_stored_on_its_way(name: str, seed: int, n: int) -> None:
    """Never exceeded, in any order; one term is rounded once, and the bound is not vacuous."""
    g = np.random.default_rng(seed)
    dtype = getattr(torch, name)
    terms = [g.standard_normal(50) * 10.0 ** g.integers(-3, 3) for _ in range(n)]
    errors = [np.abs(t) * 1e-6 for t in terms]
    bound = bounds.stored_sum(terms, errors, name)
    moved = [
        torch.from_numpy(t + e * g.choice((-1, 1), 50)) for t, e in zip(terms, errors, strict=True)
    ]
    stored = [t.to(dtype) for t in moved]
    g.shuffle(stored)  # type: ignore[arg-type]
    total = stored[0]
    for t in stored[1:]:
        total = total + t
    error = np.abs(total.double().numpy() - sum(terms))
    assert (error <= bound).all()
    if n == 1:
        np.testing.assert_allclose(bound, bounds.output(terms[0], errors[0], name), rtol=1e-12)
    else:
        pairs = zip(terms, errors, strict=True)
        assert (bound <= 2 * n * sum(bounds.output(t, e, name) for t, e in pairs)).all()


@pytest.mark.parametrize("name", bounds.UNIT)
def test_a_stored_sum_counts_its_roundings(name: str) -> None:
    """n terms of 1: each is rounded where it is stored, and in each addition."""
    one, u = np.ones(1), bounds.UNIT[name]
    for n in (2, 3, 5):
        found = bounds.stored_sum([one] * n, [0 * one] * n, name)
        np.testing.assert_allclose(found, n * (n * u / (1 - n * u)), rtol=1e-3)
        found = bounds.stored_sum([0 * one] * n, [u * one] * n, name)
        np.testing.assert_allclose(found, n * u * (1 + n * u), rtol=(n + 1) ** 2 * u)


def test_rotation_of_order_1_is_exact() -> None:
    x = np.random.default_rng(0).standard_normal((3, 5))
    assert (bounds.rotation(x, 1) == 0).all()


def test_counts_of_roundings() -> None:
    assert [bounds.additions(n) for n in (1, 2, 128, 2**14)] == [0, 1, 7, 14]
    # A power of two beyond the butterfly's limit ends in a dot product of what is left.
    assert bounds.additions(2**15) == 14 + 2
    assert [bounds.additions(n) for n in (12, 24, 20, 28, 112)] == [12, 13, 20, 28, 30]
    assert [bounds.normalisations(4**k) for k in range(8)] == [0] * 8
    assert all(bounds.normalisations(n) >= 2 for n in (2, 8, 128, 12, 20, 28, 24))


@given(seed=SEEDS, order=st.sampled_from([2, 8, 64, 12, 28]))
def test_absolute_sum(seed: int, order: int) -> None:
    x = np.random.default_rng(seed).standard_normal((2, 3, 2 * order))
    h = np.abs(hadamard.matrix(order)) / math.sqrt(order)
    expected = (np.abs(x).reshape(2, 3, 2, order) @ h).reshape(x.shape)
    np.testing.assert_allclose(bounds.absolute_sum(x, order), expected, rtol=order * 2.0**-52)


def any_order(terms: Array, rng: np.random.Generator) -> float:
    """A float32 sum along a random binary tree."""
    values = [F32(t) for t in terms]
    while len(values) > 1:
        i, j = rng.choice(len(values), 2, replace=False)
        total = values[i] + values[j]
        values = [v for k, v in enumerate(values) if k not in (i, j)] + [total]
    return float(values[0])


@given(
    seed=SEEDS,
    order=st.sampled_from([2, 8, 16, 12]),
    size=st.sampled_from([3, 100, 2**16, 2**21, 2**23]),
    power=st.integers(-140, 100),
)
def test_exact_sums_are_exact_in_any_order(seed: int, order: int, size: int, power: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(-size, size + 1, (2, order)) * 2.0**power
    good = bounds.exact_sums(x, order)
    h = hadamard.matrix(order)
    if size * order < 2**24:
        assert good.all(), "integers below 2^24 in sum"
    for row in range(2):
        if good[row].all():
            for column in rng.choice(order, 2):
                terms = x[row] * h[:, column]
                assert any_order(terms, rng) == math.fsum(terms)


@pytest.mark.parametrize("order", [2, 8, 12])
def test_exact_sums_says_no(order: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 3 * order)).astype(F32).astype(np.float64)
    # Two random floats may have an exact sum; a few more never do.
    assert order == 2 or not bounds.exact_sums(x, order).any()
    row = np.ones((1, 2 * order))
    row[0, 0] = 2.0**24
    # Blocks are judged one by one: 2^24 + 1 needs 25 bits.
    assert bounds.exact_sums(row, order)[0].tolist() == [False] * order + [True] * order
    row[0, 0] = math.inf
    assert not bounds.exact_sums(row, order)[0, :order].any()
    # The last bit of 24 counts, and no further one.
    for first, good in ((2.0**23 - 1, True), (2.0**24 - order, True), (2.0**24 - 1, False)):
        row[0, 0] = first
        assert (bounds.exact_sums(row, order)[0, :order] == good).all()
    assert bounds.exact_sums(np.zeros((1, order)), order).all()


# --- scale and codes ----------------------------------------------------------------------------


def float32_scales(x: Array, rng: np.random.Generator) -> Iterator[Array]:
    """RMS in float32, squares summed in several orders; each divides and roots once."""
    squares = (x.astype(F32)) ** 2
    shuffled = squares[:, rng.permutation(x.shape[1])]
    for total in (
        np.cumsum(squares, -1, dtype=F32)[:, -1:],
        np.cumsum(shuffled, -1, dtype=F32)[:, -1:],
        np.cumsum(np.sort(squares, -1)[:, ::-1], -1, dtype=F32)[:, -1:],
        squares.sum(-1, keepdims=True, dtype=F32),
    ):
        yield np.sqrt(total / F32(x.shape[1]))
        yield np.sqrt(total * F32(1 / x.shape[1]))


@pytest.mark.parametrize("width", [1, 2, 7, 64, 300])
@given(seed=SEEDS)
def test_scale_is_never_exceeded_by_float32(width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4, width)) * 2.0 ** rng.integers(-30, 31, (4, 1))
    x = x.astype(F32).astype(np.float64)
    sigma = quantize.scale(x)
    bound = bounds.scale(x, 1, sigma)
    for got in float32_scales(x, rng):
        assert (np.abs(got - sigma) <= bound).all()


@pytest.mark.parametrize("order", [16, 64, 12])
@given(seed=SEEDS)
def test_scale_of_a_rotated_row(order: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4, 2 * order)).astype(F32)
    x64 = x.astype(np.float64)
    sigma = quantize.scale(x64)
    bound = bounds.scale(x64, order, sigma)
    for y in float32_rotations(x, order, rng):
        for got in float32_scales(y, rng):
            assert (np.abs(got - sigma) <= bound).all()


@pytest.mark.parametrize("order", [12, 40, 128, 256])
def test_terms_that_are_normalised_first_may_each_be_lost(order: int) -> None:
    """Among the subnormals each is off by half of the smallest: more than a sum that is, once."""
    rng = np.random.default_rng(order)
    h = hadamard.apply(np.eye(order), order).astype(F32)
    for power in (-126, -130, -135, -140, -145):
        x = (rng.standard_normal((16, order)) * 2.0**power).astype(F32)
        x64 = x.astype(np.float64)
        exact, sums = hadamard.apply(x64, order), bounds.Sums(order, last=False)
        made = np.zeros((16, order), F32)
        for j in range(order):  # one term after another, each rounded by itself
            made += x[:, j : j + 1] * h[j]
        bound = bounds.output(exact, bounds.rotation(x64, order, sums=sums), "float32")
        assert (np.abs(made - exact) <= bound).all()
    zero = np.zeros((1, order))
    np.testing.assert_array_equal(bounds.rotation(zero, order, sums=sums), order * 2.0**-150)
    np.testing.assert_array_equal(bounds.rotation(zero, order), 2.0**-150)


def test_scale_counts_its_roundings() -> None:
    """Term by term: no wider than what its docstring derives."""
    x, u = np.sqrt(np.arange(1.0, 17.0))[None], 2.0**-24
    plain = bounds.scale(x, 1, np.ones((1, 1)))
    np.testing.assert_allclose(plain, (16 + 2) / 2 * u + 4 * u, rtol=1e-5)
    turned = bounds.scale(x, 16, np.ones((1, 1)))
    spread = np.sqrt(np.mean(bounds.rotation(x, 16) ** 2))
    np.testing.assert_allclose(turned - plain, spread, rtol=1e-5)
    assert bounds.scale(0 * x, 1, np.zeros((1, 1))) == 2.0**-149
    np.testing.assert_array_equal(bounds.rotation(0 * x, 16), 2.0**-150)


@pytest.mark.parametrize("width", [2, 16, 256])
def test_scale_is_not_vacuous(width: int) -> None:
    rng = np.random.default_rng(width)
    x = rng.standard_normal((2000, width)).astype(F32).astype(np.float64)
    sigma = quantize.scale(x)
    bound = bounds.scale(x, 1, sigma)
    reached = max(float((np.abs(s - sigma) / bound).max()) for s in float32_scales(x, rng))
    assert reached > 0.01
    # The unbiased scale of any width that is used is far outside.
    assert (bound / sigma).max() < 1 / (20 * width)


@pytest.mark.parametrize("order", [1, 16, 128, 12])
@given(seed=SEEDS, power=st.integers(-126, 100))
def test_code_margin_is_the_same_at_every_magnitude(order: int, seed: int, power: int) -> None:
    """A power of two on a row and on its scale changes nothing."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, 2 * order)).astype(F32).astype(np.float64)
    sigma = quantize.scale(x).astype(F32).astype(np.float64)
    margin = bounds.code_margin(x, order, sigma)
    scaled = bounds.code_margin(x * 2.0**power, order, sigma * 2.0**power)
    np.testing.assert_array_equal(scaled, margin)


def reciprocal_of_product(y: Array, s: Array, step: Array) -> Array:
    return y * (F32(1) / (s * step))


def quotient_of_quotient(y: Array, s: Array, step: Array) -> Array:
    return (y / s) / step


def by_both_reciprocals(y: Array, s: Array, step: Array) -> Array:
    return (y * (F32(1) / s)) / step


@pytest.mark.parametrize(
    "divide", [reciprocal_of_product, quotient_of_quotient, by_both_reciprocals]
)
@pytest.mark.parametrize("order", [1, 16, 128, 12])
@given(seed=SEEDS)
def test_code_margin_is_never_exceeded_by_float32(
    order: int, divide: Callable[[Array, Array, Array], Array], seed: int
) -> None:
    """t = y / (sigma step) in float32, in units of the exact step."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, 2 * order)).astype(F32)
    if seed % 2:
        x[:, 0] *= 1e3
    step = float(rng.uniform(0.01, 2.0))
    x64 = x.astype(np.float64)
    sigma = quantize.scale(x64).astype(F32)
    z = hadamard.apply(x64, order) / sigma
    margin = bounds.code_margin(x64, order, sigma.astype(np.float64))
    reached = 0.0
    for y in float32_rotations(x, order, rng):
        t = divide(y, sigma, F32(step)).astype(np.float64)
        error = np.abs(t * step - z)
        assert (error <= margin).all()
        reached = max(reached, float((error / margin).max()))
    assert reached > 0.01


def test_code_margin_is_zero_where_the_sum_is() -> None:
    x = np.array([[3.0, 3.0, -1.0, -1.0], [3.0, 2.0, 0.1, 0.1], [0.0, 0.0, 0.0, 1.0]])
    sigma = quantize.scale(x)
    margin = bounds.code_margin(x, 2, sigma)
    zero = hadamard.apply(x, 2) == 0
    assert zero[0, 1]
    assert (margin[zero & bounds.exact_sums(x, 2)] == 0).all()
    assert (margin[~zero] > 0).all()


def test_code_margin_leaves_codes_decided() -> None:
    """Fewer than 1 in 1000 codes are ambiguous at 8 bits and the usual block."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 256)).astype(F32).astype(np.float64)
    sigma = quantize.scale(x)
    margin = bounds.code_margin(x, 128, sigma)
    step = 2 * 3.9222 / 255
    assert 2 * margin.mean() / step < 5e-4


# --- the gate ---------------------------------------------------------------------------------


def test_a_gate_that_is_known_up_to_something() -> None:
    """What may be made of it lies within the bound, and reaches most of it."""
    rng = np.random.default_rng(0)
    n = 20_000
    g = rng.standard_normal(n) * 10.0 ** rng.uniform(-6, 2, n)
    v = rng.standard_normal(n) * 10.0 ** rng.uniform(-6, 2, n)
    off = np.abs(g) * 10.0 ** rng.uniform(-4, -1, n), np.abs(v) * 10.0 ** rng.uniform(-4, -1, n)
    bound = bounds.gated_near(g, v, off)
    expected, worst = prologue.gated(g, v), 0.0
    for a, b in itertools.product(np.linspace(-1, 1, 9), (-1, 1)):
        near, other = g + a * off[0], v + b * off[1]
        error = np.abs(prologue.gated(near, other) - expected) + bounds.gated(near, other)
        assert (error <= bound).all()
        worst = max(worst, float((error / bound).max()))
    assert worst > 0.9
    exact = bounds.gated_near(g, v, (0 * g, 0 * v))
    np.testing.assert_array_equal(exact, 2 * bounds.gated(g, v))
    # Where silu is steepest its slope is what counts, and no more.
    one, small = np.ones(1), np.full(1, 1e-3)
    for at in (-2.3994, 2.3994):
        found = bounds.gated_near(at * one, 0 * one, (0 * one, small))
        np.testing.assert_allclose(found, 1e-3 * abs(prologue.gated(at * one, one)), rtol=1e-4)
    found = bounds.gated_near(2.3994 * one, one, (small, 0 * one))
    # SILU_STEEPEST is 1.5e-4 above that slope, and the slope a thousandth further on 1e-6 below.
    np.testing.assert_allclose(found, 1.09984e-3, rtol=2e-3)
    slope = np.diff(prologue.gated(np.linspace(2.3, 2.5, 2001), np.ones(2001))) / 1e-4
    assert 1.0998 < slope.max() < bounds.SILU_STEEPEST - 1e-4


def test_gated_counts_its_roundings() -> None:
    """Term by term: no wider than what its docstring derives."""
    u = 2.0**-24
    one = np.ones((1, 1))
    # Half of the sigmoid's sum is exp(0), off by four roundings; five more follow.
    zero = bounds.gated(0 * one, one)
    np.testing.assert_allclose(zero, 2.0**-150 * 2, rtol=1e-6)
    for g in (-60.0, -8.0, -1.0, 0.25, 1.0, 8.0, 60.0):
        sigmoid = 1 / (1 + math.exp(-g))
        share = (2 * abs(g) + 4) * u / (1 + math.exp(g)) + 5 * u
        silu = abs(g) * sigmoid
        expected = silu * share + abs(g) * 2.0**-126
        np.testing.assert_allclose(bounds.gated(g * one, one), expected, rtol=1e-3)
        np.testing.assert_allclose(bounds.gated(g * one, -3 * one), 3 * expected, rtol=1e-3)
        stored = expected + 2.0**-8 * silu
        np.testing.assert_allclose(bounds.gated(g * one, one, "bfloat16"), stored, rtol=1e-3)
    far = bounds.gated(1e30 * one, one)
    np.testing.assert_allclose(far, 1e30 * (5 * u + 2.0**-126), rtol=1e-3)
    np.testing.assert_allclose(bounds.gated(-1e30 * one, one), 1e30 * 2.0**-126, rtol=1e-3)


def float32_gates(gate: Array, value: Array, rng: np.random.Generator) -> Iterator[Array]:
    """silu(gate) value in float32: by exp and a quotient, and by a GPU's fast instructions.

    Of these 2^t is off by 2^-22 and the reciprocal by 2^-23, either way, and flushed to 0.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        e = np.exp(-gate.astype(np.float64)).astype(F32)
        yield gate / (F32(1) + e) * value
        yield gate * (F32(1) / (F32(1) + e)) * value
        t = (gate * F32(-1.4426950408889634)).astype(np.float64)
        for _ in range(4):
            a, b = rng.choice([-1.0, 1.0], (2, *gate.shape))
            # What rounds to float32 here is part of what the instruction may be off by.
            power = np.exp2(t) * (1 + a * (2.0**-22 - U32))
            power = np.where(power < 2.0**-126, 0.0, power).astype(F32)
            reciprocal = 1 / (F32(1) + power).astype(np.float64) * (1 + b * (2.0**-23 - U32))
            sigmoid = np.where(reciprocal < 2.0**-126, 0.0, reciprocal).astype(F32)
            yield gate * sigmoid * value


@given(seed=SEEDS)
def test_gated_is_never_exceeded_by_float32(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gate = (rng.standard_normal((8, 200)) * 2.0 ** rng.integers(-20, 9, (8, 1))).astype(F32)
    gate[0] = rng.uniform(-130, 130, 200)
    value = (rng.standard_normal((8, 200)) * 2.0 ** rng.integers(-140, 100, (8, 1))).astype(F32)
    exact = prologue.gated(gate, value)
    bound = bounds.gated(gate.astype(np.float64), value.astype(np.float64))
    for got in float32_gates(gate, value, rng):
        assert (np.abs(got - exact) <= bound).all()


def float32_gradients(
    grad: Array, gate: Array, value: Array, rng: np.random.Generator
) -> Iterator[Array]:
    """grad value s (1 + g (1 - s)) in float32, of every sigmoid of `float32_gates`, two orders."""
    one = np.ones_like(gate)
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        for silu in float32_gates(gate, one, rng):
            s = np.where(gate == 0, F32(0.5), silu / np.where(gate == 0, one, gate)).astype(F32)
            slope = F32(1) + gate * (F32(1) - s)
            yield grad * value * s * slope
            yield grad * value * (s * slope)


@given(seed=SEEDS)
def test_gradients_of_a_gate_are_never_exceeded_by_float32(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gate = (rng.standard_normal((8, 200)) * 2.0 ** rng.integers(-20, 9, (8, 1))).astype(F32)
    gate[0] = rng.uniform(-130, 130, 200)
    gate[1] = -1.2784645 + rng.standard_normal(200).astype(F32) * 1e-4  # where the slope is 0
    value = (rng.standard_normal((8, 200)) * 2.0 ** rng.integers(-60, 50, (8, 1))).astype(F32)
    grad = (rng.standard_normal((8, 200)) * 2.0 ** rng.integers(-80, 50, (8, 1))).astype(F32)
    exact, _ = prologue.gated_backward(grad, gate, value)
    bound = bounds.gated_backward(*(t.astype(np.float64) for t in (grad, gate, value)))
    # s is made of silu by a quotient here, which rounds once more than an implementation does.
    spare = 2 * U32 * np.abs(grad.astype(np.float64) * value) * (1 + np.abs(gate))
    for got in float32_gradients(grad, gate, value, rng):
        assert (np.abs(got - exact) <= bound + spare).all()


def test_gradients_of_a_gate_count_their_roundings() -> None:
    """Term by term: no wider than what the docstring derives."""
    u = 2.0**-24
    one = np.ones((1, 1))
    for g in (-60.0, -8.0, -1.0, 0.0, 0.25, 1.0, 8.0, 60.0):
        s, rest = 1 / (1 + math.exp(-g)), 1 / (1 + math.exp(g))
        a = (2 * abs(g) + 4) * u * rest + 3 * u
        slope = abs(1 + g * rest)
        error = abs(g) * (s * a + 2 * u * rest) + u * slope
        expected = s * (a * slope + error) + 3 * u * s * slope
        found = bounds.gated_backward(one, g * one, -3 * one)
        np.testing.assert_allclose(found, 3 * expected, rtol=1e-3, atol=1e-36)
    # Far out nothing cancels, and the slope is 1.
    for g in (130.0, 1000.0, 1e30):
        np.testing.assert_allclose(bounds.gated_backward(one, g * one, one), 7 * u, rtol=1e-3)
    small = bounds.gated_backward(2.0**-140 * one, -one, one)
    assert 2.0**-150 < float(small[0, 0]) < 2.0**-147


def test_gradients_of_a_gate_are_not_vacuous() -> None:
    rng = np.random.default_rng(0)
    gate = rng.standard_normal((50, 200)).astype(F32) * 4
    value, grad = rng.standard_normal((2, 50, 200)).astype(F32)
    exact, _ = prologue.gated_backward(grad, gate, value)
    bound = bounds.gated_backward(*(t.astype(np.float64) for t in (grad, gate, value)))
    reached = [
        float((np.abs(got - exact) / bound).max())
        for got in float32_gradients(grad, gate, value, rng)
    ]
    assert min(reached) > 0.3
    # Far below what bfloat16 and float16 keep.
    assert (bound / np.abs(grad * value)).max() < 2.0**-17


def test_gated_is_not_vacuous() -> None:
    rng = np.random.default_rng(0)
    gate = rng.standard_normal((50, 200)).astype(F32) * 4
    value = rng.standard_normal((50, 200)).astype(F32)
    exact = prologue.gated(gate, value)
    bound = bounds.gated(gate.astype(np.float64), value.astype(np.float64))
    reached = [float((np.abs(x - exact) / bound).max()) for x in float32_gates(gate, value, rng)]
    assert min(reached) > 0.1
    assert max(reached) > 0.5
    # Far below what bfloat16 and float16 keep.
    assert (bound / np.abs(exact)).max() < 2.0**-17


# --- the norm ---------------------------------------------------------------------------------


def test_normed_counts_its_roundings() -> None:
    """Term by term: no wider than what its docstring derives."""
    u, h, w = 2.0**-24, np.sqrt(np.arange(1.0, 17.0))[None], np.linspace(-3, 3, 16)
    mean = 8.5
    unit = h / np.sqrt(mean + 0.25)
    expected = unit * ((16 + 4) / 2 + 6) * u
    found = bounds.normed(h, w, 0.25)
    np.testing.assert_allclose(found, expected * np.abs(w), rtol=1e-5)
    stored = bounds.normed(h, w, 0.25, "bfloat16")
    np.testing.assert_allclose(stored, (expected + unit * 2.0**-8) * np.abs(w), rtol=1e-4)
    zero = bounds.normed(0 * h, w, 1e-5)
    np.testing.assert_allclose(zero[0], 2.0**-150 * (1 + np.abs(w)), rtol=1e-6)
    # Squares that vanish, beside an eps that is as small.
    small = bounds.normed(h * 2.0**-76, w, 2.0**-149)
    mean = 8.5 * 2.0**-152 + 2.0**-149
    share = (1 - 2.0**-149 / mean) ** -0.5 - 1
    np.testing.assert_allclose(small, np.abs(w) * h * 2.0**-76 / np.sqrt(mean) * share, rtol=1e-4)


def test_where_squares_overflow() -> None:
    h = np.array([[2.0**64, 0.0], [2.0**63.4, 2.0**63.4], [2.0**63.5, 2.0**63.6], [1e30, math.inf]])
    over = bounds.squares_overflow(h)
    np.testing.assert_array_equal(over[:, 0], [True, False, True, False])


def float32_norms(h: Array, w: Array, eps: float, rng: np.random.Generator) -> Iterator[Array]:
    """In float32: sums in several orders, a root and a quotient, and an rsqrt two units off."""
    squares = h**2
    for total in (
        np.cumsum(squares, -1, dtype=F32)[:, -1:],
        np.cumsum(squares[:, rng.permutation(h.shape[1])], -1, dtype=F32)[:, -1:],
        squares.sum(-1, keepdims=True, dtype=F32),
    ):
        mean = total / F32(h.shape[1]) + F32(eps)
        yield h * (F32(1) / np.sqrt(mean)) * w
        sign = rng.choice([-1.0, 1.0], mean.shape)
        rsqrt = 1 / np.sqrt(mean.astype(np.float64)) * (1 + sign * (2.0**-22 - U32))
        yield h * rsqrt.astype(F32) * w
        yield h * (w * rsqrt.astype(F32))


@pytest.mark.parametrize("width", [1, 2, 7, 64, 300])
@given(seed=SEEDS)
def test_normed_is_never_exceeded_by_float32(width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    h = (rng.standard_normal((6, width)) * 2.0 ** rng.integers(-70, 50, (6, 1))).astype(F32)
    w = rng.standard_normal(width).astype(F32)
    eps = float(2.0 ** rng.integers(-40, 3))
    exact = prologue.normed(h, w, eps)
    bound = bounds.normed(h.astype(np.float64), w.astype(np.float64), eps)
    for got in float32_norms(h, w, eps, rng):
        assert (np.abs(got - exact) <= bound).all()


def test_normed_is_not_vacuous() -> None:
    rng = np.random.default_rng(0)
    h, w = rng.standard_normal((500, 4)).astype(F32), rng.standard_normal(4).astype(F32)
    exact = prologue.normed(h, w, 1e-5)
    bound = bounds.normed(h.astype(np.float64), w.astype(np.float64), 1e-5)
    reached = [float((np.abs(x - exact) / bound).max()) for x in float32_norms(h, w, 1e-5, rng)]
    assert max(reached) > 0.4
    # Of the widths that layers have it is still far below what bfloat16 keeps.
    wide = np.ones((1, 8192))
    assert bounds.normed(wide, wide[0], 1e-5).max() < 2.0**-11
