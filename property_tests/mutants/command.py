"""The command: choose mutants, run them, print and keep the table."""

from __future__ import annotations

import itertools
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import (
    baseline,
    choice,
    covered,
    cuda_source,
    near,
    patches,
    pool,
    proofs,
    runner,
    systematic,
    table,
)
from . import journal as journal_
from . import record as record_
from .evidence import Evidence
from .mutant import FAMILIES, ROOT, Mutant, read

# What is no arithmetic and no rule: command lines, numbers that `test_constants` derives.
LEFT_OUT = ("__init__.py", "cli.py", "constants.py")
CARRIED = "carried"  # what --again may name besides outcomes


def _files(folder: str, pattern: str) -> tuple[str, ...]:
    found = sorted(p.name for p in (ROOT / folder).glob(pattern))
    return tuple(f"{folder}/{name}" for name in found if name not in LEFT_OUT)


SYSTEMATIC = (*_files("kernels", "*.py"), *_files("quest", "*.py"))
CUDA = _files("kernels", "*.cu*")


def all_mutants() -> list[Mutant]:
    """Every mutant of every family."""
    made = patches.mutants("semantic") + patches.mutants("court")
    for file in SYSTEMATIC:
        made += systematic.mutants(file, read(file))
    for file in CUDA:
        made += cuda_source.mutants(file, read(file))
    return made


def _finite(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    # A range lets infinity pass, and NaN, with which no time would ever be left.
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number")
    return value


@click.command()
@click.option("--family", "families", type=click.Choice(FAMILIES), multiple=True,
              help="Only mutants of this family; may be repeated.")  # fmt: skip
@click.option("--file", "files", multiple=True,
              help="Only mutants of this file, like quest/eager.py; may be repeated.")  # fmt: skip
@click.option("--only", "ids", multiple=True, metavar="ID", help="Only this mutant; repeatable.")
@click.option("--sample", type=click.IntRange(1), help="So many of the chosen ones, at random; "
              "with --again of those that this names, and no others.")  # fmt: skip
@click.option("--each", type=click.IntRange(1), help="In the same way so many of each file.")
@click.option("--seed", default=0, show_default=True, help="Of --sample, --each and the order.")
@click.option(
    "--own",
    is_flag=True,
    help="Only the tests about the mutants' files, as of CUDA C++ in any case.",
)
@click.option(
    "--tests",
    "named",
    multiple=True,
    metavar="NAME",
    help="Of those only these, by their names in choice.OWN, like races; repeatable.",
)
@click.option("--minutes", type=click.FloatRange(0), callback=_finite,
              help="Stop then, whatever is under way; what still runs has no verdict. Cheap ones "
              "first. 0: only the table of what is known.")  # fmt: skip
@click.option("--patience", type=click.FloatRange(0, min_open=True), default=30.0,
              callback=_finite, show_default=True,
              help="Seconds that any test may take.")  # fmt: skip
@click.option("--jobs", type=click.IntRange(1), default=os.cpu_count() or 1, show_default=True,
              help="Processes side by side.")  # fmt: skip
@click.option("--again", type=click.Choice((*runner.OUTCOMES, CARRIED)), multiple=True,
              help="Run these once more, and not only what the journal lacks. carried: verdicts of "
              "an earlier commit, of which only what stands nearest is unchanged.")  # fmt: skip
@click.option("--quick", is_flag=True,
              help="No ci profile for survivors: later, --again survived.")  # fmt: skip
@click.option("--first", is_flag=True,
              help="Only the first tests, 15 s of them: what they leave is open.")  # fmt: skip
@click.option("--proofs", "proven_too", is_flag=True,
              help="Proven ones, too, which are left out otherwise, unless --only names them: a "
              "test that kills one refutes its proof.")  # fmt: skip
@click.option("--fresh", is_flag=True, help="Forget what earlier runs have found.")
@click.option("--list", "listed", is_flag=True, help="Print the chosen mutants and run nothing.")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False),
              envvar="QUEST_MUTANTS", default=ROOT / "runs" / "mutants",
              help="The folder of the journal, and of others' that are read besides. Or the "
              "environment's QUEST_MUTANTS.")  # fmt: skip
