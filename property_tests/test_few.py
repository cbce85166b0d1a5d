"""The product of few rows with packed weights: T0 for its integers, T6 for what is scaled."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from property_tests.lane_marks import fewer
from quest import packing
from quest.conformance import judges
from quest.conformance.strategies import SEEDS
from quest.kernels import cuda, few, hopper, outputs

HOPPER = torch.cuda.is_available() and hopper.unavailable(torch.device("cuda")) is None
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU and cuda-core")
BITS = (1, 2, 4)


needs_nvrtc = pytest.mark.skipif(
    importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.core") is None,
    reason="cuda-core is not installed: pip install 'quest-lowbit[hopper]'",
)


def _compiles(*variant: object) -> None:
    made = few.compile_(*variant, cached=False)
    assert made.code[:4] == b"\x7fELF"
    assert b"few" in made.code


@needs_nvrtc
@pytest.mark.parametrize(
    ("out", "cluster"),
    [(torch.float32, 1), (torch.bfloat16, 1), (torch.bfloat16, 8), (torch.float16, 1)],
    ids=str,
)
@pytest.mark.parametrize("tiles", few.TILES)
@pytest.mark.parametrize("bits", BITS)
def test_every_variant_compiles_without_a_gpu(
    bits: int, tiles: int, out: torch.dtype, cluster: int
) -> None:
    """With and without a cluster: the size of one only counts in a division and an attribute."""
    _compiles(bits, tiles, cluster, out)


# One test, that the quick profile has all of it.
SUPPORTED = {
    (1, 128, 1): True,
    (64, 4096, 4): True,
    (64, 14336, 2): True,
    (16, 65536, 4): True,
    (64, 65536, 1): True,
    (64, 65536, 4): False,  # more of A than shared memory holds
    (0, 128, 4): False,
    (65, 128, 4): False,
    (1, 0, 4): False,
    (1, 192, 4): False,
    (1, 65536 + 128, 1): False,
    (1, 128, 3): False,
    (1, 128, 8): False,
}


def test_supports() -> None:
    assert {case: few.supports(*case) for case in SUPPORTED} == SUPPORTED


@given(data=st.data())
def test_plan(data: st.DataObject) -> None:
    """Every tile and step has a block, and what a block needs is there."""
    rows = data.draw(st.integers(1, few.LIMIT), label="rows")
    columns = data.draw(st.integers(1, 200_000), label="columns")
    width = few.CHUNK * data.draw(st.integers(1, 512), label="chunks")
    bits = data.draw(st.sampled_from(BITS), label="bits")
    processors = data.draw(st.sampled_from((1, 114, 132)), label="processors")
    if not few.supports(rows, width, bits):
        return
    cluster = few.split(rows, width, bits)
    assert cluster in few.CLUSTERS
    p = few.plan(rows, columns, width, bits, cluster, max(1, processors // cluster))
    assert p.cluster == cluster
    assert p.shared <= few.SHARED
    assert p.clusters * p.tiles * 16 >= columns
    assert (p.clusters - 1) * p.tiles * 16 < columns
    assert p.own * p.cluster >= p.tiles
    assert p.cluster * p.steps * 64 >= width * bits // 8
    assert few.WARPS % p.warps == 0


def test_what_is_planned() -> None:
    """By hand: as few turns as memory allows, and the warps of a tile that end first."""
    cases = {
        # rows, columns, width, bits, cluster, groups: tiles, steps, warps, clusters
        (1, 4096, 4096, 4, 1, 132): (2, 32, 8, 128),
        (1, 16, 4096, 4, 1, 132): (1, 32, 16, 1),
        (1, 16 * 132, 512, 4, 1, 132): (1, 4, 4, 132),
        (16, 11008, 4096, 4, 2, 66): (11, 16, 4, 63),
        (64, 4096, 4096, 1, 1, 132): (2, 8, 8, 128),
        (64, 70_000, 4096, 4, 4, 33): (133, 8, 1, 33),
        (64, 140_000, 4096, 4, 4, 33): (133, 8, 1, 66),
    }
    made = {case: few.plan(*case) for case in cases}
    assert {c: (p.tiles, p.steps, p.warps, p.clusters) for c, p in made.items()} == cases
    assert few.SHARES == (1, 2, 4, 8, few.WARPS)


@given(data=st.data())
def test_the_divisor_of_a_share(data: st.DataObject) -> None:
    """i times `inverse` over 2^31 is i over the groups of 32 chunks in a row's share."""
    bits = data.draw(st.sampled_from(BITS), label="bits")
    width = few.CHUNK * data.draw(st.integers(1, 512), label="chunks")
    rows = data.draw(st.integers(1, few.LIMIT), label="rows")
    if not few.supports(rows, width, bits):
        return
    p = few.plan(rows, 16, width, bits, few.split(rows, width, bits), 1)
    inverse, chunks = few.inverse(p, bits), p.steps * (4 if bits == 1 else 32 // bits)
    groups = -(-chunks // 32)
    assert inverse < 2**32
    for row in range(rows):
        for i in (row * groups, (row + 1) * groups - 1):
            assert i * inverse >> 31 == row


def test_rows_of_an_operand_are_split_where_they_do_not_fit() -> None:
    cases = [(1, 65536), (8, 4096), (64, 2048), (64, 4096), (64, 8192), (64, 16384)]
    assert [few.split(*case, 4) for case in cases] == [4, 1, 1, 2, 4, 8]


def _operands(
    bits: int, rows: int, columns: int, width: int, kind: str, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(a, w, integers of a, integers of w) on the CPU; w's are given as codes from 0."""
    g = torch.Generator().manual_seed(seed)
    largest = 2**bits - 1
    c = torch.randint(0, largest + 1, (columns, width), generator=g)
    if bits == 1:
        integers = 2 * torch.randint(0, 2, (rows, width), generator=g) - 1
    else:
        integers = 2 * torch.randint(-8, 8, (rows, width), generator=g) + 1
    if kind != "random":
        c.fill_(0 if kind == "low" else largest)
        integers.fill_((1 if bits == 1 else 15) * (-1 if kind == "mixed" else 1))
    a = packing.pack(integers > 0, 1) if bits == 1 else integers.to(torch.int8)
    return a, packing.pack(c, bits), integers, 2 * c - largest


def _run(
    bits: int,
    out: torch.dtype,
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    scales: tuple[torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
    factor: float,
) -> torch.Tensor:
    a, w, a_integers, w_integers = (t.cuda() for t in operands)
    made = []
    for byte in (0xFF, 0x00):  # every byte is written
        with outputs.poisoned(byte):
            y = few.product(
                a, w, bits, out,
                factor=factor, length=a_integers.shape[1],
                a_scale=scales[0].cuda(), w_scale=scales[1].cuda(),
                a_sum=a_integers.sum(1).int(), w_sum=w_integers.sum(1).int(),
                bias=None if bias is None else bias.cuda(),
            )  # fmt: skip
        made.append(y.cpu())
    assert torch.equal(made[0], made[1])
    return made[0]


# Around tiles of 16 columns and 8 rows, and around steps of 128, 256 and 512 entries.
SHAPES = [
    (1, 16, 128), (2, 7, 256), (7, 130, 1152), (8, 17, 384), (9, 4096, 512), (16, 300, 11008),
    (17, 33, 640), (33, 1, 1024), (64, 130, 4096), (64, 48, 14336), (3, 70_001, 128),
]  # fmt: skip


@on_hopper
@pytest.mark.parametrize("kind", ["random", "low", "high", "mixed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_sums_are_exact(bits: int, shape: tuple[int, int, int], kind: str) -> None:
    rows, columns, _ = shape
    made = _operands(bits, *shape, kind, 0)
    ones = (torch.ones(rows), torch.ones(columns))
    y = _run(bits, torch.float32, made, ones, None, 1.0)
    # Sums of integers below 2^53 are exact in float64; float32 holds those of this size.
    expected = made[2].double() @ made[3].double().T
    assert torch.equal(y.double(), expected)


@on_hopper
@pytest.mark.parametrize("clusters", [few.CLUSTERS[-1:], few.CLUSTERS], ids=["split", "whole"])
@pytest.mark.parametrize("bits", BITS)
def test_any_split_of_k(
    bits: int, clusters: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few, "CLUSTERS", clusters)
    few._ready.cache_clear()
    try:
        for rows in (1, 16, 24, 64):
            made = _operands(bits, rows, 520, 2176, "random", rows)
            ones = (torch.ones(rows), torch.ones(520))
            y = _run(bits, torch.float32, made, ones, None, 1.0)
            assert torch.equal(y.double(), made[2].double() @ made[3].double().T)
    finally:
        few._ready.cache_clear()


@on_hopper
@pytest.mark.parametrize("share", few.SHARES)
@pytest.mark.parametrize("bits", BITS)
def test_any_share_of_warps(bits: int, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which one is planned changes no bit: `mutants/equivalent.toml` counts on it."""
    monkeypatch.setattr(few, "SHARES", (share,))
    few._ready.cache_clear()
    try:
        for rows, columns, width in ((1, 520, 2176), (24, 70, 4096), (64, 4096, 128)):
            made = _operands(bits, rows, columns, width, "random", rows)
            ones = (torch.ones(rows), torch.ones(columns))
            y = _run(bits, torch.float32, made, ones, None, 1.0)
            assert torch.equal(y.double(), made[2].double() @ made[3].double().T)
    finally:
        few._ready.cache_clear()


@on_hopper
@pytest.mark.parametrize("bits", BITS)
@fewer
@given(data=st.data())
def test_scaled(bits: int, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, few.LIMIT), label="rows")
    columns = data.draw(st.integers(1, 600), label="columns")
    width = few.CHUNK * data.draw(st.integers(1, 20), label="chunks")
    out = data.draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)), label="out")
    seed = data.draw(SEEDS, label="seed")
    g = torch.Generator().manual_seed(seed)
    made = _operands(bits, rows, columns, width, "random", seed)
    a_scale, w_scale = torch.rand(rows, generator=g), torch.rand(columns, generator=g)
    if data.draw(st.booleans(), label="far scales"):
        a_scale[::2] *= 2.0**120
        w_scale *= 2.0**-120
    bias = torch.randn(columns, generator=g) if seed % 2 else None
    factor = 2.0**-6  # a power of two: the judge's units are exact
    y = _run(bits, out, made, (a_scale, w_scale), bias, factor)
    judges.multiplied(
        (made[2].numpy(), made[3].numpy()),
        (factor, 1.0),
        (a_scale[:, None], w_scale[:, None]),
        bias,
        y,
    ).require()


@on_hopper
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_an_empty_axis(shape: tuple[int, int]) -> None:
    rows, columns = shape
    made = _operands(4, rows, columns, 128, "random", 0)
    y = _run(4, torch.bfloat16, made, (torch.ones(rows), torch.ones(columns)), None, 1.0)
    assert y.shape == shape


@on_hopper
def test_operands_that_are_not_aligned() -> None:
    a, w, *integers = _operands(4, 3, 20, 128, "random", 0)
    b = torch.empty(a.numel() + 1, dtype=a.dtype, device="cuda")[1:].view_as(a).copy_(a)
    v = torch.empty(w.numel() + 1, dtype=w.dtype, device="cuda")[1:].view_as(w).copy_(w)
    assert b.data_ptr() % 16
    ones = (torch.ones(3), torch.ones(20))
    y = few.product(
        b, v, 4, torch.float32,
        factor=1.0, length=128, a_scale=ones[0].cuda(), w_scale=ones[1].cuda(),
        a_sum=integers[0].sum(1).int().cuda(), w_sum=None,
    )  # fmt: skip
    assert torch.equal(y.cpu().double(), integers[0].double() @ integers[1].double().T)


def test_what_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "processors", lambda device: 132)
    with pytest.raises(ValueError, match="no product of 65 rows of 128 entries at 4 bits"):
        few._ready(65, 16, 128, 4, torch.float32, 0)
