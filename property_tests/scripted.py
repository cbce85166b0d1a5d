"""A lane that writes what a test tells it to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from quest.conformance import lanes


class Scripted(lanes.Lane):
    """A lane that writes what it is told to: write(stage, first tensor)."""

    def __init__(self, write: Callable[[str, Tensor], dict[str, Tensor]]) -> None:
        super().__init__("scripted", "cpu", "eager")
        object.__setattr__(self, "write", write)

    def call(self, stage: str, *tensors: Tensor, **static: Any) -> dict[str, Tensor]:
        return self.write(stage, tensors[0])
