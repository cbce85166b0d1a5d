"""The process of one mutant: a copy of the project, the fault in it, and pytest.

It is forked from a server that has imported torch, Triton and pytest, and nothing of the project.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from . import interpreter

# What the server imports, once for all mutants. Not `torch._inductor.compile_fx`: where there is a
# GPU it asks CUDA for it, and then no forked process can use CUDA (seen with torch 2.11, where
# NVRTC crashed in such processes besides).
PRELOAD = [
    "torch", "torch._dynamo", "torch.testing", "triton", "triton.language", "numpy",
    "scipy.stats", "scipy.optimize", "scipy.special", "scipy.linalg", "pytest", "hypothesis",
    "hypothesis.strategies", "click", "rich.console", "matplotlib",
]  # fmt: skip
# Besides its patience, a test may take this many times what it takes without a fault.
FACTOR = 5.0
# Seconds that imports may take besides; the tests of a file are gathered in two.
IMPORTS = 120.0
# Seconds for NVRTC to compile a variant, on a busy machine; 1 to 6 are usual.
COMPILE = 60.0
# A fault in a size must not take the machine's memory; CUDA reserves more addresses than that.
MEMORY = 24 * 2**30
# What `quest.kernels.cuda` says, before what may be a long log.
REFUSAL = "NVRTC does not compile"
# Of CUDA C++: the source, the architecture, the macros.
Variant = tuple[str, str, tuple[tuple[str, int], ...]]


@dataclass(frozen=True)
class Job:
    """What a process does.

    template: the copied project. folder: for this process alone, to be made. file, source: what is
    planted; "" for nothing. tests: node ids in the order in which they run, with their usual
    seconds; empty for all of `paths`. trace: note the lines that tests execute. limited: bound the
    memory. patience: seconds that a test may take and be no failure. interpreter: the address of a
    server, see `interpreter`. binaries: variants, each with the digest of its machine code without
    a fault, or "": it is compiled before any test, which are not run where all stay the same, or
    where there are no `paths`.
    listing: tests name the variants that they compile, and are given something else.
    """

    template: Path
    folder: Path
    file: str
    source: bytes
    paths: tuple[str, ...]
    tests: dict[str, float]
    profile: str
    trace: bool
    limited: bool
    patience: float = 30.0
    interpreter: Path | None = None
    binaries: tuple[tuple[Variant, str], ...] = ()
    listing: bool = False

    @property
    def limit(self) -> float:
        """Seconds after which the whole process hangs, whatever its tests say."""
        usual = sum(self.tests.values())
        if self.trace or (self.paths and not self.tests):
            return 3600.0
        compiled = COMPILE * len(self.binaries)
        return 2 * (IMPORTS + self.patience) + FACTOR * usual + compiled

    @property
    def worker(self) -> Path:
        """Holds the number of the interpreter's process."""
        return self.folder / "worker"

    @property
    def report(self) -> Path:
        """Lines of JSON: what happened."""
        return self.folder / "report.jsonl"

    @property
    def log(self) -> Path:
        """What the process printed."""
        return self.folder / "log.txt"


IGNORED = shutil.ignore_patterns(
    ".git", ".venv", "runs", "build", "dist", "*.egg-info", ".hypothesis", ".mypy_cache",
    ".ruff_cache", ".pytest_cache", ".benchmarks",
)  # fmt: skip


def copy(source: Path, to: Path) -> None:
    """The project with its byte code, without what git ignores."""
    shutil.copytree(source, to, symlinks=True, ignore=IGNORED)


def run(job: Job) -> None:
    """The whole life of the process."""
    os.setsid()
    job.folder.mkdir(parents=True)
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job.limited:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    root = job.folder / "project"
    copy(job.template, root)
    if job.file:
        path = root / job.file
        path.write_bytes(job.source)
        # Byte code of the sound file is known by its time and size, which a fault need not change.
        for old in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            old.unlink()
    os.chdir(root)
    for name in [n for n in sys.modules if n.partition(".")[0] == "property_tests"]:
        del sys.modules[name]
    sys.path[:] = [str(root), *(p for p in sys.path if p and not (Path(p) / "quest").is_dir())]
    arguments = [*job.paths, "-x", "-q", "-p", "no:cacheprovider", "--tb=short", "--color=no",
                 # Its rewriting wants to see modules first that the server has imported.
                 "--assert=plain",
                 f"--hypothesis-profile={job.profile}"]  # fmt: skip
    if job.trace:
        arguments.remove("-x")
        folder = job.folder / "trace"
        folder.mkdir()
        os.environ["QUEST_MUTANTS_TRACE"] = str(folder)
        os.environ["PYTHONPATH"] = str(root / "property_tests" / "mutants" / "startup")
    watch = Watch(job, root)
    if job.binaries and (watch.compile() or not job.paths):
        os._exit(0)
    watch.say(began=True)
    if not job.trace:  # until the first test has a limit of its own
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, IMPORTS + job.patience)
    if job.trace:  # before pytest imports plugins and conftest.py, and these the project
        from property_tests.mutants import trace

        watch.mark = trace.Mark(folder)
        trace.start(folder, root.resolve())
    status = pytest.main(arguments, plugins=[watch])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(status))


