"""The end of a run in a terminal: a line a property, then what failed, shortest first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from .results import EXPECTED, FAILED, NOT_COVERED, PASSED, SKIPPED, STALE, Outcome, Results

COLUMNS = (PASSED, FAILED, EXPECTED, SKIPPED, NOT_COVERED)


def counts(outcomes: Mapping[str, Outcome]) -> Counter[str]:
    """How many parameters of a property came to what; stale ones count as failed."""
    return Counter(FAILED if o.outcome == STALE else o.outcome for o in outcomes.values())


def lines(results: Results) -> Iterator[tuple[str, str]]:
    """(line, color) of the summary."""
    heads = ("passed", "failed", "expected", "skipped", "not covered")
    yield (
        f"{'property':<40}"
        + "".join(f"{h:>{len(h) + 2}}" for h in heads)
        + (f"{'elements':>12}{'worst r':>9}"),
        "",
    )
    bare = []
    for name, outcomes in results.properties().items():
        number = counts(outcomes)
        if number[NOT_COVERED] == len(outcomes):
            bare.append(name)
            continue
        cells = "".join(f"{number[c]:>{len(h) + 2}}" for c, h in zip(COLUMNS, heads, strict=True))
        elements = sum(o.record.get("elements", 0) for o in outcomes.values())
        ratio = max((o.record.get("ratio", 0.0) for o in outcomes.values()), default=0.0)
        yield f"{name:<40}{cells}{elements:>12,}{ratio:>9.3g}", _color(number)
    if bare:
        yield f"not covered at all: {', '.join(bare)}", "yellow"
    yield from _notes(results)
    yield from _failures(results)


def uncovered(results: Results) -> list[str]:
    """What is not covered, one line for each reason; reasons of a kind share one."""
    number: Counter[str] = Counter()
    kinds: dict[str, list[str]] = {}
    for outcome in results.outcomes.values():
        # A test that ran may have left out some of what it draws from.
        left_out: list[str] = outcome.record.get("uncovered", [])
        for reason in [outcome.reason] if outcome.outcome == NOT_COVERED else left_out:
            kind, _, value = reason.rpartition(" ")
            if kind.startswith("no function"):
                kind, value = (
                    "no function",
                    reason.removeprefix("no function ").partition("(")[0],
                )
            number[kind] += 1
            if value not in kinds.setdefault(kind, []):
                kinds[kind].append(value)
    return [f"not covered ({number[k]}): {k} {', '.join(v)}" for k, v in kinds.items()]


def _color(number: Counter[str]) -> str:
    if number[FAILED]:
        return "red"
    return "green" if number[PASSED] else "yellow"


def _notes(results: Results) -> Iterator[tuple[str, str]]:
    impl = results.impl
    if impl.missing is not None:
        yield f"nothing is covered: {impl.missing}", "yellow"
    if impl.missing is None:
        for line in uncovered(results):
            yield line, "yellow"
    for departure in impl.departures:
        yield f"departs from the specification: {departure}", "yellow"
    if impl.unknown:
        yield f"not a function that is judged: {', '.join(impl.unknown)}", "yellow"


def _failures(results: Results) -> Iterator[tuple[str, str]]:
    for name, outcome in results.outcomes.items():
        if outcome.outcome == STALE:
            yield f"stale: {name} is listed in {results.xfails.origin} and passes", "red"
        if outcome.outcome != FAILED:
            continue
        failure = outcome.record.get("failure") or {"told": "see above", "tensors": {}}
        yield "", ""
        yield f"FAILED {name}", "red"
        if outcome.reason:
            yield f"  listed in {results.xfails.origin}: {outcome.reason}", "red"
        for tensor, shown in failure["tensors"].items():
            yield f"  smallest example: {tensor} = {shown}", ""
        yield f"  {failure['told']}", ""
