"""`pytest benchmarks/ --rows FILE`: results that stand whatever becomes of the run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import rows, tokens

ROOT = Path(__file__).resolve().parents[1]
CASE = "benchmarks/bench_hadamard.py::test_hadamard[256x1024-order32]"
INFO = {
    "median_us": 50.0, "ratio_to_baseline": 2.0, "ratio_low": 1.9, "ratio_high": 2.1,
    "host_bound": False, "fraction_of_copy": 0.5, "worst_ratio": 0.3, "shape": [64, 128, 256],
}  # fmt: skip


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_run_s_rows(tmp_path: Path) -> None:
    """Two runs, one below the other; what is printed of them is a run's own table."""
    path = tmp_path / "rows.jsonl"
    ran = [_run(CASE, "--rows", str(path)) for _ in range(2)]
    assert [done.returncode for done in ran] == [0, 0]
    runs = rows.read(path)
    assert [list(run.results) for run in runs] == [[CASE]] * 2
    assert runs[0].environment["device"]
    assert len(runs[0].commit["id"]) == 40
    told = CliRunner().invoke(rows.main, [str(path)])
    assert told.exit_code == 0
    (line,) = (line for line in ran[1].stdout.splitlines() if line.startswith("hadamard[256x1024"))
    assert line in told.output.splitlines()


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    """Before anything is measured."""
    done = _run(CASE, "--rows", str(tmp_path / "none" / "rows.jsonl"))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: --rows: [Errno 2] No such file or directory" in done.stderr


def test_each_result_stands_at_once(tmp_path: Path) -> None:
    """A line that was not finished is no result, and takes none away."""
    path = tmp_path / "rows.jsonl"
    rows.begin(path)
    for name in ("one", "two"):
        rows.keep(path, name, INFO)
        assert list(rows.read(path)[0].results)[-1] == name
    whole = path.read_text()
    path.write_text(whole[:-9])
    (run,) = rows.read(path)
    assert run.results == {"one": INFO}


def test_a_picture_of_rows(tmp_path: Path) -> None:
    """`benchmarks.tokens` draws what is printed."""
    path = tmp_path / "rows.jsonl"
    rows.begin(path)
    rows.keep(path, "benchmarks/bench_linear.py::test_frozen[64x128x256-w4a4]", INFO)
    device, found = tokens.of_table(CliRunner().invoke(rows.main, [str(path)]).output)
    assert device == rows.read(path)[0].environment["device"]
    assert found == [((64, 128, 256), "w4a4", 2.0)]


@pytest.mark.parametrize(
    "text",
    [
        "no JSON\n",
        json.dumps({"name": "of no run", "info": {}}) + "\n",
        json.dumps({"environment": {}}) + "\n",
        "3\n",
    ],
)
def test_something_else(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(text)
    told = CliRunner().invoke(rows.main, [str(path)])
    assert told.exit_code == 1
    assert told.output == f"Error: {path}, line 1: no result of a benchmark\n"
