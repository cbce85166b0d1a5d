"""`quest verify`: every lane of this machine against the oracle, as a table.

A row is a kernel, a format and a dtype in one lane. Inputs come from fixed seeds, so the worst
ratio of a stage is a property of the implementation, and a second gate holds it to 1.5 times what
is recorded in `ratios.json`: a loss of accuracy inside the bound is seen, too. (Where a result is
stored in 16 bits, that rounding alone comes near the bound, and the second gate can't bite.)
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import quest
from quest import operands
from quest.gated_product import HALVES

from . import examine, inputs, oracle, report
from .lanes import Lane, all_lanes, missing, no_product
from .verdict import Tally, Verdict

RECORDED = Path(__file__).with_name("ratios.json")
# Below this share of the bound a change of the ratio says nothing.
FLOOR = 0.02
GROWTH = 1.5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("gaussian", "heavy", "outlier", "integers", "mixed_rows", "non_finite", "huge", "tiny")
FORMATS = {
    **{f"uniform{b}": quest.grids.uniform(b) for b in range(1, 9)},
    "ternary": quest.grids.ternary(),
    "e2m1": quest.grids.e2m1(),
    **{f"lloyd_max{b}": quest.grids.lloyd_max(b) for b in (2, 3, 4, 8)},
}
SPARSE: dict[str, quest.NM | quest.Pairwise] = {
    "2:4": quest.NM(2, 4),
    "4:8 pairs": quest.Pairwise(4, 8),
}
INTEGER = ("w1a1", "w4a4", "w8a8", "w4a8", "fp4", "w4a4-2:4")  # with an integer product
GATED = ("w1a1", "w4a4", "w8a8")
# Of gate and value.
GATES = (
    ("gaussian", "gaussian"), ("heavy", "outlier"), ("outlier", "mixed_rows"),
    ("mixed_rows", "heavy"), ("non_finite", "gaussian"), ("huge", "tiny"), ("tiny", "huge"),
)  # fmt: skip
RECIPES = ("w1a1", "w4a4", "w8a8", "fp4", "w4a4-2:4", "w4a4-4:8", "w4a16")


@dataclass(frozen=True)
class Row:
    """One line of the table: what is judged, and how."""

    lane: Lane
    kernel: str
    format: str
    dtype: torch.dtype
    judge: Callable[[], list[list[Verdict]]]

    @property
    def key(self) -> str:
        """The row's name in `ratios.json`."""
        return f"{self.lane}/{self.kernel}/{self.format}/{oracle.dtype_name(self.dtype)}"


def _transforms(lane: Lane, order: int, dtype: torch.dtype) -> list[list[Verdict]]:
    width = order * (3 if order >= 128 else 7)
    return [
        examine.transform(lane, inputs.draw(kind, (17, width), dtype, i), order, bool(i % 2))
        for i, kind in enumerate(KINDS)
    ]


def _quantizers(lane: Lane, q: quest.Quantizer, dtype: torch.dtype) -> list[list[Verdict]]:
    return [
        examine.quantizer(lane, inputs.draw(kind, (17, 384), dtype, i), q)
        for i, kind in enumerate(KINDS)
    ]


