"""Lanes: one implementation of the operators on one device each.

A lane runs a stage on tensors and gives back what it wrote, on the CPU. Every call is guarded: it
runs twice, with outputs poisoned by two different bytes, and fails unless both runs agree bit for
bit (nothing unwritten, deterministic) and the inputs' storage is untouched, gaps included.

Triton's interpreter has to be chosen before Triton is imported, so its lane lives in a process of
its own (`worker`); everything else about it is the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import interpreter
from .stages import STAGES, Outputs, storage_bytes
from .stages import GuardError as GuardError

POISON = (0xFF, 0x55)


@dataclass(frozen=True)
class Lane:
    """An implementation on a device.

    backend: "dispatch" (the registered operators), "eager" (plain PyTorch) or "launch" (the
    kernels' launchers). remote: runs in a process with Triton's interpreter.
    """

    name: str
    device: str
    backend: str
    remote: bool = False

    def call(self, stage: str, *tensors: Tensor, **static: Any) -> Outputs:
        """The outputs of a stage, guarded; raises GuardError, or what the stage raises."""
        if self.remote:
            return interpreter.running().call(self, stage, tensors, static)
        return run(self, stage, tensors, static)

    def supports(self, stage: str, static: dict[str, Any]) -> bool:
        """Whether the lane has an implementation of its own for this call."""
        if self.backend != "dispatch" and (stage == "frozen" or static.get("path") == "integers"):
            return False  # the layer of the other lanes is composed, of values
        products = (
            "accumulate", "product", "added_product", "gated_product", "rotated_product",
            "sparse_product",
        )  # fmt: skip
        if stage in products or static.get("path") == "integers":
            return self.backend != "launch" and no_product(self) is None
        q = static.get("q")
        if self.backend == "launch" and q is not None and q.sparsity is not None:
            from quest.kernels.quantize import GROUP_UNITS
            from quest.sparsity import Pairwise

            return q.sparsity.m // (2 if isinstance(q.sparsity, Pairwise) else 1) in GROUP_UNITS
        return True

    def __str__(self) -> str:
        return self.name


def all_lanes() -> tuple[Lane, ...]:
    """Every lane there is."""
    return (
        Lane("torch-cpu", "cpu", "dispatch"),
        Lane("triton-interpreter", "cpu", "launch", remote=True),
        Lane("torch-cuda", "cuda", "eager"),
        Lane("triton-cuda", "cuda", "dispatch"),
    )


def missing(lane: Lane) -> str | None:
    """Why a lane can't run on this machine; None where it can."""
    if lane.device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    if lane.remote or lane.name == "triton-cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "Triton is not installed"
    return None


def no_product(lane: Lane) -> str | None:
    """Why a lane that runs here has no integer product; None where it has one."""
    if lane.backend == "launch":
        return "the low-bit product is CUDA C++, which Triton's interpreter can't run"
    if lane.name != "triton-cuda":
        return None
    from quest.kernels.hopper import unavailable

    return unavailable(torch.device("cuda"))


def transfer(t: Tensor, device: str) -> Tensor:
    """t on `device` with its strides, offset and gaps; a copy of the whole storage."""
    flat = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return flat.to(device, copy=True).as_strided(t.size(), t.stride(), t.storage_offset())


def run(lane: Lane, stage: str, tensors: tuple[Tensor, ...], static: dict[str, Any]) -> Outputs:
    """`Lane.call` in this process."""
    from quest.kernels import outputs

    made = functools.partial(STAGES[stage], lane, **static)
    return guarded(f"{lane} {stage}", lane.device, made, tensors, outputs.poisoned)


def guarded(
    told: str,
    device: str,
    function: Callable[..., Outputs],
    tensors: tuple[Tensor, ...],
    poisoned: Callable[[int], AbstractContextManager[None]],
    deterministic: bool = True,
) -> Outputs:
    """What `function` makes of copies of the tensors; GuardError. told: names it in messages.

    poisoned: fills fresh memory with a byte while entered. deterministic: both runs must agree.
    """
    first: Outputs = {}
    for byte in POISON:
        inputs = tuple(transfer(t, device) for t in tensors)
        before = [storage_bytes(t) for t in inputs]
        with poisoned(byte), full_sums():
            made = function(*inputs)
        for i, (t, b) in enumerate(zip(inputs, before, strict=True)):
            if storage_bytes(t) != b:
                raise GuardError(f"{told}: input {i} was changed")
        for name, t in made.items():
            if t.device.type != device:
                raise GuardError(f"{told}: {name} is on {t.device}, not {device}")
        made = {k: v.detach().cpu().contiguous() for k, v in made.items()}
        for name, t in first.items():
            if deterministic and storage_bytes(t) != storage_bytes(made[name]):
                why = "part of it was never written, or the result is not deterministic"
                raise GuardError(
                    f"{told}: {name} differs between two runs on the same inputs: {why}"
                )
        first = made
    return first


@contextmanager
def full_sums() -> Iterator[None]:
    """torch's own products of 16 bits keep their partial sums in float32.

    By default cuBLAS may round those of a split K to 16 bits, which no bound of ours allows.
    """
    allowed = torch.backends.cuda.matmul
    before = (
        allowed.allow_bf16_reduced_precision_reduction,
        allowed.allow_fp16_reduced_precision_reduction,
    )
    allowed.allow_bf16_reduced_precision_reduction = False
    allowed.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        (
            allowed.allow_bf16_reduced_precision_reduction,
            allowed.allow_fp16_reduced_precision_reduction,
        ) = before
