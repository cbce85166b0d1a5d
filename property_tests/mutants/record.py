"""The record of mutants, benchmarks/records/mutants.md and .json: all stacks in one.

The JSON holds a row for each mutant that was tried, by file and by function:operator. It names
outcomes, tests and stacks once: thousands of rows stay a small file.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import click

from . import table
from .mutant import ROOT, Mutant

FOLDER = ROOT / "benchmarks" / "records"
COLUMNS = ["number in its function, or null", "outcome", "by: a place in tests", "stack"]
TEXT = """# Mutants

`python -m property_tests.mutants --save` writes this of all that its journal knows, at commit \
{commit}; mutants.json beside it has every mutant that was tried.

Every verdict holds at that commit: a kill rests on the mutated file, the killing test's file, the \
helpers and the functions that this file of tests calls, and nothing of that has changed since; a \
survivor rests on every test and source. Each was reached on one of the stacks below. Of a mutant \
with several verdicts the strongest counts: a test that fails on one stack has noticed it.

Dead: killed (a test failed), crash (the process died), timeout. equivalent: not dead, and proven \
to change nothing. by rule: not dead, and of a kind that is proven to change speed alone, or to \
raise. identical: NVRTC makes the same machine code of it, in every variant that the tests \
compile. refused: NVRTC does not compile it. not run: no test on this stack executes the line, or \
launches the CUDA C++. survived: every test in the quick profile passes, and those about the file \
in the ci profile. open: what is named below passes, and no more was run. untried: nothing is known.
"""


def save(made: table.Table) -> list[Path]:
    """Write both files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    data, text = _data(), FOLDER / "mutants.md"
    rows, told = _rows(made), markdown(made)  # both name the commit, which a new file makes unclean
    data.write_text(rows)
    text.write_text(told)
    return [data, text]


def _parts(mutant: Mutant) -> tuple[str, str, int | None]:
    """File or family, function:operator or name, number: an ID."""
    head, _, rest = mutant.id.partition(":")
    group, _, number = rest.rpartition(":")
    return (head, group, int(number)) if group else (head, rest, None)


def _rows(made: table.Table) -> str:
    tried = made.tried()
    tests = sorted({made.results[m.id].by for m in tried})
    stacks = sorted({made.results[m.id].stack for m in tried})
    rows: dict[str, dict[str, list[Any]]] = {}
    for m in tried:
        head, group, number = _parts(m)
        found = made.results[m.id]
        rows.setdefault(head, {}).setdefault(group, []).append([
            number, table.COLUMNS.index(made.outcome(m)), tests.index(found.by),
            stacks.index(found.stack),
        ])  # fmt: skip
    head = json.dumps(
        {"commit": _commit(), "outcomes": table.COLUMNS, "stacks": stacks, "tests": tests,
         "columns": COLUMNS},
        indent=1,
    )[:-2]  # fmt: skip
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}"
                       for k, v in rows.items())  # fmt: skip
    return f'{head},\n "mutants": {{\n{lines}\n}}\n}}\n'


def recorded(outcomes: Collection[str]) -> set[str]:
    """IDs that the record has with one of these outcomes."""
    if not _data().exists():
        raise click.ClickException(f"there is no record of mutants: {_data()}")
    return {name for name, outcome, _ in _recorded() if outcome in outcomes}


def killers() -> dict[str, str]:
    """By ID: the test that killed a mutant, in the record."""
    return {name: test for name, _, test in _recorded() if "::" in test}


def _data() -> Path:
    return FOLDER / "mutants.json"


def _recorded() -> Iterator[tuple[str, str, str]]:
    """ID, outcome and test of each mutant in the record; of none where there is no record."""
    if not _data().exists():
        return
    read = json.loads(_data().read_text())
    for head, of in read["mutants"].items():
        for group, rows in of.items():
            for n, outcome, test, _ in rows:
                name = ":".join([head, group, *([] if n is None else [str(n)])])
                yield name, read["outcomes"][outcome], read["tests"][test]


def markdown(made: table.Table) -> str:
    """The totals, every mutant written by hand, and all that is not dead."""
    parts = [TEXT.format(commit=_commit())]
    for title, of in made.groups().items():
        parts += [f"## By {title}\n", _markdown([title, *table.HEAD], made.totals(of))]
    for family in ("semantic", "court"):
        rows = [
            [m.id.partition(":")[2], m.says, made.outcome(m), table.short(made.results[m.id].by),
             f"{made.results[m.id].seconds:.1f}"]
            for m in made.tried() if m.family == family
        ]  # fmt: skip
        if rows:
            head = ["mutant", "bug", "outcome", "by", "s"]
            parts += [f"## {family.capitalize()}\n", _markdown(head, rows)]
    left = [
        [m.id, f"`{m.what}`", made.outcome(m), made.results[m.id].passed,
         made.proofs.one.get(m.id, ("", ""))[1]]
        for m in made.tried() if made.outcome(m) in ("survived", "equivalent", "by rule", "open")
    ]  # fmt: skip
    if left:
        head = ["mutant", "change", "outcome", "passed", "proof"]
        parts += ["## Not dead\n", _markdown(head, left)]
    rules = [[r.function, ", ".join(sorted(r.operators)), r.because] for r in made.proofs.rules]
    if rules:
        head = ["function", "operators", "why they change speed alone, or raise"]
        parts += ["## Rules\n", _markdown(head, rules)]
    return "\n".join(parts)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([c.replace("|", r"\|") for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


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
