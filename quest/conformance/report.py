"""`quest verify --html`: what a run found, as one page that needs nothing else.

Pictures are SVG in the page (`pictures`), the heat map and the tables are plain HTML; there is no
script, no font and no address to load. Colours follow the reader's light or dark mode, wide tables
scroll inside their frames.
"""

from __future__ import annotations

import errno
import html
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import quest
from quest.estimators import Estimator
from quest.grids import Grid
from quest.quantizer import Quantizer

from . import oracle, pictures
from .lanes import Lane
from .verdict import BINS

Row = Mapping[str, Any]
MASKS: dict[str, tuple[str, Estimator]] = {
    "1 bit, clip 1.3": ("uniform1", quest.Clip(1.3)),
    "2 bits, trust": ("uniform2", quest.Trust()),
    "4 bits, trust": ("uniform4", quest.Trust()),
    "4 bits, trust 0.5": ("uniform4", quest.Trust(0.5)),
    "ternary, trust": ("ternary", quest.Trust()),
    "E2M1, trust": ("e2m1", quest.Trust()),
}
STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2430; --faint: #9aa1ad;
  --fill: #e6e9ef; --bad: #c62f2f; --good: #2e7d4f; --line: #d5d9e0; --line0: #1f6fb2;
  --line1: #c46a12; --line2: #2e8b57; --heat: 31, 111, 178; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --ink: #e4e7ec; --faint: #7d8694;
  --fill: #262c36; --bad: #ff7a70; --good: #5fc88a; --line: #333a45; --line0: #6db3f2;
  --line1: #f0a35c; --line2: #6fce9b; --heat: 109, 179, 242; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p, ul { max-width: 46rem; }
