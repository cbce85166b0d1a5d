"""Processes with Triton's interpreter, forked from one that has imported torch and Triton.

The interpreter has to be chosen before Triton is imported, so a mutant's process, forked from a
server with the compiler, can't become one. `Server` is a second server, with the interpreter;
`use` makes the lane of a mutant's process ask it for its worker, which saves a second of imports.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LIMITS = (resource.RLIMIT_AS, resource.RLIMIT_CORE)
ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore::RuntimeWarning",
}


class Server:
    """The server's process; `address` is its socket."""

    def __init__(self, folder: Path) -> None:
        self.address = folder / "interpreter"
        # A file, not -m: nothing of the project may be imported in it.
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self.address)],
            # Its input ends with this process, however that ends, and the server with its input.
            env=os.environ | ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder,
        )  # fmt: skip
        assert self._process.stdout is not None
        if not self._process.stdout.readline():  # it listens
            raise RuntimeError("the interpreter's server did not start: see what it printed")

    def died(self) -> bool:
        """Whether the server has ended by itself."""
        return self._process.poll() is not None

    def close(self) -> None:
        """End the server."""
        self._process.kill()
        self._process.wait()
        self.address.unlink(missing_ok=True)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


def use(address: Path, told: Path, refused: Callable[[str], None]) -> None:
    """Let this process have its interpreter from a server; `told` gets the worker's number.

    refused: hears why there is no worker, which is no fault of the mutant.
    """
    from quest.conformance import interpreter

    class Forked(interpreter.Interpreter):
        def __init__(self) -> None:
            (theirs_in, ours_in), (ours_out, theirs_out) = os.pipe(), os.pipe()
            try:
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.connect(str(address))
                    limits = [resource.getrlimit(name) for name in LIMITS]
                    where = json.dumps([os.getcwd(), limits]).encode()
                    socket.send_fds(connection, [where], [theirs_in, theirs_out, 2])
                    number = connection.recv(32)
            except OSError as error:
                refused(repr(error))
                raise
            if not number:
                refused("it could not fork")
            told.write_bytes(number)
            os.close(theirs_in)
            os.close(theirs_out)
            stdin, stdout = os.fdopen(ours_in, "wb"), os.fdopen(ours_out, "rb")
            made: Any = SimpleNamespace(stdin=stdin, stdout=stdout, wait=lambda timeout: None)
            self.process = made

    interpreter.Interpreter = Forked  # type: ignore[misc]


def end(told: Path) -> None:
    """End the worker that `told` names, if one was started: a fault may hold it in a loop."""
    if told.exists() and told.read_text():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(told.read_text()), signal.SIGKILL)


def _serve(address: str) -> None:
    # Python puts this folder first, whose files have names of the standard library's.
    sys.path.remove(str(Path(__file__).parent))
    import numpy  # noqa: F401
    import torch  # noqa: F401
    import triton.language
    import triton.runtime.interpreter  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen(64)
        print("listening", flush=True)
        while server in select.select([server, sys.stdin], [], [])[0]:
            connection, _ = server.accept()
            fds: list[int] = []
            # A mutant that ends while it asks ends its own connection, and not the server.
            with connection, contextlib.suppress(OSError):
                message, fds, _, _ = socket.recv_fds(connection, 2**14, 3)
                if len(fds) == 3 and (number := os.fork()):
                    connection.send(str(number).encode())
                elif len(fds) == 3:
                    server.close()
                    connection.close()
                    for place, fd in enumerate(fds):
                        os.dup2(fd, place)
                        os.close(fd)
                    _work(*json.loads(message))
            for fd in fds:
                os.close(fd)


def _work(folder: str, limits: list[tuple[int, int]]) -> None:
    """Be a worker of the project in `folder`, to the end, within the limits of who asked for it."""
    for name, limit in zip(LIMITS, limits, strict=True):
        resource.setrlimit(name, limit)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.argv = ["worker"]
    try:
        runpy.run_module("quest.conformance.worker", run_name="__main__", alter_sys=True)
    finally:
        os._exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1])
