"""How pytest is set up for this project: warnings, and records of benchmarks."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import quest
from benchmarks import ceilings, conftest, gate, table, timed, timing, tokens
from quest.conformance import lanes
from quest.conformance.verdict import Verdict

ROOT = Path(__file__).resolve().parents[1]


def run_pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q",
         *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("where", "option"),
    [
        (".", "--benchmark-compare"),
        (".", "--benchmark-save=x"),
        ("property_tests/test_suite.py", "--benchmark-compare"),
    ],
)
def test_records_without_their_folder_are_refused(where: str, option: str) -> None:
    done = run_pytest(where, option)
    name = option.partition("=")[0]
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    told = f"ERROR: {name} needs the folder: pytest benchmarks/ {name}"
    assert told in done.stderr.splitlines()
    assert "Traceback" not in done.stdout + done.stderr


def test_records_with_their_folder_are_not() -> None:
    assert run_pytest("benchmarks/bench_hadamard.py", "--benchmark-compare").returncode == 0


def warn(message: str, module: str) -> None:
    """A DeprecationWarning that `module` raises."""
    warnings.warn_explicit(message, DeprecationWarning, "file.py", 1, module=module)


@pytest.mark.parametrize("tail", ["deprecated", "not supported in Python 3.14+ and may break"])
def test_torch_s_own_use_of_torchscript_is_let_through(tail: str) -> None:
    told = f"`torch.jit.script_method` is {tail}. Please switch to `torch.compile`."
    warn(told, "torch.jit._script")
    with pytest.raises(DeprecationWarning, match="script_method"):
        warn(told, "quest.ops")
    with pytest.raises(DeprecationWarning, match="something else"):
        warn("something else is deprecated", "torch.jit._script")


def test_a_table_and_a_record_are_drawn_alike() -> None:
    info = {"shape": [64, 4096, 11008], "ratio_to_baseline": 1.25}
    name = "benchmarks/bench_linear.py::test_frozen[64x4096x11008-w4a4-2:4]"
    eager = {"fullname": name.replace("frozen", "frozen_eager"), "extra_info": info}
    record = {
        "environment": {"device": "NVIDIA X"},
        "benchmarks": [{"fullname": name, "extra_info": info}, eager],
    }
    drawn = "\n".join((
        "===== NVIDIA X: against torch and the copy bound =====",
        "frozen[64x4096x11008-w4a4-2:4]    25.9 us    1.25x   1.13-1.46      0.463   249  0.98",
        "frozen_eager[64x4096x11008-w4a4] (host)   49 us    0.40x   0.38-0.41",
    ))  # fmt: skip
    expected = ("NVIDIA X", [((64, 4096, 11008), "w4a4-2:4", 1.25)])
    assert tokens.of_record(record) == expected
    assert tokens.of_table(drawn) == expected
    with pytest.raises(ValueError, match="no benchmark of a frozen layer"):
        tokens.draw("", [], ROOT / "not.png")


@pytest.mark.parametrize("option", ["save", "autosave", "json"])
@pytest.mark.parametrize(
    ("benchmarks", "disabled", "written"),
    [([], False, False), ([], True, True), ([object()], False, True)],
)
def test_a_run_without_any_time_writes_nothing(
    benchmarks: list[object], disabled: bool, written: bool, option: str
) -> None:
    """pytest-benchmark would warn of it, and a warning is an error here."""
    given = dict.fromkeys(("save", "autosave", "json")) | {option: "x"}
    plugin = SimpleNamespace(**given, benchmarks=benchmarks, disabled=disabled)
    stash, run = pytest.Stash(), conftest.Run()
    stash[conftest.RUN] = run
    manager = SimpleNamespace(get_plugin=lambda name: plugin)
    session: Any = SimpleNamespace(
        config=SimpleNamespace(
            stash=stash, pluginmanager=manager, option=SimpleNamespace()
        ), testsfailed=0,
    )  # fmt: skip
    conftest._guard_saving(session)
    assert (getattr(plugin, option) is not None) == written
    assert bool(run.note) != written


def test_a_ratio_above_one_is_ours_faster() -> None:
    times = timing.Times([1.0, 1.0, 2.0], [3.0, 3.0, 3.0], [1.0, 1.0, 1.0], False)
    assert times.ratio == 3.0
    low, high = times.interval()
    assert 1.5 <= low <= high == 3.0


def test_the_interval_of_a_ratio_is_one_of_95_percent() -> None:
    """A median of n normal times has 1.253 times the deviation of their mean."""
    g, n, noise = np.random.default_rng(4), 801, 0.02
    ours, torchs = np.exp(noise * g.standard_normal((2, n)))
    low, high = timing.Times([*ours], [*torchs], [], False).interval()
    due = 2 * 1.96 * 2**0.5 * 1.253 * noise / n**0.5
    assert math.log(high / low) == pytest.approx(due, rel=0.1)


def test_times_stay_with_their_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is the faster in a round; the first round, which says how many follow, is none."""
    monkeypatch.setattr(timing, "ROUNDS", (3, 3))
    monkeypatch.setattr(
        timing, "cpu_round", lambda calls, i: [10.0 * i + 3, 10.0 * i + 1, 10.0 * i + 2 * (i < 3)]
    )
    times = timing.measure(lambda x: x, lambda x: x, [(torch.zeros(1),)], 512, "cpu")
    assert times.ours == [13.0, 23.0, 33.0]
    assert times.baseline == [11.0, 21.0, 31.0]
    assert times.copy == [12.0, 22.0, 30.0]


