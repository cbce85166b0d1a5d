"""The Hadamard transform in every lane: T1, exact sums, all bit patterns, the inverse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from property_tests.lane_marks import every_dtype, every_lane, fewer
from property_tests.ledger import LEDGER
from quest.conformance import examine, inputs, judges, oracle
from quest.conformance.lanes import Lane
from quest.conformance.strategies import HEADER, ORDERS, Case, cases, lane_code, widths
from quest.reference import bounds, hadamard


def check(lane: Lane, case: Case, order: int, transpose: bool) -> None:
    found = examine.transform(lane, case.make(), order, transpose)
    code = f"print(examine.transform(lane, x, {order}, {transpose}))"
    LEDGER.judge(lane, found, f"{HEADER}{lane_code(lane)}{case.code()}\n{code}")


@every_lane
@every_dtype
@pytest.mark.parametrize("order", ORDERS)
@fewer
@given(data=st.data())
def test_transform(lane: Lane, dtype: torch.dtype, order: int, data: st.DataObject) -> None:
    case = data.draw(cases(dtype, widths(order)))
    check(lane, case, order, data.draw(st.booleans(), label="transpose"))


@every_lane
@pytest.mark.parametrize("layout", inputs.LAYOUTS)
@pytest.mark.parametrize("distribution", ["gaussian", "equal"])
def test_layouts(lane: Lane, layout: str, distribution: str) -> None:
    case = Case(distribution, (2, 3, 96), torch.float32, layout, 0)
    check(lane, case, 32, False)
    check(lane, case, 12, True)


@every_lane
@pytest.mark.parametrize("order", [1024, 640, 896])
@pytest.mark.parametrize("transpose", [False, True])
def test_large_orders(lane: Lane, order: int, transpose: bool) -> None:
    check(lane, Case("gaussian", (3, order), torch.float32, "contiguous", order), order, transpose)
    check(lane, Case("integers", (2, order), torch.bfloat16, "offset", order), order, transpose)


@every_lane
@pytest.mark.parametrize(("order", "shape"), [(128, (3, 1280)), (16, (2, 2064)), (20, (70, 1200))])
def test_the_last_tile_is_partial(lane: Lane, order: int, shape: tuple[int, int]) -> None:
    check(lane, Case("gaussian", shape, torch.float32, "padded", 1), order, order == 20)


@every_lane
@pytest.mark.parametrize("order", [8192, 14336, 32768])
def test_orders_that_the_oracle_s_matrix_does_not_fit(lane: Lane, order: int) -> None:
    # kron(base, S) in two steps, in float64. 32768 = 2 * 16384 is more than one tile.
    m, power = hadamard.split(order)
    x = inputs.draw("gaussian", (2, order), torch.float32, order)
    wide = x.double().numpy().reshape(2, m, power)
    half = 1
    while half < power:
        spans = wide.reshape(2, m, -1, 2, half)
        wide = np.concatenate([spans[..., :1, :] + spans[..., 1:, :],
                               spans[..., :1, :] - spans[..., 1:, :]], -2)  # fmt: skip
        half *= 2
    expected = hadamard.base(m).T @ wide.reshape(2, m, power)
    expected = expected.reshape(2, order) / order**0.5
    k = bounds.additions(order) + bounds.normalisations(order)
    error = bounds.gamma(k, bounds.U32) * bounds.absolute_sum(oracle.lift(x), order)
    y = lane.call("hadamard", x, order=order, transpose=False)["y"]
    verdict = judges.close("transform", y, expected, bounds.output(expected, error, "float32"))
    LEDGER.judge(lane, [verdict], f"order {order}")


@every_lane
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("order", [1, 16, 20])
def test_all_bit_patterns(lane: Lane, dtype: torch.dtype, order: int) -> None:
    x = inputs.all_patterns(dtype, 256)[:, : 256 // order * order].contiguous()
    LEDGER.judge(lane, examine.transform(lane, x, order), f"all patterns of {dtype}, order {order}")


@every_lane
@pytest.mark.parametrize("order", [16, 64, 12, 20, 28, 40])
def test_transpose_inverts_exactly(lane: Lane, order: int) -> None:
    # On integers both sums are exact; only the two normalisations round, and order * x fits.
    x = torch.randint(-8, 9, (5, 3 * order), generator=torch.Generator().manual_seed(order)).float()
    y = lane.call("hadamard", x, order=order, transpose=False)["y"]
    back = lane.call("hadamard", y, order=order, transpose=True)["y"]
    LEDGER.judge(lane, [examine.judges.rotated(y, back, order, True)], f"order {order}")
    assert torch.equal(back.round(), x)
