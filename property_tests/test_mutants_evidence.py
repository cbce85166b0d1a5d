"""What a verdict of a mutant rests on: which edits it outlives, and which void it."""

from __future__ import annotations

import ast
import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from property_tests.mutants import baseline, covered
from property_tests.mutants.evidence import Evidence, Outline, dump
from property_tests.mutants.journal import Journal
from property_tests.mutants.mutant import Mutant
from property_tests.mutants.runner import Result

FILES = {
    "quest/a.py": '"""Text."""\n\nfrom quest.b import g\n\n\ndef f(x):\n    return g(x) + 1\n\n\n'
    "def other():\n    return 2\n",
    "quest/b.py": "N = 3\n\n\ndef g(x):\n    return x * N\n\n\ndef unused():\n    return 4\n",
    "quest/ratios.json": "{}",
    "quest/lists/a.skips": "",
    "quest/lists/a.xfails": "",
    "kernels/cuda.py": "def compile_():\n    return 1\n",
    "kernels/k.cu": "int x;\n",
    "reference/r.py": "",
    "property_tests/test_a.py": "def test_f(): ...\n",
    "property_tests/test_b.py": "from property_tests import aid\n\n\n"
    "def test_g_compiles_without_a_gpu(): ...\n",
    "property_tests/aid.py": "import property_tests.further\n",
    "property_tests/further.py": "from property_tests import deck\n",
    "property_tests/deck/__init__.py": "",
    "property_tests/deck/part.py": "",
    "property_tests/deck/text.h": "int z;\n",
    "property_tests/spare/__init__.py": "",
    "property_tests/mutants/__init__.py": "",
    "property_tests/conftest.py": "from property_tests.ground import X\n",
    "property_tests/ground.py": "",
    "conftest.py": "",
    "pyproject.toml": "",
}
LINES = {
    "property_tests/test_a.py": {"quest/a.py": {3, 6, 7}, "quest/b.py": {1, 4, 5}},
    "property_tests/test_b.py": {"quest/b.py": {5}, "kernels/cuda.py": {2}},
}
MUTANT = Mutant("quest/a.py:f:constant:0", "systematic", "quest/a.py", (7, 7), 0, 0, "", "1 -> 2")
A, B = "property_tests/test_a.py::test_f", "property_tests/test_b.py::test_g_compiles_without_a_gpu"
OUTCOMES = {
    "kill by a": ("killed", A),
    "kill by b": ("timeout", B),
    "ci": ("killed", f"{A} (ci)"),
    "import": ("killed", "import"),
    "survivor": ("survived", ""),
    "refused": ("refused", ""),
    "identical": ("identical", ""),
}
# That variants are what they were rests on what compiles them, as a kill by that does.
BY_B = {"kill by b", "identical"}
KILLS = {"kill by a", *BY_B}


def project(root: Path, **changed: str) -> Evidence:
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return Evidence(root)


def edit(root: Path, name: str, old: str, new: str) -> None:
    path = root / name
    text = path.read_text() if path.exists() else ""
    assert old in text
    path.write_text(text.replace(old, new) if old else text + new)


