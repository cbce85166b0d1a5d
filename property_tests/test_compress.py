"""The compressed form of 2:4 sparse operands, bit for bit, and what comes back of it."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from property_tests.lane_marks import every_lane, fewer
from property_tests.ledger import LEDGER
from quest import compression
from quest.conformance import examine, judges
from quest.conformance.lanes import Lane
from quest.conformance.strategies import SEEDS
from quest.kernels import compress as kernel
from quest.reference import compression as reference


def _sparse(rows: int, width: int, share: float, seed: int) -> torch.Tensor:
    """int8 of which a group of four holds two nonzeros at the most; -128 and 127 among them."""
    g = np.random.default_rng(seed)
    x = g.integers(-128, 128, (rows, width // 4, 4))
    x[g.random(x.shape) < 0.2] = 127
    places = np.argsort(g.random(x.shape), axis=-1)
    x[(places >= 2) | (g.random(x.shape) > share)] = 0
    return torch.from_numpy(x.reshape(rows, width).astype(np.int8))


@every_lane
@fewer
@given(
    rows=st.sampled_from((5, 1, 8, 17, 0)),
    width=st.sampled_from((256, 4, 12, 64, 252, 260, 516, 0)),
    share=st.sampled_from((1.0, 0.5, 0.05, 0.0)),
    layout=st.sampled_from(("contiguous", "transposed", "odd")),
    seed=SEEDS,
)
def test_compress(lane: Lane, rows: int, width: int, share: float, layout: str, seed: int) -> None:
    x = _sparse(rows, width, share, seed)
    if layout == "transposed":
        x = x.t().contiguous().t()
    elif layout == "odd":  # where a group of four is no aligned word
        x = torch.cat([torch.full((1,), 7, dtype=torch.int8), x.flatten()])[1:].view(rows, width)
    told = f"{rows} x {width}, {share} of two kept, {layout}, seed {seed}"
    LEDGER.judge(lane, examine.compressed(lane, x), told)


@every_lane
def test_every_group(lane: Lane) -> None:
    """All choices of up to two places of four, and values at the ends of int8, in one row."""
    row = [
        value[places.index(i)] if i in places else 0
        for count in range(3)
        for places in combinations(range(4), count)
        for value in product((-128, -1, 1, 127), repeat=count)
        for i in range(4)
    ]
    found = examine.compressed(lane, torch.tensor([row], dtype=torch.int8))
    LEDGER.judge(lane, found, "every group")


@every_lane
def test_operands_that_begin_at_any_byte(lane: Lane) -> None:
    """Where a group of four is no aligned word."""
    x = _sparse(5, 260, 1.0, 0)
    for at in (1, 2, 3):
        held = torch.cat([torch.full((at,), 7, dtype=torch.int8), x.flatten()])
        found = examine.compressed(lane, held[at:].view(x.shape))
        LEDGER.judge(lane, found, f"{at} bytes behind a word's first")


def test_the_form_by_hand() -> None:
    x = torch.zeros(1, 260, dtype=torch.int8)
    x[0, 5] = 3  # the second group: indices 0 and 1
    x[0, 35], x[0, 34] = -7, 2  # the first of word 4
    x[0, 64 + 3] = 9  # the first of word 1: 0 and 3
    x[0, 257], x[0, 258] = 4, 5  # the second block
    values, metadata = compression.compress(x)
    kept = torch.zeros(130, dtype=torch.int8)
    kept[3], kept[16], kept[17], kept[33], kept[128], kept[129] = 3, 2, -7, 9, 4, 5
    assert torch.equal(values[0], kept)
    plain = 0x44444444
    words = [plain, plain - 4 + 0xC, plain, plain, plain - 4 + 0xE] + [plain] * 3
    assert metadata[0].tolist() == words + [plain - 4 + 0x9] + [plain] * 7


@given(rows=st.integers(0, 3), groups=st.integers(0, 130), seed=SEEDS)
@fewer
def test_decompress_is_the_oracle_s(rows: int, groups: int, seed: int) -> None:
    x = _sparse(rows, 4 * groups, 0.7, seed)
    assert torch.equal(compression.decompress(*compression.compress(x)), x)
    made = reference.compress(x.numpy())
    assert np.array_equal(reference.decompress(*made), x.numpy())


@pytest.mark.parametrize(
    ("fault", "stage"),
    [
        (lambda v, m: (v.flip(-1), m), "compressed values"),
        (lambda v, m: (v, m.flip(-1)), "compressed metadata"),
        (lambda v, m: (v, m.view(torch.uint8).flip(-1).view(torch.int32)), "compressed metadata"),
        (lambda v, m: (v, m ^ (1 << 31)), "compressed metadata"),
        (lambda v, m: (v.view(-1, 24, 2).flip(-1).reshape(v.shape), m), "compressed values"),
        (lambda v, m: (v.short(), m), "compressed values"),
        (lambda v, m: (v, m[:, :4]), "compressed metadata"),
    ],
)
def test_the_judge_rejects(fault: object, stage: str) -> None:
    x = _sparse(3, 96, 1.0, 0)
    values, metadata = compression.compress(x)
    assert all(v.failure is None for v in judges.compressed(x, values, metadata))
    assert callable(fault)
    found = judges.compressed(x, *fault(values, metadata))
    assert stage in [v.stage for v in found if v.failure]


@every_lane
def test_a_third_nonzero(lane: Lane) -> None:
    for x in (torch.ones(9, 260), torch.tensor([[0, 1, 2, 3] + [0] * 600])):
        with pytest.raises(ValueError, match="two nonzeros at the most in every four entries"):
            lane.call("compress", x.to(torch.int8))


@pytest.mark.parametrize(
    "x", [torch.zeros(3, 6), torch.zeros(8), torch.zeros(2, 8).int()], ids=["width", "axes", "type"]
)
@every_lane
def test_errors(lane: Lane, x: torch.Tensor) -> None:
    x = x.to(torch.int8) if x.is_floating_point() else x
    with pytest.raises(ValueError, match=r"operand must be int8 of shape \(rows, a multiple of 4"):
        lane.call("compress", x)


def test_the_oracle_s_errors() -> None:
    with pytest.raises(ValueError, match="a multiple of 4"):
        reference.compress(np.zeros((2, 6), dtype=np.int8))
    with pytest.raises(ValueError, match="more than two nonzeros"):
        reference.compress(np.array([[1, 1, 0, 1]]))
    with pytest.raises(ValueError, match="values have shape"):
        reference.decompress(np.zeros((2, 6), dtype=np.int8), np.zeros((2, 4), dtype=np.int64))


@pytest.mark.parametrize("shape", [(3, 260), (0, 8), (2, 0)])
def test_the_fake(shape: tuple[int, int]) -> None:
    x = torch.zeros(shape, dtype=torch.int8)
    torch.library.opcheck(compression.compress, (x,))


def test_the_block_is_one() -> None:
    assert kernel.BLOCK == compression.BLOCK == reference.BLOCK == 4 * 64
