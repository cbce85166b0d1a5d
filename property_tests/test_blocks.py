"""The quantizer in CUDA C++: what it takes, that it compiles, and its rows on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

import quest
from property_tests.ledger import LEDGER
from quest import operands, ops, packing
from quest.conformance import examine, inputs
from quest.conformance.lanes import Lane
from quest.kernels import blocks, cuda, forms, outputs, pack
from quest.kernels import rows as by_row
from quest.quantizer import parse

LANE = Lane("triton-cuda", "cuda", "dispatch")
SPECS = (
    "uniform1/hadamard128/clip1.3/dense",
    "uniform2/hadamard128/ste/dense",
    "uniform3/hadamard128/trust1.0/dense",
    "uniform4/hadamard128/trust1.0/dense",
    "uniform8/hadamard128/trust1.5/dense",
    "ternary/hadamard128/trust1.0/dense",
)
# Of 16 bits rows of 1 and 4 blocks share a warp; those of 5, 12, 33 and 44 a team, three, four,
# three and two of them; 16 and 28 blocks have a warp of their own, 86 a team; the last is the
# widest. Of float32 a warp holds 16 blocks of all but the last: rows of 33 and more have a team.
WIDTHS = (128, 512, 640, 1536, 2048, 3584, 4224, 5632, 11008, 49152)
KINDS = ("gaussian", "heavy", "mixed_rows", "non_finite", "outlier")


def _variants(specs: tuple[str, ...] = SPECS) -> list[tuple[int, bool, int, int]]:
    made = []
    for spec in specs:
        grid, edge = parse(spec).require_grid(), "/ste/" not in spec
        made.append((grid.levels, edge, forms.VALUES, 0))
        made.append((grid.levels, edge, forms.CODES, 0))
        made.append((grid.levels, edge, forms.PACKED, grid.storage_bits))
        if grid.levels < 256:
            made.append((grid.levels, edge, forms.INTEGERS, 0))
    return made


# Compiling takes half a second: the grids differ alike in every dtype, and float32 is in two.
COMPILED = [(t, *v) for t in (torch.bfloat16, torch.float16) for v in _variants()]
COMPILED += [(torch.float32, *v) for v in _variants((SPECS[0], SPECS[3]))]


@pytest.mark.parametrize(("dtype", "levels", "edge", "form", "bits"), COMPILED, ids=str)
def test_every_variant_compiles_without_a_gpu(
    dtype: torch.dtype, levels: int, edge: bool, form: int, bits: int
) -> None:
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    macros = blocks.macros(dtype, levels, edge, form, bits)
    made = cuda.compile_("blocks.cu", "sm_90a", macros, cached=False)
    assert made.code[:4] == b"\x7fELF"
    assert b"quantize" in made.code


# Rows that share a warp, or have several, and teams of several rows; above each has one of its own,
# of 32 blocks.
SHAPES = {
    (dtype, (made.rows, made.kind, made.tile))
    for dtype in (torch.bfloat16, torch.float32)
    for made in (blocks._shape(n, size=dtype.itemsize) for n in (*range(1, 49), 64, 384))
} - {(torch.bfloat16, (1, 1, 32))}
PLACED = [
    (dtype, prologue, *shape)
    for dtype, shape in sorted(SHAPES, key=str)
    for prologue in (blocks.PLAIN, blocks.GATED, blocks.NORMED, blocks.ADDED)
    if dtype != torch.float32 or prologue == blocks.PLAIN
]


@pytest.mark.parametrize(("dtype", "prologue", "rows", "warps", "tile"), PLACED, ids=str)
def test_every_shape_compiles_without_a_gpu(
    dtype: torch.dtype, prologue: int, rows: int, warps: int, tile: int
) -> None:
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    macros = blocks.macros(
        dtype, 16, False, forms.INTEGERS, 0, prologue, rows=rows, warps=warps, tile=tile
    )
    made = cuda.compile_("blocks.cu", "sm_90a", macros, cached=False)
    assert b"quantize" in made.code


# What is narrow is gathered: of 16 blocks a warp's lanes write it in fewer turns, or half of them.
NARROW = [
    (dtype, *asked)
    for dtype in forms.INPUTS
    for asked in (
        (2, True, forms.PACKED, 1, 0), (4, True, forms.PACKED, 2, 0),
        (3, True, forms.INTEGERS, 0, 2), (16, True, forms.INTEGERS, 0, 4),
        (16, True, forms.VALUES, 0, 0), (256, True, forms.CODES, 0, 0),
    )
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "levels", "edge", "form", "bits", "saved"), NARROW, ids=str)
def test_every_form_of_short_rows_compiles_without_a_gpu(
    dtype: torch.dtype, levels: int, edge: bool, form: int, bits: int, saved: int
) -> None:
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    macros = blocks.macros(dtype, levels, edge, form, bits, saved=saved, warps=0, tile=16)
    made = cuda.compile_("blocks.cu", "sm_90a", macros, cached=False)
    assert b"quantize" in made.code


# One bit packed, integers and codes, without a mask: what a prologue's rows become.
PROLOGUES = [
    (prologue, t, levels, form, bits, shown)
    for prologue in (blocks.GATED, blocks.NORMED, blocks.ADDED)
    for t in (torch.bfloat16, torch.float16)
    for levels, form, bits in (
        (2, forms.PACKED, 1), (2, forms.INTEGERS, 0), (3, forms.INTEGERS, 0),
        (8, forms.INTEGERS, 0), (16, forms.INTEGERS, 0), (256, forms.CODES, 0),
    )
    for shown in (False, True)
    if t == torch.bfloat16 or levels == 16  # all grids differ alike in both
]  # fmt: skip


@pytest.mark.parametrize(
    ("prologue", "dtype", "levels", "form", "bits", "shown"), PROLOGUES, ids=str
)
def test_every_prologue_compiles_without_a_gpu(
    prologue: int, dtype: torch.dtype, levels: int, form: int, bits: int, shown: bool
) -> None:
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    macros = blocks.macros(dtype, levels, False, form, bits, prologue, shown)
    made = cuda.compile_("blocks.cu", "sm_90a", macros, cached=False)
    assert b"quantize" in made.code


# What a gate that is trained ends in: with a mask, and what is saved.
TRAINED = [
    (t, levels, edge, form, bits, saved)
    for t in (torch.bfloat16, torch.float16)
    for levels, form, bits, saved in (
        (2, forms.PACKED, 1, 0), (3, forms.INTEGERS, 0, 2), (4, forms.INTEGERS, 0, 2),
        (16, forms.INTEGERS, 0, 4), (32, forms.INTEGERS, 0, 0), (256, forms.CODES, 0, 0),
    )
    for edge in (False, True)
    if t == torch.bfloat16 or levels == 16
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "levels", "edge", "form", "bits", "saved"), TRAINED, ids=str)
def test_every_gate_that_is_trained_compiles_without_a_gpu(
    dtype: torch.dtype, levels: int, edge: bool, form: int, bits: int, saved: int
) -> None:
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    macros = blocks.macros(dtype, levels, edge, form, bits, blocks.GATED, saved=saved)
    made = cuda.compile_("blocks.cu", "sm_90a", macros, cached=False)
    assert b"quantize" in made.code


@pytest.mark.whole
@pytest.mark.parametrize("prologue", [blocks.GATED, blocks.NORMED, blocks.ADDED])
def test_a_prologue_of_float32_does_not_compile(prologue: int) -> None:
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    macros = blocks.macros(torch.float32, 16, False, forms.INTEGERS, 0, prologue)
    with pytest.raises(RuntimeError, match="a prologue takes 16 bits"):
        cuda.compile_("blocks.cu", "sm_90a", macros, cached=False)


# Of the grids that are packed for the backward, with a mask and without.
SAVES = [
    (t, levels, edge, saved)
    for t in forms.INPUTS
    for levels, saved in ((3, 2), (4, 2), (8, 4), (16, 4))
    for edge in (False, True)
]


@pytest.mark.parametrize(("dtype", "levels", "edge", "saved"), SAVES, ids=str)
def test_every_variant_that_saves_compiles_without_a_gpu(
    dtype: torch.dtype, levels: int, edge: bool, saved: int
) -> None:
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    macros = blocks.macros(dtype, levels, edge, forms.INTEGERS, 0, saved=saved)
    made = cuda.compile_("blocks.cu", "sm_90a", macros, cached=False)
    assert b"quantize" in made.code


@pytest.mark.whole
@pytest.mark.parametrize(
    ("form", "saved"),
    [
        *((forms.INTEGERS, n) for n in (1, 3, 5, 6, 8)),
        *((form, n) for form in (forms.VALUES, forms.PACKED, forms.CODES) for n in (2, 4)),
    ],
)
def test_what_is_not_saved_does_not_compile(form: int, saved: int) -> None:
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    macros = blocks.macros(torch.bfloat16, 4, True, form, 1, saved=saved)
    with pytest.raises(RuntimeError, match="integers are saved in 2 or 4 bits"):
        cuda.compile_("blocks.cu", "sm_90a", macros, cached=False)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("blocks_of_row", [*range(1, 49), 64, 86, 112, 192, 384])
def test_thread_blocks_fit_a_multiprocessor(
    blocks_of_row: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a launch with so many thread blocks all run at once; tiles leave room for the warps."""
    monkeypatch.setattr(cuda, "shared", lambda _: 227 * 1024)
    monkeypatch.setattr(cuda, "processors", lambda _: 10)
    count, _, shape = blocks._grid(10**6, blocks_of_row, 0, size)
    warps = shape.warps * shape.teams
    each = blocks._bytes(shape, size) + forms.RESERVED
    assert each >= warps * shape.tile * (size * 128 + blocks.GATHERED) + forms.RESERVED
    assert count % 10 == 0
    assert count // 10 * each <= 228 * 1024
    assert count // 10 * warps * 32 * blocks.REGISTERS[size] <= 65536
    most = {2: 16, 4: 12}[size] // warps
    # Of float32 slots of each thread leave room for one less, where a warp holds 32 blocks.
    assert most - (size == 4 and shape.rows > 1 and shape.tile == 32) <= count // 10 <= most


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("blocks_of_row", [*range(1, 49), 86, 112, 192, 193, 384])
def test_shapes_fit_a_thread_block(blocks_of_row: int, size: int) -> None:
    for several in (True, False):
        rows, warps, segment, teams, tile = shape = blocks._shape(blocks_of_row, several, size)
        assert tile in (16, 32)
        assert segment in (blocks_of_row, tile)
        if segment == tile:
            assert rows * blocks_of_row <= warps * tile < rows * blocks_of_row + tile
        assert 1 <= warps * teams <= 12
        assert blocks._bytes(shape, size) <= 227 * 1024


