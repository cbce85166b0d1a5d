"""Fakes of the kernels of a frozen layer, and of a stream; no GPU.

They read and write memory where they are told to, as their launchers promise it.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import quest
from quest import direct, eager, lowbit, ops, packing
from quest.kernels import blocks, cuda, few, forms, hopper, outputs, product, recorded
from quest.rotary import rotate_heads

KINDS = {how: kind for kind, how in forms.OPERANDS.items()}
BIASES = {number: dtype for dtype, number in hopper.OUT.items()}


def signs(operand: Tensor, width: int) -> Tensor:
    return 2 * packing.unpack(operand, 1, width).double() - 1


class Kernels:
    """What was launched, and between which addresses the first kernel wrote.

    memory: what there is; besides it, what was allocated since and is still held. Nothing else is
    read or written: memory that was let go may be another's before a kernel has run.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        self.memory: list[Tensor] = []
        self.written: list[tuple[int, int]] = []
        self.allocated: list[weakref.ref[Tensor]] = []
        self.asked: list[tuple[int, int]] = []  # the first byte between kernels, and after the last
        self.given: list[tuple[Any, ...]] = []
        self.activation = quest.recipe("w4a4").activation
        patch.setattr(cuda, "unavailable", lambda device: None)
        patch.setattr(cuda, "shared", lambda device: 227 * 1024)
        patch.setattr(hopper, "unavailable", lambda device: None)
        for module in (blocks, few, product):
            name = module.__name__.rpartition(".")[2]
            patch.setattr(module, "launch", getattr(self, f"_{name}"))
        patch.setattr(blocks, "launch_prologue", self._prologue)
        between, empty = direct._between, outputs.empty

        def noted(size: int, device: torch.device) -> Tensor:
            t = between(size, device)
            shared = getattr(direct._memory, "shared", False)
            assert shared or t.numel() == size
            self.allocated.append(weakref.ref(t))
            self.asked.append((t.data_ptr(), t.data_ptr() + t.numel()))
            return t

        def made(*given: Any) -> Tensor:
            t = empty(*given)
            self.allocated.append(weakref.ref(t))
            return t

        patch.setattr(direct, "_between", noted)
        patch.setattr(outputs, "empty", made)

    def at(self, address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What lies there, as a tensor."""
        size = math.prod(shape) * dtype.itemsize
        held = [*self.memory, *(t for t in (ref() for ref in self.allocated) if t is not None)]
        spans = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in held]
        assert any(first <= address and address + size <= after for first, after in spans)
        bytes_ = (ctypes.c_char * size).from_address(address)
        return torch.frombuffer(bytes_, dtype=dtype).view(shape)

    def _quantize(
        self, x: Tensor, program: Any, kind: str, count: int, width: int, *to: int
    ) -> None:
        assert x.is_contiguous()
        assert x.data_ptr() % 16 == 0
        grid = self.activation.require_grid()
        assert (program.order, program.levels, program.step) == (128, grid.levels, grid.step)
        self.memory.append(x)
        self._encode(self.at(x.data_ptr(), (count, width), x.dtype), kind, to)

    def _encode(self, rows: Tensor, kind: str, to: tuple[int, ...]) -> None:
        operand, scale, _, sums = lowbit.encode(rows, self.activation.spec, kind)
        for t, address in zip((operand, scale, sums), to, strict=True):
            self.at(address, tuple(t.shape), t.dtype).copy_(t)
            self.written.append((address, address + t.numel() * t.element_size()))

    def _prologue(
        self, first: Tensor, second: Tensor | None, program: Any, form: int, bits: int,
        prologue: int, out: int, scale: int, sums: int, added: int, weight: Tensor | None,
        eps: float,
    ) -> None:  # fmt: skip
        self.given.append((first, second, weight, eps))
        self.seen.append(
            {blocks.GATED: "gated", blocks.NORMED: "normed", blocks.ADDED: "added"}[prologue]
        )
        assert program.levels == self.activation.require_grid().levels
        assert (prologue == blocks.NORMED) == (second is None)
        assert (prologue == blocks.ADDED) == (added != 0)
        if prologue == blocks.GATED:
            assert (weight, eps) == (None, 0.0)
            assert second is not None
            rows = eager.gated(first, second)
        else:
            assert weight is not None
            h, rows = eager.normed(first, second, weight, eps)
            if added:
                self.at(added, tuple(h.shape), h.dtype).copy_(h)
        self._encode(rows, KINDS[form, bits], (out, scale, sums))

    def _blocks(
        self, x: Tensor, program: Any, form: int, bits: int, count: int, d: int, out: int,
        scale: int, mask: int, sums: int,
    ) -> None:  # fmt: skip
        self.seen.append("blocks")
        assert mask == 0
        self._quantize(x, program, KINDS[form, bits], count, d, out, scale, sums)

    def _few(
        self, y: int, a: int, w: int, count: int, columns: int, width: int, bits: int, device: None,
        out: torch.dtype, factor: float, length: int, a_scale: int, w_scale: int, a_sum: int,
        w_sum: int, bias: Tensor | None, settled: bool,
    ) -> None:  # fmt: skip
        self.seen.append("few")
        assert settled is True
        assert device is None
        codes = packing.unpack(self.at(w, (columns, width * bits // 8), torch.uint8), bits, width)
        values = 2 * codes.double() - (2**bits - 1)
        if bits == 1:
            operand = signs(self.at(a, (count, width // 8), torch.uint8), width)[:, :length]
            assert torch.equal(self.at(w_sum, (columns,), torch.int32).double(), values.sum(1))
            values = values[:, :length]
        else:
            operand = self.at(a, (count, width), torch.int8).double()
        # Without it the kernel, which multiplies codes, has not all of a product.
        assert torch.equal(self.at(a_sum, (count,), torch.int32).double(), operand.sum(1))
        self._write(y, out, operand @ values.T, factor, a_scale, w_scale, bias)

    def _product(
        self, y: int, a: int, b: int, count: int, columns: int, width: int, device: None,
        out: torch.dtype, binary: bool, epilogue: int, length: int, factor: float, row_scale: int,
        column_scale: int, bias: int, row_sum: int, column_sum: int, settled: bool, bias_type: int,
        gate: bool, residual: int, rotary: product.Turned | None,
    ) -> None:  # fmt: skip
        ends = {"gated": gate, "added": bool(residual), "rotated": rotary is not None}
        assert sum(ends.values()) <= 1
        self.seen.append(" ".join([*(name for name in ends if ends[name]), "product"]))
        features = columns * (1 + gate)
        assert settled is True
        assert device is None
        assert epilogue in (hopper.PLAIN, hopper.CORRECTED)
        assert (bias == 0) == (bias_type == 0)
        kind = torch.uint8 if binary else torch.int8
        first, second = (self.at(t, (n, width), kind) for t, n in ((a, count), (b, features)))
        if binary:
            first, second = (packing.unpack(t, 1, 8 * width) for t in (first, second))
        p = first.double() @ second.double().T
        if epilogue == hopper.CORRECTED:
            sums = self.at(row_sum, (count, 1), torch.int32) + self.at(
                column_sum, (features,), torch.int32
            )
            p = 4 * p - sums - length if binary else p + (sums - length) / 4
        else:
            assert (row_sum, column_sum) == (0, 0)
        given = self.at(bias, (features,), BIASES[bias_type]) if bias else None
        added = self.at(residual, (count, columns), out) if residual else None
        assert residual % 16 == 0
        assert residual != y
        self._write(y, out, p, factor, row_scale, column_scale, given, gate, added, rotary)

    def _write(
        self, y: int, out: torch.dtype, p: Tensor, factor: float, row_scale: int,
        column_scale: int, bias: Tensor | None, gate: bool = False,
        residual: Tensor | None = None, rotary: product.Turned | None = None,
    ) -> None:  # fmt: skip
        count, columns = p.shape
        scales = self.at(row_scale, (count, 1), torch.float32) * self.at(
            column_scale, (columns,), torch.float32
        )
        made = p * factor * scales + (0 if bias is None else bias.double())
        if gate:
            made = eager.gated(*made.to(out).chunk(2, -1))
        if residual is not None:
            made = residual + made.to(out)
        if rotary is not None:
            made = made.to(out)
            cos, sin, turned = rotary
            assert out != torch.float32
            assert cos.dtype == sin.dtype == torch.float32
            first = made[:, :turned].unflatten(0, (-1, len(cos)))
            made[:, :turned] = rotate_heads(first, cos, sin).flatten(0, 1)
        self.at(y, tuple(made.shape), out).copy_(made)

    def take(self) -> list[str]:
        """What was launched since this was asked last."""
        found = self.seen[:]
        self.seen.clear()
        return found


class Kept:
    """In the place of recorded launches: what they were told.

    all: what was queued, and with which addresses, since a `Stream` was made.
    """

    all: ClassVar[list[tuple[Kept, tuple[int, ...]]]] = []

    def __init__(
        self, taken: list[Any], stream: int, *addresses: int, copies: recorded.Copies = ()
    ) -> None:
        self.told, self.copies = (stream, *addresses), copies
        self.queued: list[tuple[int, ...]] = []

    def queue(self, *addresses: int) -> None:
        for copy in self.copies:
            ctypes.memmove(*copy)
        self.queued.append(addresses)
        self.all.append((self, addresses))


class Stream:
    """What torch says is current."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.device, self.number = -1, 7
        Kept.all.clear()
        for name, value in (
            ("_cuda_getDevice", lambda: self.device),
            ("_cuda_isCurrentStreamCapturing", lambda: False),
            ("_cuda_getCurrentRawStream", lambda _: self.number),
        ):
            patch.setattr(torch._C, name, value, raising=False)
        patch.setattr(ops, "direct", lambda x: isinstance(x, Tensor))
        patch.setattr(recorded, "Again", Kept)
