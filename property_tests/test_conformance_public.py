"""The public court itself: it holds, it bites, and it passes nothing that was not declared."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import quest
from quest.conformance import exact_rows, inputs, lanes, propagated
from quest.conformance.adapters.published import Paper
from quest.conformance.lanes import GuardError
from quest.conformance.public import (
    adapter,
    asked,
    axes,
    capabilities,
    document,
    expected,
    formats,
    lists,
    page,
    properties,
    results,
    summary,
)
from quest.conformance.public.court import Court
from quest.conformance.strategies import FORMATS, Case
from quest.conformance.tests import drawing
from quest.conformance.verdict import Rejected, Verdict
from quest.reference import bounds

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("mine", "must be package.module:Adapter, got 'mine'"),
        ("no_such_module:A", "no module 'no_such_module'"),
        ("quest.conformance.adapters.published:Papper", "has no 'Papper'; it has Paper, Released"),
        ("quest.grids:Grid", r"Grid\(\) raised TypeError"),
        ("quest.conformance.public.lists:ListError", "has no capabilities: a dict is needed"),
    ],
)
def test_wrong_names(spec: str, told: str) -> None:
    with pytest.raises(capabilities.AdapterError, match=told):
        adapter.load(spec)


@pytest.mark.parametrize(
    ("declared", "told"),
    [
        ({"dtype": ["float32"]}, "has the key 'dtype'; allowed are arrays, device, dtypes"),
        ({"dtypes": "float32"}, r"capabilities\['dtypes'\] must be a list, got 'float32'"),
        ({"dtypes": ["float64"]}, "may hold float32, bfloat16, float16; got 'float64'"),
        ({"blocks": [24, 36]}, "Hadamard order must be 2"),
        ({"grids": ["uniform9"]}, "bits must be an integer from 1 to 8"),
        ({"ties": "upp"}, "must be one of 'up', 'down', 'even', 'away', 'zero'; got 'upp'"),
        ({"bits": [3]}, "may hold 1, 2, 4, 8; got '3'"),
        ({"max_width": 0}, "must be a positive integer, got 0"),
        ({"arrays": "numpy", "dtypes": [torch.bfloat16]}, "NumPy has no bfloat16"),
    ],
)
def test_wrong_capabilities(declared: dict[str, Any], told: str) -> None:
    with pytest.raises(capabilities.AdapterError, match=told):
        capabilities.check(declared, "Adapter")


def test_lists(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text("# all\na.py::b # one\n\na.py::c[1]\n")
    found = lists.read("--skips", str(path))
    assert found.match("a.py::b[2]")
    assert not found.match("a.py::c[2]")
    # A name is no beginning of others.
    for other in ("a.py::bb", "a.py::b_too[2]", "a.py::c", "a.py::c[1-float32]", "a.py::c[11]"):
        assert not found.match(other)
    assert found.stale() == ["--skips list: 'a.py::c[1]' is no property that this adapter covers"]
    shipped = lists.read("--xfails", "quest.conformance.adapters:published.xfails")
    assert "test_quantize.py::test_ties" in shipped.entries
    path.write_text("a\na\n")
    for given, told in (
        (str(path), "'a' stands there twice"),
        (str(tmp_path / "none"), "No such file"),
        ("no_such_package:file", "there is no package 'no_such_package'"),
    ):
        with pytest.raises(lists.ListError, match=told):
            lists.read("--skips", given)


def implementation(made: Any) -> adapter.Implementation:
    return adapter.Implementation(
        "test", made, capabilities.check(made.capabilities, "test"), None, (), ()
    )


SPARSE = [
    quest.quantizer.parse(f"{grid}/hadamard16/{estimator}/{pattern}")
    for grid, estimator in (("uniform4", "trust1.0"), ("e2m1", "trust0.5"), ("uniform1", "clip1.3"))
    for pattern in ("2:4", "pairs4:8")
]


def failures(property_: str, made: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """What a property finds wrong, on a few inputs of a fixed seed."""
    impl, judge = implementation(made), getattr(properties, property_)
    x, w = (inputs.draw("gaussian", (n, 384), dtype, seed + n) for n in (9, 5))
    q = quest.quantizer.parse("uniform4/hadamard16/trust1.0/dense")
    if property_ in ("transform", "transpose", "scale"):
        calls: list[tuple[Any, ...]] = [(x, 16), (x.abs() * 0, 16)]
    elif property_ in ("packed", "unpacked"):
        calls = [(inputs.unsigned(b, (3, 13), seed), b) for b in (1, 2, 4, 8)]
    elif property_ in ("product", "scaled_product"):
        a, b = inputs.integers("random", 5, 33, seed), inputs.integers("lowest", 7, 33, seed)
        scales = tuple(w[:n, :1].abs().float() for n in (5, 7)) if "scaled" in property_ else ()
        scales = (x[:5, :1].abs().float(), x[:7, 1:2].abs().float()) if scales else ()
        calls = [(a, b, *scales)]
    elif property_ == "selection":
        calls = [(t, quest.quantizer.parse(f"uniform4/hadamard16/trust1.0/{s}"))
                 for s in ("2:4", "pairs4:8") for t in (x, x.round())]  # fmt: skip
    elif property_ == "exact":
        q = quest.quantizer.parse("uniform4:1.875/identity/ste/dense")
        calls = [(torch.from_numpy(exact_rows.rows(1, 32, 8, seed)).to(dtype), q)]
    elif property_ == "forward":
        made_recipe = quest.recipe("bf16", weight=q, activation=q)
        calls = [(x, w, None, made_recipe), (x, w, w[:, 0], made_recipe)]
    elif property_ == "backward":
        calls = [(x, w, x[:, :5], quest.recipe("bf16", weight=q, activation=q))]
    else:
        calls = [(x, q), (x, quest.quantizer.parse("e2m1/hadamard16/trust0.5/dense"))]
        calls += [(x, quest.quantizer.parse("uniform1/hadamard16/clip1.3/dense"))]
        if property_ != "codes":
            calls += [(x, q) for q in SPARSE]
    return [v for arguments in calls for v in judge(impl, *arguments) if v.failure is not None]


PROPERTIES = (
    "transform", "transpose", "scale", "codes", "exact", "values", "mask", "selection", "packed",
    "unpacked", "product", "scaled_product", "forward", "backward",
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("property_", PROPERTIES)
def test_the_paper_s_formulas_hold(property_: str, dtype: torch.dtype) -> None:
    for seed in range(3):
        assert failures(property_, Paper(), seed, dtype) == []


class OneByOne(Paper):
    """Each entry by a sum in float32, one term after the other."""

    def hadamard(self, x: torch.Tensor, block: int) -> torch.Tensor:
        y = super().hadamard(x, block)
        y[..., 0] = torch.from_numpy(np.cumsum(x.numpy(), -1)[..., -1] / np.float32(block**0.5))
        return y


def test_a_product_rounds_more_often_than_a_butterfly() -> None:
    made, x = OneByOne(), torch.full((1, 1024), 0.1)
    assert properties.transform(implementation(made), x, 1024)[0].failure is not None
    made.capabilities = Paper.capabilities | {"rotation": "product"}
    assert properties.transform(implementation(made), x, 1024)[0].failure is None
    assert properties.transform(implementation(made), x * 0 + 0.25, 1024)[0].failure is None


def planted(function: str, fault: Any) -> Any:
    """`Paper` with one function that changes what the right one gives."""
    right = getattr(Paper, function)

    def wrong(self: Any, *arguments: Any) -> Any:
        return fault(right(self, *arguments))

    return type("Planted", (Paper,), {function: wrong})()


FAULTS = {
    "a sign": ("transform", "hadamard", lambda y: torch.cat([-y[..., :1], y[..., 1:]], -1)),
    "twice normalised": ("transform", "hadamard", lambda y: y / 4),
    "another dtype": ("transform", "hadamard", lambda y: y.double()),
    "transpose": ("transpose", "hadamard_transpose", lambda y: y.flip(-1)),
    "an epsilon": ("scale", "scale", lambda s: s + 1e-6),
    "a flat scale": ("scale", "scale", lambda s: s[..., 0]),
    "codes up": ("codes", "quantize", lambda r: (r[0].clamp_max(6) + 1, r[1])),
    "stored scale": ("codes", "quantize", lambda r: (r[0], r[1] * 1.001)),
    "float codes": ("codes", "quantize", lambda r: (r[0].float(), r[1])),
    "values": ("values", "fake_quantize", lambda v: v * (1 + 2**-10)),
    "mask": ("mask", "mask", lambda m: torch.ones_like(m)),
    "selection": ("selection", "select", lambda k: ~k),
    "nibbles": ("packed", "pack", lambda p: (p << 4) | (p >> 4)),
    "unsigned": ("unpacked", "unpack", lambda c: c.clamp_max(14)),
    "accumulator": ("product", "product", lambda a: a.half().int()),
    "scales": ("scaled_product", "scaled_product", lambda y: y * (1 + 2**-18)),
    "layer": ("forward", "linear", lambda y: y * (1 + 2**-12)),
    "bias": ("forward", "linear", lambda y: y - 2**-6),
    "dx": ("backward", "linear_backward", lambda g: (g[0].roll(1, -1), g[1])),
    "dw": ("backward", "linear_backward", lambda g: (g[0], g[1] * 0)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name: str) -> None:
    property_, function, fault = FAULTS[name]
    assert failures(property_, planted(function, fault))


def test_the_mask_is_not_judged_by_codes_that_are_wrong() -> None:
    found = failures("mask", planted("quantize", lambda r: (r[0].clamp_max(6) + 1, r[1])))
    assert {v.stage for v in found} == {"codes"}


@pytest.mark.parametrize("rows", [9, 5])
def test_either_operand_of_a_layer_is_judged(rows: int) -> None:
    """One that multiplies what it shows, and shows what is no value of its format."""

    class Wrong(Paper):
        def fake_quantize(self, x: torch.Tensor, format: formats.Format) -> torch.Tensor:
            right = super().fake_quantize(x, format)
            return right * (1 + 2**-10) if len(x) == rows else right

    for property_ in ("forward", "backward"):
        assert {v.stage for v in failures(property_, Wrong())} == {"values"}


@pytest.mark.parametrize("accumulator", capabilities.ACCUMULATORS)
def test_a_layer_is_held_to_the_declared_accumulator(
    accumulator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    units: list[tuple[str, float]] = []
    for name, at in (("layer", 7), ("values_product", 3)):
        judge = getattr(properties.judges, name)

        def noted(*given: Any, name: str = name, judge: Any = judge, at: int = at, **more: Any):  # type: ignore[no-untyped-def]
            units.append((name, given[at]))
            return judge(*given, **more)

        monkeypatch.setattr(properties.judges, name, noted)
    made = Declared(accumulator=accumulator)
    assert failures("forward", made) == failures("backward", made) == []
    unit = capabilities.ACCUMULATORS[accumulator]
    assert {*units} == {("layer", unit), ("values_product", unit)}


def test_ties_are_exact() -> None:
    class Even(Paper):
        def quantize(self, x: torch.Tensor, format: formats.Format) -> Any:
            t, _, sigma = self._places(x, format)
            half = format.levels // 2
            return (t / format.step - 0.5).round().clamp(-half, half - 1).long(), sigma

    x = inputs.draw("gaussian", (9, 384), torch.float32, 0)
    q = quest.quantizer.parse("uniform4/hadamard16/ste/dense")
    apart = properties.codes(implementation(Even()), x, q)
    assert all(v.failure is None for v in apart), "only ties tell them apart"
    assert failures("exact", Even())


@pytest.mark.parametrize("estimator", ["trust1.0", "trust0.5"])
def test_thresholds_are_exact(estimator: str) -> None:
    """One that leaves out values on them passes where they are only bounded."""

    class Strict(Paper):
        def mask(self, x: torch.Tensor, format: formats.Format) -> torch.Tensor:
            t, _, sigma = self._places(x, format)
            inner = (self._points(self.quantize(x, format)[0], format) - t).abs()
            outside = t.abs() < format.points[-1] + format.parameter * format.half_gap
            near = outside if format.parameter >= 1 else inner < format.parameter * format.half_gap
            return torch.where(sigma > 0, near, sigma == 0)

    x = inputs.draw("gaussian", (9, 384), torch.float32, 0)
    q = quest.quantizer.parse(f"uniform4/hadamard16/{estimator}/dense")
    apart = properties.mask(implementation(Strict()), x, q)
    assert all(v.failure is None for v in apart), "only thresholds tell them apart"
    exact = torch.from_numpy(exact_rows.rows(1, 32, 16, 0)).float()
    q = quest.quantizer.parse(f"uniform2:0.375/identity/{estimator}/dense")
    for impl, wrong in ((Paper(), False), (Strict(), True)):
        found = properties.exact_mask(implementation(impl), exact, q)
        assert any(v.failure for v in found) == wrong


class StrictClip(Paper):
    """Leaves out what lies on the threshold, in the precision that is asked for."""

    def __init__(self, precision: Any) -> None:
        self.precision = precision

    def mask(self, x: torch.Tensor, format: formats.Format) -> torch.Tensor:
        t, _, sigma = self._places(x, format)
        threshold = self.precision(format.parameter) * self.precision(format.points[-1])
        return torch.where(sigma > 0, t.abs() < float(threshold), sigma == 0)


# What is no float32 is on its threshold where its product is rounded to one.
@pytest.mark.parametrize(
    ("clip", "precision"), [(1.3, np.float32), (1.5, np.float32), (1.5, np.float64)]
)
@pytest.mark.parametrize("grid", ["uniform1", "ternary"])
def test_thresholds_of_a_clip_are_exact(grid: str, clip: float, precision: Any) -> None:
    x = inputs.draw("gaussian", (9, 384), torch.float32, 0)
    q = quest.quantizer.parse(f"{grid}/hadamard16/clip{clip}/dense")
    apart = properties.mask(implementation(StrictClip(precision)), x, q)
    assert all(v.failure is None for v in apart), "only thresholds tell them apart"
    held, outer = exact_rows.on_threshold(clip, 16)
    exact = torch.from_numpy(exact_rows.rows(1, 32, 16, 0, held)).float()
    q = quest.quantizer.parse(f"{grid}:{outer!r}/identity/clip{clip}/dense")
    for impl, wrong in ((Paper(), False), (StrictClip(precision), True)):
        found = properties.exact_mask(implementation(impl), exact, q)
        assert any(v.failure for v in found) == wrong


def test_the_threshold_of_a_clip_is_met_and_never_left() -> None:
    for clip in (
        1.3,
        0.6,
        1.0,
        1.5,
        2.0,
        3.68,
        4.2,
        0.01,
        100.0,
        *np.linspace(0.3, 3.0, 99).tolist(),
    ):
        n, outer = exact_rows.on_threshold(clip, 16)
        narrow = np.float32(clip)
        assert float(np.float32(outer)) == outer
        # By the exact product of either constant, and by a reciprocal in float32.
        for constant in (clip, float(narrow)):
            assert Fraction(n, 16) <= Fraction(constant) * Fraction(outer)
            assert n / 16 <= float(np.float32(constant * outer)) <= n / 16 * (1 + 2**-22)
        assert np.float32(n / 16) * (np.float32(1) / np.float32(outer)) <= narrow
        rows = exact_rows.rows(3, 32, 16, 0, n)
        assert ((rows**2).mean(-1) == 256).all()
        assert (rows == n).any(-1).all()
        assert (rows == -n).any(-1).all()


def test_rows_are_others_for_each_seed_and_hold_their_values_anywhere() -> None:
    one, other = (exact_rows.rows(64, 32, 16, seed, 11) for seed in (0, 1))
    assert not (one == other).all()
    assert (one == exact_rows.rows(64, 32, 16, 0, 11)).all()
    for found in (one == 11, one == -11, np.abs(one) == np.abs(one).max(-1, keepdims=True)):
        assert found.any(0).mean() > 0.5


def dense(format: formats.Format) -> formats.Format:
    return dataclasses.replace(format, sparsity=None)


# What an adapter does wrong with sparsity alone: (property, function, what it gives).
SPARSE_FAULTS: dict[str, tuple[str, str, Any]] = {
    "all values": ("values", "fake_quantize", lambda x, f: Paper().fake_quantize(x, dense(f))),
    "the point of the code": ("values", "fake_quantize", lambda x, f: _decoded(x, f)),
    "nearly 0": ("values", "fake_quantize", lambda x, f: Paper().fake_quantize(x, f) + 2.0**-140),
    "nothing passes": ("mask", "mask", lambda x, f: Paper().mask(x, f) & False),
    "before pruning": ("mask", "mask", lambda x, f: Paper().mask(x, dense(f))),
    "kept ones alone": ("mask", "mask", lambda x, f: Paper().mask(x, f) & Paper().select(x, f)),
}


def _decoded(x: torch.Tensor, format: formats.Format) -> torch.Tensor:
    codes, sigma = Paper().quantize(x, format)
    return (Paper()._points(codes, format) * sigma.double()).to(x.dtype)


@pytest.mark.parametrize("name", SPARSE_FAULTS)
def test_faults_of_sparse_operands_are_found(name: str) -> None:
    property_, function, fault = SPARSE_FAULTS[name]
    judge = getattr(properties, property_)
    x = inputs.draw("gaussian", (9, 384), torch.float32, 0)

    def wrong(self: Any, x: torch.Tensor, format: formats.Format) -> torch.Tensor:
        right: torch.Tensor = getattr(Paper(), function)(x, format)
        return right if format.sparsity is None else fault(x, format)

    # Values are judged beside the codes, and where none are shown.
    for quantize in (Paper.quantize, *([None] if property_ == "values" else [])):
        made = type("Planted", (Paper,), {function: wrong, "quantize": quantize})
        alone = quest.quantizer.parse("uniform4/hadamard16/trust1.0/dense")
        assert [v.failure for v in judge(implementation(made()), x, alone)] == [None]
        for q in SPARSE[:2]:
            assert any(v.failure for v in judge(implementation(made()), x, q)), q


def test_the_smallest_example_names_its_layout() -> None:
    made = Court(implementation(planted("scale", lambda s: s + 1)))
    for layout, named in (("strided", " strided"), ("contiguous", "")):
        case = Case("gaussian", (3, 2), torch.float32, layout, 0)
        shown = f"(3, 2){named} float32 [["
        with pytest.raises(Rejected, match=re.escape(f"x = {shown}")):
            made.judge(properties.scale, {"x": case}, (case.make(), 2), "2")
        failure = made.record.failure
        assert failure is not None
        assert failure["tensors"]["x"].startswith(shown)
        assert case.code() in failure["snippet"].splitlines()


def test_bits_of_a_format_hold_all_its_levels() -> None:
    due = {"uniform1": 1, "ternary": 2, "uniform2": 2, "uniform3": 4, "lloyd_max4": 4,
           "uniform4": 4, "e2m1": 4, "uniform5": 8, "uniform8": 8}  # fmt: skip
    parsed = {name: quest.quantizer.parse(f"{name}/identity/ste/dense") for name in due}
    assert {name: formats.of(q, 16).bits for name, q in parsed.items()} == due


def test_what_is_not_declared_is_not_covered() -> None:
    """Whatever it is: a function, a capability that is needed besides, a value, a width."""
    declared = {"dtypes": ["float32"], "blocks": [2, 64], "max_width": 32, "bias": True}
    impl = implementation(SimpleNamespace(capabilities=declared, hadamard=print))

    def told(function: str, *needed: str, **params: Any) -> str | None:
        return axes.uncovered(impl, (function,), needed, params)

    assert told("hadamard", "bias", "blocks", dtype="float32", block=2) is None
    assert told("scale") == "no function scale(x, block)"
    for name in ("grids", "deterministic", "accumulator", "any_outer"):
        assert told("hadamard", "bias", name) == f"capabilities declare no {name}"
    assert told("hadamard", dtype="float16") == "capabilities['dtypes'] lacks float16"
    assert told("hadamard", block=4) == "capabilities['blocks'] lacks 4"
    narrow = "capabilities['max_width'] 32 is too narrow for block 64"
    assert told("hadamard", block=64) == narrow
    impl = dataclasses.replace(impl, missing="it is not installed")
    assert told("hadamard") == "it is not installed"


def test_bits_are_numbers() -> None:
    assert capabilities.check({"bits": [1, "8"]}, "Adapter").bits == (1, 8)


def test_declared_values_that_were_not_drawn_are_asked() -> None:
    """Behind a test's own draws, here a single one; those that can't be asked are told."""
    made, seen = asked.Asked(), []

    @hypothesis.settings(max_examples=1)
    @hypothesis.given(data=st.data())
    def test(data: st.DataObject, other: int) -> None:
        lacks = {"d": "no d"}.get
        seen.append((made.choose(data, "grid", "abcd", lacks), made.choose(data, "block", (1, 2))))
        assert other == 7
        made.judged()

    test(other=7)
    assert len(seen) == 1
    made.ask_rest(test, {"other": 7, "request": None})
    assert {grid for grid, _ in seen} == set("abc")
    assert made.told() == {"grid": ["a", "b", "c"], "block": [1, 2]}
    assert made.uncovered() == ["no d"]


def test_each_of_many_declared_values_is_asked() -> None:
    """More than would be drawn by chance."""
    made, letters = asked.Asked(), tuple("abcdefghijklmnopqrstuvwxyz")

    @hypothesis.settings(max_examples=1)
    @hypothesis.given(data=st.data())
    def test(data: st.DataObject) -> None:
        made.choose(data, "grid", letters)
        made.judged()

    test()
    made.ask_rest(test, {})
    assert made.told() == {"grid": [*letters]}
    assert made.uncovered() == []


@pytest.mark.parametrize(
    ("axis", "declared", "asked", "beyond"),
    [
        ("block", {"blocks": [24, 2]}, capabilities.BLOCKS, (24,)),
        ("grid", {"grids": ["uniform4", "lloyd_max8"]}, capabilities.GRIDS, ("lloyd_max8",)),
        ("estimator", {"estimators": ["trust1.5"]}, capabilities.ESTIMATORS, ("trust1.5",)),
        ("pattern", {"sparsities": ["1:2", "2:4"]}, capabilities.SPARSITIES, ("1:2",)),
        ("dtype", {"dtypes": ["float16"]}, ("float32",), ()),
    ],
)
def test_what_is_declared_beyond_is_asked(
    axis: str, declared: dict[str, Any], asked: tuple[Any, ...], beyond: tuple[Any, ...]
) -> None:
    checked = capabilities.check(declared, "Adapter")
    assert axes.values(axis, asked, checked) == (*asked, *beyond)


def test_no_declaration_widens_more_than_it_says() -> None:
    """A butterfly's sums or a dot product's; float32, or what is cut off and not rounded."""
    for rotation, sums in (
        ("butterfly", bounds.BUTTERFLY), ("product", bounds.Sums(roundings=48, last=False)),
    ):  # fmt: skip
        assert capabilities.check({"rotation": rotation}, "Adapter").sums(48) == sums
    units = {"int32": 1, "float64": 1, "float32": 1, "tensor-core": 2, None: 1}
    assert {*units} == {*capabilities.ACCUMULATORS, None}
    for name, count in units.items():
        declared = {} if name is None else {"accumulator": name}
        made = SimpleNamespace(capabilities=capabilities.check(declared, "Adapter"))
        assert properties._unit(made) == count * 2.0**-24  # type: ignore[arg-type]
        assert made.capabilities.wide == (name in ("int32", "float64"))


@pytest.mark.parametrize("name", capabilities.INPUTS)
def test_a_family_is_what_it_is_called(name: str) -> None:
    """Each input of it, and of several ones each kind."""
    declared = capabilities.check({"dtypes": ["float32"], "blocks": [2]}, "Adapter")
    seen: list[Case] = []

    @hypothesis.settings(max_examples=200, database=None, derandomize=True)
    @hypothesis.given(case=drawing.family(name, "float32", 2, declared, ties=True))
    def draw(case: Case) -> None:
        seen.append(case)

    draw()
    usual = {
        "distribution": {*drawing.TIED, *drawing.PLAIN}, "layout": {"contiguous"},
        "lead": {(1,), (3,), (7,), (17,)},
    }  # fmt: skip
    own: dict[str, dict[str, set[Any]]] = {
        "extremes": {"distribution": {"tiny", "subnormal", "huge", "mixed_rows"}},
        "non_finite": {"distribution": {"non_finite"}},
        "empty": {"lead": {(0,)}},
        "axes": {"lead": {(), (1, 1, 2), (2, 3)}},
        "layouts": {"layout": {*inputs.LAYOUTS} - {"contiguous"}},
    }
    found = {
        "distribution": {c.distribution for c in seen}, "layout": {c.layout for c in seen},
        "lead": {c.shape[:-1] for c in seen},
    }  # fmt: skip
    assert found == usual | own[name]


def _outcomes(**made: results.Outcome) -> results.Results:
    found = results.Results(implementation(Paper()), *(lists.Listed("", "", ()),) * 2)
    found.outcomes = {f"a.py::t[{name}]": outcome for name, outcome in made.items()}
    return found


def test_what_is_skipped_or_not_covered_is_not_judged() -> None:
    bare = {kind: results.Outcome(kind, {}) for kind in (results.SKIPPED, results.NOT_COVERED)}
    none = _outcomes(one=bare[results.SKIPPED], two=bare[results.NOT_COVERED])
    assert not none.judged()
    for kind in (results.PASSED, results.FAILED, results.EXPECTED, results.STALE):
        assert _outcomes(one=bare[results.SKIPPED], two=results.Outcome(kind, {})).judged()


@pytest.mark.parametrize("wrong", [results.FAILED, results.STALE])
def test_every_report_tells_the_worst(wrong: str) -> None:
    """Of all parameters: the largest ratio, all elements, and what failed before what passed."""
    records = [
        {"elements": n, "ratio": r, "points": []} for n, r in ((50, 0.5), (7, 2.5), (1, 0.1))
    ]
    kinds = (results.PASSED, wrong, results.PASSED)
    made = zip("abc", map(results.Outcome, kinds, records), strict=True)
    found = _outcomes(**dict(made))
    (property_,) = document.document(found)["properties"]
    assert (property_["ratio"], property_["elements"]) == (2.5, 58)
    assert property_["outcomes"] == {results.PASSED: 2, results.FAILED: 1}
    (line,) = [(text, color) for text, color in summary.lines(found) if text.startswith("a.py::t ")]
    assert line[0].split() == ["a.py::t", "2", "1", "0", "0", "0", "58", "2.5"]
    assert line[1] == "red"
    row = next(text for text in page._table(found) if "a.py::t" in text)
    assert 'class="failed"' in row
    assert re.findall(r'class="n">([^<]*)<', row) == ["2", "1", "", "", "", "58", "2.5"]


@pytest.mark.parametrize("when", ["setup", "call", "teardown"])
def test_a_test_that_fails_in_any_phase_has_failed(when: Any) -> None:
    taken = _outcomes()
    for phase in ("setup", "teardown") if when == "setup" else ("setup", "call", "teardown"):
        state: Any = "failed" if phase == when else "passed"
        taken.add(pytest.TestReport("::t", ("", 0, ""), {}, state, "why", phase,  # type: ignore[arg-type]
                                    user_properties=[(results.NAME, "t")]))  # fmt: skip
    assert taken.outcomes["t"].outcome == results.FAILED


def test_each_test_begins_anew() -> None:
    """What an adapter raised in another test is no failure that this one expects."""
    court = Court(implementation(Paper()))
    court.impl.raised[ValueError] = None
    before = court.record, court.asked
    court.start()
    assert not court.impl.raised
    assert all(a is not b for a, b in zip(before, (court.record, court.asked), strict=True))
    assert court.finish()["calls"] == 0


def test_what_raises_was_not_judged() -> None:
    """The value that was drawn for it is asked again, or told as not covered."""
    court = Court(implementation(Paper()))
    data = SimpleNamespace(draw=lambda strategy, label: "uniform4")

    def raises(*_: Any) -> list[Verdict]:
        raise KeyError("codes")

    for judge, judged in ((raises, []), (lambda *_: [Verdict("codes", 1)], ["uniform4"])):
        court.asked.choose(data, "grid", ["uniform4"])  # type: ignore[arg-type]
        with contextlib.suppress(KeyError):
            court.judge(judge, {}, (), "")
        assert court.asked.told() == {"grid": judged}


def test_all_that_an_adapter_raised_must_be_expected() -> None:
    due = lists.Listed("--xfails", "list", ("t",), {"t": "LookupError"})
    for raised, told in (
        ([KeyError, IndexError], None),
        ([KeyError, ValueError], "expected is LookupError, and the adapter raised ValueError"),
        ([], "expected is LookupError, and it was a wrong result"),
    ):
        impl = implementation(Paper())
        impl.raised.update(dict.fromkeys(raised))
        plugin = expected.ExpectedFailures(impl, due)
        assert plugin._unexpected("t", KeyError("codes")) == told


def test_a_record_is_of_all_verdicts() -> None:
    made = Court(implementation(Paper()))
    verdicts = [Verdict("a", 5, 0.75, ambiguous=1), Verdict("b", 7, 0.25, ambiguous=2)]
    made.judge(lambda impl: verdicts, {}, (), "")
    record = made.record
    assert (record.calls, record.elements, record.ratio, record.ambiguous) == (2, 12, 0.75, 3)


def test_every_declared_clip_is_asked() -> None:
    declared = capabilities.check({"estimators": ["ste", "clip1.5", "clip1.3"]}, "Adapter")
    assert axes.values("clip", ("clip1.3",), declared) == ("clip1.3", "clip1.5")


class Rude(Paper):
    """Breaks what holds for every function."""

    def __init__(self, how: str) -> None:
        self.how, self.calls = how, 0

    def hadamard(self, x: torch.Tensor, block: int) -> Any:
        self.calls += 1
        y = super().hadamard(x, block)
        if self.how == "input":
            x += 1
        elif self.how == "unwritten":
            out = torch.empty_like(y)
            out[:-1] = y[:-1]
            return out
        elif self.how == "unwritten, NumPy":
            array = np.empty(y.shape, np.float32)
            array[:-1] = y[:-1]
            return array
        elif self.how == "random":
            return y * (1 + self.calls * 2.0**-23)
        elif self.how == "list":
            return y.tolist()
        return y


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("input", "hadamard: input 0 was changed"),
        ("unwritten", "y differs between two runs"),
        ("unwritten, NumPy", "y differs between two runs"),
        ("random", "y differs between two runs"),
        ("list", "hadamard must return a torch tensor or a NumPy array, got <class 'list'>"),
    ],
)
def test_guards(how: str, told: str) -> None:
    with pytest.raises((GuardError, TypeError), match=told):
        failures("transform", Rude(how))


def test_one_of_several_outputs_is_named() -> None:
    made = planted("quantize", lambda r: (r[0], None))
    with pytest.raises(TypeError, match="quantize must return scale as a torch tensor or a NumPy"):
        failures("codes", made)


def test_what_python_allocates_is_poisoned() -> None:
    x = torch.zeros(3)
    with adapter.poisoned(0x55):
        made = [torch.empty(3), torch.empty_like(x), x.new_empty(3)]
        arrays = [np.empty(3, np.float32), np.empty_like(x.numpy())]
        single = [float(np.empty((), np.float32)), float(np.empty_like(np.float32(0)))]
    for t in (*made, *map(torch.from_numpy, arrays)):
        assert (t.view(torch.uint8) == 0x55).all()
    assert single == [0x55, 0x55]


def test_determinism_counts_where_it_is_declared() -> None:
    rude = Rude("random")
    rude.capabilities = Paper.capabilities | {"deterministic": False}
    assert failures("transform", rude) == []


def test_a_name_is_reported_once() -> None:
    taken = results.Results(implementation(Paper()), *(lists.Listed("", "", ()),) * 2)
    report = pytest.TestReport("::test_inputs", ("", 0, ""), {}, "passed", None, "call",
                               user_properties=[(results.NAME, "test_inputs")])  # fmt: skip
    taken.add(report)
    with pytest.raises(ValueError, match="two reports of test_inputs"):
        taken.add(report)


def test_the_worst_element_of_each_judgement_is_kept() -> None:
    made = Court(implementation(Paper()))
    bound = np.ones(8)
    for worst in range(1, 500):
        made._observe(np.full(8, 0.25) + (np.arange(8) == 3) * worst, bound)
    assert (1.0, 499.25) in made.record.points
    assert len(made.record.points) < 1000
    # The worst is the one that is nearest to its bound, or farthest beyond.
    made._observe(np.array([3.0, 0.5, 0.0, np.nan]), np.array([8.0, 1.0, 1.0, 1.0]))
    assert made.record.points[-1] == (1.0, 0.5)


class Declared(Paper):
    """`Paper`, with other declarations, and codes that are so many off."""

    def __init__(self, off: int = 0, **declared: Any) -> None:
        self.off, self.capabilities = off, Paper.capabilities | declared  # type: ignore[misc]

    def quantize(self, x: torch.Tensor, format: formats.Format) -> tuple[torch.Tensor, ...]:
        codes, scale = super().quantize(x, format)
        return codes + torch.where(codes > 0, -self.off, self.off), scale


@pytest.mark.parametrize(
    ("rotation", "block", "grid", "told"),
    [
        ("butterfly", 128, "uniform8", False), ("butterfly", 256, "uniform8", False),
        ("butterfly", 2048, "uniform8", True), ("product", 16, "uniform8", False),
        ("product", 128, "uniform8", True),
        ("product", 128, "uniform3", False), ("product", 1024, "uniform4", True),
        ("product", 128, "e2m1", False),
    ],
)  # fmt: skip
def test_codes_that_the_bound_leaves_open(rotation: str, block: int, grid: str, told: bool) -> None:
    """They are the bound's and fail nobody, but are told; others are looked at as ever."""
    court = Court(implementation(Declared(rotation=rotation, blocks=[block])))
    q = quest.Quantizer(quest.grids.parse(grid), quest.Hadamard(block), quest.STE())
    case = Case("gaussian", (64, 2048), torch.float32, "contiguous", 3)
    drawing.judge(court, properties.codes, case, q)
    court.settle()
    told_of = [f"{grid} in blocks of {block}" in line for line in court.asked.uncovered()]
    assert told_of == [True] * told
    (*_, strict) = properties.codes(court.impl, case.make(), q)
    assert strict.failure is None or told
    expected = strict.elements * bounds.ambiguous_share(
        q.grid.midpoints, block, court.impl.capabilities.sums(block)
    )
    # Five deviations of a count; and 2 percent for blocks, whose own sums of magnitudes spread by
    # 0.76 / sqrt(block) of the mean that is reckoned with, over a thousand and more of them.
    assert abs(strict.ambiguous - expected) <= 5 * expected**0.5 + 0.02 * expected
    court = Court(implementation(Declared(2, rotation=rotation, blocks=[block])))
    with pytest.raises(Rejected, match=r"codes are wrong|outside 0 to 14"):
        drawing.judge(court, properties.codes, case, q)


