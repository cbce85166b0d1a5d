"""The gate's end of a worker's pipe."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
LEAVE = 5.0  # seconds for a process to go before it is killed
LIMIT = 600.0  # seconds for an answer, which may have to compile and to judge


class SideError(Exception):
    """A worker refused a request, or is gone.

    status: see `worker.Refused`; "died" where its process ended, "late" where it did not answer in
    time. side: base or change.
    """

    def __init__(self, status: str, message: str, side: str) -> None:
        super().__init__(message)
        self.status = status
        self.side = side


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


def _ended(status: int) -> str:
    """How a process ended, by its exit status."""
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"by {signal.Signals(-status).name}"
    return f"with exit status {abs(status)}"


class Side:
    """A worker in a worktree; a context manager that ends it.

    name: base or change. limit: seconds for an answer. A worker that is gone is replaced by a new
    one at the next request.
    """

    def __init__(self, tree: Path, expression: str, name: str, limit: float = LIMIT) -> None:
        self.tree, self.expression, self.name, self.limit = tree, expression, name, limit
        self.case = ""  # the last that was opened, for messages
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (closed in __exit__)
        self._process: subprocess.Popen[str] | None = self._started()

    def _started(self) -> subprocess.Popen[str]:
        self._said.seek(0)
        self._said.truncate()
        # A session of its own: an interrupt from the keyboard reaches the gate alone.
        return subprocess.Popen(
            [sys.executable, "-P", str(WORKER), self.expression],
            cwd=self.tree,
            env=environment(self.tree) | MALLOC,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._said.close()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        stop(process)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # a pipe to a process that is gone
                pipe.close()

    def _gone(self, process: subprocess.Popen[str], do: str) -> SideError:
        """What is to be said of a process whose pipe is closed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LEAVE)
        how = "" if process.returncode is None else f" {_ended(process.returncode)}"
        self._end()
        self._said.seek(0)
        told = self._said.read().decode(errors="replace").strip().splitlines()[-3:]
        last = " / ".join(told) or "without a word"
        return SideError("died", f"{self._asked(do)}: its process ended{how}: {last}", self.name)

    def _asked(self, do: str) -> str:
        return f"{self.name}, {do}" + (f" {self.case}" if self.case else "")

    def ask(self, do: str, **more: object) -> dict[str, Any]:
        """The worker's reply; SideError where it refuses, is gone, or does not answer in time."""
        if do in ("hello", "open"):
            self.case = str(more.get("case", ""))
        process = self._process = self._process or self._started()
        send, receive = process.stdin, process.stdout
        assert send is not None
        assert receive is not None
        try:
            send.write(json.dumps({"do": do, **more}) + "\n")
            send.flush()
            # A reply is one line, written at once: what can be read from is soon read to its end.
            if not select.select([receive], [], [], self.limit)[0]:
                self._end()
                told = f"{self._asked(do)}: no answer in {self.limit:g} s (--limit)"
                raise SideError("late", told, self.name)
            line = receive.readline()
        except BrokenPipeError:
            line = ""
        if not line.endswith("\n"):
            raise self._gone(process, do)
        reply: dict[str, Any] = json.loads(line)
        if reply["status"] == "died":  # it says so itself: its device can't be used any more
            self._end()
        if reply["status"] != "ok":
            raise SideError(reply["status"], reply["message"], self.name)
        return reply

    def turn(self, calls: int, pair: int) -> float:
        """Median seconds of `calls` calls of the open case, in the turn of a pair."""
        return float(statistics.median(self.ask("turn", calls=calls, pair=pair)["seconds"]))
