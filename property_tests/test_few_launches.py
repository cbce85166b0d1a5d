"""What the kernels for few rows, few.cu and rows.cu, are launched with; the kernels are fakes.

Values are read by the names that the sources give them, and expected numbers follow from what the
sources say of them. No GPU.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quest
from quest import ops
from quest.kernels import blocks, cuda, few, rows

pytestmark = pytest.mark.whole

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
LETTERS = {"i64": "q", "int": "i", "u32": "I", "float": "f"}


def _declared(entry: str, normed: int = 0) -> dict[str, str]:
    """The parameters of a kernel by name, with the letters of `struct`; also those of a norm."""
    text = Path(few.__file__).with_name(f"{entry}.cu").read_text()
    found = re.search(rf"\b{entry}\(([^()#]*)(?:#if NORMED([^#]*)#endif\s*)?\) {{", text)
    assert found is not None
    each = [p.strip() for p in (found[1] + (found[2] if normed else "")).split(",")]
    return {
        re.split(r"[ *]", p)[-1]: "P" if "*" in p else LETTERS[p.rpartition(" ")[0]] for p in each
    }


@dataclass(frozen=True)
class Fake(cuda.Kernel):
    """function: the macros it was compiled with. context: where its launches go."""

    def launch(self, blocks: int, *values: Any, overlap: bool = False) -> None:
        struct.pack(self.layout, *values)  # as many as there are, and of their types
        entry = self.context.entry
        told = dict(zip(_declared(entry, self.function.get("NORMED", 0)), values, strict=True))
        self.context.seen.append((self, blocks, overlap, told))
        a, w = (self.context.read.get(name, 0) for name in ("a", "w"))
        self.context.bytes = [ctypes.string_at(told[n], k) for n, k in (("a", a), ("w", w)) if k]


class Device:
    """Compiles and loads fakes, and says how many clusters run at once."""

    def __init__(self, patch: pytest.MonkeyPatch, entry: str) -> None:
        self.entry, self.groups, self.architecture = entry, 2, "sm_90a"
        self.seen: list[tuple[Fake, int, bool, dict[str, Any]]] = []
        self.cached: list[bool] = []
        self.read: dict[str, int] = {}  # bytes at a pointer, read when it is launched
        self.bytes: list[bytes] = []
        self.most = 0  # bytes of shared memory that it was loaded with
        patch.setattr(cuda, "compile_", self._compile)
        patch.setattr(cuda, "load", self._load)
        patch.setattr(cuda, "clusters", self._clusters)
        patch.setattr(cuda, "architecture", lambda device: f"sm of {device}")
        self.overlaps = True
        patch.setattr(cuda, "overlaps", lambda device: self.overlaps)
        patch.setattr(cuda, "shared", lambda device: 227 * 1024)
        patch.setattr(cuda, "processors", lambda device: 4)

    def _compile(
        self, source: str, architecture: str, macros: dict[str, int], *, cached: bool = True
    ) -> dict[str, int]:
        assert (source, architecture) == (f"{self.entry}.cu", self.architecture)
        self.cached.append(cached)
        return macros

    def _load(
        self, code: dict[str, int], entry: str, device: int, *, threads: int, shared: int,
        layout: str,
    ) -> Fake:  # fmt: skip
        assert entry == self.entry
        declared = _declared(entry, code.get("NORMED", 0))
        assert "".join(cuda._letters(layout)) == "".join(declared.values())
        self.most = shared
        return Fake(code, self, device, threads, shared, layout)

    def _clusters(self, kernel: Fake, size: int) -> int:
        assert size == kernel.function["CLUSTER"]
        assert kernel.shared == 227 * 1024
        return self.groups

    def one(self) -> tuple[Fake, int, bool, dict[str, Any]]:
        """The only launch since this was asked last."""
        (found,) = self.seen
        self.seen.clear()
        return found


def _forget() -> None:
    for cached in (few._ready, few._loaded, rows._kernel, rows._ready):
        cached.cache_clear()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    _forget()
    yield Device(monkeypatch, "few")
    _forget()


@pytest.fixture
def of_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    _forget()
    yield Device(monkeypatch, "rows")
    _forget()


def _apart(t: Tensor) -> Tensor:
    """The same values where no 16 bytes begin."""
    made = torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)
    assert made.data_ptr() % 16
    return made


# By hand, of the comments of few.cu. A step is 64 bytes of a row of W, a chunk 16; a chunk of W
# meets 1, 4 or 2 chunks of A at 1, 2 or 4 bits.
# rows, columns, width, bits, clusters at once; then cluster, tiles of A, blocks, tiles, own, steps,
# shift of k_warps, groups of 32 chunks of A in the steps, shared bytes
SPLITS: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((3, 40, 512, 4, 2), (1, 1, 2, 2, 2, 4, 2, 1, 8 * 64 * 2 * 4 + 4 * 210)),
    ((64, 300, 65536, 1, 3), (4, 8, 12, 7, 2, 32, 1, 4, 64 * 64 * 32 + 4 * 2528)),
    ((9, 20, 1152, 2, 0), (1, 2, 1, 2, 2, 5, 3, 3, 16 * 64 * 4 * 5 + 4 * 438)),
]


@pytest.mark.parametrize(("case", "expected"), SPLITS)
def test_what_is_ready_for_a_shape(
    case: tuple[int, ...], expected: tuple[int, ...], device: Device
) -> None:
    count, columns, width, bits, device.groups = case
    cluster, nt, blocks, tiles, own, steps, shift, parts, shared = expected
    kernel, *split = few._ready(count, columns, width, bits, F16, 3)
    assert isinstance(kernel, Fake)
    assert kernel.function == {
        "BITS": bits, "NT": nt, "CLUSTER": cluster, "OUT": 3, "WARPS": 16,
        "DEPTH": {1: 6, 2: 4, 8: 3}[nt],
    }  # fmt: skip
    assert (kernel.device, kernel.threads, kernel.shared) == (3, 512, shared)
    assert (device.most, device.cached) == (227 * 1024, [True])
    assert split == [blocks, tiles, own, steps, shift, -(-(2**31) // parts)]


def test_what_a_binary_is_of(device: Device) -> None:
    """Each macro of few.cu by what it is called there; kept, unless told otherwise."""
    made: Any = few.compile_(2, 8, 4, F32)
    assert made == {
        "BITS": 2, "NT": 8, "CLUSTER": 4, "OUT": 1, "WARPS": 16, "DEPTH": 3,
    }  # fmt: skip
    few.compile_(2, 8, 4, F32, cached=False)
    assert device.cached == [True, False]
    # Sums of 64 rows alone leave few registers.
    assert [few._depth(tiles, 2) for tiles in (1, 7, 8)] == [4, 4, 3]


def test_what_shared_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte: 9 rows of 8192 at 2 bits, of which a cluster of 8 has 4 steps a block."""
    words = 9 * 20 + 48 + 18  # sums, columns, rows
    least = 16 * 64 * 4 * 4 + 4 * words
    case = (9, 8192, 2)
    for bytes_, expected in ((least - 1, False), (least, True)):
        monkeypatch.setattr(few, "SHARED", bytes_)
        assert few.supports(*case) is expected
    # All 32 steps in one block, and a row of tiles for each 16 columns.
    one = 16 * 64 * 4 * 32 + 4 * words
    for bytes_, cluster in ((one, 1), (one - 1, 2)):
        monkeypatch.setattr(few, "SHARED", bytes_)
        assert few.split(*case) == cluster
    six = 16 * 64 * 4 * 32 + 4 * (9 * 100 + 3 * 96 + 18)
    for bytes_, tiles, clusters in ((six, 6, 1), (six - 1, 3, 2)):
        monkeypatch.setattr(few, "SHARED", bytes_)
        p = few.plan(9, 96, 8192, 2, 1, 1)
        assert (p.tiles, p.own, p.clusters) == (tiles, tiles, clusters)


