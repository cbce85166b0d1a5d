"""Variants in which a mutant of CUDA C++ is compared ("identical"): tests compile all that differ.

A macro that no compiled variant sets hides what it guards: a fault there is the same machine code.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from property_tests import test_cuda_texts
from property_tests.mutants.baseline import COMPILES
from property_tests.mutants.child import _Anything
from quest.kernels import cuda, few

Values = dict[tuple[str, str], set[int]]  # of a source and a macro


def _calls(test: Callable[..., None]) -> Iterator[dict[str, Any]]:
    """The arguments of each of a test's cases."""
    marks = [m for m in getattr(test, "pytestmark", ()) if m.name == "parametrize"]
    for case in itertools.product(*(m.args[1] for m in marks)):
        given: dict[str, Any] = {}
        for mark, values in zip(marks, case, strict=True):
            names = mark.args[0]
            several = not isinstance(names, str)
            given |= zip(names, values, strict=True) if several else {names: values}
        assert given.keys() == inspect.signature(test).parameters.keys()
        yield given


def _compiled(monkeypatch: pytest.MonkeyPatch) -> Values:
    """What the tests set macros to that name variants."""
    found: Values = defaultdict(set)

    def compile_(source: str, architecture: str, macros: dict[str, int], **how: Any) -> Any:
        for name, value in macros.items():
            found[source, name].add(value)
        return SimpleNamespace(code=_Anything(b"\x7fELF"))

    monkeypatch.setattr(cuda, "compile_", compile_)
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if path.stem.startswith("test_mutants") or COMPILES not in path.read_text("utf-8"):
            continue
        module = importlib.import_module(f"property_tests.{path.stem}")
        for name, test in inspect.getmembers(module, inspect.isfunction):
            for given in _calls(test) if name.startswith("test_") and COMPILES in name else ():
                try:
                    test(**given)
                except pytest.fail.Exception:  # it wants NVRTC to refuse, which is not asked here
                    assert "with pytest.raises" in inspect.getsource(test)
    return found


def test_all_that_launchers_set_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    found = _compiled(monkeypatch)
    asked: Values = defaultdict(set)
    for variant in test_cuda_texts.VARIANTS:
        for name, value in variant.macros:
            asked[variant.source, name].add(value)
    # The size of a cluster counts in a division and an attribute alone.
    asked["few.cu", "CLUSTER"] = {min(few.CLUSTERS), max(few.CLUSTERS)}
    assert {key: values - found[key] for key, values in asked.items() if values - found[key]} == {}
