"""Room on a GPU for a test of what 32 bits don't count, which takes most of its memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

SPARE = 12 * 2**30  # left to tests that run beside it, in other processes


@contextmanager
def room(size: int) -> Iterator[None]:
    """Skips where the GPU has not so many bytes free besides `SPARE`, or loses them meanwhile."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < size + SPARE:
        pytest.skip(f"needs {(size + SPARE) >> 30} GiB of free GPU memory, there are {free >> 30}")
    try:
        yield
    except torch.OutOfMemoryError as error:
        pytest.skip(f"others took the memory: {error}")
    finally:
        torch.cuda.empty_cache()
