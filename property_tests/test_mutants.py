"""The mutants themselves: what is planted, what is said of it, and a few of them killed.

All of them: `make mutants`.
"""

from __future__ import annotations

import ast
import dataclasses
import time
from collections import Counter
from pathlib import Path

import pytest

from property_tests.mutants import (
    choice,
    command,
    cuda_source,
    patches,
    pool,
    proofs,
    record,
    runner,
    systematic,
    table,
)
from property_tests.mutants.baseline import IMPORT, Baseline
from property_tests.mutants.choice import Part, quick, stages
from property_tests.mutants.command import _sampled, all_mutants, order
from property_tests.mutants.mutant import Mutant, read
from property_tests.mutants.proofs import Proofs, Rule

KNOWN = {m.id: m for m in all_mutants()}


def made(source: str) -> dict[str, list[str]]:
    """Mutants of a snippet: by operator, the mutated sources."""
    found: dict[str, list[str]] = {}
    for m in systematic.mutants("x.py", source.encode()):
        found.setdefault(m.id.split(":")[2], []).append(m.apply(source.encode()).decode())
    return found


@pytest.mark.parametrize(
    ("source", "operator", "expected"),
    [
        ("y = a + b", "arithmetic", ["y = (a - b)"]),
        ("y = a << b", "arithmetic", ["y = (a >> b)"]),
        ("y = a + b", "left", ["y = (a)"]),
        ("y = a + b", "right", ["y = (b)"]),
        ("y = a & b", "right", ["y = (b)"]),
        ("y = a < b", "compare", ["y = (a <= b)"]),
        ("y = a == b", "compare", ["y = (a != b)"]),
        ("y = a is b", "compare", ["y = (a is not b)"]),
        ("y = 0 < a <= 4", "compare", ["y = (0 <= a <= 4)", "y = (0 < a < 4)"]),
        ("y = a and b", "boolean", ["y = (a or b)"]),
        ("y = a and b", "term", ["y = (b)", "y = (a)"]),
        ("y = not a", "unary", ["y = (a)"]),
        ("y = -a", "unary", ["y = (a)"]),
        ("if a:\n    f()", "negate", ["if (not (a)):\n    f()"]),
        ("y = b if a else c", "negate", ["y = b if (not (a)) else c"]),
        ("y = 7", "constant", ["y = 8", "y = 6"]),
        ("y = 0.5", "constant", ["y = 1.5", "y = (-0.5)"]),
        ("y = 1e38", "constant", ["y = 2e+38", "y = 5e+37"]),
        ("y = True", "constant", ["y = False"]),
        ("f(a, b, c)", "swap", ["(f(b, a, c))", "(f(a, c, b))"]),
        ("y = tl.load(p, mask=m)", "keyword", ["y = (tl.load(p))"]),
        ("y = tl.load(p, other=0.0)", "other", ["y = tl.load(p, other=77)"]),
        ("y = tl.load(p, other=a + 1)", "constant", ["y = tl.load(p, other=a + 2)",
                                                     "y = tl.load(p, other=a + 0)"]),
        ("y = tl.minimum(a, b)", "call", ["y = tl.maximum(a, b)"]),
        ("y = x.abs()", "bare", ["y = (x)"]),
        ("y = tl.abs(x)", "bare", ["y = (x)"]),
        ("y = tl.where(c, a, b)", "where", ["y = (a)", "y = (b)"]),
        ("for i in range(n):\n    f()", "range",
         ["for i in range((n - 1)):\n    f()", "for i in range((n + 1)):\n    f()"]),
        ("y = x[a:b]", "slice", ["y = x[(a + 1):b]", "y = x[a:(b + 1)]"]),
        ("f(a)", "remove", ["pass"]),
        ("y += a", "remove", ["pass"]),
        ("y += a", "arithmetic", ["y -= a"]),
        ("def f(x):\n    x = g(x)\n    z = x", "remove", ["def f(x):\n    pass\n    z = x"]),
    ],
)  # fmt: skip
def test_each_operator_makes_what_it_says(source: str, operator: str, expected: list[str]) -> None:
    assert made(source)[operator] == expected