def test_ambiguous_codes_are_counted_against_codes_alone() -> None:
    """Over all calls; exact stages beside them must not dilute that, and ties do not count."""
    made = Court(implementation(Paper()))

    def judged(_: Any, ambiguous: int, **__: Any) -> list[Verdict]:
        return [Verdict("codes", 5_000, 0.5, ambiguous=ambiguous), Verdict("selection", 10**6)]

    for ambiguous, told in ((25, "inconclusive: 50 of 10000"), (5, None)):
        made.start()
        for _ in range(2):
            made.judge(judged, {}, (ambiguous,), "")
        made.judge(judged, {}, (4_000,), "", conclusive=False)
        with pytest.raises(Rejected, match=told) if told else contextlib.nullcontext():
            made.settle()
        assert (made.record.failure is None) == (told is None)


class ValuesAlone:
    """`Paper`, which shows neither codes nor scale."""

    def __init__(self, rotation: str) -> None:
        self.capabilities = Paper.capabilities | {"rotation": rotation}

    def fake_quantize(self, x: torch.Tensor, format: formats.Format) -> torch.Tensor:
        return Paper().fake_quantize(x, format)

    def select(self, x: torch.Tensor, format: formats.Format) -> torch.Tensor:
        return Paper().select(x, format)


def test_values_of_sparse_operands_without_codes() -> None:
    made = ValuesAlone("butterfly")
    for seed, kind in enumerate(("gaussian", "zeros", "mixed_rows", "non_finite")):
        x = inputs.draw(kind, (9, 384), torch.float32, seed)
        for q in SPARSE:
            found = properties.values(implementation(made), x, q, conclusive=False)
            assert [v.failure for v in found] == [None]
    made.select = lambda x, format: x  # type: ignore[method-assign]
    found = properties.values(implementation(made), x, SPARSE[0])
    assert [v.stage for v in found if v.failure] == ["keep"]


