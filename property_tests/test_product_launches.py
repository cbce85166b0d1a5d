"""What products on Hopper's tensor cores ask of compiler and driver: variant, grid, maps, values.

Both are fakes, so no GPU: parameters are read by the names that the sources give them, and operands
in the memory that a tensor map says, at the time of the launch.
"""

from __future__ import annotations

import ctypes
import re
import struct
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from property_tests.cuda_reader import read
from quest.kernels import cuda, hopper, layout, product, sparse

real = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
pytestmark = pytest.mark.whole


def parameters(source: str, entry: str, macros: dict[str, int]) -> dict[str, str]:
    """The names of a kernel's parameters, in their order, with their letters in a layout."""
    text = read(source, tuple(macros.items())).code
    found = re.search(rf"\s{entry}\((const __grid_constant__ [^{{]*)\) {{", text)
    assert found is not None
    letters = {"TensorMap": "128s", "Turns": "28s", "int": "i", "float": "f"}
    return {
        each.split()[-1].strip("*"): "P" if "*" in each else letters[each.split()[-2]]
        for each in found[1].split(",")
    }


@dataclass
class Map:
    """A matrix of bytes as a tensor map describes it, and its boxes."""

    rows: int
    width: int
    box: tuple[int, int]
    memory: Tensor


@dataclass
class Launch:
    """What was compiled, loaded and launched; values of parameters by their names."""

    compiled: tuple[Any, ...]
    loaded: dict[str, Any]
    blocks: int
    overlap: bool
    given: dict[str, Any]


