"""compute-sanitizer's racecheck over small launches of each CUDA C++ kernel.

Threads of a warp run in step more often than not, so a missing barrier need not show in numbers.
"""

from __future__ import annotations

import pytest

from property_tests import sanitized

# Of `sanitized`: rows that share a warp, have one, have a team and share one; of 16 bits a warp
# holds 16 blocks of narrow ones (256, 768, 2048) and 32 of others. Each kind of tile, of bits and
# of integers; rows that are quantized on the way. The tool takes ten seconds to start.
LAUNCHES = {
    "rows": (
        "blocks w4a4 256 torch.bfloat16",
        "blocks w4a4 4096 torch.float32",
        "blocks w4a4 49152 in turns",
        "blocks w4a4 5632 in turns",
        "blocks w4a4 768 in turns",
        "blocks w4a4 2048 in turns",
        "rows w4a4 256 torch.bfloat16",
        "rows w4a4 4096 torch.bfloat16",
        "rows w4a4 17408",
        "masked 77 torch.bfloat16",
    ),
    "prologues": (
        "prologues w4a4 128",
        "prologues w4a4 5632",
        "prologues w4a4 768",
        "prologues w4a4 2048",
        "prologues w4a4 256 torch.bfloat16",
        "prologues w1a1 11008 torch.bfloat16",
    ),
    "products": (
        "product w4a4 narrow",
        "product w4a4 wide",
        "product w1a1 tall",
        "product w4a4 tall",
        "sparse narrow",
        "sparse int32",
    ),
    "epilogues": (
        "gated product w8a8 tall",
        "rotated product w4a4 tall",
        "gated product w4a4 wide",
        "gated product w1a1 narrow",
        "added product w4a4 wide",
        "added product w1a1 narrow",
        "rotated product w4a4 wide",
        "rotated product w1a1 narrow",
        "gated product w1a1 tall",
        "added product w1a1 tall",
        "rotated product w1a1 tall",
        "rotated product w4a4 heads of 32",
    ),
    "few": (
        "few w1a1 40 rows",
        "frozen w4a4 1 rows",
        "few w4a4 4224 wide",
        "few w4a4 8320 wide",
        "frozen w4a4 12 rows",
        "frozen w1a1 12 rows",
        "few clusters",
    ),
}


def test_the_launches_are_there() -> None:
    assert set().union(*LAUNCHES.values()) <= {told for told, _ in sanitized.launches()}


@pytest.mark.whole
@pytest.mark.parametrize("kernels", LAUNCHES)
def test_no_race(kernels: str) -> None:
    sanitized.check("racecheck", LAUNCHES[kernels])