def test_values_are_held_to_the_declared_sums() -> None:
    q = quest.quantizer.parse("uniform8/hadamard1024/ste/dense")
    x = inputs.draw("gaussian", (4, 1024), torch.float32, 0)
    made = [implementation(ValuesAlone(rotation)) for rotation in capabilities.ROTATIONS]
    found = [properties.values(impl, x, q, conclusive=False)[0] for impl in made]
    assert [v.failure for v in found] == [None, None]
    assert found[0].ambiguous < found[1].ambiguous


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format_", FORMATS)
def test_values_without_codes_hold(format_: str, dtype: torch.dtype) -> None:
    lane = lanes.Lane("torch-cpu", "cpu", "dispatch")
    q = quest.Quantizer(FORMATS[format_], quest.Hadamard(32), quest.STE())
    for seed, kind in enumerate(inputs.DISTRIBUTIONS):
        x = inputs.draw(kind, (7, 96), dtype, seed)
        made = lane.call("fake_quantize", x, q=q)["values"]
        propagated.valued(x, q, made, conclusive=False).require()


@pytest.mark.parametrize(
    "fault",
    [
        lambda x, v, q: v * (1 + 2.0**-17),
        lambda x, v, q: torch.where(v == v.amax(), v.amin(), v),
        lambda x, v, q: quest.Quantizer(quest.grids.uniform(5), q.transform, q.estimator)(x),
        lambda x, v, q: quest.Quantizer(q.grid, quest.Hadamard(16), q.estimator)(x),
        lambda x, v, q: v + 2 * q.grid.step * (x == x.amax()),
        lambda x, v, q: torch.where(v == 0, v, torch.nan),
    ],
    ids=("scale", "one value", "other bits", "other block", "two steps", "NaN"),
)
def test_values_without_codes_bite(fault: Any) -> None:
    q = quest.Quantizer(quest.grids.uniform(4), quest.Hadamard(32), quest.STE())
    x = inputs.draw("gaussian", (7, 96), torch.float32, 0)
    assert propagated.valued(x, q, q(x)).failure is None
    assert propagated.valued(x, q, fault(x, q(x), q)).failure is not None