class Driver:
    """Compiler and driver, of a GPU with this many multiprocessors."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.processors = 132
        self.devices: set[Any] = set()
        self.launches: list[Launch] = []
        self.maps: list[Map] = []
        patch.setattr(cuda, "compile_", self.compile_)
        patch.setattr(cuda, "load", self.load)
        patch.setattr(cuda, "processors", self.count)
        patch.setattr(real, "cuTensorMapEncodeTiled", self.encode)
        for module in (product, sparse):  # without what is kept, which would outlive the fakes
            patch.setattr(module, "_kernel", module._kernel.__wrapped__)
            patch.setattr(module, "tensor_map", hopper.tensor_map.__wrapped__)

    def count(self, device: int | None) -> int:
        self.devices.add(device)
        return self.processors

    def compile_(
        self, source: str, architecture: str, macros: dict[str, int], *, cached: bool = True
    ) -> tuple[Any, ...]:
        return source, architecture, macros, cached

    def load(self, code: tuple[Any, ...], entry: str, device: int | None, **how: Any) -> Any:
        self.devices.add(device)
        declared = parameters(code[0], entry, code[2])
        assert cuda._letters(how["layout"]) == list(declared.values())

        def launch(blocks: int, *values: Any, overlap: bool = False) -> None:
            given = dict(zip(declared, values, strict=True))
            for name in ("a_map", "b_map"):
                index, *rest = struct.unpack("<16Q", given[name])
                assert rest == list(range(15))
                given[name] = self.maps[index - 2**63]
            if "metadata" in given:  # eight words of 32 bits for each block of a row
                words = 8 * given["blocks"] * given["features"]
                given["metadata"] = ctypes.string_at(given["metadata"], 4 * words)
            self.launches.append(Launch(code, how, blocks, overlap, given))

        return SimpleNamespace(launch=launch)

    def encode(
        self, kind: Any, rank: int, pointer: int, sizes: Any, strides: Any, box: Any, steps: Any,
        interleave: Any, swizzle: Any, promotion: Any, fill: Any,
    ) -> tuple[int, Any]:  # fmt: skip
        """CUDA Driver API, cuTensorMapEncodeTiled: the innermost axis first."""
        assert kind == real.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8
        assert interleave == real.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE
        assert promotion == real.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B
        assert fill == real.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE
        (width, rows), (stride,), inner = map(int, sizes), map(int, strides), list(map(int, box))
        assert (rank, stride, list(map(int, steps))) == (2, width, [1, 1])
        assert stride % 16 == pointer % 16 == 0
        assert max(inner) <= 256
        assert rows * width < 2**26  # what is read below
        modes = real.CUtensorMapSwizzle
        swizzles = {64: modes.CU_TENSOR_MAP_SWIZZLE_64B, 128: modes.CU_TENSOR_MAP_SWIZZLE_128B}
        assert swizzle == swizzles[inner[0]]
        held = bytearray(ctypes.string_at(pointer, rows * width))
        memory = torch.frombuffer(held, dtype=torch.int8).view(rows, width)
        self.maps.append(Map(rows, width, (inner[1], inner[0]), memory))
        return 0, SimpleNamespace(opaque=[2**63 + len(self.maps) - 1, *range(15)])

    def one(self) -> Launch:
        """The only launch since this was asked last."""
        (found,) = self.launches
        self.launches.clear()
        return found


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


def _operand(rows: int, width: int, dtype: torch.dtype = torch.int8) -> Tensor:
    g = torch.Generator().manual_seed(rows + width)
    return torch.randint(-128, 128, (rows, width), generator=g).to(dtype)


def _is(found: Map, operand: Tensor, box: tuple[int, int]) -> None:
    """A map of the operand, its rows filled up with zeros to 16 bytes, in such boxes."""
    rows, width = operand.shape
    assert (found.rows, found.box) == (rows, box)
    assert found.width == max(16, (width + 15) // 16 * 16)
    assert torch.equal(found.memory[:, :width], operand.view(torch.int8))
    assert not found.memory[:, width:].any()


BITS, BYTES = torch.uint8, torch.int8
OUT = {torch.int32: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


@dataclass(frozen=True)
class Case:
    """A product, and what it asks for. forced: tiles that `only` names."""

    operands: torch.dtype
    shape: tuple[int, int, int]
    epilogue: int
    out: torch.dtype
    bias: torch.dtype | None
    processors: int
    forced: product.Shape | None
    # Consumers that share a tile, tiles in flight, columns of a tile; thread blocks.
    tiles: tuple[int, int, int]
    blocks: int
    gate: bool = False
    residual: bool = False
    rotary: tuple[int, int, int] | None = None  # positions, a head's width, columns that are turned


CASES = [
    # One cluster of two blocks is enough, and tiles hold more rows than there are.
    Case(BYTES, (3, 5, 16), hopper.RAW, torch.int32, None, 132, None, (1, 8, 128), 2),
    # Two pairs of 128 rows and two of 128 columns: a row and a column too many.
    Case(BYTES, (257, 129, 400), hopper.PLAIN, torch.bfloat16, torch.float32, 132,
         product.NARROW, (1, 8, 128), 12),
    # Three pairs of 64 rows and one tile across; of 129 rows of 257 columns two of two.
    Case(BYTES, (257, 129, 400), hopper.PLAIN, torch.bfloat16, torch.float32, 132,
         product.TALL, (1, 5, 256), 6),
    # More tiles than the GPU takes at a time: 4 * 48 pairs, 66 clusters.
    Case(BYTES, (1024, 12288, 4096), hopper.CORRECTED, torch.float16, torch.bfloat16, 132, None,
         (2, 4, 256), 132),
    # The same with less of K, whose tiles are a consumer's each: 8 * 44 pairs.
    Case(BYTES, (1024, 11264, 2048), hopper.CORRECTED, torch.float16, torch.bfloat16, 132, None,
         (1, 5, 256), 132),
    # Other tiles than 576 rows of 2880 columns would have: 23 * 5 pairs.
    Case(BYTES, (2880, 576, 4096), hopper.PLAIN, torch.bfloat16, None, 132, None, (1, 8, 128), 132),
    # Three turns of 66 pairs of 64 rows of bits, of two columns; an odd multiprocessor has no
    # cluster.
    Case(BITS, (128 * 198, 129, 16), hopper.CORRECTED, torch.float32, torch.float16, 133, None,
         (1, 5, 256), 132),
    # Rows that are filled up; two clusters for six pairs of tiles.
    Case(BYTES, (600, 300, 33), hopper.PLAIN, torch.float32, None, 5, product.WIDE,
         (2, 4, 256), 4),
    # Three pairs of 128 rows and two tiles of 128 columns of a gate and of a value.
    Case(BYTES, (513, 258, 48), hopper.PLAIN, torch.bfloat16, torch.float16, 132,
         product.WIDE, (2, 4, 256), 12, True),
    # Of a gate and a value as many tiles as of a product of both.
    Case(BITS, (128 * 198, 256, 16), hopper.CORRECTED, torch.float16, None, 132, None,
         (1, 5, 256), 132, True),
    # A residual has the tiles of the product alone.
    Case(BITS, (70, 9, 16), hopper.CORRECTED, torch.bfloat16, torch.float16, 132, None,
         (1, 8, 128), 2, residual=True),
    Case(BYTES, (513, 258, 48), hopper.PLAIN, torch.float32, None, 132, product.WIDE,
         (2, 4, 256), 12, residual=True),
    # Heads that are turned, of bits and of integers.
    Case(BITS, (70, 256, 16), hopper.CORRECTED, torch.bfloat16, torch.float16, 132, None,
         (1, 8, 128), 4, rotary=(35, 64, 128)),
    Case(BYTES, (513, 258, 48), hopper.PLAIN, torch.float16, None, 132, product.WIDE,
         (2, 4, 256), 12, rotary=(513, 128, 256)),
    # Of bits a turn of large tiles takes less than two of small ones.
    Case(BITS, (128 * 66, 256, 16), hopper.CORRECTED, torch.bfloat16, None, 132, None,
         (1, 5, 256), 132, rotary=(64 * 66, 128, 256)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case.shape)))
def test_the_product(case: Case, driver: Driver) -> None:
    rows, columns, width = case.shape
    a, b = (_operand(n, width, case.operands) for n in (rows, columns))
    vectors: dict[str, Any] = {
        "row_scale": torch.rand(rows), "column_scale": torch.rand(columns),
        "row_sum": torch.arange(rows).int(), "column_sum": torch.arange(columns).int(),
        "bias": None if case.bias is None else torch.rand(columns).to(case.bias),
    }  # fmt: skip
    if case.residual:
        vectors["residual"] = torch.rand(rows, columns).to(case.out)
    driver.processors = case.processors
    more: dict[str, Any] = {}
    rotary, half = None, 0
    if case.rotary is not None:
        positions, half, turned = case.rotary[0], case.rotary[1] // 2, case.rotary[2]
        rotary = product.Turned(*torch.rand(2, positions, half), turned)
        at = [t.data_ptr() for t in rotary[:2]]
        more = {"cosine": at[0], "sine": at[1], "positions": positions, "turned": turned}
    with product.only(case.forced):
        y = product.product(
            a, b, case.out, epilogue=case.epilogue, length=77, factor=0.375, gate=case.gate,
            rotary=rotary, **vectors,
        )  # fmt: skip
    columns //= 1 + case.gate
    assert (tuple(y.shape), y.dtype, y.is_contiguous()) == ((rows, columns), case.out, True)
    found = driver.one()
    team, stages, tile = case.tiles
    macros = {
        "BINARY": int(case.operands == BITS), "EPILOGUE": case.epilogue, "OUT": OUT[case.out],
        "BIAS": 0 if case.bias is None else OUT[case.bias], "GATE": int(case.gate),
        "RESIDUAL": int(case.residual), "ROTARY": half,
        "TILE_N": tile, "TILE_K": 128, "CLUSTER": 2, "CONSUMERS": 2, "TEAM": team, "STAGES": stages,
    }  # fmt: skip
    assert found.compiled == ("product.cu", "sm_90a", macros, True)
    assert found.loaded["threads"] == 3 * 128
    assert found.loaded["shared"] == product.Shape(*case.tiles).shared
    assert (found.blocks, found.overlap) == (case.blocks, True)
    held = min(64 * team, rows)
    _is(found.given.pop("a_map"), a, (held, 128))
    _is(found.given.pop("b_map"), b, (tile // 2, 128))  # each block of a cluster loads half
    pointers = {name: 0 if t is None else t.data_ptr() for name, t in vectors.items()}
    assert found.given == {
        "out": y.data_ptr(), "rows": rows, "columns": columns, "bytes": (width + 15) // 16 * 16,
        "length": 77, "factor": 0.375, "held": held, "settled": False, **pointers, **more,
        "turns": product.turns(-(-rows // (2 * 64 * team)), -(-columns * (1 + case.gate) // tile)),
    }  # fmt: skip


@pytest.mark.parametrize("by", [1, 2, 3, 5, 7, 8, 31, 64, 66, 641, 12345, 2**16 + 1, 2**31 - 1])
def test_a_division_by_a_product(by: int) -> None:
    """Of every number of 31 bits, by a multiplier of 32: also just below a multiple."""
    multiplier, shift = product._divisor(by)
    assert 0 < multiplier < 2**32
    last = (2**31 - 1) // by
    for n in (0, 1, by - 1, by, last // 2 * by, last * by - 1, last * by, 2**31 - 1):
        assert n * multiplier >> shift == n // by


def test_what_turns_divide_by() -> None:
    """A group's tiles, and the pairs of the last group."""
    for pairs, across, group, last in ((3, 5, 40, 3), (100, 7, 56, 4), (16, 1, 8, 8)):
        told = struct.unpack("3iIiIi", product.turns(pairs, across))
        assert told == (
            pairs * across, pairs, across, *product._divisor(group), *product._divisor(last)
        )  # fmt: skip


