"""Runs mutants: the first tests, then the rest if it survived those; one verdict each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import child, pool
from .baseline import has_gpu
from .choice import Part
from .mutant import Mutant, read

# killed: by a test that failed; crash: by the process' death; timeout: by a test that took FACTOR
# times its usual time and `patience` more. survived: every test passed. not run: nothing on
# this machine executes the line. refused: NVRTC does not compile it.
OUTCOMES = ("killed", "crash", "timeout", "survived", "not run", "refused")
DEAD = frozenset({"killed", "crash", "timeout"})


@dataclass(frozen=True)
class Result:
    """What became of a mutant. by: the test that killed it. seconds: to the kill, or in all.

    tests: how many of the quick profile could notice.
    """

    id: str
    what: str
    outcome: str
    by: str = ""
    seconds: float = 0.0
    tests: int = 0


class HarnessError(RuntimeError):
    """The run of a mutant says nothing: what failed is the harness."""


def run(
    mutants: list[Mutant],
    plan: Callable[[Mutant], list[Part]],
    folder: Path,
    slots: int,
    told: Callable[[Mutant, Result], None],
    patience: float = 30.0,
) -> None:
    """Run all; `told` hears of each as it ends, and twice of one that survives the quick profile.

    plan: the tests of a mutant, a process for each part; see `choice`.
    patience: seconds that a test may take besides.
    """
    names = iter(range(10**9))
    state: dict[Path, tuple[Mutant, list[Part], float, int]] = {}

    def job(mutant: Mutant, stages: list[Part], spent: float, tests: int) -> child.Job:
        made = child.Job(
            folder / "template", folder / f"mutant{next(names)}", mutant.file,
            mutant.apply(read(mutant.file)),
            stages[0].paths, stages[0].tests, stages[0].profile, False, not has_gpu(),
            patience if stages[0].tests else 10 * patience,  # no test's usual time is known
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

    pool.run_all(jobs(), slots, ended)


def verdict(end: pool.Ended) -> tuple[str, str]:
    """(outcome, the test that killed it) of a process."""
    if stray := end.first("stray"):
        raise HarnessError(f"the tests import {stray['stray']}, not the mutant's copy")
    if broken := end.first("broken"):
        return "killed", f"import of {broken['broken']}"
    if failed := end.first("failed"):
        refused = "NVRTC does not compile" in failed["text"] and "error" in failed["text"]
        return ("refused" if refused else "killed"), failed["failed"]
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


class Journal:
    """Results as they come, for the next run to go on from; void where a source has changed."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.results: dict[str, Result] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and json.loads(lines[0]) == {"key": key}:
            for line in lines[1:]:
                made = Result(**json.loads(line))
                self.results[made.id] = made
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"key": key}) + "\n")

    def add(self, result: Result) -> None:
        """Keep a result."""
        self.results[result.id] = result
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")

    def known(self, mutant: Mutant) -> Result | None:
        """What became of this mutant, if it was run and is still the same."""
        found = self.results.get(mutant.id)
        return found if found is not None and found.what == mutant.what else None


def plain(result: Result) -> dict[str, Any]:
    """A result as the record has it, short."""
    return {"id": result.id, "outcome": result.outcome, "by": result.by, "seconds": result.seconds}
