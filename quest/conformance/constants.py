"""Writes `quest/constants.py` from the oracle: `python -m quest.conformance.constants`.

Production code never imports the oracle; it holds these literals instead, and a property test
compares them with what this module renders.
"""

from __future__ import annotations

from pathlib import Path

import click

import quest.constants
from quest.reference import grids, hadamard

HEADER = '''"""Constants that the float64 oracle wrote: `python -m quest.conformance.constants`.

Do not edit. A property test holds this file to the oracle.
"""
'''


def render() -> str:
    """The text of `quest/constants.py`."""
    uniform = {levels: grids.uniform(levels).alpha for levels in (2, 3, 4, 8, 16, 32, 64, 128, 256)}
    lloyd = {b: tuple(map(float, grids.lloyd_max(2**b).points[2**b // 2 :])) for b in range(1, 9)}
    # A row as an integer: bit j is set where entry j is -1.
    rows = {
        m: tuple(sum(1 << j for j in range(m) if row[j] < 0) for row in hadamard.base(m))
        for m in (28, 20, 12)
    }
    lines = [HEADER, "# alpha by the number of levels", "UNIFORM_ALPHA = {"]
    lines += [f"    {levels}: {alpha!r}," for levels, alpha in uniform.items()]
    lines += ["}", f"E2M1_ALPHA = {grids.e2m1().alpha!r}", "# positive points by bits"]
    lines += ["LLOYD_MAX: dict[int, tuple[float, ...]] = {"]
    for bits, points in lloyd.items():
        lines += [f"    {bits}: ("] + [f"        {p!r}," for p in points] + ["    ),"]
    lines += ["}", "# rows by order; bit j is set where entry j is -1", "HADAMARD_BASES = {"]
    for m, values in rows.items():
        lines += [f"    {m}: ("] + [f"        0x{v:x}," for v in values] + ["    ),"]
    return "\n".join([*lines, "}", ""])


@click.command()
def main() -> None:
    """Write `quest/constants.py` anew, from the oracle."""
    Path(quest.constants.__file__).write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
