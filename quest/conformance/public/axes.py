"""Which parameters a property has, and which of them an implementation covers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quest import estimators

from .adapter import Implementation
from .capabilities import FUNCTIONS, Capabilities

# The capability that declares the values of an axis.
DECLARES = {
    "dtype": "dtypes",
    "block": "blocks",
    "grid": "grids",
    "tied": "grids",
    "trust": "estimators",
    "estimator": "estimators",
    "clip": "estimators",
    "pattern": "sparsities",
    "bits": "bits",
    "family": "inputs",
}

# Of these an adapter may declare values that not everyone is asked about.
OPEN = ("block", "grid", "estimator", "clip", "pattern")


def values(axis: str, asked: tuple[Any, ...], capabilities: Capabilities) -> tuple[Any, ...]:
    """What everyone is asked about, and then what is declared beyond it."""
    declared = getattr(capabilities, DECLARES[axis]) if axis in DECLARES else ()
    if axis == "clip":
        declared = tuple(v for v in declared if isinstance(estimators.parse(v), estimators.Clip))
    beyond = tuple(v for v in declared if v not in asked) if axis in OPEN else ()
    return (*asked, *beyond)


def uncovered(
    impl: Implementation,
    functions: tuple[str, ...],
    declares: tuple[str, ...],
    params: Mapping[str, Any],
) -> str | None:
    """Why a property with these parameters is not covered; None where it is.

    functions: those that it needs. declares: further capabilities that it needs.
    """
    if impl.missing is not None:
        return impl.missing
    for function in functions:
        if not impl.has(function):
            return f"no function {FUNCTIONS[function]}"
    for name in declares:
        if not getattr(impl.capabilities, name):
            return f"capabilities declare no {name}"
    for axis, value in params.items():
        if value not in getattr(impl.capabilities, DECLARES[axis]):
            return f"capabilities[{DECLARES[axis]!r}] lacks {value}"
    return impl.capabilities.narrow(params["block"]) if "block" in params else None
