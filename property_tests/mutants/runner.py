"""Runs mutants: the first tests, then the rest if it survived those; one verdict each.

A test may fail for what ran before it in its process, and not for the fault: a kill counts where
the same passes without the fault. Where it does not, the tests behind it are asked.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path

from . import child, covered, pool
from .choice import Part
from .cuda_source import holders, is_cuda
from .interpreter import Server
from .journal import Result
from .mutant import ROOT, Mutant
from .pool import HarnessError

# killed: by a test that failed; crash: by the process' death; timeout: by a test that took FACTOR
# times its usual time and `patience` more. survived: every test passed. not run: nothing on
# this machine executes the line. refused: NVRTC does not compile it. identical: NVRTC makes the
# same machine code of it, in every variant that tests compile. open: some tests passed, see
# `choice.PASSED`, and no other was run.
OUTCOMES = ("killed", "crash", "timeout", "survived", "open", "not run", "refused", "identical")
# Of a process that was ended from outside, or never came to a test: nothing is known of its mutant.
LOST = "no verdict"
SUMS = "the sums over the run"
Binaries = tuple[tuple[child.Variant, str], ...]
# So many of those are no accident.
MOST_LOST = 20
DEAD = frozenset({"killed", "crash", "timeout"})
# What CUDA calls a fault of a kernel, after which its process can do no more.
_BROKEN = re.compile(
    "illegal memory access|misaligned address|unspecified launch failure|illegal instruction|"
    "illegal address|invalid program counter|hardware stack error|operation not supported on glob"
)


class _Lost(Exception):
    """A process said nothing of its mutant, and why."""


def run(
    mutants: list[Mutant],
    plan: Callable[[Mutant], list[Part]],
    folder: Path,
    slots: int,
    told: Callable[[Mutant, Result], None],
    patience: float = 30.0,
    variants: tuple[child.Variant, ...] = (),
    until: float = math.inf,
    doubt: Callable[[str], None] = print,
    cache: Path | None = None,
    compare: bool = True,
) -> bool:
    """Run all; `told` hears of each as it ends, and twice of one that survives the quick profile.

    False: the time was up before.

    plan: the tests of a mutant, a process for each part; see `choice`.
    patience: seconds that a test may take besides. variants: of CUDA C++, that tests compile.
    until: see `pool.run_all`. doubt: hears of each test whose failure did not count. cache: keeps
    what was compiled without a fault. compare: where tests come before compilation, compile what
    survives them.
    """
    texts = any(is_cuda(m.file) for m in mutants) and (compare or not covered.has_gpu())
    binaries = _binaries(folder, variants, slots, until, cache) if texts else {}
    if binaries is None:
        return False
    server = Server(folder)
    lives: dict[Path, Generator[child.Job, pool.Ended, None]] = {}
    runs = _Runs(plan, folder, told, patience, binaries, server.address, doubt)

    def jobs() -> Iterator[child.Job]:
        for mutant in mutants:
            life = runs.life(mutant)
            job = next(life)
            lives[job.folder] = life
            yield job

    def ended(end: pool.Ended) -> Iterator[child.Job]:
        if server.died():
            raise HarnessError("the server from which interpreters are forked has died")
        life = lives.pop(end.job.folder)
        with contextlib.suppress(StopIteration):
            job = life.send(end)
            lives[job.folder] = life
            yield job

    try:
        return pool.run_all(jobs(), slots, ended, until)
    finally:
        server.close()


class _Runs:
    """The lives of mutants, side by side: each asks for processes, and hears how they ended."""

    def __init__(
        self, plan: Callable[[Mutant], list[Part]], folder: Path,
        told: Callable[[Mutant, Result], None], patience: float,
        binaries: dict[child.Variant, str], interpreter: Path, doubt: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.doubt = doubt
        self.plan, self.folder, self.told = plan, folder, told
        self.patience, self.binaries, self.interpreter = patience, binaries, interpreter
        self.names = iter(range(10**9))
        self.lost = 0
        # A profile and tests, one after the other: whether they pass without a fault.
        self.passes: dict[tuple[str, ...], bool] = {}

    def life(self, mutant: Mutant) -> Generator[child.Job, pool.Ended, None]:
        """Part after part, until one kills it."""
        stages = self.plan(mutant)
        result = Result(mutant.id, mutant.what, "", tests=sum(len(p.tests) for p in stages))
        compiled = _of(mutant.file, self.binaries, self.folder / "template")
        # A text has many variants. With a GPU a test tells sooner than they do whether one differs.
        last, compiled = (compiled, ()) if covered.has_gpu() else ((), compiled)
        while stages:
            part, *stages = stages
            try:
                end, outcome, by = yield from self._ask(part, mutant, compiled)
                result = replace(result, seconds=round(result.seconds + end.seconds, 2))
                compiled = ()
                if outcome in DEAD and ("::" in by or by == SUMS):
                    sound = yield from self._is_sound(part, mutant, end, by)
                    if not sound:  # that test, or these sums, can't tell
                        self.doubt(by)
                        names = list(part.tests)
                        after = names[names.index(by) + 1 :] if by in names else []
                        if after:
                            stages.insert(0, replace(part, tests={n: part.tests[n] for n in after}))
                            continue
                        if part.profile != "quick" and by != SUMS:
                            raise _Lost(f"{by} fails without a fault, too")
                        outcome, by = "survived", ""
            except _Lost as why:
                self._has_no_verdict(mutant, result, why)
                return
            if outcome in DEAD and part.profile != "quick":
                by += f" ({part.profile})"
            late = self.patience if outcome == "timeout" else 0.0
            result = replace(result, outcome=outcome, by=by, passed="", patience=late)
            if outcome != "survived":
                self.told(mutant, result)
                return
            if part.passed:
                result = replace(result, outcome="open", passed=part.passed)
            if last and not stages:
                try:
                    same = yield from self._compiled(mutant, last)
                except _Lost as why:
                    self._has_no_verdict(mutant, result, why)
                    return
                if same:
                    result = replace(result, outcome=same, passed="")
            # The ci profile comes last of all: a run that is stopped before has this much.
            if not stages or stages[0].profile != "quick":
                self.told(mutant, result)

    def _has_no_verdict(self, mutant: Mutant, result: Result, why: _Lost) -> None:
        self.told(mutant, replace(result, outcome=LOST, by=str(why)))
        self.lost += 1
        if self.lost > MOST_LOST:
            raise HarnessError(f"{self.lost} mutants have no verdict; {why}") from None

    def _is_sound(
        self, part: Part, mutant: Mutant, end: pool.Ended, by: str
    ) -> Generator[child.Job, pool.Ended, bool]:
        """Whether what failed passes without the fault: a test, and not what ran before it, tells.

        Alone, if it fails alone on the mutant, too; else behind all that ran before it.
        """
        ran = [e["start"] for e in end.events if "start" in e]
        asked = replace(part, tests={n: part.tests[n] for n in ran}) if part.tests else part
        if by != SUMS and len(ran) > 1:
            alone = Part(part.profile, (by.partition("::")[0],), {by: part.tests.get(by, 0.0)})
            _, outcome, _ = yield from self._ask(alone, mutant)
            asked = asked if outcome == "survived" else alone
        key = asked.profile, *(asked.tests or asked.paths)
        if key not in self.passes:
            _, outcome, _ = yield from self._ask(asked, None)
            self.passes[key] = outcome == "survived"
        return self.passes[key]

    def _compiled(
        self, mutant: Mutant, binaries: Binaries
    ) -> Generator[child.Job, pool.Ended, str]:
        """identical or refused, or "" where a variant is other machine code."""
        template = self.folder / "template"
        source = mutant.apply((template / mutant.file).read_bytes())
        end = yield child.Job(
            template, self.folder / f"mutant{next(self.names)}", mutant.file, source, (), {},
            "quick", False, not covered.has_gpu(), binaries=binaries,
        )  # fmt: skip
        if end.late or end.code:
            raise _Lost(f"its compilation ended with {end.code}{', late' * end.late}")
        return next((found for found in ("identical", "refused") if end.first(found)), "")

    def _ask(
        self, part: Part, mutant: Mutant | None, binaries: Binaries = ()
    ) -> Generator[child.Job, pool.Ended, tuple[pool.Ended, str, str]]:
        """How a part of the tests ends on a mutant, or without a fault, and the verdict."""
        template = self.folder / "template"
        file = mutant.file if mutant else ""
        # Of the copy: the worktree may move on.
        source = mutant.apply((template / file).read_bytes()) if mutant else b""
        end = yield child.Job(
            template, self.folder / f"mutant{next(self.names)}", file, source,
            part.paths, part.tests, part.profile, False, not covered.has_gpu(),
            # Only the quick profile's usual times are known.
            self.patience if part.profile == "quick" else 10 * self.patience,
            self.interpreter, binaries,
        )  # fmt: skip
        outcome, by = verdict(end)
        if outcome == LOST:
            raise _Lost(by)
        return end, outcome, by


def _binaries(
    folder: Path, variants: tuple[child.Variant, ...], slots: int, until: float,
    cache: Path | None = None,
) -> dict[child.Variant, str] | None:  # fmt: skip
    """Digests of the machine code of these variants, without a fault; None: the time was up."""
    template = folder / "template"
    texts = [p for p in (template / "kernels").iterdir() if is_cuda(p.name)]
    how = [template / "kernels" / "cuda.py", template / str(Path(child.__file__).relative_to(ROOT))]
    key = covered.digest([covered.of_files(template, sorted(texts) + how), covered.compilers()])
    known = _read(cache, key)
    missing = [v for v in variants if v not in known]

    def jobs() -> Iterator[child.Job]:
        for n, variant in enumerate(missing):
            yield child.Job(
                template, folder / f"sound{n}", "", b"", (), {}, "quick", False,
                not covered.has_gpu(), binaries=((variant, ""),),
            )  # fmt: skip

    def ended(end: pool.Ended) -> Iterator[child.Job]:
        variant = end.job.binaries[0][0]
        if made := end.first("digest"):
            known[variant] = made["digest"]
        elif end.first("refused"):  # as a test wants it
            known[variant] = ""
        else:
            raise HarnessError(f"{variant} is not compiled without a fault: {end.code}")
        return iter(())

    try:
        in_time = pool.run_all(jobs(), slots, ended, until)
    finally:
        if cache and missing:
            cache.parent.mkdir(parents=True, exist_ok=True)
            written = cache.with_suffix(".new")
            written.write_text(json.dumps({"key": key, "digests": list(known.items())}))
            written.replace(cache)  # at once: a run may be killed at any moment
    if not in_time:
        return None
    return {v: known[v] for v in variants if known.get(v)}


def _read(cache: Path | None, key: str) -> dict[child.Variant, str]:
    """What a cache holds of this key: the digest of a variant, "" where it is refused."""
    try:
        found = json.loads(cache.read_text()) if cache else {}
    except (OSError, ValueError):
        return {}
    if found.get("key") != key:
        return {}
    return {
        (source, architecture, tuple(map(tuple, macros))): digest
        for (source, architecture, macros), digest in found["digests"]
    }


def _of(file: str, sound: dict[child.Variant, str], template: Path) -> Binaries:
    """The variants that a text is part of, by itself or as a header."""
    if not is_cuda(file):
        return ()
    sources = holders(file, template)
    return tuple((v, digest) for v, digest in sound.items() if f"kernels/{v[0]}" in sources)


def verdict(end: pool.Ended) -> tuple[str, str]:
    """(outcome, the test that killed it) of a process; of a lost one, why it says nothing."""
    end.check()
    if why := end.first("no_interpreter"):
        return LOST, f"the server of interpreters gave none: {why['no_interpreter']}"
    if end.first("refused"):
        return "refused", ""
    if end.first("identical"):
        return "identical", ""
    running = [e["start"] for e in end.events if "start" in e]
    if end.first("began") is None:
        return LOST, f"its process ended with {end.code} before it came to pytest"
    if broken := end.first("broken"):
        return "killed", f"import of {broken['broken']}"
    if failed := end.first("failed"):
        if is_cuda(end.job.file) and not failed.get("compiles", True):
            return "refused", failed["failed"]
        return ("crash" if _BROKEN.search(failed["text"]) else "killed"), failed["failed"]
    if end.late:  # the limits of imports and tests, which it has passed, are the process' own
        return ("timeout", running[-1]) if running else (LOST, "it was late before any test")
    if end.first("done") is None:
        if end.code == -signal.SIGKILL:
            return LOST, "its process was ended from outside, for its memory perhaps"
        if running or end.first("gathered"):
            by = running[-1] if running else "the end"
        else:  # pytest itself ended before any test: what all tests import did not load
            by = "import"
        if end.code == -signal.SIGALRM:
            return "timeout", by
        return ("crash" if end.code < 0 or by != "import" else "killed"), by
    gathered = end.first("gathered")
    found = gathered and gathered["gathered"]
    if not found or (end.job.tests and found != len(end.job.tests)):
        raise HarnessError(f"{found} of {len(end.job.tests)} tests were found in {end.job.paths}")
    # Tests passed and the run failed: what the ledger's sums show.
    return ("survived", "") if end.code == 0 else ("killed", SUMS)
