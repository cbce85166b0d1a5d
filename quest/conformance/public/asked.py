"""Which of the declared values a test really asked about; those that chance missed are asked apart.

A test draws what is no axis of it (a grid, a block) among what is declared. The draws are the same
on every run, so that what they miss would be missed for ever: each such value is asked afterwards,
on a few inputs. What can't be asked is not covered, and is told.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .results import NOT_COVERED

T = TypeVar("T", int, str)
EXAMPLES = 4  # of a value that was missed; the first one is the smallest input


class Asked:
    """The declared values that one test draws from, and those that were judged."""

    def __init__(self) -> None:
        self._declared: dict[str, tuple[Any, ...]] = {}
        self._judged: dict[str, set[Any]] = {}
        self._chosen: dict[str, Any] = {}
        self._forced: Mapping[str, Any] = {}
        self._reasons: dict[str, None] = {}

    def choose(
        self, data: st.DataObject, kind: str, declared: Iterable[T],
        lacks: Callable[[T], str | None] = lambda value: None,
    ) -> T:  # fmt: skip
        """One of the declared values; skips the test as not covered where none can be asked.

        kind: "grid", "block" or "estimator". lacks: why a value can't be asked, None where it can.
        """
        reasons = {value: lacks(value) for value in declared}
        self._reasons |= {r: None for r in reasons.values() if r is not None}
        able = tuple(v for v, reason in reasons.items() if reason is None)
        if not able:
            pytest.skip(f"{NOT_COVERED}: {next(iter(self._reasons))}")
        self._declared[kind] = able
        drawn: T = (
            self._forced[kind] if kind in self._forced
            else data.draw(st.sampled_from(able), label=kind)
        )  # fmt: skip
        self._chosen[kind] = drawn
        return drawn

    def left(self, reason: str) -> None:
        """Something that is judged, but not in full."""
        self._reasons[reason] = None

    def judged(self) -> None:
        """What was chosen last was judged."""
        for kind, value in self._chosen.items():
            self._judged.setdefault(kind, set()).add(value)

    def _missed(self) -> dict[str, list[Any]]:
        return {
            kind: [v for v in values if v not in self._judged.get(kind, ())]
            for kind, values in self._declared.items()
        }

    def ask_rest(self, test: Callable[..., None], arguments: Mapping[str, Any]) -> None:
        """Run a test again with each value that was missed.

        test: as Hypothesis decorated it, drawing `data`. arguments: pytest's, by name.
        """
        missed = self._missed()
        if not any(missed.values()):
            return
        inner = test.hypothesis.inner_test  # type: ignore[attr-defined]
        named = {n: a for n, a in arguments.items() if n in inspect.signature(inner).parameters}
        for row in itertools.zip_longest(*missed.values()):
            self._forced = {k: v for k, v in zip(missed, row, strict=True) if v is not None}
            settings(max_examples=EXAMPLES)(given(data=st.data())(inner))(**named)

    def told(self) -> dict[str, list[Any]]:
        """The values that were judged, by kind, as plain data."""
        return {
            kind: [v for v in values if v in self._judged.get(kind, ())]
            for kind, values in self._declared.items()
        }

    def uncovered(self) -> list[str]:
        """Why each declared value that was not judged was not."""
        early = [f"the test failed before it asked {kind} {v}"
                 for kind, values in self._missed().items() for v in values]  # fmt: skip
        return [*self._reasons, *early]
