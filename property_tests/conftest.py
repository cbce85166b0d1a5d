"""Hypothesis profiles, one thread, and the ledger of everything that is judged.

Profiles: quick (under a minute), ci (the default: the same examples on every run) and nightly
(random, many, and what fails is kept in .hypothesis/examples; promote it to an @example).
"""

from __future__ import annotations

import os
import time
from typing import Any

# Small tensors: a second thread costs more than it brings, and far more where cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis.database import DirectoryBasedExampleDatabase

from property_tests import emulated
from property_tests.ledger import LEDGER, Ledger, slowest
from property_tests.places import emulator, place  # noqa: F401, fixtures of all tests
from quest.conformance import lanes

torch.set_num_threads(1)

COMMON: dict[str, Any] = {
    "deadline": None,
    "print_blob": True,
    "verbosity": Verbosity.normal,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("quick", max_examples=3, derandomize=True, database=None, **COMMON)
settings.register_profile("ci", max_examples=20, derandomize=True, database=None, **COMMON)
settings.register_profile(
    "nightly",
    max_examples=1000,
    derandomize=False,
    database=DirectoryBasedExampleDatabase(".hypothesis/examples"),
    phases=tuple(Phase),
    **COMMON,
)
settings.load_profile("ci")

QUICK_SHARE = 16
SHOWN = 5  # lines of each list at the end of a run

_started = time.perf_counter()
_gathered = Ledger()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Promoted entries first; in the quick profile one in QUICK_SHARE parameters, in each lane.

    A test that is marked `whole` keeps all of them: cheap ones, a case each.
    """
    items.sort(key=lambda item: not item.nodeid.partition("[")[0].endswith("::test_promoted"))
    if settings.get_current_profile_name() != "quick":
        return
    seen: dict[tuple[str, str], int] = {}
    kept, dropped = [], []
    for item in items:
        if item.get_closest_marker("whole") is not None:
            kept.append(item)
            continue
        params = getattr(getattr(item, "callspec", None), "params", {})
        group = (item.nodeid.partition("[")[0], str(params.get("lane", "")))
        count = seen[group] = seen.get(group, -1) + 1
        (dropped if count % QUICK_SHARE else kept).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send a worker's ledger to its controller; fail the run for what only the sum shows."""
    config: Any = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["ledger"] = LEDGER.dump()
        return
    _gathered.merge(LEDGER.dump())
    if _gathered.problems() and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over the ledger of a worker that is done (pytest-xdist)."""
    _gathered.merge(getattr(node, "workeroutput", {}).get("ledger", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What was judged, the worst ratios, the slowest tests, lanes that did not run, the time."""
    write = terminalreporter.write_line
    terminalreporter.section("judged against the oracle")
    for line in _gathered.table():
        write(line)
    reports = [r for found in terminalreporter.stats.values() for r in found]
    timed = [r for r in reports if hasattr(r, "duration") and hasattr(r, "nodeid")]
    for title, lines in (
        ("closest to their bounds (error over bound)", _gathered.closest(SHOWN)),
        ("slowest tests", slowest(timed, SHOWN)),
    ):
        for line in [f"{title}:", *lines] if lines else []:
            write(line)
    for lane in lanes.all_lanes():
        reason = lanes.missing(lane)
        if reason is not None:
            write(f"not run: {lane} ({reason})", yellow=True)
    if emulated.compiler() is None:
        write("not run: cuda-emulator (no C++ compiler)", yellow=True)
    for problem in _gathered.problems():
        write(problem, red=True)
    elements = sum(t.elements for t in _gathered.tallies.values())
    write(f"{elements:,} elements judged in {time.perf_counter() - _started:.0f} s")
