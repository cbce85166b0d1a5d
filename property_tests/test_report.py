"""The page of `quest verify --html`: whole in itself, and it says what the run found."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import quest
from property_tests.lane_marks import every_dtype, every_lane
from property_tests.ledger import Ledger, slowest
from quest import cli
from quest.conformance import lanes, oracle, pictures, report
from quest.conformance.strategies import FORMATS
from quest.conformance.verdict import BINS, Rejected, Tally, Verdict, spread

CPU = lanes.all_lanes()[0]
PASSED = {
    "lane": "torch-cpu", "kernel": "hadamard", "format": "order 128", "dtype": "float32",
    "elements": 1000, "ratio": 0.4321, "ambiguous": 7, "verdict": "pass", "problems": [],
    "stages": {"transform": 0.4321}, "spread": {"transform": [900, 100] + [0] * (BINS - 2)},
}  # fmt: skip
TOLD = "transform: at (0, 1) it is <b> & 2.5 times the bound"


def page(*rows: dict[str, Any], formats: tuple[str, ...] = ("uniform2",)) -> str:
    document = {"machine": {"torch": "9.9", "gpu": None}, "seconds": 3.2, "rows": rows}
    known = {name: FORMATS[name] for name in {*formats, *(g for g, _ in report.MASKS.values())}}
    return report.page(document, CPU, {"triton-cuda": "no CUDA device"}, known)


@pytest.fixture(scope="module")
def text() -> str:
    failed = copy.deepcopy(PASSED) | {
        "lane": "torch-cuda", "ratio": 2.5, "verdict": "FAIL", "problems": [TOLD]
    }  # fmt: skip
    other = copy.deepcopy(PASSED) | {"dtype": "bfloat16", "ratio": 0.9}
    third = copy.deepcopy(PASSED) | {"dtype": "float16", "ratio": 0.0}
    return page(PASSED, other, third, failed)


class Balanced(HTMLParser):
    """Raises where a tag closes what is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in ("meta", "path", "use", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_in_itself(text: str) -> None:
    # Nothing to load: no address but the names of SVG's own vocabulary, no script.
    assert set(re.findall(r"https?://[^\"' ]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "<script" not in text
    assert "src=" not in text
    assert "@import" not in text


def test_tags_and_ids(text: str) -> None:
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    assert used <= set(parser.ids)
    assert used


def test_pictures_are_svg_in_the_page_s_colours(text: str) -> None:
    drawn = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(drawn) == 1 + len(report.MASKS) + len({g for g, _ in report.MASKS.values()})
    for svg in drawn:
        root = ET.fromstring(svg)
        assert root.get("viewBox")
        assert root.get("width") is None  # the page decides
        assert root.get("aria-label")
    for colour, variable in pictures.VARIABLES.items():
        assert colour not in text
        assert f"var({variable})" in text
        assert text.count(f"{variable}: #") == 2  # light and dark
    # What is left are colours that a reader in the dark would not see.
    assert not re.findall(r"#0{3,6}\b|#f{6}\b", "".join(drawn))


def test_what_failed_is_told_and_escaped(text: str) -> None:
    assert "1 of 4 rows fail" in text
    assert "&lt;b&gt; &amp; 2.5 times the bound" in text
    assert "<b>" not in text
    fine = page(PASSED)
    assert "all 1 rows pass" in fine
    assert "What failed" not in fine


def test_heat_map_has_every_lane(text: str) -> None:
    heat = re.search(r'<table class="heat">.*?</table>', text, flags=re.DOTALL)
    assert heat is not None
    assert re.findall(r'colspan="3">([^<]+)<', heat[0]) == [
        "torch-cpu", "torch-cuda", "triton-cuda"
    ]  # fmt: skip
    cells = re.findall(r'<td class="(\w+)"[^>]*>([^<]+)<', heat[0])
    assert cells == [
        ("ok", "0.43"), ("ok", "0.90"), ("ok", "0.00"),
        ("fail", "2.50 FAIL"), *[("none", "·")] * 5,
    ]  # fmt: skip


def test_table_and_machine(text: str) -> None:
    assert "<td>hadamard</td><td>order 128</td><td>float32</td>" in text
    assert '<td class="n">0.432</td><td>transform</td><td class="n">7</td>' in text
    assert "<dt>torch</dt><dd>9.9</dd>" in text
    assert "<dt>not run: triton-cuda</dt><dd>no CUDA device</dd>" in text


@pytest.mark.parametrize(
    ("name", "edges"),
    [
        # Where the method puts them: clip 1.3 alpha, and alpha + T for trust.
        ("1 bit, clip 1.3", (1.3 * FORMATS["uniform1"].outer,)),
        ("2 bits, trust", (FORMATS["uniform2"].outer + FORMATS["uniform2"].half_gap,)),
    ],
)
def test_mask_that_is_drawn(name: str, edges: tuple[float]) -> None:
    grid, estimator = report.MASKS[name]
    q = quest.Quantizer(FORMATS[grid], quest.Hadamard(128), estimator)
    bins = np.linspace(-3, 3, 121)
    t, values, share = pictures.measured(CPU, q, bins)
    middle = np.abs(bins[1:] + bins[:-1]) / 2
    assert (share[middle < edges[0] - 0.05] == 0).all()
    assert (share[middle > edges[0] + 0.05] == 1).all()
    assert np.allclose(np.unique(values), oracle.grid(FORMATS[grid]).points, rtol=1e-12)
    assert t.shape == values.shape


def test_spread() -> None:
    ratio = np.array([0.0, 0.01, 0.049, 0.05, 0.5, 0.999, 1.0, 7.0, np.inf])
    counts = spread(ratio)
    assert sum(counts) == ratio.size
    assert {i: n for i, n in enumerate(counts) if n} == {0: 3, 1: 1, 10: 1, 19: 4}
    tally = Tally()
    tally.add(Verdict("x", 9, spread=counts))
    tally.add(Verdict("x", 9))
    other = Tally()
    other.merge(tally)
    other.merge(tally)
    assert other.spread == [2 * n for n in counts]


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_a_file_that_can_t_be_written_is_told_before_the_run(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object) -> None:
        raise AssertionError("the run began")

    monkeypatch.setattr("quest.conformance.verify.rows", started)
    missing = tmp_path / "none" / "report"
    assert cli.main(["verify", option, str(missing)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"quest verify: {option} {missing}: the folder ")
    assert told.endswith("none does not exist\n")
    assert cli.main(["verify", option, str(tmp_path)]) == 2
    assert "directory" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is a folder, and must be a file"):
        report.check(option, tmp_path)


def test_one_file_for_both_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "report")
    assert cli.main(["verify", "--json", path, "--html", path]) == 2
    assert "--json and --html must be two files" in capsys.readouterr().err


def test_closest_ratios_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    # What a worker sends is plain data; the controller adds it up.
    gathered = Ledger()
    for test, ratio in (("a.py::one[float32]", 0.3), ("b.py::two", 0.7), ("c.py::three", 0.5)):
        monkeypatch.setenv("PYTEST_CURRENT_TEST", f"{test} (call)")
        worker = Ledger()
        worker.judge(CPU, [Verdict("scale", 10, ratio), Verdict("codes", 10)], "")
        gathered.merge(json.loads(json.dumps(worker.dump())))
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "d.py::four (call)")
    other = Ledger()
    other.judge(CPU, [Verdict("values", 5, 0.6)], "")
    gathered.merge(other.dump())
    assert gathered.closest(5) == [
        "0.700  torch-cpu, scale: b.py::two",
        "0.600  torch-cpu, values: d.py::four",
    ]
    assert gathered.closest(1) == gathered.closest(5)[:1]
    assert gathered.tallies["torch-cpu", "scale"].elements == 30


def test_a_ledger_raises_for_a_failure_and_enters_nothing() -> None:
    ledger = Ledger()
    verdicts = [Verdict("scale", 4, 0.5), Verdict("codes", 4, 2.0, failure="one is wrong")]
    with pytest.raises(Rejected, match=r"^torch-cpu, codes: one is wrong\nTo reproduce:\nsnippet"):
        ledger.judge(CPU, verdicts, "snippet")
    assert list(ledger.tallies) == [("torch-cpu", "scale")]


def test_a_ledger_tells_what_only_its_sums_show() -> None:
    ledger = Ledger()
    for _ in range(10):  # 5 flips up are chance, 50 are not
        ledger.judge(CPU, [Verdict("codes", 100_000, 0.9, ambiguous=5, up=5)], "")
    assert ledger.problems() == [
        "torch-cpu, codes: one-sided: 50 ambiguous codes went up, 0 down",
    ]


def test_what_only_the_sums_over_processes_show() -> None:
    gathered = Ledger()
    for n in range(10):
        worker = Ledger()
        flips = Verdict("codes", 1000, n / 10, ambiguous=5, up=5)
        worker.judge(CPU, [flips, Verdict("scale", 5, 1 - n / 10)], "")
        assert not worker.problems()
        gathered.merge(json.loads(json.dumps(worker.dump())))
    assert gathered.problems() == [
        "torch-cpu, codes: inconclusive: 50 of 10000 codes are ambiguous",
        "torch-cpu, codes: one-sided: 50 ambiguous codes went up, 0 down",
    ]
    tallies = gathered.tallies
    assert [tallies["torch-cpu", stage].ratio for stage in ("codes", "scale")] == [0.9, 1.0]
    assert [tallies["torch-cpu", "codes"].calls, tallies["torch-cpu", "scale"].elements] == [10, 50]
    # Of ties nothing is counted, and failures of any process are kept.
    ties = Ledger()
    ties.judge(CPU, [Verdict("codes", 1000, ambiguous=500, up=500)], "", conclusive=False)
    assert not ties.problems()
    sums, failed = Tally(), Tally()
    failed.add(Verdict("codes", 1, failure="one is wrong"))
    sums.merge(failed)
    assert sums.problems() == ["codes: one is wrong"]


def test_a_run_fails_for_its_sums(
    pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process, and where a worker sends what it has judged."""
    plugins = pytestconfig.pluginmanager.get_plugins()
    conftest: Any = next(p for p in plugins if hasattr(p, "_gathered"))
    one_sided = Ledger()
    one_sided.judge(CPU, [Verdict("codes", 10**6, ambiguous=50, up=50)], "")
    config = SimpleNamespace(workeroutput={})
    for ledger, status in ((Ledger(), 0), (one_sided, 1)):
        monkeypatch.setattr(conftest, "LEDGER", ledger)
        monkeypatch.setattr(conftest, "_gathered", Ledger())
        session = SimpleNamespace(config=SimpleNamespace(), exitstatus=0)
        conftest.pytest_sessionfinish(session)
        assert session.exitstatus == status
        conftest.pytest_sessionfinish(SimpleNamespace(config=config, exitstatus=0))
        monkeypatch.setattr(conftest, "LEDGER", Ledger())
        monkeypatch.setattr(conftest, "_gathered", Ledger())
        conftest.pytest_testnodedown(config)
        session = SimpleNamespace(config=SimpleNamespace(), exitstatus=0)
        conftest.pytest_sessionfinish(session)
        assert session.exitstatus == status


def test_only_what_this_machine_lacks_is_skipped() -> None:
    """And Triton's interpreter is lacked nowhere where Triton is installed."""

    def of(lane: lanes.Lane) -> None: ...

    made = every_lane(of).pytestmark[0].args[1]
    found = {str(p.values[0]): [m.kwargs["reason"] for m in p.marks] for p in made}
    gpu = torch.cuda.is_available()
    triton = importlib.util.find_spec("triton") is not None
    absent = [] if triton else ["Triton is not installed"]
    assert found == {
        "torch-cpu": [], "triton-interpreter": absent,
        "torch-cuda": [] if gpu else ["no CUDA device"],
        "triton-cuda": absent if gpu else ["no CUDA device"],
    }  # fmt: skip


def test_no_dtype_is_left_out() -> None:
    def of(dtype: torch.dtype) -> None: ...

    mark = every_dtype(of).pytestmark[0]
    assert set(mark.args[1]) == {torch.float32, torch.bfloat16, torch.float16}
    assert mark.kwargs["ids"] == [str(d).removeprefix("torch.") for d in mark.args[1]]


def test_slowest_tests_add_up_their_phases() -> None:
    phases = [("a", 1.0), ("b", 2.5), ("a", 2.0), ("c", 0.1)]
    reports = [SimpleNamespace(nodeid=n, duration=s) for n, s in phases]
    assert slowest(reports, 2) == ["   3.0 s  a", "   2.5 s  b"]
