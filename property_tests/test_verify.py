"""`quest verify`: what it judges, what it writes, and that it fails where it must."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import quest
from quest import eager
from quest.conformance import examine, lanes, verify
from quest.conformance.verdict import Verdict

CPU = lanes.all_lanes()[0]


def row(judge: object) -> verify.Row:
    return verify.Row(CPU, "kernel", "format", torch.float32, judge)  # type: ignore[arg-type]


def test_quick_run_passes_and_writes_json_and_html(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, page = tmp_path / "report.json", tmp_path / "report.html"
    assert verify.run(path, ("torch-cpu",), quick=True, html_path=page) == 0
    assert "all 28 rows pass" in page.read_text()
    report = json.loads(path.read_text())
    assert len(report["rows"]) == len(list(verify.rows(CPU, quick=True)))
    assert all(r["verdict"] == "pass" and r["elements"] > 10_000 for r in report["rows"])
    assert report["machine"]["torch"] == torch.__version__
    assert "28 of 28 rows pass" in capsys.readouterr().out


def test_sums_in_float32_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which those of quantized rows do not show."""
    monkeypatch.setattr(eager, "accumulate", lambda a, b: (a.float() @ b.float().t()).int())
    judged = verify._products(CPU, "w4a4", torch.float32)
    failed = [v for verdicts in judged for v in verdicts if v.failure is not None]
    assert {v.stage for v in failed} == {"accumulators"}


def test_a_worse_ratio_than_recorded_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = tmp_path / "ratios.json"
    recorded.write_text(json.dumps({"torch-cpu/hadamard/order 128/float32/transform": 0.1}))
    monkeypatch.setattr(verify, "RECORDED", recorded)
    assert verify.run(None, ("torch-cpu",), quick=True) == 1
    out = capsys.readouterr().out
    assert "over 1.5 times the recorded 0.100" in " ".join(out.split())
    assert "27 of 28 rows pass" in out


def test_record_keeps_what_other_lanes_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = tmp_path / "ratios.json"
    recorded.write_text(json.dumps({"other/lane": 0.5}))
    monkeypatch.setattr(verify, "RECORDED", recorded)
    assert verify.run(None, ("torch-cpu",), quick=True, record=True) == 0
    ratios = json.loads(recorded.read_text())
    assert ratios["other/lane"] == 0.5
    assert 0 < ratios["torch-cpu/quantize/uniform4/float32/values"] <= 1


def test_a_lane_that_raises_fails_its_row() -> None:
    def broken() -> list[list[Verdict]]:
        raise RuntimeError("no such kernel")

    assert verify._examine(row(broken), {})[1] == ["RuntimeError: no such kernel"]


def test_each_stage_has_its_own_record() -> None:
    judged = [[Verdict("scale", 10, 0.3), Verdict("values", 10, 0.9)]]
    known = {"torch-cpu/kernel/format/float32/scale": 0.1}
    tallies, problems = verify._examine(row(lambda: judged), known)
    assert {k: t.ratio for k, t in tallies.items()} == {"scale": 0.3, "values": 0.9}
    assert problems == ["scale: worst ratio 0.300 is over 1.5 times the recorded 0.100"]


def test_ambiguous_codes_are_counted_against_codes_alone() -> None:
    # 60 of 10000 codes are too many; exact stages beside them must not dilute that.
    judged = [[Verdict("codes", 10_000, 0.5, ambiguous=60), Verdict("packed codes", 10**6)]]
    assert "inconclusive: 60 of 10000" in verify._examine(row(lambda: judged), {})[1][0]


