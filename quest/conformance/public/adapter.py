"""Somebody's implementation as a lane: found by name, called with its own arrays, guarded.

An adapter is any class, or object, with `capabilities` and some of the functions of
`capabilities.FUNCTIONS`. It is called twice for each input, with memory that Python code allocates
poisoned by two different bytes; inputs must be left alone, and where determinism is declared both
runs must give the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from quest.conformance.lanes import guarded
from quest.conformance.stages import Outputs
from quest.recipes import Recipe

from . import formats
from .capabilities import FUNCTIONS, AdapterError, Capabilities, check


@dataclass(frozen=True, eq=False)
class Implementation:
    """An adapter with its checked capabilities; quacks like a lane.

    spec: what `--impl` was. missing: why it can't run here, None where it can. unknown: public
    functions of it that nobody calls. raised: classes of what the adapter has raised since this was
    last emptied.
    """

    spec: str
    adapter: Any
    capabilities: Capabilities
    missing: str | None
    departures: tuple[str, ...]
    unknown: tuple[str, ...]
    raised: dict[type[BaseException], None] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return self.spec

    def has(self, function: str) -> bool:
        """Whether the adapter has this function."""
        return callable(getattr(self.adapter, function, None))

    def call(self, function: str, *tensors: Tensor, **static: Any) -> Outputs:
        """What a function makes of the tensors, on the CPU, guarded.

        Raises GuardError, TypeError for an output that is no array, and what the adapter raises.
        """
        return guarded(
            f"{function}",
            self.capabilities.device,
            functools.partial(self._run, function, static),
            tensors,
            poisoned,
            self.capabilities.deterministic,
        )

    def _run(self, function: str, static: dict[str, Any], *tensors: Tensor) -> Outputs:
        arguments, names = _SIGNATURES[function](tensors, static)
        try:
            made = getattr(self.adapter, function)(*(self._theirs(a) for a in arguments))
        except KeyboardInterrupt:
            raise
        except Exception as error:
            self.raised[type(error)] = None
            raise
        except BaseException as error:
            # As of sys.exit and pytest.skip: it must not end the run, nor skip the test.
            self.raised[RuntimeError] = None
            raise RuntimeError(f"{function} ended with {_told(error)}") from error
        if len(names) == 1:
            return {names[0]: _ours(made, f"{function} must return")}
        if isinstance(made, Mapping):
            made = [made.get(n) for n in names]
        if not isinstance(made, tuple | list) or len(made) != len(names):
            got = f"{len(made)} values" if isinstance(made, tuple | list) else type(made).__name__
            raise TypeError(f"{function} must return ({', '.join(names)}), got {got}")
        return {
            n: _ours(m, f"{function} must return {n} as") for n, m in zip(names, made, strict=True)
        }

    def _theirs(self, value: Any) -> Any:
        if isinstance(value, Tensor) and self.capabilities.arrays == "numpy":
            return value.numpy()
        return value


def _ours(value: Any, told: str) -> Tensor:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, Tensor):
        raise TypeError(f"{told} a torch tensor or a NumPy array, got {type(value)}")
    return value


def _formats(static: dict[str, Any], width: int) -> tuple[formats.Format, formats.Format]:
    made: Recipe = static["recipe"]
    return formats.of(made.activation, width), formats.of(made.weight, width)


Call = tuple[tuple[Any, ...], tuple[str, ...]]


def _rotate(t: tuple[Tensor, ...], static: dict[str, Any]) -> Call:
    return (t[0], static["order"]), ("y",)


def _quantizer(*names: str) -> Callable[[tuple[Tensor, ...], dict[str, Any]], Call]:
    return lambda t, static: ((t[0], formats.of(static["q"], t[0].shape[-1])), names)


# The arguments of each function and the names of what it returns.
_SIGNATURES: dict[str, Callable[[tuple[Tensor, ...], dict[str, Any]], Call]] = {
    "hadamard": _rotate,
    "hadamard_transpose": _rotate,
    "scale": lambda t, static: ((t[0], static["order"]), ("scale",)),
    "quantize": _quantizer("codes", "scale"),
    "fake_quantize": _quantizer("values"),
    "mask": _quantizer("mask"),
    "select": _quantizer("keep"),
    "pack": lambda t, static: ((t[0], static["bits"]), ("packed",)),
    "unpack": lambda t, static: ((t[0], static["bits"], static["width"]), ("codes",)),
    "product": lambda t, static: (t, ("accumulators",)),
    "scaled_product": lambda t, static: (t, ("y",)),
    "linear": lambda t, static: (
        (*t[:2], t[2] if len(t) > 2 else None, *_formats(static, t[0].shape[-1])),
        ("y",),
    ),
    "linear_backward": lambda t, static: (
        (*t, *_formats(static, t[0].shape[-1])),
        ("dx", "dw"),
    ),
}


@contextlib.contextmanager
def poisoned(byte: int) -> Iterator[None]:
    """Fill what torch.empty, numpy.empty and their kin allocate with `byte`.

    Only what Python code asks for: memory that compiled code allocates is beyond reach.
    """

    def filling(allocate: Callable[..., Any]) -> Callable[..., Any]:
        def allocated(*arguments: Any, **keywords: Any) -> Any:
            made = allocate(*arguments, **keywords)
            if isinstance(made, np.ndarray):
                if made.dtype != object and made.flags.c_contiguous:
                    made.view(np.uint8).fill(byte) if made.ndim else made.fill(byte)
            elif made.is_contiguous() and made.numel() and not made.is_meta:
                made.detach().view(-1).view(torch.uint8).fill_(byte)
            return made

        return allocated

    with contextlib.ExitStack() as stack:
        for owner, names in ((torch, ("empty", "empty_like")), (Tensor, ("new_empty",)),
                             (np, ("empty", "empty_like"))):  # fmt: skip
            for name in names:
                patch = mock.patch.object(owner, name, filling(getattr(owner, name)))
                stack.enter_context(patch)
        yield


def load(spec: str) -> Implementation:
    """The implementation of "package.module:Adapter"; AdapterError where there is none.

    The module is looked for in the current folder, too. A class is called without arguments. Its
    `capabilities` is a dict, `unavailable` (a function, optional) says why it can't run here,
    `departures` (optional) lists in words where it departs from the specification on purpose.
    """
    path, colon, name = spec.partition(":")
    if not (path and colon and name):
        raise AdapterError(f"--impl must be package.module:Adapter, got {spec!r}")
    target = _member(_module(path, spec), name, spec)
    with _reported(f"--impl {spec}: {name}()"):
        adapter = target() if isinstance(target, type) else target
    capabilities = check(getattr(adapter, "capabilities", None), name)
    public = [n for n in dir(adapter) if not n.startswith("_") and callable(getattr(adapter, n))]
    unknown = tuple(n for n in public if n not in (*FUNCTIONS, "unavailable"))
    if not any(n in FUNCTIONS for n in public):
        raise AdapterError(
            f"--impl {spec}: {name} has none of the functions that are judged: "
            f"{', '.join(FUNCTIONS.values())}"
        )
    departures = getattr(adapter, "departures", ())
    if not isinstance(departures, list | tuple) or not all(isinstance(d, str) for d in departures):
        raise AdapterError(f"{name}.departures must be a list of sentences, got {departures!r}")
    with _reported(f"--impl {spec}: unavailable()"):
        missing = _missing(adapter, capabilities)
    return Implementation(
        spec, adapter, capabilities, missing,
        (*capabilities.departures(), *departures), unknown,
    )  # fmt: skip


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _reported(what: str) -> Iterator[None]:
    """Raise AdapterError for whatever somebody's code raises, sys.exit and pytest.skip too."""
    try:
        yield
    except (KeyboardInterrupt, AdapterError):
        raise
    except BaseException as error:
        raise AdapterError(f"{what} raised {_told(error)}") from error


def _module(path: str, spec: str) -> Any:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    with _reported(f"--impl {spec}: importing {path}"):
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name is None or not (path == error.name or path.startswith(f"{error.name}.")):
                raise
            raise AdapterError(
                f"--impl {spec}: no module {error.name!r} in {here} or where Python looks"
            ) from None


def _member(module: Any, name: str, spec: str) -> Any:
    if not hasattr(module, name):
        there = [n for n in dir(module) if hasattr(getattr(module, n), "capabilities")]
        hint = f"it has {', '.join(there)}" if there else "nothing in it has capabilities"
        raise AdapterError(f"--impl {spec}: {module.__name__} has no {name!r}; {hint}")
    return getattr(module, name)


def _missing(adapter: Any, capabilities: Capabilities) -> str | None:
    unavailable = getattr(adapter, "unavailable", None)
    reason = unavailable() if callable(unavailable) else None
    if reason is None and capabilities.device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    return None if reason is None else str(reason)
