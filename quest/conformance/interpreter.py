"""The process with Triton's interpreter, seen from this one: it starts `worker`, and talks to it.

What goes through the pipe is a message each way: a call of a stage, and what came of it.
"""

from __future__ import annotations

import atexit
import functools
import os
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any, BinaryIO

from torch import Tensor

if TYPE_CHECKING:
    from .lanes import Lane
    from .stages import Outputs


class Interpreter:
    """The process with Triton's interpreter, and the pipe to it."""

    def __init__(self) -> None:
        # The interpreter computes with NumPy, which warns of what floats may do.
        env = os.environ | {
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore::RuntimeWarning",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "quest.conformance.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
        )
        atexit.register(self.close)

    def close(self) -> None:
        """End the process; without it the worker would wait for its next call."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(timeout=30)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def call(
        self, lane: Lane, stage: str, tensors: tuple[Tensor, ...], static: dict[str, Any]
    ) -> Outputs:
        send(self.process.stdin, (lane, stage, tensors, static))
        error, result = receive(self.process.stdout)
        if error is not None:
            raise error
        return dict(result)


@functools.cache
def running() -> Interpreter:
    """The one process, started when it is asked for."""
    return Interpreter()


def send(stream: BinaryIO | Any, message: Any) -> None:
    """Write a message: its length in 8 bytes, then its pickle."""
    data = pickle.dumps(message)
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def receive(stream: BinaryIO | Any) -> Any:
    """Read what `send` wrote; EOFError at the end of the stream."""
    size = stream.read(8)
    if len(size) < 8:
        raise EOFError("the other process closed the pipe")
    return pickle.loads(stream.read(int.from_bytes(size, "little")))
