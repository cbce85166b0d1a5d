"""A quantizer's judges of exact ties, of codes that lean one way and of rows without a scale."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

import quest
from property_tests.faults import away_from_zero, down_at_ties, strict, to_even
from property_tests.honest import (
    HONEST,
    I4,
    I8,
    SEEDS,
    UNIFORM,
    WAYS,
    Array,
    Parts,
    Q,
    encode,
    failing,
    judge,
    run,
    tensor,
)
from quest.conformance import exact_rows, inputs, judges, oracle
from quest.conformance.verdict import Rejected, Verdict
from quest.reference import bounds, hadamard, quantize

# --- the exact lane ---------------------------------------------------------------------------


def dyadic_rows(seed: int, width: int = 512) -> Array:
    """Quarter steps of uniform(4, alpha=7.5), RMS exactly 1: midpoints, edges, zeros."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((4, width), dtype=np.int64)
    for row in rows:
        row[:5] = [32, -32, 30, -30, 34]  # the threshold of Trust, the outer points, beyond
        row[5:11] = [4, -4, 8, -8, 12, -12]  # midpoints
        row[11:-4] = rng.integers(-2, 3, width - 15)
        left = 16 * width - int((row**2).sum())
        row[-4:] = exact_rows.four_squares(left)
        rng.shuffle(row)
    return rows / 4.0


EXACT_FAULTS = [
    ("codes", replace(HONEST, encode=to_even)),
    ("codes", replace(HONEST, encode=down_at_ties)),
    ("codes", replace(HONEST, encode=away_from_zero)),
    ("mask", replace(HONEST, mask=strict)),
]


def exact_verdicts(x: Tensor, q: quest.Quantizer, parts: Parts) -> list[Verdict]:
    expected = quantize.quantize(oracle.lift(x), **oracle.arguments(q, x.shape[-1]))
    out = run(x, q, parts)
    return [
        judges.exact("scale", oracle.lift(out["scale"]), expected.scale),
        judges.exact("codes", oracle.lift(out["codes"]), expected.codes),
        judges.exact("mask", oracle.lift(out["mask"]), expected.mask),
    ]


@pytest.mark.parametrize("power", [-20, 0, 3])
@pytest.mark.parametrize("estimator", [quest.Trust(), quest.Clip(1.0), quest.Trust(0.5)], ids=str)
@given(seed=SEEDS)
def test_exact_lane_holds_and_bites(estimator: Any, power: int, seed: int) -> None:
    """Step 1, sigma a power of two: nothing rounds, so every tie is decided bit for bit."""
    q = Q(quest.grids.uniform(4, alpha=7.5), quest.Identity(), estimator)
    x = tensor(dyadic_rows(seed) * 2.0**power)
    for how, parts in WAYS.items():
        assert not failing(exact_verdicts(x, q, parts)), how
    for stage, parts in EXACT_FAULTS:
        assert stage in failing(exact_verdicts(x, q, parts)), (stage, parts)


@pytest.mark.parametrize("stage", ["ternary", "e2m1"])
@given(seed=SEEDS)
def test_exact_lane_of_other_grids(stage: str, seed: int) -> None:
    grid = quest.grids.ternary(1.0) if stage == "ternary" else quest.grids.e2m1(1.0)
    q = Q(grid, quest.Identity())
    x = tensor(dyadic_rows(seed))
    assert not failing(exact_verdicts(x, q, HONEST))
    ties = replace(HONEST, encode=down_at_ties)
    assert "codes" in failing(exact_verdicts(x, q, ties))


@pytest.mark.parametrize("order", [1, 2, 8])
def test_zero_has_no_slack(order: int) -> None:
    """A sum that is exactly 0 has the code of +step / 2 whatever the scale."""
    q = Q(UNIFORM[4], quest.Hadamard(order))
    x = tensor(np.array([[0.0, 0.0, 3.0, 3.0, -2.0, -2.0, 0.0, 0.0] * 2]))
    out = run(x, q, HONEST)
    judges.coded(x, q, out["codes"], out["scale"]).require()
    zero = torch.from_numpy(hadamard.apply(oracle.lift(x), order) == 0)
    assert zero.any()
    below = out["codes"].masked_fill(zero, -1)
    with pytest.raises(Rejected, match=f"{int(zero.sum())} of 16 codes are wrong; .* within 0.000"):
        judges.coded(x, q, below, out["scale"]).require()


# --- the statistical rules of T3 --------------------------------------------------------------


