"""`quest gate`: whole runs in a small repository, and a worker's process. See `test_gate.py`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from quest.cli import main
from quest.gate import benchmarks, correctness, pairs, power, text, worktrees
from quest.gate.benchmarks import Bench, Row
from quest.gate.side import Side, SideError

# A repository of a few lines, for whole runs.
VERIFY = """
import json, pathlib, sys
ratio = float(pathlib.Path("ratio.txt").read_text())
row = {"lane": "l", "kernel": "k", "format": "f", "dtype": "d", "stages": {"s": ratio}}
pathlib.Path(sys.argv[sys.argv.index("--json") + 1]).write_text(json.dumps({"rows": [row]}))
print("the table of verify")
print(f"{int(ratio <= 1)} of 1 rows pass")
sys.exit(int(ratio > 1))
"""
GATE = """
class RedGateError(AssertionError): ...
class Passed: worst_ratio = 0.5
def open_for(key, judge):
    if not judge():
        raise RedGateError("wrong")
    return Passed()
"""
BENCH = """
import pytest, torch
@pytest.mark.parametrize("rows", [256, 512])
def test_double(timed, rows):
    timed(key=(rows,), judge=lambda: True, shape=(rows, 256), run=lambda x: x + x)
def test_triple(timed):
    timed(key=(3,), judge=lambda: True, shape=(256, 256), run=lambda x: x * 3)
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    there = tmp_path / "a repository"
    files = {
        "quest/__init__.py": "",
        "quest/cli.py": VERIFY,
        "ratio.txt": "0.5",
        "benchmarks/__init__.py": "",
        "benchmarks/cases.py": "import torch\nDEVICE, DTYPE = 'cpu', torch.float32\n",
        "benchmarks/gate.py": GATE,
        "benchmarks/bench_plain.py": BENCH,
        "pytest.ini": "[pytest]\npython_files = bench_*.py\n",
        ".gitignore": "__pycache__/\n",
    }
    for name, content in files.items():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_text(content)
    monkeypatch.chdir(there)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name, value in {"GIT_AUTHOR": "a", "GIT_COMMITTER": "c"}.items():
        monkeypatch.setenv(f"{name}_NAME", value)
        monkeypatch.setenv(f"{name}_EMAIL", f"{value}@example.org")
    run_git("init", "--quiet")
    run_git("add", "--all")
    run_git("commit", "--quiet", "--message", "base")
    before = status()
    yield there
    # Nothing is left: no folder, no worktree, no object, no change to the index.
    assert not list(tmp_path.glob("quest-gate-*"))
    assert len(run_git("worktree", "list").splitlines()) == 1
    assert before[0] == status()[0]


def run_git(*arguments: str) -> str:
    return subprocess.check_output(["git", *arguments], text=True)


def status() -> tuple[str, str]:
    return run_git("count-objects"), run_git("status", "--porcelain")


def test_a_whole_run(
    repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "LOOKS", 1)  # a process takes seconds to start
    # Uncommitted: one benchmark with more memory, one with another key, one new in a new file.
    more = "(torch.empty(2, *x.shape), x * 3)"
    changed = BENCH.replace("x * 3", more).replace("key=(rows,)", "key=(rows, 'other')")
    (repository / "benchmarks/bench_plain.py").write_text(changed)
    added = BENCH.replace("test_triple", "test_new").replace("[256, 512]", "[]")
    (repository / "benchmarks/bench_new.py").write_text(added)
    line = ["gate", "--base", "HEAD", "--rounds", "10", "--json", "../gate.json"]
    line += ["--filter", "triple or new or 256", "--aa", "0"]
    before = status()
    assert main(line) == 1
    assert status() == before
    out = " ".join(capsys.readouterr().out.split())
    assert "quest verify --quick in change: 1 of 1 rows pass" in out
    assert "working tree" in out
    assert "and uncommitted changes" in out
    assert "1 skipped on this machine" in out
    judges = ["benchmarks/bench_new.py", "benchmarks/bench_plain.py"]
    assert f"must read what changed in: {', '.join(judges)}" in out
    assert ", 1 compared, in" in out
    assert (
        "double[256]: other benchmark: no spec key 256 other here, no spec key 256 in base" in out
    )
    document = json.loads((repository / "../gate.json").read_text())
    verdicts = {text.short(row["name"]): row["verdict"] for row in document["benchmarks"]}
    assert verdicts.pop("triple").endswith("more memory")
    assert verdicts == {"double[256]": "other benchmark", "new": "new"}
    peaks = {text.short(row["name"]): row["peak"] for row in document["benchmarks"]}
    assert 0 <= peaks["triple"] - 3 * 256 * 256 * 4 < 64  # and a scalar
    assert document["passed"] is False
    assert (document["compared"], document["changed_judges"]) == (1, judges)


