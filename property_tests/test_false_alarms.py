"""The judges accept correct implementations that are not ours, as these declare themselves."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import quest
from property_tests import false_alarms, variant_rows, variants
from property_tests.variant_rows import Gate, Gradient, Norm
from quest.conformance import inputs, judges, oracle
from quest.conformance.verdict import Verdict
from quest.reference import prologue
from quest.reference.bounds import BUTTERFLY, U32

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
    assert "no implementation has 'nothing like it' in its name; there are: " in wrong.output
    assert all(made.name in wrong.output for made in false_alarms.implementations())


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


def drawn(kinds: tuple[str, ...], dtype: torch.dtype) -> list[Tensor]:
    return [inputs.draw(kind, (5, 48), dtype, i) for i, kind in enumerate(kinds)]


@pytest.mark.parametrize("dtype", false_alarms.DTYPES, ids=str)
@pytest.mark.parametrize("gate", variant_rows.GATES, ids=lambda gate: gate.name)
def test_gates_are_right_and_told_from_wrong_ones(gate: Gate, dtype: torch.dtype) -> None:
    g, v = drawn(("heavy", "gaussian"), dtype)
    judge = functools.partial(judges.gated, g, v, between=dtype if gate.stored else None)
    assert judge(variant_rows.gated(g, v, gate)).failure is None
    turned = dataclasses.replace(gate, part=lambda t: gate.part(-t))
    wrong = {
        "negative": -variant_rows.gated(g, v, gate),
        "value left out": variant_rows.gated(g, torch.ones_like(v), gate),
        "swapped": variant_rows.gated(v, g, gate),
        "sigmoid of -g": variant_rows.gated(g, v, turned),
        "the row before": variant_rows.gated(g.roll(1, 0), v, gate),
    }
    assert [name for name, x in wrong.items() if judge(x).failure is None] == []


@pytest.mark.parametrize("dtype", false_alarms.DTYPES, ids=str)
@pytest.mark.parametrize("norm", variant_rows.NORMS, ids=lambda norm: norm.name)
def test_norms_are_right_and_told_from_wrong_ones(norm: Norm, dtype: torch.dtype) -> None:
    (h,) = drawn(("gaussian",), dtype)
    w = inputs.draw("gaussian", (48,), dtype, 1)
    judge = functools.partial(judges.normed, h, w, 0.5, between=dtype if norm.stored else None)
    assert judge(variant_rows.normed(h, w, 0.5, norm)).failure is None
    cut = dataclasses.replace(norm, mean=lambda t, eps: norm.mean(t[:, :-1], eps))
    wrong = {
        "negative": -variant_rows.normed(h, w, 0.5, norm),
        "weight left out": variant_rows.normed(h, torch.ones_like(w), 0.5, norm),
        "1 + weight": variant_rows.normed(h, 1 + w, 0.5, norm),
        "weights backwards": variant_rows.normed(h, w.flip(0), 0.5, norm),
        "another eps": variant_rows.normed(h, w, 0.25, norm),
        "the last column not counted": variant_rows.normed(h, w, 0.5, cut),
        "the row before": variant_rows.normed(h.roll(1, 0), w, 0.5, norm),
    }
    assert [name for name, x in wrong.items() if judge(x).failure is None] == []


@pytest.mark.parametrize("dtype", false_alarms.DTYPES, ids=str)
@pytest.mark.parametrize("made", variant_rows.GRADIENTS, ids=lambda made: made.name)
def test_gradients_are_right_and_told_from_wrong_ones(made: Gradient, dtype: torch.dtype) -> None:
    d, g, v = drawn(("gaussian", "heavy", "gaussian"), dtype)
    right = variant_rows.gradients(d, g, v, made)
    turned = dataclasses.replace(made, sigmoid=lambda t: made.sigmoid(-t))
    ones = torch.ones_like(v)

    def failures(to_gate: Tensor, to_value: Tensor) -> list[bool]:
        found = judges.gated_backward(d, g, v, to_gate, to_value)
        return [verdict.failure is not None for verdict in found]

    assert failures(*right) == [False, False]
    assert failures(-right[0], -right[1]) == [True, True]
    assert failures(*variant_rows.gradients(ones, g, v, made)) == [True, True]
    assert failures(*variant_rows.gradients(d, g, v, turned)) == [True, True]
    assert failures(*variant_rows.gradients(d, g, ones, made)) == [True, False]


@pytest.mark.parametrize("dtype", false_alarms.DTYPES, ids=str)
@pytest.mark.parametrize("name", variant_rows.ADDITIONS)
def test_additions_are_right_and_told_from_wrong_ones(name: str, dtype: torch.dtype) -> None:
    x, residual = drawn(("heavy", "gaussian"), dtype)
    add = variant_rows.ADDITIONS[name]
    assert judges.added(x, residual, add(x, residual)).failure is None
    assert judges.added(x, residual, add(-x, residual)).failure is not None
    assert judges.added(x, residual, add(x, torch.zeros_like(x))).failure is not None


@pytest.mark.parametrize("grid", false_alarms.UNIFORM, ids=lambda grid: grid.name)
def test_operands_are_right_and_told_from_wrong_ones(grid: quest.grids.Grid) -> None:
    half = grid.levels // 2
    g = torch.Generator().manual_seed(half)
    codes = torch.randint(-half, half + grid.levels % 2, (3, 13), generator=g)
    codes[0, :2] = torch.tensor([-half, half - 1 + grid.levels % 2])
    q = quest.Quantizer(grid, quest.Hadamard(1), quest.STE())
    kind, operand, sums = variant_rows.operand(codes, grid.levels)
    judge = functools.partial(judges.encoded, q, kind, codes, None)
    assert [v.failure for v in judge(operand, sums)] == [None, None]
    wrong = operand ^ 1 if kind == "bits" else -operand
    assert judge(wrong, sums)[0].failure is not None
    assert judge(operand, sums + 1)[1].failure is not None


# The error of what is rounded once to float32, of products in float64.
ONCE = U32 * (1 + 1e-6)


@pytest.mark.parametrize("made", variant_rows.GATES + variant_rows.NORMS, ids=lambda m: m.name)
def test_float64_rounds_once(made: Gate | Norm) -> None:
    g, v = (inputs.draw("gaussian", (5, 480), torch.float32, i) for i in range(2))
    if isinstance(made, Gate):
        x, exact = variant_rows.gated(g, v, made), prologue.gated(g.numpy(), v.numpy())
    else:
        x = variant_rows.normed(g, v[0], 1e-5, made)
        exact = prologue.normed(g.numpy(), v[0].numpy(), 1e-5)
    error = np.abs(oracle.lift(x) - exact) / np.abs(exact)
    assert (error.max() <= ONCE) == (made.wide and not made.stored)


@pytest.mark.parametrize("made", variant_rows.GATES + variant_rows.NORMS, ids=lambda m: m.name)
def test_what_is_stored_twice_is_declared(made: Gate | Norm) -> None:
    g, v = (inputs.draw("gaussian", (5, 480), torch.bfloat16, i) for i in range(2))
    if isinstance(made, Gate):
        undeclared = judges.gated(g, v, variant_rows.gated(g, v, made))
    else:
        rows = variant_rows.normed(g, v[0], 1e-5, made)
        undeclared = judges.normed(g, v[0], 1e-5, rows)
    assert (undeclared.failure is not None) == made.stored


def test_it_is_declared_to_the_judges() -> None:
    twice = [made for name, made in IMPLEMENTATIONS.items() if name.endswith(" stored")]
    assert len(twice) == 4
    judged = false_alarms.judge(range(20_000, 20_020), twice)
    assert [p for line in judged.values() for p in line.tally.problems()] == []


def test_rows_come_in_turn_and_backwards() -> None:
    seen: list[list[float]] = []

    def run(a: Tensor, b: Tensor) -> Tensor:
        seen.append(a[0].tolist())
        return a * 10 + b

    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0], [7.0, 8.0]])
    assert torch.equal(variant_rows.in_turn(run, a, b), a * 10 + b)
    assert seen == [[4.0, 3.0], [2.0, 1.0]]


def test_a_tanh_that_cancels() -> None:
    # 1 + tanh(-10) is a multiple of 2^-24; the sigmoid of -20 is 2^-29, in float32 still.
    g, v = torch.tensor([[-20.0, 1.0]]), torch.ones(1, 2)
    plain = Gate("plain tanh", lambda t: 0.5 + 0.5 * torch.tanh(t / 2))
    whole = next(gate for gate in variant_rows.GATES if gate.name == "tanh")
    assert judges.gated(g, v, variant_rows.gated(g, v, plain)).failure is not None
    assert judges.gated(g, v, variant_rows.gated(g, v, whole)).failure is None


def test_a_product_that_overflows_before_the_sigmoid() -> None:
    g, v = torch.tensor([[-3e38, 1.0]]), torch.tensor([[4.0, 1.0]])
    wide = next(gate for gate in variant_rows.GATES if "value first" in gate.name)
    narrow = dataclasses.replace(wide, wide=False)
    assert variant_rows.gated(g, v, narrow)[0, 0].isnan()
    assert judges.gated(g, v, variant_rows.gated(g, v, narrow)).failure is not None
    assert judges.gated(g, v, variant_rows.gated(g, v, wide)).failure is None


def test_a_product_with_the_weight_that_underflows() -> None:
    # 1 / sqrt(eps) is 1000: of h w, a multiple of 2^-149, little is left.
    h, w = torch.full((1, 2), 2.0**-140), torch.tensor([1e-3, 3e-3])
    wide = next(norm for norm in variant_rows.NORMS if norm.name.startswith("weight first"))
    narrow = dataclasses.replace(wide, wide=False)
    assert judges.normed(h, w, 1e-6, variant_rows.normed(h, w, 1e-6, narrow)).failure is not None
    assert judges.normed(h, w, 1e-6, variant_rows.normed(h, w, 1e-6, wide)).failure is None


LOWERED = [n for n in variant_rows.NORMS if n.most < math.inf]


@pytest.mark.parametrize("norm", LOWERED, ids=lambda norm: norm.name)
def test_squares_that_overflow_in_a_compensated_sum(norm: Norm) -> None:
    h, w = inputs.draw("huge", (3, 16), torch.float32, 0), torch.ones(16)
    far = dataclasses.replace(norm, most=math.inf)
    assert variant_rows.normed(h, w, 1e-5, far).isnan().all()
    assert judges.normed(h, w, 1e-5, variant_rows.normed(h, w, 1e-5, far)).failure is not None
    rows = variant_rows.normed(h, w, 1e-5, norm)
    assert judges.normed(h, w, 1e-5, rows).failure is None
    assert math.isclose(float(rows[0].square().mean()), 1.0, rel_tol=1e-5)


@pytest.mark.parametrize("norm", LOWERED, ids=lambda norm: norm.name)
def test_rows_near_1_lose_bits_of_subnormal_entries(norm: Norm) -> None:
    # What is brought from 1.5 to 0.75 halves an odd multiple of 2^-149, too.
    h, w = torch.full((1, 64), 2.0**-149 * 33), torch.full((64,), 50.0)
    h[0, 0] = 1.5
    near = dataclasses.replace(norm, most=1.0)
    assert judges.normed(h, w, 1e-5, variant_rows.normed(h, w, 1e-5, near)).failure is not None
    assert judges.normed(h, w, 1e-5, variant_rows.normed(h, w, 1e-5, norm)).failure is None
    normal = inputs.draw("gaussian", (3, 16), torch.float32, 0) * 64
    rows = variant_rows.normed(normal, w[:16], 0.5, near)
    assert judges.normed(normal, w[:16], 0.5, rows).failure is None
    # The least entries of a row that is lowered have no share in its bound.
    high = h * torch.where(h == 1.5, 2.0**120, 1.0)
    assert judges.normed(high, w, 1e-5, variant_rows.normed(high, w, 1e-5, norm)).failure is None


def test_every_stage_of_a_prologue_is_judged() -> None:
    inside = {"scale", "codes", "mask", "values", "operand", "operand sums"}
    rows = {"gate": {"gated"}, "norm": {"added", "normed"}}
    for made in IMPLEMENTATIONS.values():
        kind = made.name.partition(":")[0]
        if kind in rows:
            stages = {v.stage for seed in range(20_000, 20_008) for v in made.judge(seed)}
            assert stages == rows[kind] | inside


def test_rows_of_few_values_do_not_count_as_ambiguous() -> None:
    # Differences of equal values are 0; of 24 bits, the judge can't know.
    rows, parts = torch.full((64, 8), 1 / 3), false_alarms._parts(0)
    q = quest.Quantizer(quest.grids.uniform(1), quest.Hadamard(8), quest.STE())
    for conclusive in (True, False):
        case = false_alarms.Drawn((rows, rows), q, BUTTERFLY, conclusive)
        codes = next(v for v in false_alarms._rows(rows, case, parts) if v.stage == "codes")
        assert (codes.failure is not None, codes.ambiguous > 0) == (conclusive, conclusive)


@pytest.mark.parametrize("rotation", variants.ROTATIONS, ids=lambda r: r.name)
def test_what_is_drawn_suits_the_sums(rotation: variants.Rotation) -> None:
    cases = [
        false_alarms._drawn(torch.Generator().manual_seed(seed), rotation) for seed in range(60)
    ]
    assert {case.conclusive for case in cases} == {True, False}
    for case in cases:
        assert case.sums.roundings is None or case.q.require_grid() in false_alarms.UNIFORM[:4]
        single = case.pair[0].dtype is torch.float32
        assert case.sums.last or single or not case.conclusive


def test_rows_that_are_not_finite_are_left_to_their_rules() -> None:
    rows = inputs.draw("gaussian", (3, 8), torch.float32, 0)
    rows[0, 1], rows[2, 0] = math.inf, math.nan
    q = quest.Quantizer(quest.grids.uniform(4), quest.Hadamard(8), quest.STE())
    case = false_alarms.Drawn((rows, rows), q, BUTTERFLY, True)
    found = false_alarms._rows(rows, case, false_alarms._parts(0))
    assert {v.stage: v.elements for v in found}["codes"] == 8
    assert false_alarms._rows(rows[:1], case, false_alarms._parts(0)) == []
