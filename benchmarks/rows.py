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


@dataclass
class Run:
    """What one run measured: results by full name."""

    environment: dict[str, Any]
    commit: dict[str, Any]
    results: dict[str, dict[str, Any]] = field(default_factory=dict)


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def begin(path: Path) -> None:
    """Append the head of a run; OSError where the file can't be written."""
    commit = {k: v for k, v in get_commit_info().items() if k in ("id", "time", "dirty")}
    _append(path, {"environment": records.environment(), "commit": commit})


def keep(path: Path, name: str, info: dict[str, Any]) -> None:
    """Append a benchmark's result."""
    _append(path, {"name": name, "info": info})


def read(path: Path) -> list[Run]:
    """The runs of a file; ValueError where it holds anything else.

    A last line that a killed run left unfinished is passed over.
    """
    runs: list[Run] = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            continue
        try:
            told = json.loads(line)
            if "name" in told:
                runs[-1].results[told["name"]] = told["info"]
            else:
                runs.append(Run(told["environment"], told["commit"]))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path}, line {number}: no result of a benchmark") from error
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