def test_a_change_in_the_second_of_the_commit(repository: Path) -> None:
    """Of the same size and time: git looks at the text where the index is not newer."""
    file, index = repository / "ratio.txt", repository / ".git" / "index"
    subprocess.run(["git", "config", "core.trustctime", "false"], cwd=repository, check=True)
    text, then = file.read_text(), int(file.stat().st_mtime) - 10
    os.utime(file, (then, then))
    subprocess.run(["git", "update-index", "--really-refresh"], cwd=repository, check=True)
    file.write_text("9" * len(text))
    for path in (file, index):
        os.utime(path, (then, then))
    with worktrees.checked_out(repository, "HEAD", None) as (base, change):
        assert (base.path / "ratio.txt").read_text() == text
        assert (change.path / "ratio.txt").read_text() == "9" * len(text)


def test_a_working_tree_that_takes_its_commit_back_is_base(repository: Path) -> None:
    """What lies there is compared, and not what was committed."""
    file, first = repository / "ratio.txt", run_git("rev-parse", "HEAD").strip()
    text = file.read_text()
    file.write_text("0.75")
    run_git("commit", "--quiet", "--all", "--message", "change")
    file.write_text(text)
    with worktrees.checked_out(repository, first, None) as (base, change):
        assert (change.path / "ratio.txt").read_text() == text
        assert change.tree == base.tree
        assert "uncommitted changes" in change.label
    run_git("update-ref", "HEAD", first)
    run_git("reset", "--quiet")
    (repository / ".git" / "ORIG_HEAD").unlink(missing_ok=True)
    run_git("reflog", "expire", "--expire=now", "--all")
    run_git("prune", "--expire=now")


