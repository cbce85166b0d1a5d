"""The record of mutants, benchmarks/records/mutants.md: all stacks in one.

The journal behind it lies beside it, packed: a run anywhere goes on from it, as from its own.
"""

from __future__ import annotations

import lzma
import subprocess
from collections.abc import Iterable
from pathlib import Path

from . import table
from .mutant import ROOT

FOLDER = ROOT / "benchmarks" / "records"
TEXT = """# Mutants

`python -m property_tests.mutants --save` writes this of all that its journal knows, at commit \
{commit}; mutants.jsonl.xz beside it is that journal, from which any later run goes on.

A verdict that is not carried holds at that commit: a kill rests on the mutated file, the killing \
test's file, the helpers that it names and the modules and functions that it executes, and nothing \
of that has changed since; a survivor rests on every test and source. Each was reached on one of \
the stacks below. Of a mutant with several verdicts the strongest counts: a test that fails on one \
stack has noticed it.

carried, a part of killed, crash, timeout and refused: reached at an earlier commit, and something \
that the verdict rests on has changed since, but not what stands nearest: the function with the \
fault (where it stands in none, the module's code outside of functions; of CUDA C++ the file) and \
the test that killed it, with all of the tests' own code that this names. What a carried verdict \
may miss: code between the two has changed, and the test no longer comes to the fault; or the \
oracle, a bound, a judge or the inputs that are drawn have, and it passes in spite of it. `--again \
carried` runs them once more, `--sample` some of them. What survives, is open, identical or not \
run is never carried, and a new verdict counts before a carried one, but for tests that pass \
without a GPU: they refute no kill on one.

Dead: killed (a test failed), crash (the process died), timeout. equivalent: not dead, and proven \
to change nothing. by rule: not dead, and of a kind that is proven to change speed alone, or to \
raise. What is proven meets tests only where a run is asked for it (`--proofs`). identical: NVRTC \
makes the same machine code of it, in every variant that tests compile without a GPU. refused: \
NVRTC does not compile it. not run: no test on this stack executes the line, or launches the CUDA \
C++. survived: every test in the quick profile passes, and those about the file in the ci profile. \
open: what is named below passes, and no more was run. untried: nothing is known.
"""


def save(made: table.Table, journal: Iterable[str]) -> list[Path]:
    """Write both files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = FOLDER / "mutants.md"
    packed = lzma.compress("".join(f"{line}\n" for line in journal).encode())
    told = markdown(made)  # which names the commit: a new file makes that unclean
    _journal().write_bytes(packed)
    text.write_text(told)
    return [text, _journal()]


def journal() -> list[str]:
    """The lines of the journal; none where there is no record."""
    path = _journal()
    return lzma.decompress(path.read_bytes()).decode().splitlines() if path.exists() else []


def _journal() -> Path:
    return FOLDER / "mutants.jsonl.xz"


def markdown(made: table.Table) -> str:
    """The totals, every mutant written by hand, and all that is not dead."""
    parts = [TEXT.format(commit=_commit())]
    for title, of in made.groups().items():
        parts += [f"## By {title}\n", _markdown([title, *table.HEAD], made.totals(of))]
    for family in ("semantic", "court"):
        rows = [
            [m.id.partition(":")[2], m.says, made.told(m), table.short(made.results[m.id].by),
             f"{made.results[m.id].seconds:.1f}"]
            for m in made.tried() if m.family == family
        ]  # fmt: skip
        if rows:
            head = ["mutant", "bug", "outcome", "by", "s"]
            parts += [f"## {family.capitalize()}\n", _markdown(head, rows)]
    left = [
        [m.id, f"`{m.what}`", made.outcome(m),
         made.results[m.id].passed if m.id in made.results else "",
         made.proofs.one.get(m.id, ("", ""))[1]]
        for m in made.mutants if made.outcome(m) in ("survived", "equivalent", "by rule", "open")
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
