"""Whether a process that a test has started, or had started, has ended."""

from __future__ import annotations

import time
from pathlib import Path


def alive(number: int) -> bool:
    """Whether a process is there, and no corpse."""
    try:
        told = Path(f"/proc/{number}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # the latter while it is being reaped
        return False
    return told.rpartition(")")[2].split()[0] not in "ZX"


def gone(number: int, seconds: float = 10.0) -> bool:
    """Whether a process ends in time: one that was killed is still there for a moment."""
    until = time.monotonic() + seconds
    while alive(number):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True
