"""Draws how fast a frozen layer is at each number of tokens, from a record.

    python -m benchmarks.tokens [RECORD.json] [--out tokens.png]

Without a record: the latest of this kind of machine. The picture lies beside the record unless
--out says otherwise.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from . import records

Series = dict[str, list[tuple[int, float]]]


def series(record: dict[str, Any]) -> dict[tuple[int, int], Series]:
    """(tokens, bf16's time over ours) by (in_features, out_features) and recipe, ascending."""
    found: dict[tuple[int, int], Series] = defaultdict(lambda: defaultdict(list))
    for bench in record["benchmarks"]:
        if "::test_frozen[" in bench["fullname"]:
            tokens, inside, outside = bench["extra_info"]["shape"]
            recipe = bench["fullname"].rpartition("-")[2].rstrip("]")
            ratio = bench["extra_info"]["ratio_to_baseline"]
            found[inside, outside][recipe].append((tokens, ratio))
    for lines in found.values():
        for points in lines.values():
            points.sort()
    return found


def draw(record: dict[str, Any], path: Path) -> None:
    """Write the picture; ValueError where the record has no frozen layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = series(record)
    if not found:
        raise ValueError("the record has no benchmark of a frozen layer (test_frozen)")
    figure, axes = plt.subplots(
        1, len(found), figsize=(1 + 3.6 * len(found), 4), sharey=True, squeeze=False
    )
    for ax, ((inside, outside), lines) in zip(axes[0], sorted(found.items()), strict=True):
        for recipe, points in sorted(lines.items()):
            ax.plot(*zip(*points, strict=True), marker="o", label=recipe.upper())
        ax.axhline(1.0, color="gray", linestyle="--", label="bf16")
        tokens = sorted({t for points in lines.values() for t, _ in points})
        ax.set_xscale("log", base=2)
        ax.set_xticks(tokens, [f"{t:,}" for t in tokens], rotation=45)
        ax.set_yscale("log", base=2)
        ax.yaxis.set_major_formatter(lambda v, _: f"{v:g}x")
        ax.set_title(f"{inside} to {outside} features")
        ax.set_xlabel("tokens")
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("speed, bf16 nn.Linear = 1")
    axes[0][-1].legend()
    about = record.get("environment", {})
    figure.suptitle(
        f"Frozen quest.Linear, quantization of the activations included; {about.get('device', '')}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokens", description=__doc__)
    parser.add_argument("record", nargs="?", type=Path, help="a record; the latest by default")
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
        draw(records.load(path), out)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