@pytest.mark.parametrize(
    ("name", "old", "new", "left"),
    [
        ("quest/b.py", "N = 3", "N = 3  # why\n\n", set(OUTCOMES)),
        ("quest/a.py", '"""Text."""', '"""Other text."""', set(OUTCOMES)),
        # A function that both files of tests call, one that neither does, and one of b's alone.
        ("quest/b.py", "x * N", "x + N", {"refused"}),
        ("quest/b.py", "return 4", "return 5", KILLS | {"refused"}),
        ("kernels/cuda.py", "return 1", "return 2", {"kill by a"}),
        # The code of a module counts where it is executed, and all of the mutated file does.
        ("quest/b.py", "N = 3", "N = 4", {"refused"}),
        ("kernels/cuda.py", "def", "N = 1\n\n\ndef", {"kill by a"}),
        ("quest/a.py", "return 2", "return 3", {"refused"}),
        ("quest/c.py", "", "", KILLS | {"refused"}),
        ("property_tests/test_b.py", "...", "...  # why", set(OUTCOMES)),
        ("property_tests/ground.py", "", '"""Text."""\n', set(OUTCOMES)),
        # Tests: the killing one's own file, and another's.
        ("property_tests/test_a.py", "...", "1", BY_B | {"refused"}),
        ("property_tests/test_b.py", "...", "1", {"kill by a", "refused"}),
        ("property_tests/test_c.py", "", "def test(): ...\n", KILLS | {"refused"}),
        ("property_tests/conftest.py", "", "X = 1\n", {"refused"}),
        # Helpers: of all tests, of none, of one, and of that one's helper.
        ("property_tests/ground.py", "", "X = 1\n", {"refused"}),
        ("property_tests/unused.py", "", "X = 1\n", KILLS | {"refused"}),
        ("property_tests/aid.py", "", "X = 1\n", {"kill by a", "refused"}),
        ("property_tests/further.py", "", "X = 1\n", {"kill by a", "refused"}),
        # Packages of helpers, whole: of one test and of none; what judges mutants is no helper.
        ("property_tests/deck/part.py", "", "X = 1\n", {"kill by a", "refused"}),
        ("property_tests/deck/part.py", "", '"""Text."""\n', set(OUTCOMES)),
        ("property_tests/deck/text.h", "int", "long", {"kill by a", "refused"}),
        ("property_tests/spare/__init__.py", "", "X = 1\n", KILLS | {"refused"}),
        ("property_tests/mutants/__init__.py", "", "X = 1\n", set(OUTCOMES)),
        ("pyproject.toml", "", "[tool]\n", {"refused"}),
        # Data count for all; CUDA C++ where it is compiled.
        ("quest/ratios.json", "{}", "[]", set()),
        ("quest/lists/a.xfails", "", "test_a\n", set()),
        ("quest/lists/a.skips", "", "test_a\n", set()),
        ("kernels/k.cu", "int", "long", {"kill by a"}),
        ("property_tests/test_mutants.py", "", "X = 1\n", set(OUTCOMES)),
    ],
)
def test_what_a_verdict_outlives(
    tmp_path: Path, name: str, old: str, new: str, left: set[str]
) -> None:
    before = project(tmp_path)
    for tests, lines in LINES.items():
        before.learn(tests, before.called(lines), "s")
    keys = {k: before.key(outcome, "quest/a.py", by, "s") for k, (outcome, by) in OUTCOMES.items()}
    edit(tmp_path, name, old, new)
    after = Evidence(tmp_path)
    after.calls = before.calls  # as the journal keeps them
    now = {k: after.key(outcome, "quest/a.py", by, "s") for k, (outcome, by) in OUTCOMES.items()}
    assert {k for k in keys if keys[k] == now[k]} == left


@pytest.mark.parametrize(
    ("file", "changed", "left"),
    [
        ("kernels/k.cu", "kernels/k.cu", set()),
        ("kernels/k.cu", "kernels/h.cuh", {"kill by a"}),
        ("kernels/k.cu", "kernels/deep.cuh", {"kill by a"}),
        # A kernel that the same tests may launch, and what only that includes.
        ("kernels/k.cu", "kernels/other.cu", KILLS | {"refused"}),
        ("kernels/k.cu", "kernels/apart.cuh", KILLS | {"refused"}),
        # A header rests on all that includes it, and on what these include besides.
        ("kernels/deep.cuh", "kernels/k.cu", {"kill by a"}),
        ("kernels/deep.cuh", "kernels/beside.cuh", {"kill by a"}),
        ("kernels/deep.cuh", "kernels/other.cu", KILLS | {"refused"}),
        # Of a fault in Python, on all.
        ("quest/b.py", "kernels/other.cu", {"kill by a"}),
    ],
)
def test_a_fault_in_a_text_rests_on_what_is_compiled_with_it(
    tmp_path: Path, file: str, changed: str, left: set[str]
) -> None:
    project(tmp_path)
    for name, included in {
        "k.cu": "h.cuh beside.cuh", "h.cuh": "deep.cuh", "other.cu": "apart.cuh",
        "deep.cuh": "", "beside.cuh": "", "apart.cuh": "",
    }.items():  # fmt: skip
        lines = [f'#include "{i}"\n' for i in included.split()]
        (tmp_path / "kernels" / name).write_text("".join(lines))

    def keys() -> dict[str, str]:
        now = Evidence(tmp_path)
        for tests, lines in LINES.items():
            now.learn(tests, now.called(lines), "s")
        return {k: now.key(outcome, file, by, "s") for k, (outcome, by) in OUTCOMES.items()}

    before = keys()
    edit(tmp_path, changed, "", "int y;\n")
    after = keys()
    assert {k for k in before if before[k] == after[k]} == left


