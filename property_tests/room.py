"""Room on a GPU for a test of what 32 bits don't count, which takes most of its memory."""

from __future__ import annotations

import fcntl
import gc
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

SPARE = 12 * 2**30  # left to tests that run beside it, in other processes
Room = Callable[[int], None]


@pytest.fixture(name="room")
def only_one() -> Iterator[Room]:
    """Skips a test where the GPU has not so many bytes free besides `SPARE`, for it alone."""
    with (Path(tempfile.gettempdir()) / "quest-room").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one such test at a time

        def require(size: int) -> None:
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0]
            if free < size + SPARE:
                pytest.skip(
                    f"needs {(size + SPARE) >> 30} GiB of free GPU memory, there are {free >> 30}"
                )

        yield require
        gc.collect()
        torch.cuda.empty_cache()