def test_how_an_operand_is_split() -> None:
    """Up to 16 rows share K from 80 KB of A on; more, where A takes more than 192 KB."""
    cases = {
        # rows, width, bits: blocks
        (1, 4096, 4): 1, (16, 4096, 4): 1, (16, 5120, 4): 1, (16, 5120 + 128, 4): 2,
        (5, 16384, 4): 1, (6, 14336, 4): 2, (8, 10240, 4): 1, (8, 10240 + 128, 2): 2,
        (16, 14336, 4): 2, (16, 24576, 2): 2, (16, 24576 + 256, 2): 4, (9, 24576 + 256, 2): 4,
        (17, 5120 + 128, 4): 1, (32, 6144, 4): 1, (32, 6144 + 128, 4): 2, (32, 14336, 4): 4,
        (64, 4096, 2): 2, (64, 14336, 4): 8, (16, 40960, 1): 1, (16, 40960 + 512, 1): 2,
        (64, 24576, 1): 1, (64, 24576 + 512, 1): 2, (16, 65536, 4): 8, (1, 65536, 4): 4,
        (1, 24576 + 128, 4): 1, (2, 28160, 4): 1, (8, 57344, 4): 2,
    }  # fmt: skip
    assert {case: few.split(*case) for case in cases} == cases


