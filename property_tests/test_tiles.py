"""Tiles of products in benchmarks: those that the gate judges; and `python -m benchmarks.tiles`."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from benchmarks import bench_product, gate, tiles
from property_tests.places import CPU, Place
from quest.conformance import examine
from quest.kernels import cuda, hopper, product

SHAPES = ((64, 384, "turned"), (48, 96, ""), (48, 96, "added"), (64, 64, "gated"))


@pytest.fixture
def somewhere(place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Small shapes; on a CPU a call stands for a graph, and takes a microsecond."""
    if reason := hopper.unavailable(torch.device(place.device)):
        pytest.skip(reason)
    monkeypatch.setattr(tiles, "SHAPES", SHAPES)
    monkeypatch.setattr(tiles, "ROWS", (70,))
    monkeypatch.setattr(tiles, "COLD", 0)
    monkeypatch.setattr(cuda, "processors", lambda _: 4)
    if place is CPU:
        monkeypatch.setattr(tiles, "_graph", lambda run, launches: run(launches - 1))
        monkeypatch.setattr(tiles, "_took", lambda *_: 1.0)
        monkeypatch.setattr(tiles, "_device", lambda: torch.device("cpu"))
    return place


def test_the_table(somewhere: Place, tmp_path: Path) -> None:
    """A line of each case, and times of the kinds of tile that are used for it."""
    out = tmp_path / "tiles.csv"
    ran = CliRunner().invoke(tiles.main, ["--out", str(out)], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    with out.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [(row["recipe"], row["in"], row["out"], row["then"]) for row in found] == [
        (recipe, str(width), str(columns), then)
        for recipe in ("w4a4", "w1a1")
        for width, columns, then in SHAPES
    ]
    for row in found:
        used = product.COSTS[row["recipe"] == "w1a1"]
        for name, kind in product.KINDS.items():
            assert (float(row[name]) > 0) if kind in used else row[name] == ""


def test_two_thirds_of_the_columns_are_turned(
    somewhere: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q and k of q, k and v, in sequences of at most as many rows as there are."""
    real, told = tiles.launch_rotated_product, []
    monkeypatch.setattr(
        tiles, "launch_rotated_product",
        lambda *given: told.append((given[-3].shape, given[-1])) or real(*given),
    )  # fmt: skip
    tiles.measure("w4a4", 70, 64, 384, "turned", torch.device(somewhere.device))
    assert set(told) == {((70, 64), 256)}


@pytest.mark.parametrize("then", ["", "gated"])
def test_other_numbers_are_refused(
    then: str, somewhere: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kind of tile with another product than the first is no time."""
    real: Callable[..., Tensor] = product.product
    monkeypatch.setattr(
        product, "product",
        lambda *told, **more: real(*told, **more) + (product.forced() == product.TALL),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="tall tiles have other numbers: w4a4, 70 rows"):
        tiles.measure("w4a4", 70, 64, 64, then, torch.device(somewhere.device))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    """Before anything is measured."""
    ran = CliRunner().invoke(tiles.main, ["--out", str(tmp_path / "none" / "tiles.csv")])
    assert ran.exit_code == 2
    assert "there is no folder" in ran.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path: Path) -> None:
    """And what was there stays."""
    out = tmp_path / "tiles.csv"
    out.write_text("kept")
    ran = CliRunner().invoke(tiles.main, ["--out", str(out)])
    assert ran.exit_code == 1
    assert "need a Hopper GPU: there is no CUDA device" in ran.output
    assert out.read_text() == "kept"


@pytest.mark.parametrize(
    ("recipe", "columns", "turned", "judged"),
    [("w4a4", 3072, False, product.TALL), ("w4a4", 3072, True, product.NARROW),
     ("w1a1", 6144, False, product.NARROW), ("w1a1", 6144, True, product.TALL)],
)  # fmt: skip
def test_the_gate_judges_the_tiles_that_are_timed(
    recipe: str, columns: int, turned: bool, judged: product.Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 x 2048 x columns on 132 multiprocessors, where heads that are turned have other tiles."""
    monkeypatch.setattr(gate, "CUDA", True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "processors", lambda _: 132)
    monkeypatch.setattr(bench_product, "no_product", lambda _: None)
    monkeypatch.setattr(examine, "product", lambda *_: [product.forced()])
    angles = torch.zeros(bench_product.POSITIONS, bench_product.HEAD // 2)
    found: list[object] = []

    def timed(**told: Callable[..., list[object]]) -> None:
        found.extend(told["judge"](gate.lane(), "gaussian"))

    bench_product._time(
        timed, 512, 2048, columns, recipe,
        turned=product.Turned(angles, angles, columns // 3 * 2) if turned else None,
    )  # fmt: skip
    assert found == [judged]