class _Anything(bytes):
    """A binary that holds all that a test looks for: what it compiles next is asked for, too."""

    def __contains__(self, part: object) -> bool:
        return True


class Watch:
    """A pytest plugin: order and choice of tests, a limit for each, and a report."""

    def __init__(self, job: Job, root: Path) -> None:
        self.job, self.root, self.number = job, root, 0
        self.report = job.report.open("w", buffering=1)
        self.names: dict[str, int] = {}
        self.mark: Any = None

    def say(self, **event: Any) -> None:
        self.report.write(json.dumps(event) + "\n")

    def compile(self) -> bool:
        """Compile variants up to the first that differs; whether tests have nothing to see."""
        from quest.kernels import cuda

        for n, ((source, architecture, macros), digest) in enumerate(self.job.binaries):
            try:
                code = cuda.compile_(source, architecture, dict(macros)).code
            except RuntimeError as error:
                self.say(refused=str(error)[-1500:])
                return True
            made = hashlib.sha256(code).hexdigest()[:16]
            self.say(binary=n, digest=made)
            if digest and made != digest:
                return False
        if self.job.file:
            self.say(identical=len(self.job.binaries))
        return True

    def pytest_configure(self, config: Any) -> None:
        from hypothesis import Phase, settings

        # The first failure is enough: nothing is made small, nothing explained.
        name = self.job.profile
        phases = (Phase.explicit, Phase.reuse, Phase.generate)
        settings.register_profile(name, settings.get_profile(name), phases=phases, print_blob=False)
        settings.load_profile(name)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        wanted = self.job.tests
        if wanted:
            order = {name: i for i, name in enumerate(wanted)}
            items[:] = sorted(
                (i for i in items if i.nodeid in order), key=lambda i: order[i.nodeid]
            )
        self.names = {item.nodeid: n for n, item in enumerate(items, 1)}
        self.say(gathered=len(items))
        quest = sys.modules.get("quest")
        place = Path(getattr(quest, "__file__", None) or self.root).resolve()
        if not place.is_relative_to(self.root.resolve()):
            self.say(stray=str(place))
        if torch.cuda._is_in_bad_fork():
            self.say(started=True)
        if self.job.interpreter is not None and "quest.conformance.interpreter" in sys.modules:
            interpreter.use(
                self.job.interpreter, self.job.worker, lambda why: self.say(no_interpreter=why)
            )
        if self.job.trace:
            self._note_variants()

    def _note_variants(self) -> None:
        """Report what tests compile of CUDA C++."""
        from quest.kernels import cuda

        compile_ = cuda.compile_

        def noted(source: str, architecture: str, macros: dict[str, int], **how: Any) -> Any:
            self.say(variant=[source, architecture, list(macros.items())])
            if self.job.listing:
                return SimpleNamespace(code=_Anything(b"\x7fELF"))
            return compile_(source, architecture, macros, **how)

        cuda.compile_ = noted

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.say(broken=report.nodeid, text=str(report.longrepr)[-1500:])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.say(start=nodeid)
        if self.job.trace:
            self.mark.set(self.names[nodeid])
        else:
            usual = self.job.tests.get(nodeid, 0.0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, self.job.patience + FACTOR * usual)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            text = str(report.longrepr)
            self.say(failed=report.nodeid, text=text[-1500:], compiles=REFUSAL not in text)
        self.say(took=report.nodeid, when=report.when, seconds=report.duration,
                 outcome=report.outcome)  # fmt: skip

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self.job.trace:
            self.mark.set(0)

    def pytest_sessionfinish(self, session: Any) -> None:
        if self.job.trace:
            from property_tests.mutants import trace

            # Processes that tests have started end, and write, when their pipes close.
            from quest.conformance.interpreter import running

            if running.cache_info().currsize:
                running().close()
            trace.start.write()  # type: ignore[attr-defined]
            self.say(names=list(self.names))

    def pytest_unconfigure(self, config: Any) -> None:
        self.say(done=True)