def test_a_red_verify_ends_it(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (repository / "ratio.txt").write_text("1.5")
    assert main(["gate", "--base", "HEAD"]) == 1
    out = capsys.readouterr().out
    assert "the table of verify" in out
    assert "FAIL quest verify is red in the change: nothing was timed" in out
    assert "kernel" not in out


def test_a_ratio_that_grew_fails_and_a_green_change_passes(
    repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = benchmarks.Result([Row("x", comparison=SAME)], [], 0, "cpu")
    monkeypatch.setattr(Bench, "run", lambda self: compared)
    (repository / "ratio.txt").write_text("0.7")
    assert main(["gate", "--base", "HEAD"]) == 0
    (repository / "ratio.txt").write_text("0.8")
    assert main(["gate", "--base", "HEAD"]) == 1
    assert "l/k/f/d/s: worst ratio 0.800 is over 1.5 times base's 0.500" in " ".join(
        capsys.readouterr().out.split()
    )
    # The change may be a revision: what lies in the working tree is then left out of it.
    assert main(["gate", "--base", "HEAD", "--change", "HEAD"]) == 0


SAME = pairs.Comparison((1.0,), (1.0,), 1.0, 1.0, 1.0)


@pytest.mark.parametrize("rows", [[], [Row("x", note="new")]], ids=["skipped", "new"])
def test_nothing_was_compared(
    repository: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rows: list[Row],
) -> None:
    monkeypatch.setattr(Bench, "run", lambda self: benchmarks.Result(rows, [], 1, "cpu"))
    assert main(["gate", "--base", "HEAD"]) == 2
    assert "nothing was compared: no benchmark" in capsys.readouterr().err
    assert main(["gate", "--base", "HEAD", "--allow-old-base"]) == 0
    assert "PASS, nothing was compared, in" in capsys.readouterr().out


def test_a_base_that_fails_beside_itself_fails_the_gate(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    same = [Row("x", faults=(("base fails", "it died"),))]
    result = benchmarks.Result([Row("x", comparison=SAME)], same, 0, "cpu")
    monkeypatch.setattr(Bench, "run", lambda self: result)
    assert main(["gate", "--base", "HEAD"]) == 1
    assert "FAIL x: base fails: it died" in capsys.readouterr().out


def test_judges_that_a_person_must_read(repository: Path) -> None:
    """What decides and what times; and no other file."""
    judges = ["benchmarks/cases.py", "quest/conformance/judges/codes.py", "quest/gate/pairs.py",
              "reference/bounds.py"]  # fmt: skip
    for name in (*judges, "quest/linear.py", "kernels/rows.py"):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text("another = 1\n")
    with worktrees.checked_out(repository, "HEAD", None) as (base, change):
        assert worktrees.other_judges(base, change) == judges


def test_json_that_can_no_longer_be_written(
    repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository.parent / "out").mkdir()

    def run(self: Bench) -> benchmarks.Result:
        (repository.parent / "out").rmdir()
        return benchmarks.Result([Row("x", comparison=SAME)], [], 0, "cpu")

    monkeypatch.setattr(Bench, "run", run)
    assert main(["gate", "--base", "HEAD", "--json", "../out/x.json"]) == 2
    assert "--json ../out/x.json: it can't be written: No such file" in capsys.readouterr().err


WORKER = """
import json, os, sys, time
for line in sys.stdin:
    case = json.loads(line).get("case")
    if case == "dies":
        print("a last word", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 11)
    if case == "leaves":
        os._exit(3)
    if case == "hangs":
        time.sleep(60)
    status = "died" if case == "lost" else "ok"
    print(json.dumps({"status": status, "message": "m", "pid": os.getpid()}), flush=True)
"""


@pytest.mark.parametrize(
    ("case", "status", "told"),
    [
        ("dies", "died", "base, open dies: its process ended by SIGSEGV: a last word"),
        ("leaves", "died", "base, open leaves: its process ended with exit status 3"),
        ("hangs", "late", r"base, open hangs: no answer in 2 s \(--limit\)"),
        ("lost", "died", "m"),
    ],
)
def test_a_worker_that_is_gone_is_named_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, status: str, told: str
) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr("quest.gate.side.WORKER", tmp_path / "worker.py")
    with Side(tmp_path, "", "base", 2.0) as side:
        first = side.ask("open", case="fine")["pid"]
        assert side.ask("open", case="fine")["pid"] == first
        with pytest.raises(SideError, match=told) as caught:
            side.ask("open", case=case)
        assert (caught.value.status, caught.value.side) == (status, "base")
        assert side.ask("open", case="fine")["pid"] != first


def test_a_base_without_benchmarks(
    repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Bench) -> benchmarks.Result:
        if self.base is not None:
            raise benchmarks.BaseError("old", "it has no benchmarks", "base")
        return benchmarks.Result([Row("x", note="new")], [], 0, "cpu")

    monkeypatch.setattr(Bench, "run", run)
    assert main(["gate", "--base", "HEAD"]) == 2
    assert "it has no benchmarks (--allow-old-base judges" in capsys.readouterr().err
    assert main(["gate", "--base", "HEAD", "--allow-old-base"]) == 0


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ([], "missing option '--base'"),
        (["--base", "nonsense"], "--base 'nonsense' is no revision of"),
        (["--base", "--all"], "--base '--all' is no revision of"),
        (["--base", "HEAD", "--change", "gone"], "--change 'gone' is no revision of"),
        (["--base", "HEAD", "--json", "none/x.json"], "the folder none does not exist"),
        (["--base", "HEAD", "--json", "/proc/x.json"], "--json /proc/x.json: it can't be written"),
        (["--base", "HEAD", "--json", "x" * 300], "it can't be written: File name too long"),
        (["--base", "HEAD", "--json", ""], "is a folder, and must be a file"),
        (["--base", "HEAD", "--limit", "0"], "0 is not in the range x>0"),
        (["--base", "HEAD", "--rounds", "3"], "3 is not in the range x>=10"),
    ],
)
def test_messages(
    repository: Path, capsys: pytest.CaptureFixture[str], line: list[str], expected: str
) -> None:
    assert main(["gate", *line]) == 2
    out, err = capsys.readouterr()
    assert expected in err
    assert len(err.splitlines()) == 1
    assert out == ""


