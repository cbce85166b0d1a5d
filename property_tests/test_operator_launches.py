"""What the operators of `quest.ops` check, launch and ask for, on a CPU and for CUDA; no GPU.

The kernels are their references in plain PyTorch here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quest import eager, ops, packing, transforms
from quest.kernels import blocks, forms, hadamard
from quest.kernels import quantize as quantizing
from quest.quantizer import parse

pytestmark = pytest.mark.whole

CUDA = torch._C.DispatchKey.CUDA
FOUR = "uniform4/hadamard128/clip1.3/dense"
# Groups of 8, which no kernel has.
EIGHTS = "uniform4/hadamard128/ste/2:8"


def _on_cuda(name: str) -> Callable[..., Any]:
    """An operator as it runs for CUDA, on tensors that lie on a CPU."""
    overload = getattr(torch.ops.quest, name).default
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"quest::{name}", "CUDA")
    return lambda *given: overload._op_dk(CUDA, *given)


def _x(*lead: int, width: int = 256, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*lead, width, generator=torch.Generator().manual_seed(0)).to(dtype)


def _mask(x: Tensor) -> Tensor:
    return packing.pack(x > 0, 1)


@pytest.fixture
def transformed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the kernel of the transform was called for."""
    seen: list[str] = []

    def run(
        x: Tensor, order: int, base: Tensor | None, transpose: bool, mask: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        expected = transforms.base(transforms.split(order)[0], x.device)
        assert base is expected
        if mask is None:
            seen.append("plain")
            return eager.hadamard(x, order, transpose)
        seen.append("masked")
        assert transpose
        return eager.masked_transpose(x, mask, order, dtype)

    monkeypatch.setattr(hadamard, "hadamard", run)
    return seen


def _same(made: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for t, other in zip(made, expected, strict=True):
        assert t.dtype == other.dtype
        assert torch.equal(t, other)


@pytest.mark.parametrize("order", [1, 12, 16])
def test_transforms_on_cuda(order: int, transformed: list[str]) -> None:
    x = _x(2, 3, width=48)
    for transpose in (False, True):
        made = _on_cuda("hadamard")(x, order, transpose)
        assert torch.equal(made, ops.hadamard(x, order, transpose))
    made = _on_cuda("masked_transpose")(x, _mask(x), order)
    assert torch.equal(made, ops.masked_transpose(x, _mask(x), order))
    assert transformed == ["plain", "plain", "masked"]


def test_a_masked_transpose_in_another_dtype(transformed: list[str]) -> None:
    """By default it is that of the gradient."""
    x = _x(3, dtype=torch.bfloat16)
    for dtype in (None, *ops.DTYPES):
        made = ops.launch_masked_transpose(x, _mask(x), 128, dtype)
        assert made.dtype == (dtype or torch.bfloat16)
        assert torch.equal(made, eager.masked_transpose(x, _mask(x), 128, dtype))
    assert transformed == ["masked"] * 4


@pytest.mark.parametrize(
    ("x", "order", "error", "told"),
    [
        ([1.0], 1, TypeError, "x must be a torch.Tensor, got list"),
        (_x(2).double(), 1, TypeError, "x must be float32, bfloat16 or float16, got torch.float64"),
        (_x(2).sum(), 1, ValueError, "x must have at least one axis, got a scalar"),
        (_x(2), 0, ValueError, "Hadamard order must be a positive integer, got 0"),
        (_x(2), -4, ValueError, "Hadamard order must be a positive integer, got -4"),
        (_x(2, width=14), 7, ValueError, "Hadamard order must be 2**k or 12, 20, 28 or 40 times"),
        (_x(2), 12, ValueError, "width 256 is not divisible by the Hadamard order 12"),
    ],
    ids=str,
)
def test_wrong_input_of_transforms(
    x: Any, order: int, error: type[Exception], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before anything runs."""
    for where, name in ((hadamard, "hadamard"), (eager, "hadamard"), (eager, "masked_transpose")):
        monkeypatch.delattr(where, name)
    mask = torch.ones((2, 32), dtype=torch.uint8)
    runs: list[Callable[[], object]] = [
        lambda: ops.launch_hadamard(x, order, False),
        lambda: ops.launch_masked_transpose(x, mask, order),
    ]
    if isinstance(x, Tensor):  # which the dispatcher sees to
        runs += [
            lambda: ops.hadamard(x, order, False), lambda: ops.masked_transpose(x, mask, order),
        ]  # fmt: skip
    for run in runs:
        with pytest.raises(error, match=re.escape(told)):
            run()


@pytest.mark.parametrize("width", [44, 48])
def test_wrong_masks(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit an element, each row in whole bytes."""
    for where, name in ((hadamard, "hadamard"), (eager, "masked_transpose")):
        monkeypatch.delattr(where, name)
    x, right = _x(2, 3, width=width), _mask(_x(2, 3, width=width))
    assert right.shape == (2, 3, 6)
    for mask in (right.int(), right.bool(), right[..., :5], right[:1], right[0], right.view(6, 6)):
        told = re.escape(
            f"mask must be uint8 of shape (2, 3, 6), got {mask.dtype} of shape {tuple(mask.shape)}"
        )
        for run in (ops.masked_transpose, ops.launch_masked_transpose):
            with pytest.raises(ValueError, match=told):
                run(x, mask, 4)


# --- the quantizer ----------------------------------------------------------------------------

Asked = list[tuple[bool, bool, bool]]


def _noted(seen: Asked, name: str, where: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`where.name` tells `seen` of what it is asked for: values, codes, packed."""
    real: Callable[..., Any] = getattr(where, name)

    def run(*given: Any, values: bool, codes: bool, packed: bool) -> Any:
        seen.append((values, codes, packed))
        return real(*given, values=values, codes=codes, packed=packed)

    monkeypatch.setattr(where, name, run)


@pytest.mark.parametrize("where", ["cpu", "meta", "cuda"])
def test_what_is_asked_for(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an operator does not return is not made."""
    seen: Asked = []
    name = {"cpu": "quantize", "meta": "like", "cuda": "quantize"}[where]
    _noted(seen, name, eager, monkeypatch)
    x = _x(3).to("meta" if where == "meta" else "cpu")
    run = (
        (lambda name: _on_cuda(name)) if where == "cuda"
        else (lambda name: getattr(torch.ops.quest, name).default)
    )  # fmt: skip
    values, mask = run("fake_quantize")(x, EIGHTS)
    assert (values.shape, mask.shape, mask.dtype) == ((3, 256), (3, 32), torch.uint8)
    assert seen == [(True, False, True)]
    for packed in (False, True):
        seen.clear()
        made = run("quantize")(x, EIGHTS, packed)
        assert seen == [(False, True, packed)]
        assert [t.shape[-1] for t in made] == ([128, 1, 32, 32] if packed else [256, 1, 256, 256])


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which quantizer was launched, where `quest.kernels.blocks` has all of FOUR."""
    q, seen = parse(FOUR), list[str]()

    def in_blocks(x: Tensor, made: Any, *, form: int, bits: int = 0) -> tuple[Tensor, ...]:
        seen.append("blocks")
        assert bits == (q.require_grid().storage_bits if form == forms.PACKED else 0)
        values, codes, scale, mask, _ = eager.quantize(
            x, q, values=form == forms.VALUES, codes=form != forms.VALUES,
            packed=form == forms.PACKED,
        )  # fmt: skip
        bits_of_it = mask if form == forms.PACKED else packing.pack(mask, 1)
        none = torch.empty(0, dtype=torch.int32)
        return values if form == forms.VALUES else codes, scale, bits_of_it, none, none

    def quantize(x: Tensor, made: Any, **how: bool) -> tuple[Tensor, ...]:
        seen.append("quantize")
        assert made.levels == 16
        return eager.quantize(x, q, **how)

    monkeypatch.setattr(blocks, "supports", lambda made, x: made.levels == 16 and x.ndim > 0)
    monkeypatch.setattr(blocks, "quantize", in_blocks)
    monkeypatch.setattr(quantizing, "quantize", quantize)
    return seen


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_one_thing_is_asked_of_a_block_a_warp(dtype: torch.dtype, launched: list[str]) -> None:
    """Values or codes; both come from the other kernel. In each way the same results."""
    x, q = _x(2, 3, dtype=dtype), parse(FOUR)
    for values, codes in ((True, False), (False, True), (True, True), (False, False)):
        for packed in (False, True):
            made = ops.launch_quantize(x, q, values=values, codes=codes, packed=packed)
            expected = eager.quantize(x, q, values=values, codes=codes, packed=packed)
            # Codes in bits that are not asked for have no dtype to speak of.
            skip = 1 if packed and not codes else None
            for i, (t, other) in enumerate(zip(made, expected, strict=True)):
                assert torch.equal(t.to(other.dtype), other)
                assert t.dtype == other.dtype or i == skip
            assert launched == ["blocks" if values != codes else "quantize"]
            launched.clear()


def test_operators_on_cuda(launched: list[str]) -> None:
    x = _x(2, 3)
    _same(_on_cuda("fake_quantize")(x, FOUR), ops.fake_quantize(x, FOUR))
    for packed in (False, True):
        _same(_on_cuda("quantize")(x, FOUR, packed), ops.quantize(x, FOUR, packed))
    assert launched == ["blocks"] * 3


def test_groups_that_no_kernel_has() -> None:
    x, q = _x(3), parse(EIGHTS)
    for values, codes, packed in ((True, False, True), (False, True, False), (True, True, True)):
        how = {"values": values, "codes": codes, "packed": packed}
        _same(ops.launch_quantize(x, q, **how), eager.quantize(x, q, **how))


def test_wrong_input_of_the_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    for where, name in ((ops, "program"), (eager, "quantize")):
        monkeypatch.delattr(where, name)
    for x, error, told in (
        (_x(2).int(), TypeError, "x must be float32, bfloat16 or float16, got torch.int32"),
        (_x(2).sum(), ValueError, "x must have at least one axis, got a scalar"),
        (_x(2, width=192), ValueError, "width 192 is not divisible"),
    ):
        for run in (
            lambda x: ops.launch_quantize(x, parse(FOUR), values=True, codes=False, packed=True),
            lambda x: ops.fake_quantize(x, FOUR), lambda x: ops.quantize(x, FOUR, True),
        ):  # fmt: skip
            with pytest.raises(error, match=told):
                run(x)


def test_a_mask_asks_for_no_gradient() -> None:
    x = _x(3).requires_grad_()
    values, mask = ops.fake_quantize(x, FOUR)
    assert values.requires_grad
    assert not mask.requires_grad
    assert mask.grad_fn is None


# --- where kernels launch ---------------------------------------------------------------------


def test_the_device_of_a_tensor_is_made_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not; which costs the host."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)

    def at(index: int | None) -> Any:
        return SimpleNamespace(is_cuda=index is not None, device=SimpleNamespace(index=index))

    assert ops.device_of(at(None)) is ops.device_of(at(1)) is ops._HERE
    for index in (0, 2):
        made = ops.device_of(at(index))
        assert isinstance(made, torch.cuda.device)
        assert made.idx == index


def test_a_mask_that_lies_elsewhere() -> None:
    """Its address is read by a kernel that can't tell."""
    x, mask = torch.ones(2, 256, device="meta"), torch.ones((2, 32), dtype=torch.uint8)
    with pytest.raises(ValueError, match="mask must lie where its input lies, meta; got cpu"):
        ops.launch_masked_transpose(x, mask, 128)
