"""Results as they come, for later runs to go on from, and for the record.

Lines of JSON: results, each with the stack on which it was reached and the digests of what it rests
on (see `evidence`) and of what stands nearest to it (see `near`), and which functions each file of
tests calls there, for the former to be made again. The record is one. Every `*.jsonl` of the folder
is read besides, so that what another machine has found is merged by copying its file there; this
one writes `journal.jsonl`, a line at once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from . import covered
from .baseline import Baseline
from .choice import PASSED
from .evidence import Evidence
from .mutant import Mutant
from .near import CARRIED, Near

NAME = "journal.jsonl"
# The best that is known of a mutant counts: a test that fails on one stack has noticed it.
STRENGTH = ("not run", "open", "survived", "identical", "refused", "timeout", "crash", "killed")


@dataclass(frozen=True)
class Result:
    """What became of a mutant. by: the test that killed it. seconds: to the kill, or in all.

    tests: how many of the quick profile could notice. key: what this rests on. near: what stands
    nearest to it, "" where it can't be carried. passed: of an open
    one, one of `choice.PASSED`. patience: of a timeout, what its test was given besides. stack:
    device and versions.
    """

    id: str
    what: str
    outcome: str
    by: str = ""
    seconds: float = 0.0
    tests: int = 0
    key: str = ""
    passed: str = ""
    patience: float = 0.0
    stack: str = ""
    near: str = ""

    @property
    def blind(self) -> bool:
        """Whether tests passed where there was no GPU: one may tell more."""
        passed = self.outcome in ("not run", "open", "survived")
        return passed and self.stack.startswith(covered.NO_GPU)

    @property
    def strength(self) -> tuple[int, int]:
        """How much this says, in comparison with another result of the same mutant."""
        passed = PASSED.index(self.passed) if self.passed else -1
        return STRENGTH.index(self.outcome), passed


class Journal:
    """All that was ever found, of which `known` gives what still holds, or is carried.

    patience: what a timeout must have been given at least. record: lines of an earlier journal;
    what killed there is likely to kill again, whether it holds or not.
    """

    def __init__(
        self, folder: Path, evidence: Evidence, patience: float = 0.0, record: Iterable[str] = ()
    ) -> None:
        self.path, self.evidence, self.patience = folder / NAME, evidence, patience
        self.near = Near(evidence)
        # By ID; by file and stack, of which the last counts.
        self.results: dict[str, dict[tuple[str, str], Result]] = {}
        # By (file, scope) and test: how often it was the one that killed.
        self.kills: dict[tuple[str, str], Counter[str]] = {}
        self._read("", record)
        for path in sorted(folder.glob("*.jsonl")):
            text = path.read_text()
            if text and not text.endswith("\n") and path == self.path:
                with path.open("a") as file:  # the end of a run that was killed
                    file.write("\n")
            self._read(path.name, text.splitlines())

    def _read(self, name: str, lines: Iterable[str]) -> None:
        for line in lines:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the end of a run that was killed
                continue
            if "calls" in entry and "stack" in entry:
                self.evidence.calls.setdefault(entry["stack"], {})[entry["of"]] = entry["calls"]
            elif "key" in entry and "id" in entry:
                self._enter(name, Result(**entry))

    def lines(self, mutants: Iterable[Mutant]) -> Iterator[str]:
        """Of a journal that has what is known of these mutants, and no more."""
        found = [
            # An earlier journal does not say what stands nearest; now is a time at which it holds.
            replace(r, near=self.near.key(r.outcome, r.by, m))
            for m in mutants if (r := self.known(m)) is not None
        ]  # fmt: skip
        stacks = {r.stack for r in found}
        for stack, of in sorted(self.evidence.calls.items()):
            for tests, calls in sorted(of.items()) if stack in stacks else ():
                yield json.dumps({"of": tests, "stack": stack, "calls": calls})
        for result in sorted(found, key=lambda r: r.id):
            yield json.dumps(asdict(result))

    def learn(self, baseline: Baseline) -> None:
        """Note which functions tests call now, on this stack.

        Where an earlier look saw those and more, verdicts go on to rest on what it saw.
        """
        stack = covered.stack()
        for tests, lines in baseline.executed.items():
            before = self.evidence.calls.get(stack, {}).get(tests, {})
            now = self.evidence.called(lines)
            if not all(f in before and {*of} <= {*before[f]} for f, of in now.items()):
                self.evidence.learn(tests, now, stack)
                self._write({"of": tests, "stack": stack, "calls": now})

    def add(self, mutant: Mutant, result: Result) -> None:
        """Keep a result, reached on this stack."""
        stack = covered.stack()
        key = self.evidence.key(result.outcome, mutant.file, result.by, stack)
        near = self.near.key(result.outcome, result.by, mutant)
        result = replace(result, key=key, stack=stack, near=near)
        self._enter(self.path.name, result)
        self._write(asdict(result))

    def known(self, mutant: Mutant) -> Result | None:
        """The best that is known of this mutant; of equals, this stack's.

        What holds counts before what is carried, but for what a machine without a GPU can't tell
        of a kill on one. What this journal has found counts before what the record says of the same
        stack.
        """
        return self._best(mutant)[0]

    def is_carried(self, mutant: Mutant) -> bool:
        """Whether what is known of this mutant no longer holds, and is carried."""
        return self._best(mutant)[1]

    def passed(self, mutant: Mutant) -> bool:
        """Whether tests that hold now passed, of a carried kill: without a GPU, of one on one."""
        every = self.results.get(mutant.id, {}).values()
        return any(r.blind and self._is_of(mutant, r) and self._holds(mutant, r) for r in every)

    def _best(self, mutant: Mutant) -> tuple[Result | None, bool]:
        here = covered.stack()

        def rank(result: Result) -> tuple[tuple[int, int], bool]:
            return result.strength, result.stack == here

        every = {k: r for k, r in self.results.get(mutant.id, {}).items() if self._is_of(mutant, r)}
        of = {k: r for k, r in every.items() if self._holds(mutant, r)}
        found = [r for (name, s), r in of.items() if name or (self.path.name, s) not in of]
        best = max(found, key=rank, default=None)
        if best is not None and not best.blind:
            return best, False
        carried = [
            r for k, r in every.items()
            if (best is None or not r.stack.startswith(covered.NO_GPU))
            and r.near and r.near == self.near.key(r.outcome, r.by, mutant)
            and not self._is_refuted(k, every)
        ]  # fmt: skip
        near = max(carried, key=rank, default=None)
        return (best, False) if near is None else (near, True)

    def _is_refuted(self, key: tuple[str, str], every: dict[tuple[str, str], Result]) -> bool:
        """Whether tests passed in another journal on the same stack: that may have been later.

        What this journal says is the last that was found here.
        """
        return key[0] != self.path.name and any(
            r.stack == key[1] and r.outcome not in CARRIED for r in every.values()
        )

    def _is_of(self, mutant: Mutant, result: Result) -> bool:
        late = result.outcome == "timeout" and result.patience < self.patience
        return result.what == mutant.what and not late

    def _holds(self, mutant: Mutant, result: Result) -> bool:
        key = self.evidence.key(result.outcome, mutant.file, result.by, result.stack)
        return result.key == key

    def killers(self, mutant: Mutant) -> Counter[str]:
        """Tests that are likely to kill, by weight: the one that did, those that killed others.

        A mutant that was left open has met the likely ones of its time: its file's own order then.
        """
        scope = _scope(mutant.id)
        found = Counter[str]()
        before = self.results.get(mutant.id, {}).values()
        if not any(old.outcome == "open" for old in before):
            for test, n in self.kills.get((mutant.file, ""), Counter()).items():
                found[test] += n
            for test, n in self.kills.get((mutant.file, scope), Counter()).items():
                found[test] += 10 * n
        for old in before:
            if "::" in old.by:
                found[old.by.removesuffix(" (ci)")] += 10**6
        return found

    def _enter(self, name: str, result: Result) -> None:
        self.results.setdefault(result.id, {})[name, result.stack] = result
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
