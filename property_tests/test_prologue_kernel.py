"""The launcher of prologues in CUDA C++, and what the kernel makes of many rows and layouts."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from property_tests.ledger import LEDGER
from property_tests.prologues import HALVES, SPECS, apart, halves
from quest import lowbit, ops, prologue
from quest.conformance import examine, inputs
from quest.conformance.lanes import Lane
from quest.kernels import blocks, cuda, forms, outputs
from quest.kernels import rows as by_row
from quest.quantizer import parse


def test_what_the_kernel_reads_in_place() -> None:
    wide = torch.zeros(5, 520, dtype=torch.bfloat16)
    assert wide.data_ptr() % 16 == 0
    for t in (wide, wide[:, :256], wide[:, 8:264], wide[2:, 256:512], wide[:1].expand(5, -1)):
        assert forms.readable(t) is t
    for t in (wide[:, 4:260], wide[:, :512:2], wide.t(), wide.as_strided((5, 256), (257, 1))):
        made = forms.readable(t)
        assert made.is_contiguous()
        assert torch.equal(made, t)
        assert made.data_ptr() % 16 == 0
    gate, value = halves(torch.zeros(2, 3, 512, dtype=torch.bfloat16))
    for t in (gate, value):
        rows = lowbit.as_rows(t)
        assert forms.readable(rows).data_ptr() == t.data_ptr()


def test_forms_that_a_prologue_does_not_make() -> None:
    x = torch.ones(2, 256)
    with pytest.raises(ValueError, match="a prologue makes no form 1 with 4 bits"):
        blocks.gated(x, x, None, form=forms.PACKED, bits=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a prologue makes no form 0 with 0 bits"):
        blocks.gated(x, x, None, form=forms.VALUES)  # type: ignore[arg-type]
    program = ops.program(parse(SPECS["w8a8"][0]), x)
    with pytest.raises(ValueError, match="can be saved in as many, got form 2 of 256 levels in 4"):
        blocks.gated(x, x, program, form=forms.CODES, saved=4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("estimator", "edge"), [("ste", False), ("trust1.0", True)])
@pytest.mark.parametrize("saved", [0, 4])
def test_what_a_gate_asks_of_the_kernel(
    saved: int, estimator: str, edge: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask by the threshold where one is asked for, and packed codes; else no address."""
    gate, value = halves(torch.ones(3, 512, dtype=torch.bfloat16))
    program = ops.program(parse(f"uniform4/hadamard128/{estimator}/dense"), gate)
    told: list[Any] = []

    class Kernel:
        def launch(self, *values: Any) -> None:
            told.extend(values)

    def kernel(*asked: Any, **more: Any) -> Kernel:
        told.append((asked, more))
        return Kernel()

    monkeypatch.setattr(blocks, "_kernel", kernel)
    monkeypatch.setattr(cuda, "processors", lambda _: 1)
    monkeypatch.setattr(cuda, "shared", lambda _: 227 * 1024)
    made = blocks.gated(
        gate, value, program, form=forms.INTEGERS, masked=masked, saved=saved
    )  # fmt: skip
    asked, _, x, scale, out, mask, sums, kept = told[:8]
    shape = blocks._shape(2)
    variant = (shape, torch.bfloat16, 16, edge and masked, forms.INTEGERS, 0, None, blocks.GATED)
    assert asked == ((*variant, False, saved), {})
    pointers = (gate, made.scale, made.out, made.mask, made.sums, made.saved)
    assert (x, scale, out, mask, sums, kept) == tuple(map(cuda.pointer, pointers))
    assert (made.mask is not None) == masked
    assert (made.saved is not None) == bool(saved)
    assert made.mask is None or made.mask.shape == (3, 32)
    assert made.saved is None or made.saved.shape == (3, 128)
    assert made.rows is made.added is None


def test_no_kernel_on_a_cpu() -> None:
    x = torch.ones(2, 256, dtype=torch.bfloat16)
    assert not prologue.has_kernel(SPECS["w4a4"][0], x)


def _needs_kernel() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reason = cuda.unavailable(torch.device("cuda", torch.cuda.current_device()))
    if reason is not None:
        pytest.skip(reason)


