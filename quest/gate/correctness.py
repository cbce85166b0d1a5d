"""`quest verify` on both sides, and error ratios that grew.

A ratio is an error over its derived bound. Inputs are seeded, so it belongs to the implementation:
where it grows by half, accuracy was lost, even inside the bound.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quest.conformance.verify import FLOOR, GROWTH

from .side import environment, stop


@dataclass(frozen=True)
class Verified:
    """What `quest verify` said. rows: those of its JSON; None where it did not come that far."""

    status: int
    output: str
    rows: list[dict[str, Any]] | None


def verify(tree: Path, more: Sequence[str], report: Path) -> Verified:
    """Run `quest verify` with the options `more` in a worktree; report: where its JSON goes."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "quest.cli", "verify", *more, "--json", str(report)],
        cwd=tree,
        env=environment(tree),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate()
    finally:
        stop(process)
    try:
        rows = json.loads(report.read_text())["rows"]
    except (OSError, ValueError, KeyError):
        rows = None
    return Verified(process.returncode, output.strip(), rows)


def ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Worst ratio by row and stage of a report's rows."""
    return {
        "/".join((row["lane"], row["kernel"], row["format"], row["dtype"], stage)): float(ratio)
        for row in rows
        for stage, ratio in row["stages"].items()
    }


def grew(before: float, after: float) -> bool:
    """Is that more than half again? Below FLOOR of the bound a change says nothing."""
    return after > GROWTH * max(before, FLOOR)


def problems(base: Mapping[str, float], change: Mapping[str, float]) -> list[str]:
    """What is worse in `change`: ratios that grew, and what is no longer judged."""
    found = [
        f"{name}: worst ratio {change[name]:.3f} is over {GROWTH} times base's {before:.3f}"
        for name, before in base.items()
        if name in change and grew(before, change[name])
    ]
    return found + [
        f"{name}: judged in base, not in the change" for name in base if name not in change
    ]