@pytest.mark.parametrize(("once", "rounds"), [(1 / 1024, 101), (1 / 64, 51), (1.0, 15)])
def test_rounds_begin_when_all_is_warm(
    once: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two calls of each, and a round that says how many there is time for, are no times."""
    now, warm, asked = [0.0], [], []

    def one_round(_: Any, i: int) -> list[float]:
        now[0] += once
        asked.append(i)
        return [i + 0.25, i + 0.5]

    monkeypatch.setattr(timing, "cpu_round", one_round)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    calls: Any = [lambda i, name=name: warm.append((name, i)) for name in "ab"]
    taken, host_bound = timing.interleave(calls, "cpu")
    assert warm == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert asked == [*range(rounds + 1)]
    assert taken == [[i + part for i in asked[1:]] for part in (0.25, 0.5)]
    assert not host_bound


def test_sets_of_inputs_are_others_each_time_and_the_same_in_every_run() -> None:
    sets = timed._sets(((2, 8), (3,)), 3)
    for one, other in itertools.combinations(sets, 2):
        assert not any(torch.equal(x, y) for x, y in zip(one, other, strict=True))
    for one, again in zip(sets, timed._sets(((2, 8), (3,)), 3), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, again, strict=True))
    assert [tuple(t.shape) for t in sets[2]] == [(2, 8), (3,)]


def test_each_round_has_inputs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for both; what lay in the cache from the round before is not read again."""
    monkeypatch.setattr(timing, "ROUNDS", (4, 4))
    seen: dict[str, list[float]] = {"ours": [], "torch": []}
    sets = [(torch.tensor(float(i)),) for i in range(3)]
    times = timing.measure(
        lambda x: seen["ours"].append(x.item()), lambda x: seen["torch"].append(x.item()),
        sets, 512, "cpu",
    )  # fmt: skip
    assert seen["ours"] == seen["torch"]
    assert seen["ours"][-4:] in ([0, 1, 2, 0], [1, 2, 0, 1], [2, 0, 1, 2])
    assert [len(t) for t in (times.ours, times.baseline, times.copy)] == [4, 4, 4]


def test_a_copy_reads_and_writes_so_many_bytes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """From memory, and not what the cache holds of the copy before."""
    copied: list[tuple[int, int]] = []
    monkeypatch.setattr(
        Tensor, "copy_", lambda self, other: copied.append((self.data_ptr(), other.nbytes))
    )
    copy = timing.copier(3 * 2**20, "cpu")
    for i in range(4):
        copy(i)
    assert [2 * size for _, size in copied] == [3 * 2**20] * 4
    assert len({place for place, _ in copied}) == 4


@pytest.mark.parametrize("calls", [1, 2])
def test_what_is_told_of_a_time(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes: what is read once, inputs or what was made of them, and what is written.

    As many sets as the cache can't hold of what is read.
    """
    measured: list[tuple[int, int]] = []

    def measure(run: Any, baseline: Any, sets: Any, moved: int, device: str) -> timing.Times:
        measured.append((len(sets), moved))
        assert [run(*sets[0]), baseline(*sets[0])] == [ours, torchs]
        return timing.Times([2e-6 * calls], [6e-6 * calls], [1e-6 * calls], False)

    ours, torchs = torch.zeros(5, dtype=torch.int8), torch.zeros(7, dtype=torch.int8)
    asked: list[int] = []
    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(timed, "input_sets", lambda each, _: asked.append(each) or 3)
    monkeypatch.setattr(timed.gate, "open_for", lambda *_: gate.Passed("some", 0.25, 9))
    benchmark = SimpleNamespace(enabled=True, extra_info={}, pedantic=lambda *_, **__: None)
    one = timed.Timed(benchmark, timing.Replay())  # type: ignore[arg-type]
    element = timed.cases.DTYPE.itemsize
    for prepare, read in ((None, 16 * element), (lambda x: (x[:, :3],), 6 * element)):
        one(
            spec="spec", shape=(2, 8), key=("k",), judge=lambda *_: [], prepare=prepare,
            run=lambda *_: ours, baseline=lambda *_: torchs, constant=(torch.zeros(3),),
            operations=4e6, ceiling=8.0, memory=(10, 40), calls=calls,
        )  # fmt: skip
        told = one.info
        assert told == one.benchmark.extra_info
        assert told["bytes"] == read + 12 + 5
        assert measured.pop() == (3, calls * (read + 17))
        assert asked.pop() == read  # as many sets as the cache can't hold of what is read
        assert (told["lane"], told["worst_ratio"], told["elements"]) == ("some", 0.25, 9)
        due = {
            "median_us": 2.0, "baseline_us": 6.0, "copy_us": 1.0, "ratio_to_baseline": 3.0,
            "fraction_of_copy": 0.5, "tera_operations": 2.0, "fraction_of_rate": 0.25,
            "memory_ratio": 0.25,
        }  # fmt: skip
        assert {name: told[name] for name in due} == pytest.approx(due)


def test_no_time_without_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the inputs it is that a judge refuses, and once refused for good."""
    for name in ("_passed", "_refused"):
        monkeypatch.setattr(gate, name, {})
    monkeypatch.setattr(timing, "measure", lambda *_: pytest.fail("a time was taken"))
    benchmark = SimpleNamespace(enabled=True, extra_info={}, pedantic=lambda *_, **__: None)
    one = timed.Timed(benchmark, timing.Replay())  # type: ignore[arg-type]
    for i, bad in enumerate(gate.DISTRIBUTIONS):

        def judge(_: Any, name: str, bad: str = bad) -> list[Verdict]:
            return [Verdict("stage", 1, failure="off" if name == bad else None)]

        for _ in range(2):
            with pytest.raises(gate.RedGateError, match="stage: off"):
                one(
                    spec="spec", shape=(2, 8), key=(i,), judge=judge, run=lambda x: x,
                    baseline=lambda x: x,
                )  # fmt: skip
    assert not one.info


def test_a_gate_is_of_one_key_and_a_lane_that_breaks_rules_keeps_it_shut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("_passed", "_refused"):
        monkeypatch.setattr(gate, name, {})
    asked: list[str] = []

    def judge(_: Any, name: str) -> list[Verdict]:
        asked.append(name)
        return [Verdict("stage", len(asked), 0.5 / len(asked))]

    def breaks(_: Any, name: str) -> list[Verdict]:
        raise lanes.GuardError("an input was changed")

    once = [*gate.DISTRIBUTIONS] * len(gate._quantizers())
    for key in (("linear", 1), ("linear", 2), ("linear", 1)):
        passed = gate.open_for(key, judge)
    assert (sorted(asked), passed.worst_ratio) == (sorted(2 * once), 0.5)
    assert passed.elements == sum(range(1, len(once) + 1))
    for made in (breaks, judge):  # it was refused
        with pytest.raises(gate.RedGateError, match=r"wrong for linear 3: an input was changed"):
            gate.open_for(("linear", 3), made)


@pytest.mark.parametrize(("cuda", "name"), [(True, "triton-cuda"), (False, "torch-cpu")])
def test_the_lane_that_is_timed_is_judged(
    cuda: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "CUDA", cuda)
    assert gate.lane().name == name


def test_rates_of_the_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU that was measured; 2:4 sparse at twice the rate, where it is compressed."""

    def rates() -> list[float]:
        asked = [("w1a1", False), ("w4a4", False), ("w4a4-2:4", False), ("w4a4-2:4", True),
                 ("w4a4", True), ("w4a16", False)]  # fmt: skip
        return [ceilings.of(quest.recipe(name), compressed) for name, compressed in asked]

    for there, capability in ((False, (9, 0)), (True, (9, 0)), (True, (8, 0))):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda made=capability: made)
        hopper = there and capability == (9, 0)
        assert rates() == ([15_800, 1976, 1976, 3952, 1976, 0] if hopper else [0.0] * 6)


def test_the_nearer_bound_is_told() -> None:
    info = {"fraction_of_copy": 0.5, "fraction_of_rate": 0.25}
    assert table._bound(info) == "0.500 c"
    assert table._bound(info | {"fraction_of_rate": 0.75}) == "0.750 t"
    assert table._bound({"fraction_of_copy": 0.125}) == "0.125 c"


def test_times_of_one_of_several_calls() -> None:
    """And of copying the bytes of one."""
    times = timing.Times([2.0, 4.0], [6.0, 8.0], [4.0, 2.0], True)
    assert times.of_one(2) == timing.Times([1.0, 2.0], [3.0, 4.0], [2.0, 1.0], True)


def test_times_of_one_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fast until the clock falls does not count; calls are numbered on."""
    now, asked = [0.0], []

    def call(i: int) -> None:
        asked.append(i)
        now[0] += 0.01 if now[0] < 1 else 0.02

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert timing.alone(call, "cpu", seconds=2.0) == pytest.approx(0.02)
    assert asked == [0, *range(len(asked) - 1)]
    assert now[0] == pytest.approx(2.0, abs=0.15)
    assert timing.alone(call, "cpu", seconds=0.0) == pytest.approx(0.02)  # one at least


def test_both_are_timed_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, torch's, torch's and ours, each on all sets of inputs; what the table tells of them."""
    sets = [(torch.tensor(float(i)),) for i in range(3)]
    asked: list[tuple[str, list[float]]] = []
    seen: list[float] = []

    def alone(call: Callable[[int], object], device: str) -> float:
        seen.clear()
        names = [call(i) for i in range(4)]
        asked.append((str(names[0]), list(seen)))
        return (0.010, 0.019, 0.018, 0.010)[len(asked) - 1]

    def named(name: str) -> Callable[[Tensor], str]:
        return lambda x: seen.append(x.item()) or name  # type: ignore[func-returns-value]

    monkeypatch.setattr(timing, "alone", alone)
    one = timed.Timed(SimpleNamespace(extra_info={}), timing.Replay())  # type: ignore[arg-type]
    one._alone(named("ours"), named("torch"), sets)
    assert asked == [(name, [0, 1, 2, 0]) for name in ("ours", "torch", "torch", "ours")]
    assert one.info == one.benchmark.extra_info
    name = "benchmarks/bench_model.py::test_prefill[8x512-w4a4]"
    told = list(table.alone({name: one.info, name.replace("8", "4"): {}}))
    line, legend = told
    assert line == "prefill[8x512-w4a4] by itself 10.0 ms, torch 18.5 ms: 1.85x (1.80, 1.90)"
    assert legend.startswith("by itself: ")
    assert not list(table.alone({name: {}}))


@pytest.mark.parametrize("cuda", [True, False])
def test_the_gate_judges_both_kernels_that_quantize(
    cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are few; those that are timed may be another kernel's."""
    from quest.kernels import rows

    monkeypatch.setattr(gate, "CUDA", cuda)
    monkeypatch.setattr(gate, "lane", lambda: SimpleNamespace(name="some"))
    monkeypatch.setattr(gate, "_passed", {})
    seen: list[tuple[str, bool]] = []

    def judge(_: Any, name: str) -> list[Any]:
        taken = rows.takes(gate.ROWS, 2048, torch.bfloat16)
        seen.append((name, taken))
        verdict = SimpleNamespace(ratio=0.25 if taken else 0.5, elements=3)
        verdict.require = lambda: verdict
        return [verdict]

    passed = gate.open_for(("some", 1), judge)
    kernels = (True, False) if cuda else (True,)
    assert seen == [(name, taken) for name in gate.DISTRIBUTIONS for taken in kernels]
    assert (passed.worst_ratio, passed.elements) == (0.5 if cuda else 0.25, 3 * len(seen))
    assert rows.takes(gate.ROWS, 2048, torch.bfloat16)