@pytest.mark.parametrize(
    "source",
    [
        '"""Text."""',
        "import a",
        "def f(x: int | None) -> a.b[1]: ...",
        "if TYPE_CHECKING:\n    f(1, 2)",
        "assert x > 0",
        '__all__ = ["a" + "b"]',
        "Union = A | B",
        'y = f"{a + 1}"',
        "@cache(maxsize=64)\ndef f(): return x",
        # A symmetric function; how fast, and not what.
        "y = torch.equal(a, b)",
        "y = k[g](a, num_warps=4, num_stages=2)",
    ],
)
def test_what_can_t_change_a_result_is_left_alone(source: str) -> None:
    assert made(source) == {}


@pytest.mark.parametrize(
    ("source", "operator"),
    [
        ("y = b if not a else c", "negate"),  # unary
        ("for i in range(4): f", "range"),  # constant
        ("for i in range(-1, 4): f", "range"),
        ("y = x[-1:2]", "slice"),
        ("y = tl.load(p, other=0.0)", "constant"),  # other
    ],
)
def test_a_mutant_that_another_rule_makes_is_made_once(source: str, operator: str) -> None:
    assert operator not in made(source)


@pytest.mark.parametrize("source", ["y = tl.minimum(a, b)", "y = max(a, b)"])
def test_arguments_that_stand_for_each_other_are_not_swapped(source: str) -> None:
    assert made(source).keys() == {"call"}
    assert "swap" in made("y = max(a, b, c)")


def test_messages_of_errors_are_left_alone() -> None:
    assert made('if a:\n    raise ValueError(f"{b}" + c)').keys() == {"negate", "remove"}


def test_a_mutant_stands_where_its_text_does_beside_wide_letters() -> None:
    assert made('s = "±∞"; y = a + b')["left"] == ['s = "±∞"; y = (a)']


def test_an_id_stays_where_lines_move() -> None:
    source = "def f(x):\n    return x + 1\n"
    for other in ("\n\n" + source, "def g(x):\n    return x + 2\n" + source):
        ids = {m.id: m.what for m in systematic.mutants("x.py", other.encode())}
        assert ids["x.py:f:arithmetic:0"] == "x + 1 -> (x - 1)"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("int a = b + c;", {"int a = b - c;"}),
        ("a = b;", {";"}),
        ("if (a < b) f<2>(x);", {"if (a <= b) f<2>(x);", "if (a < b) f<3>(x);",
                                 "if (a < b) f<1>(x);"}),
        ("  wait(bar, 1);", {"  ;", "  wait(bar, 2);", "  wait(bar, 0);"}),
        ("  sum += x;", {"  ;", "  sum -= x;"}),
        ("int y = 0xFFu;", {"int y = 0x100u;", "int y = 0xfeu;"}),
        ("float y = 0.5f;", {"float y = 1.5f;"}),
        ("int y = a ? b : c;", {"int y = a ? c : b;"}),
        ('int y = f("a + 1"); // a + 1', set()),
        ("#define N 4 + 4", set()),
    ],
)  # fmt: skip
def test_mutants_of_cuda_text(source: str, expected: set[str]) -> None:
    found = cuda_source.mutants("x.cu", source.encode())
    assert {m.apply(source.encode()).decode() for m in found} == expected


def test_who_launches_a_header() -> None:
    assert choice.launchers("kernels/hopper.cuh") == ["kernels/product.py", "kernels/sparse.py"]
    assert choice.launchers("kernels/codes.cuh") == ["kernels/blocks.py", "kernels/rows.py"]
    assert choice.launchers("kernels/rows.cu") == ["kernels/rows.py"]
    assert all(map(choice.launchers, command.CUDA))


def test_every_test_may_need_what_runs_at_import() -> None:
    """Also where only one was seen to run it, in a process of its own."""
    one, other = "property_tests/test_rows.py::a", "property_tests/test_launch_rules.py::b"
    outside = KNOWN["kernels/hopper.py:module:constant:8"]
    inside = next(m for m in KNOWN.values() if m.id.startswith("kernels/hopper.py:tensor_map:"))
    for mutant, expected in ((outside, [one, other]), (inside, [one])):
        lines = {mutant.file: {n: {one} for n in range(1, 200)}}
        seen = Baseline({one: 1.0, other: 1.0}, lines, [])
        assert sorted(t for part in stages(mutant, seen) for t in part.tests) == sorted(expected)


