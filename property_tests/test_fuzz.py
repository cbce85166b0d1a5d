"""What the fuzzer found is replayed in every lane, before all else; and the fuzzer finds."""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import strategies as st

import quest
from property_tests import fuzz
from property_tests.lane_marks import every_lane
from quest.conformance import examine, inputs, lanes
from quest.conformance.lanes import Lane
from quest.conformance.verdict import Rejected, Verdict

CPU = lanes.all_lanes()[0]
ENTRY = {
    "distribution": "gaussian", "shape": [3, 128], "dtype": "float32", "layout": "padded",
    "seed": 5, "edits": [[7, 2.0]],
}  # fmt: skip


def replay(lane: Lane, path: Path = fuzz.PROMOTED) -> int:
    """Judge every promoted entry in a lane; how many."""
    entries = fuzz.promoted(path)
    for found in entries:
        try:
            fuzz.judge(found["target"], lane, found["entry"])
        except Exception as error:
            error.add_note(f"promoted entry: {json.dumps(found)}")
            raise
    return len(entries)


@every_lane
def test_promoted(lane: Lane) -> None:
    replay(lane)


def broken(lane: Lane, entry: fuzz.Entry) -> list[Verdict]:
    """Wrong where a row has 40 columns or more."""
    width = entry["shape"][-1]
    if width >= 40:
        return [Verdict("planted", 1, 2.0, failure=f"{width} columns")]
    return [Verdict("planted", 1, width / 40)]


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    target = fuzz.Target(fuzz.TARGETS["transform"].entries, broken)
    monkeypatch.setitem(fuzz.TARGETS, "transform", target)


def run(*options: str) -> Any:
    return CliRunner().invoke(fuzz.main, ["--lane", "torch-cpu", *options])


@pytest.mark.usefixtures("planted")
def test_what_is_found_is_shrunk_promoted_and_replayed(tmp_path: Path) -> None:
    path, corpus = tmp_path / "promoted.json", tmp_path / "corpus"
    options = ("--target", "transform", "--promote-to", str(path), "--corpus", str(corpus))
    told = run(*options, "--minutes", "1")
    assert told.exit_code == 1, told.output
    assert "FOUND transform: Rejected: torch-cpu, planted: " in told.output
    [found] = fuzz.promoted(path)
    assert found["target"] == "transform"
    assert found["lane"] == "torch-cpu"
    # Shrunk: the first of each choice, no edits, the smallest seed.
    assert found["entry"]["shape"][-1] >= 40
    assert found["entry"]["edits"] == []
    assert found["entry"]["seed"] == 0
    assert any(corpus.rglob("*")), "no corpus"
    with pytest.raises(Rejected, match=r"planted: \d+ columns") as caught:
        replay(CPU, path)
    assert "promoted entry" in caught.value.__notes__[0]
    # Found again, and not promoted twice.
    again = run(*options, "--minutes", "0.01")
    assert "0 new in" in again.output
    assert again.exit_code == 1, "what is known fails all the same"
    assert len(fuzz.promoted(path)) == 1


def test_a_promoted_entry_is_judged_by_the_real_judges(tmp_path: Path) -> None:
    entry = ENTRY | {"order": 128, "transpose": False}
    path = tmp_path / "promoted.json"
    path.write_text(
        json.dumps([{"target": "transform", "lane": "any", "told": "", "entry": entry}])
    )
    assert replay(CPU, path) == 1


@pytest.mark.usefixtures("planted")
def test_the_corpus_is_read_again(tmp_path: Path) -> None:
    first = fuzz.Search("transform", CPU, tmp_path)
    first.round(200, time.monotonic() + 60)
    assert first.found
    second = fuzz.Search("transform", CPU, tmp_path)
    second.round(1, time.monotonic() + 60)
    assert second.found[0][0] == first.found[0][0]


def test_the_search_climbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A hidden height, away from the ends that any search tries: with the ratio to follow, the
    # search comes nearer to it than the draws alone.
    hidden = 0x5A5A5

    def steep(lane: Lane, entry: fuzz.Entry) -> list[Verdict]:
        return [Verdict("planted", 1, 1 / (1 + abs(entry["height"] - hidden)))]

    heights = st.fixed_dictionaries({"height": st.integers(0, 2**20 - 1)})
    monkeypatch.setitem(fuzz.TARGETS, "transform", fuzz.Target(heights, steep))

    def reached(name: str) -> float:
        search = fuzz.Search("transform", CPU, tmp_path / name)
        search.round(600, time.monotonic() + 60)
        return search.ratio

    assert reached("steered") == 1
    monkeypatch.setattr(fuzz.hypothesis, "target", lambda *_, **__: None)
    assert reached("blind") < 0.5


