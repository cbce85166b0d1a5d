"""Many processes side by side, forked from one server that has imported what is slow to import."""

from __future__ import annotations

import compileall
import json
import math
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from . import child, interpreter
from .mutant import ROOT
from .trace import WATCHED

# What multiprocessing gives as exit status where the server is gone; those of pytest end at 5.
GONE = 255


class HarnessError(RuntimeError):
    """What failed is the harness: nothing that it has said of the last mutants counts."""


@dataclass
class Ended:
    """How a process went. events: what it reported. code: its exit status, negative for a signal.

    seconds: wall-clock time, from its start. late: it was ended, after the limit of its job.
    """

    job: child.Job
    code: int
    seconds: float
    events: list[dict[str, Any]] = field(default_factory=list)
    late: bool = False

    def first(self, key: str) -> dict[str, Any] | None:
        """The first event that has this key."""
        return next((e for e in self.events if key in e), None)

    def check(self) -> None:
        """`HarnessError` where the process could not tell anything of any mutant."""
        if stray := self.first("stray"):
            raise HarnessError(f"the tests import {stray['stray']}, not the mutant's copy")
        if self.first("started"):
            raise HarnessError("CUDA was started before the fork: no test can use it")


@contextmanager
def workshop() -> Iterator[Path]:
    """A folder with a copy of the project in `template`, for as long as it is needed."""
    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    try:
        child.copy(ROOT, folder / "template")
        # Once for all copies: byte code is known by the time and size of its source.
        for name in (*WATCHED, "property_tests"):
            compileall.compile_dir(folder / "template" / name, quiet=1, force=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_all(
    jobs: Iterator[child.Job], slots: int, ended: Callable[[Ended], Iterator[child.Job]],
    until: float = math.inf,
) -> bool:  # fmt: skip
    """Run jobs, `slots` at a time; `ended` is told of each end and may give more jobs.

    False: the time was up before all had ended.

    Those of the quick profile are next, so that a verdict is near; others go last.

    until: what `time.monotonic` says when all that still runs is given up.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Of semaphores that killed processes have left, which are gone with them.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(child.PRELOAD)
    alive: dict[int, tuple[BaseProcess, child.Job, float]] = {}
    soon: list[child.Job] = []
    waiting: list[child.Job] = []
    late: set[int] = set()
    try:
        while time.monotonic() < until:
            while len(alive) < slots:
                job = soon.pop(0) if soon else next(jobs, None)
                if job is None and waiting:
                    job = waiting.pop(0)
                if job is None:
                    break
                process = context.Process(target=child.run, args=(job,))
                try:
                    process.start()
                except (OSError, EOFError) as error:
                    raise HarnessError(f"no process can be forked: {error!r}") from error
                alive[process.sentinel] = process, job, time.perf_counter()
            if not alive:
                return True
            for sentinel in wait(list(alive), timeout=1.0):
                process, job, began = alive.pop(sentinel)  # type: ignore[call-overload]
                process.join()
                _kill(process, job)
                if process.exitcode == GONE:
                    raise HarnessError("the server from which processes are forked has died")
                taken = time.perf_counter() - began
                code, slow = process.exitcode or 0, sentinel in late
                late.discard(sentinel)  # type: ignore[arg-type]
                for more in ended(Ended(job, code, taken, _events(job), slow)):
                    (soon if more.profile == "quick" else waiting).append(more)
                process.close()
                shutil.rmtree(job.folder, ignore_errors=True)
            for sentinel, (process, job, began) in alive.items():
                if time.perf_counter() - began > job.limit:
                    late.add(sentinel)
                    _kill(process, job)
        return False
    finally:
        for process, job, _ in alive.values():
            _kill(process, job)


def _kill(process: BaseProcess, job: child.Job) -> None:
    """End a process and all that it has started: they are one session, but for the interpreter."""
    interpreter.end(job.worker)
    try:
        os.killpg(process.pid or 0, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        if process.is_alive():
            process.kill()


def _events(job: child.Job) -> list[dict[str, Any]]:
    if not job.report.exists():
        return []
    lines = job.report.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]
