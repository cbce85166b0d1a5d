"""One run of the public court: what was judged, what failed with its smallest example.

Each test enters what it judged under its property; Hypothesis runs the smallest failing example
last, so that the last failure is the one to keep. A record is plain data, since pytest-xdist sends
it from a worker to its controller.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from quest.conformance.strategies import Case
from quest.conformance.verdict import Rejected, Tally, Verdict, observed

from .adapter import Implementation
from .asked import Asked

# Pairs of (bound, error) that a property keeps for its plot, beside each judgement's worst.
POINTS = 400
SMALL = 32  # entries of a tensor that a report still prints
SPARSE = 4  # entries of a tensor of zeros that it names


@dataclass
class Record:
    """What a test judged.

    points: pairs (bound, error). asked: the values of what it draws among declared ones, and
    uncovered: why others were not. failure: the smallest example, as told, with what reproduces it.
    """

    calls: int = 0
    elements: int = 0
    ratio: float = 0.0
    ambiguous: int = 0
    points: list[tuple[float, float]] = field(default_factory=list)
    asked: dict[str, list[Any]] = field(default_factory=dict)
    uncovered: list[str] = field(default_factory=list)
    failure: dict[str, Any] | None = None


class Court:
    """Judges calls of an implementation, and keeps a record for the test that is running."""

    def __init__(self, impl: Implementation) -> None:
        self.impl = impl
        self.record = Record()
        self.asked = Asked()
        self._tallies: dict[str, Tally] = {}

    def start(self) -> None:
        """Begin with an empty record: the next test."""
        self.record, self.asked, self._tallies = Record(), Asked(), {}
        self.impl.raised.clear()

    def finish(self) -> dict[str, Any]:
        """The record as plain data."""
        self.record.asked, self.record.uncovered = self.asked.told(), self.asked.uncovered()
        return dataclasses.asdict(self.record)

    def judge(
        self,
        property_: Callable[..., list[Verdict]],
        tensors: Mapping[str, str | Case],
        arguments: tuple[Any, ...],
        code: str,
        **keywords: Any,
    ) -> None:
        """Judge one call of `property_`; raise Rejected, with the snippet, where it fails.

        tensors: for each tensor among the arguments, by its name, the case or the Python that makes
        it. code: the other arguments, as Python. keywords: passed on.
        """
        __tracebackhide__ = True
        made = [a for a in arguments if isinstance(a, torch.Tensor)]
        named = dict(zip(tensors, made, strict=True))
        try:
            with observed(self._observe):
                found = property_(self.impl, *arguments, **keywords)
        except Exception as error:
            # An adapter that raises is as wrong as one that computes nonsense.
            told = f"{type(error).__name__}: {error}"
            self._fail(property_.__name__, "raised", told, named, tensors, code)
            raise
        self.asked.judged()
        for verdict in found:
            self._enter(verdict, bool(keywords.get("conclusive", True)))
            if verdict.failure is not None:
                self._fail(property_.__name__, verdict.stage, verdict.failure, named, tensors, code)
                raise Rejected(f"{verdict.stage}: {verdict.failure}\n{self.told()}")

    def settle(self) -> None:
        """The rules on ambiguous elements of each stage, over all calls of this test."""
        problems = [(s, p) for s, tally in self._tallies.items() for p in tally.problems()]
        if problems and self.record.failure is None:
            stage, told = problems[0]
            self.record.failure = {"stage": stage, "told": told, "example": "all of them",
                                   "tensors": {}, "snippet": ""}  # fmt: skip
            raise Rejected(told)

    def told(self) -> str:
        """The failure that was met last, for a person."""
        failure = self.record.failure or {}
        shown = "".join(f"{n} = {t}\n" for n, t in failure.get("tensors", {}).items())
        return f"{shown}To reproduce:\n{failure.get('snippet', '')}"

    def _enter(self, verdict: Verdict, conclusive: bool) -> None:
        record = self.record
        record.calls += 1
        record.elements += verdict.elements
        record.ratio = max(record.ratio, verdict.ratio)
        record.ambiguous += verdict.ambiguous
        if verdict.failure is None:
            self._tallies.setdefault(verdict.stage, Tally()).add(verdict, conclusive)

    def _observe(self, error: np.ndarray, bound: np.ndarray) -> None:
        """Keep the worst element of each judgement and, of the first ones, a few others."""
        e, b = np.ravel(error), np.ravel(np.broadcast_to(bound, error.shape))
        good = np.flatnonzero(np.isfinite(e) & np.isfinite(b) & (b > 0) & (e > 0))
        if not good.size:
            return
        top = good[np.argmax(e[good] / b[good])]
        chosen = {int(top)}
        if len(self.record.points) < POINTS:
            chosen |= set(map(int, good[:: max(1, good.size // 8)]))
        self.record.points += [(float(b[i]), float(e[i])) for i in sorted(chosen)]

    def _fail(
        self, name: str, stage: str, told: str, named: dict[str, torch.Tensor],
        tensors: Mapping[str, str | Case], code: str,
    ) -> None:  # fmt: skip
        lines = [
            "import torch, quest",
            "from quest.conformance import exact_rows, inputs",
            "from quest.conformance.public import load, properties",
            f"impl = load({self.impl.spec!r})",
            *(m.code(n) if isinstance(m, Case) else f"{n} = {m}" for n, m in tensors.items()),
        ]
        arguments = ", ".join(["impl", *tensors, *([code] if code else [])])
        lines += [f"for verdict in properties.{name}({arguments}):", "    print(verdict)"]
        shown = {n: _shown(t, _layout(tensors[n])) for n, t in named.items()}
        self.record.failure = {
            "stage": stage,
            "told": told,
            "tensors": shown,
            "snippet": "\n".join(lines) + "\n",
        }


def _layout(makes: str | Case) -> str:
    """What the memory of its tensor is called, with a space behind it; "" where contiguous."""
    layout = makes.layout if isinstance(makes, Case) else "contiguous"
    return "" if layout == "contiguous" else f"{layout} "


def _shown(t: torch.Tensor, layout: str) -> str:
    kind = f"{tuple(t.shape)} {layout}{str(t.dtype).removeprefix('torch.')}"
    values = t.flatten().tolist()
    if len(values) <= 2 * SPARSE:
        return f"{kind} {t.tolist()}"
    if len(set(values)) == 1:
        return f"{kind}, every entry {values[0]}"
    entries = [f"{tuple(map(int, i))}: {t[tuple(i)].item()}" for i in t.nonzero()[: SPARSE + 1]]
    if len(entries) <= SPARSE:
        return f"{kind}, zeros but {', '.join(entries)}"
    return f"{kind} {t.tolist()}" if len(values) <= SMALL else f"{kind}, see the snippet"