@pytest.mark.parametrize("bias_type", [None, F32, BF16, F16], ids=str)
def test_a_product_on_addresses(bias_type: torch.dtype | None, device: Device) -> None:
    bias = None if bias_type is None else torch.zeros(40, dtype=bias_type)
    settled = bias is None
    few.launch(101, 102, 103, 3, 40, 512, 4, 7, BF16, 0.75, 500, 104, 105, 106, 107, bias, settled)
    kernel, blocks, overlap, told = device.one()
    assert (kernel.device, blocks, overlap) == (7, 2, settled)
    assert kernel.function["OUT"] == 2
    assert told == {
        "out": 101, "a": 102, "w": 103, "a_scale": 104, "w_scale": 105,
        "bias": 0 if bias is None else bias.data_ptr(), "a_sum": 106, "w_sum": 107, "rows": 3,
        "columns": 40, "chunks": 512 // 2 // 16, "length": 500, "tiles": 2, "own": 2, "steps": 4,
        "shift": 2, "inverse": 2**31, "factor": 0.75,
        "bias_type": {None: 0, F32: 1, BF16: 2, F16: 3}[bias_type],
    }  # fmt: skip


def _product(
    shape: tuple[int, int, int], bits: int, **how: Any
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """y, its vectors, a and w; `apart` names what is not aligned."""
    count, columns, width = shape
    g = torch.Generator().manual_seed(0)
    kind, bytes_ = (torch.uint8, width // 8) if bits == 1 else (torch.int8, width)
    a = torch.randint(0, 100, (count, bytes_), generator=g).to(kind)
    w = torch.randint(0, 256, (columns, width * bits // 8), generator=g).to(torch.uint8)
    apart = how.pop("apart", "")
    a, w = _apart(a) if "a" in apart else a, _apart(w) if "w" in apart else w
    vectors = {
        "a_scale": torch.ones(count), "w_scale": torch.ones(columns),
        "a_sum": torch.zeros(count, dtype=torch.int32),
        "w_sum": torch.zeros(columns, dtype=torch.int32),
    }  # fmt: skip
    y = few.product(a, w, bits, F32, factor=0.5, length=width - 8, **vectors, **how)
    return y, vectors, a, w


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_product(bits: int, device: Device) -> None:
    for shape in ((3, 40, 512), (1, 1, 128)):  # the second of a single number
        count, columns, width = shape
        bias = torch.ones(columns, dtype=F16)
        y, vectors, a, w = _product(shape, bits, bias=bias, settled=True)
        kernel, _, overlap, told = device.one()
        assert (y.shape, y.dtype, overlap) == ((count, columns), F32, True)
        assert (kernel.function["BITS"], kernel.function["OUT"]) == (bits, 1)
        pointers = {"out": y, "a": a, "w": w, "bias": bias, **vectors}
        assert {n: told[n] for n in pointers} == {n: t.data_ptr() for n, t in pointers.items()}
        numbers = ("rows", "columns", "chunks", "length", "factor", "bias_type")
        expected = [count, columns, width * bits // 128, width - 8, 0.5, 3]
        assert [told[n] for n in numbers] == expected


def test_a_product_waits_unless_told(device: Device) -> None:
    few.product(
        torch.zeros(1, 128, dtype=torch.int8), torch.zeros(1, 64, dtype=torch.uint8), 4, F32,
        factor=1.0, length=128, a_scale=torch.ones(1), w_scale=torch.ones(1),
        a_sum=torch.zeros(1, dtype=torch.int32), w_sum=None,
    )  # fmt: skip
    _, _, overlap, told = device.one()
    assert (overlap, told["w_sum"], told["bias"], told["bias_type"]) == (False, 0, 0, 0)


@pytest.mark.parametrize(("apart", "overlaps"), [("a", True), ("w", False)])
def test_a_product_of_what_is_not_aligned(apart: str, overlaps: bool, device: Device) -> None:
    """It is copied; and a copy of w has just been written, whatever the caller knows of w."""
    device.read = {"a": 3 * 128, "w": 5 * 64}
    _, _, a, w = _product((3, 5, 128), 4, settled=True, apart=apart)
    _, _, overlap, told = device.one()
    assert overlap is overlaps
    assert told["a"] % 16 == told["w"] % 16 == 0
    assert device.bytes == [a.numpy().tobytes(), w.numpy().tobytes()]
    _product((3, 5, 128), 4, settled=False, apart=apart)
    assert device.one()[2] is False


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_a_product_without_entries(shape: tuple[int, int], device: Device) -> None:
    y, *_ = _product((*shape, 128), 4)
    assert (y.shape, device.seen) == (shape, [])


KINDS = [("uniform1", "bits", 1), ("uniform8", "codes", 2), ("uniform4", "integers", 3)]


@pytest.mark.parametrize(("grid", "kind", "form"), KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_rows_are_quantized(
    dtype: torch.dtype, grid: str, kind: str, form: int, of_rows: Device
) -> None:
    """Two warps for nine blocks of 128; rows begin where they lie, or one after another."""
    of_rows.architecture = "sm of None"
    q = quest.quantizer.parse(f"{grid}/hadamard128/ste/dense")
    size = 4 if dtype == F32 else 2
    wide = torch.zeros(3, 1168, dtype=dtype)
    cases = [
        (wide[:, :1152], 1168, (3,)), (torch.zeros(2, 3, 1152, dtype=dtype), 1152, (2, 3)),
        (torch.zeros(1152, dtype=dtype), 1152, ()), (wide[:, 1:1153], 1152, (3,)),
    ]  # fmt: skip
    for x, stride, lead in cases:
        program, bits = ops.program(q, x), int(kind == "bits")
        made = blocks.quantize(x, program, form=form, bits=bits, sums=True, masked=False)
        kernel, count, overlap, told = of_rows.one()
        levels, step = q.require_grid().levels, q.require_grid().step
        assert kernel.function == {
            "IN": {F32: 1, BF16: 2, F16: 3}[dtype], "LEVELS": levels, "EDGE": 0, "FORM": form,
            "BITS": bits, "NORMED": 0, "SAVED": 0, "WARPS": 2, "LONG": 0,
        }  # fmt: skip
        # Of four multiprocessors: two thread blocks for each, or no more than one.
        room = 228 * 1024 // 2 - 1024 - 256 if len(lead) == 2 else 0  # of 208, in steps of 128
        assert (kernel.threads, kernel.shared) == (64, room)
        assert of_rows.most == 227 * 1024 - 1664  # what sixteen warps have
        assert (count, overlap) == (3 if len(lead) == 1 else 6 if lead else 1, True)
        operand, scale, mask, sums, kept = made
        assert mask.shape == kept.shape == (0,)
        made = operand, scale, sums
        width, code = (144, torch.uint8) if kind == "bits" else (1152, torch.int8)
        assert [(t.shape, t.dtype) for t in made] == [
            ((*lead, width), code), ((*lead, 1), F32), ((*lead, 1), torch.int32),
        ]  # fmt: skip
        at = told.pop("x")
        assert (at == x.data_ptr()) is (stride == 1168 or len(lead) != 1)
        assert at % 16 == 0
        assert told == {
            "scale": scale.data_ptr(), "out": operand.data_ptr(), "sums": sums.data_ptr(),
            "mask": 0, "saved": 0, "stride": stride * size, "blocks": 9, "step": step,
            "threshold": program.threshold, "ahead": 0,
        }  # fmt: skip


def test_rows_whose_entries_lie_apart_are_copied(of_rows: Device) -> None:
    """Though the first two axes look like rows of contiguous entries, or a row like many."""
    of_rows.architecture = "sm of None"
    q = quest.quantizer.parse("uniform4/hadamard128/ste/dense")
    for x, lead in ((torch.zeros(2, 128, 4).transpose(1, 2), 8), (torch.zeros(512)[::4], 1)):
        blocks.quantize(x, ops.program(q, x), form=3)
        _, count, _, told = of_rows.one()
        assert told["x"] != x.data_ptr()
        assert (count, told["stride"], told["blocks"]) == (lead, 512, 1)


def test_rows_on_addresses(of_rows: Device) -> None:
    """Contiguous ones in any shape, as well."""
    of_rows.architecture = "sm of None"
    q = quest.quantizer.parse("uniform4/hadamard128/ste/dense")
    for x, count, stride in (
        (torch.zeros(2, 3, 128, dtype=BF16), 6, 256), (torch.zeros(128, dtype=BF16), 1, 256),
        (torch.zeros(3, 136, dtype=BF16)[:, :128], 3, 272), (torch.zeros(3, 128), 3, 512),
    ):  # fmt: skip
        blocks.launch(x, ops.program(q, x), 3, 0, count, 128, 101, 102, 103, 104, 105, 4)
        kernel, made, _, told = of_rows.one()
        assert (kernel.threads, made) == (32, count)
        assert (kernel.function["SAVED"], kernel.function["EDGE"]) == (4, 0)
        assert (told["out"], told["scale"], told["mask"]) == (101, 102, 103)
        assert (told["sums"], told["saved"]) == (104, 105)
        assert (told["x"], told["stride"], told["blocks"]) == (x.data_ptr(), stride, 1)


def test_a_mask_is_asked_for(of_rows: Device) -> None:
    """By the threshold, or all ones of an estimator without one; where there is memory for it."""
    of_rows.architecture = "sm of None"
    for estimator, edge in (("ste", 0), ("trust1.0", 1), ("clip0.8", 1)):
        q, x = quest.quantizer.parse(f"uniform2/hadamard128/{estimator}/dense"), torch.zeros(3, 128)
        for masked in (False, True):
            made = blocks.quantize(x, ops.program(q, x), form=1, bits=2, masked=masked)
            kernel, _, _, told = of_rows.one()
            function = kernel.function
            assert (function["EDGE"], function["BITS"]) == (edge * masked, 2)
            assert told["mask"] == (made[2].data_ptr() if masked else 0)
            assert told["sums"] == 0


def test_whose_rows_they_are() -> None:
    """By their entries; those of narrow rows count as a warp's."""
    for count, d in ((4096, 4096), (2978, 5632), (2**14, 1024), (2**14, 128), (341, 49152)):
        for dtype in (BF16, F16, F32):
            assert rows.takes(count, d, dtype)
            # Of float32 any number of rows that are neither narrow nor wide.
            assert rows.takes(count + 1, d, dtype) == (dtype == F32 and 1024 <= d <= 4096)
            for taken in (True, False):
                with rows.only(taken):
                    assert rows.takes(count, d, dtype) is taken


@pytest.mark.parametrize("normed", [False, True])
def test_rows_overlap_with_the_kernel_before(normed: bool, of_rows: Device) -> None:
    """Where kernels can wait; and each multiprocessor has its share of them."""
    of_rows.architecture = "sm of None"
    q, x = quest.quantizer.parse("uniform4/hadamard128/ste/dense"), torch.zeros(1, 128, dtype=BF16)
    norm = (torch.zeros(128, dtype=BF16), 0.5) if normed else None
    for count, share in ((1, 1), (4, 1), (5, 2), (9, 3), (20, 5), (25, 7), (64, 16), (65, 17)):
        for capable in (True, False):  # elsewhere the kernel has no wait
            of_rows.overlaps, at = capable, (101, 102, 0, 103, 0, 0, norm, 0)
            rows.launch(x, ops.program(q, x), 3, 0, count, 128, *at)
            kernel, _, overlap, _ = of_rows.one()
            assert overlap is capable
            room = 0
            if capable and 1 < share < 17:
                room = (228 * 1024 // share - 1024 - 128) // 128 * 128
            assert kernel.shared == room
            # With what a warp has without asking, so many fit where 228 KB are; and no more.
            if room:
                assert share * (room + 128 + 1024) <= 228 * 1024 < (share + 1) * (room + 1024)


def test_rows_that_are_asked_for_ahead(of_rows: Device) -> None:
    """Half as many on as four multiprocessors have of 32 warps at a time, of more than these."""
    of_rows.architecture = "sm of None"
    q = quest.quantizer.parse("uniform4/hadamard128/ste/dense")
    for count, width, dtype, ahead in (
        (128, 128, BF16, 0), (129, 128, BF16, 64), (129, 128, F32, 0), (40, 3072, F16, 0),
        (41, 3072, F16, 20), (9, 16384, BF16, 4), (9, 16512, BF16, 0),
    ):  # fmt: skip
        x = torch.zeros(count, width, dtype=dtype)
        for masked in (True, False):
            blocks.quantize(x, ops.program(q, x), form=3, masked=masked)
            assert of_rows.one()[3]["ahead"] == ahead


@pytest.mark.parametrize("show", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(
    ("grid", "kind", "form"), [("uniform1", "bits", 1), ("uniform4", "integers", 3)]
)
def test_norms_are_quantized(
    grid: str, kind: str, form: int, dtype: torch.dtype, show: bool, of_rows: Device
) -> None:
    """Rows and a weight where they lie, at multiples of 16 bytes; what was quantized on demand."""
    of_rows.architecture = "sm of None"
    q = quest.quantizer.parse(f"{grid}/hadamard128/ste/dense")
    wide, weights = torch.zeros(3, 1168, dtype=dtype), torch.zeros(1160, dtype=dtype)
    for x, weight in (
        (wide[:, :1152], weights[:1152]), (wide[:, 8:1160], weights[8:]),
        (wide[:, 1:1153], weights[1:1153]),
    ):  # fmt: skip
        program, bits = ops.program(q, x), int(kind == "bits")
        made = blocks.normed(x, None, weight, 0.25, program, form=form, bits=bits, show=show)
        operand, scale, sums, *others, shown = made
        assert others == [None] * 3
        kernel, count, overlap, told = of_rows.one()
        assert kernel.function == {
            "IN": {BF16: 2, F16: 3}[dtype], "LEVELS": 2 if form == 1 else 16, "EDGE": 0,
            "FORM": form, "BITS": bits, "NORMED": 1, "SAVED": 0, "WARPS": 2, "LONG": 0,
        }  # fmt: skip
        assert (kernel.threads, count, overlap) == (64, 3, True)
        at, by = told.pop("x"), told.pop("weight")
        fits = x.data_ptr() % 16 == 0
        assert ((at == x.data_ptr()), (by == weight.data_ptr())) == (fits, fits)
        assert (at % 16, by % 16) == (0, 0)
        assert (shown is not None) == show
        if shown is not None:
            assert (shown.shape, shown.dtype, shown.is_contiguous()) == (x.shape, dtype, True)
        assert told == {
            "scale": scale.data_ptr(), "out": operand.data_ptr(), "sums": sums.data_ptr(),
            "mask": 0, "saved": 0, "stride": (1168 if fits else 1152) * 2, "blocks": 9,
            "step": q.require_grid().step, "threshold": program.threshold,
            "shown": 0 if shown is None else shown.data_ptr(), "eps": 0.25, "ahead": 0,
        }  # fmt: skip


def test_no_rows(of_rows: Device) -> None:
    q = quest.quantizer.parse("uniform1/hadamard128/ste/dense")
    x = torch.zeros(2, 0, 256)
    made = blocks.quantize(x, ops.program(q, x), form=1, bits=1, sums=True)
    assert [t.shape for t in made] == [(2, 0, 32), (2, 0, 1), (2, 0, 32), (2, 0, 1), (0,)]
    half, program = x[0].bfloat16(), ops.program(q, x)
    both = blocks.normed(half, None, half.new_ones(256), 1e-5, program, form=1, bits=1, show=True)
    found = (*both[:3], both.rows)
    assert [None if t is None else t.shape for t in found] == [(0, 32), (0, 1), (0, 1), (0, 256)]
    assert not of_rows.seen
