"""What runs a mutant: the interpreter that is forked, and CUDA C++ that is compiled first."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from property_tests.mutants import baseline, child, choice, covered, interpreter, pool, runner
from property_tests.mutants.choice import quick
from property_tests.mutants.evidence import Outline
from property_tests.mutants.mutant import ROOT, Mutant, read
from property_tests.processes import alive, gone
from quest.kernels import blocks, cuda, few, forms, rows

TESTS = "property_tests/test_packing.py"
FIRST = f"{TESTS}::test_the_first_element_is_in_the_lowest_bits"


ASKS = """
import os, sys
from pathlib import Path
from property_tests.mutants import interpreter
from quest.conformance import lanes, inputs
import torch
interpreter.use(Path(sys.argv[1]), Path(sys.argv[2]), print)
lane = lanes.all_lanes()[1]
x = torch.ones(2, 16)
y = lane.call("hadamard", x, order=16, transpose=False)["y"]
assert y[0].tolist() == [4.0] + [0.0] * 15, y
print(Path(sys.argv[2]).read_text(), flush=True)
sys.stdin.read()
os._exit(0)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_a_forked_interpreter_computes_and_ends_with_who_asked(tmp_path: Path) -> None:
    server = interpreter.Server(tmp_path)
    try:
        asking = [sys.executable, "-c", ASKS, str(server.address), str(tmp_path / "worker")]
        for way in ("it ends by itself", "it is ended"):
            process = subprocess.Popen(
                asking, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
            )
            assert process.stdout is not None
            worker = int(process.stdout.readline())
            assert alive(worker)
            if way == "it is ended":
                interpreter.end(tmp_path / "worker")
                assert gone(worker)
            process.communicate("")
            assert process.returncode == 0
            assert gone(worker), way
    finally:
        server.close()


def test_a_server_ends_with_who_started_it(tmp_path: Path) -> None:
    starts = (
        "import os, sys\nfrom pathlib import Path\n"
        "from property_tests.mutants.interpreter import Server\n"
        "server = Server(Path(sys.argv[1]))\nprint(server._process.pid, flush=True)\nos.abort()\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", starts, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert gone(int(told.stdout))


BINARIES = ((("few.cu", "sm_90a", ()), "0"),)
JOB = child.Job(
    Path(), Path(), "kernels/few.cu", b"", (), {"t": 1.0}, "quick", False, False, binaries=BINARIES
)


def ended(*events: dict[str, Any], code: int = 1, late: bool = False) -> pool.Ended:
    """How a process went that ran one test, of a text that was compiled before."""
    return pool.Ended(JOB, code, 1.0, [{"began": True}, *events], late)


GATHERED = {"gathered": 1}


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        (ended({"binary": 0}, GATHERED, {"start": "t"}, {"done": True}, code=0), "survived"),
        (ended(GATHERED, {"start": "t"}, {"failed": "t", "text": "1 is not 2"}), "killed"),
        (ended(GATHERED, {"failed": "t", "text": "CUDA error: an illegal memory access was "
               "encountered"}), "crash"),
        (ended(GATHERED, {"failed": "t", "text": "misaligned address"}), "crash"),
        (ended(GATHERED, {"start": "t"}, code=-11), "crash"),
        (ended(GATHERED, {"start": "t"}, code=-14), "timeout"),
        (ended(GATHERED, {"start": "t"}, code=-9, late=True), "timeout"),
        (ended({"refused": "NVRTC does not compile few.cu"}, code=0), "refused"),
        (ended(GATHERED, {"failed": "t", "text": "error: ...", "compiles": False}), "refused"),
        (ended(GATHERED, {"failed": "t", "text": "NVRTC says nothing", "compiles": True}),
         "killed"),
        (ended({"binary": 0}, {"identical": 1}, code=0), "identical"),
        # Ends at import, by itself or by the alarm.
        (ended(code=4), "killed"),
        (ended(code=-11), "crash"),
        (ended(code=-14), "timeout"),
        # All tests pass, and the run fails: for its sums. It ends before it is done.
        (ended(GATHERED, {"start": "t"}, {"done": True}, code=1), "killed"),
        (ended(GATHERED, code=1), "crash"),
        # What says nothing of a mutant.
        (ended(GATHERED, {"start": "t"}, code=-9), "no verdict"),
        (ended(code=-9, late=True), "no verdict"),
        (ended(GATHERED, {"no_interpreter": "refused"}, {"failed": "t", "text": ""}), "no verdict"),
        (pool.Ended(JOB, 1, 1.0, []), "no verdict"),  # no space for a copy, say
    ],
)  # fmt: skip
def test_what_a_process_says_of_its_mutant(end: pool.Ended, outcome: str) -> None:
    assert runner.verdict(end)[0] == outcome


