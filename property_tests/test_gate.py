"""`quest gate`: its statistics and its verdicts. Whole runs are in `test_gate_runs.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import cases
from quest.cli import main
from quest.gate import benchmarks, clock, correctness, pairs, power, report, worker
from quest.gate.benchmarks import Bench, Row
from quest.gate.side import Side, SideError, environment


def side(g: np.random.Generator, mean: float, noise: float) -> pairs.Turn:
    return lambda pair: mean * math.exp(noise * g.standard_normal())


def test_the_interval_of_a_known_case() -> None:
    # n normal log ratios of deviation s: the interquartile mean has the deviation 1.09 s / sqrt(n),
    # where 1.09**2 = 1.20 is its variance over the mean's (Huber, Robust Statistics, section 5.7).
    logs = 0.04 * np.random.default_rng(1).standard_normal(4000)
    ratio, low, high = pairs.interval(np.exp(logs))
    expected = 2 * 1.96 * 1.09 * 0.04 / math.sqrt(4000)
    assert math.log(high / low) == pytest.approx(expected, rel=0.12)
    assert low < ratio < high
    assert abs(math.log(ratio)) < expected


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), factor=st.floats(0.5, 2.0))
def test_the_interval_follows_a_factor_and_its_inverse(seed: int, factor: float) -> None:
    ratios = np.exp(0.05 * np.random.default_rng(seed).standard_normal(40))
    plain, scaled = pairs.interval(ratios), pairs.interval(ratios * factor)
    assert scaled == pytest.approx([x * factor for x in plain], rel=1e-12)
    # Base and change in each other's place: the same estimate, the bounds exchanged.
    turned = pairs.interval(1 / ratios)
    assert [1 / turned[0], 1 / turned[2], 1 / turned[1]] == pytest.approx(plain, rel=0.01)


def test_stalled_turns_do_not_move_the_ratio() -> None:
    ratios = np.exp(0.01 * np.random.default_rng(2).standard_normal(60))
    stalled = ratios.copy()
    stalled[:6] *= 8.0
    assert pairs.interval(stalled)[0] == pytest.approx(pairs.interval(ratios)[0], abs=0.005)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_planted_slowdowns_and_equal_sides(seed: int) -> None:
    g = np.random.default_rng(seed)
    assert pairs.compare(side(g, 1.0, 0.01), side(g, 1.06, 0.01)).verdict == "slower"
    assert pairs.compare(side(g, 1.0, 0.01), side(g, 0.94, 0.01)).verdict == "faster"
    assert pairs.compare(side(g, 1.0, 0.01), side(g, 1.0, 0.01)).verdict == "ok"


def test_noise_is_unclear_and_no_failure() -> None:
    g = np.random.default_rng(0)
    found = pairs.compare(side(g, 1.0, 0.5), side(g, 1.0, 0.5), most=40)
    assert found.verdict == "unclear"
    assert len(found.base) == len(found.change) == 40


def test_a_bound_of_3_percent_is_the_limit() -> None:
    times = (1.0,)
    assert pairs.Comparison(times, times, 1.04, 1.0301, 1.05).verdict == "slower"
    assert pairs.Comparison(times, times, 1.04, 1.03, 1.0501).verdict == "unclear"
    assert pairs.Comparison(times, times, 1.04, 1.03, 1.05).verdict == "ok"


def test_sides_take_turns_and_a_steady_drift_favors_neither() -> None:
    order: list[str] = []

    def turn(name: str) -> pairs.Turn:
        def one(pair: int) -> float:
            assert pair == len(order) // 2
            order.append(name)
            return 1.01 ** len(order)

        return one

    found = pairs.compare(turn("A"), turn("B"), most=20)
    assert "".join(order) == "ABBA" * 10
    assert found.ratio == pytest.approx(1.0)


def test_narrow_intervals_end_early_and_the_budget_ends_it() -> None:
    g = np.random.default_rng(0)
    assert len(pairs.compare(side(g, 1.0, 0.001), side(g, 1.0, 0.001)).base) == pairs.FEWEST
    noisy = side(g, 1.0, 0.3)
    assert len(pairs.compare(noisy, noisy, budget=0.0).base) == pairs.TELLING
    assert len(pairs.compare(noisy, noisy).base) == pairs.MOST


def test_the_simulation_keeps_what_the_gate_promises() -> None:
    # A tenth of `quest gate --power`. The seeds differ from its own, the model does not.
    draw = [np.random.default_rng((9, i)) for i in range(40)]
    assert not any(power.gate_alarms(g, 0.0) for g in draw[:20])
    assert sum(power.gate_alarms(g, power.PLANTED) for g in draw[20:]) >= 18
    # What it replaces is wrong both ways in this model, as it was seen to be.
    assert 2 <= sum(power.stored_alarms(np.random.default_rng(i), 0.0) for i in range(100)) <= 30
    assert 30 <= sum(power.stored_alarms(np.random.default_rng(i), 0.05) for i in range(100)) <= 70


@pytest.mark.parametrize(
    ("verdicts", "alarm"),
    [
        (["slower"] * pairs.LOOKS, True),
        (["ok"], False),
        (["slower", "unclear"], False),
        ([*["slower"] * (pairs.LOOKS - 1), "faster"], False),
    ],
)
def test_the_simulated_gate_looks_as_often_as_the_gate(
    verdicts: list[str], alarm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look that finds nothing slower is the last."""
    looks = iter(verdicts)
    found = lambda *_, **__: SimpleNamespace(verdict=next(looks))  # noqa: E731
    monkeypatch.setattr(power.pairs, "compare", found)
    assert power.gate_alarms(np.random.default_rng(0), 0.0) == alarm
    assert not [*looks]