def _backwards(lane: Lane, order: int, dtype: torch.dtype) -> list[list[Verdict]]:
    found = []
    for i, kind in enumerate(KINDS):
        grad = inputs.draw(kind, (17, order * 3), dtype, i)
        g = torch.Generator().manual_seed(i)
        mask = torch.randint(256, (17, -(-grad.shape[-1] // 8)), generator=g).to(torch.uint8)
        found.append(examine.backward(lane, grad, mask, order))
    return found


def _layers(lane: Lane, name: str, dtype: torch.dtype, path: str) -> list[list[Verdict]]:
    found = []
    for i, kind in enumerate(("gaussian", "heavy", "outlier")):
        x = inputs.draw(kind, (19, 384), dtype, i)
        w = inputs.draw("gaussian", (56, 384), dtype, i + 1) / 16
        grad = inputs.draw("gaussian", (19, 56), dtype, i + 2)
        bias = inputs.draw("gaussian", (56,), dtype, i + 3)
        found.append(examine.layer(lane, x, w, grad, bias, quest.recipe(name), path))
    return found


def _frozen(lane: Lane, name: str, dtype: torch.dtype) -> list[list[Verdict]]:
    found = []
    for i, kind in enumerate(("gaussian", "heavy", "outlier")):
        x = inputs.draw(kind, ((3, 19, 133)[i], 384), dtype, i)
        w = inputs.draw("gaussian", (72, 384), dtype, i + 1) / 16
        bias = inputs.draw("gaussian", (72,), dtype, i + 3)
        found.append(examine.frozen(lane, x, w, bias, quest.recipe(name)))
    return found


def _operands(lane: Lane, name: str, dtype: torch.dtype) -> list[list[Verdict]]:
    made = quest.recipe(name)
    pair, found = (made.activation, made.weight), []
    for i, kind in enumerate(("gaussian", "outlier", "mixed_rows", "non_finite")):
        x = inputs.draw(kind, (17, 384), dtype, i)
        kinds = operands.kinds(*pair) or ("", "")
        for q, stored in zip(pair, kinds, strict=True):
            found.append(examine.encoded(lane, x, q, stored))
        found.append(examine.operand(lane, x, made.activation, kinds[0]))
    return found


def _gated(lane: Lane, name: str, dtype: torch.dtype) -> list[list[Verdict]]:
    q = quest.recipe(name).activation
    (kind, _) = operands.kinds(q, q) or ("", "")
    found = []
    for i, (left, right) in enumerate(GATES):
        gate = inputs.draw(left, (17, 384), dtype, i)
        value = inputs.draw(right, (17, 384), dtype, i + 1)
        found.append(examine.gated(lane, gate, value, q, kind, conclusive=i == 0))
    return found


def _normed(lane: Lane, name: str, dtype: torch.dtype) -> list[list[Verdict]]:
    q = quest.recipe(name).activation
    (kind, _) = operands.kinds(q, q) or ("", "")
    weight = inputs.draw("gaussian", (384,), dtype, 7)
    found = []
    for i, (left, right) in enumerate(GATES):
        x = inputs.draw(left, (17, 384), dtype, i)
        residual = inputs.draw(right, (17, 384), dtype, i + 1)
        for given in (None, residual):
            judged = examine.normed(lane, x, given, weight, 1e-5, q, kind, conclusive=i == 0)
            found.append(judged)
    return found


def _products(lane: Lane, name: str, dtype: torch.dtype) -> list[list[Verdict]]:
    found = [examine.accumulators(lane)]
    for i, kind in enumerate(("gaussian", "heavy", "equal")):
        x = inputs.draw(kind, (133, 384), dtype, i)
        w = inputs.draw("gaussian", (56, 384), dtype, i + 1) / 16
        bias = inputs.draw("gaussian", (56,), dtype, i + 3)
        found.append(examine.product(lane, x, w, bias, quest.recipe(name), dtype))
    return found


def _gated_products(lane: Lane, name: str, dtype: torch.dtype) -> list[list[Verdict]]:
    found = []
    for i, kind in enumerate(("gaussian", "heavy", "equal")):
        x = inputs.draw(kind, (133, 384), dtype, i)
        w = inputs.draw("gaussian", (2 * 57, 384), dtype, i + 1) / 16
        bias = inputs.draw("gaussian", (2 * 57,), dtype, i + 3)
        made = quest.recipe(name)
        found.append(examine.product(lane, x, w, bias, made, dtype, gate=True))
    return found


def _added_products(lane: Lane, name: str, dtype: torch.dtype) -> list[list[Verdict]]:
    found = []
    for i, kind in enumerate(("gaussian", "heavy", "non_finite")):
        x = inputs.draw("gaussian", (133, 384), dtype, i)
        # Rows of whole vectors, and of others.
        w = inputs.draw("gaussian", (56 + i % 2, 384), dtype, i + 1) / 16
        bias = inputs.draw("gaussian", (len(w),), dtype, i + 3)
        residual = inputs.draw(kind, (133, len(w)), dtype, i + 4)
        made = quest.recipe(name)
        found.append(examine.product(lane, x, w, bias, made, dtype, residual=residual))
    return found


def _rotated_products(lane: Lane, name: str, dtype: torch.dtype) -> list[list[Verdict]]:
    found = []
    for i, kind in enumerate(("gaussian", "heavy", "equal")):
        half = (16, 32, 64)[i]
        x = inputs.draw(kind, (3 * 45, 384), dtype, i)
        # Three heads, of which two are turned, and what is none.
        w = inputs.draw("gaussian", (3 * 2 * half + 8 - i, 384), dtype, i + 1) / 16
        bias = inputs.draw("gaussian", (len(w),), dtype, i + 3)
        angles = inputs.draw("gaussian", (45, half), torch.float32, i + 4)
        rotary = (angles.cos(), angles.sin(), 4 * half)
        found.append(examine.product(lane, x, w, bias, quest.recipe(name), dtype, rotary=rotary))
    return found


def rows(lane: Lane, quick: bool) -> Iterator[Row]:
    """What is judged in a lane; `quick` takes a tenth of it."""
    dtypes = DTYPES[:2] if quick else DTYPES
    for dtype in dtypes:
        for order in (128,) if quick else (16, 128, 256, 12, 20, 28, 40):
            yield Row(
                lane, "hadamard", f"order {order}", dtype, partial(_transforms, lane, order, dtype)
            )
        formats = ("uniform1", "uniform4") if quick else FORMATS
        for name in formats:
            clip = quest.Clip(1.3) if FORMATS[name].levels == 2 else quest.Trust()
            q = quest.Quantizer(FORMATS[name], quest.Hadamard(128), clip)
            yield Row(lane, "quantize", name, dtype, partial(_quantizers, lane, q, dtype))
        for name, sparsity in [] if quick else list(SPARSE.items()):
            q = quest.Quantizer(FORMATS["uniform4"], quest.Hadamard(128), quest.Trust(), sparsity)
            label = f"uniform4 {name}"
            yield Row(lane, "quantize", label, dtype, partial(_quantizers, lane, q, dtype))
        for order in (128,) if quick else (128, 20):
            yield Row(
                lane, "backward", f"order {order}", dtype, partial(_backwards, lane, order, dtype)
            )
        for name in ("w1a1", "w4a4") if quick else RECIPES:
            yield Row(lane, "linear", name, dtype, partial(_layers, lane, name, dtype, "values"))
        for name in ("w1a1",) if quick else INTEGER:
            yield Row(lane, "encode", name, dtype, partial(_operands, lane, name, dtype))
            if name in GATED:
                yield Row(lane, "gated", name, dtype, partial(_gated, lane, name, dtype))
                yield Row(lane, "normed", name, dtype, partial(_normed, lane, name, dtype))
            if no_product(lane) is None:
                yield Row(lane, "product", name, dtype, partial(_products, lane, name, dtype))
                added = partial(_added_products, lane, name, dtype)
                yield Row(lane, "added product", name, dtype, added)
                if dtype in HALVES:
                    judged = partial(_gated_products, lane, name, dtype)
                    yield Row(lane, "gated product", name, dtype, judged)
                    turned = partial(_rotated_products, lane, name, dtype)
                    yield Row(lane, "rotated product", name, dtype, turned)
            if lane.supports("linear", {"path": "integers"}):
                layer = partial(_layers, lane, name, dtype, "integers")
                yield Row(lane, "integers", name, dtype, layer)
            if lane.supports("frozen", {}):
                yield Row(lane, "frozen", name, dtype, partial(_frozen, lane, name, dtype))


def _examine(row: Row, recorded: dict[str, float]) -> tuple[dict[str, Tally], list[str]]:
    """The tallies of a row by stage, and what is wrong."""
    torch.set_num_threads(1)  # small tensors
    tallies: dict[str, Tally] = {}
    try:
        for verdicts in row.judge():
            for verdict in verdicts:
                tallies.setdefault(verdict.stage, Tally()).add(verdict)
    except Exception as error:
        # A lane that raises is as wrong as one that computes nonsense; the others go on.
        return tallies, [f"{type(error).__name__}: {error}"]
    problems = []
    for stage, tally in tallies.items():
        problems += [p if p.startswith(stage) else f"{stage}: {p}" for p in tally.problems()]
        before = recorded.get(f"{row.key}/{stage}")
        if before is not None and tally.ratio > GROWTH * max(before, FLOOR):
            problems.append(
                f"{stage}: worst ratio {tally.ratio:.3f} is over {GROWTH} times the recorded "
                f"{before:.3f}"
            )
    return tallies, problems


def _machine() -> dict[str, Any]:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "quest": quest.__version__,
        "torch": torch.__version__,
        "triton": triton_version,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "python": platform.python_version(),
        "gpu": gpu,
    }


def choose(names: tuple[str, ...]) -> list[Lane]:
    """The lanes of these names, or all that this machine can run; ValueError for others."""
    known = {lane.name: lane for lane in all_lanes()}
    for name in names:
        if name not in known:
            raise ValueError(f"lane must be one of {', '.join(known)}, got {name!r}")
        reason = missing(known[name])
        if reason is not None:
            raise ValueError(f"lane {name} can't run here: {reason}")
    return [known[n] for n in names] if names else [x for x in known.values() if not missing(x)]


def _table(title: str, results: list[dict[str, Any]]) -> Table:
    """One lane's rows, 80 columns wide."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("kernel", "format", "dtype"):
        table.add_column(name, no_wrap=True)
    for name in ("elements", "worst r", "ambiguous"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    for r in results:
        colour = "green" if r["verdict"] == "pass" else "bold red"
        table.add_row(
            r["kernel"],
            r["format"],
            r["dtype"],
            f"{r['elements']:,}",
            f"{r['ratio']:.3f}",
            str(r["ambiguous"]),
            f"[{colour}]{r['verdict']}[/]",
        )
    return table


def run(
    json_path: Path | None,
    lanes: tuple[str, ...] = (),
    quick: bool = False,
    record: bool = False,
    html_path: Path | None = None,
) -> int:
    """Judge, print the table, write the JSON and the page; 0 where everything passes, else 1.

    record: write the ratios of rows that pass to `ratios.json`. Raises ValueError for a lane that
    is unknown or can't run here, and for a file that can't be written.
    """
    chosen = choose(lanes)
    report.check("--json", json_path)
    report.check("--html", html_path)
    if (
        json_path is not None
        and html_path is not None
        and json_path.resolve() == html_path.resolve()
    ):
        raise ValueError(f"--json and --html must be two files, got {html_path} twice")
    recorded: dict[str, float] = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    todo = [row for lane in chosen for row in rows(lane, quick)]
    console = Console()
    started = time.perf_counter()
    results: list[dict[str, Any]] = []
    failures: list[str] = []
    fresh: dict[str, float] = {}
    unrecorded = 0
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task("verify", total=len(todo))
        # Rows are independent, and most of a row's time is compiling or interpreting kernels.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(8, os.cpu_count() or 1), context) as pool:
            judged = pool.map(_examine, todo, [{} if record else recorded] * len(todo))
            for row, (tallies, problems) in zip(todo, judged, strict=True):
                progress.update(task, description=f"{row.lane} {row.kernel} {row.format}")
                progress.advance(task)
                stages = {name: round(t.ratio, 4) for name, t in tallies.items()}
                results.append(
                    {
                        "lane": row.lane.name,
                        "kernel": row.kernel,
                        "format": row.format,
                        "dtype": oracle.dtype_name(row.dtype),
                        "elements": sum(t.elements for t in tallies.values()),
                        "ratio": max((t.ratio for t in tallies.values()), default=0.0),
                        "ambiguous": sum(t.ambiguous for t in tallies.values()),
                        "verdict": "FAIL" if problems else "pass",
                        "problems": problems,
                        "stages": stages,
                        "spread": {k: t.spread for k, t in tallies.items() if any(t.spread)},
                    }
                )
                if not problems:
                    fresh |= {f"{row.key}/{stage}": r for stage, r in stages.items()}
                unrecorded += not any(f"{row.key}/{stage}" in recorded for stage in stages)
                failures += [f"{row.key}: {p}" for p in problems[:1]]
    for lane in chosen:
        console.print(_table(lane.name, [r for r in results if r["lane"] == lane.name]))
    for failure in failures:
        console.print(f"FAIL {failure}", style="red", highlight=False, markup=False)
    absent = {lane.name: reason for lane in all_lanes() if (reason := missing(lane)) is not None}
    for name, reason in absent.items():
        console.print(f"not run: {name} ({reason})", style="yellow")
    elements = sum(r["elements"] for r in results)
    seconds = time.perf_counter() - started
    console.print(
        f"{len(results) - len(failures)} of {len(results)} rows pass, {elements:,} elements judged "
        f"in {seconds:.0f} s",
        highlight=False,
    )
    document = {"machine": _machine(), "seconds": round(seconds, 1), "rows": results}
    if html_path is not None:
        page = report.page(document, chosen[0], absent, FORMATS)
        html_path.write_text(page, encoding="utf-8")
    if json_path is not None:
        json_path.write_text(json.dumps(document, indent=1) + "\n")
    if record:
        RECORDED.write_text(json.dumps(dict(sorted((recorded | fresh).items())), indent=1) + "\n")
    elif unrecorded:
        console.print(f"{unrecorded} rows have no recorded ratio: only the bound judged them")
    return 1 if failures else 0
