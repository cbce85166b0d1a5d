"""`python -m property_tests.fuzz --minutes N`: search for inputs that a lane gets wrong.

Each round, Hypothesis draws entries for one target in one lane and steers, with `target()`, towards
large error ratios and many ambiguous elements; rounds take turns with fresh seeds until the time is
over. `--seed` says where they begin, at random by default, so that short searches come to every
target in time. The corpus (`--corpus`) keeps what failed and what came nearest, for the next
search. What fails is shrunk and promoted: it goes into `promoted.json`, which every run of the
property tests replays first, in all lanes.

An entry is plain JSON: what a target needs to make its inputs again.
"""

from __future__ import annotations

import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase

import quest
from quest.conformance import examine, inputs, oracle, report
from quest.conformance.lanes import Lane
from quest.conformance.strategies import (
    DTYPES,
    ESTIMATORS,
    FORMATS,
    ORDERS,
    SEEDS,
    SPARSITIES,
    leads,
    widths,
)
from quest.conformance.verdict import Rejected, Verdict
from quest.reference import hadamard

Entry = dict[str, Any]
PROMOTED = Path(__file__).with_name("promoted.json")
RECIPES = ("w1a1", "w4a4", "w8a8", "fp4", "w4a4-2:4", "w4a16")
NAMES = {str(d).removeprefix("torch."): d for d in DTYPES}
# Where a step of the search can only shift what is drawn, edits let it move single values.
EDITS = st.lists(st.tuples(st.integers(0, 4095), st.floats(-4, 4, width=32)), max_size=4)


@dataclass(frozen=True)
class Target:
    """entries: what is drawn. judge(lane, entry): verdicts, or None where a lane lacks the call."""

    entries: st.SearchStrategy[Entry]
    judge: Callable[[Lane, Entry], list[Verdict] | None]


def tensor(entry: Entry) -> torch.Tensor:
    """The tensor of an entry's distribution, shape, dtype, seed, edits and layout."""
    x = inputs.draw(
        entry["distribution"], tuple(entry["shape"]), NAMES[entry["dtype"]], entry["seed"]
    )
    if x.numel():
        unit = x.double().abs().mean()
        unit = unit if unit.isfinite() and unit > 0 else 1.0
        for position, value in entry["edits"]:
            x.view(-1)[position % x.numel()] = value * unit
    layout = entry["layout"]
    return inputs.lay_out(inputs.equal_rows(x) if layout == "expanded" else x, layout)


@st.composite
def _tensors(draw: st.DrawFn, order: int, group: int = 1) -> Entry:
    return {
        "distribution": draw(st.sampled_from(tuple(inputs.DISTRIBUTIONS))),
        "shape": [*draw(leads()), draw(widths(order, group))],
        "dtype": draw(st.sampled_from(tuple(NAMES))),
        "layout": draw(st.sampled_from(inputs.LAYOUTS)),
        "seed": draw(SEEDS),
        "edits": [list(e) for e in draw(EDITS)],
    }


@st.composite
def _transforms(draw: st.DrawFn) -> Entry:
    order = draw(st.sampled_from(ORDERS))
    return draw(_tensors(order)) | {"order": order, "transpose": draw(st.booleans())}


def _transform(lane: Lane, entry: Entry) -> list[Verdict]:
    return examine.transform(lane, tensor(entry), entry["order"], entry["transpose"])


@st.composite
def _quantizers(draw: st.DrawFn) -> Entry:
    sparsity, order = draw(st.sampled_from(SPARSITIES)), draw(st.sampled_from(ORDERS))
    q = quest.Quantizer(
        draw(st.sampled_from(tuple(FORMATS.values()))),
        quest.Hadamard(order),
        draw(st.sampled_from(ESTIMATORS)),
        sparsity,
    )
    entry: Entry = draw(_tensors(order, 1 if sparsity is None else sparsity.m))
    return entry | {"quantizer": q.spec, "ties": draw(st.sampled_from((0, 0, 0, 1, 4, 16)))}


def _tied(x: torch.Tensor, q: quest.Quantizer, ties: int) -> torch.Tensor:
    """x (rows, d) float32, its first `ties` columns moved, after the transform, to midpoints.

    The others are scaled so that sigma stays: a row's ties are as near as float32 can say.
    """
    order, d = q.transform.order(x.shape[-1]), x.shape[-1]
    mids = oracle.grid(q.require_grid()).midpoints
    z = hadamard.apply(oracle.lift(x), order)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        sigma = np.sqrt((z**2).mean(-1, keepdims=True))
        z = z / sigma
        z[:, :ties] = mids[np.abs(z[:, :ties, None] - mids).argmin(-1)]
        rest = d - (z[:, :ties] ** 2).sum(-1, keepdims=True)
        z[:, ties:] *= np.sqrt(rest / (z[:, ties:] ** 2).sum(-1, keepdims=True))
        moved = hadamard.apply_transpose(z, order) * sigma
    good = np.isfinite(moved).all(-1, keepdims=True)
    return torch.where(torch.from_numpy(good), torch.from_numpy(moved).float(), x)