def test_a_value_without_its_code_is_held_to_the_last_one_inside_the_bound() -> None:
    """The product's roundings, the error of the scale, and one rounding to the output."""
    q = quest.quantizer.parse("uniform4/identity/ste/dense")
    x = inputs.draw("gaussian", (1, 64), torch.float32, 3)
    sigma = float(x.double().square().mean().sqrt())
    made = q(x).double()
    at = int(made.abs().argmax())
    point = round(made[0, at].item() / sigma / q.grid.step - 0.5) + 0.5
    expected = point * q.grid.step * sigma
    scale = float(bounds.scale(x.double().numpy(), 1, np.array([[sigma]]))[0, 0])
    error = float(bounds.gamma(bounds.VALUE_ROUNDINGS, bounds.U32)) * abs(expected)
    error += abs(point) * q.grid.step * scale * (1 + bounds.U32) + bounds.ETA32
    bound = float(bounds.output(np.array([expected]), np.array([error]), "float32")[0])
    assert 2 * 2.0**-24 < bound / abs(expected) < 64 * 2.0**-24
    for end in (expected - bound, expected + bound):
        inside = np.float32(end)
        if abs(float(inside) - expected) > bound:
            inside = np.nextafter(inside, np.float32(expected))
        beyond = np.nextafter(inside, np.float32(2 * end - expected))
        for value, wrong in ((inside, False), (beyond, True)):
            values = made.clone()
            values[0, at] = float(value)
            found = propagated.valued(x, q, values.float(), conclusive=False)
            assert (found.failure is not None) == wrong