@click.option("--save", is_flag=True,
              help="Keep all that the journal knows in benchmarks/records.")  # fmt: skip
def main(
    families: tuple[str, ...],
    files: tuple[str, ...],
    ids: tuple[str, ...],
    sample: int | None,
    each: int | None,
    seed: int,
    own: bool,
    named: tuple[str, ...],
    minutes: float | None,
    patience: float,
    jobs: int,
    again: tuple[str, ...],
    quick: bool,
    first: bool,
    proven_too: bool,
    fresh: bool,
    listed: bool,
    work: Path,
    save: bool,
) -> None:
    """Plant faults one at a time and see which test kills each.

    A run goes on where the last one stopped: what earlier runs found holds as long as what it
    rests on (see evidence.py), or is carried while what stands nearest is the same (see near.py).
    What is carried is not run unless --again names it. Exit status 1 where a mutant survives that
    is not proven equivalent, or where a proof is stale.
    """
    # Ended in order, with the processes that are at work.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    until = math.inf if minutes is None else time.monotonic() + 60 * minutes
    # IDs are long, and a file has no width.
    console = Console(soft_wrap=True) if sys.stdout.isatty() else Console(width=160)
    known = all_mutants()
    chosen = _choose(known, families, files, ids)
    proven = proofs.read()
    problems = [] if listed else proven.stale(known)
    if problems:
        raise click.ClickException("equivalent.toml is stale:\n  " + "\n  ".join(problems))
    if fresh and not listed:
        for path in (*work.glob("*.jsonl"), *work.glob("*.json")):
            path.unlink(missing_ok=True)
    record = journal_.Journal(work, Evidence(), patience, () if fresh else record_.journal())

    def asked() -> list[Mutant]:
        return [m for m in chosen if proven_too or m.id in ids or not proven.because(m)]

    if again and (sample or each):
        chosen = [m for m in asked() if _is_named(again, record, m)]
    chosen = _sampled(chosen, sample, each, seed)
    about = {n for m in chosen for n in choice.OWN.get(m.file, ())}
    for name in named:
        if name not in about:
            allowed = ", ".join(sorted(about))
            told = f"must be about the chosen files: {allowed}; got {name!r}"
            raise click.BadParameter(told, param_hint="--tests")
    if listed:
        for mutant in chosen:
            console.print(f"{mutant.id}  {mutant.what}", markup=False, highlight=False)
        console.print(f"{len(chosen)} of {len(known)} mutants")
        return
    narrow = own or bool(named) or all(cuda_source.is_cuda(m.file) for m in chosen)
    plan = _Plan(jobs, quick, first, narrow, seed, minutes is not None, patience, until, named)
    missing = [
        m for m in asked() if _is_named(again, record, m) or plan.wants(record.known(m))
    ]  # fmt: skip
    doubted = [m.id for m in missing if record.is_carried(m)]
    if missing and minutes != 0:
        try:
            work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            told = f"{work} can't be made: {error.strerror}"
            raise click.BadParameter(told, param_hint="--work") from None
        try:
            _run(console, missing, record, work, plan)
        except runner.HarnessError as error:
            raise Broken(str(error)) from error
    judged = _table(chosen, record, proven)
    judged.show(console)
    if doubted and minutes != 0:
        passed = {m.id for m in missing if m.id in judged.carried and record.passed(m)}
        console.print(_checked(doubted, judged, passed))
    if save:
        for path in record_.save(_table(known, record, proven), record.lines(known)):
            console.print(f"wrote {path}")
    raise SystemExit(1 if judged.problems() else 0)