def test_a_failure_is_shrunk_though_the_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time ends with the first failure: it is no flaky one, and still becomes small."""
    now = [0.0]

    def late(lane: Lane, entry: fuzz.Entry) -> list[Verdict]:
        found = broken(lane, entry)
        now[0] += 2.0 * (found[0].failure is not None)
        return found

    target = fuzz.Target(fuzz.TARGETS["transform"].entries, late)
    monkeypatch.setitem(fuzz.TARGETS, "transform", target)
    monkeypatch.setattr(fuzz, "time", SimpleNamespace(monotonic=lambda: now[0]))
    search = fuzz.Search("transform", CPU, tmp_path)
    search.round(200, 1.0)
    [(entry, told)] = search.found
    assert told.startswith("Rejected: torch-cpu, planted: ")
    assert (entry["edits"], entry["seed"]) == ([], 0)


def test_what_a_search_has_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst of all examples; it steers by the worst of each stage and by the sum of ties."""
    steered: list[tuple[str, float]] = []
    monkeypatch.setattr(
        fuzz.hypothesis, "target", lambda value, label: steered.append((label, value))
    )
    search = fuzz.Search("transform", CPU, tmp_path)
    search.see([Verdict("a", 5, 0.5, ambiguous=3), Verdict("b", 2, 0.25), Verdict("a", 1, 0.125)])
    search.see([Verdict("a", 1, 0.0, ambiguous=1), Verdict("b", 1, 0.0, ambiguous=1)])
    assert (search.examples, search.elements, search.ratio, search.ambiguous) == (2, 10, 0.5, 3)
    assert steered == [
        ("log ratio, a", math.log(0.5)), ("log ratio, b", math.log(0.25)),
        ("log ambiguous elements", math.log(3)), ("log ambiguous elements", math.log(2)),
    ]  # fmt: skip


def test_any_failed_verdict_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = [Verdict("a", 1, 0.5), Verdict("b", 1, 2.0, failure="wrong")]
    target = fuzz.Target(st.nothing(), lambda lane, entry: verdicts)
    monkeypatch.setitem(fuzz.TARGETS, "transform", target)
    with pytest.raises(Rejected, match=r"^torch-cpu, b: wrong$"):
        fuzz.judge("transform", CPU, {})


def test_time_is_kept(tmp_path: Path) -> None:
    started = time.monotonic()
    told = run("--minutes", "0", "--corpus", str(tmp_path), "--promote-to", str(tmp_path / "p"))
    assert told.exit_code == 0, told.output
    assert time.monotonic() - started < 20
    assert not (tmp_path / "p").exists()


def test_ties_are_near() -> None:
    q = quest.Quantizer(quest.grids.uniform(4), quest.Hadamard(128), quest.Trust())
    x = inputs.draw("gaussian", (8, 256), torch.float32, 1)
    plain = examine.quantizer(CPU, x, q, conclusive=False)
    found = examine.quantizer(CPU, fuzz._tied(x, q, 16), q, conclusive=False)
    assert all(v.failure is None for v in found)
    codes = {
        name: v.ambiguous for v in found for name in [v.stage] if name == "codes" and v.elements
    }
    assert codes["codes"] > 100
    assert sum(v.ambiguous for v in plain if v.stage == "codes") < 5


def test_a_row_that_holds_no_ties_stays_as_it_is() -> None:
    """Where the tie alone has more than the row's mean square; and zeros have no ties."""
    x = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    left = 0
    for bits in range(3, 9):
        q = quest.Quantizer(quest.grids.uniform(bits), quest.Identity(), quest.Trust())
        made = fuzz._tied(x, q, 1)
        assert made.isfinite().all()
        assert made[2].ne(x[2]).any()
        left += int(made[0].equal(x[0]))
        assert made[1].equal(x[1])
    assert left  # grids whose midpoint is beyond 2