def test_either_code_is_admissible_as_far_as_the_margin_reaches() -> None:
    q = quest.quantizer.parse("uniform4/identity/ste/dense")
    x = inputs.draw("gaussian", (1, 64), torch.float32, 3)
    middle, seen = q.grid.step, []
    for _ in range(50):  # on a midpoint of the scale that it is part of itself
        x[0, 0] = middle * x.double().square().mean().sqrt()
    start = x[0, 0].numpy().view(np.int32).item()
    for ulps in range(-60, 61):
        x[0, 0] = float(np.int32(start + ulps).view(np.float32))
        x64 = x.double().numpy()
        sigma = np.sqrt((x64**2).mean(-1, keepdims=True))
        share = float((bounds.scale(x64, 1, sigma) / sigma)[0, 0])
        margin = float(bounds.code_margin(x64, 1, sigma)[0, 0])
        z = x64[0, 0] / float(sigma[0, 0])
        reach = (margin + abs(z) * share) / (1 - share)
        values = q(x)
        # What the other of the two codes would give.
        values[0, 0] = (0.5 if z >= middle else 1.5) * q.grid.step * float(sigma[0, 0])
        found = propagated.valued(x, q, values, conclusive=False)
        assert (found.failure is None) == (abs(z - middle) <= reach), ulps
        assert found.ambiguous == (abs(z - middle) <= reach)
        seen.append(found.failure is None)
    assert seen[0] is seen[-1] is False
    assert 3 <= sum(seen) <= 60


