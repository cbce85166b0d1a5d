"""compute-sanitizer's synccheck over small launches of CUDA C++ kernels whose warps meet.

A barrier of a number that there is not, or that some threads of a warp never meet, need not hang.
"""

from __future__ import annotations

import pytest

from property_tests import sanitized

# Tiles that two teams of consumers compute in turns, and that one does; the widest rows; lanes with
# no block behind a mask, which come to the others' product.
LAUNCHES = (
    "product w4a4 narrow",
    "product w4a4 wide",
    "product w1a1 tall",
    "product w4a4 tall",
    "gated product w8a8 tall",
    "rotated product w4a4 tall",
    "gated product w4a4 wide",
    "gated product w1a1 narrow",
    "added product w4a4 wide",
    "added product w1a1 narrow",
    "rotated product w4a4 wide",
    "rotated product w1a1 narrow",
    "rotated product w1a1 tall",
    "sparse narrow",
    "sparse int32",
    "blocks w4a4 49152 in turns",
    "blocks w4a4 5632 in turns",
    "blocks w4a4 768 in turns",
    "few clusters",
    "masked 77 torch.bfloat16",
)


def test_the_launches_are_there() -> None:
    assert set(LAUNCHES) <= {told for told, _ in sanitized.launches()}


@pytest.mark.whole
def test_barriers_are_met_as_they_must_be() -> None:
    sanitized.check("synccheck", LAUNCHES)