def test_a_run_that_fails_though_its_tests_pass_is_killed_by_the_sums() -> None:
    """And one in which a test was not found says nothing of any mutant."""
    events = {"start": "t"}, {"done": True}
    assert runner.verdict(ended(GATHERED, *events, code=1)) == ("killed", runner.SUMS)
    two = replace(JOB, tests={"t": 1.0, "u": 1.0})
    with pytest.raises(pool.HarnessError, match="1 of 2 tests were found"):
        runner.verdict(replace(ended(GATHERED, *events, code=0), job=two))


def test_a_test_has_its_usual_time_five_times_besides_its_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    monkeypatch.setattr(child.signal, "signal", lambda *_: None)
    monkeypatch.setattr(child.signal, "setitimer", lambda _, seconds: limits.append(seconds))
    job = replace(JOB, folder=tmp_path, tests={"t": 2.0}, patience=7.0)
    watch = child.Watch(job, tmp_path)
    for name in ("t", "another"):
        watch.pytest_runtest_logstart(name)
        watch.pytest_runtest_logfinish(name)
    watch.report.close()
    assert limits == [17.0, 0, 7.0, 0]
    # The last line is torn where the process was killed.
    with job.report.open("a") as file:
        file.write('{"start": "th')
    assert pool._events(job) == [{"start": "t"}, {"start": "another"}]