def test_a_scale_of_few_units_does_not_excuse_another_code() -> None:
    """Only one that is no more than its own error does."""
    q = quest.quantizer.parse("uniform4/identity/ste/dense")
    x = inputs.draw("gaussian", (4, 64), torch.float32, 0) * 2.0**-142
    sigma = float(x[2].double().square().mean().sqrt())
    values = q(x)
    assert propagated.valued(x, q, values, conclusive=False).failure is None
    values[2, 3] += (2 if values[2, 3] < 0 else -2) * q.grid.step * sigma
    assert propagated.valued(x, q, values, conclusive=False).failure is not None


def test_what_is_pruned_has_no_code_that_is_ambiguous() -> None:
    """Of rows whose even numbers are midpoints; sums that are exactly 0 are 0 in any order."""
    q = quest.quantizer.parse("uniform4:1.875/identity/ste/dense")
    x = torch.from_numpy(exact_rows.rows(4, 32, 8, 0)).float()
    ties = (x % 2 == 0) & (x != 0) & (x.abs() <= 14)
    for keep in (ties | True, torch.arange(32) % 2 == 0):
        keep = keep.expand(x.shape)
        found = propagated.valued(x, q, torch.where(keep, q(x), 0.0), keep, conclusive=False)
        assert (found.failure, found.ambiguous) == (None, int((ties & keep).sum()))