def test_every_version_of_python_makes_the_same_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def f(x):\n    return g(x)\n"
    before = Outline(source).digest(None)
    # As Python 3.12 does.
    monkeypatch.setattr(ast.FunctionDef, "_fields", (*ast.FunctionDef._fields, "type_params"))
    monkeypatch.setattr(ast.FunctionDef, "type_params", [], raising=False)
    assert Outline(source).digest(None) == before


def test_constants_of_an_f_string_may_be_cut_anywhere() -> None:
    """As versions of Python do."""

    def f_string(*parts: str | ast.expr) -> ast.JoinedStr:
        return ast.JoinedStr([ast.Constant(p) if isinstance(p, str) else p for p in parts])

    value = ast.FormattedValue(ast.Name("x", ast.Load()), -1, f_string(".", "2f"))
    whole = ast.parse('f"a{{b {x:.2f}"', mode="eval").body
    assert dump(f_string("a{", "b ", value, "")) == dump(whole)
    assert dump(f_string("a", value, "b")) != dump(f_string("ab", value))


def test_empty_constants_are_told_apart() -> None:
    values = ("0", "0.0", "False", "None", "''", "b''", "()", "[]", "{}", "...", "1", "True")
    sources = [f"def f():\n    return {value}\n" for value in (*values, "")]
    assert len({Outline(source).digest(None) for source in sources}) == len(sources)


def test_a_digest_of_files_is_of_their_names_too(tmp_path: Path) -> None:
    """What reads a file finds it by its name."""
    project(tmp_path)
    text = tmp_path / "kernels" / "k.cu"
    before = covered.of_files(tmp_path, [text])
    moved = text.rename(text.with_name("l.cu"))
    assert covered.of_files(tmp_path, [moved]) != before
    assert covered.of_files(tmp_path, [moved.rename(text)]) == before


def test_what_no_look_sees_rests_on_everything(tmp_path: Path) -> None:
    """Of tests that start processes in worktrees the lines are not known."""
    unseen, seen = "property_tests/test_gate_runs.py::test", A
    project(tmp_path)
    (tmp_path / "property_tests" / "test_gate_runs.py").write_text("def test(): ...\n")

    def keys() -> list[str]:
        now = Evidence(tmp_path)
        for by in (unseen, seen):
            now.learn(by.partition("::")[0], {"quest/a.py": ["f"]}, "s")
        return [now.key("killed", "quest/a.py", by, "s") for by in (unseen, seen)]

    before = keys()
    edit(tmp_path, "quest/b.py", "return 4", "return 5")
    assert [a == b for a, b in zip(before, keys(), strict=True)] == [False, True]