def test_that_one_process_was_late_is_not_said_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may have the same sentinel: the number of a file that is free again."""
    looks = iter([[], [7], [7]])
    process = SimpleNamespace(sentinel=7, exitcode=0, pid=0)
    for name in ("start", "join", "close"):
        setattr(process, name, lambda: None)
    context = SimpleNamespace(
        set_forkserver_preload=lambda _: None, Process=lambda **_: process
    )  # fmt: skip
    monkeypatch.setattr(pool.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(pool, "wait", lambda *_, **__: next(looks))
    monkeypatch.setattr(pool, "_kill", lambda *_: None)
    monkeypatch.setattr(pool.shutil, "rmtree", lambda *_, **__: None)
    late: list[bool] = []

    def told(end: pool.Ended) -> Iterator[child.Job]:
        late.append(end.late)
        return iter(())

    class Short(child.Job):
        limit = -1.0  # it is over at once

    fields = {name: getattr(JOB, name) for name in JOB.__dataclass_fields__}
    assert pool.run_all(iter([Short(**fields), JOB]), 1, told)
    assert late == [True, False]


@pytest.mark.parametrize("gathered", [[], [{"gathered": 0}], [{"gathered": 2}]])
def test_nothing_survives_where_other_tests_were_gathered(gathered: list[dict[str, int]]) -> None:
    with pytest.raises(pool.HarnessError, match="of 1 tests were found"):
        runner.verdict(ended(*gathered, {"done": True}, code=0))


def test_a_launcher_that_compiles_nothing_is_killed_and_not_refused() -> None:
    end = ended(GATHERED, {"failed": "t", "text": "error: ...", "compiles": False})
    assert runner.verdict(replace(end, job=replace(JOB, file="kernels/few.py")))[0] == "killed"


@pytest.mark.parametrize("event", [{"stray": "/elsewhere/quest"}, {"started": True}])
def test_a_process_in_which_tests_can_t_tell_gives_no_verdict(event: dict[str, Any]) -> None:
    end = ended(event, GATHERED, {"start": "t"}, {"failed": "t", "text": ""})
    why = "not the mutant.s copy|started before the fork"
    with pytest.raises(pool.HarnessError, match=why):
        runner.verdict(end)
    with pytest.raises(pool.HarnessError, match=why):
        baseline._part(end)


@pytest.mark.skipif(not covered.has_gpu(), reason="no CUDA device")
def test_a_forked_process_can_use_cuda() -> None:
    """What the server imports must not start it."""
    code = (
        "import importlib, os, sys, torch\n"
        f"for name in {child.PRELOAD}: importlib.import_module(name)\n"
        "pid = os.fork()\n"
        "if pid == 0: os._exit(not torch.ones(1, device='cuda').item())\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_file_of_tests_that_can_t_be_gathered_is_no_empty_one(tmp_path: Path) -> None:
    with pool.workshop() as folder:
        (folder / "template" / "property_tests" / "test_packing.py").write_text("import nothing_")
        with pytest.raises(pool.HarnessError, match=r"test_packing.*fails without a fault"):
            baseline.measure(folder, tmp_path / "b.json", 1, print, frozenset({"packing"}))


def planted(file: str, new: str, name: str = "x") -> Mutant:
    """A mutant that puts a text before the end of a file."""
    end = len(read(file))
    return Mutant(name, "systematic", file, (1, 1), end, end, new, "")


FAULT = "\n\ndef hadamard(*_, **__): return None\n"
INTERPRETED = (
    "property_tests/test_hadamard.py::test_layouts[gaussian-contiguous-triton-interpreter]"
)
Told = list[tuple[str, runner.Result]]


@pytest.fixture
def told() -> Told:
    return []


class Lives:
    """What becomes of mutants, by how their processes end: each end is told of one job.

    An end: "" where all pass, "sums" where the run fails in spite of that, or the test that fails.
    """

    def __init__(self, folder: Path) -> None:
        self.told: list[runner.Result] = []
        self.doubts: list[str] = []
        self.jobs: list[child.Job] = []
        path = folder / "template" / "quest" / "packing.py"
        path.parent.mkdir(parents=True)
        path.write_bytes(read("quest/packing.py"))
        self.plan: list[choice.Part] = []
        self.runs = runner._Runs(
            lambda m: self.plan, folder, lambda m, result: self.told.append(result), 30.0, {},
            Path(), self.doubts.append,
        )  # fmt: skip

    def life(self, plan: list[choice.Part], *ends: str) -> None:
        self.plan = plan
        life = self.runs.life(planted("quest/packing.py", "\nfault = 1\n"))
        job = next(life)
        for n, end in enumerate(ends, 1):
            self.jobs.append(job)
            try:
                job = life.send(self.end(job, end))
            except StopIteration:
                assert n == len(ends)
                return
        raise AssertionError("it asks for more")

    def end(self, job: child.Job, end: str) -> pool.Ended:
        tests = [*job.tests] or NAMES
        ran = tests[: tests.index(end) + 1] if end in tests else tests
        events = [{"began": True}, {"gathered": len(tests)}, *({"start": name} for name in ran)]
        events += [{"failed": end, "text": ""}] if end in tests else []
        return pool.Ended(job, int(bool(end)), 1.0, [*events, {"done": True}])


NAMES = [f"{TESTS}::test_{name}" for name in "abc"]
A, B, C = NAMES
ALL = quick(dict.fromkeys(NAMES, 1.0))
CI = choice.Part("ci", (TESTS,), {})


def test_a_kill_counts_where_its_test_passes_alone_without_the_fault(tmp_path: Path) -> None:
    lives = Lives(tmp_path)
    lives.life([ALL], B, B, "")
    assert [(r.outcome, r.by) for r in lives.told] == [("killed", B)]
    assert [(bool(job.file), [*job.tests]) for job in lives.jobs] == [
        (True, NAMES), (True, [B]), (False, [B]),
    ]  # fmt: skip
    # That is known now of this test and profile, and of no other.
    lives.life([ALL], B, B)
    lives.life([ALL], C, C, "")
    assert [r.by for r in lives.told] == [B, B, C]
    assert not lives.doubts


def test_a_kill_that_takes_the_tests_before_it_counts_behind_them(tmp_path: Path) -> None:
    lives = Lives(tmp_path)
    lives.life([ALL], B, "", "")
    assert [(r.outcome, r.by) for r in lives.told] == [("killed", B)]
    assert (lives.jobs[-1].file, [*lives.jobs[-1].tests]) == ("", [A, B])


def test_the_sums_of_a_run_kill_where_they_are_right_without_the_fault(tmp_path: Path) -> None:
    lives = Lives(tmp_path)
    lives.life([ALL], "sums", "")
    lives.life([replace(ALL, tests={A: 1.0, B: 1.0})], "sums", "sums")
    assert [(r.outcome, r.by) for r in lives.told] == [("killed", runner.SUMS), ("survived", "")]
    assert lives.doubts == [runner.SUMS]


def test_a_kill_in_the_ci_profile_says_so_and_is_made_sure_of_there(tmp_path: Path) -> None:
    """With what it rests on another: no baseline has seen what its tests call."""
    lives = Lives(tmp_path)
    lives.life([ALL], B, B, "")
    lives.life([replace(ALL, passed=choice.QUICK), CI], "", B, B, "")
    assert [(r.outcome, r.by, r.passed) for r in lives.told] == [
        ("killed", B, ""), ("open", "", choice.QUICK), ("killed", f"{B} (ci)", ""),
    ]  # fmt: skip
    assert [job.profile for job in lives.jobs] == ["quick"] * 4 + ["ci"] * 3
    assert {job.profile: job.patience for job in lives.jobs} == {"quick": 30.0, "ci": 300.0}
    # One that fails there without a fault says nothing.
    lives.life([replace(ALL, passed=choice.QUICK), CI], "", C, C, C)
    assert (lives.told[-1].outcome, lives.doubts) == (runner.LOST, [C])


def test_what_passes_some_tests_alone_is_open(tmp_path: Path) -> None:
    lives = Lives(tmp_path)
    first, rest = (quick({name: 1.0}) for name in (A, B))
    narrow = [replace(first, passed=choice.FIRST), replace(rest, passed=choice.OWN_TESTS)]
    lives.life(narrow, "", "")
    lives.life([replace(first, passed=choice.FIRST), rest], "", "")
    assert [(r.outcome, r.passed) for r in lives.told] == [
        ("open", choice.OWN_TESTS), ("survived", ""),
    ]  # fmt: skip


def test_no_kill_comes_of_an_interpreters_server_that_is_dead(
    monkeypatch: pytest.MonkeyPatch, told: Told
) -> None:
    class Dead(interpreter.Server):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            self._process.kill()
            self._process.wait()

    monkeypatch.setattr(runner, "Server", Dead)
    with pool.workshop() as folder, pytest.raises(runner.HarnessError, match="interpreters"):
        runner.run(
            [planted("kernels/hadamard.py", FAULT)], lambda m: [quick({INTERPRETED: 10.0})],
            folder, 1, lambda m, result: told.append((m.id, result)),
        )  # fmt: skip
    assert told == []


def test_no_kill_comes_of_a_server_of_processes_that_dies(told: Told) -> None:
    def plan(mutant: Mutant) -> list[choice.Part]:
        # While the process of the mutant is in its loop; on a busy machine it is not there yet.
        threading.Timer(5.0, lambda: os.kill(forked_from(), signal.SIGKILL)).start()
        return [quick({FIRST: 60.0})]

    loop = planted("quest/packing.py", "\n\ndef _check(bits):\n    while True: pass\n")
    died = "forked has died|no process can be forked"
    with pool.workshop() as folder, pytest.raises(runner.HarnessError, match=died):
        runner.run([loop], plan, folder, 1, lambda m, result: told.append((m.id, result)))
    assert told == []


def forked_from() -> int:
    from multiprocessing import forkserver

    return forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined, no-any-return]


def test_every_variant_is_known_and_not_those_that_the_quick_profile_draws(tmp_path: Path) -> None:
    """A text that is the same in a drawn few may differ in the others."""
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    cache = tmp_path / "baseline.json"
    with pool.workshop() as folder:
        seen = baseline.measure(folder, cache, 2, print, frozenset({"few", "rows"}))
    assert seen is not None
    compiled = [t for t in seen.tests if baseline.COMPILES in t]
    assert len(compiled) < 10  # of those
    known = json.loads(cache.read_text())
    counts = Counter(source for source, _, _ in seen.variants)
    # Of few.cu: tiles x bits x dtypes, and those in a cluster.
    assert counts["few.cu"] == len(few.TILES) * 3 * (3 + 1)
    assert len(known["property_tests/test_few.py"]["variants"]) == counts["few.cu"]
    assert len(known["property_tests/test_rows.py"]["variants"]) == counts["rows.cu"] > 10


def test_what_is_imported_before_any_test_counts_for_each_file(tmp_path: Path) -> None:
    """The constants of a module that conftest.py and pytest's plugins import, too."""
    with pool.workshop() as folder:
        seen = baseline.measure(folder, tmp_path / "b.json", 1, print, frozenset({"packing"}))
    assert seen is not None
    seen_of = seen.executed["property_tests/test_packing.py"]
    assert {"quest/constants.py", "quest/conformance/lanes.py", "quest/packing.py"} <= set(seen_of)
    calls = Outline(read("quest/grids.py").decode()).called(seen_of["quest/grids.py"])
    assert "lloyd_max" not in calls


