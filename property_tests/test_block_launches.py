"""What the quantizer of blocks of 128 is launched with, and what comes back of it; no GPU.

The kernel is its reference in plain PyTorch here. It takes parameters, macros and memory as
blocks.cu does: it reads and writes at the addresses that it is told, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import math
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from property_tests.prologues import HALVES, halves
from quest import eager, operands, ops, packing
from quest.estimators import STE
from quest.kernels import blocks, cuda, forms, outputs
from quest.kernels import rows as by_row
from quest.kernels.quantize import DISTANCE, Program
from quest.quantizer import Quantizer, parse

pytestmark = pytest.mark.whole

# A thread block of a device, and its multiprocessor, which keeps 1 KiB of each thread block for
# itself.
BLOCK_BYTES, BYTES, KEPT = 227 * 1024, 228 * 1024, 1024
WARPS, TEAMS = 12, 4
AT_ONCE = {2: 16, 4: 12}  # warps of a multiprocessor by bytes of an entry
GATHERED = 16 + 32  # of a block: what is narrow, a mask and codes of two bits

ONE = "uniform1/hadamard128/clip1.3/dense"
TWO = "uniform2/hadamard128/ste/dense"
THREE = "ternary/hadamard128/trust1.0/dense"
FOUR = "uniform4/hadamard128/clip1.3/dense"
EIGHT = "uniform8/hadamard128/ste/dense"
# Quantizers with what can be asked for: form, bits, whether there are sums, bits that are saved.
ASKED: dict[str, list[tuple[int, int, bool, int]]] = {
    ONE: [(*forms.OPERANDS["bits"], True, 0), (forms.VALUES, 0, False, 0)],
    TWO: [(*forms.OPERANDS["integers"], True, 2), (forms.PACKED, 2, False, 0)],
    THREE: [(*forms.OPERANDS["integers"], True, 2), (forms.CODES, 0, True, 0)],
    FOUR: [(*forms.OPERANDS["integers"], True, 4), (*forms.OPERANDS["integers"], False, 0)],
    EIGHT: [(*forms.OPERANDS["codes"], True, 0), (forms.PACKED, 8, False, 0)],
}


def _names(prologue: int) -> list[str]:
    """The kernel's parameters, in their order."""
    text = Path(blocks.__file__).with_name("blocks.cu").read_text()
    found = re.search(r" quantize\(([^#)]*)#if PROLOGUE != PLAIN([^#]*)#endif", text)
    assert found is not None
    declared = found[1] + (found[2] if prologue else "")
    return [each.split()[-1].lstrip("*") for each in declared.split(",") if each.strip()]


def _reference(
    x: Tensor, q: Quantizer, form: int, bits: int, saved: int, edge: bool = True
) -> dict[str, Tensor]:
    """What the kernel makes of rows (..., d), by the names of its parameters."""
    values, _, *_ = eager.quantize(x, q, values=True, codes=False, packed=False)
    _, codes, scale, mask, _ = eager.quantize(x, q, values=False, codes=True, packed=False)
    codes, levels = codes.int(), q.require_grid().levels
    integers = codes if levels % 2 else 2 * codes + 1
    if form == forms.INTEGERS:
        integers = operands.form(q.require_grid(), "integers").spread * integers
    out = {
        forms.VALUES: values, forms.CODES: codes.to(torch.int8),
        forms.INTEGERS: integers.to(torch.int8),
    }  # fmt: skip
    from_zero = codes + levels // 2
    return {
        "out": packing.pack(from_zero, bits) if form == forms.PACKED else out[form],
        "scale": scale,
        "mask": packing.pack(mask | (not edge), 1),
        "sums": integers.sum(-1, keepdim=True, dtype=torch.int32),
        "saved": packing.pack(from_zero, saved or 8),
    }


