"""What `kernels/product.py` reckons a tile to cost, from measured times.

    python -m benchmarks.tiles --out tiles.csv
    python -m benchmarks.tile_costs tiles.csv

Fits COSTS to a table of `benchmarks.tiles` and prints them; and of how many cases the costs in use
and the fitted ones choose tiles that are not the fastest, and what that loses. Two things are made
small: what a choice loses, where tiles that are reckoned to take nearly as long count as chosen by
chance; and, so that costs stay times, what reckoned times differ from those measured, of tiles that
are near the fastest.
Source of the search: scipy.optimize.differential_evolution.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import differential_evolution

from quest.kernels import product

Array = NDArray[np.float64]

NAMES = {False: "int8", True: "single bits"}
CHANCE = 0.006  # of a reckoned time: tiles so much apart are chosen as if by chance
TIMES = 0.3  # what a reckoned time's error weighs beside what a choice loses
# Of a step, a turn, a turned turn, a launch and of writing, in us: what is searched.
MOST = (1.5, 4.0, 4.0, 8.0, 3.0)


@dataclass(frozen=True)
class Cases:
    """Measured cases, of one kind of operand: n of them, of k kinds of tile.

    steps, turned: (n,). turns: (n, k), of the whole GPU. times: (n, k), us.
    """

    kinds: tuple[product.Shape, ...]
    steps: Array
    turned: Array
    turns: Array
    times: Array

    def reckoned(self, costs: Array) -> Array:
        """us (..., n, k) by costs (..., k, 5), in the order of `product.Cost`."""
        step, turn, turned, launch, writing = np.moveaxis(costs, -1, 0)[..., None, :]
        computing = np.maximum(self.steps[:, None] * step, writing)
        return self.turns * (computing + turn + self.turned[:, None] * turned) + launch

    def losses(self, costs: Array) -> Array:
        """(n,): the time of the tiles that costs choose, over that of the fastest."""
        chosen = self.reckoned(costs).argmin(1)
        return self.times[np.arange(len(chosen)), chosen] / self.times.min(1)


def read(table: Path, binary: bool, processors: int) -> Cases:
    """The cases of a table of `benchmarks.tiles`; ValueError where it is none, or has none."""
    kinds = product.COSTS[binary]
    names = [name for name, kind in product.KINDS.items() if kind in kinds]
    shapes = [product.KINDS[name] for name in names]
    at_once = max(1, processors // product.CLUSTER)
    steps, turned, turns, times = [], [], [], []
    for line, row in _rows(table, names):
        if (row["recipe"] == "w1a1") != binary:
            continue
        try:
            width, *shape = (int(row[name]) for name in ("in", "rows", "out"))
            took = [float(row[name]) for name in names]
            if min(width, *shape) < 1 or not all(0 < t < math.inf for t in took):
                raise ValueError
        except ValueError:
            raise ValueError(f"{table}, line {line}: no shape, or no time in us") from None
        times.append(took)
        turned.append(row["then"] == "turned")
        steps.append(-(-width // ((8 if binary else 1) * product.TILE_K)))
        turns.append([-(-kind.clusters(*shape) // at_once) for kind in shapes])
    if not times:
        raise ValueError(f"{table} has no case of {NAMES[binary]}")
    return Cases(tuple(shapes), *(np.array(t, float) for t in (steps, turned, turns, times)))


def _rows(table: Path, names: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Lines and rows; ValueError where it is no table of `benchmarks.tiles`, of these kinds."""
    wanted = {"recipe", "rows", "in", "out", "then", *names}
    try:
        with table.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, restval="")
            if not wanted <= set(reader.fieldnames or ()):
                raise ValueError
            yield from ((reader.line_num, row) for row in reader)
    except (ValueError, csv.Error):
        raise ValueError(f"{table} is no table of benchmarks.tiles") from None


def fitted(cases: Cases, seed: int = 0) -> Array:
    """Costs (k, 5), in us to two digits behind the point; of a step to three."""
    best = cases.times.min(1, keepdims=True)
    near = (best / cases.times) ** 2

    def bad(flat: Array) -> Array:
        """Of each column (5 k) of costs."""
        reckoned = cases.reckoned(flat.T.reshape(-1, len(cases.kinds), 5))
        odds = np.exp(-(reckoned / reckoned.min(2, keepdims=True) - 1) / CHANCE)
        lost = (odds * cases.times / best).sum(2) / odds.sum(2) - 1
        error = near * np.log(np.maximum(reckoned, 0.01) / cases.times) ** 2
        worst = lost.max(1)
        return (lost**2).sum(1) + 5 * worst**2 + TIMES * error.mean((1, 2))  # type: ignore[no-any-return]

    found = differential_evolution(
        bad, [(0.0, most) for most in MOST] * len(cases.kinds), seed=seed, maxiter=1500, popsize=12,
        tol=1e-8, init="sobol", polish=False, updating="deferred", vectorized=True,
    )  # fmt: skip
    return np.column_stack(
        [np.round(found.x.reshape(-1, 5)[:, i], 3 if i == 0 else 2) for i in range(5)]
    )


def in_use(cases: Cases, binary: bool) -> Array:
    """`product.COSTS` (k, 5)."""
    return np.array([product.COSTS[binary][kind] for kind in cases.kinds])


def told(losses: Array) -> str:
    """How many cases lose, and what at most."""
    return f"{(losses > 1).sum()} of {len(losses)} not the fastest, {losses.max():.3f} at most"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("table", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--processors", type=click.IntRange(min=product.CLUSTER), default=132, show_default=True,
    help="Multiprocessors of its GPU.",
)  # fmt: skip
def main(table: Path, processors: int) -> None:
    """Costs of tiles for `kernels/product.py`, from a TABLE of `python -m benchmarks.tiles`."""
    names = {kind: name.upper() for name, kind in product.KINDS.items()}
    try:
        every = {binary: read(table, binary, processors) for binary in product.COSTS}
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    for binary, cases in every.items():
        costs = fitted(cases)
        click.echo(f"# {NAMES[binary]}: in use {told(cases.losses(in_use(cases, binary)))}")
        click.echo(f"#   fitted {told(cases.losses(costs))}")
        for kind, cost in zip(cases.kinds, costs, strict=True):
            click.echo(f"{names[kind]}: Cost({', '.join(str(float(c)) for c in cost)}),")


if __name__ == "__main__":
    main()