def test_files_that_have_mutants() -> None:
    assert {"kernels/hopper.cuh", "kernels/rows.cu"} < set(command.CUDA)
    assert {"kernels/rows.py", "quest/prologue.py"} < set(command.SYSTEMATIC)
    assert {*choice.OWN} >= {*command.CUDA, *command.SYSTEMATIC}
    # Those break kernels by their text, and would fail where that is another.
    assert not [n for f in command.CUDA for n in choice.OWN[f] if n.startswith("emulated")]


def test_every_mutant_has_a_name_of_its_own_and_parses() -> None:
    assert len(KNOWN) == len(all_mutants()) > 5000
    sources = {m.file: read(m.file) for m in KNOWN.values()}
    for i, m in enumerate(KNOWN.values()):
        assert sources[m.file][m.start : m.end].decode() != m.new, m.id
        # Patches, and some of those made of syntax trees.
        if m.file.endswith(".py") and (m.family != "systematic" or i % 100 == 0):
            ast.parse(m.apply(sources[m.file]))


def test_proofs_are_of_mutants_that_exist() -> None:
    written = proofs.read()
    assert written.stale(KNOWN.values()) == []
    assert all(len(because) > 40 for _, because in written.one.values())
    told = Proofs({"no:such": ("a -> b", "")}).stale(KNOWN.values())
    assert told == ["no:such is not a mutant"]
    name = "quest/packing.py:pack:remove:0"
    told = Proofs({name: ("a -> b", "")}).stale(KNOWN.values())
    assert told == [f"{name} is '_check(bits) -> pass', and not 'a -> b'"]


def test_a_rule_is_about_some_operators_of_one_function_as_it_is() -> None:
    m = KNOWN["quest/packing.py:pack:remove:0"]
    rule = Rule("quest/packing.py:pack", frozenset({"remove"}), "", "It is slow.")
    rule = dataclasses.replace(rule, code=rule.now())
    mine = Proofs(rules=(rule,))
    assert mine.stale(KNOWN.values()) == []
    assert mine.because(m) == "It is slow."
    for other in ("quest/packing.py:pack:negate:0", "quest/packing.py:unpack:remove:0"):
        assert mine.because(KNOWN[other]) == ""
    old = dataclasses.replace(rule, code="old", operators=frozenset({"remove", "where"}))
    assert Proofs(rules=(old,)).stale(KNOWN.values()) == [
        f"the code of quest/packing.py:pack is {rule.code!r} now, and not 'old'",
        "quest/packing.py:pack has no mutant of 'where'",
    ]
    for outcome, counted in (("survived", "by rule"), ("open", "by rule"), ("killed", "killed")):
        made = table.Table([m], {m.id: runner.Result(m.id, m.what, outcome, "t")}, mine)
        assert (made.outcome(m), made.problems()) == (counted, [])


def test_every_rule_is_argued_for() -> None:
    for rule in proofs.read().rules:
        assert len(rule.because) > 100, rule.function


def test_a_patch_that_does_not_fit_is_an_error() -> None:
    entry = {"id": "x", "file": "quest/packing.py", "old": "no such text", "new": "", "says": ""}
    with pytest.raises(ValueError, match=r"x: the old text stands 0 times in quest/packing\.py"):
        patches._made("semantic", entry)
    with pytest.raises(ValueError, match="stands 2 times"):
        patches._made("semantic", entry | {"old": "_check(bits)\n    if"})


def test_a_patch_at_a_comment_is_about_the_line_behind_it() -> None:
    entry = {"id": "x", "file": "quest/eager.py", "new": "x = 1", "says": ""}
    made = patches._made("semantic", entry | {"old": "    # float64 holds every sum exactly"})
    lines = read("quest/eager.py").decode().splitlines()
    assert "a.double()" in lines[made.lines[1] - 1]


def test_a_proof_of_a_mutant_that_dies_is_a_problem() -> None:
    m = KNOWN["quest/packing.py:pack:remove:0"]
    for outcome, problems in (
        ("survived", []),
        ("killed", [f"{m.id} is listed as equivalent, but t kills it"]),
    ):
        result = runner.Result(m.id, m.what, outcome, "t")
        assert table.Table([m], {m.id: result}, Proofs({m.id: (m.what, "")})).problems() == problems
    result = runner.Result(m.id, m.what, "survived")
    assert table.Table([m], {m.id: result}, Proofs()).problems() == [f"{m.id} survives: {m.what}"]


