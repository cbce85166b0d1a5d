"""What benchmarks measured, kept one after another: `pytest benchmarks/ --rows FILE`.

    python -m benchmarks.rows FILE

prints the tables of its runs. A record (`--benchmark-save`) is written at the end of a run of which
nothing failed; here each result stands as soon as it is measured, whatever becomes of the run. A
JSON object a line: of a run its environment and commit, then of each benchmark its name and what a
record has as its extra_info.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from pytest_benchmark.utils import get_commit_info

from . import records, table

# What the table reads, of a run's environment and of a result.
OF_ENVIRONMENT = {"device", "torch"}
OF_RESULT = {
    "median_us", "ratio_to_baseline", "ratio_low", "ratio_high", "host_bound", "fraction_of_copy",
    "worst_ratio",
}  # fmt: skip


@dataclass
class Run:
    """What one run measured: results by full name."""

    environment: dict[str, Any]
    commit: dict[str, Any]
    results: dict[str, dict[str, Any]] = field(default_factory=dict)


class Kept:
    """A file to which results are appended, below those of other runs.

    OSError where it can't be written; ValueError where it holds anything else than results. A last
    line that a killed run left unfinished is cut off.
    """

    def __init__(self, path: Path) -> None:
        with path.open("a+b") as file:
            file.seek(0)
            held = file.read()
            if held:
                _parsed(path, held)
                file.truncate(held.rindex(b"\n") + 1)
        self._path, self._begun = path, False

    def add(self, name: str, info: dict[str, Any]) -> None:
        """Append a benchmark's result; before the first the head of this run."""
        if not self._begun:
            commit = {k: v for k, v in get_commit_info().items() if k in ("id", "time", "dirty")}
            self._append({"environment": records.environment(), "commit": commit})
            self._begun = True
        self._append({"name": name, "info": info})

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[Run]:
    """The runs of a file; ValueError where it holds none, or anything else.

    A last line that a killed run left unfinished is passed over.
    """
    return _parsed(path, path.read_bytes())


def _parsed(path: Path, held: bytes) -> list[Run]:
    runs: list[Run] = []
    finished = held[: held.rfind(b"\n") + 1].split(b"\n")[:-1]
    for number, line in enumerate(finished, 1):
        try:
            told = json.loads(line)
            if "name" in told:
                runs[-1].results[told["name"]] = told["info"]
                there = told["info"].keys() >= OF_RESULT
            else:
                runs.append(Run(dict(told["environment"]), dict(told["commit"])))
                there = told["environment"].keys() >= OF_ENVIRONMENT
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            there = False
        if not there:
            raise ValueError(f"{path}, line {number}: no result of a benchmark")
    if not runs:
        raise ValueError(f"{path} has no result of a benchmark")
    return runs


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument(
    "path", metavar="FILE", type=click.Path(path_type=Path, exists=True, dir_okay=False)
)
def main(path: Path) -> None:
    """Print the tables of the runs in FILE, of `pytest benchmarks/ --rows FILE`."""
    try:
        runs = read(path)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    for run in runs:
        here, commit = run.environment, run.commit
        changed = ", with changes" if commit.get("dirty") else ""
        click.echo(f"=== {table.title(here['device'])} ===")
        click.echo(f"torch {here['torch']}, commit {commit.get('id', 'unknown')}{changed}")
        for line in table.whole(run.results, None):
            click.echo(line)


if __name__ == "__main__":
    main()
