"""What was judged in a run: tallies by lane and stage, and the rules that need the whole."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

from quest.conformance.verdict import Tally, Verdict


class Ledger:
    """Tallies, and the test with the worst ratio, by (lane, stage)."""

    def __init__(self) -> None:
        self.tallies: dict[tuple[str, str], Tally] = {}
        self.worst: dict[tuple[str, str], tuple[float, str]] = {}

    def judge(
        self, lane: Any, verdicts: list[Verdict], reproduce: str, conclusive: bool = True
    ) -> None:
        """Enter the verdicts and raise `Rejected` for the first failure, with a snippet."""
        for verdict in verdicts:
            if verdict.failure is not None:
                raise type(self).rejected(lane, verdict, reproduce)
            key = (str(lane), verdict.stage)
            self.tallies.setdefault(key, Tally()).add(verdict, conclusive)
            self._rank(key, verdict.ratio, os.environ.get("PYTEST_CURRENT_TEST", ""))

    def _rank(self, key: tuple[str, str], ratio: float, test: str) -> None:
        if ratio > self.worst.get(key, (0.0, ""))[0]:
            self.worst[key] = (ratio, test.rpartition(" (")[0] or test)

    @staticmethod
    def rejected(lane: Any, verdict: Verdict, reproduce: str) -> AssertionError:
        """The error for a failed verdict."""
        from quest.conformance.verdict import Rejected

        return Rejected(f"{lane}, {verdict.stage}: {verdict.failure}\nTo reproduce:\n{reproduce}")

    def dump(self) -> dict[str, Any]:
        """Plain data, for another process."""
        tallies = {"|".join(k): dataclasses.asdict(t) for k, t in self.tallies.items()}
        return {"tallies": tallies, "worst": {"|".join(k): list(w) for k, w in self.worst.items()}}

    def merge(self, dumped: dict[str, Any]) -> None:
        """Add what `dump` made."""
        for name, fields in dumped.get("tallies", {}).items():
            lane, stage = name.split("|")
            self.tallies.setdefault((lane, stage), Tally()).merge(Tally(**fields))
        for name, (ratio, test) in dumped.get("worst", {}).items():
            lane, stage = name.split("|")
            self._rank((lane, stage), ratio, test)

    def problems(self) -> list[str]:
        """What the sums show: ambiguous shares, one-sided flips."""
        return [
            f"{lane}, {stage}: {problem}"
            for (lane, stage), tally in sorted(self.tallies.items())
            for problem in tally.problems()
        ]

    def table(self) -> list[str]:
        """Lines: lane, stage, calls, elements, worst ratio, ambiguous."""
        if not self.tallies:
            return []
        head = (
            f"{'lane':<20}{'stage':<18}{'calls':>8}{'elements':>14}{'worst r':>10}{'ambiguous':>11}"
        )
        return [head] + [
            f"{lane:<20}{stage:<18}{t.calls:>8}{t.elements:>14,}{t.ratio:>10.3f}{t.ambiguous:>11}"
            for (lane, stage), t in sorted(self.tallies.items())
        ]

    def closest(self, count: int) -> list[str]:
        """Lines: the `count` largest ratios of a lane and stage, and the tests they stem from."""
        ranked = sorted(self.worst.items(), key=lambda item: -item[1][0])
        return [f"{r:.3f}  {lane}, {stage}: {test}" for (lane, stage), (r, test) in ranked[:count]]


def slowest(reports: Iterable[Any], count: int) -> list[str]:
    """Lines: the tests that took longest, set-up included, from pytest's reports of phases."""
    seconds: Counter[str] = Counter()
    for report in reports:
        seconds[report.nodeid] += report.duration
    return [f"{time:6.1f} s  {test}" for test, time in seconds.most_common(count)]


LEDGER = Ledger()