def _choose(
    known: list[Mutant], families: tuple[str, ...], files: tuple[str, ...], ids: tuple[str, ...]
) -> list[Mutant]:
    for name, given, possible in (
        ("--file", files, {m.file for m in known}),
        ("--only", ids, {m.id for m in known}),
    ):
        for value in given:
            if value not in possible:
                allowed = ", ".join(sorted(possible)) if name == "--file" else "an ID of --list"
                raise click.BadParameter(f"{name} must be {allowed}; got {value!r}")
    chosen = [
        m for m in known
        if m.family in (families or FAMILIES) and (not files or m.file in files)
        and (not ids or m.id in ids)
    ]  # fmt: skip
    if not chosen:
        raise click.UsageError("no mutant is of all that was asked for; --list shows what there is")
    return chosen


def _table(
    mutants: list[Mutant], record: journal_.Journal, proven: proofs.Proofs
) -> table.Table:  # fmt: skip
    results = {m.id: r for m in mutants if (r := record.known(m)) is not None}
    carried = frozenset(m.id for m in mutants if record.is_carried(m))
    return table.Table(mutants, results, proven, carried)


def _is_named(again: tuple[str, ...], record: journal_.Journal, mutant: Mutant) -> bool:
    """Whether --again names what is known of a mutant."""
    old = record.known(mutant)
    named = old is not None and old.outcome in again
    return named or (CARRIED in again and record.is_carried(mutant))


def _checked(doubted: list[str], judged: table.Table, passed: set[str]) -> str:
    """How carried verdicts fared in a run. Confirmed: dead, or refused, again.

    passed: still carried, though tests passed here, where there is no GPU.
    """
    new = [judged.results[name].outcome for name in doubted if name not in judged.carried]
    confirmed, blind = sum(outcome in near.CARRIED for outcome in new), len(passed & {*doubted})
    told = f", {blind} passed here, where there is no GPU," if blind else ""
    return (
        f"of {len(doubted)} carried verdicts {confirmed} are confirmed, {len(new) - confirmed} are "
        f"not,{told.lstrip(',')} {len(doubted) - len(new) - blind} were not looked at again"
    )


def _sampled(
    chosen: list[Mutant], sample: int | None, each: int | None, seed: int
) -> list[Mutant]:  # fmt: skip
    """A part of them, in their order."""
    if each is not None:
        of: dict[str, list[Mutant]] = {}
        for m in chosen:
            of.setdefault(m.file, []).append(m)
        kept = {
            m.id for file, ms in of.items()
            for m in random.Random(f"{seed} {file}").sample(ms, min(each, len(ms)))
        }  # fmt: skip
        chosen = [m for m in chosen if m.id in kept]
    if sample is not None and sample < len(chosen):
        picked = set(random.Random(seed).sample(range(len(chosen)), sample))
        chosen = [m for i, m in enumerate(chosen) if i in picked]
    return chosen


def order(mutants: list[Mutant], seed: int, cost: Callable[[Mutant], float]) -> list[Mutant]:
    """One of each file in turn, in a file the cheap ones first, at random where they cost alike.

    Wherever a run ends, each file has had its share.
    """
    of: dict[str, list[Mutant]] = {}
    for m in mutants:
        of.setdefault(m.file, []).append(m)
    for file, ms in of.items():
        random.Random(f"{seed} {file}").shuffle(ms)
        ms.sort(key=cost)
    turns = itertools.zip_longest(*of.values())
    return [m for turn in turns for m in turn if m is not None]


class Broken(click.ClickException):
    """The harness failed; what the journal has is sound."""

    exit_code = 3


