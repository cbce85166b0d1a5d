"""Rules of launchers that only a GPU follows, and numbers that they share with CUDA C++; no GPU.

A wrong tile or a wrong number of bytes would often give right results more slowly, or fail on a
device alone. What was chosen for a reason stands here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import quest
from quest import operands, paths
from quest.kernels import (
    blocks,
    cuda,
    decode,
    few,
    forms,
    hadamard,
    hopper,
    masked,
    pack,
    product,
    rows,
    sparse,
)
from quest.kernels.whole import power_of_two, quotient, tile

pytestmark = pytest.mark.whole

KERNELS = Path(blocks.__file__).parent


def numbers(file: str) -> dict[str, int]:
    """What a source names by #define or by constexpr int, where that is a number."""
    text = (KERNELS / file).read_text()
    found = dict(re.findall(r"#define (\w+) (\d+)\b", text))
    for line in re.findall(r"constexpr int ([^;]*);", text):
        found |= dict(re.findall(r"(\w+) = (\d+)(?=,|$)", line))
    return {name: int(value) for name, value in found.items()}


def test_whole_numbers() -> None:
    for n in range(1, 3000):
        power = power_of_two(n)
        assert power & (power - 1) == 0
        assert power // 2 < n <= power
    for a in range(200):
        for b in range(1, 30):
            assert (quotient(a, b) - 1) * b < a <= quotient(a, b) * b


