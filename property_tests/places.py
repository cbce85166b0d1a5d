"""Where a kernel of CUDA C++ runs: on a GPU, and, the same source, on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from property_tests import emulated
from property_tests.walled import mapped, walled
from quest import (
    gated_product,
    lowbit,
    packed,
    prologue,
    rotated_product,
    sparse_product,
)
from quest.conformance import backends
from quest.conformance.lanes import Lane
from quest.kernels import cuda


@dataclass(frozen=True)
class Place:
    """lane: what is judged there. device: where tensors lie."""

    lane: Lane
    device: str

    def walled(self, t: Tensor, front: bool = False) -> AbstractContextManager[Tensor]:
        """A copy of t on the device that ends, or begins (`front`), where nothing is mapped."""
        return (walled if self.device == "cuda" else mapped)(t, front)

    def settle(self, t: Tensor) -> None:
        """Has t be there for kernels that begin before the one before them has ended."""
        if self.device == "cpu":
            emulated.settle(t)
        else:
            torch.zeros(1, device=self.device)  # a launch between what wrote it and theirs

    @property
    def operators(self) -> Any:
        """The functions of the lane by operator name, as `backends.operators` has them."""
        return backends.operators(self.lane.backend)

    @property
    def packed_product(self) -> Callable[..., Tensor]:
        """The operator, or what it calls on a GPU."""
        return packed.packed_product if self.device == "cuda" else packed.launch_packed


GPU = Place(Lane("triton-cuda", "cuda", "dispatch"), "cuda")
CPU = Place(Lane("cuda-emulator", "cpu", "emulated"), "cpu")
# Of a test about a GPU itself, or that the emulator takes too long for.
on_a_gpu = pytest.mark.parametrize("place", [GPU], indirect=True, ids=lambda p: str(p.lane))


@pytest.fixture(params=[GPU, CPU], ids=lambda place: str(place.lane))
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A GPU, where there is one and what it takes; and the emulator."""
    found: Place = request.param
    if found is CPU:
        pytest.importorskip("triton", reason="Triton is not installed")
        _forget()
        instead(monkeypatch)
    elif not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    elif reason := cuda.unavailable(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip(reason)
    yield found
    if found is CPU:
        _forget()


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[emulated.Emulator]:
    """Of two multiprocessors: one cluster, which takes all tiles in turn."""
    _forget()
    yield instead(monkeypatch)
    _forget()


def instead(patch: pytest.MonkeyPatch) -> emulated.Emulator:
    """As `emulated.instead`, and the lane of `CPU` has its operators."""
    emulator, others = emulated.instead(patch), backends.operators
    emulator.runs = 2  # copies that come soon, and late
    made = _operators(emulator)
    patch.setattr(
        backends, "operators", lambda backend: made if backend == "emulated" else others(backend)
    )
    # It asks for a GPU, and remembers what it was told.
    patch.setattr(prologue, "has_kernel", _has_prologue)
    return emulator


def _has_prologue(spec: str, x: Tensor) -> bool:
    fits = prologue._fits_there.__wrapped__(spec, x.shape[-1], "cpu")
    return fits and x.dtype in (torch.bfloat16, torch.float16)


def _operators(emulator: emulated.Emulator) -> Any:
    """Launchers of kernels in CUDA C++, which run in the emulator; for the rest plain PyTorch."""
    names = (
        "encode", "operand", "quantize", "fake_quantize", "gated_encode", "gated_encode_shown",
        "normed_encode", "normed_encode_shown", "masked_transpose",
    )  # fmt: skip
    launched = {name: vars(backends.operators("launch"))[name] for name in names} | {
        "accumulate": lowbit.launch_accumulate,
        "product": lowbit.launch_product,
        "gated_product": gated_product.launch_gated_product,
        "rotated_product": rotated_product.launch_rotated_product,
        "sparse_product": sparse_product.launch_sparse_product,
    }
    eager, watched = (
        vars(backends.operators("eager")),
        {name: _launching(name, f, emulator) for name, f in launched.items()},
    )
    # A sparse operand is made by none of the kernels in CUDA C++.
    watched["encode"] = lambda x, q, kind, dense=watched["encode"]: (
        dense if q.sparsity is None else eager["encode"]
    )(x, q, kind)
    return SimpleNamespace(**eager | watched)


def _launching(name: str, f: Callable[..., Any], emulator: emulated.Emulator) -> Callable[..., Any]:
    """f; an error where it launches nothing, and something else computes."""

    def call(*arguments: Any, **more: Any) -> Any:
        before = emulator.launches
        made = f(*arguments, **more)
        if emulator.launches == before:
            raise emulated.Fault(f"{name} of {tuple(arguments[0].shape)} launches no kernel")
        return made

    return call


def _forget() -> None:
    """Kernels that were loaded."""
    # They import Triton: not in every run.
    from quest.kernels import blocks, few, hopper, masked, product, rows, sparse

    for cached in (
        blocks._kernel, rows._kernel, rows._ready, few._loaded, few._ready,
        product._kernel, sparse._kernel, hopper.tensor_map, masked._kernel,
    ):  # fmt: skip
        cached.cache_clear()
