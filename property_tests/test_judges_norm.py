"""The judges of a norm before a quantizer, and of the sum with a residual, hold and bite."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

import quest
from property_tests.honest import SEEDS, Array, failing, rounded, tensor
from property_tests.scripted import Scripted
from quest import operands
from quest.conformance import examine, inputs, judges, lanes, oracle
from quest.conformance.verdict import Rejected


def normal(h: Array, w: Array, eps: float = 1e-5) -> Array:
    return h / np.sqrt(np.mean(h**2, -1, keepdims=True) + eps) * w


def norms_case(dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    h = inputs.draw("heavy", (8, 256), dtype, seed) * 4
    return h, inputs.draw("gaussian", (256,), dtype, seed + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(seed=SEEDS)
def test_normed_holds(dtype: torch.dtype, seed: int) -> None:
    h, weight = norms_case(dtype, seed % 2**31)
    h64, w = oracle.lift(h), oracle.lift(weight)
    sigma = np.sqrt((h64**2).mean(-1, keepdims=True) + 1e-5)
    single = torch.nn.functional.rms_norm(h.float(), (256,), weight.float(), 1e-5)
    for x in (normal(h64, w), h64 * (w / sigma), single.double().numpy()):
        judges.normed(h, weight, 1e-5, tensor(x, dtype)).require()
    between = tensor(rounded(h64 / sigma, dtype) * w, dtype)
    judges.normed(h, weight, 1e-5, between, dtype).require()


def test_normed_of_what_is_not_finite() -> None:
    inf, nan = math.inf, math.nan
    h = torch.tensor([[1.0, inf], [nan, 1.0], [3e38, 1.0], [3.0, -4.0]])
    weight = torch.ones(2)
    right = tensor(normal(oracle.lift(h[3:]), np.ones(2)))
    x = torch.cat((torch.tensor([[0.0, nan], [nan, nan], [0.0, 0.0]]), right))
    judges.normed(h, weight, 1e-5, x).require()
    # Where squares overflow, what is right by a wider sum is right, too; and all else is not.
    wide = x.clone()
    wide[2] = torch.tensor([math.sqrt(2), math.sqrt(2) / 3e38])
    judges.normed(h, weight, 1e-5, wide).require()
    for row, column, value in ((0, 1, 1.0), (1, 0, 0.0), (1, 1, 1.0), (2, 0, 1.0), (3, 0, 0.0)):
        wrong = wide.clone()
        wrong[row, column] = value
        with pytest.raises(Rejected, match=rf"^normed: at \({row}, {column}\)"):
            judges.normed(h, weight, 1e-5, wrong).require()
    # A row has one sum, which overflows for all of it or for none.
    part = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    with pytest.raises(Rejected, match=r"^normed: at \(0, 1\)"):
        judges.normed(torch.full((1, 4), 3e38), torch.ones(4), 1e-5, part).require()
    # And nothing is 0 where squares do not overflow.
    with pytest.raises(Rejected, match=r"^normed: at \(0, "):
        judges.normed(h[3:], weight, 1e-5, torch.zeros(1, 2)).require()


NORM_FAULTS: dict[str, Callable[[Array, Array], Array]] = {
    "the mean is taken off": lambda h, w: normal(h - h.mean(-1, keepdims=True), w),
    "the sum for the mean": lambda h, w: normal(h, w) / 16,
    "divided by d - 1": lambda h, w: normal(h, w) * math.sqrt(255 / 256),
    "no root": lambda h, w: h / (np.mean(h**2, -1, keepdims=True) + 1e-5) * w,
    "the weight left out": lambda h, w: normal(h, np.ones(256)),
    "1 + weight": lambda h, w: normal(h, 1 + w),
    "the weight of the first block for all": lambda h, w: normal(h, np.tile(w[:128], 2)),
    "the next weight": lambda h, w: normal(h, np.roll(w, 1)),
    "the row before's scale": lambda h, w: h * np.roll(normal(h, w) / h, 1, 0),
    "the first block's squares alone": lambda h, w: (
        h / np.sqrt(np.mean(h[:, :128] ** 2, -1, keepdims=True) + 1e-5) * w
    ),
    "the last column is not counted": lambda h, w: (
        h / np.sqrt((h[:, :-1] ** 2).sum(-1, keepdims=True) / 256 + 1e-5) * w
    ),
    "not normalised": lambda h, w: h * w,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NORM_FAULTS)
def test_normed_bites(name: str, dtype: torch.dtype) -> None:
    h, weight = norms_case(dtype, 0)
    h = torch.where(h == 0, 1.0, h)
    # The last column weighs enough to be missed.
    h[:, -1] = h.abs().amax(-1)
    x = NORM_FAULTS[name](oracle.lift(h), oracle.lift(weight))
    with pytest.raises(Rejected, match=r"^normed: at \(\d, \d+\) it is"):
        judges.normed(h, weight, 1e-5, tensor(x, dtype)).require()


@pytest.mark.parametrize("eps", [1e-6, 1e-4])
def test_another_eps(eps: float) -> None:
    h, weight = norms_case(torch.bfloat16, 0)
    h = (h * 2.0**-8).bfloat16()
    x = tensor(normal(oracle.lift(h), oracle.lift(weight), eps), torch.bfloat16)
    judges.normed(h, weight, eps, x).require()
    with pytest.raises(Rejected, match=r"^normed"):
        judges.normed(h, weight, 1e-5, x).require()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_normed_bites_what_is_rounded_twice(dtype: torch.dtype) -> None:
    h, weight = norms_case(dtype, 0)
    h64, w = oracle.lift(h), oracle.lift(weight)
    twice = tensor(rounded(normal(h64, np.ones(256)), dtype) * w, dtype)
    judges.normed(h, weight, 1e-5, twice, dtype).require()
    with pytest.raises(Rejected, match=r"^normed"):
        judges.normed(h, weight, 1e-5, twice).require()


def test_a_fifth_over_the_norms_bound_is_too_far() -> None:
    h, weight = norms_case(torch.float32, 3)
    exact, u = normal(oracle.lift(h), oracle.lift(weight)), 2.0**-24
    bound = np.abs(exact) * ((256 + 4) / 2 + 6 + 1) * u
    judges.normed(h, weight, 1e-5, tensor(exact + 0.8 * bound)).require()
    with pytest.raises(Rejected, match=r"^normed"):
        judges.normed(h, weight, 1e-5, tensor(exact + 1.2 * bound)).require()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_added_holds_and_bites(dtype: torch.dtype) -> None:
    x, residual = (inputs.draw(n, (64, 64), dtype, 0) for n in ("heavy", "non_finite"))
    h = residual + x
    judges.added(x, residual, h).require()
    # Beyond the range, and once more through float64.
    top = torch.full((1, 1), torch.finfo(dtype).max, dtype=dtype)
    judges.added(top, top, top + top).require()
    up = torch.nextafter(h, torch.full_like(h, math.inf))
    for wrong in (residual - x, x, up, torch.where(h.isnan(), 0.0, h)):
        with pytest.raises(Rejected, match=r"^added"):
            judges.added(x, residual, wrong).require()


@pytest.mark.parametrize("name", ["w1a1", "w4a4", "w8a8"])
@pytest.mark.parametrize("adds", [False, True])
def test_normed_operand_that_is_wrong(adds: bool, name: str) -> None:
    """Each output by itself, and rows of other inputs."""
    q = quest.recipe(name).activation
    kind = (operands.kinds(q, q) or ("",))[0]
    cpu = lanes.all_lanes()[0]
    x, weight = norms_case(torch.bfloat16, 0)
    residual = inputs.draw("gaussian", (8, 256), torch.bfloat16, 5)
    extra = (residual,) if adds else ()
    static = {"q": q, "kind": kind, "eps": 1e-5}
    honest = cpu.call("normed", x, weight, *extra, **static)
    other = cpu.call("normed", residual, weight, *extra, **static)

    def failing_with(**wrong: Tensor) -> set[str]:
        lane = Scripted(lambda *_: honest | wrong)
        given = residual if adds else None
        return failing(examine.normed(lane, x, given, weight, 1e-5, q, kind))

    assert not failing_with()
    assert failing_with(operand=honest["operand"][:, :-1]) == {"normed operand"}
    assert failing_with(x=honest["x"].float()) == {"normed"}
    assert failing_with(h=x[:1]) == {"added"}
    assert "normed codes" in failing_with(operand=other["operand"])
    assert "normed scale" in failing_with(scale=other["scale"] * 1.001)
    assert failing_with(sums=honest["sums"] + 2) == {"normed sums"}
    if adds:
        assert {"added", "normed"} <= failing_with(h=x)
    encoded = {k: other[k] for k in ("operand", "scale", "sums")}
    assert "normed" in failing_with(**encoded, x=other["x"])
