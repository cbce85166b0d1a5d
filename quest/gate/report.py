"""What the gate prints and writes: the table, the A/A run, the power figures, the JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import pairs, power
from .benchmarks import Result, Row
from .text import duration, short

COLORS = {"ok": "green", "faster": "green", "unclear": "yellow", "new": "cyan"}


def _speed(found: pairs.Comparison | None) -> list[str]:
    if found is None:
        return ["", "", "", ""]
    return [
        duration(median(found.base)),
        duration(median(found.change)),
        f"{found.ratio:.3f}",
        f"{found.low:.3f}-{found.high:.3f}",
    ]


def table(title: str, rows: Sequence[Row]) -> Table:
    """A line for each benchmark."""
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    made.add_column("kernel", overflow="fold")
    for name in ("base", "change", "ratio", "95%"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("verdict")
    for row in rows:
        color = "bold red" if row.faults else COLORS.get(row.verdict, "yellow")
        name = short(row.name) + (" (host)" if row.host_bound else "")
        made.add_row(escape(name), *_speed(row.comparison), f"[{color}]{row.verdict}[/]")
    return made


def floor(same: Sequence[Row]) -> float:
    """The largest distance from 1 that base against itself could not rule out: 0.02 is 2%."""
    found = [row.comparison for row in same if row.comparison is not None]
    logs = [max(abs(math.log(c.low)), abs(math.log(c.high))) for c in found]
    return math.expm1(max(logs, default=0.0))


def alarms(same: Sequence[Row]) -> list[Row]:
    """A/A rows that differ: there, a verdict on a change means nothing."""
    return [row for row in same if row.verdict in ("slower", "faster")]


def show(console: Console, result: Result, faults: Sequence[str]) -> None:
    """Print what was found; `faults`: what fails the gate, in lines."""
    rows, same = result.rows, result.same
    if rows:
        console.print(table(f"change against base, {result.device}", rows))
    if result.skipped:
        console.print(f"{result.skipped} skipped on this machine", highlight=False)
    if same:
        console.print(table("A/A: base against itself", same))
        console.print(
            f"noise floor of this run: {floor(same):.1%}, the most that base against itself "
            "leaves open",
            highlight=False,
        )
    for row in alarms(same):
        console.print(
            f"base is not like itself in {short(row.name)}: don't trust times of this run",
            style="bold yellow", highlight=False, markup=False,
        )  # fmt: skip
    unclear = sum(row.verdict == "unclear" for row in rows)
    if unclear:
        console.print(
            f"{unclear} unclear: the interval leaves room for a slowdown of "
            f"{pairs.SEEN - 1:.0%}. More --rounds or a quieter machine would tell",
            style="yellow", highlight=False,
        )  # fmt: skip
    for fault in faults:
        console.print(f"FAIL {fault}", style="red", highlight=False, markup=False)


def show_power(console: Console, found: Sequence[power.Power]) -> None:
    """Print the simulation's figures."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("method", "noise"):
        made.add_column(name, no_wrap=True)
    for name in ("false alarms, A/A", f"found, {power.PLANTED:.0%} slower"):
        made.add_column(name, justify="right", no_wrap=True)
    for one in found:
        made.add_row(
            one.method,
            f"{one.noise:.0%}",
            f"{one.false_alarms} of {one.trials}",
            f"{one.found} of {one.trials}",
        )
    console.print(made)


def document(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as JSON: every turn's seconds, too."""
    return [
        dataclasses.asdict(row) | {"verdict": row.verdict, "faults": [list(f) for f in row.faults]}
        for row in rows
    ]
