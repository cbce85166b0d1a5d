"""Runs mutants: the first tests, then the rest if it survived those; one verdict each."""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from . import child, pool
from .choice import Part
from .covered import has_gpu
from .cuda_source import holders
from .interpreter import Server
from .journal import Result
from .mutant import Mutant
from .pool import HarnessError

# killed: by a test that failed; crash: by the process' death; timeout: by a test that took FACTOR
# times its usual time and `patience` more. survived: every test passed. not run: nothing on
# this machine executes the line. refused: NVRTC does not compile it. identical: NVRTC makes the
# same machine code of it, in every variant that tests compile. open: some tests passed, see
# `choice.PASSED`, and no other was run.
OUTCOMES = ("killed", "crash", "timeout", "survived", "open", "not run", "refused", "identical")
# Of a process that was ended from outside, or never came to a test: nothing is known of its mutant.
LOST = "no verdict"
# So many of those are no accident.
MOST_LOST = 20
DEAD = frozenset({"killed", "crash", "timeout"})
# What CUDA calls a fault of a kernel, after which its process can do no more.
_BROKEN = re.compile(
    "illegal memory access|misaligned address|unspecified launch failure|illegal instruction|"
    "illegal address|invalid program counter|hardware stack error|operation not supported on glob"
)


def run(
    mutants: list[Mutant],
    plan: Callable[[Mutant], list[Part]],
    folder: Path,
    slots: int,
    told: Callable[[Mutant, Result], None],
    patience: float = 30.0,
    variants: tuple[child.Variant, ...] = (),
    until: float = math.inf,
) -> bool:
    """Run all; `told` hears of each as it ends, and twice of one that survives the quick profile.

    False: the time was up before.

    plan: the tests of a mutant, a process for each part; see `choice`.
    patience: seconds that a test may take besides. variants: of CUDA C++, that tests compile.
    until: see `pool.run_all`.
    """
    names = iter(range(10**9))
    texts = [m.file for m in mutants if m.file.endswith((".cu", ".cuh"))]
    sound = _binaries(folder, variants, slots, until) if texts else {}
    if sound is None:
        return False
    server = Server(folder)
    lost = 0
    state: dict[Path, tuple[Mutant, list[Part], float, int]] = {}
    begun: set[str] = set()

    def job(mutant: Mutant, stages: list[Part], spent: float, tests: int) -> child.Job:
        source = (folder / "template" / mutant.file).read_bytes()  # the worktree may move on
        first = mutant.id not in begun
        begun.add(mutant.id)
        made = child.Job(
            folder / "template", folder / f"mutant{next(names)}", mutant.file,
            mutant.apply(source),
            stages[0].paths, stages[0].tests, stages[0].profile, False, not has_gpu(),
            patience if stages[0].tests else 10 * patience,  # no test's usual time is known
            server.address, _of(mutant.file, sound, folder / "template") if first else (),
        )  # fmt: skip
        state[made.folder] = mutant, stages, spent, tests
        return made

    def jobs() -> Iterator[child.Job]:
        for mutant in mutants:
            stages = plan(mutant)
            yield job(mutant, stages, 0.0, sum(len(part.tests) for part in stages))

    def ended(end: pool.Ended) -> Iterator[child.Job]:
        nonlocal lost
        if server.died():
            raise HarnessError("the server from which interpreters are forked has died")
        mutant, stages, spent, tests = state.pop(end.job.folder)
        outcome, by = verdict(end)
        spent += end.seconds
        lost += outcome == LOST
        if lost > MOST_LOST:
            raise HarnessError(f"{lost} mutants have no verdict; the last one: {by}")
        if by and end.job.profile != "quick":
            by += f" ({end.job.profile})"
        result = Result(mutant.id, mutant.what, outcome, by, round(spent, 2), tests)
        if outcome == "timeout":
            result = replace(result, patience=patience)
        if outcome == "survived" and stages[0].passed:
            result = replace(result, outcome="open", passed=stages[0].passed)
        more = stages[1:] if outcome == "survived" else []
        # The ci profile comes last of all: a run that is stopped before has this much.
        if not more or more[0].profile != "quick":
            told(mutant, result)
        if more:
            yield job(mutant, more, spent, tests)

    try:
        return pool.run_all(jobs(), slots, ended, until)
    finally:
        server.close()


def _binaries(
    folder: Path, variants: tuple[child.Variant, ...], slots: int, until: float
) -> dict[child.Variant, str] | None:
    """Digests of the machine code of these variants, without a fault; None: the time was up."""
    found: dict[child.Variant, str] = {}

    def jobs() -> Iterator[child.Job]:
        for n, variant in enumerate(variants):
            yield child.Job(
                folder / "template", folder / f"sound{n}", "", b"", (), {}, "quick", False,
                not has_gpu(), binaries=((variant, ""),),
            )  # fmt: skip

    def ended(end: pool.Ended) -> Iterator[child.Job]:
        made = end.first("digest")
        if made is not None:  # else a test wants it to be refused
            found[end.job.binaries[0][0]] = made["digest"]
        return iter(())

    if not pool.run_all(jobs(), slots, ended, until):
        return None
    return {v: found[v] for v in variants if v in found}


def _of(
    file: str, sound: dict[child.Variant, str], template: Path
) -> tuple[tuple[child.Variant, str], ...]:
    """The variants that a text is part of, by itself or as a header."""
    if not file.endswith((".cu", ".cuh")):
        return ()
    sources = holders(file, template)
    return tuple((v, digest) for v, digest in sound.items() if f"kernels/{v[0]}" in sources)


def verdict(end: pool.Ended) -> tuple[str, str]:
    """(outcome, the test that killed it) of a process; of a lost one, why it says nothing."""
    if stray := end.first("stray"):
        raise HarnessError(f"the tests import {stray['stray']}, not the mutant's copy")
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
        if end.job.binaries and "NVRTC does not compile" in failed["text"]:
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
    return ("survived", "") if end.code == 0 else ("killed", "the sums over the run")
