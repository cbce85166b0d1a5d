"""The transform at the ends of a dtype's range, and of tiles and blocks, in every lane."""

from __future__ import annotations

import pytest
import torch

from property_tests.lane_marks import every_lane
from property_tests.ledger import LEDGER
from quest.conformance import examine, inputs
from quest.conformance.lanes import Lane

pytestmark = pytest.mark.whole


def edges(order: int) -> torch.Tensor:
    """Rows of two blocks: some sums leave float32 where results do not, and small ones beside."""
    a = 2.2e38
    x = torch.zeros((6, 2, order))
    x[0, 0, :2] = a
    x[1, :, :2] = 2.0**-149
    x[2, 1, :2] = -a
    x[3, 0, 2:6] = a if order > 8 else 0.0  # infinite, and then infinity less infinity
    x[4] = 2.0**-149
    x[5, 1, 0], x[5, 1, 1] = 1.5, a
    return x.flatten(1)


@every_lane
@pytest.mark.parametrize("order", [2, 8, 32])
def test_a_sum_out_of_range_changes_nothing_beside_it(lane: Lane, order: int) -> None:
    x = edges(order)
    LEDGER.judge(lane, examine.transform(lane, x, order), f"sums out of range, order {order}")
    y = lane.call("hadamard", x, order=order, transpose=False)["y"]
    assert y.isfinite().all()
    # Blocks of small numbers, in the tile of large ones: as without these.
    alone = torch.where(x.abs() > 1, 0.0, x)
    small = lane.call("hadamard", alone, order=order, transpose=False)["y"]
    assert torch.equal(y[[1, 4]], small[[1, 4]])
    assert small[4, 0] > 0


@every_lane
def test_a_sum_out_of_range_of_what_a_mask_leaves(lane: Lane) -> None:
    x = torch.full((3, 24), 2.2e38)  # of a block of 8, two may be summed
    x[2] = 2.0**-149
    mask = torch.full((3, 3), 0b10000010, dtype=torch.uint8)
    mask[1] = 0b00110000
    LEDGER.judge(lane, examine.backward(lane, x, mask, 8), "sums out of range, masked")
    assert lane.call("masked_transpose", x, mask, order=8)["dx"].isfinite().all()


@every_lane
@pytest.mark.parametrize("order", [1, 2, 16, 12])
def test_the_largest_and_the_smallest_of_bfloat16(lane: Lane, order: int) -> None:
    x = torch.zeros((3, 2, order), dtype=torch.bfloat16)
    x[0, :, : order // 2 + 1] = 2.2e38 if order < 4 else 4e37
    x[1] = 2.0**-133
    x[2, 0], x[2, 1, 0] = -(2.0**-130), torch.finfo(torch.bfloat16).max
    x = x.flatten(1)
    LEDGER.judge(lane, examine.transform(lane, x, order), f"bfloat16, order {order}")
    y = lane.call("hadamard", x, order=order, transpose=False)["y"]
    assert y.isfinite().all()
    assert y[1, 0] != 0


@every_lane
@pytest.mark.parametrize("order", [1, 4])
def test_float32_at_the_end_of_its_range(lane: Lane, order: int) -> None:
    """The largest number, alone in its block, or all that a mask leaves of one."""
    top = torch.finfo(torch.float32).max
    x = torch.full((2, 8), top)
    x[1] = -top
    mask = torch.full((2, 1), 0b00010001 if order > 1 else 0b11111111, dtype=torch.uint8)
    dx = lane.call("masked_transpose", x, mask, order=order)["dx"]
    assert torch.equal(dx, x * order**-0.5)


@every_lane
@pytest.mark.parametrize(("order", "width"), [(24, 72), (40, 80), (112, 224)])
def test_blocks_of_a_base_and_a_power_of_two(lane: Lane, order: int, width: int) -> None:
    """Whose vectors are neither rows nor adjacent entries."""
    x = inputs.draw("gaussian", (3, width), torch.float32, order)
    for transpose in (False, True):
        found = examine.transform(lane, x, order, transpose)
        LEDGER.judge(lane, found, f"order {order}, transpose {transpose}")


@every_lane
def test_a_row_of_two_tiles_and_a_part(lane: Lane) -> None:
    x = inputs.draw("gaussian", (2, 2064), torch.float32, 1)
    LEDGER.judge(lane, examine.transform(lane, x, 16), "2064 columns, order 16")


@every_lane
def test_small_numbers_beside_large_ones_of_a_base_s_block(lane: Lane) -> None:
    """Shares of them would be zero: the sums of a block near 1 are not made of shares."""
    x = torch.zeros((1, 12, 64))
    x[0, 0, 0], x[0, 1, 0], x[0, 2] = 1.0, 1.0, 2.0**-149
    x = x.flatten(1)
    LEDGER.judge(lane, examine.transform(lane, x, 768), "1 and 2^-149, order 768")
    y = lane.call("hadamard", x, order=768, transpose=False)["y"]
    assert ((y != 0) & (y.abs() < 1e-40)).any()
