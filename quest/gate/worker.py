"""One side of the gate: a process that times one case of its own worktree at a time, when asked.

    python -P worker.py EXPRESSION        in the worktree's root, with PYTHONPATH naming it

EXPRESSION is pytest's -k; "" takes all benchmarks. Requests and replies are lines of JSON over
stdin and stdout. The gate's own file drives both sides, so that the instrument is the same; what
it asks of a worktree, which may be an older version, is

- `benchmarks/bench_*.py`: pytest functions that take `timed` and their parameters, and call
  `timed` once with the keywords `key`, `judge`, `run`, `shape` and perhaps `spec`, `draw` and
  `prepare` (see `benchmarks/timed.py`). pytest collects them.
- `benchmarks.cases`: `DEVICE` and `DTYPE`.
- `benchmarks.gate`: `open_for(key, judge)`, which returns an object with `worst_ratio` or raises
  `RedGateError`.

It imports nothing of quest's itself: that name is the worktree's.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import inspect
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

SEED = 0
INTERFACE = ("key", "judge", "run", "shape")


def _clock() -> Any:
    """`clock.py` beside this file, whatever the worktree's quest holds."""
    spec = importlib.util.spec_from_file_location(
        "gate_clock", Path(__file__).with_name("clock.py")
    )
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


clock = _clock()


class Refused(Exception):
    """Ends a request with a status for the gate: red, skipped, old, broken, usage."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Collected:
    """A plugin of pytest's that keeps what was collected, what -k left out, and the errors."""

    def __init__(self) -> None:
        self.items: dict[str, Any] = {}
        self.left_out: list[str] = []
        self.errors: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            last = report.longreprtext.strip().splitlines()[-1:]
            self.errors.append(f"{report.nodeid}: {' '.join(last)}")

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.left_out += [item.nodeid for item in items]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = {item.nodeid: item for item in session.items}


def collect(expression: str) -> tuple[dict[str, Any], list[str]]:
    """(pytest's items by node id, ids that `expression` left out).

    Refused where the worktree has no benchmarks that it can read.
    """
    if not Path("benchmarks/cases.py").is_file() or not Path("benchmarks/gate.py").is_file():
        raise Refused("old", "it has no benchmarks that the gate can drive (benchmarks/cases.py)")
    found = _Collected()
    line = ["benchmarks/", "--collect-only", "-q", "-p", "no:cacheprovider", "--assert=plain"]
    status = pytest.main([*line, "-k", expression] if expression else line, plugins=[found])
    if found.errors:
        raise Refused("broken", f"its benchmarks can't be collected: {'; '.join(found.errors)}")
    fine = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    if status not in fine:
        said = io.StringIO()
        with contextlib.redirect_stderr(said):  # where pytest tells of a broken conftest.py
            if expression and pytest.main(line) in fine:
                raise Refused("usage", f"pytest can't collect benchmarks with -k {expression!r}")
        last = (said.getvalue().strip().splitlines() or [f"pytest ends with {int(status)}"])[-1]
        raise Refused(
            "broken", f"its benchmarks can't be collected: {last.removeprefix('E ').strip()}"
        )
    return found.items, found.left_out


class _Recorder:
    """What a benchmark gets in place of the fixture `timed`: it keeps the case for later."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def __call__(self, **given: Any) -> None:
        lacking = [name for name in INTERFACE if name not in given]
        if lacking:
            raise Refused("old", f"timed() is called without {', '.join(lacking)}")
        self.given = given


def _skipped(item: Any) -> str | None:
    """Why a mark skips a benchmark; pytest puts one on a test whose list of parameters is empty."""
    for mark in item.iter_markers():
        if mark.name == "skip" or (mark.name == "skipif" and any(mark.args)):
            return str(mark.kwargs.get("reason") or mark.name)
    return None


def _described(item: Any) -> dict[str, Any]:
    """The keywords of a benchmark's call of `timed`."""
    reason = _skipped(item)
    if reason is not None:
        raise Refused("skipped", reason)
    recorder = _Recorder()
    parameters = dict(getattr(getattr(item, "callspec", None), "params", {}))
    others = set(inspect.signature(item.obj).parameters) - set(parameters) - {"timed"}
    if others:
        raise Refused("old", f"it takes fixtures that the gate has not: {sorted(others)}")
    try:
        item.obj(timed=recorder, **parameters)
    except pytest.skip.Exception as skip:
        raise Refused("skipped", str(skip)) from None
    if not recorder.given:
        raise Refused("old", "it never calls timed()")
    return recorder.given


def _cpu_peak(call: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator holds for `call` at a time, as its profiler saw."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True,
        acc_events=True,  # of one cycle as well, without torch 2.11's warning of others
    ) as profile:  # fmt: skip
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    moved = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return max(itertools.accumulate(size for _, size in moved), default=0)


