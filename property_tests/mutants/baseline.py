"""The suite without a fault: what each test takes, and which lines it executes.

One process for each file of tests. A test's lines include those of the processes that it starts,
Triton's interpreter for one: its rewritten kernels keep their line numbers.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import child, covered, pool
from .mutant import ROOT

IMPORT = ""  # the name of no test
# In the names of tests that compile variants of CUDA C++ for those that launch them.
COMPILES = "compiles_without_a_gpu"
ALL: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Baseline:
    """tests: usual seconds by node id. lines: of a file, by number: the tests that execute it;
    `IMPORT` for what runs while no test does. failed: tests that fail without a fault. variants:
    of CUDA C++ that tests compile: source, architecture, macros. executed: by file of tests and
    file, the lines that its process executes, imports among them.
    """

    tests: dict[str, float]
    lines: dict[str, dict[int, set[str]]]
    failed: list[str]
    variants: tuple[child.Variant, ...] = ()
    executed: dict[str, dict[str, set[int]]] = field(default_factory=dict)

    def covering(self, file: str, first: int, last: int) -> set[str]:
        """Tests that execute any of these lines."""
        of_file = self.lines.get(file, {})
        return {t for n in range(first, last + 1) for t in of_file.get(n, ())}

    def touching(self, file: str) -> set[str]:
        """Tests that execute any line of a file, outside of imports."""
        return {t for tests in self.lines.get(file, {}).values() for t in tests} - {IMPORT}


def _key(file: str) -> str:
    """Changes with all that `evidence` knows, as bytes since lines count here, and the stack.

    And with how it is looked at, here.
    """
    here = Path(__file__)
    paths = [*covered.sources(ROOT), *covered.beside(ROOT, ROOT / file)]
    found = covered.of_files(ROOT, paths), covered.of_files(here.parent, [here])
    return covered.digest([*found, covered.stack()])


def _read(cache: Path) -> dict[str, Any]:
    try:
        known: dict[str, Any] = json.loads(cache.read_text())
    except (OSError, ValueError):
        return {}
    return known


def measure(
    folder: Path, cache: Path, slots: int, told: Callable[[str], None],
    names: frozenset[str] = ALL, until: float = math.inf,
) -> Baseline | None:  # fmt: skip
    """Run the files of tests of these names, or all, and look; `told` hears of each.

    What `cache` knows is not run, and what is run goes there as it ends. None: the time was up
    before the last had ended.
    """
    known = _read(cache)
    parts: dict[str, Any] = {}
    missing = []
    for path in covered.tests(ROOT):
        file = str(path.relative_to(ROOT))
        if names and path.stem.removeprefix("test_") not in names:
            continue
        if known.get(file, {}).get("key") == _key(file):
            parts[file] = known[file]
        else:
            missing.append(file)
    # The longest first, as far as is known, since they run side by side.
    missing.sort(key=lambda f: -sum(known.get(f, {}).get("tests", {}).values()))

    def jobs() -> Iterator[child.Job]:
        for n, file in enumerate(missing):
            yield child.Job(
                folder / "template", folder / f"baseline{n}", "", b"", (file,), {}, "quick", True,
                not covered.has_gpu(),
            )  # fmt: skip

    drawn: dict[str, dict[str, Any]] = {}  # by file: what still waits for its variants

    def ended(end: pool.Ended) -> Iterator[child.Job]:
        file = end.job.paths[0].partition("::")[0]
        part = _part(end)
        if file in drawn:
            part = drawn[file] | {"variants": part["variants"]}
        # The quick profile draws from the tests that compile; "identical" is said of all variants.
        elif every := sorted({t.partition("[")[0] for t in part["tests"] if COMPILES in t}):
            drawn[file] = part
            yield replace(
                end.job, paths=tuple(every), profile="ci", listing=True,
                folder=folder / f"all-{Path(file).stem}",
            )  # fmt: skip
            return
        parts[file] = {"key": _key(file)} | part
        told(f"{file}: {len(parts[file]['tests'])} tests in {end.seconds:.0f} s")
        cache.parent.mkdir(parents=True, exist_ok=True)
        written = cache.with_suffix(".new")
        written.write_text(json.dumps(known | parts))
        written.replace(cache)  # at once: a run may be killed at any moment

    if not pool.run_all(jobs(), slots, ended, until):
        return None
    return _merged(parts)


def _part(end: pool.Ended) -> dict[str, Any]:
    """What one process saw: tests with their seconds, failures, lines by test."""
    end.check()
    named, broken = end.first("names"), end.first("broken")
    if broken:
        raise pool.HarnessError(f"{broken['broken']} fails without a fault:\n{broken['text']}")
    if named is None:
        log = end.job.log.read_text()[-3000:] if end.job.log.exists() else ""
        raise pool.HarnessError(f"{end.job.paths[0]} ends with {end.code} without a fault:\n{log}")
    names = named["names"]
    tests, failed = dict.fromkeys(names, 0.0), []
    for event in end.events:
        if "took" in event:
            tests[event["took"]] += event["seconds"]
            if event["outcome"] == "failed":
                failed.append(event["took"])
    lines: defaultdict[str, defaultdict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for written in (end.job.folder / "trace").glob("*.json"):
        for number, path, seen in json.loads(written.read_text()):
            for n in seen:
                lines[path][n].add(number - 1)
    kept = {path: {n: sorted(t) for n, t in of.items()} for path, of in lines.items()}
    variants = [e["variant"] for e in end.events if "variant" in e]
    return {"tests": tests, "failed": failed, "lines": kept, "variants": variants}


def _merged(parts: dict[str, Any]) -> Baseline:
    tests: dict[str, float] = {}
    failed: list[str] = []
    lines: defaultdict[str, defaultdict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    variants: dict[child.Variant, None] = {}
    executed: dict[str, dict[str, set[int]]] = {}
    for file in sorted(parts):
        part = parts[file]
        names = [*part["tests"], IMPORT]  # -1 is the last
        tests |= part["tests"]
        failed += part["failed"]
        for source, architecture, macros in part["variants"]:
            variants[source, architecture, tuple(map(tuple, macros))] = None
        executed[file] = {path: {int(n) for n in of} for path, of in part["lines"].items()}
        for path, of in part["lines"].items():
            for n, indices in of.items():
                lines[path][int(n)] |= {names[i] for i in indices}
    by_file = {k: dict(v) for k, v in lines.items()}
    return Baseline(tests, by_file, failed, tuple(variants), executed)
