"""SIGINT and SIGTERM while a model trains: the step under way ends, is saved, and the run stops.

A second signal stops at once, as without this.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = signal.SIGINT, signal.SIGTERM


class Stopped(KeyboardInterrupt):
    """A run was asked to stop by signal `number`, and has; its message says after which step."""

    def __init__(self, number: int, told: str) -> None:
        super().__init__(told)
        self.number = number


@contextmanager
def heard() -> Iterator[list[int]]:
    """The signals to stop that have come, inside the block; the first one interrupts nothing.

    Python hears signals in the main thread alone: in another one they do what they did before.
    """
    came: list[int] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        for each, handler in before.items():
            # None: of a handler that was not set from Python, which can't be set again.
            signal.signal(each, signal.SIG_DFL if handler is None else handler)

    def hear(number: int, _: FrameType | None) -> None:
        came.append(number)
        restore()

    if threading.current_thread() is threading.main_thread():
        before |= {each: signal.getsignal(each) for each in SIGNALS}
        for each, handler in before.items():
            if handler is not signal.SIG_IGN:  # as of what a shell has put into the background
                signal.signal(each, hear)
    try:
        yield came
    finally:
        restore()