@dataclass(frozen=True)
class _Plan:
    """How mutants are run. narrow: only tests about their files, by `choice.OWN`, are looked at.

    cheap: the cheap ones first. named: of the tests about their files, only these, if any.
    """

    jobs: int
    quick: bool
    first: bool
    narrow: bool
    seed: int
    cheap: bool
    patience: float
    until: float
    named: tuple[str, ...] = ()

    @property
    def passes(self) -> str:
        """What an open mutant has passed when this plan is through with it; "": everything."""
        if self.first or self.named or (self.narrow and self.quick):
            return choice.FIRST
        return choice.OWN_TESTS if self.narrow else choice.QUICK if self.quick else ""

    def wants(self, old: runner.Result | None) -> bool:
        """Whether a mutant is run, given what is known of it."""
        if old is None or _blind(old):
            return True
        if old.outcome != "open":
            return False
        levels = (*choice.PASSED, "")
        return levels.index(self.passes) > levels.index(old.passed)


def _blind(old: runner.Result) -> bool:
    """Whether tests passed where there was no GPU, and there is one."""
    return old.blind and covered.has_gpu()


def _run(
    console: Console, missing: list[Mutant], journal: journal_.Journal, work: Path, plan: _Plan
) -> None:
    with pool.workshop() as folder:
        names = baseline.ALL
        if plan.narrow:
            own = {n for m in missing for n in choice.OWN.get(m.file, ())}
            names = frozenset(own & {*plan.named} if plan.named else own)
            if not names:
                console.print("no test of these names is about a mutant that is left to run")
                return
        elif all(m.family == "court" for m in missing):
            names = frozenset(n for m in missing for n in (*choice.HELPERS, *choice.OWN[m.file]))
        seen = baseline.measure(
            folder, work / "baseline.json", plan.jobs, console.print, names, plan.until
        )
        if seen is None:
            console.print("the time was up before every test was seen without a fault")
            return
        journal.learn(seen)
        for test in seen.failed:
            console.print(f"[red]fails without a fault, and is left out:[/] {test}")
        bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), console=console,
        )  # fmt: skip
        with bar:
            task = bar.add_task("mutants", total=len(missing))
            heard: set[str] = set()

            def told(mutant: Mutant, result: runner.Result) -> None:
                heard.add(mutant.id)
                if result.outcome == runner.LOST:
                    bar.console.print(f"{result.outcome}: {mutant.id}: {result.by}", markup=False)
                    return
                journal.add(mutant, result)
                bar.update(task, completed=len(heard))
                if result.outcome in ("survived", "open"):
                    bar.console.print(
                        f"{result.outcome}: {mutant.id}  {mutant.what}",
                        markup=False,
                        highlight=False,
                    )

            def every(mutant: Mutant) -> list[choice.Part]:
                killers = journal.killers(mutant)
                found = choice.stages(mutant, seen, killers, plan.narrow, plan.named)
                if plan.quick:
                    return [p for p in found if p.profile == "quick"]
                old = journal.known(mutant)
                passed = old is not None and old.passed == choice.QUICK and not _blind(old)
                return [p for p in found if passed and p.profile != "quick"] or found

            def parts(mutant: Mutant) -> list[choice.Part]:
                return every(mutant)[:1] if plan.first else every(mutant)

            # What a mutant's first test takes; nothing of it is run where there is none.
            costs = {
                m.id: next(iter(found[0].tests.values()))
                for m in missing if (found := choice.stages(m, seen, named=plan.named))
            }  # fmt: skip
            left = [m for m in missing if m.id in costs]
            # Known at once, wherever the run ends; a part of the tests can't tell.
            for m in missing:
                if m.id not in costs and not plan.narrow:
                    told(m, runner.Result(m.id, m.what, "not run"))

            def cost(mutant: Mutant) -> float:
                return costs[mutant.id] if plan.cheap else 0.0

            def doubt(test: str) -> None:
                bar.console.print(f"fails without a fault, too, and tells nothing: {test}")

            in_time = runner.run(
                order(left, plan.seed, cost), parts, folder, plan.jobs, told,
                patience=plan.patience, variants=seen.variants, until=plan.until,
                doubt=doubt, cache=work / "binaries.json",
                compare=not plan.first,
            )  # fmt: skip
        if not in_time:
            console.print(f"the time was up: {len(missing) - len(heard)} are still to be run")
