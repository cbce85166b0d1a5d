"""Products of as many rows as an int counts: a tile more would leave 32 bits. Needs 62 to 71 GiB.

A row holds its own number, so that another one's sum is, nearly always, another. Features of a
sparse product have no such test: they would take 280 GiB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from property_tests.prologues import on_hopper
from property_tests.room import Room, only_one  # noqa: F401 - the fixture `room`
from quest import compression
from quest.kernels import few, hopper, outputs, product, sparse

pytestmark = [pytest.mark.whole, on_hopper]

N = 2**31 - 1
GIB = 2**30
PART = 2**26


def _numbered() -> Tensor:
    """(N, 16) uint8: 0, 1, 2, ... in 32 bits each, and zeros; 32 GiB."""
    words = torch.zeros(N, 4, dtype=torch.int32, device="cuda")
    for part, numbers in _parts():
        words[part, 0] = numbers
    return words.view(torch.uint8)


def _parts() -> Iterator[tuple[slice, Tensor]]:
    """Of all rows, with their numbers, int32."""
    for first in range(0, N, PART):
        end = min(first + PART, N)
        yield slice(first, end), torch.arange(first, end, dtype=torch.int32, device="cuda")


def _require(made: Callable[[slice], Tensor], expected: Callable[[Tensor], Tensor]) -> None:
    """made: some rows' results. expected: the same, by the rows' numbers."""
    for part, numbers in _parts():
        assert torch.equal(made(part), expected(numbers)), part


def _low(numbers: Tensor) -> Tensor:
    return _byte(numbers, 0) + 100 * _byte(numbers, 1)


def _high(numbers: Tensor) -> Tensor:
    return _byte(numbers, 2) + 100 * _byte(numbers, 3)


def _byte(numbers: Tensor, at: int) -> Tensor:
    """As int8 has it."""
    return numbers << (24 - 8 * at) >> 24


# What makes `_low` and `_high` of a row.
PICKS = torch.zeros(2, 16, dtype=torch.int8)
PICKS[0, :2] = PICKS[1, 2:4] = torch.tensor([1, 100])


def test_rows_of_a_product(room: Room) -> None:
    room(50 * GIB)
    with outputs.poisoned(0xFF):
        a, b = _numbered().view(torch.int8), PICKS.cuda()
        acc = product.product(a, b, torch.int32, epilogue=hopper.RAW)
        _require(lambda part: acc[part, 0], _low)
        _require(lambda part: acc[part, 1], _high)


def test_columns_of_a_product(room: Room) -> None:
    room(50 * GIB)
    with outputs.poisoned(0xFF):
        a, b = PICKS.cuda(), _numbered().view(torch.int8)
        acc = product.product(a, b, torch.int32, epilogue=hopper.RAW)
        _require(lambda part: acc[0, part], _low)
        _require(lambda part: acc[1, part], _high)


def test_tokens_of_a_sparse_product(room: Room) -> None:
    room(50 * GIB)
    with outputs.poisoned(0xFF):
        values, metadata = (t.cuda() for t in compression.compress(PICKS))
        x = _numbered().view(torch.int8)
        acc = sparse.product(values, metadata, x, torch.int32, epilogue=hopper.RAW)
        _require(lambda part: acc[part, 0], _low)
        _require(lambda part: acc[part, 1], _high)


def test_columns_beside_few_rows(room: Room) -> None:
    """Of single bits: every second one of a number's is 1 in the row, and no other."""
    even = 0x55555555
    signs = torch.zeros(1, 4, dtype=torch.int32)
    signs[0, 0] = even
    room(59 * GIB)
    with outputs.poisoned(0xFF):
        w = _numbered()
        sums, ones = torch.empty(N, dtype=torch.int32, device="cuda"), torch.ones(N, device="cuda")
        for part, numbers in _parts():
            sums[part] = 2 * _ones(numbers) - 128
        y = few.product(
            signs.view(torch.uint8).cuda(), w, 1, torch.float32, factor=1.0, length=128,
            a_scale=ones[:1], w_scale=ones, w_sum=sums,
            a_sum=torch.tensor([2 * 16 - 128], dtype=torch.int32, device="cuda"),
        )[0]  # fmt: skip
        # A product of signs is 1 where two bits are alike, else -1.
        _require(lambda part: y[part], lambda n: (128 - 2 * _ones(n ^ even)).float())


def _ones(numbers: Tensor) -> Tensor:
    """How many bits are 1, of numbers from 0."""
    count = torch.zeros_like(numbers)
    for bit in range(31):
        count += numbers >> bit & 1
    return count