# As in test_blocks: rows that share a warp or a team, and that have one of their own.
WIDTHS = (128, 640, 1536, 2048, 3584, 4224, 5632, 11008, 49152)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_rows_of_a_kernel(name: str, dtype: torch.dtype, width: int) -> None:
    """Judged, and bit for bit what the kernel without a prologue makes of the rows it shows."""
    _needs_kernel()
    lane, (spec, kind) = Lane("triton-cuda", "cuda", "dispatch"), SPECS[name]
    q = parse(spec)
    pairs = [("gaussian", "heavy"), ("non_finite", "gaussian"), ("mixed_rows", "outlier"),
             ("huge", "huge"), ("tiny", "subnormal"), ("zeros", "gaussian")]  # fmt: skip
    assert prologue.has_kernel(spec, torch.empty(1, width, dtype=dtype, device="cuda"))
    for i, (left, right) in enumerate(pairs):
        rows = (1, 9, 33)[i % 3] if width < 10000 else 5
        gate, value = apart(
            inputs.draw(left, (rows, width), dtype, i), inputs.draw(right, (rows, width), dtype, 9)
        )
        told = f"{left}, {right}, {rows} rows of {width}, {spec}"
        LEDGER.judge(lane, examine.gated(lane, gate, value, q, kind, conclusive=i == 0), told)
        *made, x = prologue.gated_encode_shown(*apart(gate.cuda(), value.cuda()), spec, kind)
        with mock.patch.object(by_row, "takes", return_value=False):  # which adds in another order
            operand, scale, _, sums = lowbit.launch_encode(x, q, kind)
        for t, expected in zip(made, (operand, scale, sums), strict=True):
            assert torch.equal(t.view(torch.uint8), expected.view(torch.uint8)), told