def test_numbers_of_the_sources() -> None:
    shared = numbers("hopper.cuh")
    assert (
        shared["RAW"], shared["PLAIN"], shared["CORRECTED"],
    ) == (hopper.RAW, hopper.PLAIN, hopper.CORRECTED)  # fmt: skip
    dtypes = {
        torch.int32: "INT32", torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16",
        torch.float16: "FLOAT16",
    }  # fmt: skip
    assert {t: shared[name] for t, name in dtypes.items()} == hopper.OUT
    floats = {t: name for t, name in dtypes.items() if t.is_floating_point}
    for file, known in (("halves.cuh", forms.INPUTS), ("few.cu", few.OUT)):
        assert {t: numbers(file)[name] for t, name in floats.items()} == known
    assert masked.TYPES == forms.INPUTS
    own = numbers("masked.cu")
    assert (own["CHUNKS"], masked.GROUP) == (masked.ORDER // 8, 8)
    assert masked.ORDER == 128
    numbered = numbers("codes.cuh")
    assert tuple(numbered[name] for name in ("VALUES", "PACKED", "CODES", "INTEGERS")) == (
        forms.VALUES,
        forms.PACKED,
        forms.CODES,
        forms.INTEGERS,
    )
    assert tuple(numbers("blocks.cu")[name] for name in ("PLAIN", "GATED", "NORMED", "ADDED")) == (
        blocks.PLAIN,
        blocks.GATED,
        blocks.NORMED,
        blocks.ADDED,
    )
    for file in ("blocks.cu", "rows.cu"):
        assert numbers(file)["ORDER"] == forms.ORDER == 128
    assert (blocks.TILE, blocks.SMALL) == (32, 16)
    assert numbers("exchange.cuh")["MAX_WARPS"] == blocks.WARP_LIMIT
    assert numbers("sparse.cu")["TILE_K"] == sparse.TILE_K == 128
    assert sparse.BLOCK == 256
    assert (product.TILE_K, product.CLUSTER, product.CONSUMERS) == (128, 2, 2)
    assert numbers("product.cu")["GROUP"] == product.GROUP
    assert product.THREADS == 384


def test_triton_counts_rows_in_64_bits() -> None:
    """A program's number begins what is multiplied by a row's width. That results are right is seen
    on a GPU alone, in gigabytes (test_many_entries.py); of a group's number, one for each program,
    there are fewer than 2^31.
    """
    texts = {at.name: at.read_text() for at in KERNELS.glob("*.py")}
    lines = [
        (name, line.strip())
        for name, text in sorted(texts.items())
        if "@triton.jit" in text
        for line in text.splitlines()
        if re.search(r"program_id\((?!1\)|0\)\.to\(tl\.int64\))", line)
    ]
    crowded = "tl.store(crowded_ptr + tl.program_id(0) * blocks + tl.program_id(1), over)"
    assert lines == [("compress.py", crowded)]


@pytest.mark.parametrize("prologue", [blocks.PLAIN, blocks.GATED])
def test_parameters_of_the_quantizer(prologue: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of a launch has the parameters of the source, in their order."""
    text = (KERNELS / "blocks.cu").read_text()
    found = re.search(r"quantize\(([^#)]*)#if PROLOGUE != PLAIN([^#]*)#endif", text)
    assert found is not None
    declared = found[1] + (found[2] if prologue else "")
    letters = "".join(
        "P" if "*" in each else {"i64": "q", "int": "i", "float": "f"}[each.split()[0]]
        for each in declared.split(",")
        if each.strip()
    )
    told: dict[str, Any] = {}
    monkeypatch.setattr(cuda, "compile_", lambda *_: None)
    monkeypatch.setattr(cuda, "architecture", lambda _: "")
    monkeypatch.setattr(cuda, "load", lambda *_, **how: told.update(how))
    shape = blocks._shape(44)
    blocks._kernel.__wrapped__(shape, torch.bfloat16, 16, True, forms.INTEGERS, 0, 0, prologue)
    assert "".join(cuda._letters(told["layout"])) == letters


def test_parameters_of_the_transform_behind_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """As above; and the threads of a block are those of its bound."""
    text = (KERNELS / "masked.cu").read_text()
    found = re.search(r" masked\(([^()]*)\) {", text)
    assert found is not None
    letters = "".join(
        "P" if "*" in each else {"i64": "q"}[each.split()[0]] for each in found[1].split(",")
    )
    told: dict[str, Any] = {}
    monkeypatch.setattr(cuda, "compile_", lambda *_: None)
    monkeypatch.setattr(cuda, "architecture", lambda _: "")
    monkeypatch.setattr(cuda, "load", lambda *_, **how: told.update(how))
    masked._kernel.__wrapped__(torch.bfloat16, torch.float32, 0)
    assert "".join(cuda._letters(told.pop("layout"))) == letters
    assert told == {"threads": 32, "shared": 0}
    assert "__launch_bounds__(32)" in text


@pytest.mark.parametrize(("size", "most"), [(2, 16), (4, 64)])
def test_blocks_that_a_warp_holds(size: int, most: int) -> None:
    """16 of rows of at most so many, else 32; of float32 four warps hold these."""
    found = [blocks._tile(count, size) for count in range(1, 385)]
    assert found == most * [16] + (384 - most) * [32]
    assert [blocks._shape(count, size=size).tile for count in range(1, 385)] == found


@pytest.mark.parametrize(
    ("count", "shape", "at_once"),
    [
        (1, (1, 1, 1, 4, 16), (4, 3)), (2, (1, 1, 2, 4, 16), (4, 3)), (8, (1, 1, 8, 4, 16), (4, 3)),
        (3, (5, 1, 16, 4, 16), (4, 3)), (5, (3, 1, 16, 4, 16), (4, 3)),
        (6, (5, 2, 16, 2, 16), (4, 3)), (7, (2, 1, 16, 4, 16), (4, 3)),
        (9, (5, 3, 16, 1, 16), (5, 4)), (10, (3, 2, 16, 2, 16), (4, 3)),
        (12, (4, 3, 16, 1, 16), (5, 4)), (13, (1, 1, 16, 4, 16), (4, 3)),
        (15, (1, 1, 16, 4, 16), (4, 3)), (16, (1, 1, 16, 4, 16), (4, 3)),
        (20, (3, 4, 16, 1, 16), (4, 3)), (24, (2, 3, 16, 1, 16), (5, 4)),
        (28, (1, 2, 16, 2, 16), (4, 3)), (44, (1, 3, 16, 1, 16), (5, 4)),
        (64, (1, 4, 16, 1, 16), (4, 3)), (112, (1, 7, 16, 1, 16), (2, 1)),
        (192, (1, 12, 16, 1, 16), (1, 1)),
        (17, (5, 3, 32, 1, 32), (5, 4)), (20, (3, 2, 32, 2, 32), (4, 3)),
        (24, (4, 3, 32, 1, 32), (5, 4)), (28, (1, 1, 32, 4, 32), (4, 3)),
        (31, (1, 1, 32, 4, 32), (4, 3)), (32, (1, 1, 32, 4, 32), (4, 3)),
        (33, (3, 4, 32, 1, 32), (4, 3)), (40, (3, 4, 32, 1, 32), (4, 3)),
        (44, (2, 3, 32, 1, 32), (5, 4)), (48, (2, 3, 32, 1, 32), (5, 4)),
        (49, (1, 2, 32, 2, 32), (4, 3)), (64, (1, 2, 32, 2, 32), (4, 3)),
        (65, (1, 3, 32, 1, 32), (5, 4)), (86, (1, 3, 32, 1, 32), (5, 4)),
        (128, (1, 4, 32, 1, 32), (4, 3)), (129, (1, 5, 32, 1, 32), (3, 2)),
        (384, (1, 12, 32, 1, 32), (1, 1)),
    ],
)  # fmt: skip
def test_rows_of_blocks(
    count: int,
    shape: tuple[int, int, int, int, int],
    at_once: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of a team, its warps, blocks of a row that share a warp, teams of a thread block, and
    blocks that a warp holds, which are given here.

    at_once: thread blocks of a multiprocessor of Hopper, of 16 bits and of float32: sixteen or
    twelve warps are what its registers hold, less what shared memory has no room for.
    """
    monkeypatch.setattr(cuda, "shared", lambda _: 227 * 1024)
    monkeypatch.setattr(cuda, "processors", lambda _: 10)
    monkeypatch.setattr(blocks, "_tile", lambda *_: shape[-1])
    monkeypatch.setattr(blocks, "_shape", blocks._shape.__wrapped__)  # it remembers
    for size, most in zip((2, 4), at_once, strict=True):
        made = blocks._shape(count, size=size)
        assert made == shape
        alone = blocks._shape(count, False, size)
        assert alone == (made if shape[0] == 1 else (1, *alone[1:]))
        assert alone.warps == -(-count // shape[-1])
        assert blocks._grid(10**6, count, 0, size)[::2] == (10 * most, made)
        assert made.warps * made.teams * most <= blocks.RESIDENT[size]
        each = shape[-1] * (size * 128 + 16 + 32)
        assert made.shared(size) == made.warps * made.teams * each


@pytest.mark.parametrize(
    ("elements", "warps"),
    [(16, 1), (1024, 1), (2047, 1), (2048, 2), (4096, 4), (16384, 16), (32768, 16)],
)
def test_warps_of_a_tile(elements: int, warps: int) -> None:
    assert hadamard.warps(elements) == warps


@pytest.mark.parametrize(
    ("shape", "order", "tile"),
    [
        ((5, 4096), 128, (1, 1024)), ((5, 1000), 8, (1, 1024)), ((5, 256), 128, (4, 256)),
        ((3, 256), 128, (4, 256)), ((2, 256), 128, (2, 256)), ((1, 256), 128, (1, 256)),
        ((100, 16), 16, (64, 16)), ((9, 16), 16, (16, 16)), ((5, 4096), 4096, (1, 4096)),
        ((7, 24), 8, (8, 32)), ((5000, 1), 1, (1024, 1)),
    ],
)  # fmt: skip
def test_tiles_of_the_transform(shape: tuple[int, int], order: int, tile: tuple[int, int]) -> None:
    assert hadamard.tile(*shape, order) == tile


def test_tiles_of_operands() -> None:
    """As wide as allowed, as many rows as entries, and no larger than the matrix or `least`."""
    assert (decode.TILE, pack.TILE) == ((1024, 2048), (2048, 2048))
    cases = {
        (5000, 5000): (2, 1024), (5000, 1000): (2, 1024), (5000, 200): (8, 256),
        (5000, 1): (2048, 1), (1, 5000): (1, 1024), (3, 3): (4, 4), (1, 1): (1, 1),
    }  # fmt: skip
    assert {case: tile(*case, 1024, 2048) for case in cases} == cases
    assert tile(5000, 1, 1024, 2048, least=4) == (512, 4)
    assert tile(5000, 1, 1024, 2048, least=4096) == (1, 4096)


@pytest.mark.parametrize("shape", [(1, 2**20), (2**20, 1)], ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grids_of_operands(
    bits: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of a grid: 2^31 - 1 at most along its first axis, 65535 along any other (CUDA C++
    Programming Guide, Compute Capabilities); here of one row, and of one column.
    """
    launches: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    class Fake:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *told, num_warps: launches.append((grid, told[-2:]))

    monkeypatch.setattr(decode, "_decode", Fake())
    monkeypatch.setattr(pack, "_pack", Fake())
    rows_, width = shape
    operand = torch.zeros(shape, dtype=torch.int8)
    packed = torch.zeros(rows_, -(-width * bits // 8), dtype=torch.uint8)
    held = operand if bits == 8 else packed
    decode.decode(
        held, torch.ones(rows_, 1), width, 1.0, torch.float32, bits=bits, stride=2, top=2**bits - 1
    )
    if bits in (2, 4):
        pack.pack(operand, bits, 2, 2**bits - 1)
    assert len(launches) == 1 + (bits in (2, 4))
    for (first, *others), tile_ in launches:
        assert first <= 2**31 - 1
        assert max(others) <= 65535
        for blocks_, side, entries in zip((first, *others), tile_, shape, strict=True):
            assert (blocks_ - 1) * side < entries <= blocks_ * side


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((12, 0), True)]
)
def test_where_launches_overlap(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where kernels are compiled with a wait: `__CUDA_ARCH__ >= 900` in rows.cu."""
    of = {3: capability}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: of[device])
    cuda.overlaps.cache_clear()
    assert cuda.overlaps(3) is expected
    cuda.overlaps.cache_clear()


def test_warps_of_few_rows() -> None:
    """Eight blocks of 128 a warp, sixteen warps at the most; those of more are long."""
    widths = (128, 1024, 1152, 4096, 16384, 16512, 65536)
    assert [rows.shape(w).warps for w in widths] == [1, 1, 2, 4, 16, 16, 16]
    assert [rows.shape(w).long for w in widths] == 5 * [False] + 2 * [True]
    assert rows.MOST == 4096 * 4096


@pytest.mark.parametrize(
    ("tiles", "rows_", "shared"),
    [
        (product.WIDE, 128, 223312), (product.TALL, 64, 231520),
        (product.NARROW, 64, 220304),
    ],
)  # fmt: skip
def test_shared_memory_of_a_product(tiles: product.Shape, rows_: int, shared: int) -> None:
    """As product.cu counts it, within what a block of Hopper may have."""
    assert (tiles.rows, tiles.shared) == (rows_, shared)
    assert shared <= 227 * 1024
    pair = 2 * tiles.rows
    assert tiles.clusters(1, 1) == tiles.clusters(pair, tiles.columns) == 1
    assert tiles.clusters(pair + 1, tiles.columns + 1) == 4


@pytest.mark.parametrize(
    ("tiles", "numbers_"),
    [(sparse.WIDE, (128, 384, 227408)), (sparse.NARROW, (128, 384, 217216))],
)
def test_tiles_of_the_sparse_product(tiles: sparse.Shape, numbers_: tuple[int, ...]) -> None:
    assert (tiles.rows, tiles.threads, tiles.shared) == numbers_
    assert tiles.shared <= 227 * 1024
    assert tiles.clusters(256, tiles.columns) == 1
    assert tiles.clusters(257, tiles.columns) == tiles.clusters(256, tiles.columns + 1) == 2
    assert tiles.clusters(512, 3 * tiles.columns) == 6


def test_the_choice_of_sparse_tiles() -> None:
    """Small ones where large ones leave a quarter of the GPU idle."""
    at_least = 132 * 3 // 4  # thread blocks, two a cluster
    assert sparse.shape(256 * 50, 256, 132) == sparse.WIDE
    assert 2 * 50 >= at_least > 2 * 49
    assert sparse.shape(256 * 49, 256, 132) == sparse.NARROW
    assert sparse.shape(256, 256 * 50, 132) == sparse.WIDE
    assert sparse.shape(256, 128, 2) == sparse.WIDE
    assert sparse.shape(256 * 3, 256, 8) == sparse.WIDE  # a quarter, and no more
    assert sparse.shape(22016, 1024, 132) == sparse.WIDE
    with sparse.only(sparse.NARROW):
        assert sparse.shape(22016, 1024, 132) == sparse.NARROW


def _of_few() -> Iterator[tuple[tuple[int, ...], int]]:
    """(rows, steps, own, bits), and the bytes that few.cu counts."""
    yield (1, 8, 2, 4), 8 * 64 * 2 * 8 + 4 * (1 * 36 + 96 + 2)
    yield (8, 8, 2, 1), 8 * 64 * 1 * 8 + 4 * (8 * 36 + 96 + 16)
    yield (9, 4, 1, 2), 16 * 64 * 4 * 4 + 4 * (9 * 20 + 48 + 18)
    yield (33, 2, 3, 4), 64 * 64 * 2 * 2 + 4 * (33 * 52 + 144 + 66)


@pytest.mark.parametrize(("case", "expected"), list(_of_few()))
def test_shared_memory_of_few_rows(case: tuple[int, ...], expected: int) -> None:
    rows_, steps, own, bits = case
    assert few._shared(rows_, steps, own, bits) == expected


def test_numbers_of_few_rows() -> None:
    assert [few._row_tiles(n) for n in (1, 8, 9, 16, 17, 32, 33, 64)] == [1, 1, 2, 2, 4, 4, 8, 8]
    for bits, first in ((1, 4), (2, 4), (4, 6)):
        assert [few._depth(n, bits) for n in few.TILES] == [first, first, 4, 3]
    assert [few._parts(bits) for bits in (1, 2, 4)] == [1, 4, 2]
    assert [few._steps(4096, bits, 1) for bits in (1, 2, 4)] == [8, 16, 32]
    assert [few._steps(4096 + 128, 4, c) for c in (1, 2, 8)] == [33, 17, 5]
    assert (few.WARPS, few.SHARED) == (16, 232448)


@pytest.mark.parametrize("cached", [True, False])
def test_a_binary_is_kept_where_that_is_asked_for(
    cached: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    from cuda.core import utils

    real, made = utils.FileStreamProgramCache, []

    def cache() -> object:
        made.append(real(tmp_path))
        return made[-1]

    monkeypatch.setattr(utils, "FileStreamProgramCache", cache)
    macros = rows.macros(torch.bfloat16, 2, False, forms.PACKED, 1, rows.shape(128), False, 0)
    code = cuda.compile_("rows.cu", "sm_90a", macros, cached=cached)
    assert len(made) == cached
    assert any(tmp_path.rglob("*")) == cached
    assert code.code == cuda.compile_("rows.cu", "sm_90a", macros, cached=cached).code


def test_who_takes_the_integers_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows on a GPU, narrow enough, of a recipe and a device that have it."""
    asked: list[str] = []

    def possible(*names: str) -> bool:
        asked.append(names[-1])
        return names[0].startswith("uniform4")

    monkeypatch.setattr(paths, "_possible", possible)
    four, eight = quest.recipe("w4a4"), quest.recipe("w8a8")
    for count in (1, 4096):
        x: Any = SimpleNamespace(shape=(count, 256), device=torch.device("cuda", 1))
        assert paths.choose(x, four) == "integers"
        assert paths.choose(x, eight) == "values"
    assert set(asked) == {"cuda:1"}
    for shape, device, expected in (
        ((1, operands.MAX_WIDTH), "cuda", True), ((1, operands.MAX_WIDTH + 1), "cuda", False),
        ((1, 256), "cpu", False),
    ):  # fmt: skip
        t: Any = SimpleNamespace(shape=shape, device=torch.device(device))
        assert paths.has_integers(t, four) is expected


def test_which_rows_read_packed_codes() -> None:
    """None of rows without entries, or of 3 bits."""
    for width, bits in ((4096, 4), (128, 4), (128, 1), (4096, 3), (4096, 0), (0, 4)):
        most = {0: 0, 1: paths.FEW_ROWS[1], 3: 0}.get(bits, paths.FEW_ROWS[4]) if width else 0
        assert not paths.reads_packed(most + 1, bits, width)
        assert paths.reads_packed(max(most, 1), bits, width) == (most > 0)