def test_a_seed_draws_all_operands_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, gradient and bias are others with each seed, and others than one another."""
    drawn: list[list[float]] = []

    def layer(lane: Lane, *given: Any) -> list[Verdict]:
        drawn.extend(t.flatten()[:4].double().tolist() for t in given if torch.is_tensor(t))
        return []

    monkeypatch.setattr(fuzz.examine, "layer", layer)
    for seed in (5, 105):
        entry = ENTRY | {"seed": seed, "recipe": "w4a4", "out": 5, "bias": True}
        fuzz.TARGETS["layer"].judge(CPU, entry)
    assert len({tuple(values) for values in drawn}) == len(drawn) == 8


def test_the_inputs_of_an_entry_are_what_it_says() -> None:
    """Every part of it counts, so that what was found is found again."""

    def made(**other: Any) -> torch.Tensor:
        return fuzz.tensor(ENTRY | {"edits": []} | other)

    plain = inputs.draw("gaussian", (3, 128), torch.float32, 5)
    assert torch.equal(made(), plain)
    assert made(dtype="bfloat16").dtype == torch.bfloat16
    assert made(shape=[2, 64]).shape == (2, 64)
    for other in ({"seed": 6}, {"distribution": "heavy"}):
        assert not torch.equal(made(**other), plain)
    # An edit is of one place, in units of the mean magnitude.
    edited = made(edits=[[7, 2.0], [3 * 128 + 9, -1.0]])
    assert (edited != plain).nonzero().tolist() == [[0, 7], [0, 9]]
    unit = plain.double().abs().mean().item()
    assert edited[0, [7, 9]].tolist() == pytest.approx([2 * unit, -unit])
    for layout in inputs.LAYOUTS:
        rows = inputs.equal_rows(plain) if layout == "expanded" else plain
        assert torch.equal(made(layout=layout), rows)
        assert made(layout=layout).stride() == inputs.lay_out(rows, layout).stride()


def test_each_target_asks_for_what_its_entry_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call and all of its operands, of which no two are the same."""
    asked: list[tuple[Any, ...]] = []
    for name in ("transform", "quantizer", "backward", "layer"):
        monkeypatch.setattr(
            fuzz.examine, name, lambda *given, **more: asked.append((*given, more)) or []
        )

    def call(name: str, **more: Any) -> tuple[Any, ...]:
        assert fuzz.judge(name, CPU, ENTRY | more) == []
        return asked.pop()

    for turned in (True, False):
        assert call("transform", order=16, transpose=turned)[2:4] == (16, turned)
    masks = [call("backward", order=16, mask=seed)[2] for seed in (0, 1, 1)]
    assert [torch.equal(masks[0], masks[1]), torch.equal(masks[1], masks[2])] == [False, True]
    assert call("backward", order=32, mask=0)[3] == 32
    for bias in (True, False):
        lane, x, w, grad, found, recipe, _ = call("layer", recipe="w4a4", out=128, bias=bias)
        assert (lane, recipe) == (CPU, quest.recipe("w4a4"))
        assert [tuple(t.shape) for t in (x, w, grad)] == [(3, 128), (128, 128), (3, 128)]
        assert (found is not None) == bias
        rows = [x[0], 16 * w[0], grad[0], *([found] if bias else [])]
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(rows, 2))
    spec = "uniform4/hadamard16/trust1.0/dense"
    plain, tied = (call("quantizer", quantizer=spec, ties=ties) for ties in (0, 4))
    assert (plain[2].spec, plain[-1]) == (spec, {"conclusive": False})
    assert torch.equal(plain[1], fuzz.tensor(ENTRY))
    assert torch.equal(tied[1], fuzz._tied(plain[1], plain[2], 4))
    assert not torch.equal(tied[1], plain[1])


