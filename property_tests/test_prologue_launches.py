"""What a prologue's kernel is launched with, where there is one, and what comes back; no GPU.

The kernel is its reference in plain PyTorch, on rows as it takes them: (n, d), 16 bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import quest
from property_tests.prologues import HALVES, SPECS, halves
from quest import eager, lowbit, lowbit_linear, ops, prologue
from quest.kernels import blocks, cuda, forms
from quest.quantizer import parse

pytestmark = pytest.mark.whole

CUDA = torch._C.DispatchKey.CUDA
QUANTIZERS = {parse(spec).require_grid().levels: parse(spec) for spec, _ in SPECS.values()}
KINDS = {how: kind for kind, how in forms.OPERANDS.items()}


def _made(
    rows: Tensor, added: Tensor | None, program: Any, *, form: int, bits: int, show: bool,
    masked: bool = False, saved: int = 0,
) -> blocks.Made:  # fmt: skip
    q = QUANTIZERS[program.levels]
    assert saved in (0, q.require_grid().storage_bits)
    operand, scale, mask, sums, packed = eager.encode_saved(rows, q, KINDS[form, bits])
    return blocks.Made(
        operand, scale, sums, mask if masked else None, packed if saved else None, added,
        rows if show else None,
    )  # fmt: skip


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The name and the first address of each launch; elsewhere, of the launches in its place."""
    seen: list[tuple[str, int]] = []

    def note(name: str, *given: Tensor | None) -> None:
        for t in given:
            assert t is None or (t.ndim == 2 and t.numel() and t.dtype in HALVES)
        assert given[0] is not None
        seen.append((name, given[0].data_ptr()))

    def gated(gate: Tensor, value: Tensor, program: Any, **how: Any) -> blocks.Made:
        note("gated", gate, value)
        return _made(eager.gated(gate, value), None, program, **{"show": False} | how)

    def normed(
        x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, program: Any, **how: Any
    ) -> blocks.Made:
        note("normed", x, residual)
        h, rows = eager.normed(x, residual, weight, eps)
        return _made(rows, None if residual is None else h, program, **how)

    monkeypatch.setattr(blocks, "gated", gated)
    monkeypatch.setattr(blocks, "normed", normed)

    def elsewhere(name: str) -> Callable[..., Any]:
        real: Callable[..., Any] = getattr(eager, name)

        def run(*given: Any) -> Any:
            seen.append((name, 0))
            return real(*given)

        return run

    for name in ("encode", "encode_saved"):
        monkeypatch.setattr(lowbit, f"launch_{name}", elsewhere(name))
    return seen


