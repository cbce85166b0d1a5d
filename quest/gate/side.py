"""The gate's end of a worker's pipe."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
LEAVE = 5.0  # seconds for a process to go before it is killed


class SideError(Exception):
    """A worker refused a request, or died. status: see `worker.Refused`."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


# glibc gives memory back to the system, or not, by the history of a process, and a call that has to
# fetch its pages again was seen to take 2.7 times as long. Both sides keep what they got.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def environment(tree: Path) -> dict[str, str]:
    """What a process gets that is to import `tree`'s packages and no other's."""
    # The same hashes on both sides: the order of sets is no difference between them.
    return {**os.environ, "PYTHONPATH": str(tree), "PYTHONHASHSEED": "0"}


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process that leads a session, and all that it started."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LEAVE)
            return


class Side:
    """A worker in a worktree; a context manager that ends it."""

    def __init__(self, tree: Path, expression: str) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (closed in __exit__)
        # A session of its own: an interrupt from the keyboard reaches the gate alone.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), expression],
            cwd=tree,
            env=environment(tree) | MALLOC,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        stop(self._process)
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            assert pipe is not None
            with contextlib.suppress(OSError):  # a pipe to a process that is gone
                pipe.close()

    def ask(self, do: str, **more: object) -> dict[str, Any]:
        """The worker's reply; SideError where it refuses or is gone."""
        send, receive = self._process.stdin, self._process.stdout
        assert send is not None
        assert receive is not None
        try:
            send.write(json.dumps({"do": do, **more}) + "\n")
            send.flush()
            line = receive.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._said.seek(0)
            told = self._said.read().decode(errors="replace").strip().splitlines()[-3:]
            raise SideError("broken", f"its process ended: {' / '.join(told) or 'without a word'}")
        reply: dict[str, Any] = json.loads(line)
        if reply["status"] != "ok":
            raise SideError(reply["status"], reply["message"])
        return reply

    def turn(self, calls: int, pair: int) -> float:
        """Median seconds of `calls` calls of the open case, in the turn of a pair."""
        return float(statistics.median(self.ask("turn", calls=calls, pair=pair)["seconds"]))