@pytest.mark.parametrize(
    ("names", "message"),
    [(("nonsense",), "lane must be one of torch-cpu, .* got 'nonsense'")],
)
def test_unknown_lane(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verify.run(None, names)


def test_json_into_a_missing_folder_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        verify.run(tmp_path / "none" / "x.json")


def test_the_record_in_the_repository_names_rows_that_exist(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Whatever this machine lacks: the record is of several.
    for module in (verify, lanes):
        monkeypatch.setattr(module, "no_product", lambda lane: None)
    names = {r.key for lane in lanes.all_lanes() for r in verify.rows(lane, quick=False)}
    for key in json.loads(verify.RECORDED.read_text()):
        assert key.rpartition("/")[0] in names


def _asked(row: verify.Row, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What a row asks of the court, and of what; nothing is computed."""
    asked: list[tuple[str, dict[str, Any]]] = []
    for name in ("transform", "quantizer", "backward", "layer", "frozen", "encoded", "operand",
                 "gated", "normed", "accumulators", "product"):  # fmt: skip
        signature = inspect.signature(getattr(examine, name))

        def examined(*given: Any, _told: Any = (name, signature), **more: Any) -> list[Verdict]:
            name, signature = _told
            bound = signature.bind(*given, **more)
            bound.apply_defaults()
            asked.append((name, bound.arguments))
            return [Verdict(name, 1)]

        monkeypatch.setattr(examine, name, examined)
    row.judge()
    return asked


def _values(asked: list[tuple[str, dict[str, Any]]], name: str) -> list[Any]:
    return [given[name] for _, given in asked if name in given]


def test_each_row_asks_what_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel, format and dtype of its name; of inputs that differ, extremes among them."""
    for row in verify.rows(CPU, quick=False):
        with monkeypatch.context() as patch:
            asked = _asked(row, patch)
        drawn = [t for name in ("x", "grad", "gate") for t in _values(asked, name)
                 if isinstance(t, torch.Tensor)]  # fmt: skip
        assert drawn, row.key
        assert all(t.numel() > 100 and t.dtype == row.dtype for t in drawn), row.key
        functions = {name for name, _ in asked}
        extremes = ["hadamard", "quantize", "backward", "encode", "gated", "normed"]
        if row.kernel in extremes:
            assert sum(not t.isfinite().all() for t in drawn) > 0, row.key
            assert sum(t.numel() > 0 and bool((t.abs().amax(-1) == 0).any()) for t in drawn), (
                row.key
            )
        assert len({t.sum().item() for t in drawn if t.isfinite().all()}) > 2, row.key
        recipes = [r.name for r in _values(asked, "made")]
        given = {name: [v is not None and v is not False for v in _values(asked, name)]
                 for name in ("bias", "gate", "residual", "rotary")}  # fmt: skip
        match row.kernel:
            case "hadamard":
                assert functions == {"transform"}
                assert set(_values(asked, "transpose")) == {False, True}
                assert {f"order {n}" for n in _values(asked, "order")} == {row.format}
            case "quantize":
                assert functions == {"quantizer"}
                grid, _, sparsity = row.format.partition(" ")
                for q in _values(asked, "q"):
                    assert q.grid == verify.FORMATS[grid]
                    assert q.sparsity == (verify.SPARSE[sparsity] if sparsity else None)
            case "backward":
                assert functions == {"backward"}
                assert {f"order {n}" for n in _values(asked, "order")} == {row.format}
                assert all(len(mask.unique()) > 50 for mask in _values(asked, "mask"))
            case "linear" | "integers" | "frozen":
                assert functions == {"frozen" if row.kernel == "frozen" else "layer"}
                assert set(recipes) == {row.format}
                assert all(given["bias"])
                path = "values" if row.kernel == "linear" else "integers"
                assert set(_values(asked, "path")) <= {path}
            case "encode":
                assert functions == {"encoded", "operand"}
                made = quest.recipe(row.format)
                assert set(_values(asked, "q")) == {made.activation, made.weight}
            case "gated" | "normed":
                assert functions == {row.kernel}
                assert set(_values(asked, "q")) == {quest.recipe(row.format).activation}
                assert set(given["residual"]) == (
                    {False, True} if row.kernel == "normed" else set()
                )
            case _:
                own = {"accumulators"} if row.kernel == "product" else set()
                assert functions == {"product"} | own
                assert set(recipes) == {row.format}
                assert all(given["bias"])
                for name, kernel in (("gate", "gated product"), ("residual", "added product"),
                                     ("rotary", "rotated product")):  # fmt: skip
                    assert set(given[name]) == {row.kernel == kernel}, row.key
