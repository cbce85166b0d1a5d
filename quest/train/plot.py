"""The loss curves of a run as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from quest.train import files
from quest.train.data import Dataset
from quest.train.metrics import Metrics

COLOURS = ("#3b4252", "#c8553d", "#2a7f9e", "#7a5c99", "#4f8a4b", "#b07d12")
MUTED = "#6b7280"


def draw(path: Path, metrics: Metrics, data: Dataset, title: str) -> None:
    """Write a PNG to ``path``: nats a byte against training tokens.

    Per recipe the training loss as a light line and the validation loss as a strong one that is
    labelled with its last value. A dashed line marks what the frequencies of single bytes give.
    """
    figure = Figure(figsize=(8, 4.8), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    ends: list[tuple[float, float, str, str]] = []
    # What must be seen. The first steps fall from ln(vocabulary): showing all of them would
    # flatten what follows.
    in_view: list[float] = []
    for recipe, colour in zip(metrics.recipes, cycle(COLOURS), strict=False):
        rows = metrics.of(recipe)
        losses = [row.loss / data.bytes_per_token for row in rows]
        axes.plot([row.tokens for row in rows], losses, color=colour, alpha=0.28, linewidth=0.9)
        measured = [
            (row.tokens, row.val_loss_per_byte) for row in rows if row.val_loss_per_byte is not None
        ]
        if not measured:
            continue
        axes.plot(*zip(*measured, strict=True), color=colour, linewidth=2.2, marker="o", ms=3.5)
        tokens, loss = measured[-1]
        ends.append((tokens, loss, f"{recipe}  {loss:.2f}", colour))
        in_view += [min(losses), *(value for _, value in measured)]
    if data.encoder.unit == "byte":
        entropy = data.entropy()
        in_view.append(entropy)
        axes.axhline(entropy, color=MUTED, linestyle=(0, (5, 4)), linewidth=1)
        axes.annotate(
            f"entropy of single bytes  {entropy:.2f}",
            (1, entropy),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            color=MUTED,
            fontsize=9,
        )
    if in_view:
        low, high = min(in_view), max(in_view)
        margin = 0.06 * (high - low) + 0.02
        axes.set_ylim(low - margin, high + 2 * margin)
        heights = spread([loss for _, loss, _, _ in ends], gap=margin)
        for (end, _, label, colour), height in zip(ends, heights, strict=True):
            axes.annotate(
                label,
                (end, height),
                xytext=(9, 0),
                textcoords="offset points",
                va="center",
                color=colour,
                fontweight="bold",
            )
    axes.set_xlim(left=0)
    axes.set_xlabel(f"training {data.encoder.unit}s seen")
    axes.set_ylabel("loss, nats a byte")
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=24)
    axes.annotate(
        "strong lines: held-out text    light lines: training batches",
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 9),
        textcoords="offset points",
        color=MUTED,
        fontsize=9,
    )
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    files.replace(path, lambda new: figure.savefig(new, format="png"))


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """``heights``, moved up where needed so that any two are at least ``gap`` apart."""
    moved = list(heights)
    lowest = -math.inf
    for index in sorted(range(len(moved)), key=lambda i: heights[i]):
        moved[index] = max(moved[index], lowest)
        lowest = moved[index] + gap
    return moved