@pytest.mark.parametrize("outcome", [*runner.OUTCOMES, "untried"])
def test_what_a_proof_explains(outcome: str) -> None:
    """What tests could have noticed and did not. The rest is told as it is."""
    m = KNOWN["quest/packing.py:pack:remove:0"]
    found = runner.Result(m.id, m.what, outcome, "t", passed="own tests" * (outcome == "open"))
    results = {} if outcome == "untried" else {m.id: found}
    rule = Rule("quest/packing.py:pack", frozenset({"remove"}), "", "It is slow.")
    left = outcome in ("survived", "open", "untried")
    dead = outcome in ("killed", "crash", "timeout")
    for mine, column, problem in (
        (Proofs(), outcome, f"{m.id} survives: {m.what}" if outcome == "survived" else ""),
        (Proofs({m.id: (m.what, "why")}), "equivalent" if left else outcome,
         f"{m.id} is listed as equivalent, but t kills it" if dead else ""),
        (Proofs(rules=(rule,)), "by rule" if left else outcome, ""),
    ):  # fmt: skip
        made = table.Table([m], results, mine)
        assert (made.outcome(m), made.problems()) == (column, [problem] if problem else [])
        assert made.totals(lambda m: m.file)[-1][1 + table.HEAD.index(column)] == "1"
        assert (f"| {m.id} |" in record.markdown(made)) == (left and column != "untried")


