"""The command: choose mutants, run them, print and keep the table."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import baseline, choice, cuda_source, patches, pool, runner, systematic, table
from .mutant import FAMILIES, ROOT, Mutant, read

KERNELS = ("blocks", "cuda", "decode", "few", "hadamard", "outputs", "product", "quantize")
QUEST = (
    "eager", "estimators", "frozen", "fused", "grids", "joint", "linear", "lowbit",
    "lowbit_linear", "operands", "ops", "packed", "packing", "paths", "quantizer", "recipes",
    "sparsity", "transforms",
)  # fmt: skip
SYSTEMATIC = (*(f"kernels/{n}.py" for n in KERNELS), *(f"quest/{n}.py" for n in QUEST))
CUDA = tuple(f"kernels/{n}.cu" for n in ("blocks", "few", "product"))


def all_mutants() -> list[Mutant]:
    """Every mutant of every family."""
    made = patches.mutants("semantic") + patches.mutants("court")
    for file in SYSTEMATIC:
        made += systematic.mutants(file, read(file))
    for file in CUDA:
        made += cuda_source.mutants(file, read(file))
    return made


@click.command()
@click.option("--family", "families", type=click.Choice(FAMILIES), multiple=True,
              help="Only mutants of this family; may be repeated.")  # fmt: skip
@click.option("--file", "files", multiple=True,
              help="Only mutants of this file, like quest/eager.py; may be repeated.")  # fmt: skip
@click.option("--only", "ids", multiple=True, metavar="ID", help="Only this mutant; repeatable.")
@click.option("--sample", type=click.IntRange(1), help="So many of the chosen ones, at random.")
@click.option("--seed", default=0, show_default=True, help="Of --sample.")
@click.option("--jobs", type=click.IntRange(1), default=os.cpu_count() or 1, show_default=True,
              help="Processes side by side.")  # fmt: skip
@click.option("--again", type=click.Choice(runner.OUTCOMES), multiple=True,
              help="Run these once more, and not only what the journal lacks.")  # fmt: skip
@click.option("--quick", is_flag=True,
              help="No ci profile for survivors: later, --again survived.")  # fmt: skip
@click.option("--fresh", is_flag=True, help="Forget what earlier runs have found.")
@click.option("--list", "listed", is_flag=True, help="Print the chosen mutants and run nothing.")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False),
              default=ROOT / "runs" / "mutants", help="Where the journal lies.")  # fmt: skip
@click.option("--save", is_flag=True,
              help="Keep all that the journal knows in benchmarks/records.")  # fmt: skip
def main(
    families: tuple[str, ...],
    files: tuple[str, ...],
    ids: tuple[str, ...],
    sample: int | None,
    seed: int,
    jobs: int,
    again: tuple[str, ...],
    quick: bool,
    fresh: bool,
    listed: bool,
    work: Path,
    save: bool,
) -> None:
    """Plant faults one at a time and see which test kills each.

    A run goes on where the last one stopped, as long as no source has changed. Exit status 1 where
    a mutant survives that is not proven equivalent, or where a proof is stale.
    """
    # IDs are long, and a file has no width.
    console = Console(soft_wrap=True) if sys.stdout.isatty() else Console(width=160)
    known = all_mutants()
    chosen = _choose(known, families, files, ids, sample, seed)
    if listed:
        for mutant in chosen:
            console.print(f"{mutant.id}  {mutant.what}", markup=False, highlight=False)
        console.print(f"{len(chosen)} of {len(known)} mutants")
        return
    proofs = patches.equivalent()
    problems = patches.stale(proofs, known)
    if problems:
        raise click.ClickException("equivalent.toml is stale:\n  " + "\n  ".join(problems))
    if fresh:
        (work / "journal.jsonl").unlink(missing_ok=True)
    journal = runner.Journal(work / "journal.jsonl", baseline.source_key())
    missing = [
        m for m in chosen
        if (old := journal.known(m)) is None or old.outcome in again
    ]  # fmt: skip
    if missing:
        _run(console, missing, journal, work, jobs, quick)
    results = {m.id: r for m in chosen if (r := journal.known(m)) is not None}
    judged = table.Table(chosen, results, proofs)
    judged.show(console)
    if save:
        found = {m.id: r for m in known if (r := journal.known(m)) is not None}
        for path in table.Table(known, found, proofs).save(jobs, journal.key):
            console.print(f"wrote {path}")
    raise SystemExit(1 if judged.problems() else 0)


def _choose(
    known: list[Mutant], families: tuple[str, ...], files: tuple[str, ...], ids: tuple[str, ...],
    sample: int | None, seed: int,
) -> list[Mutant]:  # fmt: skip
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
    if sample is not None and sample < len(chosen):
        picked = set(random.Random(seed).sample(range(len(chosen)), sample))
        chosen = [m for i, m in enumerate(chosen) if i in picked]
    return chosen


def _run(
    console: Console, missing: list[Mutant], journal: runner.Journal, work: Path, jobs: int,
    quick: bool,
) -> None:  # fmt: skip
    with pool.workshop() as folder:
        # Nothing but launches counts for CUDA C++, and few files of tests make them.
        text = all(m.file.endswith(".cu") for m in missing)
        names = frozenset(n for m in missing for n in choice.OWN[m.file]) if text else baseline.ALL
        seen = baseline.measure(folder, work / "baseline.json", jobs, console.print, names)
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
                journal.add(result)
                heard.add(mutant.id)
                bar.update(task, completed=len(heard))
                if result.outcome == "survived":
                    bar.console.print(
                        f"survived: {mutant.id}  {mutant.what}", markup=False, highlight=False
                    )

            def plan(mutant: Mutant) -> list[choice.Part]:
                parts = choice.stages(mutant, seen)
                return [p for p in parts if p.profile == "quick"] if quick else parts

            # Across files: what the same test kills comes together otherwise, and waits together.
            random.Random(0).shuffle(missing)
            runner.run(missing, plan, folder, jobs, told)
