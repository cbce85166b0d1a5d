"""Runs mutants: the first tests, then the rest if it survived those; one verdict each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from . import child, pool
from .baseline import has_gpu
from .choice import Part
from .interpreter import Server
from .journal import Result
from .mutant import Mutant

# killed: by a test that failed; crash: by the process' death; timeout: by a test that took FACTOR
# times its usual time and `patience` more. survived: every test passed. not run: nothing on
# this machine executes the line. refused: NVRTC does not compile it. identical: NVRTC makes the
# same machine code of it, in every variant that tests compile. open: the first tests passed, and
# no other was run.
OUTCOMES = ("killed", "crash", "timeout", "survived", "open", "not run", "refused", "identical")
DEAD = frozenset({"killed", "crash", "timeout"})
# What CUDA calls a fault of a kernel, after which its process can do no more.
_BROKEN = re.compile(
    "illegal memory access|misaligned address|unspecified launch failure|illegal instruction|"
    "illegal address|invalid program counter|hardware stack error|operation not supported on glob"
)


class HarnessError(RuntimeError):
    """The run of a mutant says nothing: what failed is the harness."""


def run(
    mutants: list[Mutant],
    plan: Callable[[Mutant], list[Part]],
    folder: Path,
    slots: int,
    told: Callable[[Mutant, Result], None],
    patience: float = 30.0,
    variants: tuple[child.Variant, ...] = (),
    until: float = math.inf,
) -> None:
    """Run all; `told` hears of each as it ends, and twice of one that survives the quick profile.

    plan: the tests of a mutant, a process for each part; see `choice`.
    patience: seconds that a test may take besides. variants: of CUDA C++, that tests compile.
    until: see `pool.run_all`.
    """
    names = iter(range(10**9))
    texts = [m.file for m in mutants if m.file.endswith((".cu", ".cuh"))]
    sound = _binaries(folder, variants, slots) if texts else {}
    server = Server(folder)
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
            if stages:
                yield job(mutant, stages, 0.0, sum(len(part.tests) for part in stages))
            else:
                told(mutant, Result(mutant.id, mutant.what, "not run"))

    def ended(end: pool.Ended) -> Iterator[child.Job]:
        mutant, stages, spent, tests = state.pop(end.job.folder)
        outcome, by = verdict(end)
        spent += end.seconds
        if outcome == "survived" and len(stages) > 1:
            if stages[1].profile != "quick":
                # The last word comes last of all: a run that is stopped before has this one.
                told(mutant, Result(mutant.id, mutant.what, outcome, by, round(spent, 2), tests))
            yield job(mutant, stages[1:], spent, tests)
            return
        if by and end.job.profile != "quick":
            by += f" ({end.job.profile})"
        told(mutant, Result(mutant.id, mutant.what, outcome, by, round(spent, 2), tests))

    try:
        pool.run_all(jobs(), slots, ended, until)
    finally:
        server.close()


def _binaries(
    folder: Path, variants: tuple[child.Variant, ...], slots: int
) -> dict[child.Variant, str]:
    """Digests of the machine code of these variants, without a fault."""
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

    pool.run_all(jobs(), slots, ended)
    return {v: found[v] for v in variants if v in found}


def _of(
    file: str, sound: dict[child.Variant, str], template: Path
) -> tuple[tuple[child.Variant, str], ...]:
    """The variants that a text is part of, by itself or as a header."""
    if not file.endswith((".cu", ".cuh")):
        return ()
    name = Path(file).name

    def holds(source: str) -> bool:
        text = (template / "kernels" / source).read_text()
        included = re.findall(r'(?m)^#include "(.*)"', text)
        return source == name or any(holds(n) for n in included)

    return tuple((v, digest) for v, digest in sound.items() if holds(v[0]))


def verdict(end: pool.Ended) -> tuple[str, str]:
    """(outcome, the test that killed it) of a process."""
    if stray := end.first("stray"):
        raise HarnessError(f"the tests import {stray['stray']}, not the mutant's copy")
    if end.first("refused"):
        return "refused", ""
    if end.first("identical"):
        return "identical", ""
    if broken := end.first("broken"):
        return "killed", f"import of {broken['broken']}"
    if failed := end.first("failed"):
        if end.job.binaries and "NVRTC does not compile" in failed["text"]:
            return "refused", failed["failed"]
        return ("crash" if _BROKEN.search(failed["text"]) else "killed"), failed["failed"]
    if end.late:
        running = [e["start"] for e in end.events if "start" in e]
        return "timeout", running[-1] if running else "import"
    if end.first("done") is None:
        running = [e["start"] for e in end.events if "start" in e]
        if end.first("gathered") is None:
            # pytest itself ended before any test: helpers that all tests import did not load.
            return ("crash" if end.code < 0 else "killed"), "import"
        # The plugin's alarm is signal 14.
        return ("timeout" if end.code == -14 else "crash"), running[-1] if running else "the end"
    gathered = end.first("gathered")
    found = gathered and gathered["gathered"]
    if not found or (end.job.tests and found != len(end.job.tests)):
        raise HarnessError(f"{found} of {len(end.job.tests)} tests were found in {end.job.paths}")
    # Tests passed and the run failed: what the ledger's sums show.
    return ("survived", "") if end.code == 0 else ("killed", "the sums over the run")
