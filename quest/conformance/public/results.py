"""Outcomes and records of a run, by property."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest

from .adapter import Implementation
from .lists import Listed

PASSED, FAILED, EXPECTED, SKIPPED = "passed", "failed", "expected failure", "skipped"
# The keys of what travels with a test's reports: its full name and, after the call, its record.
# A report's own id lacks the module where pytest was given a module's name and not a path.
NAME, RECORD = "quest name", "quest record"
UNEXPECTED = "quest unexpected"  # why a listed failure is not the one that was expected
NOT_COVERED, STALE = "not covered", "stale expected failure"


@dataclass(frozen=True)
class Outcome:
    """What became of one test.

    reason: of a skip, of what is not covered, or why a listed failure was not expected.
    """

    outcome: str
    record: dict[str, Any]
    reason: str = ""


class Results:
    """Outcomes of a run, by name. stale: what the workers of pytest-xdist say of both lists.

    Their entries are not checked for an implementation that can't run here: nothing is covered.
    """

    def __init__(self, impl: Implementation, skips: Listed, xfails: Listed) -> None:
        asked = impl.missing is None
        skips, xfails = (dataclasses.replace(given, checked=asked) for given in (skips, xfails))
        self.impl, self.skips, self.xfails = impl, skips, xfails
        self.outcomes: dict[str, Outcome] = {}
        self.stale: list[str] = []

    @staticmethod
    def name(item: pytest.Item) -> str:
        """The full name of a property: file::test[parameters]."""
        return f"{item.path.name}::{item.name}"

    def add(self, report: pytest.TestReport) -> None:
        """Take a report of a phase; ValueError for the second report of a property."""
        properties: dict[str, Any] = dict(report.user_properties)
        name = properties.get(NAME)
        if name is None:
            return  # somebody's own test, run beside the court
        record = properties.get(RECORD, {})
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else "")
            reason = reason.removeprefix("Skipped: ")
            kind = NOT_COVERED if reason.startswith(NOT_COVERED) else SKIPPED
            reason = reason.removeprefix(f"{NOT_COVERED}: ")
            self._enter(name, report, Outcome(kind, {}, reason))
        elif report.when == "call" or report.failed:
            reason = properties.get(UNEXPECTED, "")
            self._enter(name, report, Outcome(self._of_call(report), record, reason))

    def _enter(self, name: str, report: pytest.TestReport, outcome: Outcome) -> None:
        # A call and its teardown are one test; two calls are two tests, of which one would be lost.
        if report.when != "teardown" and name in self.outcomes:
            raise ValueError(f"two reports of {name}: it was run twice, or two properties share it")
        self.outcomes[name] = outcome

    @staticmethod
    def _of_call(report: pytest.TestReport) -> str:
        if report.skipped:
            return EXPECTED
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
