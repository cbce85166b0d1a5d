"""The table of mutants: what killed each, totals, survivors; on the screen and in the records."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table as RichTable

from .journal import Result
from .mutant import ROOT, Mutant
from .runner import DEAD

COLUMNS = (
    "killed", "crash", "timeout", "equivalent", "survived", "open", "identical", "refused",
    "not run", "untried",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Mutants, what became of those that were tried, and the proofs that some change nothing."""

    mutants: list[Mutant]
    results: dict[str, Result]
    proofs: dict[str, tuple[str, str]]

    def outcome(self, mutant: Mutant) -> str:
        """One of COLUMNS."""
        if mutant.id not in self.results:
            return "untried"
        found = self.results[mutant.id].outcome
        return "equivalent" if found == "survived" and mutant.id in self.proofs else found

    def tried(self) -> list[Mutant]:
        """Those with a result."""
        return [m for m in self.mutants if m.id in self.results]

    def problems(self) -> list[str]:
        """Survivors without a proof, and proofs of mutants that a test kills."""
        return [
            f"{m.id} survives: {m.what}" for m in self.mutants if self.outcome(m) == "survived"
        ] + [
            f"{m.id} is listed as equivalent, but {self.results[m.id].by} kills it"
            for m in self.mutants if m.id in self.proofs and self.outcome(m) in DEAD
        ]  # fmt: skip

    def median(self, mutants: list[Mutant]) -> float | None:
        """Median seconds to the kill; None where none is dead."""
        times = [self.results[m.id].seconds for m in mutants if self.outcome(m) in DEAD]
        return statistics.median(times) if times else None

    def totals(self, of: Callable[[Mutant], str]) -> list[list[str]]:
        """Rows: a group, its mutants by outcome, the median; the last row is the sum."""
        groups: dict[str, list[Mutant]] = {}
        for m in self.mutants:
            groups.setdefault(of(m), []).append(m)
        rows = []
        for name, group in [*sorted(groups.items()), ("all", self.mutants)]:
            counts = Counter(self.outcome(m) for m in group)
            median = self.median(group)
            rows.append([
                name, str(len(group)), *(str(counts[c]) for c in COLUMNS),
                "" if median is None else f"{median:.1f}",
            ])  # fmt: skip
        return rows

    def show(self, console: Console) -> None:
        """Print all of it, survivors last."""
        rows = RichTable()
        for name in ("mutant", "change", "outcome", "by", "s"):
            rows.add_column(name, overflow="fold", no_wrap=name in ("outcome", "s"))
        tried = self.tried()
        for m in tried:
            r = self.results[m.id]
            told = m.says or m.what
            rows.add_row(*map(_plain, (m.id, told[:100], self.outcome(m), short(r.by))),
                         f"{r.seconds:.1f}")  # fmt: skip
        if len(tried) <= 400:
            console.print(rows)
        for title, of in (("family", _family), ("file", _file)):
            made = RichTable(title=f"by {title}")
            for name in (title, *HEAD):
                made.add_column(name, no_wrap=name == title, justify="left")
            for row in self.totals(of):
                made.add_row(*row)
            console.print(made)
        for problem in self.problems():
            console.print(problem, style="red", markup=False, highlight=False)
        median = self.median(self.mutants)
        dead = sum(self.outcome(m) in DEAD for m in self.mutants)
        console.print(
            f"{len(tried)} of {len(self.mutants)} mutants tried: {dead} dead, "
            f"{len(self.problems())} problems; "
            f"median {0.0 if median is None else median:.1f} s to the kill"
        )

    def save(self, jobs: int) -> list[Path]:
        """Write mutants.json and mutants.md into the records of this kind of machine."""
        from benchmarks import records

        machine = records.environment() | {"jobs": jobs, "commit": _commit()}
        folder = records.RECORDS / records.kind()
        folder.mkdir(parents=True, exist_ok=True)
        tests = sorted({r.by for r in self.results.values()})
        place = {name: i for i, name in enumerate(tests)}
        rows = ",\n".join(
            json.dumps([m.id, self.outcome(m), place[r.by], round(r.seconds, 1)])
            for m in self.tried() for r in [self.results[m.id]]
        )  # fmt: skip
        head = json.dumps({"machine": machine, "tests": tests}, indent=1)[:-2]
        columns = '["id", "outcome", "by, a place in tests", "seconds"]'
        data, text = folder / "mutants.json", folder / "mutants.md"
        data.write_text(f'{head},\n "columns": {columns},\n "mutants": [\n{rows}\n]\n}}\n')
        text.write_text(self.markdown(machine))
        return [data, text]

    def markdown(self, machine: dict[str, str | int]) -> str:
        """The totals, every mutant written by hand, and all that is not dead."""
        parts = [
            "# Mutants\n",
            "`python -m property_tests.mutants --save` writes this of all that its journal knows; "
            "mutants.json beside it has every mutant that was tried.\n",
            "Every verdict holds at the commit named here: a kill rests on the mutated file, the "
            "killing test's file, the helpers and the functions that this file of tests calls, and "
            "nothing of that has changed since; a survivor rests on every test and source.\n",
            "Dead: killed (a test failed), crash (the process died), timeout. equivalent: "
            "survived, and proven to change nothing. identical: NVRTC makes the same machine "
            "code of it, in every variant that the tests compile. refused: NVRTC does not compile "
            "it. not run: no test on this kind of machine "
            "executes the line, or launches the CUDA C++. open: the first tests pass, the rest was "
            "not run. untried: nothing is known. What "
            "survived a run with `--quick` has met the quick profile alone.\n",
            ", ".join(f"{k} {v}" for k, v in machine.items()) + "\n",
        ]
        for title, of in (("family", _family), ("file", _file)):
            parts += [f"## By {title}\n", _markdown([title, *HEAD], self.totals(of))]
        for family in ("semantic", "court"):
            rows = [
                [m.id.partition(":")[2], m.says, self.outcome(m), short(self.results[m.id].by),
                 f"{self.results[m.id].seconds:.1f}"]
                for m in self.tried() if m.family == family
            ]  # fmt: skip
            if rows:
                head = ["mutant", "bug", "outcome", "by", "s"]
                parts += [f"## {family.capitalize()}\n", _markdown(head, rows)]
        left = [
            [m.id, f"`{m.what}`", self.proofs.get(m.id, ("", ""))[1]] for m in self.mutants
            if self.outcome(m) in ("survived", "equivalent", "open")
        ]  # fmt: skip
        if left:
            parts += ["## Not dead\n", _markdown(["mutant", "change", "proof"], left)]
        return "\n".join(parts)


HEAD = ("mutants", *COLUMNS, "median s")


def _family(mutant: Mutant) -> str:
    return mutant.family


def _file(mutant: Mutant) -> str:
    return mutant.file


def short(test: str) -> str:
    """test_hadamard.py::test_transform[...] of a node id."""
    return test.removeprefix("property_tests/")


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([c.replace("|", r"\|") for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def recorded(kind: str, outcomes: Collection[str]) -> set[str]:
    """IDs that the record of a kind of machine has with one of these outcomes."""
    from benchmarks import records

    path = records.RECORDS / kind / "mutants.json"
    if not path.exists():
        raise click.ClickException(f"there is no record of mutants on {kind!r}: {path}")
    return {row[0] for row in json.loads(path.read_text())["mutants"] if row[1] in outcomes}


def _commit() -> str:
    """The commit of the checkout, with a plus where files differ from it."""
    try:
        told = [
            subprocess.check_output(["git", *arguments], cwd=ROOT, text=True, stderr=-3).strip()
            for arguments in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return told[0] + ("+" if told[1] else "")