def test_codes_that_lean_one_way_are_rejected() -> None:
    x = inputs.draw("gaussian", (3072, 128), torch.float32, 5)
    out = run(x, I8, HONEST)
    y, s = hadamard.apply(oracle.lift(x), 128), oracle.lift(out["scale"])
    margin = bounds.code_margin(oracle.lift(x), 128, s)
    for lean, word in ((0.99, "one-sided: [0-9]+ ambiguous codes went up, 0 down"),
                       (-0.99, "one-sided: 0 ambiguous codes went up, [0-9]+ down")):  # fmt: skip
        codes = torch.from_numpy(encode(y / s + lean * margin, I8)).to(torch.int16)
        with pytest.raises(Rejected, match=word):
            judges.coded(x, I8, codes, out["scale"]).require()
        judges.coded(x, I8, codes, out["scale"], conclusive=False).require()
    sign = np.where(np.random.default_rng(0).random(y.shape) < 0.5, 0.99, -0.99)
    even = torch.from_numpy(encode(y / s + sign * margin, I8)).to(torch.int16)
    judges.coded(x, I8, even, out["scale"]).require()


def test_a_corpus_of_near_ties_is_inconclusive() -> None:
    grid = UNIFORM[4]
    rng = np.random.default_rng(0)
    z = rng.choice(np.array(grid.midpoints), (8, 256))
    x = tensor(z)
    q = Q(grid, quest.Identity())
    scale = torch.ones(8, 1)
    codes = torch.from_numpy(encode(z, q)).to(torch.int16)
    with pytest.raises(Rejected, match=r"inconclusive: [0-9]+ of 2048 codes are ambiguous"):
        judges.coded(x, q, codes, scale).require()
    verdict = judges.coded(x, q, codes, scale, conclusive=False).require()
    assert verdict.ambiguous > 1000
    # Ambiguous is not arbitrary: two codes off is wrong in any case.
    with pytest.raises(Rejected, match="codes are wrong"):
        judges.coded(x, q, (codes + 2).clamp(max=7), scale, conclusive=False).require()


# --- rows with rules of their own -------------------------------------------------------------


def special_rows() -> tuple[Tensor, dict[str, Tensor]]:
    """A row of zeros, one with a NaN, one with an infinity, a regular one."""
    x = inputs.draw("gaussian", (4, 128), torch.float32, 0)
    x[0], x[1, 3], x[2, 5] = 0.0, math.nan, math.inf
    clean = x.clone()
    clean[1:3] = 0.0
    out = run(clean, I4, HONEST)
    out["scale"][1:3] = math.nan
    out["values"][1:3] = math.nan
    out["mask"][1:3] = False
    out["bits"][1:3] = 0
    return x, out


def test_special_rows_hold() -> None:
    x, out = special_rows()
    assert not failing(judge(x, I4, out))
    assert out["scale"][0] == 0
    assert out["mask"][0].all()


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "row", "value", "stage"),
    [
        ("scale", 0, 1e-45, "scale"),
        ("scale", 0, math.nan, "scale"),
        ("scale", 1, 1.0, "scale"),
        ("scale", 2, math.inf, "scale"),
        ("scale", 3, math.nan, "scale"),
        ("mask", 0, False, "mask"),
        ("mask", 1, True, "mask"),
        ("mask", 2, True, "mask"),
        ("values", 0, 1e-45, "values"),
        ("values", 0, math.nan, "values"),
        ("values", 1, 0.0, "values"),
        ("values", 2, math.inf, "values"),
        ("values", 3, math.nan, "values"),
        ("codes", 0, -1, "codes"),
        ("codes", 2, 3, "codes"),
    ],
)
def test_special_rows_bite(name: str, row: int, value: float, stage: str) -> None:
    x, out = special_rows()
    out[name][row, 0] = value
    assert stage in failing(judge(x, I4, out))


@given(seed=SEEDS)
def test_scale_holds_at_every_magnitude(seed: int) -> None:
    name = ("tiny", "subnormal", "huge", "mixed_rows", "heavy", "alternating")[seed % 6]
    x = inputs.draw(name, (5, 96), torch.float32, seed)
    sigma = quantize.scale(oracle.lift(x))
    for order in (1, 32):
        judges.scaled(x, tensor(sigma), order).require()
        # A relative error of 1e-4 is far outside the bound wherever float32 can show it.
        wrong = tensor(sigma * (1 + 1e-4))
        if (oracle.lift(wrong) > 1e-40).any():
            with pytest.raises(Rejected, match=r"^scale"):
                judges.scaled(x, wrong, order).require()
