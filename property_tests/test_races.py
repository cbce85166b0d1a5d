"""compute-sanitizer's racecheck over small launches of each CUDA C++ kernel.

Threads of a warp run in step more often than not, so a missing barrier need not show in numbers.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

from property_tests import sanitized
from quest.kernels import hopper

TOOL = shutil.which("compute-sanitizer")
# Of `sanitized`: rows that share a warp, have one and have a team; the quickest of the tiles; rows
# that are quantized on the way. The tool takes ten seconds to start.
LAUNCHES = {
    "rows": (
        "blocks w4a4 256 torch.bfloat16",
        "blocks w4a4 4096 torch.float32",
        "rows w4a4 4096 torch.bfloat16",
    ),
    "prologues": ("prologues w4a4 256 torch.bfloat16", "prologues w1a1 11008 torch.bfloat16"),
    "products": ("product w4a4 narrow", "product w1a1 wide", "sparse narrow"),
    "few": ("few fused w4a4 5x4096 True", "few w1a1 40 rows"),
}


def test_the_launches_are_there() -> None:
    assert set().union(*LAUNCHES.values()) <= {told for told, _ in sanitized.launches()}


@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.whole
@pytest.mark.parametrize("kernels", LAUNCHES)
def test_no_race(kernels: str) -> None:
    reason = hopper.unavailable(torch.device("cuda", torch.cuda.current_device()))
    if reason is not None:
        pytest.skip(reason)
    assert TOOL is not None
    done = subprocess.run(
        [TOOL, "--report-api-errors", "no", "--tool", "racecheck", "--error-exitcode", "9",
         sys.executable, "-m", "property_tests.sanitized", *LAUNCHES[kernels]],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert all(launch in done.stdout for launch in LAUNCHES[kernels])
