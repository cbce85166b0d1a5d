"""The operand of an input in inference, and its CUDA C++ kernel for few rows."""

from __future__ import annotations

import pytest
import torch

import quest
from property_tests.ledger import LEDGER
from quest import lowbit, operands, ops
from quest.conformance import examine, inputs
from quest.conformance.lanes import Lane
from quest.kernels import blocks, cuda, forms, outputs, rows
from quest.quantizer import parse

LANE = Lane("triton-cuda", "cuda", "dispatch")
SPECS = (
    "uniform1/hadamard128/ste/dense",
    "uniform3/hadamard128/ste/dense",
    "uniform4/hadamard128/trust1.0/dense",  # a mask that it does not make
    "uniform8/hadamard128/ste/dense",
    "ternary/hadamard128/ste/dense",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One block; a warp that is not full; whole warps; a block more; as many groups as warps, and more.
WIDTHS = (128, 640, 1024, 4096, 4224, 11008, 16384, 17408, 49152)
KINDS = ("gaussian", "heavy", "mixed_rows", "non_finite", "outlier", "zeros")


def _kind(spec: str) -> str:
    return (operands.kinds(parse(spec), parse(spec)) or ("",))[0]


@pytest.mark.parametrize("width", [5632, 17408])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_variant_compiles_without_a_gpu(dtype: torch.dtype, spec: str, width: int) -> None:
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    for normed in (False, True):
        levels, how = parse(spec).require_grid().levels, forms.OPERANDS[_kind(spec)]
        macros = rows.macros(dtype, levels, False, *how, rows.shape(width), normed, 0)
        if normed and dtype == torch.float32:
            with pytest.raises(RuntimeError, match="a norm takes 16 bits"):
                cuda.compile_("rows.cu", "sm_90a", macros, cached=False)
            continue
        made = cuda.compile_("rows.cu", "sm_90a", macros, cached=False)
        assert made.code[:4] == b"\x7fELF"
        assert b"rows" in made.code


# With a mask: grid, form, bits, bits saved.
MASKED = (
    (2, forms.PACKED, 1, 0), (16, forms.PACKED, 4, 0), (4, forms.INTEGERS, 0, 2),
    (16, forms.INTEGERS, 0, 4), (16, forms.VALUES, 0, 0), (256, forms.CODES, 0, 0),
)  # fmt: skip


@pytest.mark.parametrize(("levels", "form", "bits", "saved"), MASKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_form_with_a_mask_compiles_without_a_gpu(
    dtype: torch.dtype, levels: int, form: int, bits: int, saved: int
) -> None:
    """Of short rows, a warp each."""
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    macros = rows.macros(dtype, levels, True, form, bits, rows.shape(1024), False, saved)
    assert cuda.compile_("rows.cu", "sm_90a", macros, cached=False).code[:4] == b"\x7fELF"


def test_warps_of_a_row() -> None:
    """As many as its blocks need, up to what a thread block may have."""
    assert {d: rows.shape(d).warps for d in (128, 1024, 1152, 4096, 16384, 65536)} == {
        128: 1, 1024: 1, 1152: 2, 4096: 4, 16384: 16, 65536: 16,
    }  # fmt: skip


def _needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reason = cuda.unavailable(torch.device("cuda", torch.cuda.current_device()))
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(dtype: torch.dtype, spec: str, width: int) -> None:
    _needs_gpu()
    q = parse(spec)
    probe = torch.empty(1, width, dtype=dtype, device="cuda")
    assert blocks.supports(ops.program(q, probe), probe)
    for i, distribution in enumerate(KINDS):
        count = (1, 9, 33)[i % 3] if width < 10000 else 5
        assert rows.takes(count, width, dtype)
        x = inputs.draw(distribution, (count, width), dtype, i)
        told = f"{distribution}, {count} rows of {width}, {spec}"
        LEDGER.judge(LANE, examine.operand(LANE, x, q, _kind(spec)), told)


@pytest.mark.parametrize("spec", SPECS)
def test_a_row_is_quantized_by_itself(spec: str) -> None:
    """The same bits whatever lies beside it, in any layout."""
    _needs_gpu()
    x = torch.randn(40, 4224, device="cuda").bfloat16()
    x[::7] *= 1e-30
    x[3::11] = 0
    x[5::13, 0] = torch.nan
    wide = torch.full((40, 4232), torch.nan, device="cuda", dtype=torch.bfloat16)
    wide[:, :4224] = x
    q, kind = parse(spec), _kind(spec)
    whole = lowbit.launch_operand(x, q, kind)
    alone = [lowbit.launch_operand(row, q, kind) for row in x.split(1)]
    strided = lowbit.launch_operand(wide[:, :4224], q, kind)
    for i, t in enumerate(whole):
        expected = torch.cat([each[i] for each in alone])
        assert torch.equal(t.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(t.view(torch.uint8), strided[i].view(torch.uint8))


def test_every_byte_is_written() -> None:
    _needs_gpu()
    x = torch.randn(3, 5, 640, device="cuda").bfloat16()
    made = []
    for byte in (0x00, 0xFF):
        with outputs.poisoned(byte):
            made.append(lowbit.launch_operand(x, parse(SPECS[2]), "integers"))
    for a, b in zip(*made, strict=True):
        assert a.shape[:2] == (3, 5)
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
@pytest.mark.parametrize("shape", [(3, 256), (2, 3, 256), (0, 256), (256,)], ids=str)
def test_the_operator(shape: tuple[int, ...], device: str) -> None:
    made = quest.recipe("w4a4").activation
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    operand, scale, sums = lowbit.operand(x, made.spec, "integers")
    assert operand.shape == shape
    assert scale.shape == sums.shape == (*shape[:-1], 1)
    assert torch.equal(operand.sum(-1, keepdim=True, dtype=torch.int32), sums)
    if device == "cpu":
        same = lowbit.encode(x, made.spec, "integers")
        assert all(map(torch.equal, (operand, scale, sums), (same[0], same[1], same[3])))


@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
def test_opcheck(device: str) -> None:
    x = torch.randn(3, 256, device=device)
    spec = quest.recipe("w1a1").activation.spec
    torch.library.opcheck(torch.ops.quest.operand, (x, spec, "bits"))


def test_wrong_input() -> None:
    spec = quest.recipe("w4a4").activation.spec
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16, got "):
        lowbit.operand(torch.ones(2, 256, dtype=torch.int64), spec, "integers")
    with pytest.raises(ValueError, match="kind must be one of bits, integers, codes, got 'odd'"):
        lowbit.operand(torch.ones(2, 256), spec, "odd")
