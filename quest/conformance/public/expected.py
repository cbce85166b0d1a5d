"""An expected failure is a wrong result: an adapter that raises fails, unless its list says so.

pytest takes whatever ends a test that is marked so as the failure that was expected: a library that
can no longer be imported would have all of them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest

from .adapter import Implementation
from .lists import Listed
from .results import UNEXPECTED, Results


class ExpectedFailures:
    """A plugin that makes a failure of what an adapter raises in the place of a wrong result.

    And of a wrong result, or of another exception, where the entry names one. It counts what the
    adapter raised for any input of the test, not only the one that ended it.
    """

    def __init__(self, impl: Implementation, xfails: Listed) -> None:
        self.impl, self.xfails = impl, xfails

    @pytest.hookimpl(
        wrapper=True, tryfirst=True
    )  # after pytest has said what it takes for expected
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[Any]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """The report of a phase."""
        report = yield
        of_court = item.get_closest_marker("judges") is not None
        if not of_court or not hasattr(report, "wasxfail") or call.excinfo is None:
            return report
        told = self._unexpected(Results.name(item), call.excinfo.value)
        if told is not None:
            del report.wasxfail
            report.outcome = "failed"
            report.user_properties.append((UNEXPECTED, told))
            report.sections.append((f"listed in {self.xfails.origin}", told))
        return report

    def _unexpected(self, name: str, error: BaseException) -> str | None:
        """Why a listed test did not fail as its entry says; None where it did."""
        due, raised = self.xfails.raises(name), self.impl.raised
        others = [kind for kind in raised if due is None or due not in _names(kind)]
        if others:
            expected = "a wrong result" if due is None else due
            return f"expected is {expected}, and the adapter raised {others[0].__qualname__}"
        if due is not None and not all(type(leaf) in raised for leaf in _leaves(error)):
            return f"expected is {due}, and it was a wrong result"
        return None


def _names(kind: type[BaseException]) -> Iterator[str]:
    """Of an exception and its bases: the class's, qualified, and with its module."""
    for base in kind.__mro__:
        yield from (base.__name__, base.__qualname__, f"{base.__module__}.{base.__qualname__}")


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """What Hypothesis puts together, one by one."""
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _leaves(part)
    else:
        yield error