@pytest.mark.parametrize(
    ("spec", "dtype", "width"),
    [
        ("uniform4/hadamard128/trust1.0/dense", torch.float32, 49280),
        ("uniform4/hadamard64/trust1.0/dense", torch.bfloat16, 256),
        ("uniform4/hadamard128/trust1.0/2:4", torch.bfloat16, 256),
        ("uniform4/hadamard128/trust0.5/dense", torch.bfloat16, 256),
        ("e2m1/hadamard128/trust1.0/dense", torch.bfloat16, 256),
        ("uniform4/hadamard128/trust1.0/dense", torch.bfloat16, 49280),
        ("uniform4/hadamard128/trust1.0/dense", torch.bfloat16, 256),  # right, but on a CPU
    ],
)
def test_what_is_left_to_the_other_kernel(
    spec: str, dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.empty(1, width, dtype=dtype)
    program = ops.program(parse(spec), x)
    assert not blocks.supports(program, x)
    # The last is right but for the device.
    monkeypatch.setattr(cuda, "unavailable", lambda _: None)
    monkeypatch.setattr(cuda, "shared", lambda _: 227 * 1024)
    assert blocks.supports(program, x) == (spec == SPECS[3] and width == 256)


def test_limits_of_a_device_and_of_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "unavailable", lambda _: None)
    x = torch.empty(1, 28672, dtype=torch.bfloat16)
    program = ops.program(parse(SPECS[3]), x)
    for limit, fits in ((227 * 1024, True), (67 * 1024, False)):
        monkeypatch.setattr(cuda, "shared", lambda _, limit=limit: limit)
        assert blocks.supports(program, x) == fits
    monkeypatch.setattr(cuda, "shared", lambda _: 227 * 1024)
    for step, fits in ((0.0103, False), (0.0104, True)):  # sqrt(28672) / 2^14 lies between
        assert blocks.supports(dataclasses.replace(program, step=step), x) == fits