def test_what_a_lane_raises_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard's error, or any other, as well as a judge's refusal."""

    def breaks(lane: Lane, entry: fuzz.Entry) -> list[Verdict]:
        raise lanes.GuardError("an input was changed")

    target = fuzz.Target(fuzz.TARGETS["transform"].entries, breaks)
    monkeypatch.setitem(fuzz.TARGETS, "transform", target)
    search = fuzz.Search("transform", CPU, tmp_path)
    search.round(2, time.monotonic() + 60)
    assert [told for _, told in search.found] == ["GuardError: an input was changed"]


def test_each_finding_of_a_target_is_promoted(tmp_path: Path) -> None:
    """Beside what is there already: of the same target another entry, of another the same."""
    path, one, other = tmp_path / "promoted.json", {"seed": 1}, {"seed": 2}
    for name, entries, new in (
        ("transform", [one], 1), ("transform", [one, other], 1), ("backward", [one, one], 1),
    ):  # fmt: skip
        search = fuzz.Search(name, CPU, tmp_path)
        search.found = [(entry, "told") for entry in entries]
        assert fuzz.promote(search, path) == new
    found = [(each["target"], each["entry"]) for each in fuzz.promoted(path)]
    assert found == [("transform", one), ("transform", other), ("backward", one)]


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_every_target_runs_and_its_entries_are_json(name: str, tmp_path: Path) -> None:
    search = fuzz.Search(name, CPU, tmp_path)
    seen = []

    def judge(lane: Lane, entry: fuzz.Entry) -> list[Verdict] | None:
        assert json.loads(json.dumps(entry)) == entry
        verdicts = kept.judge(lane, entry)
        seen.append(verdicts)
        return verdicts

    kept = fuzz.TARGETS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fuzz.TARGETS, name, fuzz.Target(kept.entries, judge))
        search.round(8, time.monotonic() + 60)
    assert search.found == []
    assert len(seen) >= 5
    assert search.elements > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lane", "nonsense"), "lane must be one of torch-cpu"),
        (("--minutes", "-1"), "-1"),
        (("--target", "nonsense"), "nonsense"),
        (("--promote-to", "/none/such/file.json"), "the folder /none/such does not exist"),
    ],
)
def test_wrong_options(options: tuple[str, ...], message: str) -> None:
    told = CliRunner().invoke(fuzz.main, list(options))
    assert told.exit_code == 2
    assert message in told.output


def test_an_error_before_any_entry_is_no_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is promoted where the entries themselves can't be drawn."""
    nothing = st.integers().map(lambda _: 1 // 0)
    monkeypatch.setitem(fuzz.TARGETS, "transform", fuzz.Target(nothing, broken))
    path = tmp_path / "promoted.json"
    made = run(
        "--minutes", "0.05", "--lane", "torch-cpu", "--target", "transform", "--corpus",
        str(tmp_path / "corpus"), "--promote-to", str(path),
    )  # fmt: skip
    assert isinstance(made.exception, ZeroDivisionError)
    assert not path.exists() or json.loads(path.read_text()) == []


@pytest.mark.parametrize(
    ("corpus", "told"),
    [
        ("file", "is a file"),
        ("file/below", "can't be written: Not a directory"),
        ("/proc/corpus", "can't be written: No such file or directory"),
        ("x" * 300, "can't be written: File name too long"),
        ("taken", "taken/transform/torch-cpu can't be written: Not a directory"),
    ],
)
def test_a_corpus_that_can_t_be_kept_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: str, told: str
) -> None:
    """Hypothesis itself says nothing of it, and keeps nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fuzz.Search, "round", lambda *_: pytest.fail("it searched"))
    for name in ("file", "taken/transform"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    done = run("--target", "transform", "--corpus", corpus, "--promote-to", "p", "--minutes", "1")
    assert (done.exit_code, type(done.exception)) == (2, SystemExit)
    assert "--corpus" in done.output
    assert told in done.output.replace(str(tmp_path) + "/", "")
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--promote-to", "/proc/found.json"), "/proc/found.json: it can't be written"),
        (("--promote-to", "dict.json"), "dict.json holds no list of promoted entries: it must be"),
        (("--promote-to", "none.json"), "none.json holds no list of promoted entries: it must be"),
        (
            ("--promote-to", "empty.json"),
            "empty.json holds no list of promoted entries: it must be",
        ),
        (
            ("--promote-to", "texts.json"),
            "texts.json holds no list of promoted entries: it must be",
        ),
        (("--promote-to", "text.json"), "text.json holds no list of promoted entries: Expecting"),
        (("--promote-to", "bytes.json"), "bytes.json holds no list of promoted entries: 'utf-8'"),
        (("--promote-to", "part.json"), "part.json holds no list of promoted entries: an entry"),
        (("--minutes", "nan"), "nan is not a finite number"),
        (("--minutes", "inf"), "inf is not a finite number"),
        (("--seed", "-1"), "-1 is not in the range"),
    ],
)
def test_what_would_be_found_out_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fuzz.Search, "round", lambda *_: pytest.fail("it searched"))
    made = {
        "dict": b'{"a": 1}', "none": b"{}", "empty": b'""', "texts": b'["target"]', "text": b"?",
        "bytes": b"\xff", "part": b"[{}]",
    }  # fmt: skip
    for name, contents in made.items():
        Path(f"{name}.json").write_bytes(contents)
    done = run("--corpus", "corpus", "--promote-to", "p", *options)
    assert (done.exit_code, type(done.exception)) == (2, SystemExit)
    assert told in done.output


def test_the_seed_says_which_target_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With time for one round alone, seeds in a row come to each target."""
    began: list[str] = []

    def one(self: fuzz.Search, examples: int, until: float) -> None:
        began.append(self.name)
        monkeypatch.setattr(time, "monotonic", lambda: until)

    monkeypatch.setattr(fuzz.Search, "round", one)
    line = ("--corpus", str(tmp_path / "corpus"), "--promote-to", str(tmp_path / "p"))
    for seed in range(5):
        monkeypatch.setattr(time, "monotonic", lambda: 0.0)
        done = run(*line, "--seed", str(seed))
        assert done.exit_code == 0, done.output
        assert f"--seed {seed} begins with the same target" in done.output
    assert began == [*fuzz.TARGETS, next(iter(fuzz.TARGETS))]
    # Without one it is at random: 40 times the same has a probability of 4**-39.
    began.clear()
    for _ in range(40):
        monkeypatch.setattr(time, "monotonic", lambda: 0.0)
        run(*line)
    assert len(set(began)) > 1
    # All others follow, each once.
    searches = [fuzz.Search(name, CPU, tmp_path) for name in fuzz.TARGETS]
    assert [s.name for s in fuzz.turned(searches, 2)] == [*began_at(2), *began_at(0)[:2]]


def began_at(start: int) -> list[str]:
    return list(fuzz.TARGETS)[start:]