def test_a_verdict_rests_on_what_its_own_stack_calls(tmp_path: Path) -> None:
    """Whichever was asked about before."""
    project(tmp_path)
    file = A.partition("::")[0]
    calls = {"no GPU": {"quest/b.py": ["g"]}, "H100": {"quest/b.py": ["g", "unused"]}}

    def keys(*stacks: str) -> dict[str, str]:
        now = Evidence(tmp_path)
        for stack, of in calls.items():
            now.learn(file, of, stack)
        return {stack: now.key("killed", "quest/a.py", A, stack) for stack in stacks}

    before = keys(*calls)
    assert before == keys(*reversed(calls))
    edit(tmp_path, "quest/b.py", "return 4", "return 5")
    after = keys(*calls)
    assert [before[stack] == after[stack] for stack in calls] == [True, False]


def test_variants_rest_on_each_file_that_compiles_some(tmp_path: Path) -> None:
    """Of a second one, unseen so far, nothing is known: then on everything."""
    other = "property_tests/test_c.py"
    project(tmp_path)
    (tmp_path / other).write_text("def test_x_compiles_without_a_gpu(): ...\n")

    def key(calls: dict[str, list[str]] | None) -> str:
        now = Evidence(tmp_path)
        now.learn(B.partition("::")[0], {"quest/b.py": ["g"]}, "s")
        if calls is not None:
            now.learn(other, calls, "s")
        return now.key("identical", "quest/a.py", "", "s")

    every = (None, {}, {"quest/b.py": ["unused"]})
    before = [key(calls) for calls in every]
    edit(tmp_path, "quest/b.py", "return 4", "return 5")
    assert [a == key(calls) for a, calls in zip(before, every, strict=True)] == [False, True, False]


@pytest.mark.parametrize("name", [
    "quest/a.py", "quest/ratios.json", "kernels/k.cu", "reference/r.py", "conftest.py",
    "pyproject.toml", "property_tests/test_a.py", "property_tests/conftest.py",
    "property_tests/promoted.json",
])  # fmt: skip
def test_the_look_without_a_fault_is_as_old_as_what_verdicts_rest_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project(tmp_path)
    monkeypatch.setattr(baseline, "ROOT", tmp_path)
    before = baseline._key("property_tests/test_a.py")
    edit(tmp_path, name, "", "\n")
    assert baseline._key("property_tests/test_a.py") != before


def test_the_look_without_a_fault_is_of_one_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project(tmp_path)
    monkeypatch.setattr(baseline, "ROOT", tmp_path)
    keys = []
    for stack in ("no GPU, python 3.11", "no GPU, python 3.12", "H100, python 3.11"):
        monkeypatch.setattr(covered, "stack", lambda stack=stack: stack)
        keys.append(baseline._key("property_tests/test_a.py"))
    assert len({*keys}) == 3


def test_benchmarks_count_for_tests_that_import_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project(tmp_path)
    edit(tmp_path, "property_tests/test_b.py", "", "import benchmarks.x\n")
    monkeypatch.setattr(baseline, "ROOT", tmp_path)

    def keys() -> list[str]:
        now = Evidence(tmp_path)
        for tests, lines in LINES.items():
            now.learn(tests, now.called(lines), "s")
        kills = [now.key("killed", "quest/a.py", by, "s") for by in (A, B)]
        return [*kills, *(baseline._key(by.partition("::")[0]) for by in (A, B))]

    before = keys()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "x.py").write_text("")
    assert [a == b for a, b in zip(before, keys(), strict=True)] == [True, False, True, False]


@pytest.mark.parametrize(
    ("lines", "called"),
    [
        ({2, 5}, []),  # the lines that define them
        ({3}, ["f"]),
        ({9}, ["C.m"]),
        ({12}, ["_"]),
        ({15}, ["_"]),
        ({4}, ["f"]),  # an inner function belongs to the outer one
    ],
)
def test_functions_by_the_lines_they_execute(lines: set[int], called: list[str]) -> None:
    source = (
        "x = 1\ndef f():\n    def g(): return 1\n    return g\nclass C:\n    y = 2\n"
        "    @property\n    def m(self):\n        return 1\n@a\ndef _():\n    return 1\n"
        "@b\ndef _():\n    return 2\n"
    )
    assert Outline(source).called(lines) == called