def test_a_record_of_an_unclean_checkout_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its verdicts hold at no commit."""
    for status, told in (("", "abc"), (" M quest/packing.py\n", "abc+")):
        said = {"rev-parse": "abc\n", "status": status}
        monkeypatch.setattr(
            record.subprocess, "check_output", lambda asked, said=said, **_: said[asked[1]]
        )
        assert record._commit() == told


def test_the_median_is_of_kills() -> None:
    made = [KNOWN[f"quest/packing.py:pack:{name}:0"] for name in ("remove", "negate")]
    results = {
        m.id: runner.Result(m.id, m.what, outcome, "t", seconds)
        for m, outcome, seconds in zip(made, ("timeout", "survived"), (3.0, 90.0), strict=True)
    }
    assert table.Table(made, results, Proofs()).median(made) == 3.0
    assert table.Table(made, results, Proofs()).median(made[1:]) is None


def test_a_table_tells_what_was_not_tried() -> None:
    made = [KNOWN[f"quest/packing.py:pack:{name}:0"] for name in ("remove", "negate")]
    results = {made[0].id: runner.Result(made[0].id, made[0].what, "killed", "t", 2.0)}
    mine = table.Table(made, results, Proofs())
    told = dict(zip(table.HEAD, mine.totals(lambda m: m.file)[-1][1:], strict=True))
    assert (told["mutants"], told["killed"], told["untried"]) == ("2", "1", "1")
    assert told["median s"] == "2.0"
    assert mine.problems() == []
    assert made[1].id not in record.markdown(mine)
    # But for what is proven, which need meet no test.
    proven = table.Table(made, results, Proofs({made[1].id: (made[1].what, "why")}))
    told = dict(zip(table.HEAD, proven.totals(lambda m: m.file)[-1][1:], strict=True))
    assert (told["killed"], told["equivalent"], told["untried"]) == ("1", "1", "0")
    assert f"| {made[1].id} |" in record.markdown(proven)


def test_tests_that_execute_the_line_come_first() -> None:
    m = dataclasses.replace(KNOWN["quest/packing.py:pack:remove:0"], lines=(18, 19))
    names = [f"property_tests/test_{n}.py::t" for n in ("packing", "api", "train", "errors")]
    tests = dict(zip(names, (2.0, 1.0, 13.0, 0.5), strict=True))
    of = {18: {names[0], names[1]}, 22: {names[2]}}
    planned = stages(m, Baseline(tests, {m.file: of}, []))
    # Its own tests before cheaper ones; then what touches the file, too long for a first part;
    # never what does not touch it.
    assert [list(part.tests) for part in planned] == [[names[0], names[1]], [names[2]], []]
    assert planned[-1] == Part("ci", ("property_tests/test_packing.py",), {})
    assert [part.passed for part in planned] == ["first tests", "quick profile", ""]
    narrow = stages(m, Baseline(tests, {m.file: of}, []), narrow=True)
    assert [part.passed for part in narrow] == ["first tests", "first tests", "own tests"]
    assert stages(dataclasses.replace(m, lines=(20, 21)), Baseline(tests, {m.file: of}, [])) == []
    everywhere = stages(m, Baseline(tests, {m.file: of | {19: {IMPORT}}}, []))
    own_first = [names[0], names[3], names[1], names[2]]
    assert [t for part in everywhere for t in part.tests] == own_first
    failing = stages(m, Baseline(tests, {m.file: of}, [names[0]]))
    assert list(failing[0].tests) == [names[1], names[2]]


def test_a_fault_that_reaches_out_of_its_function_is_every_test_s() -> None:
    """What a module does when it is imported, a test may need that executes none of it."""
    m = KNOWN["quest/packing.py:pack:remove:0"]
    inside = next(n for n, line in enumerate(read(m.file).decode().splitlines(), 1)
                  if line.startswith("def ")) + 1  # fmt: skip
    names = [f"property_tests/test_{n}.py::t" for n in ("packing", "train")]
    seen = Baseline(dict.fromkeys(names, 1.0), {m.file: {inside + 1: {names[0]}}}, [])
    for first, reached in ((inside + 1, names[:1]), (inside - 1, names)):
        planned = stages(dataclasses.replace(m, lines=(first, inside + 1)), seen)
        assert [t for part in planned for t in part.tests] == reached


def test_the_court_is_held_by_its_own_tests_alone() -> None:
    """Others run production code, for which a bound that is too wide is none the worse."""
    m = next(m for m in KNOWN.values() if m.family == "court")
    names = [f"property_tests/test_{n}.py::t" for n in ("hadamard", "quantizer", "bounds")]
    of = {n: {*names} for n in range(m.lines[0], m.lines[1] + 1)}
    seen = Baseline(dict.fromkeys(names, 1.0), {m.file: of}, [])
    found = {t for part in stages(m, seen, Counter(dict.fromkeys(names, 3))) for t in part.tests}
    assert found == {names[2]}
    plain = stages(dataclasses.replace(m, family="semantic"), seen)
    assert {t for part in plain for t in part.tests} == {*names}


@pytest.mark.parametrize("gpu", [False, True])
def test_cuda_does_not_survive_without_a_gpu(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests compile it there, and do not run it."""
    monkeypatch.setattr(choice.covered, "has_gpu", lambda: gpu)
    m = next(m for m in KNOWN.values() if m.id == "semantic:codes/ties-cuda")
    name = "property_tests/test_blocks.py::t"
    of = {n: {name} for file, n in choice._launches(m.file) if file == "kernels/blocks.py"}
    seen = Baseline({name: 1.0}, {"kernels/blocks.py": of}, [])
    last = stages(m, seen)[-1].passed
    assert last == ("" if gpu else choice.QUICK)
    assert stages(m, seen, narrow=True)[-1].passed == choice.OWN_TESTS


def test_likely_killers_come_before_all_others() -> None:
    m = dataclasses.replace(KNOWN["quest/packing.py:pack:remove:0"], lines=(18, 19))
    names = [f"property_tests/test_{n}.py::t" for n in ("packing", "api", "train")]
    seen = Baseline(dict(zip(names, (1.0, 4.0, 2.0), strict=True)), {m.file: {18: set(names)}}, [])
    # What killed eight times as often is cheaper than what takes half as long.
    killers = Counter({names[1]: 8, names[2]: 1, "property_tests/test_gone.py::t": 9})
    found = [t for part in stages(m, seen, killers) for t in part.tests]
    assert found == [names[1], names[2], names[0]]


