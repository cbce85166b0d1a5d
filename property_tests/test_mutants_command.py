"""The command: what is run again, where the journal lies, and the record."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from property_tests.mutants import baseline, choice, command, covered, record, table
from property_tests.mutants.command import _Plan, all_mutants
from property_tests.mutants.journal import Result
from property_tests.mutants.proofs import Proofs

FULL = _Plan(1, False, False, False, 0, False, 30.0, 0.0)
QUICK, FIRST, NARROW = (
    dataclasses.replace(FULL, **{name: True}) for name in ("quick", "first", "narrow")
)
HERE = "no GPU, python 3.11"
TEST = "property_tests/test_packing.py::test"


def test_nothing_passes_more_than_it_was_asked() -> None:
    plans = {"": FULL, choice.QUICK: QUICK, choice.OWN_TESTS: NARROW, choice.FIRST: FIRST}
    for passed, plan in plans.items():
        assert plan.passes == passed
    assert dataclasses.replace(NARROW, named=("races",)).passes == choice.FIRST


@pytest.mark.parametrize(
    ("plan", "old", "wanted"),
    [
        (FULL, None, True),
        (FULL, Result("", "", "killed", stack=HERE), False),
        (FULL, Result("", "", "survived", stack=HERE), False),
        (FULL, Result("", "", "open", passed=choice.QUICK, stack=HERE), True),
        (FULL, Result("", "", "open", passed=choice.OWN_TESTS, stack=HERE), True),
        (QUICK, Result("", "", "open", passed=choice.QUICK, stack=HERE), False),
        (QUICK, Result("", "", "open", passed=choice.OWN_TESTS, stack=HERE), True),
        (NARROW, Result("", "", "open", passed=choice.OWN_TESTS, stack=HERE), False),
        (FIRST, Result("", "", "open", passed=choice.FIRST, stack=HERE), False),
    ],
)
def test_what_is_run_again(
    plan: _Plan, old: Result | None, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(covered, "has_gpu", lambda: False)
    assert plan.wants(old) == wanted


@pytest.mark.parametrize("outcome", ["survived", "not run", "killed"])
def test_a_gpu_looks_again_at_what_passed_without_one(
    outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(covered, "has_gpu", lambda: True)
    for stack, wanted in ((HERE, outcome != "killed"), ("H100, python 3.12", False)):
        assert FULL.wants(Result("", "", outcome, stack=stack)) == wanted


def test_a_gpu_can_be_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covered.os.path, "exists", lambda path: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert covered.has_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not covered.has_gpu()


def test_the_folder_of_the_journal_is_told_and_a_fresh_start_forgets_all_of_it(
    tmp_path: Path,
) -> None:
    """Also what was seen without a fault, and what other machines have found."""
    names = ["journal.jsonl", "h100.jsonl", "baseline.json", "binaries.json"]
    for name in names:
        (tmp_path / name).write_text("{")
    arguments = ["--file", "quest/packing.py", "--minutes", "0"]
    environment = {"QUEST_MUTANTS": str(tmp_path)}
    for more, left in (([], sorted(names)), (["--fresh"], [])):
        ran = CliRunner().invoke(command.main, [*arguments, *more], env=environment)
        assert (ran.exit_code, ran.exception) == (0, None) or isinstance(ran.exception, SystemExit)
        assert sorted(p.name for p in tmp_path.iterdir()) == left


def test_a_look_that_was_killed_while_it_wrote_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "baseline.json").write_text('{"property_tests/test_a.py": {"te')
    assert baseline._read(tmp_path / "baseline.json") == {}


def test_the_record_gives_back_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {m.id: m for m in all_mutants()}
    outcomes = {
        "quest/packing.py:pack:remove:0": "survived",
        "quest/packing.py:pack:negate:0": "killed",
        "semantic:codes/clamp-low": "not run",
        "kernels/rows.cu:text:operator:3": "survived",
    }
    chosen = [known[name] for name in outcomes]
    results = {n: Result(n, known[n].what, o, stack=HERE) for n, o in outcomes.items()}
    results[chosen[1].id] = dataclasses.replace(results[chosen[1].id], stack="H100", by=TEST)
    monkeypatch.setattr(record, "FOLDER", tmp_path)
    assert record.journal() == []
    lines = [json.dumps(dataclasses.asdict(r)) for r in results.values()]
    record.save(table.Table(chosen, results, Proofs()), lines)
    assert record.journal() == lines
    # Each verdict is counted where it was reached.
    text = (tmp_path / "mutants.md").read_text()
    stacks = text.partition("## By stack")[2].partition("##")[0].splitlines()
    assert [line.split(" | ")[:2] for line in stacks if line.startswith(("| no", "| H1"))] == [
        ["| H100", "1"],
        [f"| {HERE}", "3"],
    ]


@pytest.mark.parametrize(
    ("arguments", "runs"), [([], False), (["--proofs"], True), (["--only", "proven"], True)]
)
def test_what_is_proven_is_left_out(
    arguments: list[str], runs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it is asked for: then a test may refute the proof."""
    made = [m for m in all_mutants() if m.file == "quest/packing.py"][:2]
    proven = Proofs({made[1].id: (made[1].what, "why")})
    monkeypatch.setattr(command, "all_mutants", lambda: made)
    monkeypatch.setattr(command.proofs, "read", lambda: proven)
    asked = []
    monkeypatch.setattr(command, "_run", lambda console, missing, *_: asked.extend(missing))
    named = [made[1].id if a == "proven" else a for a in arguments]
    CliRunner().invoke(command.main, ["--work", str(tmp_path), "--fresh", *named])
    assert (made[1] in asked) == runs
    assert (made[0] in asked) == ("--only" not in arguments)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--minutes", "nan"], "nan is not a finite number"),
        (["--minutes", "inf"], "inf is not a finite number"),
        (["--patience", "inf"], "inf is not a finite number"),
        (["--work", "file/below"], "file/below can't be made: Not a directory"),
        (
            ["--tests", "race"],
            "must be about the chosen files: errors, grids_and_transforms_edges, pac",
        ),
    ],
)
def test_options_that_can_t_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(command, "_run", lambda *_: pytest.fail("it ran"))
    line = ["--file", "quest/packing.py", "--fresh", "--work", "work", *options]
    done = CliRunner().invoke(command.main, line)
    assert (done.exit_code, type(done.exception)) == (2, SystemExit), done.output
    assert told in done.output