def _quantizer(lane: Lane, entry: Entry) -> list[Verdict] | None:
    q = quest.quantizer.parse(entry["quantizer"])
    if not lane.supports("quantize", {"q": q}):
        return None
    x = tensor(entry)
    if entry["ties"] and x.dtype == torch.float32 and x.numel() and x.ndim == 2:
        x = _tied(x, q, min(entry["ties"], x.shape[-1] // 2))
    # The rules on ambiguous elements are for inputs that nobody has searched for.
    return examine.quantizer(lane, x, q, conclusive=False)


@st.composite
def _backwards(draw: st.DrawFn) -> Entry:
    order = draw(st.sampled_from(ORDERS))
    return draw(_tensors(order)) | {"order": order, "mask": draw(SEEDS)}


def _backward(lane: Lane, entry: Entry) -> list[Verdict]:
    grad = tensor(entry)
    g = torch.Generator().manual_seed(entry["mask"])
    shape = (*grad.shape[:-1], -(-grad.shape[-1] // 8))
    mask = torch.randint(256, shape, generator=g).to(torch.uint8)
    return examine.backward(lane, grad, mask, entry["order"])


@st.composite
def _layers(draw: st.DrawFn) -> Entry:
    entry: Entry = draw(_tensors(16))
    kinds = ("gaussian", "heavy", "outlier", "equal", "alternating", "one_hot", "integers")
    entry["distribution"] = draw(st.sampled_from(kinds))
    entry["shape"] = [draw(st.sampled_from((1, 3, 7, 17))), draw(st.sampled_from((16, 48, 112)))]
    return entry | {
        "recipe": draw(st.sampled_from(RECIPES)),
        "out": draw(st.sampled_from((1, 5, 24))),
        "bias": draw(st.booleans()),
    }


def _layer(lane: Lane, entry: Entry) -> list[Verdict]:
    x, seed = tensor(entry), entry["seed"]
    n, width, out = len(x), x.shape[-1], entry["out"]
    w = inputs.draw("gaussian", (out, width), x.dtype, seed + 1) / 16
    grad = inputs.draw("gaussian", (n, out), x.dtype, seed + 2)
    bias = inputs.draw("gaussian", (out,), x.dtype, seed + 3) if entry["bias"] else None
    return examine.layer(lane, x, w, grad, bias, quest.recipe(entry["recipe"]))


TARGETS = {
    "transform": Target(_transforms(), _transform),
    "quantizer": Target(_quantizers(), _quantizer),
    "backward": Target(_backwards(), _backward),
    "layer": Target(_layers(), _layer),
}


@dataclass
class Search:
    """One target in one lane: what it has seen so far."""

    name: str
    lane: Lane
    corpus: Path
    rounds: int = 0
    examples: int = 0
    elements: int = 0
    ratio: float = 0.0
    ambiguous: int = 0
    found: list[tuple[Entry, str]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where its part of the corpus lies."""
        return self.corpus / self.name / self.lane.name

    def round(self, examples: int, until: float) -> None:
        """Draw up to `examples` entries, none after `until`; enter what fails, shrunk."""
        self.rounds += 1
        last: Entry = {}

        @settings(
            max_examples=examples,
            derandomize=False,
            database=DirectoryBasedExampleDatabase(self.folder),
            phases=(Phase.reuse, Phase.generate, Phase.target, Phase.shrink),
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )
        @given(entry=TARGETS[self.name].entries)
        def attempt(entry: Entry) -> None:
            nonlocal last
            if time.monotonic() > until and not last:
                return  # the time is over; a failure is still shrunk
            try:
                verdicts = judge(self.name, self.lane, entry)
            except Exception:
                last = entry
                raise
            self.see(verdicts or [])

        try:
            attempt()
        except Exception as error:
            if not last:
                raise  # of Hypothesis itself: there is no entry to keep
            # Hypothesis ends with the smallest failure.
            self.found.append((last, f"{type(error).__name__}: {error}".splitlines()[0]))

    def see(self, verdicts: list[Verdict]) -> None:
        """Count, and steer towards the worst ratio of each stage and towards near ties."""
        self.examples += 1
        for verdict in verdicts:
            self.elements += verdict.elements
            self.ratio = max(self.ratio, verdict.ratio)
            self.ambiguous = max(self.ambiguous, verdict.ambiguous)
        worst: dict[str, float] = {}
        for v in verdicts:
            worst[v.stage] = max(worst.get(v.stage, 0.0), v.ratio)
        for stage, ratio in worst.items():
            if ratio > 0:
                hypothesis.target(math.log(ratio), label=f"log ratio, {stage}")
        ambiguous = sum(v.ambiguous for v in verdicts)
        if ambiguous:
            hypothesis.target(math.log(ambiguous), label="log ambiguous elements")


def judge(name: str, lane: Lane, entry: Entry) -> list[Verdict] | None:
    """The verdicts of an entry; raises `Rejected` for the first failure. None: not in this lane."""
    verdicts = TARGETS[name].judge(lane, entry)
    for verdict in verdicts or []:
        if verdict.failure is not None:
            raise Rejected(f"{lane}, {verdict.stage}: {verdict.failure}")
    return verdicts


def promoted(path: Path = PROMOTED) -> list[Entry]:
    """Promoted entries: {"target", "lane" (where it was found), "told", "entry"}."""
    found: list[Entry] = json.loads(path.read_text())
    return found


def promote(search: Search, path: Path = PROMOTED) -> int:
    """Add what a search found to the file; how many entries are new."""
    kept = promoted(path) if path.exists() else []
    before = len(kept)
    for entry, told in search.found:
        if not any(k["target"] == search.name and k["entry"] == entry for k in kept):
            made = {"target": search.name, "lane": search.lane.name, "told": told, "entry": entry}
            kept.append(made)
    if len(kept) > before:
        path.write_text(json.dumps(kept, indent=1) + "\n")
    return len(kept) - before


def _finite(context: click.Context, option: click.Parameter, value: float) -> float:
    # A range lets infinity pass, and NaN, with which no time would ever be left.
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number")
    return value


def _check_corpus(corpus: Path, searches: list[Search]) -> None:
    """Make the folders that Hypothesis is to keep entries in; it says nothing where it can't."""
    for search in searches:
        try:
            search.folder.mkdir(parents=True, exist_ok=True)
            # The only sure way to know.
            with tempfile.TemporaryFile(dir=search.folder):
                pass
        except OSError as error:
            told = f"{corpus}: {search.folder} can't be written: {error.strerror}"
            raise click.BadParameter(told, param_hint="--corpus") from None


def _check_promoted(path: Path) -> None:
    """What is found must not be lost at the end: can it be added to this file?"""
    hint = "--promote-to"
    try:
        report.check(hint, path)
    except ValueError as error:
        told = str(error).removeprefix(f"{hint} ")
        raise click.BadParameter(told, param_hint=hint) from None
    try:
        kept: Any = promoted(path) if path.exists() else []
        if not isinstance(kept, list) or not all(isinstance(entry, dict) for entry in kept):
            raise ValueError("it must be a list of objects")
        if not all({"target", "entry"} <= entry.keys() for entry in kept):
            raise ValueError("an entry lacks its target")
    except (OSError, ValueError) as error:
        told = f"{path} holds no list of promoted entries: {error}"
        raise click.BadParameter(told, param_hint=hint) from None


def turned(searches: list[Search], seed: int) -> list[Search]:
    """Another one first for each seed in a row; the others follow in their order."""
    start = seed % len(searches)
    return searches[start:] + searches[:start]


@click.command()
@click.option(
    "--minutes", default=10.0, show_default=True, type=click.FloatRange(min=0), callback=_finite
)
@click.option("--lane", "names", multiple=True, help="Only this lane (repeatable).")
@click.option(
    "--target", "targets", multiple=True, type=click.Choice(tuple(TARGETS)), help="(repeatable)"
)
@click.option(
    "--round",
    "size",
    default=500,
    show_default=True,
    type=click.IntRange(min=1),
    help="Examples in a round; the second half of them climbs.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    help="Which target and lane comes first: the next one for the next seed. Default: at random, "
    "so that short searches come to all of them in time. What is drawn is random in any case.",
)
@click.option(
    "--corpus",
    default=Path(".hypothesis/fuzz"),
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
)
@click.option(
    "--promote-to", "path", default=PROMOTED, type=click.Path(dir_okay=False, path_type=Path)
)
def main(
    minutes: float, names: tuple[str, ...], targets: tuple[str, ...], size: int,
    seed: int | None, corpus: Path, path: Path,
) -> None:  # fmt: skip
    """Search for inputs that a lane gets wrong, and promote what is found."""
    from quest.conformance.verify import choose

    try:
        chosen = choose(names)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--lane") from None
    _check_promoted(path)
    made = [Search(t, lane, corpus) for lane in chosen for t in targets or TARGETS]
    _check_corpus(corpus, made)
    seed = random.SystemRandom().randrange(len(made)) if seed is None else seed
    searches = turned(made, seed)
    torch.set_num_threads(1)
    until = time.monotonic() + 60 * minutes
    new = 0
    while time.monotonic() < until and not new:
        for search in searches:
            if time.monotonic() < until:
                search.round(size, until)
                new += promote(search, path)
    head = f"{'target':<11}{'lane':<20}{'rounds':>7}{'examples':>10}{'elements':>14}{'worst r':>9}"
    click.echo(head + f"{'ambiguous':>11}")
    for s in searches:
        click.echo(
            f"{s.name:<11}{s.lane.name:<20}{s.rounds:>7}{s.examples:>10}{s.elements:>14,}"
            f"{s.ratio:>9.3f}{s.ambiguous:>11}"
        )
    for s in searches:
        for entry, told in s.found:
            click.echo(f"FOUND {s.name}: {told}\n  {json.dumps(entry)}")
    click.echo(
        f"{new} new in {path}; the corpus is in {corpus}; --seed {seed} begins with the same target"
    )
    sys.exit(bool(any(s.found for s in searches)))


if __name__ == "__main__":
    main()