@pytest.mark.parametrize("width", [128, 640, 768, 2048, 5632, 11008])
@pytest.mark.parametrize("name", ["w1a1", "w4a4"])
def test_many_turns_of_a_block(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One multiprocessor has all rows, special ones among them: the same as by themselves."""
    _needs_kernel()
    g = torch.Generator("cuda").manual_seed(0)
    wide = torch.randn(500, 2 * width, device="cuda", generator=g)
    wide[::7] *= 1e-15
    wide[3::11] = 0
    wide[5::13, 0] = torch.nan
    wide[6::17] *= 1e15
    gate, value = halves(wide.bfloat16())
    spec, kind = SPECS[name]
    program = ops.program(parse(spec.replace("ste", "trust1.0")), gate)
    form, bits = forms.OPERANDS[kind]
    how = {"form": form, "bits": bits, "masked": True, "saved": 4 * (kind == "integers")}
    alone = [
        blocks.gated(a, b, program, show=True, **how)
        for a, b in zip(gate.split(20), value.split(20), strict=True)
    ]
    for processors in (1, 132):
        for show in (True, False):
            with monkeypatch.context() as patch, outputs.poisoned(0xA5):
                patch.setattr(cuda, "processors", lambda _, n=processors: n)
                made = blocks.gated(gate, value, program, show=show, **how)
            for i, t in enumerate(made):
                if t is None:
                    continue
                expected = torch.cat([each[i] for each in alone])
                assert torch.equal(t.view(torch.uint8), expected.view(torch.uint8))


# The last is of two turns of the kernel of few rows.
@pytest.mark.parametrize("width", [*WIDTHS, 17408])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["w1a1", "w4a4", "w8a8"])
@pytest.mark.parametrize("few_rows", [False, True])
def test_norms_of_a_kernel(
    few_rows: bool, name: str, dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `test_rows_of_a_kernel`, with a residual and without; few rows, then, by the other."""
    _needs_kernel()
    monkeypatch.setattr(by_row, "takes", lambda *_: few_rows)
    lane, (spec, kind) = Lane("triton-cuda", "cuda", "dispatch"), SPECS[name]
    q, probe = parse(spec), torch.empty(1, width, dtype=dtype, device="cuda")
    assert prologue.has_kernel(spec, probe)
    weight = inputs.draw("gaussian", (width,), dtype, 5)
    pairs = [("gaussian", None), ("heavy", "gaussian"), ("non_finite", None), ("huge", None),
             ("mixed_rows", "outlier"), ("tiny", "zeros"), ("zeros", None)]  # fmt: skip
    for i, (left, right) in enumerate(pairs):
        if few_rows and right is not None:
            continue  # made by blocks.cu, as without
        rows = (1, 9, 33)[i % 3] if width < 10000 else 5
        x = inputs.draw(left, (rows, width), dtype, i)
        residual = None if right is None else inputs.draw(right, (rows, width), dtype, 9)
        found = examine.normed(lane, x, residual, weight, 1e-5, q, kind, conclusive=i == 0)
        told = f"{left}, {right}, {rows} rows of {width}, {spec}"
        LEDGER.judge(lane, found, told)
        given_ = (x.cuda(), None if residual is None else residual.cuda(), weight.cuda(), 1e-5)
        *made, _, shown = prologue.normed_encode_shown(*given_, spec, kind)
        for t, expected in zip(made, lowbit.launch_operand(shown, q, kind), strict=True):
            assert torch.equal(t.view(torch.uint8), expected.view(torch.uint8)), told


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.whole
@pytest.mark.parametrize("few_rows", [False, True])
def test_rows_of_several_warps(
    few_rows: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of two kinds that warps exchange, and weights of every part of a row."""
    _needs_kernel()
    monkeypatch.setattr(by_row, "takes", lambda *_: few_rows)
    lane, (spec, kind) = Lane("triton-cuda", "cuda", "dispatch"), SPECS["w4a4"]
    for width in (4224, 5632, 11008):
        x, residual = (inputs.draw("mixed_rows", (5, width), dtype, i) for i in range(2))
        weight = inputs.draw("gaussian", (width,), dtype, 5)
        for beside in (None, residual):
            found = examine.normed(lane, x, beside, weight, 1e-5, parse(spec), kind)
            LEDGER.judge(lane, found, f"{width}, {dtype}, {beside is not None}")


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("width", [128, 256, 768, 2048, 4096, 5632, 8192])
def test_many_turns_of_a_norm(width: int, adds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One multiprocessor has all rows: the same as by themselves, sums of two kinds in turn."""
    _needs_kernel()
    monkeypatch.setattr(by_row, "takes", lambda *_: False)
    g = torch.Generator("cuda").manual_seed(0)
    wide = torch.randn(500, 2 * width, device="cuda", generator=g)
    wide[::7] *= 1e-15
    wide[3::11] = 0
    wide[5::13, 0] = torch.nan
    wide[6::17] *= 1e25
    x, other = halves(wide.bfloat16())
    weight = torch.randn(width, device="cuda", generator=g).bfloat16()
    program = ops.program(parse(SPECS["w4a4"][0]), x)

    def run(x: Tensor, other: Tensor, show: bool) -> tuple[Tensor | None, ...]:
        residual = other if adds else None
        return blocks.normed(x, residual, weight, 1e-5, program, form=forms.INTEGERS, show=show)

    alone = [run(a, b, True) for a, b in zip(x.split(20), other.split(20), strict=True)]
    for processors in (1, 132):
        for show in (True, False):
            with monkeypatch.context() as patch, outputs.poisoned(0xA5):
                patch.setattr(cuda, "processors", lambda _, n=processors: n)
                made = run(x, other, show)
            for i, t in enumerate(made):
                if t is None:
                    continue
                expected = torch.cat([each[i] for each in alone])
                assert torch.equal(t.view(torch.uint8), expected.view(torch.uint8))


def test_layouts_of_a_kernel() -> None:
    """Rows that lie apart, off a multiple of 16 bytes, or on one another: the same bits."""
    _needs_kernel()
    spec, kind = SPECS["w4a4"]
    for width in (128, 256, 384, 2048, 5632):
        gate, value = torch.randn(2, 9, width, device="cuda").bfloat16()
        expected = prologue.gated_encode_shown(gate, value, spec, kind)
        around = torch.full((9, 2 * width + 24), torch.nan, dtype=torch.bfloat16, device="cuda")
        for at, other in ((0, width), (8, width + 16), (4, width + 8), (1, width + 1)):
            a, b = around[:, at : at + width], around[:, other : other + width]
            around.fill_(torch.nan)
            a.copy_(gate)
            b.copy_(value)
            made = prologue.gated_encode_shown(a, b, spec, kind)
            for t, right in zip(made, expected, strict=True):
                assert torch.equal(t, right)
        same = prologue.gated_encode_shown(gate[:1].expand(9, -1), value, spec, kind)
        again = prologue.gated_encode_shown(gate[:1].repeat(9, 1), value, spec, kind)
        for t, right in zip(same, again, strict=True):
            assert torch.equal(t, right)