def test_a_test_that_compiles_several_variants_names_them_all() -> None:
    """It looks into each before it asks for the next."""
    text = (
        "import pytest\nfrom quest.kernels import cuda\n"
        "def test_one_after_the_other_compiles_without_a_gpu():\n"
        "    for n in (1, 2):\n"
        "        made = cuda.compile_('few.cu', 'sm_90a', {'N': n})\n"
        "        assert made.code[:4] == b'\\x7fELF' and b'few' in made.code\n"
        "    with pytest.raises(RuntimeError):\n"
        "        cuda.compile_('few.cu', 'sm_90a', {'N': 3})\n"
    )
    with pool.workshop() as folder:
        (folder / "template" / "property_tests" / "test_several.py").write_text(text)
        ends: list[pool.Ended] = []
        job = child.Job(
            folder / "template", folder / "listing", "", b"",
            ("property_tests/test_several.py",), {}, "ci", True, True, listing=True,
        )  # fmt: skip
        pool.run_all(iter([job]), 1, lambda end: iter(ends.append(end) or ()))
    named = [e["variant"][2] for e in ends[0].events if "variant" in e]
    assert named == [[["N", 1]], [["N", 2]], [["N", 3]]]


def test_a_long_log_of_nvrtc_is_a_refusal(told: Told) -> None:
    """Which words a report begins with does not hang on how much of it is kept."""
    tests = "property_tests/test_long.py"
    text = (
        "from pathlib import Path\nfrom quest.kernels import cuda\n"
        "def test():\n"
        "    if 'broken' in Path(cuda.__file__).with_name('few.cu').read_text():\n"
        "        raise RuntimeError('NVRTC does not compile few.cu: ' + 'error ' * 1000)\n"
    )
    with pool.workshop() as folder:
        (folder / "template" / tests).write_text(text)
        runner.run(
            [planted("kernels/few.cu", "broken")], lambda m: [quick({f"{tests}::test": 1.0})],
            folder, 1, lambda m, result: told.append((m.id, result)),
        )  # fmt: skip
    assert [r.outcome for _, r in told] == ["refused"]


