"""compute-sanitizer's memcheck over small launches of each CUDA C++ kernel.

What is read beside an array is masked more often than not, so it need not show in numbers.
"""

from __future__ import annotations

import pytest

from property_tests import sanitized

# Tiles whose last columns and rows lie beyond what there is, with a bias and without; outputs of
# each form. The tool sees no bulk copies, of which the operands of products come.
LAUNCHES = {
    "rows": (
        "blocks w1a1 11008 torch.float32",
        "blocks w2a2 4096 torch.bfloat16",
        "blocks w8a8 256 torch.bfloat16",
        "blocks w4a4 5632 in turns",
        "blocks w2a2 768",
        "blocks w2a2 2048",
        "blocks w1a1 768 torch.float32",
        "rows w1a1 11008 torch.bfloat16",
        "rows w4a4 256 torch.float32",
        "masked 77 torch.bfloat16",
        "masked 77 torch.float16",
    ),
    "prologues": (
        "prologues w2a2 4096",
        "prologues w8a8 256 torch.float16",
        "prologues w4a4 5632",
        "prologues w4a4 768",
        "prologues w4a4 2048",
    ),
    "products": (
        "product w1a1 bias torch.float32",
        "product w4a4 bias torch.bfloat16",
        "product w4a4 40 rows",
        "gated product w4a4 wide",
        "gated product w4a4 tall",
        "added product w4a4 tall",
        "gated product w1a1 narrow",
        "gated product w1a1 tall",
        "added product w1a1 tall",
        "rotated product w1a1 tall",
        "rotated product w4a4 heads of 32",
        "added product w4a4 wide",
        "added product w1a1 narrow",
        "rotated product w4a4 wide",
        "rotated product w1a1 narrow",
        "product w8a8 wide",
        "product int32",
        "sparse bias torch.float32",
        "sparse wide",
        "sparse 512 entries",
    ),
    "few": (
        "few w1a1 5 rows",
        "few w4a4 40 rows",
        "few w1a1 140 columns",
        "few w4a4 140 columns",
        "few w4a4 4224 wide",
        "few w1a1 8320 wide",
        "frozen w4a4 1 rows",
        "frozen w1a1 12 rows",
        "few clusters",
    ),
}


def test_the_launches_are_there() -> None:
    assert set().union(*LAUNCHES.values()) <= {told for told, _ in sanitized.launches()}


@pytest.mark.whole
@pytest.mark.parametrize("kernels", LAUNCHES)
def test_no_access_beside_an_array(kernels: str) -> None:
    # PyTorch's cache gives parts of large blocks, inside of which the tool sees no bounds.
    sanitized.check("memcheck", LAUNCHES[kernels], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