.pass { color: var(--good); } .fail { color: var(--bad); font-weight: 600; }
.pictures { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
.pictures svg { width: 100%; height: auto; display: block; }
.frame { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .55rem; text-align: left; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
td.n, th.n { text-align: right; }
.heat td { text-align: center; border: 1px solid var(--paper); }
.heat td.none { color: var(--faint); }
.heat td.fail { outline: 2px solid var(--bad); outline-offset: -2px; }
.heat th[scope=row] { position: sticky; left: 0; background: var(--paper); }
.problem { white-space: normal; overflow-wrap: anywhere; }
summary { cursor: pointer; margin: .6rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; font-size: .9rem; }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def check(option: str, path: Path | None) -> None:
    """ValueError where a file can't be written; what a run of minutes should not end with."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: the folder {path.parent} does not exist")
    try:
        if path.is_dir():
            raise ValueError(f"{option} {path} is a folder, and must be a file")
        if not path.exists():  # the only sure way: access() lets root write into /proc
            path.touch()
            path.unlink()
        elif not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ValueError(f"{option} {path}: it can't be written: {error.strerror}") from None


def _text(value: Any) -> str:
    return html.escape(str(value))


def _grids(formats: Mapping[str, Grid]) -> str:
    return "".join(pictures.grid(name, oracle.grid(g)) for name, g in formats.items())


def _spreads(rows: Iterable[Row]) -> str:
    """A picture for each kernel: counts of elements by error over bound, by dtype."""
    found: dict[str, dict[str, list[int]]] = {}
    for row in rows:
        counts = found.setdefault(row["kernel"], {}).setdefault(row["dtype"], [0] * BINS)
        for spread in row["spread"].values():
            for i, n in enumerate(spread):
                counts[i] += n
    return "".join(
        pictures.spreads(kernel, by_dtype)
        for kernel, by_dtype in found.items()
        if any(map(sum, by_dtype.values()))
    )


def _masks(lane: Lane, formats: Mapping[str, Grid]) -> str:
    made = {
        name: Quantizer(formats[grid], quest.Hadamard(128), estimator)
        for name, (grid, estimator) in MASKS.items()
    }
    return "".join(pictures.mask(name, lane, q) for name, q in made.items())


def _cell(row: Row | None) -> str:
    if row is None:
        return '<td class="none">·</td>'
    ratio, failed = row["ratio"], row["verdict"] != "pass"
    shade = f"background: rgba(var(--heat), {min(ratio, 1.0) * 0.55:.2f})"
    shown = f"{ratio:.2f}" + (" FAIL" if failed else "")
    return f'<td class="{"fail" if failed else "ok"}" style="{shade}">{shown}</td>'


def _heat(rows: list[Row], lanes: Iterable[str]) -> str:
    """Kernel and format against lane and dtype: the worst ratio, and FAIL where it failed."""
    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    columns = [(lane, dtype) for lane in lanes for dtype in dtypes]
    by_place = {(r["kernel"], r["format"], r["lane"], r["dtype"]): r for r in rows}
    names = sorted(dict.fromkeys((r["kernel"], r["format"]) for r in rows), key=lambda n: n[0])
    head = "".join(f'<th colspan="{len(dtypes)}">{_text(lane)}</th>' for lane in lanes)
    below = "".join(f"<th>{_text(dtype)}</th>" for _, dtype in columns)
    body = "".join(
        f'<tr><th scope="row">{_text(kernel)} {_text(fmt)}</th>'
        + "".join(_cell(by_place.get((kernel, fmt, *column))) for column in columns)
        + "</tr>"
        for kernel, fmt in names
    )
    return (
        f'<div class="frame"><table class="heat"><thead><tr><th></th>{head}</tr>'
        f"<tr><th></th>{below}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _rows(lane: str, rows: list[Row]) -> str:
    head = "".join(
        f"<th{c}>{name}</th>"
        for name, c in (
            ("kernel", ""), ("format", ""), ("dtype", ""), ("elements", ' class="n"'),
            ("worst ratio", ' class="n"'), ("in stage", ""), ("ambiguous", ' class="n"'),
            ("verdict", ""),
        )
    )  # fmt: skip
    body = ""
    for r in rows:
        stage = max(r["stages"], key=r["stages"].get, default="") if r["ratio"] else ""
        colour = "pass" if r["verdict"] == "pass" else "fail"
        body += (
            f"<tr><td>{_text(r['kernel'])}</td><td>{_text(r['format'])}</td>"
            f'<td>{_text(r["dtype"])}</td><td class="n">{r["elements"]:,}</td>'
            f'<td class="n">{r["ratio"]:.3f}</td><td>{_text(stage)}</td>'
            f'<td class="n">{r["ambiguous"]}</td>'
            f'<td class="{colour}">{_text(r["verdict"])}</td></tr>'
        )
    return (
        f"<details open><summary>{_text(lane)}, {len(rows)} rows</summary>"
        f'<div class="frame"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div></details>"
    )


def _problems(rows: list[Row]) -> str:
    told = "".join(
        f'<li class="problem"><strong>{_text(r["lane"])}, {_text(r["kernel"])} '
        f"{_text(r['format'])} {_text(r['dtype'])}</strong>: {_text(problem)}</li>"
        for r in rows
        for problem in r["problems"]
    )
    return f"<h2>What failed</h2><ul>{told}</ul>" if told else ""


def page(
    document: Mapping[str, Any], lane: Lane, absent: Mapping[str, str], formats: Mapping[str, Grid]
) -> str:
    """The page of a run.

    document: what `--json` writes. lane: the one whose masks are drawn. absent: reasons by the name
    of a lane that this machine can't run. formats: the grids that are drawn.
    """
    rows = list(document["rows"])
    lanes = list(dict.fromkeys(r["lane"] for r in rows))
    failed = sum(r["verdict"] != "pass" for r in rows)
    elements = sum(r["elements"] for r in rows)
    verdict = (
        f'<span class="fail">{failed} of {len(rows)} rows fail</span>'
        if failed
        else f'<span class="pass">all {len(rows)} rows pass</span>'
    )
    facts = {k: "none" if v is None else v for k, v in document["machine"].items()}
    facts |= {f"not run: {name}": reason for name, reason in absent.items()}
    listed = "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in facts.items())
    tables = "".join(_rows(name, [r for r in rows if r["lane"] == name]) for name in lanes)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>quest verify</title>
<style>{STYLE}</style>
</head>
<body>
<h1>quest verify: {verdict}</h1>
<p>{elements:,} elements judged against the float64 oracle in {document["seconds"]:.0f} s. A ratio
is an error over its bound: up to 1 it is admissible.</p>
<dl>{listed}</dl>
{_problems(rows)}
<h2>Formats and lanes</h2>
<p>The worst ratio of each row. Results in 16 bits come near 1 by their last rounding alone; a dot
was not judged.</p>
{_heat(rows, [*lanes, *absent])}
<h2>Error over bound</h2>
<p>How the elements of each kernel spread below their bounds, the red line. Exact stages and codes
are not in it.</p>
<div class="pictures">{_spreads(rows)}</div>
<h2>Grids</h2>
<p>The points (strokes) on the density of a unit Gaussian (shaded). The line shows where the
squared error comes from, scaled to its peak; the number is its mean.</p>
<div class="pictures">{_grids(formats)}</div>
<h2>Mask</h2>
<p>What {_text(lane)} makes of x / sigma, measured on Gaussian rows. The red share of each column
of the picture gets no gradient.</p>
<div class="pictures">{_masks(lane, formats)}</div>
<h2>All rows</h2>
{tables}
</body>
</html>
"""
