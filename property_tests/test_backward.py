"""The fused backward in every lane: (grad * mask) H^T (T7)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from property_tests.lane_marks import every_dtype, every_lane, fewer
from property_tests.ledger import LEDGER
from quest.conformance import examine, inputs
from quest.conformance.lanes import Lane
from quest.conformance.strategies import HEADER, ORDERS, SEEDS, Case, cases, lane_code, widths


@every_lane
@every_dtype
@pytest.mark.parametrize("order", ORDERS)
@fewer
@given(data=st.data())
def test_masked_transpose(lane: Lane, dtype: torch.dtype, order: int, data: st.DataObject) -> None:
    case = data.draw(cases(dtype, widths(order)))
    seed = data.draw(SEEDS, label="mask seed")
    bytes_ = -(-case.shape[-1] // 8)
    mask = torch.randint(
        256, (*case.shape[:-1], bytes_), generator=torch.Generator().manual_seed(seed)
    ).to(torch.uint8)
    layout = data.draw(st.sampled_from(("contiguous", "strided")), label="mask layout")
    if layout == "strided":
        mask = torch.stack([mask, mask], -1).flatten(-2)[..., ::2]
    found = examine.backward(lane, case.make(), mask, order)
    code = (
        f"g = torch.Generator().manual_seed({seed})\nmask = torch.randint(256, "
        f"{tuple(mask.shape)}, generator=g).to(torch.uint8)\n"
        f"print(examine.backward(lane, x, mask, {order}))"
    )
    LEDGER.judge(lane, found, f"{HEADER}{lane_code(lane)}{case.code()}\n{code}")


@every_lane
@pytest.mark.parametrize("layout", inputs.LAYOUTS)
@pytest.mark.parametrize("distribution", ["gaussian", "equal"])
def test_layouts(lane: Lane, layout: str, distribution: str) -> None:
    case = Case(distribution, (2, 3, 96), torch.float32, layout, 0)
    mask = torch.randint(256, (2, 3, 12), generator=torch.Generator().manual_seed(0))
    for order in (32, 12):
        found = examine.backward(lane, case.make(), mask.to(torch.uint8), order)
        LEDGER.judge(lane, found, f"{case}, order {order}")


@every_lane
@pytest.mark.parametrize(("order", "shape"), [(128, (3, 1280)), (16, (2, 2064)), (20, (70, 1200))])
def test_the_last_tile_is_partial(lane: Lane, order: int, shape: tuple[int, int]) -> None:
    grad = inputs.draw("gaussian", shape, torch.float32, 1)
    mask = torch.randint(256, (shape[0], shape[1] // 8), generator=torch.Generator().manual_seed(1))
    found = examine.backward(lane, grad, mask.to(torch.uint8), order)
    LEDGER.judge(lane, found, f"partial tiles, {shape}, order {order}")


@every_lane
def test_masked_infinities_do_not_spread(lane: Lane) -> None:
    grad = inputs.draw("gaussian", (4, 256), torch.float32, 1)
    grad[:, 3], grad[:, 9] = float("inf"), float("nan")
    mask = torch.full((4, 32), 255, dtype=torch.uint8)
    mask[:, 0], mask[:, 1] = 255 - 8, 255 - 2
    dx = lane.call("masked_transpose", grad, mask, order=128)["dx"]
    assert dx.isfinite().all()
    LEDGER.judge(lane, examine.backward(lane, grad, mask, 128), "masked infinities")
