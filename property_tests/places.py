"""Where a kernel of CUDA C++ runs: on a GPU, and, the same source, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from property_tests import emulated
from property_tests.walled import mapped, walled
from quest.conformance.lanes import Lane
from quest.kernels import blocks, cuda, hopper, product, rows


@dataclass(frozen=True)
class Place:
    """lane: what is judged there. device: where tensors lie."""

    lane: Lane
    device: str

    def walled(self, t: Tensor, front: bool = False) -> AbstractContextManager[Tensor]:
        """A copy of t on the device that ends, or begins (`front`), where nothing is mapped."""
        return (walled if self.device == "cuda" else mapped)(t, front)


GPU = Place(Lane("triton-cuda", "cuda", "dispatch"), "cuda")
CPU = Place(Lane("cuda-emulator", "cpu", "launch"), "cpu")


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
    for cached in (blocks._kernel, rows._kernel, product._kernel, hopper.tensor_map):
        cached.cache_clear()
