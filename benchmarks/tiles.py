"""What each kind of tile of a product takes: `python -m benchmarks.tiles`, a table in us.

    python -m benchmarks.tiles --out tiles.csv

To such times `benchmarks.tile_costs` fits the costs by which `kernels/product.py` chooses. Launches
one after another as a CUDA graph, each with a weight that has left the L2 cache since it was last
read; kinds in random order, medians. Before a kind is timed its product with the first weight is
compared with another kind's: all bits are to be the same. Nothing is judged here: `pytest
benchmarks/` does that.
"""

from __future__ import annotations

import csv
import math
import random
import sys
from collections.abc import Callable, Iterator
from itertools import product as product_of
from pathlib import Path
from statistics import median
from typing import TextIO

import click
import torch
from torch import Tensor

import quest
from quest import lowbit, operands
from quest.gated_product import launch_gated_product
from quest.kernels import cuda, hopper, product
from quest.rotated_product import launch_rotated_product

# In, out, and what follows: of the 1.6B model's layers, and of others by themselves.
SHAPES = (
    (2048, 6144, "turned"), (2048, 6144, ""), (2048, 2048, "added"), (2048, 11264, "gated"),
    (5632, 2048, "added"), (2048, 2048, ""), (1024, 1024, ""), (4096, 4096, ""), (4096, 12288, ""),
    (4096, 22016, ""), (11008, 4096, ""), (256, 4096, ""), (512, 4096, ""),
)  # fmt: skip
ROWS = (64, 128, 256, 512, 1024, 2048, 4096, 16384)
COLD = 160e6  # bytes of weights in turn, at least: three L2 caches
LAUNCHES, ROUNDS = 12, 8  # of a graph, at least
HEAD, POSITIONS = 128, 512
FIELDS = ("recipe", "rows", "in", "out", "then", *product.KINDS)

Made = tuple[Tensor, Tensor, Tensor, Tensor]  # operand, scale, mask, sums


def _graph(run: Callable[[int], Tensor], launches: int) -> torch.cuda.CUDAGraph:
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            run(i)
    return graph


def _took(graph: torch.cuda.CUDAGraph, launches: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # a millisecond, until all is queued
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / launches


def measure(
    recipe: str, rows: int, width: int, columns: int, then: str, device: torch.device
) -> dict[str, float]:
    """us of a product by each kind of tile that its operands take.

    then: "turned", the first two thirds of its columns, in heads of HEAD; "gated", "added" or "".
    RuntimeError where two kinds have other numbers.
    """
    made = quest.recipe(recipe)
    pair = (made.activation, made.weight)
    kinds = operands.kinds(*pair)
    assert kinds is not None
    names = ",".join(q.require_grid().name for q in pair), ",".join(kinds)

    def encoded(n: int, of: int) -> Made:
        x = torch.randn(n, width, device=device, dtype=torch.bfloat16)
        return lowbit.encode(x, pair[of].spec, kinds[of])

    binary = kinds[0] == "bits"
    count = max(LAUNCHES, math.ceil(COLD / (columns * width / (8 if binary else 1))))
    weights = [encoded(columns, 1) for _ in range(count)]
    inputs = [encoded(rows, 0) for _ in range(3)]
    beside = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
    angles = torch.randn(min(POSITIONS, rows), HEAD // 2, device=device)
    turned = angles.cos(), angles.sin(), columns // 3 * 2

    def run(i: int) -> Tensor:
        (a, a_scale, _, a_sums), (b, b_scale, _, b_sums) = inputs[i % 3], weights[i]
        told = (a, b, a_scale, b_scale, a_sums, b_sums, None, *names, width, torch.bfloat16)
        if then == "turned":
            return launch_rotated_product(*told, *turned)
        if then == "gated":
            return launch_gated_product(*told)
        return lowbit.launch_product(*told, residual=beside if then == "added" else None)

    graphs, first = {}, None
    for name, tiles in product.KINDS.items():
        if tiles not in product.COSTS[binary]:
            continue
        with product.only(tiles):
            y = run(0)
            first = y if first is None else first
            if not torch.equal(first, y):
                raise RuntimeError(f"{name} tiles have other numbers: {recipe}, {rows} rows")
            graphs[name] = _graph(run, count)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(ROUNDS + 1):
        for name in random.sample(list(graphs), len(graphs)):
            took = _took(graphs[name], count)
            if turn:
                times[name].append(took)
    return {name: median(each) for name, each in times.items()}


def chosen(recipe: str, rows: int, width: int, columns: int, then: str, processors: int) -> str:
    """The name of the kind of tile that such a product takes."""
    binary = recipe == "w1a1"
    bytes_ = -(-width // 8) if binary else width
    tiles = product.shape(binary, rows, columns, bytes_, processors, then == "turned")
    return next(name for name, kind in product.KINDS.items() if kind == tiles)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False, writable=True),
    help="A CSV file, written at the end; else standard output.",
)  # fmt: skip
def main(out: Path | None) -> None:
    """Time every kind of tile of a product, at the shapes of models' layers."""
    if out is not None and not out.parent.is_dir():
        raise click.BadParameter(f"there is no folder {out.parent}", param_hint="--out")
    random.seed(0)
    rows = list(_rows(_device()))
    if out is None:
        _write(sys.stdout, rows)
        return
    with out.open("w", newline="", encoding="utf-8") as file:
        _write(file, rows)
    click.echo(f"wrote {out}", err=True)


def _device() -> torch.device:
    device = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    if reason := hopper.unavailable(device):
        raise click.ClickException(f"products of integers need a Hopper GPU: {reason}")
    return device


def _rows(device: torch.device) -> Iterator[dict[str, object]]:
    processors = cuda.processors(device.index)
    for recipe, (width, columns, then), rows in product_of(("w4a4", "w1a1"), SHAPES, ROWS):
        took = measure(recipe, rows, width, columns, then, device)
        taken = chosen(recipe, rows, width, columns, then, processors)
        best = min(took, key=lambda name: took[name])
        click.echo(
            f"{recipe} {rows} x {width} x {columns} {then}: {taken} takes "
            f"{took[taken] / took[best]:.3f} of {best}", err=True,
        )  # fmt: skip
        given = {"recipe": recipe, "rows": rows, "in": width, "out": columns, "then": then}
        yield given | {name: f"{us:.2f}" for name, us in took.items()}


def _write(file: TextIO, rows: list[dict[str, object]]) -> None:
    table = csv.DictWriter(file, FIELDS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)


if __name__ == "__main__":
    main()
