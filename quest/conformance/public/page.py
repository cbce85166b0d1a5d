"""The results as one HTML page that needs nothing else: tables, pictures, examples to run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

from . import plots
from .document import machine
from .results import EXPECTED, FAILED, NOT_COVERED, PASSED, SKIPPED, STALE, Outcome, Results
from .summary import counts, uncovered

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; }
table { border-collapse: collapse; margin: .8rem 0; }
th, td { text-align: left; padding: .15rem .7rem .15rem 0; border-bottom: 1px solid #ddd;
         vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #f5f5f5; padding: .7rem; overflow-x: auto; font-size: 13px; }
.passed { color: #17702a; } .failed { color: #b00020; font-weight: 600; }
.expected, .skipped, .uncovered { color: #775500; }
figure { margin: 0; display: inline-block; } svg { max-width: 100%; height: auto; }
"""
CLASSES = {PASSED: "passed", FAILED: "failed", STALE: "failed", EXPECTED: "expected",
           SKIPPED: "skipped", NOT_COVERED: "uncovered"}  # fmt: skip
COLUMNS = (PASSED, FAILED, EXPECTED, SKIPPED, NOT_COVERED)


def _verdict(outcomes: Mapping[str, Outcome]) -> str:
    number = counts(outcomes)
    return next((c for c in (FAILED, PASSED, EXPECTED, SKIPPED) if number[c]), NOT_COVERED)


def _table(results: Results) -> Iterator[str]:
    yield "<table><tr><th>property</th>"
    yield "".join(f'<th class="n">{c}</th>' for c in COLUMNS)
    yield '<th class="n">elements judged</th><th class="n">worst ratio</th></tr>'
    for name, outcomes in results.properties().items():
        number, verdict = counts(outcomes), _verdict(outcomes)
        link = f'<a href="#{escape(name)}">{escape(name)}</a>'
        head = escape(name) if verdict == NOT_COVERED else link
        cells = "".join(f'<td class="n">{number[c] or ""}</td>' for c in COLUMNS)
        elements = sum(o.record.get("elements", 0) for o in outcomes.values())
        ratio = max((o.record.get("ratio", 0.0) for o in outcomes.values()), default=0.0)
        worst = "<td></td><td></td>" if verdict in (NOT_COVERED, SKIPPED) else (
            f'<td class="n">{elements:,}</td><td class="n">{ratio:.3g}</td>'
        )  # fmt: skip
        yield f'<tr><td class="{CLASSES[verdict]}">{head}</td>{cells}{worst}</tr>'
    yield "</table>"


def _example(name: str, outcome: Outcome) -> Iterator[str]:
    failure = outcome.record.get("failure")
    kind = "must fail, and does" if outcome.outcome == EXPECTED else outcome.outcome
    yield f'<h4 class="{CLASSES[outcome.outcome]}">{escape(name)}: {kind}</h4>'
    if failure is None:
        return
    yield f"<p>{escape(failure['stage'])}: {escape(failure['told'])}</p>"
    shown = "\n".join(f"{n} = {t}" for n, t in failure["tensors"].items())
    yield f"<p>Smallest failing example:</p><pre>{escape(shown)}</pre>"
    if failure["snippet"]:
        yield f"<p>To reproduce:</p><pre>{escape(failure['snippet'])}</pre>"


def _property(name: str, outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    yield f'<h3 id="{escape(name)}">{escape(name)}</h3>'
    picture = plots.error_against_bound(outcomes)
    if picture is not None:
        yield f"<figure>{picture}</figure>"
    yield '<table><tr><th>parameters</th><th>outcome</th><th class="n">elements</th>'
    yield '<th class="n">worst ratio</th><th class="n">ambiguous</th></tr>'
    for params, outcome in outcomes.items():
        record = outcome.record
        if outcome.outcome == NOT_COVERED:
            continue
        cells = "".join(
            f'<td class="n">{record.get(key, 0):{form}}</td>'
            for key, form in (("elements", ","), ("ratio", ".3g"), ("ambiguous", ","))
        )
        kind = f'<td class="{CLASSES[outcome.outcome]}">{outcome.outcome}</td>'
        yield f"<tr><td>{escape(params) or 'all'}</td>{kind}{cells}</tr>"
    yield "</table>"
    for params, outcome in outcomes.items():
        if outcome.outcome in (FAILED, STALE, EXPECTED):
            yield from _example(f"{name}[{params}]" if params else name, outcome)


def _page(results: Results) -> Iterator[str]:
    impl = results.impl
    title = f"{escape(impl.spec)}, judged by quest"
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
    yield f"<style>{STYLE}</style><h1>{title}</h1>"
    versions = ", ".join(f"{k} {v}" for k, v in machine().items() if v is not None)
    yield f"<p>{escape(versions)}</p>"
    if impl.missing is not None:
        yield f'<p class="uncovered">Nothing is covered: {escape(impl.missing)}.</p>'
    if impl.departures:
        yield "<h2>Departures from the specification</h2><ul>"
        yield "".join(f"<li>{escape(d)}</li>" for d in impl.departures) + "</ul>"
    yield "<h2>Properties</h2>"
    yield "<p>A ratio is an error over its bound; up to 1 is admissible. Exact properties have 0 "
    yield "or infinity.</p>"
    yield from _table(results)
    yield "<h2>Not covered</h2><p>What an adapter does not declare is not judged, and not passed."
    yield "</p><ul>" + "".join(f"<li>{escape(line)}</li>" for line in uncovered(results))
    yield f"<li>undeclared: {escape(', '.join(impl.capabilities.undeclared()))}</li></ul>"
    yield "<h2>One by one</h2>"
    for name, outcomes in results.properties().items():
        if _verdict(outcomes) != NOT_COVERED:
            yield from _property(name, outcomes)
    yield "</html>"


def write(path: Path, results: Results) -> None:
    """Write the page to a file."""
    path.write_text("\n".join(_page(results)) + "\n", encoding="utf-8")
