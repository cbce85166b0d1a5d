"""The judges accept correct implementations that are not ours, as these declare themselves."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from click.testing import CliRunner

import quest
from property_tests import false_alarms, variants
from quest.conformance import inputs, judges
from quest.conformance.verdict import Verdict
from quest.reference.bounds import BUTTERFLY

IMPLEMENTATIONS = {made.name: made for made in false_alarms.implementations()}
SEEDS = range(20_000, 20_004)  # 1000 others: benchmarks/records/cpu/false_alarms.txt


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_correct_implementations_pass(name: str) -> None:
    lines = false_alarms.judge(SEEDS, [IMPLEMENTATIONS[name]])
    assert [p for line in lines.values() for p in line.tally.problems()] == []
    assert sum(line.tally.elements for line in lines.values()) > 0


@pytest.mark.parametrize("rotation", variants.ROTATIONS, ids=lambda r: r.name)
def test_variants_differ_from_the_oracle_by_roundings_alone(rotation: variants.Rotation) -> None:
    # A tenth of the largest entry would pass no bound; this is about signs and order.
    for order in (1, 2, 128, 24, 28):
        x = inputs.draw("gaussian", (3, order * 3), torch.float32, order)
        for transpose in (False, True):
            y = variants.rotate(x, order, transpose, rotation)
            assert judges.rotated(x, y, order, transpose, rotation.sums(order)).failure is None
            wrong = judges.rotated(x, -y, order, transpose, rotation.sums(order))
            assert order == 1 or wrong.failure is not None


def outlier() -> torch.Tensor:
    return inputs.draw("outlier", (64, 256), torch.float32, 1)


def test_a_dot_product_is_no_butterfly() -> None:
    # One large entry and 255 small ones: 256 roundings of the large one, not nine.
    rotation = next(r for r in variants.ROTATIONS if r.name == "matrix, sequential")
    x = outlier()
    y = variants.rotate(x, 256, False, rotation)
    assert judges.rotated(x, y, 256, False).failure is not None
    assert judges.rotated(x, y, 256, False, rotation.sums(256)).failure is None


def test_normalised_terms_do_not_cancel() -> None:
    rotation = next(r for r in variants.ROTATIONS if r.name == "matrix, normalised entries")
    x = inputs.draw("integers", (5, 128), torch.float32, 3)
    y = variants.rotate(x, 128, False, rotation)
    assert judges.rotated(x, y, 128, False).failure is not None
    assert judges.rotated(x, y, 128, False, rotation.sums(128)).failure is None


def test_a_float16_product_that_overflows_on_its_way_back() -> None:
    # The product is 240000. Stored in float16 it is an infinity, and a block of them gives NaN; an
    # implementation that keeps float32 until the end has finite entries there.
    made = quest.recipe("w4a4", transform=quest.Hadamard(16))
    x = w = torch.zeros(1, 16).half()
    x[0, 0] = 16
    grad = torch.full((1, 1), 60_000.0).half()
    xh, wh = made.activation(x), made.weight(w)
    masks = (made.activation.quantize(x).mask, made.weight.quantize(w).mask)
    assert all(m.all() for m in masks)
    assert (grad @ wh).isinf().all()
    turn = functools.partial(
        variants.rotate, order=16, transpose=True, rotation=variants.ROTATIONS[0]
    )
    narrow = {
        "y": xh @ wh.t(),
        "dx": torch.full_like(x, torch.nan),
        "dw": torch.full_like(w, torch.nan),
        "x_hat": xh,
        "w_hat": wh,
    }
    wide = narrow | {
        "dx": turn(grad.float() @ wh.float()).half(),
        "dw": turn(grad.float().t() @ xh.float()).half(),
    }
    for out in (narrow, wide):
        found = judges.layer(x, w, grad, None, made, out, masks, 2.0**-24)
        assert [v.failure for v in found] == [None] * 3
    small = judges.layer(x, w, grad / 1000, None, made, narrow, masks, 2.0**-24)
    assert all(v.failure is not None for v in small[1:])


def broken(seed: int) -> list[Verdict]:
    return [Verdict("codes", 100, 2.0, failure=f"wrong {seed}")]


def test_a_false_alarm_is_counted_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made = false_alarms.Implementation("broken", broken)
    monkeypatch.setattr(false_alarms, "implementations", lambda: iter([made]))
    told = CliRunner().invoke(false_alarms.main, ["--seeds", "3"])
    assert told.exit_code == 1
    assert "1 implementations, 300 elements judged, 3 false alarms" in told.output
    assert "broken, codes: seed 2: wrong 2" in told.output


def test_command() -> None:
    told = CliRunner().invoke(false_alarms.main, ["--seeds", "2", "--only", "scale: sum tree"])
    assert told.exit_code == 0, told.output
    assert told.output.startswith("seeds 0 to 1; quest ")
    wrong = CliRunner().invoke(false_alarms.main, ["--only", "nothing like it"])
    assert wrong.exit_code == 2
    assert "no implementation has 'nothing like it' in its name" in wrong.output


def test_every_unusual_sum_is_declared() -> None:
    # What the record says of undeclared sums: they are what these seeds stand for.
    declared = [r for r in variants.ROTATIONS if r.sums(128) != BUTTERFLY]
    assert len(declared) == 6
    undeclared = [dataclasses.replace(r, sums=lambda order: BUTTERFLY) for r in declared]
    judged = false_alarms.judge(
        range(9, 14),  # each of the six bites within these
        [
            false_alarms.Implementation(
                r.name, functools.partial(false_alarms._transform, rotation=r)
            )
            for r in undeclared
        ],
    )
    assert sum(bool(line.tally.problems()) for line in judged.values()) >= 2
