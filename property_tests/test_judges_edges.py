"""Each judge at the edge of its bound: the last value inside passes, the first one beyond does not.

The bounds are counted again here, term by term as their docstrings derive them, and at inputs where
the term in question is a large part of the whole: a term ten times as wide, or one left out, moves
the edge by more than the dtype resolves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import quest
from quest import operands
from quest.conformance import judges, oracle
from quest.conformance.verdict import Rejected, Verdict
from quest.reference import bounds, hadamard, packing, quantize

Array = np.ndarray
U32, ETA32 = 2.0**-24, 2.0**-149
Failing = Callable[[Tensor], bool]


def gamma(k: float, u: float = U32) -> float:
    return k * u / (1 - k * u)


def edge(exact: Array, bound: Array) -> tuple[Tensor, Tensor]:
    """float32 at each place: the largest that is at most `bound` above, and the next one."""
    with np.errstate(over="ignore"):
        inside = (exact + bound).astype(np.float32)
    up, down = np.float32(np.inf), np.float32(-np.inf)
    far = inside.astype(np.float64) - exact > bound
    inside = np.where(far, np.nextafter(inside, down), inside)
    return torch.from_numpy(inside), torch.from_numpy(np.nextafter(inside, up))


def check(failing: Failing, exact: Array, bound: Array) -> None:
    """Nothing fails on the edge, above and below; and each element alone does, beyond it."""
    for sign in (1.0, -1.0):
        inside, beyond = (sign * t for t in edge(sign * exact, bound))
        assert not failing(inside)
        for i in range(inside.numel()):
            wrong = inside.clone()
            wrong.view(-1)[i] = beyond.view(-1)[i]
            assert failing(wrong), (sign, i)


def stored(exact: Array, error: Array) -> Array:
    """The bound of what is off by `error` and then rounded to float32."""
    return error + U32 * (np.abs(exact) + error) + ETA32 / 2


def lone(count: int, width: int) -> Array:
    """Rows of one non-zero entry each: sums of one term, as large as the sum of magnitudes."""
    rows = np.zeros((count, width))
    rows[np.arange(count), np.arange(count) % width] = 1.0 + np.arange(count) / 8
    return rows


# --- transform and scale ------------------------------------------------------------------------


@pytest.mark.whole
@pytest.mark.parametrize("transpose", [False, True])
def test_transform(transpose: bool) -> None:
    x = np.random.default_rng(0).standard_normal((2, 24)).astype(np.float32).astype(np.float64)
    exact = (hadamard.apply_transpose if transpose else hadamard.apply)(x, 12)
    # 12 terms of a dot product; the factor: constant and product; subnormal products.
    size = np.abs(x).reshape(2, 2, 12).sum(-1, keepdims=True).repeat(12, -1).reshape(2, 24)
    error = gamma(12 + 2) * size / math.sqrt(12) + ETA32 / 2
    given = torch.from_numpy(x).float()

    def failing(y: Tensor) -> bool:
        return judges.rotated(given, y, 12, transpose).failure is not None

    check(failing, exact, stored(exact, error))


def test_sums_that_are_exact_round_with_their_factor_only() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(-9, 10, (3, 24)).astype(np.float64)
    for order, roundings in ((1, 0), (2, 2), (4, 0), (8, 2), (12, 2)):
        bound = bounds.rotation(x, order)
        tiny = ETA32 / 2 if order > 1 else 0.0
        expected = gamma(roundings) * np.abs(hadamard.apply(x, order)) + tiny
        np.testing.assert_allclose(bound, expected, rtol=1e-12, atol=0)


def test_a_transform_of_order_1_does_nothing_whatever_sums_are_declared() -> None:
    x = np.array([[1.0, -3e38, 2.0**-149, math.inf, math.nan, 0.1]])
    for sums in (bounds.BUTTERFLY, bounds.Sums(roundings=5), bounds.Sums(5, last=False)):
        np.testing.assert_array_equal(bounds.rotation(x, 1, sums=sums), np.zeros_like(x))


def test_scale() -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 3))).float()
    for power in (0, -146):  # where what is subnormal counts for most
        given = x * 2.0**power
        x64 = oracle.lift(given)
        sigma = np.sqrt((x64**2).mean(-1, keepdims=True))
        error = sigma * (gamma(3 + 2) / 2 + 4 * U32) + ETA32

        def failing(scale: Tensor, given: Tensor = given) -> bool:
            return judges.scaled(given, scale, 1).failure is not None

        check(failing, sigma, error)


def test_what_a_row_s_magnitude_hides_of_a_code() -> None:
    """2^-149 of the largest entry, (1 + 2) halves of it over the least sigma: d^-0.5 / 2."""
    x, sigma = np.array([[1.0, 2.0**-145]]), np.array([[1.0]])
    margin = bounds.code_margin(x, 1, sigma)
    lost = 3 * 2 * math.sqrt(2) * ETA32
    np.testing.assert_allclose(margin, gamma(4) * x + lost, rtol=1e-12, atol=0)


# --- codes, masks, selections -------------------------------------------------------------------

I4 = quest.Quantizer(quest.grids.uniform(4), quest.Identity(), quest.STE())
ONE = torch.ones(1, 1)


def test_codes_beyond_the_grid() -> None:
    x = torch.tensor([[9.0, -9.0, 0.1]])
    good = torch.tensor([[7, -8, 0]], dtype=torch.int16)
    judges.coded(x, I4, good, ONE).require()
    for i, wrong in ((0, 8), (1, -9)):
        codes = good.clone()
        codes[0, i] = wrong
        with pytest.raises(Rejected, match=r"^codes: codes from -?\d to \d, outside -8 to 7"):
            judges.coded(x, I4, codes, ONE).require()


@pytest.mark.parametrize("order", [1, 8])
def test_a_code_may_err_by_its_margin(order: int) -> None:
    """Once, and not twice: of either side of a midpoint."""
    q = replace(I4, transform=quest.Hadamard(order) if order > 1 else quest.Identity())
    grid = oracle.grid(q.require_grid())
    row = np.zeros((1, 8))
    row[0, 5] = 1.0  # rotated, 0.35 of it in each place
    high = hadamard.apply(row, order)
    where = int(np.argmax(high))
    for n, sign in itertools.product((9, 10, 13), (1, -1)):
        scale = high[0, where] / grid.midpoints[n]
        margin = bounds.code_margin(row, order, np.array([[scale]]))[0, where]
        for off, wrong in ((0.9, False), (1.1, True)):
            s = np.array([[high[0, where] / (grid.midpoints[n] + sign * off * margin)]])
            codes = quantize.encode(hadamard.apply(row, order) / s, grid)
            codes[0, where] -= sign
            given = torch.from_numpy(row), q, torch.from_numpy(codes), torch.from_numpy(s)
            found = judges.coded(*given, conclusive=False)
            assert (found.failure is not None) == wrong, (n, sign, off)


@pytest.mark.parametrize(
    "estimator",
    [quest.Clip(1.3), quest.Clip(0.6), quest.Trust(), quest.Trust(1.5), quest.Trust(0.5)],
)
def test_a_mask_may_err_by_its_roundings(estimator: quest.Clip | quest.Trust) -> None:
    """Those of the place and of the threshold, and of a point that it is measured from."""
    q = replace(I4, estimator=estimator)
    grid = oracle.grid(q.require_grid())
    near = isinstance(estimator, quest.Trust) and estimator.scale < 1
    point = grid.points[11] if near else 0.0
    threshold = estimator.scale * (grid.half_gap if near else grid.outer)
    if isinstance(estimator, quest.Trust) and not near:
        threshold = grid.outer + estimator.scale * grid.half_gap
    slack = gamma(2) * threshold + (gamma(3) * (point + threshold) if near else 0.0)
    for sign, off in itertools.product((1, -1), (0.9, -0.9, 1.1, -1.1)):
        # z is off by four roundings itself; a flag that is wrong is so beyond all of that.
        z = sign * (point + threshold + off * slack) / (1 - math.copysign(gamma(4), off))
        x = torch.tensor([[z]], dtype=torch.float64)
        codes = torch.from_numpy(quantize.encode(x.numpy(), grid))
        for flag in (True, False):
            found = judges.masked(x, q, codes, ONE, torch.tensor([[flag]]))
            wrong = abs(off) > 1 and flag == (off > 0)
            assert (found.failure is not None) == wrong, (sign, off, flag)


def test_rows_without_a_scale_have_one_mask() -> None:
    """1 for zeros, 0 for what is not finite; all ones where the estimator masks nothing."""
    x = torch.tensor([[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
    scale = torch.tensor([[0.0], [math.nan], [math.nan]])
    codes = torch.zeros(3, 2, dtype=torch.int8)
    for estimator, rule in ((quest.Trust(), [1, 0, 0]), (quest.STE(), [1, 1, 1])):
        q = replace(I4, estimator=estimator)
        good = torch.tensor(rule, dtype=torch.bool)[:, None].expand(3, 2)
        judges.masked(x, q, codes, scale, good).require()
        for i in range(6):
            wrong = good.clone()
            wrong.view(-1)[i] ^= True
            with pytest.raises(Rejected, match=r"^mask: 1 of 6 mask bits are wrong"):
                judges.masked(x, q, codes, scale, wrong).require()


PAIRS = quest.Pairwise(4, 8)


def selection(kept: float, dropped: float, top: float, pattern: object) -> Verdict:
    """Of the entries, or pairs, of one group `kept` and `top` are kept, `dropped` and 0 not."""
    unit = 2 if pattern is PAIRS else 1
    group = np.zeros((4, unit))
    group[:3, 0] = kept, dropped, top
    keep = np.zeros((4, unit), bool)
    keep[[0, 2]] = True
    given = torch.from_numpy(group.reshape(1, -1)).float()
    q = replace(I4, sparsity=pattern)
    return judges.selected(given, q, torch.from_numpy(keep.reshape(1, -1)))


@pytest.mark.whole
@pytest.mark.parametrize("pattern", [quest.NM(2, 4), PAIRS])
def test_a_selection_may_err_by_what_its_numbers_do(pattern: object) -> None:
    u = U32
    if pattern is PAIRS:
        # A norm is off by 2 u at most: 4 u apart may be exchanged, 6 u may not.
        assert selection(1.0, 1 + 4 * u, 1.0, pattern).failure is None
        assert selection(1.0, 1 + 6 * u, 1.0, pattern).failure is not None
    else:
        # Nothing is computed of an entry that is not rotated.
        assert selection(1.0, 1 + 2 * u, 1.0, pattern).failure is not None
    # Below the largest entry by this much, an entry (a square of one) is lost.
    lost = 2.0**-149 if pattern is not PAIRS else 2.0**-74
    assert selection(lost, 3 * lost, 1.0, pattern).failure is None
    assert selection(lost, 4 * lost, 1.0, pattern).failure is not None
    assert selection(lost, 3 * lost, 0.5, pattern).failure is not None


# --- values, operands, products -----------------------------------------------------------------


def test_values() -> None:
    """At usual scales, and where what is subnormal counts for most."""
    codes = torch.arange(-8, 8, dtype=torch.int8)[None]
    for scale in (1.0, 2.0**-147):
        exact = np.array([I4.require_grid().points]) * scale
        error = gamma(4) * np.abs(exact) + ETA32

        def failing(y: Tensor, scale: float = scale) -> bool:
            return judges.dequantized(I4, codes, scale * ONE, None, y).failure is not None

        check(failing, exact, stored(exact, error))


def test_values_that_are_zero_have_no_slack() -> None:
    codes, keep = torch.tensor([[3, 3]], dtype=torch.int8), torch.tensor([[True, False]])
    points = I4.require_grid().points
    values = torch.tensor([[points[11], 0.0]])
    judges.dequantized(I4, codes, ONE, keep, values).require()
    for wrong in (2.0**-149, -(2.0**-149)):
        values[0, 1] = wrong
        with pytest.raises(Rejected, match=r"^values: at \(0, 1\)"):
            judges.dequantized(I4, codes, ONE, keep, values).require()
    judges.dequantized(I4, codes, 0 * ONE, None, torch.zeros(1, 2)).require()
    with pytest.raises(Rejected, match=r"^values: at \(0, 0\)"):
        judges.dequantized(I4, codes, 0 * ONE, None, torch.full((1, 2), 2.0**-149)).require()


def test_operands_that_are_an_integer_off() -> None:
    codes = torch.tensor([[-8, -1, 0, 7]], dtype=torch.int8)
    unit = operands.form(I4.require_grid(), "integers").unit
    points = np.array([I4.require_grid().points])[:, [0, 7, 8, 15]]
    integers = np.rint(points / unit).astype(np.int64)
    for off in (0, 1, -1, 9):
        made = torch.from_numpy(integers + off * np.array([[0, 0, 1, 0]]))
        sums = made.sum(-1, keepdim=True)
        found = judges.encoded(I4, "integers", codes, None, made, sums)
        assert {v.stage for v in found if v.failure} == ({"operand"} if off else set())


def test_padding_bits_of_an_operand_are_zero() -> None:
    q = replace(I4, grid=quest.grids.uniform(1))
    codes = torch.tensor([[-1, 0, 0]], dtype=torch.int8)
    data = torch.from_numpy(packing.pack_mask(np.array([[False, True, True]])))
    sums = torch.tensor([[1]])
    for bit in range(8):
        wrong = data ^ (1 << bit)
        found = judges.encoded(q, "bits", codes, None, data, sums)
        assert not any(v.failure for v in found)
        found = judges.encoded(q, "bits", codes, None, wrong, sums)
        assert "operand" in {v.stage for v in found if v.failure}, bit


def test_accumulators_are_compared_in_full() -> None:
    a, b = (torch.full((n, 8), 100, dtype=torch.int8) for n in (2, 3))
    made = torch.full((2, 3), 80_000, dtype=torch.int32)
    judges.accumulated(a, b, made).require()
    for i, bit in itertools.product(range(6), (0, 15, 16, 23, 24, 30)):
        wrong = made.clone()
        wrong.view(-1)[i] ^= 1 << bit
        with pytest.raises(Rejected, match=r"^accumulators: 1 of 6 differ"):
            judges.accumulated(a, b, wrong).require()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_of_a_gated_product_that_stay_in_range_are_finite(dtype: torch.dtype) -> None:
    """At the end of the range one of them may overflow where it is stored, and not below."""
    most, one = torch.finfo(dtype).max, torch.ones(1, 1)
    operands_ = np.array([[1]]), np.array([[1], [1]])
    for share, free in ((0.9, False), (0.5, False), (0.99, False), (1.0, True)):
        # The gate makes nearly nothing of the value, which is as large as this.
        scales = torch.tensor([[-40.0], [share * most]], dtype=torch.float64)
        given = operands_, (1.0, 1.0), (one, scales), None
        found = judges.gated_product(*given, torch.tensor([[-math.inf]], dtype=dtype))
        assert (found.failure is None) == free, share


def test_product() -> None:
    """Six roundings; where products are subnormal one more for each; one of a bias, and its own."""
    x, w = np.array([[3, -5, 7], [1, 0, 0]]), np.array([[1, 2, -4], [6, -1, 5]])
    total, unit = (x @ w.T).astype(np.float64), 0.5 * 1.5
    for power, bias in ((0, None), (-140, None), (0, torch.tensor([1e3, -1e3]))):
        sx = torch.tensor([[1.5], [1.0]]) * 2.0**power
        sw = torch.tensor([[1.0], [1.25]])
        plain = total * unit * oracle.lift(sx) * oracle.lift(sw).T
        error = gamma(6) * np.abs(plain)
        error = error + ETA32 * (1 + oracle.lift(sw).T * (1 + np.abs(total)))
        exact = plain
        if bias is not None:
            exact = plain + oracle.lift(bias)
            error = error + U32 * (np.abs(exact) + error)

        def failing(y: Tensor, given: tuple[Tensor | None, ...] = (sx, sw, bias)) -> bool:
            sx, sw, bias = given
            assert sx is not None
            assert sw is not None
            return judges.multiplied((x, w), (0.5, 1.5), (sx, sw), bias, y).failure is not None

        check(failing, exact, stored(exact, error))


# --- the layer ----------------------------------------------------------------------------------


@pytest.mark.whole
@pytest.mark.parametrize("order", [1, 8])
def test_layer(order: int) -> None:
    """Operands with one entry a row: each sum is as large as its magnitudes, and each term counts.

    A bias that is as large hides no other term; the float32 beside the edge is nearer than a tenth
    of any.
    """
    n, d, outs = 2, 8, 3
    xh, wh, grad = lone(n, d), lone(outs, d), lone(n, outs)
    xh[:, 0], wh[:, 0], grad[:, 0] = 1.25, 1.0, 1.5
    bias = np.array([0.5, 2.0, 0.0])
    rotation = quest.Hadamard(order) if order > 1 else quest.Identity()
    made = quest.recipe("w4a4", transform=rotation)

    def turned(a: Array, b: Array) -> tuple[Array, Array]:
        """(a b H^T, its bound): the product, stored; the butterfly's additions and the factor."""
        inner = a @ b
        first = stored(inner, gamma(a.shape[-1]) * (np.abs(a) @ np.abs(b)))
        exact, spread, turn = inner, first, np.zeros(())
        if order > 1:
            exact = hadamard.apply_transpose(inner, order)

            def sums(t: Array) -> Array:
                return t.sum(-1, keepdims=True) / math.sqrt(order) * np.ones(order)

            spread = sums(first)
            turn = gamma(3 + 2) * sums(np.abs(inner) + first)
        return exact, stored(exact, spread + turn)

    y = xh @ wh.T
    error = gamma(d) * (np.abs(xh) @ np.abs(wh).T)
    # The product may be rounded before the bias is added.
    error = error + U32 * (np.abs(y) + error) + U32 * np.abs(bias)
    total = grad.sum(0)
    exact = {
        "y": (y + bias, stored(y + bias, error)),
        "dx": turned(grad, wh),
        "dw": turned(grad.T, xh),
        "db": (total, stored(total, gamma(n) * np.abs(grad).sum(0))),
    }
    names = {"x_hat": xh, "w_hat": wh} | {k: v[0] for k, v in exact.items()}
    out = {k: torch.from_numpy(v).float() for k, v in names.items()}
    x, w = torch.zeros(n, d), torch.zeros(outs, d)
    g, b = torch.from_numpy(grad).float(), torch.from_numpy(bias).float()
    for name, (value, bound) in exact.items():

        def failing(t: Tensor, name: str = name) -> bool:
            given = made, out | {name: t}, (None, None), U32
            found = {v.stage for v in judges.layer(x, w, g, b, *given) if v.failure}
            assert found <= {f"layer {name}"}
            return bool(found)

        check(failing, value, bound)


