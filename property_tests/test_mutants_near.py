"""Carried verdicts: which edits they outlive, what counts before them, and how they are checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from property_tests.mutants import command, covered, record, runner, table
from property_tests.mutants.evidence import Evidence
from property_tests.mutants.journal import Journal
from property_tests.mutants.mutant import Mutant
from property_tests.mutants.near import Near
from property_tests.mutants.proofs import Proofs
from property_tests.mutants.runner import Result

TESTS = '''"""Text."""

import math
import pytest
from property_tests.aid import aid, other_aid
from property_tests import kit, whole
from property_tests.kit import tool

CASES = [1, made()]
CASES += [71]
OTHERS: list = [2]
OTHERS += [70]
pytestmark = pytest.mark.whole
print("set up")


def made():
    return 2


def helper(x):
    """Text."""
    return further(x)


def further(x):
    return x + 3


@pytest.fixture(autouse=True)
def always():
    yield 4


@pytest.fixture
def stairs(stairs):
    return stairs


@pytest.mark.usefixtures("ramp")
@pytest.mark.parametrize("n", CASES)
def test_f(n, room, hall, stairs, cupboard, porch):
    assert helper(n) == aid(5)
    whole.w()
    kit.k()
    tool.t()


@pytest.mark.parametrize("n", OTHERS)
def test_other(n):
    assert other_aid(6) == math.pi
'''
FILES = {
    "quest/a.py": 'N = 10\n\n\ndef f(x, y=11):\n    """Text."""\n    return x + 12\n\n\n'
    "def g(x):\n    return 13\n",
    "kernels/k.cu": '#include "h.cuh"\nint x = 20;  // why\n',
    "kernels/h.cuh": "int y = 21;\n",
    "kernels/other.cu": "int z = 22;\n",
    "property_tests/test_a.py": TESTS,
    "property_tests/aid.py": "U = 30\n\n\ndef aid(x):\n    return inner(x)\n\n\n"
    "def inner(x):\n    return 31\n\n\ndef other_aid(x):\n    return 32\n",
    "property_tests/whole.py": "def w():\n    return 40\n",
    "property_tests/kit/__init__.py": "from . import part\nfrom .other import o\n\n\ndef k():\n"
    "    return part.p() + o() + 41\n",
    "property_tests/kit/part.py": "def p():\n    return 60\n",
    "property_tests/kit/other.py": "def o():\n    return 61\n\n\ndef never():\n    return 62\n",
    "property_tests/kit/tool.py": "def t():\n    return 63\n",
    "property_tests/rooms.py": "effect(64)\n\n\ndef hall():\n    return 42\n\n\ndef cellar():\n"
    "    return 43\n\n\n@fixture(autouse=True)\ndef light():\n    return 65\n",
    "property_tests/conftest.py": "from property_tests.rooms import cellar, hall\n\nPROFILE = 44\n"
    "load(45)\n\n\n@fixture\ndef room():\n    return 50\n\n\ndef lobby():\n    return 51\n\n\n"
    "@fixture\ndef stairs():\n    return 54\n\n\n@fixture(name='cupboard')\ndef _made():\n"
    "    return 55\n\n\n@fixture\ndef ramp():\n    return 67\n\n\n"
    "def pytest_sessionfinish():\n    return PROFILE + 52\n\n\n"
    "def pytest_terminal_summary():\n    return 53\n",
    "conftest.py": "@fixture\ndef porch():\n    return 66\n",
    "pyproject.toml": "",
}
TEST = "property_tests/test_a.py::test_f[1]"


def at(file: str, *lines: int, name: str = "f") -> Mutant:
    first, last = min(lines), max(lines)
    return Mutant(
        f"{file}:{name}:constant:0", "systematic", file, (first, last), 0, 0, "", "1 -> 2"
    )


IN_F, IN_HEAD, IN_G, OUTSIDE, TEXT = (
    at("quest/a.py", 6), at("quest/a.py", 4), at("quest/a.py", 10, name="g"), at("quest/a.py", 1),
    at("kernels/k.cu", 2),
)  # fmt: skip
VERDICTS = {
    "f": (IN_F, "killed", TEST),
    "head": (IN_HEAD, "killed", TEST),
    "g, ci": (IN_G, "timeout", f"{TEST} (ci)"),
    "outside": (OUTSIDE, "crash", TEST),
    "text": (TEXT, "killed", TEST),
    "refused": (TEXT, "refused", ""),
    "import of": (IN_F, "killed", "import of property_tests/test_a.py"),
    "import": (IN_F, "killed", "import"),
}
PYTHON = {"f", "g, ci", "outside", "import of", "import"}
BY_TEST = {"f", "head", "g, ci", "outside", "text"}


@pytest.fixture(autouse=True)
def stack(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """The stack of the machine, which can become another."""

    def be(name: str) -> None:
        monkeypatch.setattr(covered, "stack", lambda: name)

    be("no GPU, here")
    return be


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def edit(root: Path, name: str, old: str, new: str) -> None:
    text = (root / name).read_text()
    assert text.count(old) == 1
    (root / name).write_text(text.replace(old, new))


def journal(root: Path, folder: str = "work") -> Journal:
    return Journal(root / folder, Evidence(root))


@pytest.mark.parametrize(
    ("name", "old", "new", "lost"),
    [
        # Comments and docstrings, of sources and of tests.
        ("quest/a.py", '    """Text."""', '    """Other."""  # why', set()),
        ("property_tests/test_a.py", '    """Text."""', '    """Other."""  # why', set()),
        ("kernels/k.cu", "// why", "/* because\n*/\n", set()),
        # The function with the fault; a signature; the module's code; another function.
        ("quest/a.py", "12", "0", {"f", "head", "import of", "import"}),
        ("quest/a.py", "13", "0", {"g, ci"}),
        ("quest/a.py", "11", "0", {"f", "head", "outside", "import of", "import"}),
        ("quest/a.py", "N = 10", "N = 0", {"outside"}),
        ("kernels/k.cu", "20", "0", {"text", "refused"}),
        ("kernels/h.cuh", "21", "0", {"refused"}),
        ("kernels/other.cu", "22", "0", set()),
        # The test that killed it, and what it names: in its file, in a helper, of conftest.py.
        ("property_tests/test_a.py", "aid(5)", "aid(0)", BY_TEST),
        ("property_tests/test_a.py", '"n", CASES', '"n", [0]', BY_TEST),
        ("property_tests/test_a.py", "return further(x)", "return 0", BY_TEST),
        ("property_tests/test_a.py", "x + 3", "0", BY_TEST),
        ("property_tests/test_a.py", "yield 4", "yield 0", BY_TEST | {"import of"}),
        ("property_tests/test_a.py", "[1,", "[0,", BY_TEST | {"import of"}),
        ("property_tests/test_a.py", "[71]", "[0]", BY_TEST | {"import of"}),
        ("property_tests/test_a.py", "return 2", "return 0", BY_TEST | {"import of"}),
        ("property_tests/test_a.py", "mark.whole", "mark.slow", BY_TEST | {"import of"}),
        ("property_tests/test_a.py", '"set up"', '"set down"', BY_TEST | {"import of"}),
        (
            "property_tests/test_a.py",
            "import aid,",
            "import inner as aid,",
            BY_TEST | {"import of"},
        ),
        ("property_tests/test_a.py", "test_f", "test_h", BY_TEST),
        ("property_tests/aid.py", "return inner(x)", "return 0", BY_TEST | {"import of"}),
        ("property_tests/aid.py", "31", "0", BY_TEST | {"import of"}),
        ("property_tests/whole.py", "40", "0", BY_TEST | {"import of"}),
        ("property_tests/kit/__init__.py", "41", "0", BY_TEST | {"import of"}),
        ("property_tests/kit/part.py", "60", "0", BY_TEST | {"import of"}),
        ("property_tests/kit/other.py", "61", "0", BY_TEST | {"import of"}),
        ("property_tests/kit/tool.py", "63", "0", BY_TEST | {"import of"}),
        # Fixtures: under another name, by one of the test's file, by a mark, of the other
        # conftest.py.
        ("property_tests/conftest.py", "55", "0", BY_TEST | {"import"}),
        ("property_tests/conftest.py", "54", "0", BY_TEST | {"import"}),
        ("property_tests/conftest.py", "67", "0", BY_TEST | {"import"}),
        ("conftest.py", "66", "0", BY_TEST | {"import"}),
        ("property_tests/conftest.py", "50", "0", BY_TEST | {"import"}),
        ("property_tests/rooms.py", "42", "0", BY_TEST | {"import"}),
        # Other tests, and what only they name.
        ("property_tests/test_a.py", "other_aid(6)", "other_aid(0)", set()),
        ("property_tests/test_a.py", "[2]", "[0]", {"import of"}),
        ("property_tests/test_a.py", "[70]", "[0]", {"import of"}),
        ("property_tests/test_a.py", "import math", "import numpy", {"import of"}),
        ("property_tests/aid.py", "32", "0", {"import of"}),
        ("property_tests/aid.py", "U = 30", "U = 0", set()),
        # What both conftest.py do for every test, and what pytest is told.
        ("property_tests/conftest.py", "44", "0", BY_TEST | {"import"}),
        ("property_tests/conftest.py", "45", "0", BY_TEST | {"import of", "import"}),
        ("property_tests/conftest.py", "52", "0", BY_TEST | {"import"}),
        ("property_tests/rooms.py", "64", "0", BY_TEST | {"import"}),
        ("property_tests/rooms.py", "65", "0", BY_TEST | {"import"}),
        ("conftest.py", "@fixture", "load(1)\n\n\n@fixture", BY_TEST | {"import of", "import"}),
        (
            "conftest.py",
            "@fixture",
            "def pytest_configure():\n    return 1\n\n\n@fixture",
            BY_TEST | {"import"},
        ),
        ("conftest.py", "@fixture", "collect_ignore = ['a']\n\n\n@fixture", BY_TEST | {"import"}),
        ("pyproject.toml", "", "[tool.pytest.ini_options]\naddopts = ['-x']\n", BY_TEST),
        # What no test asks for, and what only prints.
        ("property_tests/conftest.py", "51", "0", {"import"}),
        ("property_tests/conftest.py", "53", "0", {"import"}),
        ("property_tests/rooms.py", "43", "0", {"import"}),
        ("property_tests/kit/other.py", "62", "0", set()),
        ("conftest.py", "@fixture", "X = 1\n\n\n@fixture", {"import"}),
        # The code between, which it is carried in spite of.
        ("pyproject.toml", "", "[tool]\n", set()),
    ],
)
def test_what_a_carried_verdict_outlives(
    root: Path, name: str, old: str, new: str, lost: set[str]
) -> None:
    def keys() -> dict[str, str]:
        now = Near(Evidence(root))
        return {k: now.key(outcome, by, mutant) for k, (mutant, outcome, by) in VERDICTS.items()}

    before = keys()
    assert all(before.values())
    edit(root, name, old, new)
    after = keys()
    assert {k for k in before if before[k] != after[k]} == lost


@pytest.mark.parametrize("outcome", ["survived", "open", "not run", "identical"])
def test_what_claims_that_all_tests_pass_is_never_carried(root: Path, outcome: str) -> None:
    assert Near(Evidence(root)).key(outcome, "", IN_F) == ""
    assert Near(Evidence(root)).key(outcome, TEST, IN_F) == ""


@pytest.mark.parametrize("by", [runner.SUMS, "the end", "property_tests/test_gone.py::test"])
def test_a_kill_by_no_test_that_there_is_is_not_carried(root: Path, by: str) -> None:
    assert Near(Evidence(root)).key("killed", by, IN_F) == ""


def test_a_patch_rests_on_every_function_in_which_its_lines_stand(root: Path) -> None:
    both = at("quest/a.py", 6, 10)
    for old in ("12", "13", "N = 10"):
        before = Near(Evidence(root)).key("killed", TEST, both)
        edit(root, "quest/a.py", old, "0" if old.isdigit() else "N = 0")
        assert Near(Evidence(root)).key("killed", TEST, both) != before


# --- the journal --------------------------------------------------------------------------------


def kill(root: Path, mutant: Mutant = IN_F, folder: str = "work") -> None:
    journal(root, folder).add(mutant, Result(mutant.id, mutant.what, "killed", TEST, 1.0))


def state(found: Journal, mutant: Mutant = IN_F) -> tuple[str, bool]:
    result = found.known(mutant)
    return result.outcome if result else "untried", found.is_carried(mutant)


def test_a_kill_is_carried_while_what_stands_nearest_is_the_same(root: Path) -> None:
    kill(root)
    assert state(journal(root)) == ("killed", False)
    assert state(journal(root), dataclasses.replace(IN_F, what="1 -> 3")) == ("untried", False)
    edit(root, "quest/a.py", "13", "0")
    assert state(journal(root)) == ("killed", True)
    assert state(journal(root), dataclasses.replace(IN_F, what="1 -> 3")) == ("untried", False)
    # It goes on so in the record.
    lines = [*journal(root).lines([IN_F])]
    assert state(Journal(root / "new", Evidence(root), record=lines)) == ("killed", True)
    edit(root, "quest/a.py", "12", "0")
    assert state(journal(root)) == ("untried", False)


def test_a_survivor_is_not_carried(root: Path) -> None:
    journal(root).add(IN_F, Result(IN_F.id, IN_F.what, "survived"))
    edit(root, "quest/a.py", "13", "0")
    assert state(journal(root)) == ("untried", False)


def test_the_record_says_what_stands_nearest_to_what_holds(root: Path) -> None:
    """Also to results that an earlier journal has without it, which are not carried else."""
    kill(root)
    path = journal(root).path
    near = journal(root).known(IN_F)
    assert near is not None
    path.write_text(path.read_text().replace(near.near, ""))
    lines = [*journal(root).lines([IN_F])]
    edit(root, "quest/a.py", "13", "0")
    assert state(journal(root)) == ("untried", False)
    assert state(Journal(root / "new", Evidence(root), record=lines)) == ("killed", True)


@pytest.mark.parametrize("outcome", ["survived", "open", "not run"])
def test_a_new_result_counts_before_a_carried_kill(root: Path, outcome: str) -> None:
    """Also later, when neither holds: the kill is no more what was found last."""
    kill(root, folder="old")
    edit(root, "quest/a.py", "13", "0")
    (root / "work").mkdir()
    (root / "work" / "copied.jsonl").write_text(journal(root, "old").path.read_text())
    assert state(journal(root)) == ("killed", True)
    passed = "own tests" if outcome == "open" else ""
    journal(root).add(IN_F, Result(IN_F.id, IN_F.what, outcome, passed=passed))
    assert state(journal(root)) == (outcome, False)
    edit(root, "quest/a.py", "return 0", "return 1")
    assert state(journal(root)) == ("untried", False)


@pytest.mark.parametrize(
    ("folder", "there", "expected"),
    [
        # What this journal says is the last; else which came later is not known.
        ("work", "no GPU, here", ("killed", True)),
        ("other", "no GPU, here", ("untried", False)),
        ("other", "H100", ("killed", True)),
    ],
)
def test_a_kill_is_not_carried_where_tests_passed_in_another_journal_on_its_stack(
    root: Path, stack: Callable[[str], None], folder: str, there: str, expected: tuple[str, bool]
) -> None:
    journal(root).add(IN_F, Result(IN_F.id, IN_F.what, "survived"))
    survivor = journal(root).path
    survivor.rename(survivor.with_name("one.jsonl"))
    stack(there)
    kill(root, folder=folder)
    if folder != "work":
        found = journal(root, folder).path
        found.rename(survivor.with_name("two.jsonl"))
    edit(root, "quest/a.py", "13", "0")
    assert state(journal(root)) == expected


@pytest.mark.parametrize(
    ("there", "here", "expected"),
    [
        ("H100", "no GPU", ("killed", True)),
        ("H100", "H200", ("not run", False)),
        ("no GPU", "no GPU, too", ("not run", False)),
    ],
)
def test_without_a_gpu_a_kill_on_one_is_not_refuted(
    root: Path, stack: Callable[[str], None], there: str, here: str, expected: tuple[str, bool]
) -> None:
    stack(there)
    kill(root, TEXT)
    edit(root, "quest/a.py", "13", "0")
    stack(here)
    assert not journal(root).passed(TEXT)
    journal(root).add(TEXT, Result(TEXT.id, TEXT.what, "not run"))
    assert state(journal(root), TEXT) == expected
    assert journal(root).passed(TEXT) == here.startswith("no GPU")


@pytest.mark.parametrize("outcome", ["not run", "open", "survived"])
def test_what_passed_without_a_gpu_is_told_while_it_holds(
    root: Path, stack: Callable[[str], None], outcome: str
) -> None:
    stack("H100")
    kill(root, TEXT)
    edit(root, "quest/a.py", "13", "0")
    stack("no GPU")
    passed = "first tests" if outcome == "open" else ""
    journal(root).add(TEXT, Result(TEXT.id, TEXT.what, outcome, passed=passed))
    assert (state(journal(root), TEXT), journal(root).passed(TEXT)) == (("killed", True), True)
    edit(root, "quest/a.py", "return 0", "return 1")
    assert (state(journal(root), TEXT), journal(root).passed(TEXT)) == (("killed", True), False)


def test_a_timeout_is_carried_for_as_much_patience(root: Path) -> None:
    late = Result(IN_F.id, IN_F.what, "timeout", TEST, patience=5.0)
    journal(root).add(IN_F, late)
    edit(root, "quest/a.py", "13", "0")
    for patience, expected in ((5.0, ("timeout", True)), (30.0, ("untried", False))):
        assert state(Journal(root / "work", Evidence(root), patience)) == expected


# --- the table and the command ------------------------------------------------------------------


def test_the_table_counts_carried_verdicts_beside_their_outcomes() -> None:
    made = [at("quest/a.py", n, name=f"f{n}") for n in range(4)]
    results = {m.id: Result(m.id, m.what, "killed", TEST, 1.0, stack="s") for m in made[:3]}
    mine = table.Table(made, results, Proofs(), frozenset({made[0].id, made[1].id}))
    for of in mine.groups().values():
        told = dict(zip(table.HEAD, mine.totals(of)[-1][1:], strict=True))
        assert (told["killed"], told["carried"]) == ("3", "2")
    assert [mine.told(m) for m in made[1:]] == ["killed (carried)", "killed", "untried"]
    assert "--again carried" in record.markdown(mine)


def test_what_passed_here_is_told_apart() -> None:
    """Of what was looked at: confirmed, not, still carried though it passed without a GPU."""
    made = [at("quest/a.py", n, name=f"f{n}") for n in range(5)]
    outcomes = ("killed", "survived", "killed", "killed", "refused")
    results = {
        m.id: Result(m.id, m.what, o) for m, o in zip(made, outcomes, strict=True)
    }  # fmt: skip
    mine = table.Table(made, results, Proofs(), frozenset({made[2].id, made[3].id}))
    doubted = [m.id for m in made]
    told = "of 5 carried verdicts 2 are confirmed, 1 are not,"
    assert command._checked(doubted, mine, set()) == f"{told} 2 were not looked at again"
    found = command._checked(doubted, mine, {made[2].id, "another"})
    assert found == f"{told} 1 passed here, where there is no GPU, 1 were not looked at again"


class Known:
    """What the command sees of the mutants of a file: two of three are carried, a third holds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mutants = [m for m in command.all_mutants() if m.file == "quest/packing.py"][:60]
        self.carried = {m.id for i, m in enumerate(self.mutants) if i % 3}
        self.untried = {self.mutants[0].id}
        self.asked: list[Mutant] = []
        self.found: dict[str, Result] = {}  # by the run
        monkeypatch.setattr(command, "all_mutants", lambda: self.mutants)
        monkeypatch.setattr(command.proofs, "read", Proofs)
        monkeypatch.setattr(command.journal_.Journal, "known", lambda _, m: self.known(m))
        monkeypatch.setattr(
            command.journal_.Journal, "is_carried",
            lambda _, m: m.id in self.carried and m.id not in self.found,
        )  # fmt: skip
        monkeypatch.setattr(command, "_run", lambda _, missing, *rest: self.run(missing))

    def known(self, mutant: Mutant) -> Result | None:
        old = Result(mutant.id, mutant.what, "killed", TEST, stack="s")
        return self.found.get(mutant.id, None if mutant.id in self.untried else old)

    def run(self, missing: list[Mutant]) -> None:
        """Four of them: the second survives."""
        self.asked += missing
        for i, m in enumerate(missing[:4]):
            self.found[m.id] = Result(m.id, m.what, "survived" if i == 1 else "killed", stack="s")


def test_what_is_carried_runs_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, more in (
        ((), 0), (("--again", "survived"), 0), (("--again", "carried"), 40),
        (("--again", "killed"), 59),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            known = Known(patch)
            CliRunner().invoke(command.main, ["--work", str(tmp_path), *arguments])
            assert len(known.asked) == 1 + more
            assert known.untried < {m.id for m in known.asked} or not more


@pytest.mark.parametrize("how", ["--sample", "--each"])
def test_a_sample_of_what_is_carried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Nothing else runs, and the end says how many new verdicts are the old ones."""
    asked = []
    for seed in "112":
        with monkeypatch.context() as patch:
            known = Known(patch)
            line = ["--work", str(tmp_path), "--again", "carried", how, "6", "--seed", seed]
            done = CliRunner().invoke(command.main, line)
            asked.append([m.id for m in known.asked])
            assert len(known.asked) == 6
            assert {m.id for m in known.asked} <= known.carried
            told = "of 6 carried verdicts 3 are confirmed, 1 are not, 2 were not looked at again"
            assert told in done.output
            assert done.exit_code == 1  # for the survivor
    assert asked[0] == asked[1] != asked[2]
