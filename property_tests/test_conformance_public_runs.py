"""Whole runs of the public court, as a user starts them: outcomes, lists, reports, exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from quest.conformance import plugin as court_plugin
from quest.conformance.public import adapter
from quest.conformance.verdict import Rejected

ROOT = Path(__file__).resolve().parents[1]
PATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))

# A right transform, packing with swapped nibbles, an unpacking that fails only where it is listed.
USER = """
import numpy as np


class Adapter:
    capabilities = {"arrays": "numpy", "dtypes": ["float32"], "blocks": [2, 16], "bits": [4],
                    "rotation": "product", "deterministic": True}
    departures = ["nibbles are swapped"]

    def hadamard(self, x, block):
        h = np.ones((1, 1), np.float32)
        while len(h) < block:
            h = np.block([[h, h], [h, -h]])
        return ((x.reshape(-1, block) @ h) * np.float32(block**-0.5)).reshape(x.shape)

    def hadamard_transpose(self, x, block):
        y = self.hadamard(x, block)
        y[..., -1:] *= -1
        return y

    def pack(self, codes, bits):
        codes = np.pad(codes, ((0, 0), (0, -codes.shape[-1] % 2)))
        return codes[:, 1::2] | codes[:, ::2] << 4

    def unpack(self, packed, bits, width):
        return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)[:, :width]

    def scail(self, x, block):
        return x
"""


def court(
    where: Path, *arguments: str, plugin: bool = True, tests: tuple[str, ...] = ("",)
) -> subprocess.CompletedProcess[str]:
    """pytest's run of the court in a folder. tests: modules of the court; all of it by default."""
    loaded = ["-p", "quest.conformance.plugin"] if plugin else []
    named = [f"quest.conformance.tests.{t}" if t else "quest.conformance" for t in tests]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *loaded, "--pyargs",
         *named, "--max-examples=5", *arguments],
        cwd=where, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, str]:
    """(folder, JSON, output) of a run on USER, outside the checkout."""
    where = tmp_path_factory.mktemp("user")
    (where / "mine.py").write_text(USER)
    (where / "xfails").write_text(
        "# planted\ntest_packing.py::test_pack\ntest_hadamard.py::test_transform[2-float32]\n"
    )
    (where / "skips").write_text("test_hadamard.py::test_transform[16-float32] # slow\n")
    done = court(where, "--impl=mine:Adapter", "--xfails=xfails", "--skips=skips",
                 "--report-json=out.json", "--report-html=out.html")  # fmt: skip
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    return where, json.loads((where / "out.json").read_text()), done.stdout


def outcomes(document: Any) -> dict[str, Any]:
    return {
        f"{p['property']}[{c['parameters']}]": c for p in document["properties"] for c in p["cases"]
    }


def test_each_property_has_its_own_outcome(judged: tuple[Path, Any, str]) -> None:
    found = outcomes(judged[1])
    # The right transform passes, and is listed as an expected failure: the entry is stale.
    stale = found.pop("test_hadamard.py::test_transform[2-float32]")
    assert stale["outcome"] == "stale expected failure"
    assert found.pop("test_hadamard.py::test_transform[16-float32]")["outcome"] == "skipped"
    assert found.pop("test_packing.py::test_pack[4]")["outcome"] == "expected failure"
    assert found.pop("test_packing.py::test_unpack[4]")["outcome"] == "passed"
    for block in (2, 16):
        turned = found.pop(f"test_hadamard.py::test_transpose[{block}-float32]")
        assert turned["outcome"] == "failed"
        assert turned["failure"]["stage"] == "transform"
    assert {c["outcome"] for c in found.values()} == {"not covered"}
    assert found["test_packing.py::test_pack[2]"]["reason"] == "capabilities['bits'] lacks 2"
    reason = found["test_hadamard.py::test_transform[2-float16]"]["reason"]
    assert reason == "capabilities['dtypes'] lacks float16"


