"""The judge of a transform holds and bites, and knows H from its transpose."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given

from property_tests.faults import in_bfloat16, rounded_stages, sequency, tail_left
from property_tests.honest import (
    F32,
    SEEDS,
    Array,
    butterfly,
    by_loop,
    by_matrix,
    by_torch,
    sign_matrix,
    tensor,
)
from quest.conformance import inputs, judges, oracle
from quest.conformance.verdict import Rejected
from quest.reference import bounds, hadamard, quantize


def reversed_butterfly(x: Array, order: int) -> Array:
    stages = list(range(int(math.log2(order))))[::-1]
    return butterfly(x.astype(F32), order, stages) * F32(order**-0.5)


def by_numpy(x: Array, order: int) -> Array:
    return by_matrix(sign_matrix(order).astype(F32), x.astype(F32), order) * F32(order**-0.5)


ROTATIONS: dict[str, Callable[[Array, int], Array]] = {
    "float64": hadamard.apply,
    "butterfly after a base loop": by_loop,
}
# Sums of n terms; where one term is most of the sum they miss the bound of a butterfly.
PRODUCTS = {"numpy": by_numpy, "torch": by_torch}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", [1, 2, 16, 128, 512, 12, 40, 112])
@given(seed=SEEDS)
def test_rotated_holds(order: int, dtype: torch.dtype, seed: int) -> None:
    name = ("gaussian", "heavy", "outlier", "integers", "equal", "mixed_rows")[seed % 6]
    x = inputs.draw(name, (3, 2 * order), dtype, seed)
    ways = dict(ROTATIONS) | (PRODUCTS if name in ("gaussian", "integers", "equal") else {})
    if hadamard.split(order)[0] == 1:
        ways["reversed butterfly"] = reversed_butterfly
    for how, rotate in ways.items():
        y = tensor(rotate(oracle.lift(x), order), dtype)
        verdict = judges.rotated(x, y, order, False)
        assert verdict.failure is None, (how, verdict)
    back = tensor(hadamard.apply_transpose(oracle.lift(x), order), dtype)
    judges.rotated(x, back, order, True).require()


@pytest.mark.parametrize("order", [2, 16, 12])
@given(seed=SEEDS)
def test_rotated_spreads_what_is_not_finite(order: int, seed: int) -> None:
    x = inputs.draw("non_finite", (5, 3 * order), torch.float32, seed)
    y = tensor(hadamard.apply(oracle.lift(x), order))
    judges.rotated(x, y, order, False).require()
    if not y.isfinite().all():
        for wrong in (y.nan_to_num(), y.where(y.isfinite(), torch.nan), y.where(y.isfinite(), 1.0)):
            if torch.equal(wrong.isnan(), y.isnan()) and torch.equal(wrong.isinf(), y.isinf()):
                continue
            with pytest.raises(Rejected, match=r"^transform"):
                judges.rotated(x, wrong, order, False).require()
    one = y.clone()
    one[0, 0] = math.inf if y[0, 0].isfinite() else 1.0
    with pytest.raises(Rejected, match=r"^transform"):
        judges.rotated(x, one, order, False).require()


def bit_reversed(order: int) -> Array:
    width = int(math.log2(order))
    return sign_matrix(order)[[int(f"{i:0{width}b}"[::-1], 2) for i in range(order)]]


def full_width(x: Array, order: int) -> Array:
    return hadamard.apply(x, x.shape[-1])


def half_sums(x: Array, order: int) -> Array:
    return butterfly(x.astype(np.float16), order).astype(np.float64) * order**-0.5


N = 128
# (name, order, what stands where x H is due, dtype of the output)
ROTATION_FAULTS: list[tuple[str, int, Callable[[Array, int], Array], torch.dtype]] = [
    ("n^-1/2 missing", N, lambda x, n: by_matrix(sign_matrix(n), x, n), torch.float32),
    ("n^-1/2 doubled", N, lambda x, n: hadamard.apply(x, n) * n**-0.5, torch.float32),
    ("one butterfly sign", N, lambda x, n: butterfly(x, n, flip=3) * n**-0.5, torch.float32),
    ("last butterfly sign", 2, lambda x, n: butterfly(x, n, flip=0) * n**-0.5, torch.float32),
    ("a stage left out", N, lambda x, n: butterfly(x, n, [0, 1, 2]) * 8**-0.5, torch.float32),
    ("Walsh order", N, lambda x, n: by_matrix(sequency(n), x, n) * n**-0.5, torch.float32),
    ("Walsh order, 16 bits", 8, lambda x, n: by_matrix(sequency(n), x, n) * n**-0.5, torch.float16),
    ("dyadic order", 64, lambda x, n: by_matrix(bit_reversed(n), x, n) * n**-0.5, torch.float32),
    ("tail block not transformed", N, tail_left, torch.float32),
    ("tail block not transformed, bf16", 16, tail_left, torch.bfloat16),
    ("blocks of the full width", 64, full_width, torch.float32),
    ("not transformed", N, lambda x, n: x, torch.bfloat16),
    ("H in bfloat16, scale inside", N, in_bfloat16, torch.float32),
    ("H in bfloat16, scale inside, order 12", 12, in_bfloat16, torch.float32),
    ("H in bfloat16, scale inside, stored in float16", N, in_bfloat16, torch.float16),
    ("sums in bfloat16", N, rounded_stages, torch.float32),
    ("sums in bfloat16, stored so", N, rounded_stages, torch.bfloat16),
    ("sums in float16", N, half_sums, torch.float32),
    ("constant in bfloat16", 8, lambda x, n: hadamard.apply(x, n) * 1.0005, torch.float32),
    *(
        (f"H^T of order {n}", n, hadamard.apply_transpose, dtype)
        for n in (12, 20, 28, 40, 56)
        for dtype in (torch.float32, torch.bfloat16)
    ),
]


@pytest.mark.parametrize(
    ("order", "wrong", "dtype"),
    [f[1:] for f in ROTATION_FAULTS],
    ids=[f"{f[0]}-{f[3]}".replace("torch.", "") for f in ROTATION_FAULTS],
)
@pytest.mark.parametrize("seed", range(3))
def test_rotated_bites(
    order: int, wrong: Callable[[Array, int], Array], dtype: torch.dtype, seed: int
) -> None:
    x = inputs.draw("gaussian", (64, 4 * order), dtype, seed)
    y = tensor(wrong(oracle.lift(x), order), dtype)
    with pytest.raises(Rejected, match=r"^transform: at \(\d+, \d+\) it is"):
        judges.rotated(x, y, order, False).require()


def test_three_bounds_off_is_too_far() -> None:
    x = inputs.draw("gaussian", (8, 48), torch.float32, 0)
    x64 = oracle.lift(x)
    for transpose, turn in ((False, hadamard.apply), (True, hadamard.apply_transpose)):
        exact = turn(x64, 12)
        bound = bounds.output(exact, bounds.rotation(x64, 12, transpose), "float32")
        with pytest.raises(Rejected, match=r"^transform"):
            judges.rotated(x, tensor(exact + 3 * bound), 12, transpose).require()
    sigma = quantize.scale(x64)
    wrong = sigma + 3 * bounds.scale(x64, 12, sigma)
    with pytest.raises(Rejected, match=r"^scale"):
        judges.scaled(x, tensor(wrong), 12).require()


@pytest.mark.parametrize("order", [12, 20, 28, 40])
def test_rotated_bites_where_the_transpose_is_due(order: int) -> None:
    x = inputs.draw("gaussian", (5, order), torch.float32, order)
    y = tensor(hadamard.apply(oracle.lift(x), order))
    judges.rotated(x, y, order, False).require()
    with pytest.raises(Rejected, match=r"^transform"):
        judges.rotated(x, y, order, True).require()
