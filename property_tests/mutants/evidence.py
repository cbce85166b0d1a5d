"""What a verdict rests on, as a digest: a verdict of an earlier run holds while this is the same.

A test fails or passes by what its process executes. Of every Python file that is tested this is
the code of the module itself and the functions that any test of the same file of tests calls
(values may be cached between them), as the baseline saw them without a fault; besides, files of
tests and helpers, data, versions, and whether there is a GPU. So

- a kill (a test failed, died or hung) holds while the mutated file, the killing test's file, all
  helpers and those functions are the same. Comments, docstrings and functions that this file of
  tests never calls may change.
- that a mutant survives, or that nothing runs it, is a claim about all tests: it holds while
  nothing at all has changed, in any test or source. So does a kill by an import, by the sums over
  a run, and in the ci profile, whose calls no baseline has seen.
- what NVRTC says of a mutant holds while no CUDA C++, and no Python beside it, has changed.

One thing the baseline can't see: a fault may lead a test through a function that no test of its
file calls otherwise. The whole mutated file is part of the digest, since that is where most of
those are.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import platform
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from .baseline import OURS, has_gpu
from .mutant import ROOT
from .trace import WATCHED

PACKAGES = (
    "torch", "triton", "numpy", "scipy", "pytest", "hypothesis", "cuda-bindings", "cuda-core",
    "nvidia-cuda-nvrtc",
)  # fmt: skip
Calls = Mapping[str, Collection[str]]  # of a file of tests: functions by file


class Outline:
    """A module without the bodies of its functions, and those bodies, as digests.

    functions: by qualified name; functions of one name (`_` of a decorator) share an entry.
    spans: (first line of the body, last, name).
    """

    def __init__(self, source: str) -> None:
        self.spans: list[tuple[int, int, str]] = []
        bodies: dict[str, list[str]] = {}
        tree = ast.parse(source)
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and _is_docstring(body[0]):
                del body[0]

        def hollow(node: ast.AST, scope: str) -> None:
            for child in ast.iter_child_nodes(node):
                name = f"{scope}{getattr(child, 'name', '')}"
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                    if child.body:
                        last = child.end_lineno or child.lineno
                        self.spans.append((child.body[0].lineno, last, name))
                    bodies.setdefault(name, []).append(_dump(child.body))
                    child.body = []
                else:
                    hollow(child, f"{name}." if isinstance(child, ast.ClassDef) else scope)

        hollow(tree, "")
        self.module = _digest([_dump([tree])])
        self.functions = {name: _digest(parts) for name, parts in bodies.items()}

    def called(self, lines: Collection[int]) -> list[str]:
        """Names of functions of which a line was executed."""
        found = {n for first, last, n in self.spans if any(first <= i <= last for i in lines)}
        return sorted(found)

    def digest(self, calls: Collection[str] | None) -> str:
        """Of the module and these functions; of all, for None."""
        names = sorted(self.functions if calls is None else calls)
        return _digest([self.module, *(f"{n} {self.functions.get(n)}" for n in names)])


class Evidence:
    """Digests of the project as it is; `calls` as the baseline has seen them."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.calls: dict[str, dict[str, list[str]]] = {}
        self._data: dict[str, str] = {}
        self.outlines: dict[str, Outline] = {}
        for path in (p for name in WATCHED for p in sorted((root / name).rglob("*"))):
            name = str(path.relative_to(root))
            if path.suffix == ".py":
                self.outlines[name] = Outline(path.read_text())
            elif path.suffix in (".cu", ".cuh", ".json") and path.is_file():
                self._data[name] = _digest([path.read_bytes().hex()])
        tests = sorted((root / "property_tests").glob("*.py"))
        self._tests = {
            f"property_tests/{p.name}": _digest([p.read_bytes().hex()])
            for p in tests if not p.name.startswith(OURS)
        }  # fmt: skip
        settings = [root / "conftest.py", root / "pyproject.toml"]
        replayed = sorted((root / "property_tests").glob("*.json"))
        imported = sorted((root / "benchmarks").glob("*.py"))  # by some tests
        self._besides = [f"{p.name} {p.read_bytes().hex()}" for p in imported]
        self._common = _digest([
            *(f"{p.name} {p.read_bytes().hex()}" for p in (*settings, *replayed) if p.exists()),
            *(f"{n} {d}" for n, d in self._tests.items() if "/test_" not in n),
            *environment(),
        ])  # fmt: skip
        self._keys: dict[tuple[str, ...], str] = {}

    def learn(self, tests: str, lines: Mapping[str, Collection[int]]) -> None:
        """Note which functions a file of tests calls, given the lines that it executes."""
        self._keys.clear()
        self.calls[tests] = {
            file: names for file, of in sorted(lines.items())
            if file in self.outlines and (names := self.outlines[file].called(of))
        }  # fmt: skip

    def key(self, outcome: str, file: str, by: str) -> str:
        """What this outcome of a mutant of `file` rests on; by: the test that killed it."""
        tests = by.partition("::")[0]
        if outcome == "refused":
            return self._once("compiled", "", self._of_binaries)
        if "::" in by and not by.endswith(")") and tests in self.calls and tests in self._tests:
            return self._once(file, tests, lambda: self._of_kill(file, tests))
        return self._once("", "", self._of_all)

    def _once(self, a: str, b: str, make: object) -> str:
        if (a, b) not in self._keys:
            self._keys[a, b] = make()  # type: ignore[operator]
        return self._keys[a, b]

    def _of_kill(self, file: str, tests: str) -> str:
        calls = self.calls[tests]
        parts = [self._common, self._tests[tests], self._data.get(file, "")]
        for name, outline in self.outlines.items():
            parts.append(f"{name} {outline.digest(None if name == file else calls.get(name, ()))}")
        # Binaries are made of all texts, by the one file that compiles.
        compiles = bool(calls.get("kernels/cuda.py"))
        parts += [
            f"{n} {d}" for n, d in self._data.items() if compiles or not n.startswith("kernels/")
        ]
        return _digest(parts)

    def _of_all(self) -> str:
        parts = [f"{n} {o.digest(None)}" for n, o in self.outlines.items()]
        parts += [f"{n} {d}" for n, d in (self._data | self._tests).items()]
        return _digest([self._common, *self._besides, *parts])

    def _of_binaries(self) -> str:
        names = [n for n in self.outlines if n.startswith("kernels/")]
        parts = [f"{n} {self.outlines[n].digest(None)}" for n in names]
        return _digest([*environment(), *parts, *(f"{n} {d}" for n, d in self._data.items())])


@functools.cache
def environment() -> tuple[str, ...]:
    """Versions, and the kind of machine."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return (f"gpu {has_gpu()}", f"python {platform.python_version()}", *found)


def _is_docstring(node: ast.stmt) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _dump(nodes: Iterable[ast.AST]) -> str:
    return "\n".join(ast.dump(n) for n in nodes)


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