def test_a_few_likely_killers_are_enough() -> None:
    """Where many tests have killed others, the file's own first ones are not left for last."""
    m = dataclasses.replace(KNOWN["quest/packing.py:pack:remove:0"], lines=(18, 19))
    own = "property_tests/test_packing.py::t"
    others = {f"property_tests/test_train.py::t{n}": 0.1 + n / 100 for n in range(40)}
    seen = Baseline({own: 9.0, **others}, {m.file: {18: {own, *others}}}, [])
    found = list(stages(m, seen, Counter(dict.fromkeys(others, 1)))[0].tests)
    assert found[: choice.LIKELY + 1] == [*list(others)[: choice.LIKELY], own]


def test_a_header_is_launched_by_those_who_include_it() -> None:
    m = next(m for m in KNOWN.values() if m.file == "kernels/few_ptx.cuh")
    lines = read("kernels/few.py").decode().splitlines()
    launch = next(n for n, line in enumerate(lines, 1) if ".launch(" in line)
    test = "property_tests/test_few.py::t"
    for line, expected in ((launch, [test]), (launch - 1, [])):
        seen = Baseline({test: 1.0}, {"kernels/few.py": {line: {test}}}, [])
        assert [t for part in stages(m, seen)[:1] for t in part.tests] == expected


def test_tests_about_a_kernel_that_don_t_run_it_come_behind_those_that_do() -> None:
    """They may read it, or compile it."""
    text = next(m for m in KNOWN.values() if m.file == "kernels/sparse.cu")
    lines = read("kernels/sparse.py").decode().splitlines()
    launch = next(n for n, line in enumerate(lines, 1) if ".launch(" in line)
    triton = KNOWN["kernels/quantize.py:_emit:constant:26"]
    launcher = next(m for m in KNOWN.values() if m.file == "kernels/sparse.py" and m.lines[0] > 50)
    for mutant, seen_at, names, kept in (
        (text, ("kernels/sparse.py", launch), ("sparse_product", "product_launches"), 2),
        (triton, (triton.file, triton.lines[0]), ("quantizer", "quantize_launches"), 2),
        (launcher, (launcher.file, launcher.lines[0]), ("sparse_product", "product_launches"), 1),
    ):
        runs, reads, other = (f"property_tests/test_{n}.py::t" for n in (*names, "few"))
        seen = Baseline({runs: 9.0, reads: 1.0, other: 1.0}, {seen_at[0]: {seen_at[1]: {runs}}}, [])
        found = [t for part in stages(mutant, seen) for t in part.tests]
        assert found == [runs, reads][:kept], mutant.id


def test_tests_that_are_named_need_not_be_seen_to_run_it() -> None:
    """A sanitizer's test starts a process, and nothing is seen of that. Others do not run."""
    text = next(m for m in KNOWN.values() if m.file == "kernels/sparse.cu")
    lines = read("kernels/sparse.py").decode().splitlines()
    launch = next(n for n, line in enumerate(lines, 1) if ".launch(" in line)
    runs, races, texts, other = (
        f"property_tests/test_{n}.py::t" for n in ("sparse_product", "races", "cuda_texts", "few")
    )
    times = dict.fromkeys((runs, races, texts, other), 1.0)
    seen = Baseline(times, {"kernels/sparse.py": {launch: {runs}}}, [])
    # Of "few", which is not about this file, nothing runs.
    for named, expected in (
        (("races", "few"), [races]),
        (("races", "cuda_texts"), [texts, races]),
        (("few",), []),
    ):
        found = stages(text, seen, narrow=True, named=named)
        assert [t for part in found for t in part.tests] == expected
        assert {part.passed for part in found} <= {choice.FIRST}
        assert [p.paths for p in found if p.profile == "ci"] == [
            tuple(t.partition("::")[0] for t in expected)
        ] * bool(expected)
    assert [*stages(text, seen, Counter({races: 1}), True, ["races", "cuda_texts"])[0].tests] == [
        races, texts,
    ]  # fmt: skip


