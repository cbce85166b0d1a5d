"""Outcomes and records of a run, by property."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .adapter import Implementation
from .lists import Listed

PASSED, FAILED, EXPECTED, SKIPPED = "passed", "failed", "expected failure", "skipped"
NOT_COVERED, STALE = "not covered", "stale expected failure"


@dataclass(frozen=True)
class Outcome:
    """What became of one test. reason: of a skip, or of what is not covered."""

    outcome: str
    record: dict[str, Any]
    reason: str = ""


class Results:
    """Outcomes of a run, by name."""

    def __init__(self, impl: Implementation, skips: Listed, xfails: Listed) -> None:
        self.impl, self.skips, self.xfails = impl, skips, xfails
        self.outcomes: dict[str, Outcome] = {}

    @staticmethod
    def name(item: pytest.Item) -> str:
        """The short name of a property: file::test[parameters]."""
        return f"{item.path.name}::{item.name}"

    def add(self, report: pytest.TestReport) -> None:
        """Take a report of a phase."""
        path, _, test = report.nodeid.partition("::")
        name = f"{Path(path).name}::{test}"
        properties: dict[str, Any] = dict(report.user_properties)
        record = properties.get("quest", {})
        if report.when == "setup" and report.skipped:
            reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else "")
            reason = reason.removeprefix("Skipped: ")
            kind = NOT_COVERED if reason.startswith(NOT_COVERED) else SKIPPED
            reason = reason.removeprefix(f"{NOT_COVERED}: ")
            self.outcomes[name] = Outcome(kind, {}, reason)
        elif report.when == "call" or report.failed:
            self.outcomes[name] = Outcome(self._of_call(report), record)

    @staticmethod
    def _of_call(report: pytest.TestReport) -> str:
        if report.skipped:
            return EXPECTED if hasattr(report, "wasxfail") else SKIPPED
        if report.failed:
            return STALE if "[XPASS(strict)]" in str(report.longrepr) else FAILED
        return PASSED

    def judged(self) -> bool:
        """Whether anything was."""
        return any(o.outcome not in (NOT_COVERED, SKIPPED) for o in self.outcomes.values())

    def properties(self) -> dict[str, dict[str, Outcome]]:
        """Outcomes by property (file::test) and parameters."""
        found: dict[str, dict[str, Outcome]] = {}
        for name, outcome in self.outcomes.items():
            property_, _, params = name.partition("[")
            found.setdefault(property_, {})[params.removesuffix("]")] = outcome
        return found
