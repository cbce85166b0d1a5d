"""Where a kernel of CUDA C++ runs: on a GPU, and, the same source, on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from property_tests import emulated
from property_tests.walled import mapped, walled
from quest import fused
from quest.conformance.lanes import Lane
from quest.kernels import blocks, cuda, few, hopper, product, rows


@dataclass(frozen=True)
class Place:
    """lane: what is judged there. device: where tensors lie."""

    lane: Lane
    device: str

    def walled(self, t: Tensor, front: bool = False) -> AbstractContextManager[Tensor]:
        """A copy of t on the device that ends, or begins (`front`), where nothing is mapped."""
        return (walled if self.device == "cuda" else mapped)(t, front)

    @property
    def few_linear_shown(self) -> Callable[..., tuple[Tensor, ...]]:
        """The operator, or what it calls on a GPU."""
        if self.device == "cuda":
            return fused.few_linear_shown
        made: Any = functools.partial(fused._on_cuda, settled=False, show=True)
        return made


GPU = Place(Lane("triton-cuda", "cuda", "dispatch"), "cuda")
CPU = Place(Lane("cuda-emulator", "cpu", "kernels"), "cpu")
# Of a test that the emulator takes too long for.
on_a_gpu = pytest.mark.parametrize("place", [GPU], indirect=True, ids=lambda p: str(p.lane))


@pytest.fixture(params=[GPU, CPU], ids=lambda place: str(place.lane))
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A GPU, where there is one and what it takes; and the emulator."""
    found: Place = request.param
    if found is CPU:
        _forget()
        emulated.instead(monkeypatch)
    elif not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    elif reason := cuda.unavailable(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip(reason)
    yield found
    if found is CPU:
        _forget()


def _forget() -> None:
    """Kernels that were loaded."""
    for cached in (
        blocks._kernel, rows._kernel, few._loaded, few._ready, product._kernel, hopper.tensor_map
    ):  # fmt: skip
        cached.cache_clear()
