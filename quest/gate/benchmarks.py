"""Case after case: gate, memory, times in turn; what each comes to.

A benchmark fails where it is slower (`pairs`), its memory or error ratio grew, its gate is red, it
raises, base has it and the change has not, another benchmark stands under its name, or base can't
run it: without a comparison nothing says that it is not slower. A worker that died is replaced, and
the case tried once more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from . import correctness, pairs
from .side import LIMIT, Side, SideError
from .text import short

TURN = 0.02  # seconds of a turn, so that switching processes is a small part of it
MOST_CALLS = 15
MEMORY_GROWTH = 1.01  # allocators count exactly, in rounded blocks
BASE_FAILS = "base fails"

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """A benchmark's line.

    faults: what fails it, each a word and its detail. note: a word where there is no comparison
    and no fault. peak_base, peak: the most bytes that a call holds with its inputs.
    host_bound: the times are Python's, not the device's.
    """

    name: str
    faults: tuple[tuple[str, str], ...] = ()
    note: str = ""
    comparison: pairs.Comparison | None = None
    peak_base: int = 0
    peak: int = 0
    host_bound: bool = False

    @property
    def verdict(self) -> str:
        """What fails it, or how it compares."""
        if self.faults:
            return ", ".join(word for word, _ in self.faults)
        return self.comparison.verdict if self.comparison else self.note


class BaseError(SideError):
    """Base has no benchmarks that the gate can drive."""


@dataclass(frozen=True)
class Result:
    """All rows; A/A rows, of base against itself; cases that both skip; what the times are of."""

    rows: list[Row]
    same: list[Row]
    skipped: int
    device: str


@dataclass(frozen=True)
class Bench:
    """Two worktrees, and what of their benchmarks is wanted.

    base: None where it has none that can be driven. expression: pytest's -k. most: pairs of a
    case. same: cases of the A/A run. told: is called with the number of steps that are left and
    what the next one is. old_base: cases that base can't run are no faults. limit: seconds for a
    worker's answer.
    """

    base: Path | None
    change: Path
    expression: str
    most: int
    same: int
    told: Callable[[int, str], None]
    old_base: bool = False
    limit: float = LIMIT

    def _side(self, tree: Path, name: str) -> Side:
        return Side(tree, self.expression, name, self.limit)

    def run(self) -> Result:
        """Time everything. SideError where the change can't be driven, or nothing is selected."""
        with contextlib.ExitStack() as stack:
            change = stack.enter_context(self._side(self.change, "change"))
            base = stack.enter_context(self._side(self.base, "base")) if self.base else None
            hello = change.ask("hello")
            there = hello["cases"]
            before = self._before(base)
            names = [*before, *(name for name in there if name not in set(before))]
            if not names:
                raise SideError("usage", f"no benchmark matches {self.expression!r}", "change")
            rows = []
            for i, name in enumerate(names):
                self.told(len(names) - i, name)
                row = _tried(
                    name,
                    base if name in before else None,
                    change if name in there else None,
                    self.most,
                )
                rows += [row] if row else []
        rows = self._confirmed(rows)
        same = self._same(rows)
        if self.old_base:
            rows, same = list(map(_excused, rows)), list(map(_excused, same))
        return Result(rows, same, len(names) - len(rows), hello["device"])

    def _before(self, base: Side | None) -> list[str]:
        """The cases of base."""
        try:
            found: list[str] = base.ask("hello")["cases"] if base else []
        except SideError as error:
            raise BaseError(error.status, str(error), "base") from None
        return found

    def _confirmed(self, rows: list[Row]) -> list[Row]:
        """Slower cases get more looks, in fresh processes, until one does not find them slower."""
        for _ in range(pairs.LOOKS - 1):
            left = sum(map(_slower, rows))
            if self.base is None or not left:
                break
            with self._side(self.base, "base") as base, self._side(self.change, "change") as change:
                for i, row in enumerate(rows):
                    if row.comparison is not None and _slower(row):
                        self.told(left, f"{row.name}, once more")
                        left -= 1
                        rows[i] = _looked_again(row, base, change, self.most)
        return [_with_speed(row) for row in rows]

    def _same(self, rows: Sequence[Row]) -> list[Row]:
        """Base against itself, on cases spread over those that were compared."""
        timed = [row.name for row in rows if row.comparison is not None]
        if self.base is None or not timed or not self.same:
            return []
        count = min(self.same, len(timed))
        chosen = [timed[(2 * i + 1) * len(timed) // (2 * count)] for i in range(count)]
        made = []
        with self._side(self.base, "base") as one, self._side(self.base, "base") as other:
            for i, name in enumerate(chosen):
                self.told(count - i, f"{name}, base against itself")
                made.append(_looked_again(Row(name), one, other, self.most))
        return made


def unmatched(
    change: Path, base: Path | None, expression: str, limit: float = LIMIT
) -> list[str] | None:
    """The names of all benchmarks where `expression` selects none of them on either side.

    None where it selects some, or where the change's can't be collected: that is told in its turn.
    It costs a process for each side that is asked, seconds. base: None where it need not be asked.
    Raises SideError, "usage", for what is no expression.
    """
    names: set[str] = set()
    for tree, side in ((change, "change"), (base, "base")):
        if tree is None:
            continue
        try:
            with Side(tree, expression, side, limit) as worker:
                found = worker.ask("hello")
        except SideError as error:
            if error.status == "usage":
                raise
            if side == "change":
                return None
            break  # base has none that the gate can drive
        if found["cases"]:
            return None
        names.update(short(name).partition("[")[0] for name in found["left_out"])
    return sorted(names)


def _slower(row: Row) -> bool:
    return row.comparison is not None and row.comparison.verdict == "slower"


def _with_speed(row: Row) -> Row:
    """With the fault of its comparison, once that is final."""
    if not _slower(row) or row.comparison is None:
        return row
    low = row.comparison.low
    detail = f"at least {low:.3f} times base's time; {pairs.SLOWER:.2f} is the limit"
    return dataclasses.replace(row, faults=(("slower", detail), *row.faults))


def _excused(row: Row) -> Row:
    """Without the fault that base can't run it: --allow-old-base."""
    left = tuple(fault for fault in row.faults if fault[0] != BASE_FAILS)
    return row if left == row.faults else dataclasses.replace(row, faults=left, note=BASE_FAILS)


def _fault(error: SideError) -> tuple[str, str]:
    """The word and detail of a side that failed."""
    word = error.status if error.status in ("red", "missing") else "broken"
    if error.side == "base":
        return BASE_FAILS, f"{error} (--allow-old-base lets it pass)"
    return word, str(error)


def _again(attempt: Callable[[], T]) -> T:
    """attempt(), once more where a worker died: its next request finds a new one."""
    try:
        return attempt()
    except SideError as error:
        if error.status != "died":
            raise
    return attempt()


def _open(side: Side, name: str) -> dict[str, Any]:
    """The reply to "open", or the refusal as one: its status is not ok. SideError: it died."""
    try:
        return side.ask("open", case=name)
    except SideError as error:
        if error.status == "died":
            raise
        return {"status": error.status, "message": str(error)}


def _paired(base: Side, change: Side, walls: Sequence[float], most: int) -> pairs.Comparison:
    """The open case's comparison. walls: seconds of a call on each side, with all around it."""
    calls = min(MOST_CALLS, math.ceil(TURN / max(*walls, 1e-6)))
    calls += 1 - calls % 2  # the same on both sides; odd, so that the median is one of them
    return pairs.compare(partial(base.turn, calls), partial(change.turn, calls), most)


def _opened(name: str, base: Side, change: Side, most: int) -> pairs.Comparison:
    """A case that both sides are known to have."""
    walls = [float(side.ask("open", case=name)["wall"]) for side in (base, change)]
    return _paired(base, change, walls, most)


def _looked_again(row: Row, base: Side, change: Side, most: int) -> Row:
    """A case that both sides have run, once more: the look that finds it the least slow counts."""
    try:
        found = _again(partial(_opened, row.name, base, change, most))
    except SideError as error:
        return dataclasses.replace(row, comparison=None, faults=(_fault(error), *row.faults))
    looks = (row.comparison, found) if row.comparison else (found,)
    return dataclasses.replace(row, comparison=min(looks, key=lambda look: look.low))


def _tried(name: str, base: Side | None, change: Side | None, most: int) -> Row | None:
    """A case's row, whatever happens to the workers; None where this machine skips it."""
    try:
        return _again(partial(_row, name, base, change, most))
    except SideError as error:
        return Row(name, faults=(_fault(error),))


def _row(name: str, base: Side | None, change: Side | None, most: int) -> Row | None:
    """A case's row; None where this machine skips it. Without its speed's fault (`_with_speed`).

    Raises SideError where a worker dies, or refuses what it had accepted.
    """
    before: dict[str, Any] = _open(base, name) if base else {"status": "new"}
    after: dict[str, Any] = (
        _open(change, name) if change else {"status": "missing", "message": "base has it"}
    )
    if after["status"] == "skipped" and before["status"] == "ok":
        after = {"status": "missing", "message": f"skipped, not in base: {after['message']}"}
    skips = after["status"] == "skipped"
    if before["status"] in ("new", "skipped") and (skips or after["status"] == "missing"):
        return None
    if after["status"] != "ok" and not skips:
        raise SideError(after["status"], after["message"], "change")
    if before["status"] in ("new", "skipped"):
        return Row(name, note="new")
    if before["status"] != "ok":
        told = f"{before['message']}{'; the change skips it' if skips else ''}"
        raise SideError(before["status"], told, "base")
    assert base is not None
    assert change is not None
    for what, word in (("identity", "other benchmark"), ("inputs", "other inputs")):
        if before[what] != after[what]:
            told = f"{after[what]} here, {before[what]} in base: give it another name"
            return Row(name, faults=((word, told),))
    faults = []
    if correctness.grew(before["worst_ratio"], after["worst_ratio"]):
        told = f"worst ratio {after['worst_ratio']:.3f}, base's {before['worst_ratio']:.3f}"
        faults.append(("error grew", told))
    if after["peak"] > MEMORY_GROWTH * before["peak"]:
        told = f"{after['peak']:,} bytes at the peak, base's {before['peak']:,}"
        faults.append(("more memory", told))
    found = _paired(base, change, (before["wall"], after["wall"]), most)
    bound = [side.ask("turn", calls=1, pair=0)["host_bound"] for side in (base, change)]
    return Row(name, tuple(faults), "", found, before["peak"], after["peak"], host_bound=any(bound))