class Case:
    """The case that is open: it has passed its gate and holds its inputs."""

    def __init__(self, item: Any, one_round: Any) -> None:
        from benchmarks import cases, gate

        self.one_round = one_round
        cuda = cases.DEVICE != "cpu"
        before = torch.cuda.memory_allocated() if cuda else 0
        given = _described(item)
        try:
            self.worst_ratio = float(gate.open_for(given["key"], given["judge"]).worst_ratio)
        except gate.RedGateError as error:
            raise Refused("red", str(error)) from None
        shapes, prepare = given.get("draw") or (given["shape"],), given.get("prepare")
        generator = torch.Generator(cases.DEVICE).manual_seed(SEED)

        def drawn() -> tuple[Tensor, ...]:
            made = tuple(
                torch.randn(shape, generator=generator, device=cases.DEVICE, dtype=cases.DTYPE)
                for shape in shapes
            )
            return made + (prepare(*made) if prepare else ())

        self.identity = " ".join(map(str, (given.get("spec", "no spec"), "key", *given["key"])))
        self.inputs = f"{[list(shape) for shape in shapes]} {cases.DTYPE}"
        run, sets = given["run"], [drawn()]
        run(*sets[0])  # compiles, and allocates what stays
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            run(*sets[0])
            self.peak = torch.cuda.max_memory_allocated() - before
        else:
            self.peak = _cpu_peak(lambda: run(*sets[0]))
        read = sets[0][len(shapes) :] or sets[0]
        while len(sets) < clock.input_sets(clock.size(read), cases.DEVICE):
            sets.append(drawn())
        self.call: Callable[[int], object] = lambda i: run(*sets[i % len(sets)])
        self.next = 0

    def turn(self, calls: int) -> list[float]:
        """Seconds of each of `calls` calls, after one that is not timed."""
        start = self.next
        self.next += calls + 1
        self.call(start)
        return [self.one_round([self.call], i)[0] for i in range(start + 1, self.next)]


class Worker:
    """Answers requests."""

    def __init__(self, expression: str) -> None:
        self.items, self.left_out = collect(expression)
        from benchmarks import cases

        # CPU times are those of one thread, as in the benchmarks.
        torch.set_num_threads(1)
        cuda = cases.DEVICE != "cpu"
        self.device = torch.cuda.get_device_name() if cuda else "cpu"
        self.one_round = clock.CudaRound() if cuda else clock.cpu_round
        if cuda:  # cuBLAS keeps its workspace: not to be counted as the first case's
            torch.mm(*torch.ones(2, 16, 16, device=cases.DEVICE, dtype=cases.DTYPE))
        # One core may have a busy neighbor, or another speed. (macOS can't pin a process.)
        pins = not cuda and hasattr(os, "sched_setaffinity")
        self.cores = sorted(os.sched_getaffinity(0)) if pins else []
        self.case: Case | None = None

    def hello(self) -> dict[str, Any]:
        """What is there, and what -k left out of it."""
        return {
            "cases": list(self.items),
            "left_out": self.left_out,
            "device": self.device,
            "torch": torch.__version__,
        }

    def open(self, case: str) -> dict[str, Any]:
        """Pass the gate of a case, measure its memory, and say how long a round of it takes."""
        self.close()
        self.case = Case(self.items[case], self.one_round)
        walls = []
        for _ in range(3):
            start = time.perf_counter()
            self.case.turn(1)
            walls.append((time.perf_counter() - start) / 2)
        return {
            "worst_ratio": self.case.worst_ratio,
            "peak": self.case.peak,
            "inputs": self.case.inputs,
            "identity": self.case.identity,
            "wall": statistics.median(walls),
        }

    def turn(self, calls: int, pair: int) -> dict[str, Any]:
        """Time the open case. pair: both sides' turns of a pair run on the same core."""
        if self.case is None:
            raise Refused("broken", "no case is open")
        if self.cores:
            os.sched_setaffinity(0, {self.cores[pair % len(self.cores)]})
        host_bound = getattr(self.one_round, "host_bound", False)
        return {"seconds": self.case.turn(calls), "host_bound": host_bound}

    def close(self) -> dict[str, Any]:
        """Let go of the open case and its memory."""
        self.case = None
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()
        return {}


def _lost() -> bool:
    """Is the CUDA context unusable? After some errors (an illegal address) all calls fail."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main() -> None:
    """Serve until the pipe closes."""
    # Whatever a benchmark prints must not end up in the pipe.
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker: Worker | None = None

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal worker
        do = request.pop("do")
        if worker is None:
            worker = Worker(sys.argv[1])
        return {"status": "ok", **getattr(worker, do)(**request)}

    for line in requests:
        try:
            reply = answer(json.loads(line))
        except Refused as refusal:
            reply = {"status": refusal.status, "message": str(refusal)}
        except Exception as error:
            status = "died" if _lost() else "broken"
            reply = {"status": status, "message": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
