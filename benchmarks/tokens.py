"""Draws how fast a frozen layer is at each number of tokens, from a record or a run's table.

    python -m benchmarks.tokens [RECORD.json | TABLE.txt] [--out tokens.png]

Without either: the latest record of this kind of machine. A run with failures saves no record, and
its table is what it printed at its end. The picture lies beside what it was drawn from unless --out
says otherwise.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from . import records

Series = dict[str, list[tuple[int, float]]]
Ratio = tuple[tuple[int, int, int], str, float]  # tokens, in_features, out_features; recipe; ratio
COLUMNS = 4  # of panels
_LINE = re.compile(r"frozen\[(\d+)x(\d+)x(\d+)-([^\]]+)\].*?([\d.]+)x ")
_TITLE = re.compile(r"=+ (.+): against torch and the copy bound =+")


def of_record(record: dict[str, Any]) -> tuple[str, list[Ratio]]:
    """The device, and bf16's time over ours of each frozen layer."""
    found = []
    for bench in record["benchmarks"]:
        if "::test_frozen[" in bench["fullname"]:
            info, recipe = bench["extra_info"], bench["fullname"].partition("-")[2].rstrip("]")
            tokens, inside, outside = info["shape"]
            found.append(((tokens, inside, outside), recipe, info["ratio_to_baseline"]))
    return str(record.get("environment", {}).get("device", "")), found


def of_table(text: str) -> tuple[str, list[Ratio]]:
    """The same from the table that ends a run."""
    title = _TITLE.search(text)
    found: list[Ratio] = []
    for tokens, inside, outside, recipe, ratio in _LINE.findall(text):
        found.append(((int(tokens), int(inside), int(outside)), recipe, float(ratio)))
    return title[1] if title else "", found


def series(ratios: list[Ratio]) -> dict[tuple[int, int], Series]:
    """(tokens, ratio) by (in_features, out_features) and recipe, ascending."""
    found: dict[tuple[int, int], Series] = defaultdict(lambda: defaultdict(list))
    for (tokens, inside, outside), recipe, ratio in ratios:
        found[inside, outside][recipe].append((tokens, ratio))
    for lines in found.values():
        for points in lines.values():
            points.sort()
    return found


def draw(device: str, ratios: list[Ratio], path: Path) -> None:
    """Write the picture; ValueError where there is no frozen layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = series(ratios)
    if not found:
        raise ValueError("there is no benchmark of a frozen layer (test_frozen)")
    most = {
        shape: max(points[-1][0] for points in lines.values()) for shape, lines in found.items()
    }
    shapes = sorted(found, key=lambda shape: (-most[shape], shape))  # timed with most tokens first
    recipes = sorted({recipe for lines in found.values() for recipe in lines})
    ticks = [4**i for i in range((most[shapes[0]].bit_length() + 1) // 2)]
    rows, columns = -(-len(shapes) // COLUMNS), min(len(shapes), COLUMNS)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(max(1 + 3.2 * columns, 6), 1 + 3 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    named: dict[str, Any] = {}
    for ax, (inside, outside) in zip(axes.flat, shapes, strict=False):
        named["bf16"] = ax.axhline(1.0, color="gray", linestyle="--")
        for recipe, points in sorted(found[inside, outside].items()):
            color = f"C{recipes.index(recipe)}"
            (named[recipe.upper()],) = ax.plot(
                *zip(*points, strict=True), marker="o", markersize=4, color=color
            )
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [f"{t:,}" for t in ticks], rotation=45)
        ax.set_yscale("log", base=2)
        ax.yaxis.set_major_formatter(lambda v, _: f"{v:g}x")
        ax.tick_params(labelbottom=True)
        ax.set_title(f"{inside} to {outside} features")
        ax.set_xlabel("tokens")
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(shapes) :]:
        ax.axis("off")
    for ax in axes[:, 0]:
        ax.set_ylabel("speed, bf16 nn.Linear = 1")
    names = sorted(named)
    figure.legend([named[n] for n in names], names, loc="outside lower center", ncols=len(names))
    between = "; " if columns > 2 else "\n"  # fewer panels are too narrow for a line
    told = ("Frozen quest.Linear, quantization of the activations included", device)
    figure.suptitle(between.join(told))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokens", description=__doc__)
    parser.add_argument(
        "record", nargs="?", type=Path, help="a record, or a table; by default the latest record"
    )
    parser.add_argument("--out", type=Path, help="where the picture goes")
    given = parser.parse_args(arguments)
    path = given.record
    if path is None:
        there = records.find(records.RECORDS, True)
        if not there:
            parser.error(f"there is no record for {records.kind()}: name one")
        path = there[-1]
    out = given.out or path.with_name("tokens.png")
    try:
        table = path.suffix == ".txt"
        made = of_table(path.read_text("utf-8")) if table else of_record(records.load(path))
        draw(*made, out)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