def test_a_sample_and_an_order_give_each_file_its_share() -> None:
    chosen = [m for m in KNOWN.values() if m.file in ("quest/packing.py", "quest/sparsity.py")]
    some = _sampled(chosen, None, 5, 0)
    assert Counter(m.file for m in some) == {"quest/packing.py": 5, "quest/sparsity.py": 5}
    assert some == _sampled(chosen, None, 5, 0) != _sampled(chosen, None, 5, 1)
    assert len(_sampled(chosen, 7, None, 0)) == 7
    ordered = order(some, 0, lambda m: float(m.start))
    assert sorted(m.id for m in ordered) == sorted(m.id for m in some)
    assert all(a.file != b.file for a, b in zip(ordered[::2], ordered[1::2], strict=True))
    for file in ("quest/packing.py", "quest/sparsity.py"):
        starts = [m.start for m in ordered if m.file == file]
        assert starts == sorted(starts)
    assert order(some, 0, lambda m: 0.0) != order(some, 1, lambda m: 0.0)


def nothing(file: str, new: str) -> Mutant:
    """A mutant that puts a text before the end of a file."""
    end = len(read(file))
    return Mutant("x", "systematic", file, (1, 1), end, end, new, "")


T = "property_tests/test_"
# Mutants of three families, and the test that must kill each within a few seconds.
KILLED = {
    "semantic:transform/transpose": f"{T}hadamard.py::test_layouts[gaussian-contiguous-torch-cpu]",
    "semantic:codes/odd-width": f"{T}packing.py::test_inputs_stay_and_need_not_be_contiguous",
    "semantic:product/fp16": f"{T}product.py::test_the_judges_of_the_product_bite",
    "quest/lowbit.py:check_decode:constant:7":
        f"{T}product.py::test_layer_with_an_empty_axis[3-0-4]",
    "kernels/quantize.py:_emit:negate:5":
        f"{T}quantizer.py::test_two_of_four_in_a_row_of_eight[uniform1-triton-interpreter]",
    "court:verdict/require": f"{T}verdict.py::test_require",
    "court:bounds/margin": f"{T}bounds.py::test_code_margin_leaves_codes_decided",
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes() -> dict[str, runner.Result]:
    """What becomes of KILLED, of nothing, of a loop without end and of a process that dies."""
    first = f"{T}packing.py::test_the_first_element_is_in_the_lowest_bits"
    special = {
        "nothing": nothing("quest/packing.py", "\n# Nothing.\n"),
        "loop": nothing("quest/packing.py", "\n\ndef _check(bits):\n    while True: pass\n"),
        "death": nothing("quest/packing.py", "\n\ndef _check(bits):\n    import os; os.abort()\n"),
        "import": nothing("quest/packing.py", "\n\n1 / 0\n"),
    }
    # Usual seconds that leave a busy machine its time.
    plans = {name: {test: 10.0} for name, test in KILLED.items()}
    plans |= {name: {first: 0.0} for name in special}
    chosen = [KNOWN[name] for name in KILLED]
    chosen += [dataclasses.replace(m, id=name) for name, m in special.items()]
    found: dict[str, runner.Result] = {}
    with pool.workshop() as folder:
        runner.run(
            chosen, lambda m: [quick(plans[m.id])], Path(folder), 2,
            lambda m, result: found.__setitem__(m.id, result), patience=4.0,
        )  # fmt: skip
        # The loop again, with more patience than the run has time.
        began = time.monotonic()
        loop = dataclasses.replace(special["loop"], id="unfinished")
        runner.run(
            [loop], lambda m: [quick({first: 0.0})], Path(folder), 1,
            lambda m, result: found.__setitem__(m.id, result), until=began + 2,
        )  # fmt: skip
        found["ended"] = runner.Result("", "", "", seconds=time.monotonic() - began)
    return found


@pytest.mark.parametrize("name", KILLED)
def test_a_mutant_is_killed(outcomes: dict[str, runner.Result], name: str) -> None:
    assert (outcomes[name].outcome, outcomes[name].by) == ("killed", KILLED[name])


@pytest.mark.parametrize(
    ("name", "outcome"),
    [("nothing", "survived"), ("loop", "timeout"), ("death", "crash"), ("import", "killed")],
)
def test_what_else_becomes_of_a_mutant(
    outcomes: dict[str, runner.Result], name: str, outcome: str
) -> None:
    assert outcomes[name].outcome == outcome, outcomes[name]


def test_what_still_runs_at_the_end_has_no_verdict(outcomes: dict[str, runner.Result]) -> None:
    assert "unfinished" not in outcomes
    assert 2 <= outcomes["ended"].seconds < 20