def test_the_smallest_example_and_its_snippet(judged: tuple[Path, Any, str]) -> None:
    where, document, told = judged
    failure = outcomes(document)["test_hadamard.py::test_transpose[2-float32]"]["failure"]
    assert failure["tensors"]["x"].startswith("(1, 2) float32 [[")
    assert f"smallest example: x = {failure['tensors']['x']}" in told
    # The snippet runs where the adapter is, and says the same.
    done = subprocess.run([sys.executable, "-c", failure["snippet"]], cwd=where, check=True,
                          capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": PATH})  # fmt: skip
    assert failure["told"] in done.stdout


def test_what_is_told(judged: tuple[Path, Any, str]) -> None:
    where, document, told = judged
    assert "departs from the specification: nibbles are swapped" in told
    assert "not a function that is judged: scail" in told
    assert "stale: test_hadamard.py::test_transform[2-float32] is listed in xfails" in told
    assert "bias" in document["undeclared"]
    assert document["capabilities"]["bits"] == [4]
    page = (where / "out.html").read_text()
    assert page.count("<svg") == 2, "a picture for each transform, none for what is exact"
    assert "Smallest failing example" in page
    assert not re.search(r'(src|href)="(?!#)', page.partition("<svg")[0]), "nothing from elsewhere"


BROKEN = """
import numpy as np
import pytest


class Base:
    capabilities = {"arrays": "numpy", "dtypes": ["float32"], "bits": [4]}

    def pack(self, codes, bits):
        import no_such_library

    def unpack(self, packed, bits, width):
        packed[:] = 0
        return packed[:, :1].repeat(width, 1)


class Mixed(Base):
    def pack(self, codes, bits):
        if codes.shape[-1] < 3:
            import no_such_library
        return np.zeros((len(codes), -(-codes.shape[-1] // 2)), np.uint8)

    def unpack(self, packed, bits, width):
        pytest.skip("not today")
"""
PACK, UNPACK = (f"test_packing.py::test_{name}" for name in ("pack", "unpack"))


@pytest.mark.parametrize(
    ("adapter", "entries", "told"),
    [
        # The base of an exception; and an input that is written, which is a wrong result.
        ("Base", (f"{PACK} ImportError", UNPACK), ()),
        ("Base", (f"{PACK}[4]", f"{UNPACK} ImportError"), (
            "expected is a wrong result, and the adapter raised ModuleNotFoundError",
            "expected is ImportError, and it was a wrong result",
        )),
        # For some inputs, whichever Hypothesis ends with; and one that would skip its test.
        ("Mixed", (PACK, UNPACK), (
            "expected is a wrong result, and the adapter raised ModuleNotFoundError",
            "expected is a wrong result, and the adapter raised RuntimeError",
        )),
    ],
    ids=["as listed", "otherwise", "for some"],
)  # fmt: skip
def test_an_adapter_that_raises_is_no_expected_failure(
    adapter: str, entries: tuple[str, ...], told: tuple[str, ...], tmp_path: Path
) -> None:
    """Unless its entry names the exception; and that entry expects no wrong result."""
    (tmp_path / "mine.py").write_text(BROKEN)
    (tmp_path / "xfails").write_text("\n".join(entries))
    done = court(
        tmp_path, f"--impl=mine:{adapter}", "--xfails=xfails", "--report-json=out.json",
        "--max-examples=30", "--tb=no", "--show-capture=no", tests=("test_packing",),
    )  # fmt: skip
    found = outcomes(json.loads((tmp_path / "out.json").read_text()))
    cases = [found[f"{name}[4]"] for name in (PACK, UNPACK)]
    assert [c["outcome"] for c in cases] == ["failed" if told else "expected failure"] * 2
    assert done.returncode == bool(told), done.stdout
    assert tuple(c["reason"] for c in cases if "reason" in c) == told
    for line in told:
        assert f"listed in xfails: {line}" in done.stdout


def test_stale_entries_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(USER)
    (tmp_path / "xfails").write_text("test_packing.py::test_pack[2]\n")
    (tmp_path / "skips").write_text("test_hadamard.py::test_gone\n")
    done = court(tmp_path, "--impl=mine:Adapter", "--xfails=xfails", "--skips=skips")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    for entry in (
        "xfails: 'test_packing.py::test_pack[2]'",
        "skips: 'test_hadamard.py::test_gone'",
    ):
        assert f"{entry} is no property that this adapter covers" in done.stdout + done.stderr


def test_from_the_checkout_and_nothing_covered() -> None:
    # The root's conftest.py brings the options; warnings are errors there.
    spec = "quest.conformance.adapters.fast_hadamard:Adapter"
    missing = adapter.load(spec).missing
    if missing is None:
        pytest.skip("fast_hadamard_transform is installed: this is about what is not")
    done = court(ROOT, f"--impl={spec}", plugin=False)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout + done.stderr
    assert f"nothing is covered: {missing}" in done.stdout
    assert " passed" not in done.stdout.splitlines()[-1]


def test_an_implementation_is_asked_for(tmp_path: Path) -> None:
    done = court(tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    told = "--pyargs quest.conformance needs --impl package.module:Adapter"
    assert told in done.stdout + done.stderr


# Right transforms but for infinities and NaN, a right scale; a selection wrong for one grid.
PARTIAL = """
import torch
from quest.conformance.adapters.published import Paper


class Adapter(Paper):
    capabilities = {"dtypes": ["float32"], "blocks": [2, 16, 128], "inputs": ["non_finite"],
                    "grids": [*(f"uniform{b}" for b in range(1, 9)), "ternary", "e2m1"],
                    "sparsities": ["2:4"], "max_width": 64, "ties": "up"}
    quantize = mask = fake_quantize = linear = linear_backward = None

    def hadamard(self, x, block):
        return super().hadamard(torch.nan_to_num(x), block)

    def select(self, x, format):
        assert x.shape[-1] <= 64, x.shape
        return super().select(x, format) ^ (format.grid == "uniform6")


class Narrow(Adapter):
    capabilities = Adapter.capabilities | {"max_width": 4}
"""


@pytest.fixture(scope="module")
def partly(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """(outcomes, output) of a run on three modules, named as modules, beside a user's own test."""
    where = tmp_path_factory.mktemp("partial")
    (where / "mine.py").write_text(PARTIAL)
    done = court(where, "--impl=mine:Adapter", "--report-json=out.json",
                 tests=("test_hadamard", "test_scale", "test_sparsity"))  # fmt: skip
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    return outcomes(json.loads((where / "out.json").read_text())), done.stdout


def test_properties_of_one_name_stay_apart(partly: tuple[dict[str, Any], str]) -> None:
    found, _ = partly
    assert found["test_hadamard.py::test_inputs[non_finite-float32]"]["outcome"] == "failed"
    assert found["test_scale.py::test_inputs[non_finite-float32]"]["outcome"] == "passed"


def test_every_declared_value_is_asked(partly: tuple[dict[str, Any], str]) -> None:
    found, _ = partly
    # Its only fault is in one grid of ten, and 5 inputs are drawn.
    selection = found["test_sparsity.py::test_selection[2:4-float32]"]
    assert selection["outcome"] == "failed"
    assert "uniform6" in selection["failure"]["snippet"]
    scale = found["test_scale.py::test_scale[float32]"]
    assert scale["outcome"] == "passed"
    assert scale["asked"] == {"block": [2, 16]}


def test_blocks_above_max_width_are_not_covered(partly: tuple[dict[str, Any], str]) -> None:
    found, told = partly
    reason = "capabilities['max_width'] 64 is too narrow for block 128"
    assert found["test_scale.py::test_scale[float32]"]["uncovered"] == [reason]
    wide = found["test_hadamard.py::test_transform[128-float32]"]
    assert (wide["outcome"], wide["reason"]) == ("not covered", reason)
    assert reason in told


def test_nothing_is_covered_beside_a_user_s_own_test(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PARTIAL)
    (tmp_path / "test_own.py").write_text("def test_own():\n    pass\n")
    # Groups of 8 are wider than 4: each property skips itself when it draws a block.
    done = court(tmp_path, "--impl=mine:Narrow", "test_own.py", tests=("test_sparsity",))
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout + done.stderr
    assert "max_width'] 4 is too narrow for block 2" in done.stdout
    assert "test_own" not in done.stdout.partition("judged:")[2]


# Each fault is where one property looks: with sparsity, on rows of zeros and of NaN, on the
# threshold, in products that are wider than float32's integers.
FAULTY = """
import torch
from quest.conformance.adapters.published import Paper


class Adapter(Paper):
    capabilities = {"dtypes": ["float32"], "blocks": [16], "grids": ["uniform1"], "ties": "up",
                    "estimators": ["trust1.0", "clip1.3", "ste"], "sparsities": ["2:4"],
                    "inputs": ["non_finite"], "any_outer": True, "accumulator": "int32"}
    hadamard = hadamard_transpose = linear = linear_backward = None

    def fake_quantize(self, x, format):
        codes, sigma = self.quantize(x, format)
        return (self._points(codes, format) * sigma.double()).to(x.dtype)

    def mask(self, x, format):
        right, (t, _, sigma) = super().mask(x, format), self._places(x, format)
        if format.sparsity:
            return right if format.estimator != "ste" else right & False
        if format.estimator == "trust":
            return right & (sigma != 0)
        if format.estimator == "clip":
            threshold = torch.tensor(format.points[-1]) * format.parameter
            return (right & (t.abs().float() != threshold)) | sigma.isnan()
        return right

    def product(self, a, b):
        return (a.float() @ b.float().T).int()
"""
FAULTS = {
    "test_sparsity.py::test_values[2:4-float32]": "values",
    "test_sparsity.py::test_mask[2:4-float32]": "mask",
    "test_quantize.py::test_mask[trust1.0-float32]": "mask",
    "test_quantize.py::test_inputs_of_mask[non_finite-float32]": "mask",
    "test_quantize.py::test_every_clip[clip1.3-uniform1-float32]": "exact mask",
    "test_product.py::test_wide_product[]": "accumulators",
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Outcomes of a run on FAULTY."""
    where = tmp_path_factory.mktemp("faulty")
    (where / "mine.py").write_text(FAULTY)
    done = court(where, "--impl=mine:Adapter", "--report-json=out.json",
                 tests=("test_quantize", "test_sparsity", "test_product"))  # fmt: skip
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    return outcomes(json.loads((where / "out.json").read_text()))


def test_each_fault_is_found_where_it_is(faulty: dict[str, Any]) -> None:
    failed = {n: c["failure"]["stage"] for n, c in faulty.items() if c["outcome"] == "failed"}
    assert failed == FAULTS
    passed = {n for n, c in faulty.items() if c["outcome"] == "passed"}
    assert {f"test_quantize.py::test_mask[{e}-float32]" for e in ("clip1.3", "ste")} <= passed


def test_what_is_judged_of_sparse_operands_where_it_is_declared(faulty: dict[str, Any]) -> None:
    for name in ("values", "mask"):
        other = faulty[f"test_sparsity.py::test_{name}[pairs4:8-float32]"]
        assert other["outcome"] == "not covered"
        assert other["reason"] == "capabilities['sparsities'] lacks pairs4:8"


def test_wide_products_are_coherent_however_few_are_drawn(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FAULTY)
    done = court(tmp_path, "--impl=mine:Adapter", "--max-examples=1", tests=("test_product",))
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    assert "FAILED test_product.py::test_wide_product\n" in done.stdout


def test_stale_entries_are_told_by_workers_too(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(USER)
    (tmp_path / "skips").write_text("test_hadamard.py::test_gone\n")
    done = court(tmp_path, "--impl=mine:Adapter", "--skips=skips", "-n1")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    assert "'test_hadamard.py::test_gone' is no property that this adapter covers" in done.stdout
    assert "INTERNALERROR" not in done.stdout


def test_reports_that_can_t_be_written(tmp_path: Path) -> None:
    # The adapter takes the folder away while it is judged: a look beforehand finds nothing wrong.
    lost = USER.replace(
        "codes = np.pad", "__import__('shutil').rmtree('out', True); codes = np.pad"
    )
    (tmp_path / "mine.py").write_text(lost)
    (tmp_path / "out").mkdir()
    done = court(tmp_path, "--impl=mine:Adapter", "--report-json=out/a.json",
                 tests=("test_packing",))  # fmt: skip
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    assert "--report-json out/a.json: No such file or directory" in done.stdout
    assert "INTERNALERROR" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("path", "told"),
    [(".", "is a folder"), ("none/a", "the folder none does not"), ("a" * 300, "name too long")],
)
def test_report_paths_are_checked_before_the_run(path: str, told: str) -> None:
    values = {"--report-html": path, "--max-examples": 1}
    config = SimpleNamespace(getoption=lambda name, *default: values.get(name))
    with pytest.raises(pytest.UsageError, match=f"--report-html {path}.*{told}"):
        court_plugin._start(config, "quest.conformance.adapters.published:Paper")


def test_reports_of_one_file_are_refused(tmp_path: Path) -> None:
    one = str(tmp_path / "a")
    values = {"--report-json": one, "--report-html": f"{tmp_path}/../{tmp_path.name}/a"}
    config = SimpleNamespace(getoption=lambda name: values.get(name))
    with pytest.raises(pytest.UsageError, match=f"--report-json and --report-html are one.*{one}"):
        court_plugin._start(config, "quest.conformance.adapters.scipy_hadamard:Adapter")
    assert not list(tmp_path.iterdir())


def test_no_list_is_checked_where_the_adapter_can_t_run(tmp_path: Path) -> None:
    """Nothing was asked of it: what its lists say of it elsewhere is not wrong."""
    absent = USER + "    def unavailable(self):\n        return 'its library is absent'\n"
    (tmp_path / "mine.py").write_text(absent)
    (tmp_path / "xfails").write_text("test_packing.py::test_pack\n")
    (tmp_path / "skips").write_text("test_hadamard.py::test_transform[16-float32]\n")
    done = court(tmp_path, "--impl=mine:Adapter", "--xfails=xfails", "--skips=skips")
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout + done.stderr
    assert "nothing is covered: its library is absent" in done.stdout
    assert "is no property that this adapter covers" not in done.stdout + done.stderr
    assert " not covered in " in done.stdout.splitlines()[-1]


def test_a_test_ends_with_the_rules_on_all_its_calls() -> None:
    """Behind what its draws missed, and before its record is sent; a failure there fails it."""
    made, item = mock.Mock(), mock.Mock(spec=pytest.Function)
    item.config, item.funcargs, item.user_properties = mock.Mock(), {}, []
    item.config.stash = {court_plugin.COURT: made}
    made.settle.side_effect = Rejected("inconclusive")
    run = court_plugin.pytest_runtest_call(item)
    next(run)
    with pytest.raises(Rejected, match="inconclusive"):
        next(run)
    assert [name for name, *_ in made.mock_calls] == ["start", "asked.ask_rest", "settle", "finish"]
    assert [value for _, value in item.user_properties] == [made.finish()]