@pytest.mark.parametrize("code", [-11, 1])
def test_a_compilation_that_ends_by_itself_says_nothing(
    code: int, told: Told, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Behind tests that pass, where there is a GPU: NVRTC itself may crash."""
    monkeypatch.setattr(covered, "has_gpu", lambda: True)
    (tmp_path / "template").symlink_to(ROOT)
    text = planted("kernels/few.cu", "\n")
    runs = runner._Runs(
        lambda m: [quick({FIRST: 1.0})], tmp_path, lambda m, r: told.append((m.id, r)), 30.0,
        dict(BINARIES), tmp_path, print,
    )  # fmt: skip
    life = runs.life(text)
    job = next(life)
    events: list[dict[str, Any]] = [{"began": True}, GATHERED, {"start": FIRST}, {"done": True}]
    job = life.send(pool.Ended(job, 0, 1.0, events))
    assert (job.binaries, job.paths) == (BINARIES, ())
    with pytest.raises(StopIteration):
        life.send(pool.Ended(job, code, 1.0, []))
    assert [r.outcome for _, r in told] == ["no verdict"]


def test_nothing_is_compiled_where_it_is_not_asked_for(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first tests alone, with a GPU."""
    monkeypatch.setattr(covered, "has_gpu", lambda: True)
    monkeypatch.delattr(runner, "_binaries")
    with pool.workshop() as folder:
        runner.run(
            [planted("kernels/few.cu", "\n")], lambda m: [quick({FIRST: 10.0})], folder, 1,
            lambda m, result: told.append((m.id, result)), variants=(BINARIES[0][0],),
            compare=False,
        )  # fmt: skip
    assert [r.outcome for _, r in told] == ["survived"]


def test_how_long_a_process_may_take() -> None:
    """One that only compiles has no tests, and no hour."""
    assert JOB.limit == 2 * (120 + 30) + 5 * 1 + 60
    compiles = replace(JOB, tests={}, binaries=2 * BINARIES)
    assert compiles.limit == 2 * (120 + 30) + 2 * 60
    assert replace(JOB, tests={}, paths=(TESTS,)).limit == 3600
    assert replace(JOB, trace=True).limit == 3600


@pytest.mark.parametrize("name", [".", "0", "<C>", "quest", ""])
def test_code_from_a_string_is_looked_at(name: str, tmp_path: Path) -> None:
    """Its name need be no path, or leads to the project's root."""
    code = f"""
import sys
from pathlib import Path
from property_tests.mutants import trace
trace.start(Path(sys.argv[1]), Path.cwd())
assert eval(compile("6 * 7", {name!r}, "eval")) == 42
"""
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, timeout=120, cwd=ROOT)