class Device:
    """Where launches run: known memory, and the quantizer that they are to be of."""

    def __init__(self) -> None:
        self.q = parse(FOUR)
        self.known: list[Tensor] = []
        self.made: list[Tensor] = []
        self.launches: list[dict[str, Any]] = []
        self.processors = 1
        self.shared = BLOCK_BYTES

    def memory(
        self, address: int, shape: tuple[int, ...], pitch: int, dtype: torch.dtype
    ) -> Tensor:
        """Rows of known memory, `pitch` entries from one to the next."""
        assert address % 16 == 0
        for t in self.known:
            storage = t.untyped_storage()
            at, rest = divmod(address - storage.data_ptr(), dtype.itemsize)
            last = at + pitch * (shape[0] - 1) + shape[1]
            if at >= 0 and pitch >= 0 and last * dtype.itemsize <= storage.nbytes():
                assert rest == 0
                return torch.empty(0, dtype=dtype).set_(storage, at, shape, (pitch, 1))
        raise AssertionError("an address of nothing that was given or made")

    def put(self, address: int, value: Tensor) -> None:
        """Write all of an output, none but this."""
        (t,) = (t for t in self.made if t.data_ptr() == address and t.numel())
        assert (t.dtype, t.numel()) == (value.dtype, value.numel())
        t.view(-1).copy_(value.reshape(-1))

    def compile(self, source: str, architecture: str, macros: dict[str, int]) -> dict[str, int]:
        assert (source, architecture) == ("blocks.cu", "sm_90a")
        return macros

    def load(self, macros: dict[str, int], entry: str, device: None, **how: Any) -> Any:
        assert (entry, device) == ("quantize", None)
        assert all(type(value) is int for value in macros.values())
        kernel = Kernel(self, macros, **how)
        return SimpleNamespace(launch=kernel.launch)


