"""Out-of-bounds accesses in Triton's interpreter, which by itself reads and writes anywhere.

Every address that a load, a store or an atomic operation touches has to lie in one of the tensors
that the kernel was launched with, and all addresses of one operation in the same one; lanes that
the mask turns off touch nothing. What is left unseen: an operation that as a whole lands in
another argument of the same launch. Works on Triton's internals, and says so where a version of
Triton lacks them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .oracle import Array

# Operations of the interpreter's builder, with the position of their mask (None: no mask).
OPERATIONS: dict[str, int | None] = {
    "create_masked_load": 1,
    "create_masked_store": 2,
    "create_atomic_rmw": 3,
    "create_atomic_cas": None,
}


class OutOfBoundsError(AssertionError):
    """A kernel touched memory that none of its arguments holds."""


class Spans:
    """The memory of a launch's arguments, ascending: names, first and past-the-last addresses."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        found = sorted((*_span(t), name) for name, t in tensors.items() if t.numel())
        merged: list[tuple[int, int, str]] = []
        for low, high, name in found:
            if merged and low < merged[-1][1]:  # views of the same memory
                before = merged.pop()
                merged.append((before[0], max(before[1], high), f"{before[2]}, {name}"))
            else:
                merged.append((low, high, name))
        self.names = [name for *_, name in merged]
        self.low = np.array([low for low, *_ in merged], dtype=np.uint64)
        self.high = np.array([high for _, high, _ in merged], dtype=np.uint64)

    def check(self, addresses: Array, size: int, operation: str) -> None:
        """Raise OutOfBoundsError unless all of `size` bytes at each address are in one argument."""
        if addresses.size == 0:
            return
        first, last = int(addresses.min()), int(addresses.max()) + size
        at = int(np.searchsorted(self.low, np.uint64(first), side="right")) - 1
        if at >= 0 and last <= int(self.high[at]):
            return
        raise OutOfBoundsError(f"{_place()}: {operation} touches {self._told(first, last, at)}")

    def _told(self, first: int, last: int, at: int) -> str:
        if at >= 0 and first < int(self.high[at]):
            return f"{last - int(self.high[at])} bytes past the end of {self.names[at]}"
        if at + 1 < len(self.names) and last > int(self.low[at + 1]):
            return f"{int(self.low[at + 1]) - first} bytes before {self.names[at + 1]}"
        behind = f", {first - int(self.high[at])} bytes behind {self.names[at]}" if at >= 0 else ""
        return f"memory outside {', '.join(self.names) or 'any argument'}{behind}"


def _span(t: torch.Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _place() -> str:
    """The line of the kernel: the innermost frame outside Triton and this file."""
    frame: Any = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path != Path(__file__) and "triton" not in path.parts:
            return f"{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return "a kernel"


def watch() -> None:
    """From now on, check every access of every kernel that this process interprets."""
    import triton
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    lacking = [name for name in OPERATIONS if not hasattr(builder, name)]
    if lacking or not hasattr(executor, "_init_args_hst"):
        raise RuntimeError(
            f"addresses can't be watched in the interpreter of Triton {triton.__version__}: it has "
            f"no {', '.join(lacking) or '_init_args_hst'}"
        )
    current = Spans({})
    prepare = executor._init_args_hst

    def prepared(self: Any, arguments: Any, named: Any) -> Any:
        nonlocal current
        made = prepare(self, arguments, named)
        tensors = dict(zip(self.arg_names, made[0], strict=False)) | made[1]
        current = Spans({k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)})
        return made

    def watched(name: str, position: int | None) -> Callable[..., Any]:
        original = getattr(builder, name)

        def operation(self: Any, *arguments: Any) -> Any:
            pointers = arguments[1] if name == "create_atomic_rmw" else arguments[0]
            size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            touched = np.asarray(pointers.data)
            if position is not None:
                on = np.broadcast_to(
                    np.asarray(arguments[position].data, dtype=bool), touched.shape
                )
                touched = touched[on]
            current.check(touched, size, name.removeprefix("create_").replace("_", " "))
            return original(self, *arguments)

        return operation

    executor._init_args_hst = prepared
    for name, position in OPERATIONS.items():
        setattr(builder, name, watched(name, position))
