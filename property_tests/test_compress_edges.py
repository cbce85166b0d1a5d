"""The compressed form at its edges: operands that it refuses, and rows of many blocks."""

from __future__ import annotations

import pytest
import torch

from quest import compression


@pytest.mark.whole
@pytest.mark.parametrize(
    "operand",
    [
        torch.zeros(4, 4),
        torch.zeros(4, dtype=torch.int8),
        torch.zeros(2, 4, 4, dtype=torch.int8),
        torch.zeros(4, 6, dtype=torch.int8),
    ],
    ids=["float", "vector", "three dimensions", "width"],
)
def test_that_another_operand_is_refused(operand: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="operand must be int8 of shape"):
        compression.eager_compress(operand)


def test_that_rows_of_many_blocks_come_back() -> None:
    x = torch.zeros(3, 512, 4, dtype=torch.int8)
    places = torch.arange(3 * 512).reshape(3, 512, 1)
    x.scatter_(-1, places % 4, 1 + (places % 100).to(torch.int8))
    x.scatter_(-1, (places // 4 + 1) % 4, -1 - (places % 77).to(torch.int8))
    x = x.reshape(3, 2048)
    values, metadata = compression.eager_compress(x)
    assert metadata.shape == (3, 64)
    assert torch.equal(compression.decompress(values, metadata), x)