def test_a_method_or_a_default_changes_the_code_of_the_module() -> None:
    plain = Outline("class C:\n    def m(self, a=1):\n        return 1\n")
    for other in (
        "class C:\n    def m(self, a=2):\n        return 1\n",
        "class C:\n    def m(self, a=1):\n        return 1\n    def __eq__(self, o): ...\n",
        "class C:\n    @p\n    def m(self, a=1):\n        return 1\n",
    ):
        assert Outline(other).digest(()) != plain.digest(())
    body = Outline("class C:\n    def m(self, a=1):\n        return 2\n")
    assert body.digest(()) == plain.digest(())
    assert body.digest(("C.m",)) != plain.digest(("C.m",))


# --- the journal --------------------------------------------------------------------------------


def journal(root: Path) -> Journal:
    return Journal(root, Evidence(root))


def holds_in(found: Journal, mutant: Mutant = MUTANT) -> bool:
    """Whether a verdict is known that holds, and is not only carried."""
    return found.known(mutant) is not None and not found.is_carried(mutant)


class Seen:
    """A baseline, of which the journal asks one thing."""

    def __init__(self, lines: dict[str, dict[str, set[int]]] = LINES) -> None:
        self.executed = lines


def test_a_journal_goes_on_where_it_stopped(tmp_path: Path) -> None:
    project(tmp_path)
    first = journal(tmp_path)
    first.learn(Seen())  # type: ignore[arg-type]
    first.add(MUTANT, Result(MUTANT.id, MUTANT.what, "killed", A, 1.0))
    with first.path.open("a") as file:
        file.write('{"id": "quest/a.py:f:con')  # the end of a run that was killed
    other = replace(MUTANT, id="quest/a.py:f:constant:9")
    journal(tmp_path).add(other, Result(other.id, other.what, "killed", A, 1.0))
    again = journal(tmp_path)
    assert again.known(other) is not None
    found = again.known(MUTANT)
    assert found is not None
    assert (found.outcome, found.by) == ("killed", A)
    assert again.known(replace(MUTANT, what="1 -> 3")) is None
    assert again.known(replace(MUTANT, id="quest/a.py:f:constant:1")) is None
    edit(tmp_path, "quest/b.py", "x * N", "x + N")
    assert not holds_in(journal(tmp_path))
    # Which does not make the test a less likely one.
    assert journal(tmp_path).killers(MUTANT).most_common(1)[0][0] == A


def test_a_kill_is_void_where_its_tests_call_something_besides_now(tmp_path: Path) -> None:
    project(tmp_path)
    first = journal(tmp_path)
    first.learn(Seen())  # type: ignore[arg-type]
    first.add(MUTANT, Result(MUTANT.id, MUTANT.what, "killed", A, 1.0))
    tests = A.partition("::")[0]
    for lines, holds in (
        (LINES, True),
        ({tests: {"quest/a.py": {7}}}, True),  # it rests on that and more
        ({tests: LINES[tests] | {"quest/b.py": {1, 4, 5, 9}}}, False),
    ):
        later = journal(tmp_path)
        later.known(MUTANT)  # what it was asked before counts no more
        later.learn(Seen(lines))  # type: ignore[arg-type]
        assert holds_in(later) == holds
        assert holds_in(journal(tmp_path)) == holds


def test_names_and_kinds_of_files_and_versions_count(tmp_path: Path) -> None:
    """Of files that are alike, lists of an adapter's, and what the oracle computes with."""
    names = [f"quest/a{suffix}" for suffix in (".cu", ".cuh", ".json", ".py", ".skips", ".xfails")]
    (tmp_path / "quest").mkdir()
    for name in (*names, "quest/a.md"):
        (tmp_path / name).write_text("")
    found = covered.sources(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in found] == names
    assert len({covered.of_files(tmp_path, [path]) for path in found}) == len(names)
    for package in ("torch", "triton", "numpy", "scipy", "pytest", "hypothesis"):
        assert f" {package} " in covered.stack()


