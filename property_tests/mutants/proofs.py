"""Proofs that a mutant changes no result: of one mutant, or of all of some kinds in a function.

A proof is about the code as it was read: it is stale where that is another now.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .evidence import Outline
from .mutant import ROOT, Mutant, flat

FILE = Path(__file__).parent / "equivalent.toml"


@dataclass(frozen=True)
class Rule:
    """Mutants of these operators in one function, file:name, can only change speed, or raise.

    code: the digest of the function that was read.
    """

    function: str
    operators: frozenset[str]
    code: str
    because: str

    def covers(self, mutant: Mutant) -> bool:
        """Whether it is about this mutant."""
        function, _, kind = mutant.id.rpartition(":")[0].rpartition(":")
        return function == self.function and kind in self.operators

    def now(self) -> str:
        """The digest of the function as it is."""
        file, _, name = self.function.partition(":")
        path = ROOT / file
        return Outline(path.read_text()).functions.get(name, "") if path.is_file() else ""


@dataclass(frozen=True)
class Proofs:
    """one: by ID, what the mutant changes and why that changes nothing."""

    one: dict[str, tuple[str, str]] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()

    def rule(self, mutant: Mutant) -> Rule | None:
        """The rule about a mutant."""
        return next((r for r in self.rules if r.covers(mutant)), None)

    def because(self, mutant: Mutant) -> str:
        """Why no test can tell; "" without a proof."""
        rule = self.rule(mutant)
        return self.one[mutant.id][1] if mutant.id in self.one else rule.because if rule else ""

    def stale(self, known: Iterable[Mutant]) -> list[str]:
        """What is wrong with them: code and mutants that are no more, or are others now."""
        known = list(known)
        made = {m.id: m.what for m in known}
        wrong = [
            f"{name} is not a mutant" if name not in made
            else f"{name} is {made[name]!r}, and not {what!r}"
            for name, (what, _) in self.one.items() if made.get(name) != what
        ]  # fmt: skip
        for rule in self.rules:
            if (now := rule.now()) != rule.code:
                wrong.append(f"the code of {rule.function} is {now!r} now, and not {rule.code!r}")
            found = {m.id.split(":")[-2] for m in known if rule.covers(m)}
            gone = sorted(rule.operators - found)
            wrong += [f"{rule.function} has no mutant of {operator!r}" for operator in gone]
        return wrong


def read() -> Proofs:
    """Those of equivalent.toml."""
    with FILE.open("rb") as file:
        entries = tomllib.load(file)
    one: dict[str, tuple[str, str]] = {}
    for entry in entries.get("proof", []):
        for name, what in entry["mutants"].items():
            if name in one:
                raise ValueError(f"{FILE.name} names {name} twice")
            one[name] = what, flat(entry["because"])
    rules = tuple(
        Rule(e["function"], frozenset(e["operators"]), e["code"], flat(e["because"]))
        for e in entries.get("rule", [])
    )
    return Proofs(one, rules)
