"""What a function is called with, while a test runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from quest import lowbit_linear
from quest.quantizer import Quantizer


def counted(
    monkeypatch: pytest.MonkeyPatch, home: Any = Quantizer, name: str = "__call__"
) -> list[Tensor]:
    """The tensors that `name` of `home` is given from now on; by default, all that is quantized.

    Of `lowbit_linear` the CPU's parts are meant.
    """
    seen: list[Tensor] = []
    real: Callable[..., Any] = getattr(getattr(home, "_CPU", home), name)

    def counting(first: Any, second: Any, *rest: Any) -> Any:
        seen.append(second if isinstance(first, Quantizer) else first)
        return real(first, second, *rest)

    if home is lowbit_linear:
        monkeypatch.setattr(home, "_CPU", home._CPU._replace(**{name: counting}))
    else:
        monkeypatch.setattr(home, name, counting)
    return seen


def shapes(seen: list[Tensor]) -> list[tuple[int, ...]]:
    """Their shapes."""
    return [tuple(t.shape) for t in seen]
