"""Cases of the transform that random draws seldom hold, one test each, in every lane."""

from __future__ import annotations

import torch

from property_tests.lane_marks import every_lane
from property_tests.ledger import LEDGER
from quest.conformance import examine, inputs
from quest.conformance.lanes import Lane


@every_lane
def test_sums_that_leave_float32_where_the_result_does_not(lane: Lane) -> None:
    """Two entries of 3e38: their sum is infinite, a quarter of it is not."""
    for order in (16, 20, 64):
        x = inputs.draw("gaussian", (4, 2 * order), torch.float32, order)
        x[1, :2] = 3e38
        x[2, order - 1] = x[2, order - 2] = -3e38
        for transpose in (False, True):
            found = examine.transform(lane, x, order, transpose)
            LEDGER.judge(lane, found, f"two entries of 3e38, order {order}")
            assert lane.call("hadamard", x, order=order, transpose=transpose)["y"].isfinite().all()


@every_lane
def test_more_vectors_than_a_program_of_the_base_takes(lane: Lane) -> None:
    """4096 vectors of 12 are one program's; these end in the third, at no multiple of anything."""
    x = inputs.draw("gaussian", (8195, 12), torch.float32, 0)
    LEDGER.judge(lane, examine.transform(lane, x, 12), "8195 rows of order 12")


@every_lane
def test_more_rows_than_a_program_takes(lane: Lane) -> None:
    x = inputs.draw("gaussian", (1027, 2), torch.float32, 0)
    LEDGER.judge(lane, examine.transform(lane, x, 2), "1027 rows of order 2")


@every_lane
def test_a_row_of_the_smallest_numbers(lane: Lane) -> None:
    """Shares of them would be zero: only sums of 16 bits may be made of shares."""
    x = torch.full((3, 4096), 2.0**-149)
    x[1, ::3] = 2.0**-140
    LEDGER.judge(lane, examine.transform(lane, x, 4096), "subnormals, order 4096")
    y = lane.call("hadamard", x, order=4096, transpose=False)["y"]
    assert y[0, 0] == 2.0**-143
