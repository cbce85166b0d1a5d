"""What stands nearest to a verdict: the place of the fault, and the test that it failed.

A kill that no longer holds (see `evidence`) is carried while both are as they were:

- the place. Of Python the functions that hold mutated lines, signatures and decorators included;
  the code of the module without bodies of functions where such a line stands in none. Of CUDA C++
  the text of the file, without comments. Of a mutant that NVRTC refuses all texts that are compiled
  with it.
- the test. Its function, and of its file, and of helpers in this folder, what that names, and what
  those name in turn: functions, classes, constants, single imports, fixtures by their arguments;
  autouse fixtures, `pytestmark` and statements that bind no name in any case; of both conftest.py,
  which set the profiles, these, what they import for its effect, and hooks, but for what only
  prints; and pytest's settings. Other tests of the file, and fixtures that it does not ask for, may
  change, and what is not Python (the emulator's headers). Of
  a kill by the import of a file of tests what stands at its top, and functions and classes that
  this names; where none could be gathered both conftest.py.

All else may have changed: the code between the two, so that the test no longer comes to the place;
the oracle, a bound, a judge or what inputs are drawn, so that it is content with less; data that
tests read. That is what a carried verdict can't tell, and a new run can. What says that all tests
pass (survived, open, not run, identical), and a kill by the sums over a run, names no test
and is never carried.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from typing import NamedTuple

from .covered import digest
from .cuda_source import code, is_cuda, together
from .evidence import Evidence, Outline, dump, without_docstrings
from .mutant import Mutant

CARRIED = frozenset({"killed", "crash", "timeout", "refused"})
CONFTEST = "property_tests/conftest.py"
CONFTESTS = ("conftest.py", CONFTEST)
PRINTS = frozenset({"pytest_terminal_summary"})  # hooks on which no test rests
READ = frozenset({"pytest_plugins", "collect_ignore", "collect_ignore_glob"})  # by pytest itself
NONE = "."  # the name of nothing: what is there in any case
ALL = ""  # the name of all that stands at the top of a file
_BY_IMPORT = "import of "
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class _Part(NamedTuple):
    """A statement at the top of a file, as a digest, and the words that may be names in it."""

    code: str
    words: frozenset[str]


class _Top:
    """The statements at the top of a file of tests, or of a helper.

    of: those that bind a name. always: those that bind none, and autouse fixtures. defined: names
    of functions and classes. imported: of a name the module in property_tests/, as a path, and what
    of it. package: that of the file, for what it imports from there.
    """

    def __init__(self, source: str, package: str) -> None:
        self._package = package.split(".")
        self.of: dict[str, list[_Part]] = {}
        self.always: list[_Part] = []
        self.defined: set[str] = set()
        self.imported: dict[str, tuple[str, str]] = {}
        for node in without_docstrings(source).body:
            self._enter(node)

    def _enter(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                self._import(node, alias)
            return
        part = _Part(digest([dump(node)]), frozenset(_words(node)))
        names = [*_bound(node)]
        if isinstance(node, _Definition):
            self.defined |= {*names}
            names += _fixture_names(node)
            if any("autouse" in dump(d) for d in node.decorator_list):
                names = []
        for name in names:
            self.of.setdefault(name, []).append(part)
        if not names:
            self.always.append(part)

    def _import(self, node: ast.Import | ast.ImportFrom, alias: ast.alias) -> None:
        module, level = getattr(node, "module", "") or "", getattr(node, "level", 0)
        whole = isinstance(node, ast.Import)
        name = alias.asname or (alias.name.partition(".")[0] if whole else alias.name)
        part = _Part(f"{level} {module} {dump(alias)}", frozenset())
        self.of.setdefault(name, []).append(part)
        parts = [p for p in (alias.name if whole else module).split(".") if p]
        if level:
            parts = [*self._package[: len(self._package) - level + 1], *parts]
        if parts[:1] == ["property_tests"]:
            self.imported[name] = "/".join(parts), ALL if whole else alias.name


class Near:
    """Digests of what stands nearest, in the project as it is."""

    def __init__(self, evidence: Evidence) -> None:
        self.root, self._evidence = evidence.root, evidence
        self._outlines: dict[str, Outline] = {}
        self._tops: dict[str, _Top | None] = {}
        self._tests: dict[str, str] = {}
        self._texts: dict[str, str] = {}
        self._set = ""

    def key(self, outcome: str, by: str, mutant: Mutant) -> str:
        """Of this outcome; by: the test that killed it. "" where it can't be carried."""
        if outcome not in CARRIED:
            return ""
        if outcome == "refused":
            return digest(f"{f} {self._text(f)}" for f in together(mutant.file, self.root))
        if by not in self._tests:
            self._tests[by] = self._of_test(by)
        return digest([self._place(mutant), self._tests[by]]) if self._tests[by] else ""

    def _place(self, mutant: Mutant) -> str:
        file = mutant.file
        if is_cuda(file):
            return f"{file} {self._text(file)}"
        outline = self._outline(file)
        lines = range(mutant.lines[0], mutant.lines[1] + 1)
        inside = all(any(a <= i <= b for a, b, _ in outline.wholes) for i in lines)
        names = sorted({n for a, b, n in outline.wholes if any(a <= i <= b for i in lines)})
        parts = [f"{n} {outline.heads[n]} {outline.functions[n]}" for n in names]
        return "\n".join([file, *parts, *([] if inside else [outline.module])])

    def _text(self, file: str) -> str:
        if file not in self._texts:
            self._texts[file] = digest([code((self.root / file).read_text())])
        return self._texts[file]

    def _outline(self, file: str) -> Outline:
        known = self._evidence.outlines
        if file not in known and file not in self._outlines:
            self._outlines[file] = Outline((self.root / file).read_text())
        return known.get(file) or self._outlines[file]

    def _of_test(self, by: str) -> str:
        """A test and what it names; "" where there is no such test now, or none is named."""
        if by == "import":  # nothing was gathered
            return digest(self._closure({(file, ALL)}) for file in CONFTESTS)
        if by.startswith(_BY_IMPORT):
            file = by.removeprefix(_BY_IMPORT)
            top = self._top(file)
            if top is None:
                return ""
            return self._closure({(file, n) for n in {*top.of} - top.defined})
        file, _, test = by.partition("::")
        name = re.split(r"\W", test, maxsplit=1)[0]
        top = self._top(file)
        if top is None or name not in top.defined:
            return ""
        # What pytest itself looks for in a module.
        names = {name, *(n for n in top.of if n.startswith("pytest"))}
        return digest([self._closure({(file, n) for n in names}), self._settings()])

    def _settings(self) -> str:
        """What both conftest.py do for every test, and what pytest reads of pyproject.toml."""
        if not self._set:
            text = self.root / "pyproject.toml"
            tool = tomllib.loads(text.read_text()).get("tool", {}) if text.exists() else {}
            parts = [repr(tool.get("pytest"))]
            for file in CONFTESTS:
                top = self._top(file)
                hooks = {n for n in top.of if n.startswith("pytest_")} - PRINTS if top else set()
                starts = {(file, n) for n in {NONE, *READ, *hooks}}
                # A module that is imported has its effect.
                starts |= {(path, NONE) for path, _ in self._imports(file, NONE)}
                parts.append(self._closure(starts))
            self._set = digest(parts)
        return self._set

    def _top(self, file: str) -> _Top | None:
        if file not in self._tops:
            path = self.root / file
            package = file.rpartition("/")[0].replace("/", ".")
            self._tops[file] = _Top(path.read_text(), package) if path.is_file() else None
        return self._tops[file]

    def _imports(self, file: str, name: str) -> Iterator[tuple[str, str]]:
        """Of a name, or for NONE of all, that a file imports: a file and a name there."""
        top = self._top(file)
        found = top.imported if top else {}
        for module, what in (v for n, v in found.items() if name in (n, NONE)):
            # A module, or a package; what is imported may be one in it.
            for path, of in ((module, what), (f"{module}/{what}", ALL)):
                yield from ((at, of) for at in (f"{path}.py", f"{path}/__init__.py"))

    def _closure(self, starts: set[tuple[str, str]]) -> str:
        """What these names of files stand for, and all that those name."""
        parts: set[str] = set()
        files: set[str] = set()
        seen: set[tuple[str, str]] = set()
        left = [*starts]
        while left:
            at = left.pop()
            if at in seen:
                continue
            seen.add(at)
            where, name = at
            top = self._top(where)
            if top is None:
                continue
            if where not in files:
                files.add(where)
                for part in top.always:
                    parts.add(f"{where} {part.code}")
                    left += [(where, w) for w in part.words]
            if name == ALL:
                left += [(where, n) for n in top.of]
            for n, part in enumerate(top.of.get(name, ())):
                parts.add(f"{where} {name} {n} {part.code}")
                left += [(where, w) for w in part.words]
            left += self._imports(where, name) if name != NONE else []
            # It may be a fixture, and one of its file may ask for another of its name.
            left += [(file, name) for file in CONFTESTS if name not in (ALL, NONE)]
        return digest(sorted(parts))


def _fixture_names(node: _Definition) -> list[str]:
    """The names that decorators give a fixture, in place of its own."""
    calls = [d for d in node.decorator_list if isinstance(d, ast.Call)]
    return [
        k.value.value
        for call in calls for k in call.keywords
        if k.arg == "name" and isinstance(k.value, ast.Constant) and isinstance(k.value.value, str)
    ]  # fmt: skip


def _bound(node: ast.stmt) -> Iterator[str]:
    """The names that a definition or an assignment gives a meaning."""
    if isinstance(node, _Definition):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            for inner in ast.walk(target):
                if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                    yield inner.id


def _words(node: ast.AST) -> Iterator[str]:
    """What may be a name: of a value, an argument (a fixture), in a text (`usefixtures`)."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            yield inner.id
        elif isinstance(inner, ast.arg):
            yield inner.arg
        elif isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            yield from re.findall(r"\w+", inner.value)
