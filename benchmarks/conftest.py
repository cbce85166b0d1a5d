"""What makes `pytest benchmarks/ --benchmark-compare` work from a fresh clone.

Records are kept in the repository by kind of machine (`records`); a comparison that has none says
so in one line; a benchmark that the record has and the run lacks fails the run; the table at the
end shows the ratios that pytest-benchmark's own does not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from . import records, rows, table
from .timed import Benchmark, Timed
from .timing import Replay

PLUGIN_STORAGE = "file://./.benchmarks"  # pytest-benchmark's default
PLUGIN = "pytest-benchmark"  # the name of its session among pytest's plugins
# Options with which a user selects some benchmarks.
SELECTIONS = ("keyword", "markexpr", "deselect", "lf", "stepwise", "ignore", "ignore_glob")

PEERS = "bench_peers.py"

_clock = Replay()


class Run:
    """What this run knows: the record to compare with, results, deselected benchmarks."""

    def __init__(self) -> None:
        self.record: dict[str, Any] | None = None
        self.path: Path | None = None
        self.note = ""
        self.results: dict[str, dict[str, Any]] = {}
        self.collected: set[str] = set()
        self.deselected: set[str] = set()
        self.missing: list[str] = []
        self.kept: rows.Kept | None = None

    def before(self) -> dict[str, float] | None:
        """The record's ratios by full name; None without a comparison."""
        if self.record is None:
            return None
        return {
            b["fullname"]: b["extra_info"]["ratio_to_baseline"]
            for b in self.record["benchmarks"]
            if "ratio_to_baseline" in b.get("extra_info", {})
        }


