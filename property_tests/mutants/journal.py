"""Results as they come, for later runs to go on from, and for the record.

Lines of JSON: results, each with the digest of what it rests on (see `evidence`), and which
functions each file of tests calls, for that digest to be made again.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .baseline import Baseline
from .evidence import Evidence
from .mutant import Mutant


@dataclass(frozen=True)
class Result:
    """What became of a mutant. by: the test that killed it. seconds: to the kill, or in all.

    tests: how many of the quick profile could notice. key: what this rests on.
    """

    id: str
    what: str
    outcome: str
    by: str = ""
    seconds: float = 0.0
    tests: int = 0
    key: str = ""


class Journal:
    """All that was ever found, of which `known` gives what still holds."""

    def __init__(self, path: Path, evidence: Evidence) -> None:
        self.path, self.evidence = path, evidence
        self.results: dict[str, Result] = {}
        # By (file, scope) and test: how often it was the one that killed.
        self.kills: dict[tuple[str, str], Counter[str]] = {}
        text = path.read_text() if path.exists() else ""
        if text and not text.endswith("\n"):
            with path.open("a") as file:  # the end of a run that was killed
                file.write("\n")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the end of a run that was killed
                continue
            if "calls" in entry:
                evidence.calls[entry["of"]] = entry["calls"]
            elif "key" in entry and "id" in entry:
                self._enter(Result(**entry))

    def learn(self, baseline: Baseline, part: bool = False) -> None:
        """Note which functions tests call now.

        part: not all files of tests were looked at. What one calls when it is imported then falls
        to others, so that files which are known stay as they are.
        """
        for tests, lines in baseline.executed().items():
            before = self.evidence.calls.get(tests)
            if part and before is not None:
                continue
            self.evidence.learn(tests, lines)
            if self.evidence.calls[tests] != before:
                self._write({"of": tests, "calls": self.evidence.calls[tests]})

    def add(self, mutant: Mutant, result: Result) -> None:
        """Keep a result."""
        key = self.evidence.key(result.outcome, mutant.file, result.by)
        result = replace(result, key=key)
        self._enter(result)
        self._write(asdict(result))

    def known(self, mutant: Mutant) -> Result | None:
        """What became of this mutant, if that still holds."""
        found = self.results.get(mutant.id)
        if found is None or found.what != mutant.what:
            return None
        key = self.evidence.key(found.outcome, mutant.file, found.by)
        return found if found.key == key else None

    def killers(self, mutant: Mutant) -> Counter[str]:
        """Tests that are likely to kill, by weight: the one that did, those that killed others."""
        scope = _scope(mutant.id)
        found = Counter[str]()
        for test, n in self.kills.get((mutant.file, ""), Counter()).items():
            found[test] += n
        for test, n in self.kills.get((mutant.file, scope), Counter()).items():
            found[test] += 10 * n
        old = self.results.get(mutant.id)
        if old is not None and "::" in old.by:
            found[old.by.removesuffix(" (ci)")] += 10**6
        return found

    def _enter(self, result: Result) -> None:
        self.results[result.id] = result
        if "::" in result.by:
            file, test = result.id.partition(":")[0], result.by.removesuffix(" (ci)")
            for place in {(file, ""), (file, _scope(result.id))}:
                self.kills.setdefault(place, Counter())[test] += 1

    def _write(self, entry: object) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def _scope(name: str) -> str:
    """The function of a mutant made of a syntax tree; "" of others."""
    parts = name.split(":")
    return parts[1] if len(parts) == 4 else ""
