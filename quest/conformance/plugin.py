"""pytest's side of the public court: options, what is not covered, lists, summary, reports.

`pytest --pyargs quest.conformance --impl package.module:Adapter`. An installation registers this
module as a plugin (pytest reads no conftest.py of a package that `--pyargs` names before it reads
the command line); in a checkout the root's conftest.py does. Without `--impl` it does nothing, and
it imports nothing that is slow.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from quest.conformance.public.court import Court
    from quest.conformance.public.results import Results

TESTS = Path(__file__).parent / "tests"
PACKAGE = "quest.conformance"
NEEDED = ("hypothesis", "pytest")
EXAMPLES = 30
COURT = pytest.StashKey["Court"]()
RESULTS = pytest.StashKey["Results"]()
WRITTEN = pytest.StashKey[list[tuple[str, str]]]()  # what became of the reports, with a color
NOT_COVERED = "not covered: "
STALE = "quest stale"  # the key under which a worker of pytest-xdist sends stale entries


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of the court."""
    group = parser.getgroup("quest", "quest's conformance court: --pyargs quest.conformance")
    group.addoption("--impl", metavar="MODULE:ADAPTER", help="the implementation that is judged")
    group.addoption("--skips", metavar="FILE", help="properties that are not run, one a line")
    group.addoption("--xfails", metavar="FILE", help="properties that must fail, one a line; "
                    "package:file is a file in an installed package")  # fmt: skip
    group.addoption("--report-json", metavar="FILE", help="write what was judged as JSON")
    group.addoption("--report-html", metavar="FILE", help="and as one page with pictures")
    group.addoption("--max-examples", type=int, default=EXAMPLES, metavar="N",
                    help=f"inputs drawn for each property (default {EXAMPLES})")  # fmt: skip


def _asked(config: pytest.Config) -> bool:
    """Whether the command line names the court's tests."""
    named = [str(a).partition("::")[0] for a in config.invocation_params.args]
    return any(a == PACKAGE or a.startswith(f"{PACKAGE}.") for a in named)


def pytest_configure(config: pytest.Config) -> None:
    """Find the implementation; UsageError says what is wrong with the command line."""
    config.addinivalue_line(
        "markers", "judges(*functions, declares=(), **axes): a property of the public court"
    )
    spec = config.getoption("--impl")
    if spec is None:
        given = [o for o in ("--skips", "--xfails", "--report-json", "--report-html")
                 if config.getoption(o)]  # fmt: skip
        if given or _asked(config):
            told = given[0] if given else f"--pyargs {PACKAGE}"
            raise pytest.UsageError(f"{told} needs --impl package.module:Adapter")
        return
    absent = [n for n in NEEDED if importlib.util.find_spec(n) is None]
    if absent:
        raise pytest.UsageError(
            f"--impl needs {', '.join(absent)}: pip install 'quest-lowbit[conformance]'"
        )
    _start(config, spec)


def _start(config: pytest.Config, spec: str) -> None:
    from quest.conformance import report
    from quest.conformance.public import adapter, capabilities, lists
    from quest.conformance.public.court import Court
    from quest.conformance.public.expected import ExpectedFailures
    from quest.conformance.public.results import Results

    try:
        impl = adapter.load(spec)
        skips, xfails = (lists.read(o, config.getoption(o)) for o in ("--skips", "--xfails"))
    except (capabilities.AdapterError, lists.ListError) as error:
        raise pytest.UsageError(str(error)) from None
    reports = [config.getoption(option) for option in ("--report-json", "--report-html")]
    if all(reports) and len({Path(path).resolve() for path in reports}) == 1:
        raise pytest.UsageError(f"--report-json and --report-html are one file: {reports[0]}")
    for option in ("--report-json", "--report-html"):
        path = config.getoption(option)
        try:
            report.check(option, Path(path) if path else None)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
        except OSError as error:
            raise pytest.UsageError(f"{option} {path}: {error.strerror}") from None
    if config.getoption("--max-examples") < 1:
        raise pytest.UsageError(
            f"--max-examples must be positive, got {config.getoption('--max-examples')}"
        )
    if config.option.tbstyle == "auto":
        config.option.tbstyle = "short"  # the examples say more than the court's own source
    config.stash[COURT] = Court(impl)
    config.stash[RESULTS] = results = Results(impl, skips, xfails)
    config.pluginmanager.register(ExpectedFailures(impl, results.xfails))
    config.stash[WRITTEN] = []
    _profile(config)


