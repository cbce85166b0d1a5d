"""The pictures of the report, as SVG that takes its colours from the page.

matplotlib draws in colours that stand for names (`INK`, `LINES`, ...); in the text of the SVG these
become CSS variables, so that one picture fits a light and a dark page. Letters stay letters: the
page's font draws them, and they can be searched.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quest.quantizer import Quantizer
from quest.reference import grids as reference_grids
from quest.reference import hadamard, quantize

from . import inputs, oracle
from .lanes import Lane
from .verdict import BINS

Array = oracle.Array
# Colours that nothing else has, and the variables of the page that take their place.
INK, FAINT, FILL, BAD = "#010203", "#040506", "#070809", "#0a0b0c"
LINES = ("#101112", "#131415", "#161718")
VARIABLES = {
    INK: "--ink", FAINT: "--faint", FILL: "--fill", BAD: "--bad",
    **{colour: f"--line{i}" for i, colour in enumerate(LINES)},
}  # fmt: skip
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quest",  # the same picture, the same text
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **{f"axes.{part}": INK for part in ("edgecolor", "labelcolor", "titlecolor")},
    **{f"{axis}tick.color": INK for axis in "xy"},
    "text.color": INK,
}


def _axes(width: float = 3.4, height: float = 2.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    return figure, axes


def _svg(figure: Figure, name: str, told: str) -> str:
    """The figure as an <svg> element; name: a prefix that keeps its ids apart. told: in words."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    # The view box has the proportions; the page has the size.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = text.replace("<svg", f'<svg role="img" aria-label="{told}"', 1)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text


def grid(name: str, points: reference_grids.Grid) -> str:
    """A grid's points on the density of a Gaussian, and what rounding to it costs at each value."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes()
        at = np.asarray(points.points)
        # Cells that are narrower than a pixel are averaged.
        z = np.linspace(-4, 4, 64_000).reshape(800 if len(at) <= 16 else 100, -1)
        density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
        nearest = at[np.searchsorted(points.midpoints, z, side="right")]
        cost = (density * (z - nearest) ** 2).mean(-1)
        z, density = z.mean(-1), density.mean(-1)
        axes.fill_between(z, density, color=FILL, lw=0)
        axes.plot(z, density, color=FAINT, lw=1)
        axes.plot(z, cost * (0.4 / cost.max()), color=LINES[0], lw=1)
        axes.vlines(at, 0, 0.4 * (0.12 if len(at) > 32 else 0.25), color=INK, lw=1)
        axes.set_title(f"{name}: error {points.mse:.3g}", fontsize=10)
        axes.set_xlabel("x / sigma")
        axes.set_yticks([])
        axes.set_ylim(0, 0.42)
        axes.set_xlim(-4, 4)
        told = (
            f"{name}: {len(at)} points on a Gaussian density, mean squared error {points.mse:.3g}"
        )
        return _svg(figure, f"grid-{name}", told)


def spreads(kernel: str, by_dtype: Mapping[str, Sequence[int]]) -> str:
    """The share of elements by error over bound, for each dtype of a kernel; BINS counts each."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes()
        edges = np.linspace(0, 1, BINS + 1)
        for colour, (dtype, counts) in zip(LINES, by_dtype.items(), strict=False):
            share = np.asarray(counts) / max(sum(counts), 1)
            axes.stairs(share, edges, color=colour, lw=1.6, label=dtype, baseline=None)
        axes.axvline(1, color=BAD, lw=1.5)
        axes.set_yscale("log")
        axes.set_xlim(0, 1.04)
        axes.set_title(kernel, fontsize=10)
        axes.set_xlabel("error / bound")
        axes.set_ylabel("share of elements")
        axes.legend(frameon=False, fontsize=8, loc="lower left")
        return _svg(figure, f"spread-{kernel}", f"{kernel}: share of elements by error over bound")


def measured(lane: Lane, q: Quantizer, bins: Array) -> tuple[Array, Array, Array]:
    """Of Gaussian rows in a lane: x / sigma, values / sigma, and the masked share of each bin."""
    x = inputs.draw("gaussian", (256, 512), torch.float32, 0)
    made = lane.call("quantize", x, q=q)
    sigma = oracle.lift(made["scale"])
    t = (hadamard.apply(oracle.lift(x), q.transform.order(x.shape[-1])) / sigma).ravel()
    values = quantize.decode(oracle.lift(made["codes"]), oracle.grid(q.require_grid())).ravel()
    masked = ~oracle.lift(made["mask"]).ravel()
    total, _ = np.histogram(t, bins)
    hit, _ = np.histogram(t[masked], bins)
    return t, values, np.divide(hit, total, out=np.zeros(len(total)), where=total > 0)


def mask(name: str, lane: Lane, q: Quantizer) -> str:
    """What a lane makes of x / sigma, and where it stops the gradient."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes()
        bins = np.linspace(-3.5, 3.5, 141)
        t, values, share = measured(lane, q, bins)
        floor = float(bins[0])
        axes.stairs(
            floor - 2 * floor * share, bins, baseline=floor, fill=True, color=BAD, alpha=0.3, lw=0
        )
        order = np.argsort(t)[:: len(t) // 1000]
        axes.plot(t[order], values[order], color=LINES[0], lw=1.4, drawstyle="steps-mid")
        axes.plot(bins, bins, color=FAINT, lw=1, ls=":")
        axes.set_xlim(bins[0], bins[-1])
        axes.set_ylim(bins[0], bins[-1])
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("x / sigma")
        axes.set_ylabel("value / sigma")
        return _svg(figure, f"mask-{name.replace(' ', '-')}", f"{name}: values and mask of {lane}")