@pytest.mark.parametrize(("missing", "stale"), [(None, 2), ("it is not installed", 0)])
def test_lists_are_checked_where_something_is_asked(missing: str | None, stale: int) -> None:
    impl = dataclasses.replace(implementation(Paper()), missing=missing)
    given = (lists.Listed("--skips", "a", ("x", "y")), lists.Listed("--xfails", "b", ("z",)))
    found = results.Results(impl, *given)
    assert found.skips.match("x")
    assert [found.skips.option, found.xfails.origin] == ["--skips", "b"]
    assert len([*found.skips.stale(), *found.xfails.stale()]) == stale


def test_a_list_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(b"\xff\xfe")
    with pytest.raises(lists.ListError, match=r"--xfails .*list: it is no text: 'utf-8'"):
        lists.read("--xfails", str(tmp_path / "list"))


def test_parameters_with_spaces(tmp_path: Path) -> None:
    """Declared values keep them."""
    (tmp_path / "list").write_text("a.py::t[clip 1.7-float32]\na.py::u[clip 1.7]  KeyError # so\n")
    found = lists.read("--xfails", str(tmp_path / "list"))
    assert found.entries == ("a.py::t[clip 1.7-float32]", "a.py::u[clip 1.7]")
    assert [found.raises(name) for name in found.entries] == [None, "KeyError"]


