"""How times and benchmarks are written, in the gate's tables and in those of `benchmarks/`."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Three significant digits with a unit."""
    for unit, scale in (("us", 1e-6), ("ms", 1e-3), ("s", 1.0)):
        value = seconds / scale
        if value < 999.5 or unit == "s":
            break
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def short(name: str) -> str:
    """`hadamard[...]` of `benchmarks/bench_hadamard.py::test_hadamard[...]`."""
    return name.rpartition("::")[2].removeprefix("test_")
