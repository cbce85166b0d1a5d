"""Operands that a quantizer is still to make when the product that reads them is queued."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from quest import lowbit
from quest.conformance import inputs
from quest.kernels import cuda


def operands(spec: str, kind: str) -> Iterator[tuple[Tensor, ...]]:
    """Operand, scale and sums of 4096 rows of 1024 entries, twice; none is there before 10 ms.

    A quantizer lets the product start at once; here it has one multiprocessor's blocks only. The
    second time nothing is left to compile, and memory is the first one's where that is deleted.
    """
    for seed in (1, 2):
        x = seed * inputs.draw("gaussian", (4096, 1024), torch.bfloat16, seed).cuda()
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]  # both are queued by then
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "processors", lambda _: 1)
            made = [lowbit.operand(x, spec, kind)]
        yield made.pop()  # none is kept here
