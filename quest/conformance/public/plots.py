"""Pictures of the error against the bound, as SVG to be put into a page."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from .results import Outcome

# A color for each dtype or, where a property has none, for all; from matplotlib's own cycle.
COLORS = {"float32": "C0", "bfloat16": "C1", "float16": "C2"}


def _group(params: str) -> str:
    return next((d for d in COLORS if d in params.split("-")), "all")


def error_against_bound(outcomes: Mapping[str, Outcome]) -> str | None:
    """An SVG of a property's errors over their bounds; None where no error was above 0.

    A point is one element: some of each judgement and its worst one. Above the line the
    implementation is wrong.
    """
    groups: dict[str, list[tuple[float, float]]] = {}
    for params, outcome in outcomes.items():
        groups.setdefault(_group(params), []).extend(outcome.record.get("points", ()))
    groups = {name: points for name, points in groups.items() if points}
    if not groups:
        return None
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for name, points in groups.items():
        bounds, errors = zip(*points, strict=True)
        axes.scatter(bounds, errors, s=16, alpha=0.8, linewidths=0, label=name, rasterized=True,
                     color=COLORS.get(name, "C3"))  # fmt: skip
    ends = [min(p[0] for g in groups.values() for p in g) / 2,
            max(p[0] for g in groups.values() for p in g) * 2]  # fmt: skip
    axes.plot(ends, ends, color="black", linewidth=1, label="error = bound")
    axes.set(xscale="log", yscale="log", xlabel="bound", ylabel="error")
    axes.legend(fontsize=7, loc="lower right")
    axes.grid(alpha=0.3)
    made = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fonts: they say nothing on what is judged
        figure.savefig(made, format="svg", metadata={"Date": None})
    text = made.getvalue()
    return text[text.index("<svg") :]