@pytest.mark.parametrize("dtype", list(forms.INPUTS), ids=str)
def test_the_last_byte_of_a_thread_block(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles and exchanges have room wherever they are taken, and rows are wherever they have."""
    monkeypatch.setattr(cuda, "unavailable", lambda _: None)
    # Four exchanges for each of four teams, with slots for twelve warps. Three rows of 40 blocks
    # have four warps of 32, and three of 20 four warps of 16, whose blocks have slots; two of seven
    # one of 16, of which there are four. Two of 44 have three of 32, and one by itself has more.
    alone = 4 * 4 * (8 + 2 * 4 * 12)
    monkeypatch.setattr(blocks, "_shape", blocks._shape.__wrapped__)
    for width, tiles, tile, more in (
        (28672, 7, 32, alone), (5120, 4, 32, 4 * (8 + 2 * 4 * 128)),
        (2560, 4, 16, 4 * (8 + 2 * 4 * 64)), (2048, 4, 16, alone),
        (896, 4, 16, 4 * 4 * (8 + 2 * 4 * 16)), (5632, 4, 32, alone),
    ):  # fmt: skip
        x = torch.empty(1, width, dtype=dtype)
        program = ops.program(parse(SPECS[3]), x)
        monkeypatch.setattr(blocks, "_tile", lambda *_, tile=tile: tile)
        each = tiles * tile * (dtype.itemsize * 128 + 48) + more
        for limit, fits in ((each - 1, False), (each, True)):
            monkeypatch.setattr(cuda, "shared", lambda _, limit=limit: limit)
            assert blocks.supports(program, x) == fits


def test_sums_that_it_does_not_make() -> None:
    x = torch.empty(1, 256, dtype=torch.bfloat16)
    program = ops.program(parse(SPECS[3]), x)
    with pytest.raises(ValueError, match="there are no sums of form 1 with 4 bits"):
        blocks.quantize(x, program, form=forms.PACKED, bits=4, sums=True)


@pytest.mark.parametrize(
    ("form", "levels", "saved"),
    [(forms.CODES, 16, 4), (forms.PACKED, 16, 4), (forms.INTEGERS, 16, 2),
     (forms.INTEGERS, 32, 4), (forms.INTEGERS, 4, 8), (forms.INTEGERS, 4, 3)],
)  # fmt: skip
def test_what_it_does_not_save(form: int, levels: int, saved: int) -> None:
    x = torch.empty(1, 256, dtype=torch.bfloat16)
    program = dataclasses.replace(ops.program(parse(SPECS[3]), x), levels=levels)
    told = f"at most 2 or 4 bits can be saved in as many, got form {form} of {levels} levels in"
    with pytest.raises(ValueError, match=told):
        blocks.quantize(x, program, form=form, saved=saved)


def _needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reason = cuda.unavailable(torch.device("cuda", torch.cuda.current_device()))
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=["blocks.cu", "rows.cu"])
def by_either(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each of the kernels, whatever the rule between them says of so many rows."""
    with by_row.only(request.param == "rows.cu"):
        yield


@pytest.mark.usefixtures("by_either")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", list(forms.INPUTS), ids=str)
def test_rows(dtype: torch.dtype, spec: str, width: int) -> None:
    _needs_gpu()
    q = parse(spec)
    probe = torch.empty(1, width, dtype=dtype, device="cuda")
    assert blocks.supports(ops.program(q, probe), probe)
    kind = (operands.kinds(q, q) or ("",))[0]
    for i, distribution in enumerate(KINDS):
        rows = (1, 9, 33)[i % 3] if width < 10000 else 5
        x = inputs.draw(distribution, (rows, width), dtype, i)
        told = f"{distribution}, {rows} rows of {width}, {spec}"
        LEDGER.judge(LANE, examine.quantizer(LANE, x, q, conclusive=i == 0), told)
        LEDGER.judge(LANE, examine.encoded(LANE, x, q, kind), told)


@pytest.mark.parametrize("spec", SPECS)
def test_the_kernel_of_those_without_a_compiler(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's, compiled, where this one would stand before it."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(blocks, "supports", lambda *_: False)
    q = parse(spec)
    kind = (operands.kinds(q, q) or ("",))[0]
    for i, distribution in enumerate(KINDS):
        x = inputs.draw(distribution, (9, 384), torch.bfloat16, i)
        told = f"{distribution}, Triton, {spec}"
        LEDGER.judge(LANE, examine.quantizer(LANE, x, q, conclusive=i == 0), told)
        LEDGER.judge(LANE, examine.encoded(LANE, x, q, kind), told)


@pytest.mark.parametrize("width", [256, 768, 2048, 4096, 5632, 11008])
@pytest.mark.parametrize("dtype", list(forms.INPUTS), ids=str)
def test_many_turns_of_a_block(
    dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One multiprocessor has all rows, special ones among them: the same as by themselves."""
    _needs_gpu()
    monkeypatch.setattr(by_row, "takes", lambda *_: False)
    x = torch.randn(500, width, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    x[::7] *= 1e-30
    x[3::11] = 0
    x[5::13, 0] = torch.nan
    x[6::17] *= 1e4
    x = x.to(dtype)
    for spec, form, bits, saved in (
        (SPECS[0], forms.PACKED, 1, 0),
        (SPECS[3], forms.INTEGERS, 0, 0),
        (SPECS[3], forms.INTEGERS, 0, 4),
        (SPECS[5], forms.INTEGERS, 0, 2),
    ):
        program = ops.program(parse(spec), x)
        how = {"form": form, "bits": bits, "sums": True, "saved": saved}
        apart = [blocks.quantize(rows, program, **how) for rows in x.split(20)]
        with monkeypatch.context() as patch:
            patch.setattr(cuda, "processors", lambda _: 1)
            made = blocks.quantize(x, program, **how)
        for i, t in enumerate(made):
            expected = torch.cat([each[i] for each in apart])
            assert torch.equal(t.view(torch.uint8), expected.view(torch.uint8))


SPECIAL = ("gaussian", "heavy", "mixed_rows", "non_finite", "outlier", "zeros", "huge", "tiny")


@pytest.mark.usefixtures("by_either")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("levels", "dtype"),
    [(n, torch.bfloat16) for n in range(3, 17)]
    + [(n, t) for n in (3, 4, 16) for t in (torch.float16, torch.float32)],
    ids=str,
)
def test_what_is_saved(levels: int, dtype: torch.dtype, width: int) -> None:
    """Bit for bit what packing makes of the operand; all else as without it."""
    _needs_gpu()
    probe = torch.empty(1, width, dtype=dtype, device="cuda")
    # A grid of every size, whose outermost points are 2 sigma from zero.
    program = dataclasses.replace(
        ops.program(parse(SPECS[3]), probe), levels=levels, step=4 / levels, threshold=1.5
    )
    stride, top = (1, levels // 2) if levels % 2 else (2, levels - 1)
    while 2 * top < 128:  # int8 has room
        stride, top = 2 * stride, 2 * top
    for i, distribution in enumerate(SPECIAL):
        rows = (1, 9, 33)[i % 3] if width < 10000 else 5
        x = inputs.draw(distribution, (rows, width), dtype, i).cuda()
        plain = blocks.quantize(x, program, form=forms.INTEGERS, sums=True)
        for saved in (2, 4)[levels > 4 :]:
            for byte in (0x00, 0xA5):
                with outputs.poisoned(byte):
                    made = blocks.quantize(x, program, form=forms.INTEGERS, sums=True, saved=saved)
                for t, expected in zip(made[:4], plain[:4], strict=True):
                    assert torch.equal(t.view(torch.uint8), expected.view(torch.uint8))
                assert torch.equal(made[4], pack.pack(made[0], saved, stride, top))
                index = (made[0].cpu().int() + top) // stride
                assert torch.equal(made[4].cpu(), packing.pack(index, saved))


def test_an_unaligned_view() -> None:
    _needs_gpu()
    q = quest.recipe("w4a4").activation
    flat = torch.randn(1 + 3 * 256, device="cuda").bfloat16()
    x = flat[1:].view(3, 256)
    assert torch.equal(q(x), q(x.clone()))
