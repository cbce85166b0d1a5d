"""What was judged in a run: tallies by lane and stage, and the rules that need the whole."""

from __future__ import annotations

import dataclasses
from typing import Any

from quest.conformance.verdict import Tally, Verdict


class Ledger:
    """Tallies by (lane, stage)."""

    def __init__(self) -> None:
        self.tallies: dict[tuple[str, str], Tally] = {}

    def judge(
        self, lane: Any, verdicts: list[Verdict], reproduce: str, conclusive: bool = True
    ) -> None:
        """Enter the verdicts and raise `Rejected` for the first failure, with a snippet."""
        for verdict in verdicts:
            if verdict.failure is not None:
                raise type(self).rejected(lane, verdict, reproduce)
            key = (str(lane), verdict.stage)
            self.tallies.setdefault(key, Tally()).add(verdict, conclusive)

    @staticmethod
    def rejected(lane: Any, verdict: Verdict, reproduce: str) -> AssertionError:
        """The error for a failed verdict."""
        from quest.conformance.verdict import Rejected

        return Rejected(f"{lane}, {verdict.stage}: {verdict.failure}\nTo reproduce:\n{reproduce}")

    def dump(self) -> dict[str, Any]:
        """Plain data, for another process."""
        return {"|".join(k): dataclasses.asdict(t) for k, t in self.tallies.items()}

    def merge(self, dumped: dict[str, Any]) -> None:
        """Add what `dump` made."""
        for name, fields in dumped.items():
            lane, stage = name.split("|")
            into, other = self.tallies.setdefault((lane, stage), Tally()), Tally(**fields)
            for key in ("calls", "elements", "ambiguous", "coded", "up", "down"):
                setattr(into, key, getattr(into, key) + getattr(other, key))
            into.ratio = max(into.ratio, other.ratio)

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


LEDGER = Ledger()
