"""The table of mutants: what killed each, totals, survivors. `record` writes it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable

from .journal import Result
from .mutant import Mutant
from .proofs import Proofs
from .runner import DEAD

COLUMNS = (
    "killed", "crash", "timeout", "equivalent", "by rule", "survived", "open", "identical",
    "refused", "not run", "untried",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Mutants, what became of those that were tried, and the proofs that some change nothing.

    carried: IDs of those whose result was reached at an earlier commit, and no longer holds by all
    that it rests on.
    """

    mutants: list[Mutant]
    results: dict[str, Result]
    proofs: Proofs
    carried: frozenset[str] = frozenset()

    def outcome(self, mutant: Mutant) -> str:
        """One of COLUMNS."""
        found = self.results[mutant.id].outcome if mutant.id in self.results else "untried"
        if found in ("survived", "open", "untried"):
            if mutant.id in self.proofs.one:
                return "equivalent"
            if self.proofs.rule(mutant):
                return "by rule"
        return found

    def told(self, mutant: Mutant) -> str:
        """The outcome, and whether it is carried."""
        return self.outcome(mutant) + " (carried)" * (mutant.id in self.carried)

    def tried(self) -> list[Mutant]:
        """Those with a result."""
        return [m for m in self.mutants if m.id in self.results]

    def problems(self) -> list[str]:
        """Survivors without a proof, and proofs of mutants that a test kills."""
        return [
            f"{m.id} survives: {m.what}" for m in self.mutants if self.outcome(m) == "survived"
        ] + [
            f"{m.id} is listed as equivalent, but {self.results[m.id].by} kills it"
            for m in self.mutants if m.id in self.proofs.one and self.outcome(m) in DEAD
        ]  # fmt: skip

    def median(self, mutants: list[Mutant]) -> float | None:
        """Median seconds to the kill; None where none is dead."""
        times = [self.results[m.id].seconds for m in mutants if self.outcome(m) in DEAD]
        return statistics.median(times) if times else None

    def totals(self, of: Callable[[Mutant], str | None]) -> list[list[str]]:
        """Rows: a group, its mutants by outcome, how many are carried, the median.

        The last row is the sum.
        """
        groups: dict[str, list[Mutant]] = {}
        for m in self.mutants:
            if (name := of(m)) is not None:
                groups.setdefault(name, []).append(m)
        rows = []
        for name, group in [
            *sorted(groups.items()),
            ("all", [m for ms in groups.values() for m in ms]),
        ]:
            counts = Counter(self.outcome(m) for m in group)
            median = self.median(group)
            rows.append([
                name, str(len(group)), *(str(counts[c]) for c in COLUMNS),
                str(sum(m.id in self.carried for m in group)),
                "" if median is None else f"{median:.1f}",
            ])  # fmt: skip
        return rows

    def groups(self) -> dict[str, Callable[[Mutant], str | None]]:
        """What the totals are by. A verdict belongs to the stack on which it was reached."""
        return {
            "family": lambda m: m.family,
            "file": lambda m: m.file,
            "stack": lambda m: self.results[m.id].stack if m.id in self.results else None,
        }

    def show(self, console: Console) -> None:
        """Print all of it, survivors last."""
        rows = RichTable()
        for name in ("mutant", "change", "outcome", "by", "s"):
            rows.add_column(name, overflow="fold", no_wrap=name in ("outcome", "s"))
        tried = self.tried()
        for m in tried:
            r = self.results[m.id]
            told = m.says or m.what
            rows.add_row(*map(_plain, (m.id, told[:100], self.told(m), short(r.by))),
                         f"{r.seconds:.1f}")  # fmt: skip
        if len(tried) <= 400:
            console.print(rows)
        for title, of in self.groups().items():
            made = RichTable(title=f"by {title}")
            for name in (title, *HEAD):
                # A stack is a long text.
                width = 60 if name == "stack" else None
                made.add_column(name, overflow="fold", no_wrap=name == "file", max_width=width)
            for row in self.totals(of):
                made.add_row(*row)
            console.print(made)
        for problem in self.problems():
            console.print(problem, style="red", markup=False, highlight=False)
        median = self.median(self.mutants)
        dead = sum(self.outcome(m) in DEAD for m in self.mutants)
        console.print(
            f"{len(tried)} of {len(self.mutants)} mutants tried: {dead} dead, "
            f"{len(self.carried)} carried from earlier commits, {len(self.problems())} problems; "
            f"median {0.0 if median is None else median:.1f} s to the kill"
        )


HEAD = ("mutants", *COLUMNS, "carried", "median s")


def short(test: str) -> str:
    """test_hadamard.py::test_transform[...] of a node id."""
    return test.removeprefix("property_tests/")


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