def test_a_binary_without_more_than_is_asked_for(driver: Driver) -> None:
    """A gate, a residual and heads that are turned."""
    for given, gate, residual, half in (
        ((), 0, 0, 0), ((False,), 0, 0, 0), ((True,), 1, 0, 0), ((False, True), 0, 1, 0),
        ((False, False, 32), 0, 0, 32),
    ):  # fmt: skip
        made: Any = product.compile_(False, hopper.PLAIN, torch.bfloat16, 0, product.NARROW, *given)
        found = (made[2]["GATE"], made[2]["RESIDUAL"], made[2]["ROTARY"])
        assert found == (gate, residual, half)


def test_a_residual_is_read_in_rows_at_16_bytes(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that lies otherwise is copied, as it is; one that does not is read where it lies."""
    a, b = _operand(6, 16), _operand(8, 16)
    storage = torch.rand(6 * 16 + 16).half()
    at = -storage.data_ptr() % 16 // 2
    whole, later = (storage[start:][:48].view(6, 8) for start in (at, at + 1))
    wide = storage[at:][:96].view(6, 16)[:, :8]
    real, copies = layout.aligned, list[Tensor]()

    def noted(x: Tensor) -> Tensor:
        copies.append(real(x))
        return copies[-1]

    monkeypatch.setattr(layout, "aligned", noted)
    for residual in (whole, later, wide, whole.view(8, 6).T):
        copies.clear()
        product.product(a, b, torch.float16, epilogue=hopper.PLAIN, residual=residual)
        (found,) = (t for t in copies if t.dtype == torch.float16)
        assert driver.one().given["residual"] == found.data_ptr()
        assert torch.equal(found, residual)
        assert found.is_contiguous()
        assert found.data_ptr() % 16 == 0
        assert (found is residual) == (residual is whole)


def test_angles_are_read_in_rows_at_16_bytes(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that lie otherwise are copied, as they are; others are read where they lie."""
    a, b = _operand(6, 16), _operand(64, 16)
    storage = torch.rand(3 * 64 + 8)
    at = -storage.data_ptr() % 16 // 4
    whole, later = (storage[start:][:48].view(3, 16) for start in (at, at + 1))
    apart = storage[at:][:96].view(3, 32)[:, :16]
    real, copies = layout.aligned, list[Tensor]()

    def noted(x: Tensor) -> Tensor:
        copies.append(real(x))
        return copies[-1]

    monkeypatch.setattr(layout, "aligned", noted)
    for cos, sin in ((whole, later), (later, apart), (whole.view(16, 3).T, whole)):
        copies.clear()
        rotary = product.Turned(cos, sin, 64)
        product.product(a, b, torch.float16, epilogue=hopper.PLAIN, rotary=rotary)
        found = [t for t in copies if t.dtype == torch.float32]
        given = driver.one().given
        assert [given["cosine"], given["sine"]] == [t.data_ptr() for t in found]
        for t, asked in zip(found, (cos, sin), strict=True):
            assert torch.equal(t, asked)
            assert t.is_contiguous()
            assert t.data_ptr() % 16 == 0
            assert (t is asked) == (asked is whole)


def test_what_a_product_is_not_told_is_neutral(driver: Driver) -> None:
    a, b = _operand(3, 16), _operand(5, 16)
    y = product.product(a, b, torch.float32, epilogue=hopper.PLAIN)
    given = driver.one().given
    for name in ("row_scale", "column_scale", "bias", "row_sum", "column_sum"):
        assert given[name] == 0
    assert (given["length"], given["factor"], given["settled"]) == (0, 1.0, False)
    assert given["out"] == y.data_ptr()
    x, values = _operand(3, 16), _operand(5, 8)
    metadata = torch.full((5, 8), 0x44444444, dtype=torch.int32)
    sparse.product(values, metadata, x, torch.float32, epilogue=hopper.PLAIN)
    given = driver.one().given
    for name in ("feature_scale", "token_scale", "bias", "feature_sum"):
        assert given[name] == 0
    assert (given["factor"], given["bias_type"]) == (1.0, 0)


def test_that_only_a_weight_that_is_read_where_it_lies_is_settled(driver: Driver) -> None:
    """A copy has just been written, by a kernel that may not have ended."""
    storage = torch.zeros(5 * 32 + 32, dtype=torch.int8)
    at = -storage.data_ptr() % 16
    whole, later = (storage[start:][: 5 * 32].view(5, 32) for start in (at, at + 8))
    for b, width, settled in ((whole, 32, True), (later, 32, False), (whole[:, :24], 24, False)):
        a = _operand(3, width)
        for told in (False, True):
            product.product(a, b, torch.int32, epilogue=hopper.RAW, settled=told)
            assert driver.one().given["settled"] is (told and settled)


def test_a_product_of_addresses(driver: Driver) -> None:
    """On the device and with the numbers that it is told."""
    a, b, y = _operand(70, 48), _operand(9, 48), torch.empty(70, 9, dtype=torch.bfloat16)
    product.launch(
        y.data_ptr(), a.data_ptr(), b.data_ptr(), 70, 9, 48, 3, torch.bfloat16, False,
        hopper.CORRECTED, 11, 0.5, 101, 102, 103, 104, 105, True, 2,
    )  # fmt: skip
    found = driver.one()
    assert driver.devices == {3}
    assert (found.compiled[2]["BIAS"], found.compiled[2]["OUT"]) == (2, 2)
    assert (found.compiled[2]["EPILOGUE"], found.compiled[2]["BINARY"]) == (hopper.CORRECTED, 0)
    assert (found.compiled[2]["GATE"], found.compiled[2]["RESIDUAL"]) == (0, 0)
    _is(found.given.pop("a_map"), a, (64, 128))
    _is(found.given.pop("b_map"), b, (64, 128))
    assert found.given == {
        "out": y.data_ptr(), "row_scale": 101, "column_scale": 102, "bias": 103, "row_sum": 104,
        "column_sum": 105, "rows": 70, "columns": 9, "bytes": 48, "length": 11, "factor": 0.5,
        "held": 64, "settled": True, "turns": product.turns(1, 1),
    }  # fmt: skip
    product.launch(
        y.data_ptr(), a.data_ptr(), b.data_ptr(), 70, 9, 48, 3, torch.bfloat16, False,
        hopper.CORRECTED, 11, 0.5, 101, 102, 103, 104, 105, True, 2, residual=106,
    )  # fmt: skip
    found = driver.one()
    assert (found.compiled[2]["GATE"], found.compiled[2]["RESIDUAL"]) == (0, 1)
    assert (found.given["residual"], found.given["settled"]) == (106, True)


@pytest.mark.parametrize("out_size", [2, 4])
def test_that_shared_memory_holds_what_the_sources_lay_out(out_size: int) -> None:
    """For outputs of 16 and of 32 bits, and little more than the larger of both."""

    def constants(source: str, **macros: int) -> dict[str, int]:
        return read(source, tuple(macros.items())).names

    out = hopper.OUT[torch.bfloat16 if out_size == 2 else torch.float32]
    for one in product.KINDS.values():
        at = constants(
            "product.cu", OUT=out, TILE_N=one.columns, TILE_K=128, TEAM=one.team,
            STAGES=one.stages, CLUSTER=2, CONSUMERS=2,
        )  # fmt: skip
        needed = at["TURN_AT"] + 8 * at["TEAMS"]
        assert (one.rows, product.THREADS) == (at["TILE_M"], at["THREADS"])
        assert needed <= one.shared
        assert one.shared - needed < 16 or out_size == 2
    for tile in (sparse.WIDE, sparse.NARROW, sparse.Shape(3, 128, 4, 1)):
        at = constants(
            "sparse.cu", OUT=out, TILE_N=tile.columns, STAGES=tile.stages,
            CLUSTER=tile.cluster, CONSUMERS=tile.consumers,
        )  # fmt: skip
        needed = at["EMPTY_AT"] + 8 * tile.stages
        assert (tile.rows, tile.threads) == (at["TILE_M"], at["THREADS"])
        assert needed <= tile.shared
        assert needed == tile.shared or out_size == 4


@pytest.mark.parametrize(
    "told",
    [
        {"CLUSTER": 1},
        {"OUT": hopper.OUT[torch.float32]},
        {"EPILOGUE": hopper.RAW, "OUT": hopper.OUT[torch.int32]},
        {"EPILOGUE": hopper.RAW},
    ],
    ids=["alone", "float32", "accumulators", "raw"],
)
def test_that_no_gate_is_compiled_where_it_can_not_stand(told: dict[str, int]) -> None:
    """By the source itself: such a binary would load or write beside what it was given."""
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    macros = {
        "BINARY": 1, "EPILOGUE": hopper.PLAIN, "OUT": hopper.OUT[torch.bfloat16], "BIAS": 0,
        "GATE": 1, "TILE_N": 128, "TILE_K": 128, "CLUSTER": 2, "CONSUMERS": 2, "TEAM": 1,
        "STAGES": 8,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match="a gate is of 16 bits"):
        cuda.compile_("product.cu", hopper.ARCHITECTURE, macros | told, cached=False)


@pytest.mark.parametrize(
    "told",
    [
        {"GATE": 1},
        {"EPILOGUE": hopper.RAW},
        {"EPILOGUE": hopper.RAW, "OUT": hopper.OUT[torch.int32]},
    ],
    ids=["gate", "raw", "accumulators"],
)
def test_that_no_residual_is_compiled_where_it_can_not_stand(told: dict[str, int]) -> None:
    """By the source itself: it would be added to a gate's halves, or to accumulators."""
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    macros = {
        "BINARY": 1, "EPILOGUE": hopper.PLAIN, "OUT": hopper.OUT[torch.bfloat16], "BIAS": 0,
        "RESIDUAL": 1, "TILE_N": 128, "TILE_K": 128, "CLUSTER": 2, "CONSUMERS": 2, "TEAM": 1,
        "STAGES": 8,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match="a residual is added to y itself"):
        cuda.compile_("product.cu", hopper.ARCHITECTURE, macros | told, cached=False)


@pytest.mark.parametrize("gate", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_that_no_word_holds_an_entry_twice(dtype: torch.dtype, gate: int) -> None:
    """Of 16 bits, two in a word: what the compiler makes of the source packs two values each."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    macros = {
        "BINARY": 0, "EPILOGUE": hopper.PLAIN, "OUT": hopper.OUT[dtype], "BIAS": 0, "GATE": gate,
        "TILE_N": 128, "TILE_K": 128, "CLUSTER": 2, "CONSUMERS": 2, "TEAM": 1, "STAGES": 8,
    }  # fmt: skip
    told = [
        b"-std=c++17",
        b"-arch=compute_90a",
        *(f"-D{k}={v}".encode() for k, v in macros.items()),
    ]
    made = cuda.done(nvrtc.nvrtcCreateProgram(cuda._text("product.cu").encode(), b"", 0, [], []))
    assert nvrtc.nvrtcCompileProgram(made, len(told), told)[0] == 0
    ptx = bytearray(cuda.done(nvrtc.nvrtcGetPTXSize(made)))
    cuda.done(nvrtc.nvrtcGetPTX(made, ptx))
    cuda.done(nvrtc.nvrtcDestroyProgram(made))
    words = re.findall(rb"cvt\.rn\.\w+x2\.f32 %\w+, (%\w+), (%\w+);", bytes(ptx))
    # Of 64 products a thread 32 words; with a gate, 16 more of what is gated. Once for near rows,
    # once for far ones.
    assert len(words) == 2 * (32 + 16 * gate)
    assert all(low != high for low, high in words)


@dataclass(frozen=True)
class Sparse:
    """A product with features x tokens x entries, and what it asks for."""

    shape: tuple[int, int, int]
    epilogue: int
    out: torch.dtype
    bias: torch.dtype | None
    processors: int
    forced: sparse.Shape | None
    columns: int  # tokens of a tile
    blocks: int


SPARSE = [
    Sparse((3, 5, 4), hopper.RAW, torch.int32, None, 132, None, 128, 2),
    # Two clusters of 256 features, and two tiles of 128 tokens; eight blocks of metadata.
    Sparse((300, 129, 1796), hopper.PLAIN, torch.bfloat16, torch.float32, 132, None, 128, 8),
    # Three quarters of the GPU: 50 clusters.
    Sparse((256 * 50, 200, 16), hopper.CORRECTED, torch.float32, torch.float16, 132, None, 256,
           100),
    # Two clusters for four tiles.
    Sparse((300, 129, 68), hopper.CORRECTED, torch.float16, torch.bfloat16, 5, sparse.NARROW, 128,
           4),
    Sparse((3, 300, 0), hopper.PLAIN, torch.float32, None, 132, sparse.WIDE, 256, 4),
]  # fmt: skip


@pytest.mark.parametrize("case", SPARSE, ids=lambda case: "x".join(map(str, case.shape)))
def test_the_sparse_product(case: Sparse, driver: Driver) -> None:
    features, tokens, width = case.shape
    x, values = _operand(tokens, width), _operand(features, width // 2)
    words = 8 * -(-width // 256)
    metadata = torch.arange(features * words * 2).int().view(features, words, 2)[..., 0]
    vectors: dict[str, Any] = {
        "feature_scale": torch.rand(features), "token_scale": torch.rand(tokens),
        "feature_sum": torch.arange(features).int(),
        "bias": None if case.bias is None else torch.rand(features).to(case.bias),
    }  # fmt: skip
    driver.processors = case.processors
    with sparse.only(case.forced):
        y = sparse.product(
            values, metadata, x, case.out, epilogue=case.epilogue, factor=0.375, **vectors
        )
    found = driver.one()
    assert (tuple(y.shape), y.dtype, y.is_contiguous()) == ((tokens, features), case.out, True)
    macros = {
        "EPILOGUE": case.epilogue, "OUT": OUT[case.out], "TILE_N": case.columns,
        "STAGES": {128: 8, 256: 5}[case.columns], "CLUSTER": 2, "CONSUMERS": 2,
    }  # fmt: skip
    assert found.compiled == ("sparse.cu", "sm_90a", macros, True)
    tiles = sparse.Shape(2, case.columns, macros["STAGES"], 2)
    assert (found.loaded["threads"], found.loaded["shared"]) == (3 * 128, tiles.shared)
    assert (found.blocks, found.overlap) == (case.blocks, True)
    # 64 features a consumer, of which 64 bytes stand for 128 entries; of tokens half a tile.
    _is(found.given.pop("a_map"), values, (128, 64))
    _is(found.given.pop("b_map"), x, (case.columns // 2, 128))
    # Blocks of eight words; one of zeros, kept at 0 and 1, where there is no entry.
    expected = metadata if words else torch.full((features, 8), 0x44444444, dtype=torch.int32)
    assert found.given.pop("metadata") == expected.contiguous().numpy().tobytes()
    pointers = {name: 0 if t is None else t.data_ptr() for name, t in vectors.items()}
    assert found.given == {
        "out": y.data_ptr(), "features": features, "tokens": tokens,
        "blocks": max(1, -(-width // 256)), "factor": 0.375,
        "bias_type": 0 if case.bias is None else OUT[case.bias], **pointers,
    }  # fmt: skip


def test_that_nothing_is_launched_for_nothing(driver: Driver) -> None:
    metadata = torch.zeros(5, 8, dtype=torch.int32)
    for rows, columns in ((0, 5), (5, 0), (0, 0)):
        a, b = _operand(rows, 16), _operand(columns, 16)
        y = product.product(a, b, torch.float16, epilogue=hopper.PLAIN)
        z = sparse.product(b[:, :8], metadata[:columns], a, torch.float16, epilogue=hopper.PLAIN)
        for t in (y, z):
            assert (tuple(t.shape), t.dtype) == ((rows, columns), torch.float16)
    assert not driver.launches


@pytest.mark.parametrize(
    ("capability", "told"),
    [
        ((9, 0), None),
        ((8, 9), "a card has compute capability 8.9: wgmma needs 9.0 (Hopper)"),
        ((10, 9), "a card has compute capability 10.9: wgmma needs 9.0 (Hopper)"),
        ((12, 0), "a card has compute capability 12.0: wgmma needs 9.0 (Hopper)"),
    ],
)
def test_only_hopper_has_the_product(
    capability: tuple[int, int], told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "unavailable", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    assert hopper.unavailable.__wrapped__(torch.device("cuda", 1)) == told
    monkeypatch.setattr(cuda, "unavailable", lambda device: f"{device} is broken")
    assert hopper.unavailable.__wrapped__(torch.device("cuda", 1)) == "cuda:1 is broken"