@dataclasses.dataclass
class Kernel:
    device: Device
    macros: dict[str, int]
    threads: int
    shared: int
    layout: str

    def launch(self, count: int, *values: Any) -> None:
        macros, prologue = self.macros, self.macros["PROLOGUE"]
        struct.pack(self.layout, *values)
        told = dict(zip(_names(prologue), values, strict=True))
        self.device.launches.append({**told, "macros": macros, "count": count})
        width = 128 * told["blocks"]
        norms = prologue in (blocks.NORMED, blocks.ADDED)
        self.check_shape(count, told)
        dtype = {1: torch.float32, 2: torch.bfloat16, 3: torch.float16}[macros["IN"]]
        chunk = 16 // dtype.itemsize
        rows = told["total"] // told["blocks"]

        def read(name: str, pitch: int) -> Tensor:
            return self.device.memory(told[name], (rows, width), pitch, dtype)

        x = read("x", told["x_pitch"] * chunk if prologue else width)
        second = prologue in (blocks.GATED, blocks.ADDED)
        beside = read("beside", told["beside_pitch"] * chunk) if second else None
        if prologue:
            assert (told["weight"] != 0) == norms
            assert (told["added"] != 0) == (prologue == blocks.ADDED)
            assert (told["shown"] != 0) == bool(macros["SHOWN"])
            assert told["eps"] == 0 or norms
        else:
            assert macros["SHOWN"] == 0
        if prologue == blocks.GATED:
            assert beside is not None
            x = eager.gated(x, beside)
        elif norms:
            weight = self.device.memory(told["weight"], (1, width), width, dtype)[0]
            h, x = eager.normed(x, beside, weight, told["eps"])
            if beside is not None:
                self.device.put(told["added"], h)
        if macros["SHOWN"]:
            self.device.put(told["shown"], x)
        self.emit(x, told)

    def check_shape(self, count: int, told: dict[str, Any]) -> None:
        """Every block of every row has its place in a warp's tile; as many run as at once can."""
        total, of_row, units = told["total"], told["blocks"], told["units"]
        warps, segment, teams = told["warps"], told["segment"], told["teams"]
        assert self.threads == 32 * warps * teams
        assert 1 <= warps <= WARPS
        assert 1 <= teams <= TEAMS
        size, tile = (
            4 if self.macros["IN"] == forms.INPUTS[torch.float32] else 2,
            self.macros["TILE"],
        )
        # Of short rows a warp holds half as many blocks as of others.
        assert tile == 16 if of_row <= 16 else tile in (16, 32)
        assert self.shared == warps * teams * tile * (size * 128 + GATHERED)
        assert self.macros["REGISTERS"] * 32 * AT_ONCE[size] <= 65536
        # Rows of a power of two share a warp, and no warp's turn is without a row.
        packs = of_row in (1, 2, 4, 8)
        assert segment == of_row if packs else segment == tile
        assert warps == 1 or not packs
        assert tile % segment == 0
        # A team of several rows is compiled for its warps: each of its blocks has its own slots.
        # Of one row: for a share of a warp, for one, or for several.
        of_team, kind = self.macros["ROWS"], self.macros["WARPS"]
        assert kind == (warps if of_team > 1 else 0 if packs else 1 if warps == 1 else 2)
        assert of_team == 1 or self.macros["FORM"] != forms.VALUES
        assert of_team == 1 or (not packs and warps * teams <= 4)
        unit = tile if packs else of_team * of_row
        assert units == math.ceil(total / unit)
        assert (warps - 1) * tile < unit <= warps * tile
        held = [
            first + part * tile + lane
            for first in range(0, units * unit, unit) for part in range(warps)
            for lane in range(min(tile, min(unit, total - first) - part * tile))
        ]  # fmt: skip
        assert held == list(range(total))
        # Four exchanges a team: a barrier, and two sets of slots.
        slots, of = (tile * warps, teams) if of_team > 1 else (12, 4)
        declared = 4 * of * (8 + 2 * 4 * slots)
        at_once = AT_ONCE[size] // (warps * teams)
        at_once = min(at_once, BYTES // (self.shared + declared + KEPT))
        assert count == min(math.ceil(units / teams), at_once * self.device.processors)

    def emit(self, x: Tensor, told: dict[str, Any]) -> None:
        macros, q = self.macros, self.device.q
        form, bits, saved = macros["FORM"], macros["BITS"], macros["SAVED"]
        assert macros["LEVELS"] == q.require_grid().levels
        assert told["step"] == q.require_grid().step
        # One kernel for all that differs in nothing.
        assert bits in (1, 2, 4, 8) if form == forms.PACKED else bits == 0
        edge = bool(macros["EDGE"])
        if edge:
            assert not isinstance(q.estimator, STE)
            assert told["threshold"] == q.thresholds()[0]
            assert told["mask"]
        assert (told["saved"] != 0) == (saved != 0)
        made = _reference(x, q, form, bits, saved, edge)
        for name in ("out", "scale", "mask", "sums", "saved"):
            if told[name] or name in ("out", "scale"):
                self.device.put(told[name], made[name])


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    made = Device()

    def noted(function: Callable[..., Tensor], *lists: list[Tensor]) -> Callable[..., Tensor]:
        def run(*given: Any) -> Tensor:
            t = function(*given)
            for each in lists:
                each.append(t)
            return t

        return run

    monkeypatch.setattr(outputs, "empty", noted(outputs.empty, made.made))
    for name in ("readable", "aligned"):
        monkeypatch.setattr(blocks, name, noted(getattr(blocks, name), made.known))
    monkeypatch.setattr(by_row, "takes", lambda *_: False)
    monkeypatch.setattr(cuda, "unavailable", lambda _: None)
    monkeypatch.setattr(cuda, "architecture", lambda device: {None: "sm_90a"}[device])
    monkeypatch.setattr(cuda, "shared", lambda device: {None: made.shared}[device])
    monkeypatch.setattr(cuda, "processors", lambda device: {None: made.processors}[device])
    monkeypatch.setattr(cuda, "compile_", made.compile)
    monkeypatch.setattr(cuda, "load", made.load)
    blocks._kernel.cache_clear()
    yield made
    blocks._kernel.cache_clear()


def _program(q: Quantizer, width: int) -> Program:
    program: Program = ops.program(q, torch.empty(0, width))
    return program


def _rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _same(made: Tensor | None, expected: Tensor | None) -> None:
    if made is None or expected is None:
        assert made is expected
        return
    assert (made.dtype, made.shape) == (expected.dtype, expected.shape)
    assert torch.equal(made, expected)


def _check(made: tuple[Tensor, ...], x: Tensor, q: Quantizer, asked: Any, masked: bool) -> None:
    form, bits, sums, saved = asked
    expected = _reference(x, q, form, bits, saved)
    nothing = torch.empty(0)
    for t, name, there in zip(
        made, ("out", "scale", "mask", "sums", "saved"), (True, True, masked, sums, saved),
        strict=True,
    ):  # fmt: skip
        _same(t, expected[name] if there else nothing.to(expected[name].dtype))


@pytest.mark.parametrize("dtype", list(forms.INPUTS), ids=str)
@pytest.mark.parametrize("spec", ASKED)
def test_what_comes_back(spec: str, dtype: torch.dtype, device: Device) -> None:
    device.q = q = parse(spec)
    program = _program(q, 512)
    for asked in ASKED[spec]:
        form, bits, sums, saved = asked
        for masked in (True, False):
            for x in (_rows(2, 3, 512), _rows(512)):
                x = x.to(dtype)
                device.known[:] = [x]
                made = blocks.quantize(
                    x, program, form=form, bits=bits, sums=sums, masked=masked, saved=saved
                )
                _check(made, x, q, asked, masked)
        if not bits:
            _check(blocks.quantize(x, program, form=form), x, q, (form, 0, False, 0), True)


def test_rows_that_are_none(device: Device) -> None:
    """Nothing is launched; the outputs have their shapes."""
    q = parse(FOUR)
    x = torch.empty(2, 0, 256)
    made = blocks.quantize(x, _program(q, 256), form=forms.INTEGERS, sums=True, saved=4)
    assert [t.shape[:2] for t in made] == [(2, 0)] * 5
    assert [t.shape[2] for t in made] == [256, 1, 32, 1, 128]
    flat = x[0].bfloat16()
    for each in (
        blocks.gated(flat, flat, _program(q, 256), form=forms.INTEGERS, masked=True, saved=4),
        blocks.normed(flat, flat, flat.sum(0), 0.1, _program(q, 256), form=forms.CODES),
    ):
        assert all(t is None or t.shape[0] == 0 for t in each)
    assert not device.launches


def test_rows_that_lie_elsewhere(device: Device) -> None:
    """The kernel takes rows one after another, from a multiple of 16 bytes."""
    device.q = q = parse(FOUR)
    for dtype in forms.INPUTS:
        wide = _rows(3, 768).to(dtype)
        for x in (wide[:, 128:384], wide.t()[:256].t(), wide.view(-1)[1:513].view(2, 256)):
            device.known[:] = [x]
            made = blocks.quantize(x, _program(q, 256), form=forms.INTEGERS)
            _check(made, x, q, (forms.INTEGERS, 0, False, 0), True)


@pytest.mark.parametrize(
    ("rows", "of_row"),
    [(1, 1), (33, 1), (1000, 1), (17, 2), (40, 16), (5, 3), (9, 31), (20, 32), (1, 33), (20, 33),
     (9, 64), (3, 65), (2, 129), (2, 384), (1, 44), (21, 44), (20, 20), (13, 5), (5, 24), (7, 40),
     (9, 6), (7, 9), (9, 10), (9, 12), (9, 15), (9, 16)],
)  # fmt: skip
@pytest.mark.parametrize("processors", [1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_of_any_width(
    rows: int, of_row: int, processors: int, dtype: torch.dtype, device: Device
) -> None:
    """More of them than run at once, and fewer."""
    device.q, device.processors = parse(ONE), processors
    q = device.q
    x = _rows(rows, 128 * of_row).to(dtype)
    device.known[:] = [x]
    for form, bits, sums in ((forms.PACKED, 1, True), (forms.VALUES, 0, False)):
        device.known[:] = [x]
        made = blocks.quantize(x, _program(q, 128 * of_row), form=form, bits=bits, sums=sums)
        _check(made, x, q, (form, bits, sums, 0), True)


def test_addresses_alone(device: Device) -> None:
    """A launch for memory that the caller has: nothing but an operand, unless more is asked for."""
    device.q = q = parse(FOUR)
    x = _rows(4, 256)
    out, kept = torch.empty(4, 256, dtype=torch.int8), torch.empty(4, 128, dtype=torch.uint8)
    scale = torch.empty(4, 1)
    device.known[:], device.made[:] = [x], [out, scale, kept]
    given = (x, _program(q, 256), forms.INTEGERS, 0, 4, 256, out.data_ptr(), scale.data_ptr())
    blocks.launch(*given, 0, 0)
    expected = _reference(x, q, forms.INTEGERS, 0, 4)
    _same(out, expected["out"])
    _same(scale, expected["scale"])
    out.zero_()
    blocks.launch(*given, 0, 0, kept.data_ptr(), 4)
    _same(out, expected["out"])
    _same(kept, expected["saved"])


# --- prologues --------------------------------------------------------------------------------


def _pairs(dtype: torch.dtype, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Halves of one tensor, rows of their own, rows to be copied, and one row as five."""
    wide = _rows(5, 2 * width + 8).to(dtype)
    first, second = halves(wide[:, : 2 * width])
    off = wide[:, 1 : width + 1]
    yield first, second
    yield first.contiguous(), second
    yield first, second.contiguous()
    yield off, second
    yield first, off
    yield first[:1].expand(5, -1), second


def _check_made(
    made: blocks.Made, rows: Tensor, added: Tensor | None, q: Quantizer, asked: Any, masked: bool,
    show: bool,
) -> None:  # fmt: skip
    form, bits, _, saved = asked
    expected = _reference(rows, q, form, bits, saved)
    for t, name, there in zip(
        made[:5], ("out", "scale", "sums", "mask", "saved"), (True, True, True, masked, saved),
        strict=True,
    ):  # fmt: skip
        _same(t, expected[name] if there else None)
    _same(made.added, added)
    _same(made.rows, rows if show else None)


PROLOGUES = [(spec, asked) for spec, each in ASKED.items() for asked in each
             if asked[2] and asked[0] != forms.VALUES]  # fmt: skip


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("spec", "asked"), PROLOGUES, ids=str)
def test_rows_of_a_gate(spec: str, asked: Any, dtype: torch.dtype, device: Device) -> None:
    device.q = q = parse(spec)
    program, (form, bits, _, saved) = _program(q, 256), asked
    for gate, value in _pairs(dtype, 256):
        rows = eager.gated(gate, value)
        device.known[:] = [gate, value]
        for show in (False, True):
            for masked in (False, True):
                made = blocks.gated(
                    gate, value, program, form=form, bits=bits, show=show, masked=masked,
                    saved=saved,
                )  # fmt: skip
                _check_made(made, rows, None, q, asked, masked, show)
        if not bits:
            made = blocks.gated(gate, value, program, form=form)
            _check_made(made, rows, None, q, (form, 0, True, 0), False, False)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("spec", "asked"), PROLOGUES, ids=str)
def test_rows_of_a_norm(spec: str, asked: Any, dtype: torch.dtype, device: Device) -> None:
    device.q = q = parse(spec)
    program, (form, bits, *_) = _program(q, 256), asked
    weights = torch.linspace(-1, 2, 512).to(dtype)
    for i, (x, other) in enumerate(_pairs(dtype, 256)):
        # In one piece, off a multiple of 16 bytes, and in every other entry.
        weight = (weights[:256], weights[1:257], weights[::2])[i % 3]
        for residual in (None, other):
            device.known[:] = [x, other, weight]
            h, rows = eager.normed(x, residual, weight, 0.25)
            added = None if residual is None else h
            for show in (False, True):
                made = blocks.normed(
                    x, residual, weight, 0.25, program, form=form, bits=bits, show=show
                )
                _check_made(made, rows, added, q, (form, bits, True, 0), False, show)
            if not bits:
                made = blocks.normed(x, residual, weight, 0.25, program, form=form)
                _check_made(made, rows, added, q, (form, 0, True, 0), False, False)


@pytest.mark.parametrize("of_row", [1, 3, 16, 32, 33, 64, 86, 192])
def test_norms_of_any_width(of_row: int, device: Device) -> None:
    """With a residual, too, which takes no room of a multiprocessor."""
    device.q = q = parse(FOUR)
    x, weight = _rows(14, 128 * of_row).half(), torch.linspace(-1, 2, 128 * of_row).half()
    device.known[:] = [x, weight]
    for rows in (1, 14):
        for residual in (None, x[-rows:]):
            given = (x[:rows], residual, weight, 0.25)
            made = blocks.normed(*given, _program(q, 128 * of_row), form=forms.INTEGERS)
            h, expected = eager.normed(*given)
            added = None if residual is None else h
            _check_made(made, expected, added, q, (forms.INTEGERS, 0, True, 0), False, False)


# --- what is taken ----------------------------------------------------------------------------


def test_what_is_demanded_of_a_program(device: Device) -> None:
    """Each demand by itself."""
    x = torch.empty(1, 256)
    program = _program(parse(FOUR), 256)
    assert blocks.supports(program, x)
    some = torch.ones(1)
    for change in (
        {"order": 64}, {"order": 256}, {"base": some}, {"points": some},
        {"group": (2, 4, False)}, {"estimator": DISTANCE},
    ):  # fmt: skip
        assert not blocks.supports(dataclasses.replace(program, **change), x)
    assert not blocks.supports(program, x.double())


def test_the_widths_that_are_taken(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one block to 32 of each of twelve warps."""
    program = _program(parse(FOUR), 256)
    for width, taken in ((0, False), (128, True), (49152, True), (49280, False)):
        for dtype in forms.INPUTS:
            assert blocks.supports(program, torch.empty(1, width, dtype=dtype)) == taken
    monkeypatch.setattr(cuda, "unavailable", lambda _: "there is none")
    assert not blocks.supports(program, torch.empty(1, 256))


def test_the_finest_step(device: Device) -> None:
    """Entries are sqrt(d) sigma at most, in steps fewer than 2^14: 16 bits hold them all."""
    program = _program(parse(FOUR), 256)
    x = torch.empty(1, 16384)
    for step, taken in ((2.0**-7, False), (math.nextafter(2.0**-7, 1), True)):
        assert blocks.supports(dataclasses.replace(program, step=step), x) == taken


@pytest.mark.parametrize(("saved", "levels", "form", "fits"), [
    (2, 3, forms.INTEGERS, True), (2, 4, forms.INTEGERS, True), (2, 5, forms.INTEGERS, False),
    (4, 5, forms.INTEGERS, True), (4, 16, forms.INTEGERS, True),
    (4, 17, forms.INTEGERS, False), (4, 4, forms.INTEGERS, True),
    (1, 2, forms.INTEGERS, False), (3, 4, forms.INTEGERS, False),
    (5, 4, forms.INTEGERS, False), (8, 4, forms.INTEGERS, False),
    (2, 4, forms.CODES, False), (4, 4, forms.PACKED, False),
])  # fmt: skip
def test_what_can_be_saved(saved: int, levels: int, form: int, fits: bool) -> None:
    """The same of a row of its own and of a prologue."""
    program = dataclasses.replace(_program(parse(FOUR), 256), levels=levels)
    x = torch.empty(0, 256, dtype=torch.bfloat16)
    runs: list[Callable[[], Sequence[Tensor | None]]] = [
        lambda: blocks.quantize(x, program, form=form, saved=saved),
        lambda: blocks.gated(x, x, program, form=form, saved=saved),
    ]
    for run in runs:
        if fits:
            kept = run()[4]
            assert kept is not None
            assert kept.shape == (0, 32 * saved)
            continue
        told = f"integers of at most 2 or 4 bits .* got form {form} of {levels} levels in {saved}$"
        with pytest.raises(ValueError, match=told):
            run()


def test_forms_that_have_sums(device: Device) -> None:
    """Codes of more bits, and values, have none; what `bits` says of another form is ignored."""
    program = _program(parse(FOUR), 256)
    x = torch.empty(0, 256, dtype=torch.bfloat16)
    for form, bits, there in (
        (forms.VALUES, 0, False), (forms.PACKED, 2, False), (forms.PACKED, 8, False),
        (forms.PACKED, 1, True), (forms.CODES, 0, True), (forms.INTEGERS, 4, True),
    ):  # fmt: skip
        made = blocks.quantize(x, program, form=form, bits=bits)
        assert made[3].shape == (0,)
        if there:
            made = blocks.quantize(x, program, form=form, bits=bits, sums=True)
            assert made[3].shape == (0, 1)
            gated = blocks.gated(x, x, program, form=form, bits=bits)
            assert gated.sums.shape == (0, 1)
            continue
        with pytest.raises(ValueError, match=f"^there are no sums of form {form} with {bits} bits"):
            blocks.quantize(x, program, form=form, bits=bits, sums=True)
        told = f"^a prologue makes no form {form} with {bits} bits"
        with pytest.raises(ValueError, match=told):
            blocks.gated(x, x, program, form=form, bits=bits)
        with pytest.raises(ValueError, match=told):
            blocks.normed(x, None, x.sum(0), 0.1, program, form=form, bits=bits)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rows_too_far_apart(dtype: torch.dtype) -> None:
    """The kernel counts 16 bytes at a time, from row to row of 32, in 32 bits with a sign."""
    x = torch.zeros(256, dtype=dtype)
    for pitch, in_place in ((2**26 - 1, True), (2**26, False), (2**27, False)):
        row = x.as_strided((1, 256), (8 * pitch, 1))
        assert (forms.readable(row) is row) == in_place


# --- a multiprocessor -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(forms.INPUTS), ids=str)
def test_registers_of_a_thread(dtype: torch.dtype) -> None:
    """As many as so many warps can have of 64 Ki, which warps get in eights for each thread."""
    for prologue in (blocks.PLAIN, blocks.GATED, blocks.NORMED, blocks.ADDED):
        macros = blocks.macros(dtype, 16, True, forms.CODES, 0, prologue)
        assert macros["REGISTERS"] == 65536 // (AT_ONCE[dtype.itemsize] * 32) // 8 * 8


# Rows of 8 blocks share a warp, of 16 and of 32 they have one; those of five are a team of three,
# each block with slots of its own.
@pytest.mark.parametrize(
    ("of_row", "tile", "slots"), [(8, 16, 12), (16, 16, 12), (5, 16, 16), (32, 32, 12)]
)
@pytest.mark.parametrize(("size", "most"), [(2, 4), (4, 3)])
def test_the_last_byte_of_a_multiprocessor(
    size: int,
    most: int,
    of_row: int,
    tile: int,
    slots: int,
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each thread block has 1 KiB more than it asks for, of what all may ask for and one KiB."""
    monkeypatch.setattr(blocks, "_tile", lambda *_: tile)
    monkeypatch.setattr(blocks, "_shape", blocks._shape.__wrapped__)  # it remembers
    each = 4 * tile * (size * 128 + GATHERED) + 4 * 4 * (8 + 2 * 4 * slots) + KEPT
    for count in range(2, most + 1):
        for less, at_once in ((0, count), (1, count - 1)):
            device.shared = count * each - KEPT - less
            assert blocks._grid(10**6, of_row, None, size)[0] == at_once  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "most"), [(2, 4), (4, 3)])
def test_memory_for_more(size: int, most: int, device: Device) -> None:
    """Registers alone say how many run at once."""
    device.shared = 1024 * 1024
    assert blocks._grid(10**6, 16, None, size)[0] == most  # type: ignore[arg-type]


def test_a_kernel_that_nothing_more_is_asked_of(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no prologue, and neither shows nor saves anything."""
    seen: list[tuple[dict[str, int], int]] = []
    monkeypatch.setattr(cuda, "load", lambda code, *_, shared, **__: seen.append((code, shared)))
    given = (torch.bfloat16, 16, True, forms.INTEGERS, 0)
    blocks._kernel(blocks._shape(32), *given, None)
    blocks._kernel(blocks._shape(32), *given, None, blocks.PLAIN, False, 0)
    assert seen == [(blocks.macros(*given), 4 * 32 * (2 * 128 + GATHERED))] * 2
    macros = seen[0][0]
    assert (macros["PROLOGUE"], macros["SHOWN"], macros["SAVED"]) == (blocks.PLAIN, 0, 0)


@pytest.mark.parametrize("few", [True, False])
def test_which_kernel_is_given_what(few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """rows.cu has few rows, as they are or of a norm; what stands at which address, it is told."""
    rows, d = 3, 256
    x, other = halves(torch.randn(rows, 512).bfloat16())
    weight, program = torch.ones(d, dtype=torch.bfloat16), ops.program(parse(FOUR), x)
    asked: list[tuple[Any, ...]] = []
    given: list[tuple[Any, ...]] = []
    monkeypatch.setattr(by_row, "takes", lambda *told: asked.append(told) or few)
    monkeypatch.setattr(by_row, "launch", lambda *told: given.append(told))
    grid = 1, (0,) * 6, blocks.Shape(1, 1, 2, 4, 16)
    monkeypatch.setattr(blocks, "_grid", lambda *_, **__: grid)
    other_kernel = SimpleNamespace(launch=lambda *_: given.append(("blocks.cu",)))
    monkeypatch.setattr(blocks, "_kernel", lambda *_, **__: other_kernel)

    how = forms.INTEGERS, 0
    for prologue in (blocks.PLAIN, blocks.GATED, blocks.NORMED, blocks.ADDED):
        asked.clear()
        given.clear()
        norm = weight if prologue in (blocks.NORMED, blocks.ADDED) else None
        if prologue == blocks.PLAIN:
            blocks.launch(x, program, *how, rows, d, 11, 12, 13, 14, 15, 4)
        else:
            second = None if prologue == blocks.NORMED else other
            blocks.launch_prologue(
                x, second, program, *how, prologue, 11, 12, 14, 17, norm, 0.25, 13, 15, 4, 16
            )
        taken = prologue in (blocks.PLAIN, blocks.NORMED)
        assert asked == [(rows, d, torch.bfloat16)] * taken
        (told,) = given
        if not (few and taken):
            assert told == ("blocks.cu",)
            continue
        read, *most, of_norm, shown = told
        assert read.data_ptr() == x.data_ptr()
        assert most == [program, *how, rows, d, 11, 12, 13, 14, 15, 4]
        if prologue == blocks.PLAIN:
            assert (of_norm, shown) == (None, 0)
        else:
            assert torch.equal(of_norm[0], weight)
            assert (of_norm[1], shown) == (0.25, 16)
    asked.clear()
    blocks.quantize(x.contiguous(), program, form=how[0])
    assert asked == [(rows, d, torch.bfloat16)] * 2
