"""The compressed form where one program, one word or one order of equal keys is not enough."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from property_tests.lane_marks import every_lane
from property_tests.ledger import LEDGER
from quest import compression
from quest.conformance import examine
from quest.conformance.lanes import Lane
from quest.kernels import compress as kernel


def _sparse(rows: int, groups: int) -> torch.Tensor:
    """Two nonzeros in most groups of four, one or none in others; no two rows are alike."""
    at = torch.arange(rows * groups).reshape(rows, groups, 1)
    x = torch.zeros(rows, groups, 4, dtype=torch.int8)
    x.scatter_(-1, (at + at // 7) % 4, ((at % 251) - 125).to(torch.int8))
    x.scatter_(-1, (at // 3) % 4, (at % 5 - 2).to(torch.int8))
    return x.reshape(rows, 4 * groups)


@every_lane
def test_rows_and_columns_of_several_programs(lane: Lane) -> None:
    """A program of the kernel takes eight rows of 256 entries."""
    assert (kernel.ROWS, kernel.BLOCK) == (8, 256)
    x = _sparse(17, 65)
    assert len({tuple(row) for row in x.tolist()}) == 17
    LEDGER.judge(lane, examine.compressed(lane, x), "17 x 260")


CROWDED = [(1, 1, 1, 0), (1, 1, 0, 1), (1, 0, 1, 1), (0, 1, 1, 1), (1, 1, 1, 1)]


@every_lane
def test_that_every_group_with_a_third_nonzero_is_counted(lane: Lane) -> None:
    """Each way to have one; some of them in one word, and some in different programs."""
    x = _sparse(10, 66)
    groups = x.view(10, 66, 4)
    places = [(0, 0), (0, 1), (0, 9), (7, 63), (7, 64), (8, 0), (9, 65)]
    for i, (row, group) in enumerate(places):
        groups[row, group] = torch.tensor(CROWDED[i % 5])
    with pytest.raises(ValueError, match=r"in every four entries, got 7 groups with more$"):
        lane.call("compress", x)


def test_that_equal_keys_may_be_sorted_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of zeros the first are kept, though a sort that is not stable may put the last first."""
    real = torch.argsort

    def argsort(x: torch.Tensor, dim: int, stable: bool = False) -> torch.Tensor:
        if stable:
            return real(x, dim=dim, stable=True)
        return x.shape[dim] - 1 - real(x.flip(dim), dim=dim, stable=True)

    monkeypatch.setattr(torch, "argsort", argsort)
    assert torch.argsort(torch.zeros(1, 4), dim=-1).tolist() == [[3, 2, 1, 0]]
    values, metadata = compression.eager_compress(
        torch.tensor([[0, 0, 0, 0, 5, 0, 0, 0, 0, 6, 0, 0, 0, 0, 7, 0]], dtype=torch.int8)
    )
    assert values.tolist() == [[0, 0, 5, 0, 0, 6, 0, 7]]
    # Indices 0 and 1 of three groups; 0 and 2 of the last; then groups past the row's end.
    assert metadata[0].tolist() == [0x44448444] + [0x44444444] * 7


@pytest.mark.parametrize(("rows", "width"), [(1, 4), (8, 256), (9, 260), (33, 1024)])
@pytest.mark.whole
def test_what_is_launched(rows: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words of four bytes, aligned: a copy where a slice begins elsewhere, and only there."""
    seen: list[tuple[tuple[int, int], tuple[Any, ...]]] = []

    class Fake:
        def __getitem__(self, grid: tuple[int, int]) -> Any:
            return lambda *given, **_: seen.append((grid, given))

    monkeypatch.setattr(kernel, "_compress", Fake())
    storage = torch.empty(rows * width + 32, dtype=torch.int8)
    base = -storage.data_ptr() % 16
    blocks = {4: 1, 256: 1, 260: 2, 1024: 4}[width]
    programs = {1: 1, 8: 1, 9: 2, 33: 5}[rows]
    for offset in range(16):
        operand = storage[base + offset :][: rows * width].view(rows, width)
        operand.copy_(_sparse(rows, width // 4))
        values, metadata, crowded = kernel.compress(operand)
        ((grid, (x, *outputs, r, groups, b, block_rows)),) = seen
        seen.clear()
        assert grid == (programs, blocks)
        assert (r, groups, b, block_rows) == (rows, width // 4, blocks, 8)
        assert x.data_ptr() % 4 == 0
        assert (x.data_ptr() == operand.data_ptr()) == (offset % 4 == 0)
        assert torch.equal(x.view(torch.int8), operand)
        assert (x.dtype, outputs[0].dtype) == (torch.int32, torch.int16)
        made = (values, metadata, crowded)
        assert [t.data_ptr() for t in outputs] == [t.data_ptr() for t in made]
        assert [(tuple(t.shape), t.dtype) for t in made] == [
            ((rows, width // 2), torch.int8),
            ((rows, 8 * blocks), torch.int32),
            ((programs * blocks,), torch.int32),
        ]