def _there(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a kernel for 16 bits."""
    monkeypatch.setattr(prologue, "has_kernel", lambda spec, x: parse(spec) and x.dtype in HALVES)


def _pair(dtype: torch.dtype, *lead: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return halves(torch.randn(*lead, 512, generator=g).to(dtype))


def _same(made: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    for t, other in zip(made, expected, strict=True):
        assert t.dtype == other.dtype
        assert torch.equal(t, other)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_gate(
    dtype: torch.dtype, name: str, launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch for 16 bits, which reads the inputs where they lie; rows where asked for."""
    _there(monkeypatch)
    spec, kind = SPECS[name]
    for lead in ((2, 3), (), (0,)):
        gate, value = _pair(dtype, *lead)
        one = ("gated", gate.data_ptr())
        expected = [one if dtype in HALVES and gate.numel() else ("encode", 0)]
        found = prologue.eager_gated_encode(gate, value, spec, kind)
        *made, rows = prologue.launch_gated_encode(gate, value, spec, kind)
        assert rows is None
        _same(tuple(made), found[:3])
        *made, rows = prologue.launch_gated_encode(gate, value, spec, kind, True)
        _same((*made, rows), found)
        assert launched == expected * 2
        launched.clear()


@pytest.mark.parametrize("name", SPECS)
def test_a_gate_that_is_trained(
    name: str, launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a mask, and with the operand as it waits for the backward."""
    _there(monkeypatch)
    q, kind = parse(SPECS[name][0]), SPECS[name][1]
    for dtype in (torch.float32, *HALVES):
        for rows in (3, 0):
            gate, value = _pair(dtype, rows)
            one = ("gated", gate.data_ptr())
            made = prologue.launch_encode_gated(gate, value, q, kind)
            _same(made, eager.encode_gated(gate, value, q, kind))
            assert launched == [one if rows and dtype in HALVES else ("encode_saved", 0)]
            launched.clear()


@pytest.mark.parametrize("name", SPECS)
def test_a_gate_before_a_weight_that_is_not_frozen(
    name: str, launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a backward: operand, scale and sums alone, as on the CPU."""
    _there(monkeypatch)
    q, kind = parse(SPECS[name][0]), SPECS[name][1]
    gate, value = _pair(torch.bfloat16, 3)
    cuda, cpu = lowbit_linear._CUDA, lowbit_linear._CPU
    made = cuda.gated_operand(gate, value, q, kind)
    _same(made, cpu.gated_operand(gate, value, q, kind))
    assert launched == [("gated", gate.data_ptr())]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("adds", [False, True])
def test_a_norm(
    adds: bool, name: str, launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a gate; and the sum with a residual, in one piece."""
    _there(monkeypatch)
    spec, kind = SPECS[name]
    for dtype in (torch.float32, *HALVES):
        weight = torch.linspace(-1, 2, 256).to(dtype)
        for lead in ((2, 3), (), (0,)):
            x, other = _pair(dtype, *lead)
            if lead == (2, 3):  # dense, and no row in one piece
                x, other = (t.mT.contiguous().mT for t in (x, other))
            given = (x, other if adds else None, weight, 0.25, spec, kind)
            found = prologue.eager_normed_encode(*given)
            assert found[3].is_contiguous()
            assert torch.equal(found[3], other + x if adds else x.new_empty(0))
            *made, rows = prologue.launch_normed_encode(*given)
            assert rows is None
            _same(tuple(made), found[:4])
            *made, rows = prologue.launch_normed_encode(*given, True)
            _same((*made, rows), found)
            assert made[3].is_contiguous()
            taken = "normed" if dtype in HALVES and x.numel() else "encode"
            assert [name for name, _ in launched] == [taken] * 2
            launched.clear()


def test_what_the_operators_run_on_cuda(launched: list[Any]) -> None:
    """The same results as on the CPU, and as many, as fakes tell; by what launches kernels."""
    gate, value = _pair(torch.float32, 3)
    weight = torch.linspace(-1, 2, 256)
    for name, given, count in (
        ("gated_encode", (gate, value), 3), ("gated_encode_shown", (gate, value), 4),
        ("normed_encode", (gate, value, weight, 0.25), 4),
        ("normed_encode_shown", (gate, value, weight, 0.25), 5),
    ):  # fmt: skip
        overload = getattr(torch.ops.quest, name).default
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"quest::{name}", "CUDA")
        assert len(overload._schema.returns) == count
        expected = overload(*given, *SPECS["w4a4"])
        meta = [t.to("meta") if isinstance(t, Tensor) else t for t in given]
        fake = overload(*meta, *SPECS["w4a4"])
        assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in expected]
        assert not launched
        made = overload._op_dk(CUDA, *given, *SPECS["w4a4"])
        assert launched == [("encode", 0)]
        launched.clear()
        assert len(made) == count
        _same(made, expected)


# --- where there is a kernel ------------------------------------------------------------------


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of shared memory that a thread block of the device here has."""
    made = [2**20]
    monkeypatch.setattr(cuda, "unavailable", lambda _: None)
    monkeypatch.setattr(cuda, "shared", lambda _: made[0])
    prologue._fits_there.cache_clear()
    yield made
    prologue._fits_there.cache_clear()


def _like(dtype: torch.dtype, is_cuda: bool = True) -> Any:
    return SimpleNamespace(dtype=dtype, shape=(1, 3, 256), is_cuda=is_cuda, device="cpu")


def test_for_which_rows_there_is_a_kernel(shared: list[int]) -> None:
    """16 bits on CUDA, where the quantizer has one."""
    four = SPECS["w4a4"][0]
    for dtype in HALVES:
        assert prologue.has_kernel(four, _like(dtype))
        assert not prologue.has_kernel(four, _like(dtype, False))
        for other in (
            "uniform4/hadamard32/ste/dense", "uniform4/hadamard128/ste/2:4",
            "lloyd_max4/hadamard128/ste/dense", quest.recipe("bf16").activation.spec,
        ):  # fmt: skip
            assert not prologue.has_kernel(other, _like(dtype))
    for dtype in (torch.float32, torch.float64, torch.int16):
        assert not prologue.has_kernel(four, _like(dtype))


def test_what_rows_take_of_shared_memory(shared: list[int]) -> None:
    four, bytes_ = SPECS["w4a4"][0], blocks._bytes(blocks._shape(2), 2)
    for less, there in ((1, False), (0, True)):
        shared[0] = bytes_ - less
        prologue._fits_there.cache_clear()
        for dtype in HALVES:
            assert prologue.has_kernel(four, _like(dtype)) is there


def test_the_question_takes_no_memory(monkeypatch: pytest.MonkeyPatch, shared: list[int]) -> None:
    seen: list[Tensor] = []

    def supports(program: Any, x: Tensor) -> bool:
        seen.append(x)
        return program.levels == 16

    monkeypatch.setattr(blocks, "supports", supports)
    assert prologue.has_kernel(SPECS["w4a4"][0], _like(torch.float16))
    assert [(t.numel(), t.shape[-1]) for t in seen] == [(0, 256)]


# --- wrong input ------------------------------------------------------------------------------

X, ONES = torch.ones(2, 256), torch.ones(256)
GATES: tuple[Callable[..., Any], ...] = (
    prologue.eager_gated_encode, prologue.launch_gated_encode, prologue._fake,
)  # fmt: skip
NORMS: tuple[Callable[..., Any], ...] = (
    prologue.eager_normed_encode, prologue.launch_normed_encode, prologue._fake_norm,
)  # fmt: skip
FOUR = SPECS["w4a4"]


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be computed."""
    for name in ("gated", "normed", "encode", "encoded_like"):
        monkeypatch.delattr(eager, name)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("first", "second", "error", "told"),
    [
        ([1.0], X, TypeError, "FIRST must be a torch.Tensor, got list"),
        (X, X.double(), TypeError,
         "SECOND must be float32, bfloat16 or float16, got torch.float64"),
        (X.int(), X, TypeError, "FIRST must be float32, bfloat16 or float16, got torch.int32"),
        (X, X.half(), TypeError,
         "SECOND must have the dtype of FIRST, torch.float32, got torch.float16"),
        (X, X[:1], ValueError, "FIRST and SECOND must have one shape with at least one axis, got "
         "(2, 256) and (1, 256)"),
        (X.sum(), X.sum(), ValueError, "one shape with at least one axis, got () and ()"),
        (X, X.to("meta"), ValueError, "SECOND must lie where FIRST lies, cpu; got meta"),
    ],
    ids=str,
)  # fmt: skip
def test_pairs_that_do_not_fit(first: Any, second: Any, error: type[Exception], told: str) -> None:
    for one, other in (("gate", "value"), ("x", "residual")):
        expected = re.escape(told.replace("FIRST", one).replace("SECOND", other))
        more = () if one == "gate" else (ONES, 1e-5)
        for run in GATES if one == "gate" else NORMS:
            with pytest.raises(error, match=expected):
                run(first, second, *more, *FOUR)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("weight", [ONES[:128], ONES.half(), ONES.to("meta"), X], ids=str)
def test_weights_that_do_not_fit(weight: Tensor) -> None:
    for run in NORMS:
        with pytest.raises(ValueError, match=r"weight must be torch\.float32 of shape \(256,\) on"):
            run(X, None, weight, 1e-5, *FOUR)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("eps", [0.0, -0.5, math.inf, math.nan])
def test_an_eps_that_is_none(eps: float) -> None:
    for run in NORMS:
        with pytest.raises(ValueError, match=f"eps must be positive and finite, got {eps}"):
            run(X, None, ONES, eps, *FOUR)


@pytest.mark.usefixtures("untouched")
def test_specs_and_kinds_that_do_not_fit() -> None:
    x, ones = X[:, :192].contiguous(), ONES[:192]
    for spec, kind, told in (
        (*FOUR, "width 192 is not divisible"),
        ("uniform4/identity/ste/dense", "bits", "has no operand of kind 'bits'"),
    ):
        for run in GATES:
            with pytest.raises(ValueError, match=told):
                run(x, x, spec, kind)
        for norm in NORMS:
            with pytest.raises(ValueError, match=told):
                norm(x, None, ones, 1e-5, spec, kind)


def test_the_device_of_a_launch(launched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is that of the inputs."""
    seen: list[Tensor] = []
    real = ops.device_of

    def device_of(t: Tensor) -> Any:
        seen.append(t)
        return real(t)

    monkeypatch.setattr(ops, "device_of", device_of)
    x, other = _pair(torch.bfloat16, 3)
    _there(monkeypatch)
    prologue.launch_gated_encode(x, other, *FOUR)
    prologue.launch_normed_encode(x, other, ONES.bfloat16(), 1e-5, *FOUR)
    assert [t is x for t in seen] == [True, True]
    assert len(launched) == 2