def _profile(config: pytest.Config) -> None:
    from hypothesis import HealthCheck, Phase, settings

    if config.getoption("--hypothesis-profile", None):
        return
    settings.register_profile(
        "quest-conformance",
        max_examples=config.getoption("--max-examples"),
        derandomize=config.getoption("--hypothesis-seed", None) is None,
        database=None,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        phases=[p for p in Phase if p is not Phase.explain],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    settings.load_profile("quest-conformance")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The court's tests say nothing without an implementation."""
    return True if COURT not in config.stash and TESTS in (
        collection_path, *collection_path.parents
    ) else None  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A property's axes: what everyone is asked about, and what the adapter declares beyond."""
    marker = metafunc.definition.get_closest_marker("judges")
    if marker is None or COURT not in metafunc.config.stash:
        return
    from quest.conformance.public.axes import values

    impl = metafunc.config.stash[COURT].impl
    axes = {k: v for k, v in marker.kwargs.items() if k != "declares"}
    for name, asked in reversed(axes.items()):
        found = values(name, tuple(asked), impl.capabilities)
        metafunc.parametrize(name, found, ids=[str(v) for v in found])


def _uncovered(item: pytest.Item) -> str | None:
    """Why an item is not covered; None where it is."""
    from quest.conformance.public.axes import uncovered

    marker = item.get_closest_marker("judges")
    if marker is None:
        return None
    given = getattr(getattr(item, "callspec", None), "params", {})
    params = {k: v for k, v in given.items() if k in marker.kwargs}
    impl = item.config.stash[COURT].impl
    return uncovered(impl, marker.args, marker.kwargs.get("declares", ()), params)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is not covered, to be skipped or to fail; refuse stale entries of both lists."""
    if RESULTS not in config.stash:
        return
    from quest.conformance.public.results import NAME

    results = config.stash[RESULTS]
    court_items = [i for i in items if i.get_closest_marker("judges")]
    for item in court_items:
        name = results.name(item)
        item.user_properties.append((NAME, name))
        reason = _uncovered(item)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=NOT_COVERED + reason))
            continue
        if results.skips.match(name):
            item.add_marker(pytest.mark.skip(reason=f"listed in {results.skips.origin}"))
        elif results.xfails.match(name):
            mark = pytest.mark.xfail(reason=f"listed in {results.xfails.origin}", strict=True)
            item.add_marker(mark)
    # A part of the tests, named on the command line, says nothing on the entries of the others.
    if {i.path for i in court_items} == set(TESTS.glob("test_*.py")) and not any(
        "::" in str(a) for a in config.invocation_params.args
    ):
        stale = [*results.skips.stale(), *results.xfails.stale()]
        if stale and hasattr(config, "workeroutput"):
            # A worker of pytest-xdist can't end the run: it runs nothing, and its controller tells.
            config.workeroutput[STALE], items[:] = stale, []
        elif stale:
            raise pytest.UsageError("\n".join(stale))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Stale entries that a worker of pytest-xdist found; every worker finds the same."""
    stale = getattr(node, "workeroutput", {}).get(STALE)
    if stale and RESULTS in node.config.stash:
        node.config.stash[RESULTS].stale = stale


@pytest.fixture(scope="session")
def court(request: pytest.FixtureRequest) -> Court:
    """The court; each test finds its record empty."""
    made: Court = request.config.stash[COURT]
    return made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """A test's record begins empty, and travels with its report; the rules on sums come last.

    Before them come the declared values that the test's own draws missed.
    """
    if COURT not in item.config.stash or not item.get_closest_marker("judges"):
        return (yield)
    from quest.conformance.public.results import RECORD

    assert isinstance(item, pytest.Function)
    made = item.config.stash[COURT]
    made.start()
    try:
        yield
        made.asked.ask_rest(item.function, item.funcargs)
        made.settle()
    finally:
        item.user_properties.append((RECORD, made.finish()))


class _Gatherer:
    """Takes reports into the run's results."""

    def __init__(self, results: Results) -> None:
        self.results = results

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of one test."""
        self.results.add(report)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Begin to gather."""
    if RESULTS in session.config.stash:
        session.config.pluginmanager.register(_Gatherer(session.config.stash[RESULTS]))


def pytest_report_teststatus(report: Any) -> tuple[str, str, str] | None:
    """What is not covered is no skip."""
    if report.skipped and NOT_COVERED in str(report.longrepr):
        return "not covered", "-", "NOT COVERED"
    return None


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Nothing covered is no success; write the reports, but in the controller alone."""
    config = session.config
    if RESULTS not in config.stash or hasattr(config, "workerinput"):
        return
    results = config.stash[RESULTS]
    if results.stale:
        session.exitstatus = pytest.ExitCode.USAGE_ERROR
        return
    if session.exitstatus == 0 and results.outcomes and not results.judged():
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
    from quest.conformance.public import document, page

    for option, write in (("--report-json", document.write), ("--report-html", page.write)):
        path = config.getoption(option)
        if not path:
            continue
        try:
            write(Path(path), results)
        except OSError as error:
            config.stash[WRITTEN].append((f"{option} {path}: {error.strerror}", "red"))
            session.exitstatus = pytest.ExitCode.USAGE_ERROR
        else:
            config.stash[WRITTEN].append((f"written: {path}", ""))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table of properties, departures, and the smallest failing examples."""
    if RESULTS not in config.stash:
        return
    from quest.conformance.public import summary

    terminalreporter.section(f"judged: {config.getoption('--impl')}")
    results = config.stash[RESULTS]
    told = [(f"ERROR: {line}", "red") for line in results.stale] or summary.lines(results)
    for line, color in (*told, *config.stash[WRITTEN]):
        terminalreporter.write_line(line, **({color: True} if color else {}))
