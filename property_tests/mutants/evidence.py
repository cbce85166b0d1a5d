"""What a verdict rests on, as a digest: a verdict of an earlier run holds while this is the same.

A test fails or passes by what its process executes. Of every Python file that is tested, and of
which that process executes anything, this is the code of the module itself and the functions that
any test of the same file of tests calls (values may be cached between them), as the baseline saw
them without a fault; besides, files of tests and helpers, settings and data. So

- a kill (a test failed, died or hung) holds while the mutated file, the killing test's file, the
  helpers that it names and those modules and functions are the same. Comments, docstrings,
  functions that this file of tests never calls and modules that it never imports may change;
  comments and docstrings of tests and helpers, too. Of CUDA C++, a fault in a text rests on those
  that are compiled into one binary with it; a fault in Python, where a test compiles any, on all.
- that a mutant survives, or that nothing runs it, is a claim about all tests: it holds while
  nothing at all has changed, in any test or source. So does a kill by an import, by the sums over
  a run, and in the ci profile, whose calls no baseline has seen.
- that NVRTC refuses a mutant holds while its texts, and all Python beside them, are the same; that
  the variants are what they were, which tests with `compiles_without_a_gpu` in their names compile,
  while nothing has changed on which a kill by any file of such tests would rest.

The stack (device and versions) is no part of it: a verdict says on which stack it was reached.
Digests are the same under every version of Python.

One thing the baseline can't see: a fault may lead a test through a function that no test of its
file calls otherwise. The whole mutated file is part of the digest, since that is where most of
those are.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from . import covered
from .baseline import COMPILES
from .covered import digest as _digest
from .cuda_source import is_cuda, together
from .mutant import ROOT

# Tests that start processes of which nothing is seen: the gate's, in worktrees.
UNSEEN = frozenset({"property_tests/test_gate_runs.py"})
Calls = dict[str, dict[str, list[str]]]  # by file of tests and file, if executed at all: functions


class Outline:
    """A module without the bodies of its functions, and those bodies, as digests.

    functions: by qualified name; functions of one name (`_` of a decorator) share an entry.
    heads: the same functions without their bodies. spans: (first line of the body, last, name);
    wholes: the same from the first decorator on.
    """

    def __init__(self, source: str) -> None:
        self.spans: list[tuple[int, int, str]] = []
        self.wholes: list[tuple[int, int, str]] = []
        bodies: dict[str, list[str]] = {}
        heads: dict[str, list[str]] = {}
        tree = without_docstrings(source)

        def hollow(node: ast.AST, scope: str) -> None:
            for child in ast.iter_child_nodes(node):
                name = f"{scope}{getattr(child, 'name', '')}"
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                    last = child.end_lineno or child.lineno
                    first = min([child.lineno, *(d.lineno for d in child.decorator_list)])
                    self.wholes.append((first, last, name))
                    if child.body:
                        self.spans.append((child.body[0].lineno, last, name))
                    bodies.setdefault(name, []).append(dump(child.body))
                    child.body = []
                    heads.setdefault(name, []).append(dump(child))
                else:
                    hollow(child, f"{name}." if isinstance(child, ast.ClassDef) else scope)

        hollow(tree, "")
        self.module = _digest([dump(tree)])
        self.functions = {name: _digest(parts) for name, parts in bodies.items()}
        self.heads = {name: _digest(parts) for name, parts in heads.items()}

    def called(self, lines: Collection[int]) -> list[str]:
        """Names of functions of which a line was executed."""
        found = {n for first, last, n in self.spans if any(first <= i <= last for i in lines)}
        return sorted(found)

    def digest(self, calls: Collection[str] | None) -> str:
        """Of the module and these functions; of all, for None."""
        names = sorted(self.functions if calls is None else calls)
        return _digest([self.module, *(f"{n} {self.functions.get(n)}" for n in names)])


class Evidence:
    """Digests of the project as it is; `calls` by stack, as its baseline has seen them."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.calls: dict[str, Calls] = {}
        self._data: dict[str, str] = {}
        self.outlines: dict[str, Outline] = {}
        for path in covered.sources(root):
            name = str(path.relative_to(root))
            if path.suffix == ".py":
                self.outlines[name] = Outline(path.read_text())
            else:
                self._data[name] = covered.of_files(root, [path])
        self._tests = {str(p.relative_to(root)): p for p in covered.tests(root)}
        self._keys: dict[tuple[str, ...], str] = {}

    def called(self, lines: Mapping[str, Collection[int]]) -> dict[str, list[str]]:
        """The functions of each file that is executed at all, by the lines that are."""
        return {
            file: self.outlines[file].called(ran) for file, ran in sorted(lines.items())
            if file in self.outlines and ran
        }  # fmt: skip

    def learn(self, tests: str, calls: Mapping[str, list[str]], stack: str) -> None:
        """Note which functions a file of tests calls on a stack."""
        self._keys.clear()
        self.calls.setdefault(stack, {})[tests] = dict(calls)

    def key(self, outcome: str, file: str, by: str, stack: str) -> str:
        """What this outcome of a mutant of `file` rests on; by: the test that killed it."""
        tests = by.partition("::")[0]
        if tests in UNSEEN:
            return self._once("", "", "", self._of_all)
        if outcome == "refused":
            return self._once("compiled", file, "", lambda: self._of_binaries(file))
        if outcome == "identical":
            return self._once("variants", file, stack, lambda: self._of_variants(file, stack))
        calls = self.calls.get(stack, {}).get(tests)
        if "::" in by and not by.endswith(")") and calls is not None and tests in self._tests:
            return self._once(file, tests, stack, lambda: self._of_kill(file, tests, calls))
        return self._once("", "", "", self._of_all)

    def _once(self, a: str, b: str, c: str, make: Callable[[], str]) -> str:
        if (a, b, c) not in self._keys:
            self._keys[a, b, c] = make()
        return self._keys[a, b, c]

    def _beside(self, tests: str = "") -> str:
        path = self._tests[tests] if tests else None
        return self._once(
            "beside",
            tests,
            "",
            lambda: _digest(map(self._of_file, covered.beside(self.root, path))),
        )

    def _of_file(self, path: Path) -> str:
        name = str(path.relative_to(self.root))
        if path.suffix != ".py":
            return covered.of_files(self.root, [path])
        return self._once(
            "file", name, "", lambda: f"{name} {Outline(path.read_text()).digest(None)}"
        )

    def _of_kill(self, file: str, tests: str, calls: Mapping[str, Collection[str]]) -> str:
        parts = [self._beside(tests), self._data.get(file, "")]
        for name, outline in self.outlines.items():
            if name == file or name in calls:
                parts.append(f"{name} {outline.digest(None if name == file else calls[name])}")
        # Binaries are made of the texts by the one file that compiles.
        return _digest([*parts, *self._of_data(file, bool(calls.get("kernels/cuda.py")))])

    def _of_data(self, file: str, compiles: bool = True) -> Iterator[str]:
        """Data, and texts where tests compile them: of a text those in its binaries, else all."""
        texts = {n for n in self._data if n.startswith("kernels/")}
        wanted = set(together(file, self.root)) if is_cuda(file) else texts
        for name, digest in self._data.items():
            if name not in texts or (compiles and name in wanted):
                yield f"{name} {digest}"

    def _of_variants(self, file: str, stack: str) -> str:
        compile_ = [n for n, p in self._tests.items() if COMPILES in p.read_text()]
        calls = self.calls.get(stack, {})
        if not compile_ or not all(name in calls for name in compile_):
            return self._of_all()
        return _digest(self._of_kill(file, name, calls[name]) for name in compile_)

    def _of_all(self) -> str:
        parts = [f"{n} {o.digest(None)}" for n, o in self.outlines.items()]
        return _digest([self._beside(), *parts, *(f"{n} {d}" for n, d in self._data.items())])

    def _of_binaries(self, file: str) -> str:
        names = [n for n in self.outlines if n.startswith("kernels/")]
        parts = [f"{n} {self.outlines[n].digest(None)}" for n in names]
        return _digest([*parts, *self._of_data(file)])


def without_docstrings(source: str) -> ast.Module:
    """The syntax tree of a module."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            del body[0]
    return tree


def _is_docstring(node: ast.stmt) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def dump(node: object) -> str:
    """A syntax tree as text.

    `ast.dump` prints other empty fields in each version of Python, and each cuts the constant parts
    of an f-string in another way.
    """
    if isinstance(node, list):
        return f"[{', '.join(map(dump, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [f"{n}={dump(v)}" for n, v in ast.iter_fields(node) if v is not None and v != []]
    if isinstance(node, ast.JoinedStr):
        fields = [f"values={dump(_joined(node.values))}"]
    return f"{type(node).__name__}({', '.join(fields)})"


def _joined(parts: list[ast.expr]) -> list[ast.expr]:
    """The parts of an f-string: one constant between two that are none, and no empty one."""
    made: list[ast.expr] = []
    for part in parts:
        before = made[-1] if made else None
        if isinstance(part, ast.Constant) and isinstance(before, ast.Constant):
            made[-1] = ast.Constant(before.value + part.value)
        elif not (isinstance(part, ast.Constant) and part.value == ""):
            made.append(part)
    return made