def test_what_is_not_executed_is_no_evidence(tmp_path: Path) -> None:
    """A file without a line that ran; texts of CUDA C++ where their compiler is only imported."""
    made = project(tmp_path)
    assert made.called({"quest/a.py": set(), "quest/b.py": {5}}) == {"quest/b.py": ["g"]}
    tests, keys = A.partition("::")[0], []
    for text in FILES["kernels/k.cu"], "int y;\n":
        (tmp_path / "kernels/k.cu").write_text(text)
        for calls in [], ["compile_"]:
            made = Evidence(tmp_path)
            made.learn(tests, {"quest/a.py": ["f"], "kernels/cuda.py": calls}, "stack")
            keys.append(made.key("killed", MUTANT.file, A, "stack"))
    assert keys[0] == keys[2]
    assert keys[1] != keys[3]


@pytest.mark.parametrize("name", ["property_tests/promoted.json", "benchmarks/cases.py"])
def test_what_tests_read_besides_counts(name: str, tmp_path: Path) -> None:
    project(tmp_path)
    first = journal(tmp_path)
    first.add(MUTANT, Result(MUTANT.id, MUTANT.what, "survived"))
    assert journal(tmp_path).known(MUTANT) is not None
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("[]")
    assert journal(tmp_path).known(MUTANT) is None


def test_the_last_result_of_a_stack_counts(tmp_path: Path) -> None:
    """A test was wrong, or passes now: what a later run says of the same code replaces it."""
    project(tmp_path)
    made = journal(tmp_path)
    for outcome, by in (("killed", A), ("survived", ""), ("timeout", B)):
        made.add(MUTANT, Result(MUTANT.id, MUTANT.what, outcome, by))
        for now in (made, journal(tmp_path)):
            found = now.known(MUTANT)
            assert found is not None
            assert found.outcome == outcome


def test_of_several_stacks_the_one_that_says_most_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = (
        ("not run", "", ""), ("open", "", "first tests"), ("open", "", "own tests"),
        ("open", "", "quick profile"), ("survived", "", ""), ("identical", "", ""),
        ("refused", "", ""), ("timeout", A, ""), ("crash", A, ""), ("killed", A, ""),
    )  # fmt: skip
    project(tmp_path)
    for n, pair in enumerate(itertools.pairwise(order)):
        for m, stacks in enumerate((("here", "there"), ("there", "here"))):
            folder = tmp_path / f"{n}{m}"
            for stack, (outcome, by, passed) in zip(stacks, pair, strict=True):
                monkeypatch.setattr(covered, "stack", lambda stack=stack: stack)
                result = Result(MUTANT.id, MUTANT.what, outcome, by, passed=passed)
                Journal(folder, Evidence(tmp_path)).add(MUTANT, result)
            found = Journal(folder, Evidence(tmp_path)).known(MUTANT)
            assert found is not None
            assert (found.outcome, found.by, found.passed) == pair[1]


def test_a_survivor_is_void_with_any_test(tmp_path: Path) -> None:
    project(tmp_path)
    first = journal(tmp_path)
    first.add(MUTANT, Result(MUTANT.id, MUTANT.what, "survived"))
    assert journal(tmp_path).known(MUTANT) is not None
    edit(tmp_path, "property_tests/test_b.py", "...", "1")
    assert journal(tmp_path).known(MUTANT) is None