def test_somebody_s_own_expected_failure_is_left_alone() -> None:
    """A test of one name beside the court's; and one that failed in no call."""
    listed = lists.Listed("--xfails", "list", ("a.py::t",), {"a.py::t": "ValueError"})
    hook = expected.ExpectedFailures(implementation(Paper()), listed)

    def outcome(of_court: bool, error: BaseException | None) -> Any:
        item: Any = SimpleNamespace(
            path=Path("a.py"), name="t", get_closest_marker=lambda name: of_court or None
        )
        call: Any = SimpleNamespace(excinfo=error and SimpleNamespace(value=error))
        report = SimpleNamespace(outcome="skipped", wasxfail="", sections=[], user_properties=[])
        run = hook.pytest_runtest_makereport(item, call)
        next(run)
        with pytest.raises(StopIteration) as ended:
            run.send(report)  # type: ignore[arg-type]
        assert ended.value.value is report
        return report.outcome

    assert outcome(True, Rejected("wrong")) == "failed"
    assert outcome(False, Rejected("wrong")) == "skipped"
    assert outcome(True, None) == "skipped"
    group = ExceptionGroup("several", [ValueError(), ExceptionGroup("more", [Rejected("wrong")])])
    hook.impl.raised[ValueError] = None
    assert outcome(True, group) == "failed"
    assert outcome(True, ExceptionGroup("several", [ValueError()])) == "skipped"


class _Outer:
    class Nested(OSError):
        """Of another class."""


@pytest.mark.parametrize(
    "name", ["Nested", "_Outer.Nested", f"{__name__}._Outer.Nested", "OSError"]
)
def test_names_of_an_exception(name: str) -> None:
    assert name in expected._names(_Outer.Nested)
    assert name not in expected._names(KeyError)


def test_what_an_expected_failure_raises(tmp_path: Path) -> None:
    """Said of some parameters before all; a list of what is skipped has names alone."""
    (tmp_path / "list").write_text("a.py::t ValueError  # told\n\na.py::t[1]\na.py::u KeyError\n")
    found = lists.read("--xfails", str(tmp_path / "list"))
    assert found.entries == ("a.py::t", "a.py::t[1]", "a.py::u")
    names = ("a.py::t", "a.py::t[2]", "a.py::t[1]", "a.py::u[1]", "a.py::v")
    expected = ["ValueError", "ValueError", None, "KeyError", None]
    assert [found.raises(name) for name in names] == expected
    with pytest.raises(lists.ListError, match=r"'a.py::t ValueError' is more than a name$"):
        lists.read("--skips", str(tmp_path / "list"))
    (tmp_path / "list").write_text("a.py::t ValueError KeyError\n")
    with pytest.raises(lists.ListError, match=r"is more than a name, or a name and an exception$"):
        lists.read("--xfails", str(tmp_path / "list"))


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ("departures = 5", "Mine.departures must be a list of sentences, got 5"),
        ("departures = 'one'", "Mine.departures must be a list of sentences, got 'one'"),
        ("departures = [1]", r"Mine.departures must be a list of sentences, got \[1\]"),
        ("__init__ = lambda self: exit(3)", r"Mine\(\) raised SystemExit: 3"),
        ("unavailable = lambda self: exit(3)", r"unavailable\(\) raised SystemExit: 3"),
        ("unavailable = lambda self: 1 // 0", r"unavailable\(\) raised ZeroDivisionError"),
    ],
)
def test_what_an_adapter_says_of_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str, told: str
) -> None:
    name = f"adapter_{tmp_path.name}"
    text = "from quest.conformance.adapters.published import Paper\n"
    (tmp_path / f"{name}.py").write_text(f"{text}class Mine(Paper):\n    {made}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(capabilities.AdapterError, match=told):
        adapter.load(f"{name}:Mine")


def test_all_that_knows_the_rules_on_ambiguous_codes_is_judged_by_drawing() -> None:
    """Which knows where they can't be applied."""
    folder = Path(drawing.__file__).parent
    texts = [path.read_text() for path in folder.glob("test_*.py")]
    assert sum("drawing.judge(court, properties." in text for text in texts) > 1
    assert not [t for t in texts if re.search(r"court\.judge\(properties\.(codes|values|mask),", t)]
