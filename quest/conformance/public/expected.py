"""An expected failure is a wrong result: an adapter that raises is broken, unless its list says so.

pytest takes whatever ends a test that is marked so as the failure that was expected: a library that
can no longer be imported would have all of them.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from quest.conformance.verdict import Rejected

from .lists import Listed
from .results import Results


class ExpectedFailures:
    """A plugin that turns an error in the place of an expected failure into a failure."""

    def __init__(self, xfails: Listed) -> None:
        self.xfails = xfails

    @pytest.hookimpl(
        wrapper=True, tryfirst=True
    )  # after pytest has said what it takes for expected
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[Any]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """The report of a phase."""
        report = yield
        if not hasattr(report, "wasxfail") or call.excinfo is None:
            return report
        name = Results.name(item)
        due = self.xfails.raises(name)
        raised = None if call.excinfo.errisinstance(Rejected) else call.excinfo.typename
        if raised != due and self.xfails.match(name):
            del report.wasxfail
            report.outcome = "failed"
            wanted = f"{due}, as its entry says" if due else "a wrong result"
            told = f"expected is {wanted}, and it was {raised or 'a wrong result'}"
            report.sections.append((f"listed in {self.xfails.origin}", told))
        return report
