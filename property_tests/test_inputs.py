"""The inputs that find bugs are what their names say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quest.conformance import inputs
from quest.conformance.stages import storage_bytes
from quest.conformance.strategies import Case, cases, widths

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = st.integers(0, 2**32 - 1)
SHAPE = (7, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", inputs.DISTRIBUTIONS)
@given(seed=SEEDS, shape=st.sampled_from([(7, 64), (5,), (2, 3, 8), (1, 1), (0, 4), (3, 0)]))
def test_draw_is_reproducible(
    name: str, dtype: torch.dtype, seed: int, shape: tuple[int, ...]
) -> None:
    x, again = (inputs.draw(name, shape, dtype, seed) for _ in range(2))
    assert x.shape == shape
    assert x.dtype == dtype
    assert x.device.type == "cpu"
    assert x.is_contiguous()
    assert storage_bytes(x) == storage_bytes(again)
    if name != "non_finite":
        assert x.isfinite().all(), "clamped to the dtype's range"


@pytest.mark.parametrize("name", sorted(set(inputs.DISTRIBUTIONS) - {"zeros"}))
def test_seeds_differ(name: str) -> None:
    # float32 holds all of them apart from zero.
    assert len({storage_bytes(inputs.draw(name, SHAPE, torch.float32, s)) for s in range(10)}) == 10


def drawn(name: str, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return inputs.draw(name, SHAPE, dtype, seed).double()


@given(seed=SEEDS)
def test_gaussian(seed: int) -> None:
    x = inputs.draw("gaussian", (200, 500), torch.float32, seed).double()
    # Six standard errors of the mean and of the variance of 10^5 values.
    assert abs(x.mean()) < 6 / math.sqrt(1e5)
    assert abs(x.var() - 1) < 6 * math.sqrt(2 / 1e5)
    assert x.unique().numel() > 9e4


@given(seed=SEEDS)
def test_negative_zeros(seed: int) -> None:
    x = drawn("negative_zeros", seed)
    assert torch.equal(x[:, :32].signbit(), torch.ones(7, 32, dtype=torch.bool))
    assert not x[:, :32].any()
    assert x[:, 32:].all()


@given(seed=SEEDS)
def test_heavy_has_tails(seed: int) -> None:
    x = inputs.draw("heavy", (200, 500), torch.float32, seed).double()
    # P(|t_2| > 20) = 1 - 20 / sqrt(402) = 0.00249; a Gaussian has 1e-88.
    share = float((x.abs() > 20).double().mean())
    assert abs(share - 0.00249) < 6 * math.sqrt(0.0025 / 1e5)
    assert abs(x.median()) < 0.05


@given(seed=SEEDS)
def test_outlier(seed: int) -> None:
    x = drawn("outlier", seed)
    ordered = x.abs().sort(-1).values
    assert (ordered[:, -2] < 6).all()
    plain = drawn("gaussian", seed)
    changed = x != plain
    assert (changed.sum(-1) <= 1).all()
    assert torch.allclose(x[changed], plain[changed] * 1e4, rtol=2**-22)


@given(seed=SEEDS)
def test_equal_and_alternating(seed: int) -> None:
    x, y = drawn("equal", seed), drawn("alternating", seed)
    assert (x == x[:, :1]).all()
    assert ((x >= 1) & (x < 2) & (x * 64 == (x * 64).round())).all()
    assert (y.abs() == y.abs()[:, :1]).all()
    assert (y[:, ::2] > 0).all()
    assert (y[:, 1::2] < 0).all()


@given(seed=SEEDS)
def test_one_hot_and_integers(seed: int) -> None:
    x, n = drawn("one_hot", seed), drawn("integers", seed)
    assert ((x != 0).sum(-1) == 1).all()
    assert x.max() == 1.5
    assert set(n.unique().tolist()) <= {-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0}
    assert n.unique().numel() == 7


@given(seed=SEEDS)
def test_magnitudes(seed: int) -> None:
    tiny, small, huge = drawn("tiny", seed), drawn("subnormal", seed), drawn("huge", seed)
    least, most = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    assert tiny.abs().max() < 2.0**-116
    # Squares of these underflow, squares of those overflow float32.
    assert (tiny.square() < 2.0**-149).all()
    assert (small.abs() < least).all()
    # Of few bits: half of a subnormal number's last place is seen in each.
    assert small.abs().max() < 2.0**-136
    assert (small != 0).any()
    assert huge.abs().max() > 2.0**120
    assert (huge.square().amax(-1) > most).all()
    mixed = drawn("mixed_rows", seed)
    rms = mixed.square().mean(-1).sqrt()
    regular = rms[rms > 0]
    assert regular.numel() == 0 or (regular > 0.3 * 2.0**-60).all()
    assert (regular < 3 * 2.0**60).all()
    assert (drawn("zeros", seed) == 0).all()


@pytest.mark.parametrize("name", ["outlier", "one_hot", "non_finite"])
def test_what_stands_out_stands_anywhere(name: str) -> None:
    """The first column and the last, and those between: a kernel may lose any of them."""
    x = inputs.draw(name, (1000, 8), torch.float32, 0).double()
    out = {"outlier": x.abs() > 20, "one_hot": x != 0, "non_finite": ~x.isfinite()}[name]
    assert out.any(0).all()
    one = inputs.integers("one_hot", 1000, 8, 0)
    assert (one.sum(0) > 50).all()


def test_integers_of_products() -> None:
    """Of both signs, to the ends of int8; coherent ones of one sign, and unlike each other."""
    made = {kind: inputs.integers(kind, 40, 500, 1).long() for kind in inputs.INTEGERS}
    assert (made["random"].min(), made["random"].max()) == (-127, 127)
    assert abs(made["random"].double().mean()) < 6 * 73.5 / math.sqrt(20_000)
    assert (made["coherent"].min(), made["coherent"].max()) == (64, 127)
    assert (made["lowest"] == -128).all()
    assert (made["highest"] == 127).all()
    for bits in (1, 2, 4, 8):
        assert set(inputs.unsigned(bits, (100, 100), 0).unique().tolist()) == {*range(2**bits)}


def test_every_edit_is_made() -> None:
    x = torch.zeros(2, 3)
    made = inputs.edit(x, [(1, 5.0), (9, 7.0), (1, 6.0)])
    assert made.flatten().tolist() == [0.0, 6.0, 0.0, 7.0, 0.0, 0.0]
    assert not x.any()


def test_cases_are_of_every_kind() -> None:
    """All that may be drawn is; or tests would ask of less than they seem to."""
    seen: list[Case] = []

    @settings(max_examples=400, database=None, derandomize=True)
    @given(case=cases(torch.float32, widths(4, 2), edited=True))
    def draw(case: Case) -> None:
        seen.append(case)

    draw()
    assert {c.distribution for c in seen} == {*inputs.DISTRIBUTIONS}
    assert {c.layout for c in seen} == {*inputs.LAYOUTS}
    assert {c.shape[:-1] for c in seen} == {
        (), (0,), (1,), (3,), (7,), (17,), (2, 3), (1, 1, 2)
    }  # fmt: skip
    assert {c.shape[-1] for c in seen} == {4 * n for n in (1, 2, 3, 5, 7, 11, 13)}
    assert {len(c.edits) for c in seen} == {0, 1, 2, 3}
    assert len({c.seed for c in seen}) > 100


def test_mixed_rows_are_sometimes_zero_and_far_apart() -> None:
    x = inputs.draw("mixed_rows", (1000, 8), torch.float32, 0).double()
    zero = (x == 0).all(-1)
    # 0.3 of 1000, six standard errors.
    assert abs(int(zero.sum()) - 300) < 6 * math.sqrt(210)
    rms = x[~zero].square().mean(-1).sqrt()
    assert rms.max() / rms.min() > 2.0**90


def test_non_finite_rows() -> None:
    x = inputs.draw("non_finite", (1000, 8), torch.float32, 0)
    bad = ~x.isfinite()
    assert (bad.sum(-1) <= 1).all()
    assert abs(int(bad.any(-1).sum()) - 500) < 6 * math.sqrt(250)
    for kind in (x.isnan(), x == math.inf, x == -math.inf):
        assert kind.sum() > 100


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_beyond_the_range_are_clamped(dtype: torch.dtype) -> None:
    x = inputs.draw("huge", (20, 64), dtype, 0)
    assert x.isfinite().all()
    if dtype == torch.float16:
        assert x.abs().min() == torch.finfo(dtype).max


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 256])
def test_all_patterns(dtype: torch.dtype, width: int) -> None:
    x = inputs.all_patterns(dtype, width)
    assert x.shape == (2**16 // width, width)
    assert x.dtype == dtype
    assert x.view(torch.int16).unique().numel() == 2**16
    assert x.isnan().any()
    assert x.isinf().sum() == 2


def elements(t: torch.Tensor) -> int:
    """How many elements of its storage a tensor has."""
    return math.prod(n for n, step in zip(t.shape, t.stride(), strict=True) if step)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", inputs.LAYOUTS)
@given(
    seed=SEEDS,
    shape=st.sampled_from([(3, 5), (7,), (2, 3, 4), (1, 8), (0, 5), (3, 0)]),
    name=st.sampled_from(["gaussian", "equal"]),
)
def test_layouts_hold_the_values_and_nan_elsewhere(
    layout: str, dtype: torch.dtype, seed: int, shape: tuple[int, ...], name: str
) -> None:
    x = inputs.draw(name, shape, dtype, seed)
    if layout == "expanded":
        x = inputs.equal_rows(x)
    y = inputs.lay_out(x, layout)
    assert torch.equal(x, y)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    flat = torch.empty(0, dtype=dtype).set_(y.untyped_storage())
    assert int(flat.isnan().sum()) == flat.numel() - elements(y)
    if layout in ("offset", "expanded"):
        for margin in (flat[: inputs.MARGIN], flat[-inputs.MARGIN :]):
            assert margin.isnan().all()


def test_layouts_differ() -> None:
    x = inputs.equal_rows(inputs.draw("gaussian", (3, 4), torch.float32, 0))
    laid = {name: inputs.lay_out(x, name) for name in inputs.LAYOUTS}
    assert laid["contiguous"] is x
    assert laid["transposed"].stride() == (1, 3)
    assert laid["offset"].storage_offset() == 3
    assert laid["offset"].is_contiguous()
    assert laid["padded"].stride() == (9, 1)
    assert laid["strided"].stride() == (8, 2)
    assert laid["expanded"].stride() == (0, 1)
    ones = torch.ones(2, 3, 4)
    # The gradient that a sum hands back.
    assert inputs.lay_out(ones, "expanded").stride() == ones.sum().expand(2, 3, 4).stride()


@given(seed=SEEDS, name=st.sampled_from(sorted(inputs.DISTRIBUTIONS)))
def test_equal_rows_are_the_first(seed: int, name: str) -> None:
    x = inputs.draw(name, (2, 3, 4), torch.float32, seed)
    y = inputs.equal_rows(x)
    assert y.shape == x.shape
    assert y.is_contiguous()
    assert all(
        storage_bytes(row.clone()) == storage_bytes(x[0, 0].clone()) for row in y.reshape(6, 4)
    )
    assert storage_bytes(inputs.lay_out(y, "expanded").contiguous()) == storage_bytes(y)


def test_rows_that_differ_are_not_expanded() -> None:
    x = torch.zeros(2, 3, 4)
    x[1, 2, 3] = -0.0
    with pytest.raises(ValueError, match="x must have equal rows to be expanded"):
        inputs.lay_out(x, "expanded")


@given(data=st.data())
def test_a_case_s_code_makes_its_tensor(data: st.DataObject) -> None:
    case = data.draw(cases(torch.bfloat16, st.sampled_from([1, 6])))
    made: dict[str, Any] = {"torch": torch, "inputs": inputs}
    exec(case.code("again"), made)
    x, again = case.make(), made["again"]
    assert (again.shape, again.stride(), again.dtype) == (x.shape, x.stride(), x.dtype)
    assert again.storage_offset() == x.storage_offset()
    assert storage_bytes(again) == storage_bytes(x)