def test_lines_of_a_long_call_are_those_of_the_test_that_runs(tmp_path: Path) -> None:
    """A call that has begun in one test may end in another."""
    code = """
import sys
from pathlib import Path
from property_tests.mutants import trace
folder, root = Path(sys.argv[1]), Path(sys.argv[2])
mark = trace.Mark(folder)
trace.start(folder, root)
sys.path.insert(0, str(root / "quest"))
import steps
mark.set(1)
steps.f(lambda: mark.set(2))
"""
    (tmp_path / "quest").mkdir()
    (tmp_path / "seen").mkdir()
    text = "def f(turn):\n    x = 1\n    turn()\n    y = x\n    return y\n"
    (tmp_path / "quest" / "steps.py").write_text(text)
    command = [sys.executable, "-c", code, tmp_path / "seen", tmp_path]
    subprocess.run(command, check=True, timeout=120, cwd=ROOT)
    (written,) = (tmp_path / "seen").glob("*.json")
    found = {number: lines for number, _, lines in json.loads(written.read_text())}
    assert found == {0: [1], 1: [2, 3], 2: [4, 5]}


def test_a_test_that_fails_in_any_phase_fails_without_a_fault(tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    phases = [
        {"took": name, "when": when, "seconds": 0.5, "outcome": outcome}
        for name, outcomes in zip(
            names, (("passed",) * 3, ("failed", "passed"), ("passed", "passed", "failed")),
            strict=True,
        )
        for when, outcome in zip(("setup", "call", "teardown"), outcomes, strict=False)
    ]  # fmt: skip
    end = pool.Ended(replace(JOB, folder=tmp_path), 1, 9.0, [*phases, {"names": names}])
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace" / "1.json").write_text(json.dumps([[0, "x", [1]], [2, "x", [1, 3]]]))
    (tmp_path / "trace" / "2.json").write_text(json.dumps([[1, "x", [3]]]))
    part = baseline._part(end)
    assert part["failed"] == ["b", "c"]
    assert part["tests"] == {"a": 1.5, "b": 1.0, "c": 1.5}
    assert part["lines"] == {"x": {1: [-1, 1], 3: [0, 1]}}
    found = baseline._merged({"t": part})
    assert found.lines == {"x": {1: {"", "b"}, 3: {"a", "b"}}}


def test_a_test_has_its_patience_and_five_times_its_usual_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_: list[tuple[int, float]] = []
    monkeypatch.setattr(child.signal, "setitimer", lambda *given: set_.append(given))
    monkeypatch.setattr(child.signal, "signal", lambda *_: None)
    watch = child.Watch(replace(JOB, folder=tmp_path, tests={"t": 4.0}, patience=7.0), tmp_path)
    with watch.report:
        for name in ("t", "another"):
            watch.pytest_runtest_logstart(name)
            watch.pytest_runtest_logfinish(name)
    assert set_ == [(signal.ITIMER_REAL, seconds) for seconds in (27.0, 0, 7.0, 0)]


@pytest.mark.parametrize(
    ("codes", "compiled", "said", "over"),
    [
        ([b"a", b"b"], 2, {"identical": 2}, True),
        ([b"x", b"b"], 1, {}, False),
        ([b"a", b"x"], 2, {}, False),
        ([b"a", None], 2, {"refused": "no"}, True),
        ([None, b"b"], 1, {"refused": "no"}, True),
    ],
)
def test_machine_code_is_compared_up_to_the_first_that_differs(
    codes: list[bytes | None], compiled: int, said: dict[str, Any], over: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Tests have nothing to see where all of it is the same, or there is none."""
    asked: list[str] = []

    def compile_(source: str, *_: Any) -> SimpleNamespace:
        asked.append(source)
        code = codes[len(asked) - 1]
        if code is None:
            raise RuntimeError("no")
        return SimpleNamespace(code=code)

    monkeypatch.setattr(cuda, "compile_", compile_)
    digests = [hashlib.sha256(code).hexdigest()[:16] for code in (b"a", b"b")]
    binaries = tuple((("k.cu", "sm_90a", (("N", n),)), d) for n, d in enumerate(digests))
    watch = child.Watch(replace(JOB, folder=tmp_path, binaries=binaries), tmp_path)
    with watch.report:
        assert watch.compile() == over
    assert len(asked) == compiled
    events = map(json.loads, (tmp_path / "report.jsonl").read_text().splitlines())
    assert {k: v for e in events for k, v in e.items() if "binary" not in e} == said


def test_the_time_bounds_the_look_without_a_fault_and_compilation_too(tmp_path: Path) -> None:
    past = time.monotonic() - 1
    with pool.workshop() as folder:
        cache = tmp_path / "baseline.json"
        names = frozenset({"packing"})
        assert baseline.measure(folder, cache, 1, print, names, past) is None
        variants = (("few.cu", "sm_90a", ()),)
        text = planted("kernels/few.cu", " ")
        assert runner._binaries(folder, variants, 1, past) is None
        told: list[Mutant] = []
        assert not runner.run(
            [text], lambda m: [quick({FIRST: 1.0})], folder, 1, lambda m, _: told.append(m),
            variants=variants, until=past,
        )  # fmt: skip
    assert told == []


def test_what_survives_the_quick_profile_is_open_until_the_ci_profile_has_spoken(
    told: Told,
) -> None:
    parts = [
        choice.Part("quick", (TESTS,), {FIRST: 10.0}, choice.QUICK),
        choice.Part("ci", (TESTS,), {FIRST: 10.0}),
    ]
    with pool.workshop() as folder:
        runner.run(
            [planted("quest/packing.py", "\n# Nothing.\n")], lambda m: parts, folder, 1,
            lambda m, result: told.append((m.id, result)),
        )  # fmt: skip
    assert [(r.outcome, r.passed) for _, r in told] == [
        ("open", "quick profile"),
        ("survived", ""),
    ]


def test_a_test_that_fails_for_what_ran_before_it_kills_nothing(told: Told) -> None:
    """A test that leaves something behind, one that trips over it, and one that sees the fault."""
    tests = "property_tests/test_order.py"
    leaves, trips, sees = (f"{tests}::test_{name}" for name in ("leaves", "trips", "sees"))
    text = (
        "import quest.packing as p\n"
        "def test_leaves(): p.left = True\n"
        "def test_trips(): assert not hasattr(p, 'left')\n"
        "def test_sees(): assert not hasattr(p, 'fault')\n"
    )
    fault = planted("quest/packing.py", "\nfault = 1\n", "fault")
    nothing = planted("quest/packing.py", "\n# Nothing.\n", "nothing")
    with pool.workshop() as folder:
        (folder / "template" / tests).write_text(text)
        order = dict.fromkeys((leaves, trips, sees), 1.0)
        doubts: list[str] = []
        runner.run(
            [fault, nothing], lambda m: [quick(order)], folder, 1,
            lambda m, result: told.append((m.id, result)), doubt=doubts.append,
        )  # fmt: skip
    assert doubts == [trips, trips]
    assert {name: (r.outcome, r.by) for name, r in told} == {
        "fault": ("killed", sees),
        "nothing": ("survived", ""),
    }


@pytest.fixture(scope="module", params=[False, True], ids=["no GPU", "GPU"])
def outcomes(request: pytest.FixtureRequest) -> dict[str, runner.Result]:
    """What becomes of four texts of a kernel that a test compiles in one variant."""
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    file = "kernels/blocks.cu"
    size = len(read(file))
    sign = read(file).index(b"s[0] + s[1]") + 4

    def edited(name: str, start: int, end: int, new: str) -> Mutant:
        return Mutant(name, "cuda", file, (1, 1), start, end, new, "")

    chosen = [
        edited("comment", size, size, "\n// Nothing.\n"),
        edited("unused", size, size, "\nstatic __device__ int unused(int x) { return x + 1; }\n"),
        edited("broken", size, size, "\nint x = ;\n"),
        edited("sum", sign, sign + 3, " - "),
    ]
    macros = blocks.macros(torch.bfloat16, 16, True, forms.VALUES, 0)
    variants = (("blocks.cu", "sm_90a", tuple(macros.items())),)
    found: dict[str, runner.Result] = {}
    begun: list[str] = []
    run_all = pool.run_all

    def noted(jobs: Any, slots: int, ended: Any, *rest: Any) -> bool:
        def told(end: pool.Ended) -> Any:
            begun.append("compiled" if end.first("binary") or end.first("refused") else "tested")
            return ended(end)

        return run_all(jobs, slots, told, *rest)

    with pool.workshop() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(covered, "has_gpu", lambda: request.param)
        patch.setattr(pool, "run_all", noted)
        runner.run(
            chosen, lambda m: [quick({FIRST: 10.0})], folder, 1,
            lambda m, result: found.__setitem__(m.id, result), variants=variants,
        )  # fmt: skip
    # After the variant without a fault: with a GPU tests run first, and tell more cheaply.
    tests = "tested" if request.param else "compiled"
    assert begun[:2] == ["compiled", tests]
    return found


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("comment", "identical"),
        ("unused", "identical"),
        ("broken", "refused"),
        ("sum", "survived"),  # of this test: it runs
    ],
)
def test_what_becomes_of_cuda_where_tests_come_before_compilation_and_after(
    outcomes: dict[str, runner.Result], name: str, outcome: str
) -> None:
    assert outcomes[name].outcome == outcome
    assert outcomes[name].passed == ""


def test_what_is_compiled_without_a_fault_is_kept_until_a_text_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    cache = tmp_path / "binaries.json"
    made = rows.macros(torch.float32, 16, False, forms.CODES, 0, rows.shape(128), False, 0)
    macros = tuple(made.items())
    good: child.Variant = ("rows.cu", "sm_90a", macros)
    bad: child.Variant = ("rows.cu", "sm_90a", (("WIDTH", -1),))
    asked: list[int] = []
    run_all = pool.run_all

    def counted(jobs: Any, *rest: Any) -> bool:
        left = list(jobs)
        asked.append(len(left))
        return run_all(iter(left), *rest)

    monkeypatch.setattr(pool, "run_all", counted)
    with pool.workshop() as folder:
        first = runner._binaries(folder, (good, bad), 2, math.inf, cache)
        assert first is not None
        assert list(first) == [good]
        assert runner._binaries(folder, (good, bad), 2, math.inf, cache) == first
        with (folder / "template" / "kernels" / "codes.cuh").open("a") as header:
            header.write("\n// Nothing.\n")
        assert runner._binaries(folder, (good, bad), 2, math.inf, cache) == first
    assert asked == [2, 0, 2]
