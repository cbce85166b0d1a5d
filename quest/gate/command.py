"""`quest gate`: correctness, then speed, then one verdict."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from quest.conformance.report import check

from . import benchmarks, correctness, power, report, worktrees
from .side import SideError
from .text import short

WIDTH = 100  # of the table where there is no terminal
USAGE = 2  # the exit status of `quest verify` for options that it can't use


class UnusableError(ValueError):
    """The input cannot be used: exit status 2."""


@dataclass(frozen=True)
class Request:
    """What `quest gate` was asked.

    change: a revision, or None for the working tree. expression: pytest's -k. most: pairs of a
    case. verify: options of `quest verify`. same: cases of the A/A run. old_base: go on without a
    base that can't be verified or timed. limit: seconds for each answer of a benchmark's process.
    """

    base: str
    change: str | None
    expression: str
    most: int
    verify: tuple[str, ...]
    same: int
    old_base: bool
    limit: float
    json_path: Path | None


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def _last(output: str) -> str:
    """The line of a verify's output that sums it up."""
    lines = [line for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "rows pass" in line), lines[-1] if lines else "nothing")


class _Gate:
    """One run: two worktrees, a console, and the faults found so far."""

    def __init__(
        self, request: Request, base: worktrees.Tree, change: worktrees.Tree, console: Console
    ) -> None:
        self.request, self.base, self.change, self.console = request, base, change, console
        self.faults: list[str] = []
        self.ratios: dict[str, dict[str, float]] = {}

    def say(self, line: str, style: str = "") -> None:
        self.console.print(line, style=style, highlight=False, markup=False)

    def select(self) -> None:
        """UnusableError where --filter selects nothing: said before minutes of verify."""
        asked = self.request.expression
        if not asked:
            return
        base = None if self.base.tree == self.change.tree else self.base.path
        with self.console.status("collecting benchmarks"):
            try:
                names = benchmarks.unmatched(self.change.path, base, asked, self.request.limit)
            except SideError as error:
                told = f"--filter {asked!r}: {error}; it takes names with and, or, not"
                raise UnusableError(told) from None
        if names is not None:
            there = f"there are {', '.join(names)}" if names else "there are none at all"
            raise UnusableError(f"--filter {asked!r} matches no benchmark: {there}")

    def verify(self, tree: worktrees.Tree, side: str) -> correctness.Verified:
        line = " ".join(("quest verify", *self.request.verify))
        with self.console.status(f"{line} in {side}"):
            found = correctness.verify(
                tree.path, self.request.verify, tree.path.parent / f"{side}.json"
            )
        if side == "change" and found.status == USAGE:  # a lane that there is not, for one
            told = _last(found.output).removeprefix("quest verify: ")
            raise UnusableError(f"change {tree.label}: {line}: {told}")
        self.say(f"{line} in {side}: {_last(found.output)}")
        return found

    def correct(self) -> bool:
        """Is the change right, by `quest verify` alone? Ratios that grew are faults, not an end."""
        change = self.verify(self.change, "change")
        if change.status or change.rows is None:
            self.say(change.output)
            self.faults.append("quest verify is red in the change: nothing was timed")
            return False
        self.ratios["change"] = correctness.ratios(change.rows)
        if self.base.tree == self.change.tree:
            self.ratios["base"] = self.ratios["change"]
            return True
        base = self.verify(self.base, "base")
        if base.rows is None:
            self._old(f"quest verify does not run in it: {_last(base.output)}")
            return True
        self.ratios["base"] = correctness.ratios(base.rows)
        self.faults += correctness.problems(self.ratios["base"], self.ratios["change"])
        return True

    def _old(self, reason: str) -> None:
        if not self.request.old_base:
            hint = "--allow-old-base judges the change alone"
            raise UnusableError(f"base {self.base.label} can't be used: {reason} ({hint})")
        self.say(f"base {self.base.label} can't be used: {reason}", "yellow")

    def time(self) -> benchmarks.Result:
        """Benchmarks, with a bar."""
        with Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), console=self.console, transient=True,
        ) as progress:  # fmt: skip
            task = progress.add_task("collecting benchmarks", total=None)
            done = 0

            def told(left: int, name: str) -> None:
                nonlocal done
                progress.update(task, description=short(name), completed=done, total=done + left)
                done += 1

            def bench(base: Path | None) -> benchmarks.Result:
                asked = self.request
                return benchmarks.Bench(
                    base, self.change.path, asked.expression, asked.most, asked.same, told,
                    asked.old_base, asked.limit,
                ).run()  # fmt: skip

            try:
                return bench(self.base.path)
            except benchmarks.BaseError as error:
                self._old(str(error))
                return bench(None)