def test_adjoint() -> None:
    """Integers, so that the three numbers are one; then one of them off by the bound and more."""
    n, outs, d, order = 3, 2, 12, 12
    rng = np.random.default_rng(0)
    x, w, g = (rng.integers(-3, 4, shape) for shape in ((n, d), (outs, d), (n, outs)))
    exact = {"y": x @ w.T, "dx": g @ w, "dw": g.T @ x}
    size = (np.abs(g) * (spread(x, order) @ spread(w, order).T)).sum()
    # Twice: of each of the two numbers. A rotation's additions and factor, twice; a dot product;
    # and what is stored: y, the gradient, and each of them once on the way.
    bound = 2 * (gamma(2 * (12 + 2)) + gamma(12) + gamma(4)) * size
    tensors = [torch.from_numpy(t).float() for t in (x, w, g)]
    out = {k: torch.from_numpy(v).float() for k, v in exact.items()}

    def failing(off: dict[str, float]) -> str | None:
        shifted = {k: t.double() for k, t in out.items()}
        for name, by in off.items():
            left = {"y": g, "dx": x, "dw": w}[name]
            i = np.unravel_index(np.argmax(np.abs(left)), left.shape)
            shifted[name][i] += by / left[i]
        return judges.adjoint(*tensors, shifted, order, U32).failure

    assert failing({}) is None
    for sign in (1, -1):
        for name in ("dx", "dw"):
            assert failing({name: 0.999 * sign * bound}) is None
            told = failing({name: 1.001 * sign * bound})
            assert told is not None
            assert f"<{name}, v>" in told
        assert failing({"y": 0.999 * sign * bound}) is None
        assert failing({"y": 1.001 * sign * bound}) is not None


def spread(x: Array, order: int) -> Array:
    """The sum of magnitudes behind each rotated entry."""
    blocks = np.abs(x.astype(np.float64)).reshape(len(x), -1, order)
    sums = blocks.sum(-1, keepdims=True) / math.sqrt(order) * np.ones(order)
    return np.asarray(sums.reshape(x.shape))


# --- exact stages -------------------------------------------------------------------------------


def test_exact_compares_shapes_of_one_size() -> None:
    a = np.arange(6).reshape(2, 3)
    judges.exact("row sums", a, a).require()
    for other in (a.reshape(3, 2), a.reshape(6), a[None]):
        with pytest.raises(Rejected, match=r"^row sums: shape \(2, 3\), not"):
            judges.exact("row sums", a, other).require()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.float64])
def test_what_is_no_float_that_layers_have_is_not_close(dtype: torch.dtype) -> None:
    """To values that it has: an output of integers is no rounded one."""
    verdict = judges.basis.close("y", torch.ones(2, 3).to(dtype), np.ones((2, 3)), np.ones((2, 3)))
    assert verdict.failure == f"has dtype {dtype}, not float32, float16, bfloat16"