def test_likely_killers(tmp_path: Path) -> None:
    """What killed it before, then what killed in its function, then in its file."""
    project(tmp_path)
    made = journal(tmp_path)
    results: list[tuple[str, str]] = [
        ("quest/a.py:f:constant:3", A),
        ("quest/a.py:other:constant:0", B),
        ("quest/a.py:other:constant:1", B),
        ("quest/b.py:f:constant:0", "property_tests/test_c.py::test"),
    ]
    for name, by in results:
        made.add(replace(MUTANT, id=name), Result(name, "", "killed", by))
    assert made.killers(MUTANT) == {A: 11, B: 2}
    made.add(MUTANT, Result(MUTANT.id, MUTANT.what, "killed", f"{B} (ci)"))
    assert made.killers(MUTANT).most_common(1)[0][0] == B
    # What was left open has passed them, but for what killed itself elsewhere.
    nine = "quest/a.py:f:constant:9"
    made.add(replace(MUTANT, id=nine), Result(nine, "", "killed", A))
    for name, likely in (("quest/a.py:f:constant:8", {}), (nine, {A: 10**6})):
        of = replace(MUTANT, id=name)
        assert made.killers(of).total() > 0
        made = Journal(tmp_path / "elsewhere", Evidence(tmp_path), record=[
            *(tmp_path / "journal.jsonl").read_text().splitlines(),
            json.dumps(asdict(Result(name, "", "open", passed="first tests", stack="another"))),
        ])  # fmt: skip
        assert made.killers(of) == likely


def test_a_record_is_a_journal_of_what_holds(tmp_path: Path) -> None:
    """Where it is read, it holds as long; a test that killed stays a likely one beyond that."""
    project(tmp_path)
    first = journal(tmp_path)
    first.learn(Seen())  # type: ignore[arg-type]
    first.add(MUTANT, Result(MUTANT.id, MUTANT.what, "killed", A, 1.0))
    gone = replace(MUTANT, id="quest/a.py:f:constant:9", what="an older text")
    first.add(gone, Result(gone.id, gone.what, "killed", B, 1.0))
    lines = list(first.lines([MUTANT, replace(gone, what="1 -> 3")]))
    assert [json.loads(line).get("id") for line in lines] == [None, None, MUTANT.id]
    first.path.unlink()
    for old, new, holds in (("return 2", "return 2  # why", True), ("return 2", "return 3", False)):
        edit(tmp_path, "quest/a.py", old, new)
        read = Journal(tmp_path, Evidence(tmp_path), record=lines)
        assert holds_in(read) == holds
        assert read.killers(MUTANT) == {A: 10**6 + 11}


def test_a_timeout_holds_for_as_much_patience(tmp_path: Path) -> None:
    project(tmp_path)
    late = Result(MUTANT.id, MUTANT.what, "timeout", A, patience=5.0)
    journal(tmp_path).add(MUTANT, late)
    for patience, holds in ((2.0, True), (5.0, True), (30.0, False)):
        read = Journal(tmp_path, Evidence(tmp_path), patience)
        assert (read.known(MUTANT) is not None) == holds


def test_what_another_machine_has_found_is_read_besides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By copying its journal into the folder; each verdict says on which stack it was reached."""
    project(tmp_path)
    monkeypatch.setattr(covered, "stack", lambda: "no GPU, python 3.11")
    journal(tmp_path).add(MUTANT, Result(MUTANT.id, MUTANT.what, "survived"))
    there = tmp_path / "there"
    project(there)
    monkeypatch.setattr(covered, "stack", lambda: "H100, python 3.12")
    found = journal(there)
    found.learn(Seen())  # type: ignore[arg-type]
    found.add(MUTANT, Result(MUTANT.id, MUTANT.what, "killed", A))
    (tmp_path / "h100.jsonl").write_text(found.path.read_text() + '{"id": "quest/a.py:f:con')
    monkeypatch.setattr(covered, "stack", lambda: "no GPU, python 3.11")
    here = journal(tmp_path)
    # What tests call here is no matter of the verdicts from there.
    here.learn(Seen({A.partition("::")[0]: {"quest/b.py": {9}}}))  # type: ignore[arg-type]
    best = here.known(MUTANT)
    assert best is not None
    assert (best.outcome, best.stack) == ("killed", "H100, python 3.12")
    edit(tmp_path, "quest/b.py", "return x * N", "return x")
    assert not holds_in(journal(tmp_path))