@pytest.mark.parametrize(
    ("false_alarms", "found", "kept"), [(0, 180, True), (1, 200, False), (0, 179, False)]
)
def test_figures_that_fail_the_power_command(
    monkeypatch: pytest.MonkeyPatch, false_alarms: int, found: int, kept: bool
) -> None:
    figures = [power.Power(power.GATE, power.NOISE, 200, false_alarms, found)]
    monkeypatch.setattr(power, "measure", lambda: iter(figures))
    assert main(["gate", "--power"]) == (0 if kept else 1)


def test_waiting_for_a_core_is_no_time_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = iter([1.0, 1.5, 0.0, 99.0])
    walls = iter([10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr(clock, "_queued", lambda: next(waited))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(walls))
    assert clock.cpu_round([lambda i: None], 0) == [1.5]
    assert clock.cpu_round([lambda i: None], 0) == [3.0]  # the wait was not the call's


def test_a_round_calls_each_and_every_second_one_backwards() -> None:
    asked: list[tuple[str, int]] = []
    calls = [lambda i, name=name: asked.append((name, i)) for name in "abc"]
    for i in (4, 5):
        assert len(clock.cpu_round(calls, i)) == 3
    assert asked == [("a", 4), ("b", 4), ("c", 4), ("c", 5), ("b", 5), ("a", 5)]


def _cuda_round() -> Any:
    """One without a device: who patches `_event` or `_queue` says what it does."""
    made: Any = object.__new__(clock.CudaRound)
    made.fills, made.host_bound = 4, False
    return made


def test_a_host_that_is_too_slow_once_is_told_of_to_the_end() -> None:
    """Where no filler is long enough; where a longer one is, it stays so."""
    made = _cuda_round()
    ahead = iter([True, False, False, True, True, *[False] * 5, True])
    made._queue = lambda calls, i: ([float(i)], next(ahead))
    seen = []
    for i in range(5):
        assert made([], i) == [float(i)]
        seen.append((made.fills, made.host_bound))
    assert seen == [(4, False), (16, False), (16, False), (clock.MOST_FILLS, True), (256, True)]


@pytest.mark.parametrize("i", [4, 5])
@pytest.mark.parametrize("begun", [True, False])
def test_the_device_comes_to_a_round_that_is_whole(
    i: int, begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not have begun the first call, whichever that is, when all is queued."""
    done: list[str] = []

    class Event:
        """Of a device that takes 3 ms for a, 5 ms for b, and has begun with its first call."""

        def record(self) -> None:
            self.at = len(done)
            done.append("event")

        def query(self) -> bool:
            return begun and self.at == done.index("event")

        def elapsed_time(self, end: Event) -> float:
            return sum({"a": 3.0, "b": 5.0}.get(name, 0.0) for name in done[self.at : end.at])

    made = _cuda_round()
    made.filler = SimpleNamespace(zero_=lambda: done.append("fill"))
    monkeypatch.setattr(clock, "_event", Event)
    monkeypatch.setattr(clock.torch.cuda, "synchronize", lambda: done.append("wait"))
    calls: Any = [lambda _, name=name: done.append(name) for name in "ab"]
    taken, ahead = made._queue(calls, i)
    assert taken == [0.003, 0.005]
    assert ahead != begun
    first, second = "ab" if i == 4 else "ba"
    one_call = ["event", first, "event", "event", second, "event"]
    assert done == [*["fill"] * 4, "b", *one_call, "wait"]


@pytest.mark.parametrize("each", [1, 2**20, 3 * 2**20, 2**26])
def test_inputs_are_more_than_the_cache_holds(each: int) -> None:
    sets = clock.input_sets(each, "cpu")
    assert 2 <= sets <= 64
    assert sets == 64 or sets * each >= 3 * clock.cache("cpu")
    assert sets == 2 or (sets - 1) * each < 3 * clock.cache("cpu")


def test_bytes_of_what_a_call_takes() -> None:
    halves = torch.zeros(3, 5, dtype=torch.bfloat16)
    assert clock.size((halves, (torch.zeros(2), 7), None)) == 38


def test_a_turn_is_as_long_as_the_slower_side_needs() -> None:
    """The same number of calls on both, and odd."""
    asked: set[int] = set()
    side: Any = SimpleNamespace(turn=lambda calls, pair: asked.add(calls) or 1.0)
    benchmarks._paired(side, side, (0.001, 0.0051), 10)
    assert asked == {5}


def _case(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., object], **more: Any
) -> tuple[worker.Case, list[int]]:
    """The case of a benchmark of three sets of inputs, and for how many bytes it asked."""
    asked: list[int] = []
    monkeypatch.setattr(worker.clock, "input_sets", lambda each, _: asked.append(each) or 3)
    passed = SimpleNamespace(worst_ratio=0.25)
    monkeypatch.setattr("benchmarks.gate.open_for", lambda key, judge: passed)

    def bench(timed: Callable[..., None]) -> None:
        timed(key=(1, "k"), judge=None, spec="spec", shape=(2, 3), run=run, **more)

    item = SimpleNamespace(obj=bench, iter_markers=list)
    return worker.Case(item, clock.cpu_round), asked


def test_a_case_takes_other_inputs_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that `draw` and `prepare` say; as many as the cache can't hold of what is read."""
    seen: list[tuple[int, list[tuple[int, ...]]]] = []

    def run(*given: torch.Tensor) -> None:
        seen.append((given[0].data_ptr(), [tuple(t.shape) for t in given]))

    case, asked = _case(
        monkeypatch, run, draw=((4, 5), (6,)), prepare=lambda x, y: (x[:, :2].contiguous(),)
    )
    assert set(asked) == {4 * 2 * cases.DTYPE.itemsize}
    assert (case.worst_ratio, case.identity) == (0.25, "spec key 1 k")
    assert case.inputs == f"[[4, 5], [6]] {cases.DTYPE}"
    seen.clear()
    for calls in (2, 1, 3):
        assert len(case.turn(calls)) == calls  # and one before that is not timed
    places = [place for place, _ in seen]
    assert len(places) == 9
    assert len(set(places)) == 3
    assert places[3:] == places[:-3]
    assert all(shapes == [(4, 5), (6,), (4, 2)] for _, shapes in seen)


def test_base_and_change_get_the_same_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn from a seed that both processes have, on the device that is timed."""
    seen: list[torch.Tensor] = []
    _case(monkeypatch, seen.append)
    g = torch.Generator(cases.DEVICE).manual_seed(worker.SEED)
    due = torch.randn((2, 3), generator=g, device=cases.DEVICE, dtype=cases.DTYPE)
    assert torch.equal(seen[0], due)


def test_what_a_mark_skips() -> None:
    marks = pytest.mark
    for made, told in (
        ([marks.skipif(False, reason="no")], None),
        ([marks.skipif(False, reason="no"), marks.skipif(True, reason="yes")], "yes"),
        ([marks.skip(reason="always")], "always"),
        ([marks.skip], "skip"),
        ([marks.whole, marks.parametrize("x", [1])], None),
    ):
        item = SimpleNamespace(iter_markers=lambda made=made: iter([m.mark for m in made]))
        assert worker._skipped(item) == told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the allocator tells")
def test_the_peak_of_a_case_is_what_it_holds_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        torch.empty(10_000)
        return torch.empty(1_000)

    case, asked = _case(monkeypatch, run)
    assert set(asked) == {2 * 3 * cases.DTYPE.itemsize}
    assert 40_000 <= case.peak < 41_000


def test_both_turns_of_a_pair_are_on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """And times on a CPU are those of one thread."""
    threads, chosen = torch.get_num_threads(), []
    monkeypatch.setattr(worker, "collect", lambda expression: ({}, []))
    monkeypatch.setattr(worker.os, "sched_setaffinity", lambda _, cores: chosen.append(cores))
    torch.set_num_threads(2)
    try:
        made = worker.Worker("")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    made.cores = [3, 7, 8]
    made.case = SimpleNamespace(turn=lambda calls: [0.5] * calls)  # type: ignore[assignment]
    for pair in range(4):
        assert made.turn(2, pair)["seconds"] == [0.5, 0.5]
    assert chosen == [{3}, {7}, {8}, {3}]


def test_a_side_takes_the_median_of_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def ask(self: Side, do: str, **more: Any) -> dict[str, Any]:
        asked.append({"do": do, **more})
        return {"seconds": [9.0, 1.0, 3.0, 2.0, 8.0]}

    monkeypatch.setattr(Side, "ask", ask)
    assert object.__new__(Side).turn(5, 7) == 3.0
    assert asked == [{"do": "turn", "calls": 5, "pair": 7}]


def test_a_process_imports_its_own_tree_and_hashes_alike() -> None:
    made = environment(Path("/some/tree"))
    assert (made["PYTHONPATH"], made["PYTHONHASHSEED"]) == ("/some/tree", "0")


class Fake:
    """A side whose cases are replies; a turn takes `seconds` with 0.2% noise."""

    opened: ClassVar[list[Path]] = []

    def __init__(self, tree: Path, expression: str, name: str, limit: float) -> None:
        assert (expression, name, limit) == ("", tree.name, 7.0)
        self.died: set[str] = set()
        self.tree, self.cases = tree, CASES[tree.name]
        self.g = np.random.default_rng(len(self.opened))
        self.opened.append(tree)
        self.case: dict[str, Any] = {}

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        if do == "hello":
            return {"cases": list(self.cases), "device": "fake"}
        if do == "open":
            found = self.cases[more["case"]]
            dies = found.get("status") == "dies once" and more["case"] not in self.died
            self.died.add(more["case"])
            dies |= "dies_later" in found and len(self.opened) > 2
            if dies or found.get("status") in ("died", "late", "red", "broken", "skipped"):
                status = "died" if dies else found["status"]
                raise SideError(status, "for a reason", self.tree.name)
            self.case = {
                "worst_ratio": 0.5, "peak": 10_000, "inputs": "x", "identity": "x", "wall": 0.01,
            } | found  # fmt: skip
            return {**self.case, "status": "ok"}
        return {"host_bound": "bound" in self.case}

    def turn(self, calls: int, pair: int) -> float:
        if "dies_timed" in self.case:
            raise SideError("died", "for a reason", self.tree.name)
        seconds = self.case.get("seconds", 1.0)
        # A process that is slow for its memory's sake, and another that is not.
        if "first" in self.case and len(self.opened) < 3:
            seconds *= self.case["first"]
        return float(seconds * math.exp(0.002 * self.g.standard_normal()))


SKIPPED = {"status": "skipped"}
VERDICTS: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None, str]] = {
    "equal": ({}, {}, "ok"),
    "bound": ({}, {"bound": True}, "ok"),
    "slow": ({}, {"seconds": 1.06}, "slower"),
    "slow_once": ({}, {"first": 1.2}, "ok"),
    "fast": ({}, {"seconds": 0.9}, "faster"),
    "gone": ({}, None, "missing"),
    "gone_and_skipped": (SKIPPED, None, ""),
    "skips_now": ({}, SKIPPED, "missing"),
    "skipped": (SKIPPED, SKIPPED, ""),
    "fresh": (None, {}, "new"),
    "fresh_and_red": (None, {"status": "red"}, "red"),
    "red": ({}, {"status": "red"}, "red"),
    "raises": ({}, {"status": "broken"}, "broken"),
    "base_red": ({"status": "red"}, {}, "base fails"),
    "base_red_skips_now": ({"status": "red"}, SKIPPED, "base fails"),
    "base_dies": ({"status": "died"}, {}, "base fails"),
    "base_dies_timed": ({"dies_timed": True}, {}, "base fails"),
    "base_dies_once": ({"status": "dies once"}, {}, "ok"),
    "late": ({}, {"status": "late"}, "broken"),
    "dies": ({}, {"status": "died"}, "broken"),
    "dies_timed": ({}, {"dies_timed": True}, "broken"),
    "dies_looked_at_again": ({}, {"seconds": 1.5, "dies_later": True}, "broken"),
    "dies_once": ({}, {"status": "dies once"}, "ok"),
    "memory": ({}, {"peak": 10_101}, "more memory"),
    "memory_rounded": ({}, {"peak": 10_100}, "ok"),
    "inputs": ({}, {"inputs": "y"}, "other inputs"),
    "another": ({}, {"identity": "y"}, "other benchmark"),
    "error": ({}, {"worst_ratio": 0.751}, "error grew"),
    "error_half": ({}, {"worst_ratio": 0.75}, "ok"),
    "both": ({}, {"seconds": 1.5, "peak": 20_000}, "slower, more memory"),
}
FAILING = (
    "slower", "missing", "red", "broken", "more memory", "other inputs", "other benchmark",
    "error grew", "base fails",
)  # fmt: skip
CASES = {
    "base": {name: base for name, (base, _, _) in VERDICTS.items() if base is not None},
    "change": {name: change for name, (_, change, _) in VERDICTS.items() if change is not None},
}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., benchmarks.Result]:
    monkeypatch.setattr(benchmarks, "Side", Fake)
    monkeypatch.setattr(Fake, "opened", [])
    return lambda base="base", same=0, old_base=False: Bench(
        Path(base) if base else None, Path("change"), "", 20, same, lambda left, name: None,
        old_base, 7.0,
    ).run()  # fmt: skip


def test_every_verdict(fake: Callable[..., benchmarks.Result]) -> None:
    result = fake()
    found = {row.name: row.verdict for row in result.rows}
    assert found == {name: verdict for name, (*_, verdict) in VERDICTS.items() if verdict}
    assert result.skipped == 2
    assert [row.name for row in result.rows if row.host_bound] == ["bound"]
    for row in result.rows:
        assert bool(row.faults) == any(word in row.verdict for word in FAILING), row
    # Three looks at what stays slower, in processes of their own each time.
    assert sorted(tree.name for tree in Fake.opened) == sorted(["base", "change"] * pairs.LOOKS)


def test_an_old_base_excuses_what_base_cannot_run(fake: Callable[..., benchmarks.Result]) -> None:
    strict, lenient = (
        [row for row in fake(old_base=old).rows if row.name.startswith("base_")]
        for old in (False, True)
    )
    assert [row.verdict for row in strict] == [row.verdict for row in lenient]
    assert [bool(row.faults) for row in strict] == [True] * 4 + [False]
    assert not any(row.faults for row in lenient)
    assert "the change skips it" in strict[1].faults[0][1]


def test_an_old_base_excuses_nothing_else() -> None:
    """As where base dies at a second look, and the first one saw that memory grew."""
    grew = ("more memory", "2 bytes")
    row = benchmarks._excused(Row("x", faults=((benchmarks.BASE_FAILS, "it died"), grew)))
    assert (row.faults, row.verdict) == ((grew,), "more memory")
    assert benchmarks._excused(Row("x", faults=(grew,), note="new")).note == "new"


def test_base_against_itself(fake: Callable[..., benchmarks.Result]) -> None:
    same = fake(same=2).same
    assert [tree.name for tree in Fake.opened][-2:] == ["base", "base"]
    assert [row.verdict for row in same] == ["ok", "ok"]
    assert 0 < report.floor(same) < 0.01
    assert not report.alarms(same)
    off = Row("x", comparison=pairs.Comparison((1.0,), (1.0,), 0.8, 0.75, 0.9))
    assert report.alarms([off]) == [off]
    assert report.floor([off]) == pytest.approx(1 / 3)
    slow = Row("x", comparison=pairs.Comparison((1.0,), (1.0,), 1.2, 1.1, 1.5))
    assert report.floor([slow, off]) == pytest.approx(1 / 2)


def test_without_a_base_all_is_new(fake: Callable[..., benchmarks.Result]) -> None:
    rows = fake(base=None).rows
    assert {row.verdict for row in rows} == {"new", "red", "broken"}


def test_error_ratios_that_grew_and_rows_that_went() -> None:
    base = {"a": 0.5, "b": 0.5, "c": 0.001, "d": 0.3, "e": 0.001}
    change = {"a": 0.76, "b": 0.75, "c": 0.03, "e": 0.031, "f": 0.9}
    assert correctness.problems(base, change) == [
        "a: worst ratio 0.760 is over 1.5 times base's 0.500",
        "e: worst ratio 0.031 is over 1.5 times base's 0.001",
        "d: judged in base, not in the change",
    ]