RUN = pytest.StashKey[Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Of this folder."""
    parser.getgroup("benchmark").addoption(
        "--rows", metavar="FILE", type=Path,
        help="Append each result to FILE as soon as it is measured; python -m benchmarks.rows "
        "prints its tables.",
    )  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Before pytest-benchmark sets up: storage, machine id, record, and a table that reads well."""
    run = config.stash[RUN] = Run()
    option = config.option
    # pytest-benchmark has no option for the folder below the storage.
    patch = pytest.MonkeyPatch()
    patch.setattr("pytest_benchmark.session.get_machine_id", records.kind)
    config.add_cleanup(patch.undo)
    # CPU times are those of one thread: a record does not depend on the number of cores.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config.add_cleanup(lambda: torch.set_num_threads(threads))
    if option.benchmark_storage == PLUGIN_STORAGE:
        option.benchmark_storage = f"file://{records.RECORDS}"
    given = " ".join(config.invocation_params.args)
    if "--benchmark-columns" not in given:
        option.benchmark_columns = ["median", "iqr", "min", "rounds"]
    if "--benchmark-sort" not in given:
        option.benchmark_sort = "name"  # a benchmark's line in the record and its line now adjoin
    if option.rows and not option.collectonly:
        try:
            run.kept = rows.Kept(option.rows)
        except (OSError, ValueError) as error:
            raise pytest.UsageError(f"--rows: {error}") from None
    storage = option.benchmark_storage.removeprefix("file://")
    if option.benchmark_compare and "://" not in storage:
        _find_record(config, run, Path(storage))


def _find_record(config: pytest.Config, run: Run, storage: Path) -> None:
    wanted = config.option.benchmark_compare
    found = records.find(storage, wanted)
    folder = _shown(storage / records.kind())
    if found:
        run.path = found[-1]
        try:
            run.record = records.load(run.path)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
        return
    if wanted is not True:
        there = ", ".join(p.stem for p in sorted((storage / records.kind()).glob("*.json")))
        raise pytest.UsageError(
            f"--benchmark-compare={wanted}: no such record in {folder}; there: {there or 'none'}"
        )
    run.note = f"nothing to compare with: no record in {folder}; --benchmark-save=NAME makes one"
    if config.option.benchmark_compare_fail:
        raise pytest.UsageError(f"--benchmark-compare-fail: {run.note}")
    config.option.benchmark_compare = []


def _shown(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Where it runs and what it is compared with."""
    run, here = config.stash[RUN], records.environment()
    told = [f"benchmarks: {here['device']}, {here['processor']}, torch {here['torch']}"]
    if run.record is not None and run.path is not None:
        then = run.record.get("environment", {})
        about = ", ".join(str(then[k]) for k in ("device", "processor") if k in then)
        told.append(f"record: {_shown(run.path)} ({about}, torch {then.get('torch', 'unknown')})")
    return told + ([run.note] if run.note else [])


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, str]:
    """The kind of machine and no more: pytest-benchmark warns where it differs."""
    return {"kind": records.kind()}


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """Keep the commit; folder and branch names are the user's own."""
    for key in set(commit_info) - {"id", "time", "dirty"}:
        del commit_info[key]


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Add the environment; leave out pytest-benchmark's options, which do not apply.

    Digits beyond the sixth are noise, and a third of a record.
    """
    output_json["environment"] = records.environment()
    for bench in output_json["benchmarks"]:
        bench.pop("options", None)
        for part in (bench["stats"], bench["extra_info"]):
            part |= {k: float(f"{v:.6g}") for k, v in part.items() if isinstance(v, float)}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every benchmark its group, and the clock that hands over measured times."""
    here = Path(__file__).parent
    for item in items:
        if item.path.parent == here:
            group = item.path.stem.removeprefix("bench_")
            item.add_marker(pytest.mark.benchmark(group=group, timer=_clock.read))


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Remember what was deselected on purpose."""
    for item in items:
        item.config.stash[RUN].deselected.add(item.nodeid)


@pytest.fixture
def timed(request: pytest.FixtureRequest, benchmark: Benchmark) -> Iterator[Timed]:
    """The callable that passes a case's gate and times it (`Timed.__call__`)."""
    one = Timed(benchmark, _clock)
    yield one
    if one.info:
        name, config = request.node.nodeid, request.config
        config.stash[RUN].results[name] = one.info
        if kept := config.stash[RUN].kept:
            kept.add(name, one.info)


def _selected(config: pytest.Config) -> bool:
    chosen = any(getattr(config.option, name, None) for name in SELECTIONS)
    return chosen or bool(config.stash[RUN].deselected)


def _missing(config: pytest.Config, run: Run) -> list[str]:
    """Benchmarks that the record has, that this run was to contain, and that have no time."""
    option = config.option
    off = option.benchmark_disable or option.benchmark_skip or option.collectonly
    if run.record is None or off:
        return []
    names = records.covered(
        run.record["names"], config.args, config.rootpath, config.invocation_params.dir
    )
    lacking = names - set(run.results) - run.deselected
    # What others wrote need not be installed.
    lacking = {name for name in lacking if PEERS not in name}
    if _selected(config):
        # Of a selection nobody can tell whether it meant what is no longer there.
        lacking &= run.collected
    return sorted(lacking)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Remember what is there and selected."""
    session.config.stash[RUN].collected = {item.nodeid for item in session.items}


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Save nothing of a run that failed; fail a run that lacks benchmarks that the record has."""
    _guard_saving(session)
    _look_for_missing(session)
    return (yield)


def _guard_saving(session: pytest.Session) -> None:
    # Outermost wrapper: pytest-benchmark saves inside the next one.
    run, plugin = session.config.stash[RUN], session.config.pluginmanager.get_plugin(PLUGIN)
    if plugin is None:
        return
    writes = plugin.save or plugin.autosave or plugin.json
    if writes and not (plugin.benchmarks or plugin.disabled):
        # It would warn, which here is an error that hides why there is none.
        run.note = "nothing was saved, since no benchmark has a time"
        plugin.save = plugin.autosave = plugin.json = None
    if not (plugin.save or plugin.autosave):
        return
    if session.testsfailed:
        plugin.save = plugin.autosave = None
        run.note = "no record was saved, since some benchmarks failed"
    elif _selected(session.config):
        run.note = (
            "this record holds a selection, and --benchmark-compare takes the latest record: "
            "keep one of the full run"
        )


def _look_for_missing(session: pytest.Session) -> None:
    run, code = session.config.stash[RUN], pytest.ExitCode
    ended = (code.OK, code.TESTS_FAILED, code.NO_TESTS_COLLECTED)
    if session.exitstatus not in ended or session.shouldfail or session.shouldstop:
        return
    run.missing = _missing(session.config, run)
    if run.missing:
        session.exitstatus = code.TESTS_FAILED


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """The table, and what is missing."""
    run, out = config.stash[RUN], terminalreporter
    if run.results:
        out.section(table.title(records.device_name()))
        for line in table.whole(run.results, run.before()):
            out.write_line(line)
    if run.missing and run.path is not None:
        out.section(f"{len(run.missing)} missing: in {run.path.stem}, without a time now", red=True)
        for name in run.missing:
            out.write_line(name, red=True)
    if run.note:
        out.write_line(run.note, yellow=True)
