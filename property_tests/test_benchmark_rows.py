"""`pytest benchmarks/ --rows FILE`: results that stand whatever becomes of the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from pytest_benchmark.utils import get_commit_info

from benchmarks import cases, rows, tokens

ROOT = Path(__file__).resolve().parents[1]
SIZE = cases.transforms()[0].id  # another one on a GPU
CASE = f"benchmarks/bench_hadamard.py::test_hadamard[{SIZE}]"
INFO = {
    "median_us": 50.0, "ratio_to_baseline": 2.0, "ratio_low": 1.9, "ratio_high": 2.1,
    "host_bound": False, "fraction_of_copy": 0.5, "worst_ratio": 0.3, "shape": [64, 128, 256],
}  # fmt: skip


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # pytest-benchmark measures nothing in one of xdist's workers.
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, env=alone,
    )  # fmt: skip


def test_a_run_s_rows(tmp_path: Path) -> None:
    """Two runs, one below the other; what is printed of them is a run's own table."""
    path = tmp_path / "rows.jsonl"
    ran = [_run(CASE, "--rows", str(path)) for _ in range(2)]
    assert [done.returncode for done in ran] == [0, 0]
    runs = rows.read(path)
    assert [list(run.results) for run in runs] == [[CASE]] * 2
    assert runs[0].environment["device"]
    assert runs[0].environment["torch_threads"] == 1
    assert runs[0].commit["id"] == get_commit_info()["id"]
    told = CliRunner().invoke(rows.main, [str(path)])
    assert told.exit_code == 0
    (line,) = (x for x in ran[1].stdout.splitlines() if x.startswith(f"hadamard[{SIZE}]"))
    assert line in told.output.splitlines()


@pytest.mark.parametrize(
    ("name", "says"),
    [("none/rows.jsonl", "[Errno 2] No such file"), (".", "[Errno 21] Is a directory"),
     ("page.md", "page.md, line 1: no result of a benchmark")],
)  # fmt: skip
def test_a_file_that_is_not_for_rows(name: str, says: str, tmp_path: Path) -> None:
    """Before anything is measured; what is there stays."""
    (tmp_path / "page.md").write_text("# A page\n")
    done = _run(CASE, "--rows", str(tmp_path / name))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: --rows: " in done.stderr
    assert says in done.stderr
    assert (tmp_path / "page.md").read_text() == "# A page\n"


def test_a_run_without_a_result_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert _run(CASE, "--rows", str(path), "--benchmark-disable").returncode == 0
    assert path.read_text() == ""


def test_each_result_stands_at_once(tmp_path: Path) -> None:
    """A line that was not finished is no result, and takes none away, nor the next run's."""
    path = tmp_path / "rows.jsonl"
    kept = rows.Kept(path)
    for name in ("one", "two"):
        kept.add(name, INFO)
        assert list(rows.read(path)[0].results)[-1] == name
    path.write_text(path.read_text()[:-9])
    (run,) = rows.read(path)
    assert run.results == {"one": INFO}
    rows.Kept(path).add("three", INFO)
    assert [run.results for run in rows.read(path)] == [{"one": INFO}, {"three": INFO}]


@pytest.mark.parametrize("name", sorted(rows.OF_RESULT | rows.OF_ENVIRONMENT))
def test_what_the_table_reads_is_there(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows.Kept(path).add("one", INFO | {"more": 1})
    assert len(rows.read(path)) == 1
    head, result = map(json.loads, path.read_text().splitlines())
    (head["environment"] if name in rows.OF_ENVIRONMENT else result["info"]).pop(name)
    path.write_text("".join(json.dumps(line) + "\n" for line in (head, result)))
    with pytest.raises(ValueError, match=r"no result of a benchmark"):
        rows.read(path)


def test_a_picture_of_rows(tmp_path: Path) -> None:
    """`benchmarks.tokens` draws what is printed."""
    path = tmp_path / "rows.jsonl"
    rows.Kept(path).add("benchmarks/bench_linear.py::test_frozen[64x128x256-w4a4]", INFO)
    device, found = tokens.of_table(CliRunner().invoke(rows.main, [str(path)]).output)
    assert device == rows.read(path)[0].environment["device"]
    assert found == [((64, 128, 256), "w4a4", 2.0)]


HEAD = json.dumps({"environment": {"device": "cpu", "torch": "2"}, "commit": {}}) + "\n"


@pytest.mark.parametrize(
    ("held", "says"),
    [
        (b"no JSON\n", ", line 1: no result of a benchmark"),
        (json.dumps({"name": "of no run", "info": INFO}) + "\n", ", line 1: no result"),
        (json.dumps({"environment": {}, "commit": {}}) + "\n", ", line 1: no result"),
        (json.dumps({"environment": 1, "commit": {}}) + "\n", ", line 1: no result"),
        (HEAD + json.dumps({"name": "bare", "info": {}}) + "\n", ", line 2: no result"),
        (HEAD + json.dumps({"name": "bare", "info": 3}) + "\n", ", line 2: no result"),
        ("3\n", ", line 1: no result"),
        (b"\xff\xfe\x00\n", ", line 1: no result"),
        (b"\xff\xfe\x00", " has no result of a benchmark"),
        (json.dumps({"benchmarks": []}), " has no result of a benchmark"),
        (b"", " has no result of a benchmark"),
    ],
)
def test_something_else(held: str | bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    held = held.encode() if isinstance(held, str) else held
    path.write_bytes(held)
    told = CliRunner().invoke(rows.main, [str(path)])
    assert told.exit_code == 1
    assert told.output.startswith(f"Error: {path}{says}")
    if held:
        with pytest.raises(ValueError, match="no result of a benchmark"):
            rows.Kept(path)
        assert path.read_bytes() == held