def test_not_a_repository(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert main(["gate", "--base", "HEAD"]) == 2
    assert "is not in a git repository" in capsys.readouterr().err


def test_an_unfinished_merge(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blob = run_git("hash-object", "ratio.txt").strip()
    entries = "".join(f"100644 {blob} {stage}\tratio.txt\n" for stage in (1, 2, 3))
    subprocess.run(["git", "update-index", "--index-info"], input=entries, text=True, check=True)
    assert main(["gate", "--base", "HEAD"]) == 2
    assert "unmerged files" in capsys.readouterr().err


def test_an_interrupt_leaves_nothing(repository: Path) -> None:
    (repository / "new.txt").write_text("new")

    def interrupted() -> None:
        with worktrees.checked_out(repository, "HEAD", None) as (base, change):
            assert not (base.path / "new.txt").exists()
            assert (change.path / "new.txt").read_text() == "new"
            shutil.rmtree(base.path)  # even where something is gone already
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()


@pytest.mark.parametrize(
    ("changed", "expression", "told"),
    [
        (False, "hadamrad", "matches no benchmark: there are double, triple"),
        (True, "256 and triple", "matches no benchmark: there are double, triple"),
        (True, "double triple", "can't collect benchmarks with -k 'double triple'; it takes names"),
    ],
)
def test_a_filter_that_selects_nothing_is_refused_before_anything_slow(
    repository: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changed: bool,
    expression: str,
    told: str,
) -> None:
    monkeypatch.setattr(correctness, "verify", lambda *_: pytest.fail("it came to quest verify"))
    if changed:
        (repository / "ratio.txt").write_text("0.6")
    assert main(["gate", "--base", "HEAD", "--filter", expression]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"quest gate: --filter {expression!r}")
    assert told in err
    assert len(err.splitlines()) == 1
    assert out == ""


NEW = Row("x", note="new")


def test_a_filter_may_select_what_one_side_alone_has(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of base alone: it is missing in the change, which is a fault and no typing error."""
    there = repository / "benchmarks/bench_plain.py"
    there.write_text(BENCH.replace("test_triple", "test_other"))
    monkeypatch.setattr(Bench, "run", lambda self: benchmarks.Result([NEW], [], 0, "cpu"))
    assert main(["gate", "--base", "HEAD", "--filter", "triple", "--allow-old-base"]) == 0
    # What can't be collected is told as a fault of the change, after quest verify as ever.
    there.write_text("import nothing_of_this_name")
    assert benchmarks.unmatched(repository, repository, "hadamrad") is None
    there.write_text(BENCH)
    settings = repository / "benchmarks/conftest.py"
    settings.write_text("import nothing_of_this_name")
    assert benchmarks.unmatched(repository, None, "triple") is None
    settings.unlink()
    # A base without benchmarks has none that the filter could mean.
    assert benchmarks.unmatched(repository, repository.parent, "hadamrad") == ["double", "triple"]


# A verify that knows one lane, as quest's own refuses others: at once, with status 2.
CHOOSY = """
import sys
if "--lane=cpu" not in sys.argv:
    print("quest verify: lane must be one of cpu, got 'nonsense'", file=sys.stderr)
    sys.exit(2)
"""


def test_a_lane_that_there_is_not_is_a_usage_error_and_no_red_change(
    repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "quest/cli.py").write_text(CHOOSY + VERIFY)
    line = ["gate", "--base", "HEAD", "--allow-old-base"]
    assert main([*line, "--lane", "nonsense"]) == 2
    out, err = capsys.readouterr()
    assert "verify --quick --lane=nonsense: lane must be one of cpu, got 'nonsense'" in err
    assert len(err.splitlines()) == 1
    assert "FAIL" not in out
    monkeypatch.setattr(Bench, "run", lambda self: benchmarks.Result([NEW], [], 0, "cpu"))
    assert main([*line, "--lane", "cpu"]) == 0


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--base", "HEAD"], "--base"),
        (["--json", "power.json"], "--json"),
        (["--aa", "3", "--filter", "x"], "--filter, --aa"),
        (["--change", "HEAD", "--lane", "x", "--full"], "--change, --full, --lane"),
        (["--rounds", "150", "--allow-old-base", "--limit", "1"], "--rounds, --allow-old-base"),
    ],
)
def test_power_takes_no_other_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, more: list[str], told: str
) -> None:
    """Even of their defaults: they would be ignored."""
    monkeypatch.setattr(power, "measure", lambda: pytest.fail("it simulated"))
    assert main(["gate", "--power", *more]) == 2
    out, err = capsys.readouterr()
    assert f"quest gate: --power simulates and compares nothing: it can't go with {told}" in err
    assert len(err.splitlines()) == 1
    assert out == ""