def run(request: Request) -> int:
    """Run the gate in the current folder's repository; 0 where the change passes, else 1.

    Raises UnusableError and `worktrees.GitError`, both ValueErrors, where it can't be run, nothing
    was compared, or the JSON can't be written.
    """
    path = request.json_path
    check("--json", path)
    console, started = _console(), time.perf_counter()
    with (
        worktrees.interruptible(),
        worktrees.checked_out(Path.cwd(), request.base, request.change) as (base, change),
    ):
        gate = _Gate(request, base, change, console)
        gate.select()
        gate.say(f"base: {base.label}\nchange: {change.label}")
        if base.tree == change.tree:
            gate.say("both hold the same files: this compares base with itself")
        judges = worktrees.other_judges(base, change)
        if judges:
            gate.say(
                "WARNING: the change has other judges or benchmarks than base, and is judged by "
                f"its own. A person must read what changed in: {', '.join(judges)}",
                "bold yellow",
            )
        result = benchmarks.Result([], [], 0, "")
        if gate.correct():
            try:
                result = gate.time()
            except SideError as error:
                if error.status in ("usage", "old"):
                    raise UnusableError(f"change {change.label}: {error}") from None
                gate.faults.append(f"the change's benchmarks don't run: {error}")
        for row in (*result.rows, *result.same):
            gate.faults += [f"{short(row.name)}: {w}: {told}" for w, told in row.faults]
        report.show(console, result, gate.faults)
    compared = sum(row.comparison is not None for row in result.rows)
    if not compared and not gate.faults and not request.old_base:
        raise UnusableError(
            "nothing was compared: no benchmark that was selected runs both in base and in the "
            "change (--allow-old-base judges the change alone)"
        )
    seconds = time.perf_counter() - started
    count = f"{len(gate.faults)} fault{'s' * (len(gate.faults) > 1)}"
    verdict = f"FAIL, {count}" if gate.faults else "PASS"
    verdict += f", {compared} compared" if compared else ", nothing was compared"
    gate.say(f"{verdict}, in {seconds:.0f} s", "bold red" if gate.faults else "bold green")
    if path is not None:
        document: dict[str, Any] = {
            "base": base.label,
            "change": change.label,
            "device": result.device,
            "passed": not gate.faults,
            "faults": gate.faults,
            "compared": compared,
            "changed_judges": judges,
            "seconds": round(seconds, 1),
            "ratios": gate.ratios,
            "benchmarks": report.document(result.rows),
            "same": report.document(result.same),
        }
        try:
            path.write_text(json.dumps(document, indent=1) + "\n")
        except OSError as error:  # it was there when it began
            raise UnusableError(f"--json {path}: it can't be written: {error.strerror}") from None
    return 1 if gate.faults else 0


def _alone(option: str) -> None:
    """click.UsageError where the command line has more than this option."""
    context = click.get_current_context(silent=True)
    if context is None:  # called from Python
        return
    others = [
        parameter.opts[0]
        for parameter in context.command.params
        if option not in parameter.opts
        and context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
    ]
    if others:
        told = f"{option} simulates and compares nothing: it can't go with {', '.join(others)}"
        raise click.UsageError(told, context)


def run_power() -> int:
    """Simulate, print; 0 where the figures are those that the gate promises, else 1.

    Raises click.UsageError where the command line has other options: all would be ignored.
    """
    _alone("--power")
    console = _console()
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
        console=console, transient=True,
    ) as progress:  # fmt: skip
        found = list(progress.track(power.measure(), total=power.METHODS, description="simulating"))
    report.show_power(console, found)
    kept = power.kept(found)
    console.print(
        f"{'PASS' if kept else 'FAIL'}: in turn, at {power.NOISE:.0%} noise and "
        f"{power.DRIFT:.0%} drift, no false alarm and at least {power.LEAST_FOUND:.0%} found",
        style="bold green" if kept else "bold red", highlight=False,
    )  # fmt: skip
    return 0 if kept else 1
