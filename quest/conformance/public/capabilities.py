"""What an adapter says it can do. What it does not declare is not covered, and never passed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from quest import estimators, grids, sparsity, transforms
from quest.reference import bounds

ARRAYS = ("torch", "numpy")
DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")
# Orders that everyone is asked about; an adapter may declare others.
BLOCKS = (1, 2, 16, 128, 256, 1024, 12, 20, 28, 40)
GRIDS = (*(f"uniform{b}" for b in range(1, 9)), "ternary", "e2m1", "lloyd_max2", "lloyd_max4")
ESTIMATORS = ("trust1.0", "trust0.5", "clip1.3", "ste")
SPARSITIES = ("2:4", "pairs4:8")
BITS = (1, 2, 4, 8)
# Kinds of inputs beyond finite matrices of moderate size.
INPUTS = {
    "extremes": "tiny, subnormal and huge magnitudes",
    "non_finite": "rows that hold NaN or infinities",
    "empty": "no rows",
    "axes": "vectors, and more than two axes",
    "layouts": "transposed, strided, padded, offset and expanded memory",
}
# Unit roundoff of the sums of products, by what they are kept in.
ACCUMULATORS = {
    "int32": bounds.U32,  # exact; what is made of it afterwards is float32
    "float64": bounds.U32,
    "float32": bounds.U32,
    "tensor-core": 2 * bounds.U32,  # float32 that is cut off and not rounded
}
# How x H is summed: by a butterfly, or as a product with the matrix, which rounds more often.
ROTATIONS = ("butterfly", "product")
TIES = ("up", "down", "even", "away", "zero")
# Public names of an adapter, and what they are given.
FUNCTIONS = {
    "hadamard": "hadamard(x, block)",
    "hadamard_transpose": "hadamard_transpose(x, block)",
    "scale": "scale(x, block)",
    "quantize": "quantize(x, format)",
    "fake_quantize": "fake_quantize(x, format)",
    "mask": "mask(x, format)",
    "select": "select(x, format)",
    "pack": "pack(codes, bits)",
    "unpack": "unpack(packed, bits, width)",
    "product": "product(a, b)",
    "scaled_product": "scaled_product(a, b, a_scale, b_scale)",
    "linear": "linear(x, w, bias, activation, weight)",
    "linear_backward": "linear_backward(x, w, grad, activation, weight)",
}


class AdapterError(ValueError):
    """An adapter can't be judged as it stands; the message says what is wrong with it."""


@dataclass(frozen=True)
class Capabilities:
    """The declarations of an adapter, checked; empty or None means undeclared.

    arrays: what the functions take and give. dtypes, blocks, grids, estimators, sparsities,
    bits (of packing): what they work for. inputs: keys of INPUTS. width_multiple, max_width:
    limits on the last axis. any_outer: grids may have an outermost point other than the optimal
    one. bias: `linear` takes one. rotation: how transforms are summed, for their bounds. ties:
    where a midpoint goes. accumulator: what sums of products are kept in. deterministic: the
    same inputs, the same bits.
    """

    arrays: str = "torch"
    device: str = "cpu"
    dtypes: tuple[str, ...] = ()
    blocks: tuple[int, ...] = ()
    grids: tuple[str, ...] = ()
    estimators: tuple[str, ...] = ()
    sparsities: tuple[str, ...] = ()
    bits: tuple[int, ...] = ()
    inputs: tuple[str, ...] = ()
    width_multiple: int = 1
    max_width: int | None = None
    any_outer: bool = False
    bias: bool = False
    rotation: str = "butterfly"
    ties: str | None = None
    accumulator: str | None = None
    deterministic: bool = False

    @property
    def wide(self) -> bool:
        """Whether sums of products may leave float32's integers."""
        return self.accumulator in ("int32", "float64")

    def sums(self, order: int) -> bounds.Sums:
        """How the sums of a transform are taken."""
        if self.rotation == "butterfly":
            return bounds.BUTTERFLY
        # A dot product in any order, with a matrix that may hold the normalisation.
        return bounds.Sums(roundings=order, last=False)

    def narrow(self, block: int, group: int = 1) -> str | None:
        """Why no row of such blocks and sparsity groups is admitted; None where one is."""
        least = self.least_width(block, group)
        if self.max_width is None or least <= self.max_width:
            return None
        return f"capabilities['max_width'] {self.max_width} is too narrow for block {block}"

    def least_width(self, block: int, group: int = 1) -> int:
        """The least width that the block, the group and `width_multiple` divide."""
        return math.lcm(block, group, self.width_multiple)

    def undeclared(self) -> list[str]:
        """What is not declared, in words."""
        found = [f"{f.name}" for f in fields(self) if getattr(self, f.name) in ((), None, False)]
        found = [n for n in found if n not in ("inputs", "max_width")]
        found += [f"inputs {n} ({told})" for n, told in INPUTS.items() if n not in self.inputs]
        if self.width_multiple != 1:
            found.append(f"widths that {self.width_multiple} does not divide")
        if self.max_width is not None:
            found.append(f"widths above {self.max_width}")
        return found

    def departures(self) -> list[str]:
        """Where the declarations themselves depart from the specification."""
        if self.ties in (None, "up"):
            return []
        return [f"ties go {self.ties!r} as declared; the specification's midpoints go up"]


def _listed(key: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise AdapterError(f"capabilities[{key!r}] must be a list, got {value!r}")
    return tuple(value)


def _known(key: str, values: tuple[Any, ...], allowed: Any) -> tuple[str, ...]:
    for v in values:
        if v not in allowed:
            names = ", ".join(map(str, allowed))
            raise AdapterError(f"capabilities[{key!r}] may hold {names}; got {v!r}")
    return tuple(values)


def _parsed(key: str, values: tuple[Any, ...], parse: Any) -> tuple[Any, ...]:
    for v in values:
        try:
            parse(v)
        except (ValueError, AttributeError, TypeError) as error:
            raise AdapterError(f"capabilities[{key!r}]: {error}") from None
    return values


def _pattern(name: str) -> None:
    if sparsity.parse(name) is None:
        raise ValueError(f"{name!r} is no sparsity; what is not sparse needs no declaration")


def _lists(key: str, value: Any) -> tuple[Any, ...]:
    values = _listed(key, value)
    if key == "dtypes":
        # Of torch, NumPy, or by name.
        names = tuple(str(getattr(v, "__name__", v)).removeprefix("torch.") for v in values)
        return _known(key, names, DTYPES)
    if key == "inputs":
        return _known(key, values, INPUTS)
    if key == "bits":
        return tuple(map(int, _known(key, tuple(map(str, values)), tuple(map(str, BITS)))))
    parse = {
        "blocks": transforms.split,
        "grids": grids.parse,
        "estimators": estimators.parse,
        "sparsities": _pattern,
    }[key]
    return _parsed(key, values, parse)


def _single(key: str, value: Any) -> Any:
    choices: dict[str, Any] = {
        "arrays": ARRAYS, "device": DEVICES, "accumulator": ACCUMULATORS, "ties": TIES,
        "rotation": ROTATIONS,
        "any_outer": (True, False), "bias": (True, False), "deterministic": (True, False),
    }  # fmt: skip
    if key in choices:
        if value not in choices[key]:
            told = ", ".join(map(repr, choices[key]))
            raise AdapterError(f"capabilities[{key!r}] must be one of {told}; got {value!r}")
        return value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AdapterError(f"capabilities[{key!r}] must be a positive integer, got {value!r}")
    return value


def check(declared: Any, name: str) -> Capabilities:
    """The capabilities of a mapping; AdapterError for unknown keys and values."""
    if not isinstance(declared, Mapping):
        told = "has no capabilities" if declared is None else f"has capabilities {declared!r}"
        raise AdapterError(f"{name} {told}: a dict is needed, at least {{'dtypes': ['float32']}}")
    known = {f.name: f for f in fields(Capabilities)}
    made: dict[str, Any] = {}
    for key, value in declared.items():
        if key not in known:
            raise AdapterError(
                f"{name}.capabilities has the key {key!r}; allowed are {', '.join(known)}"
            )
        made[key] = _lists(key, value) if known[key].default == () else _single(key, value)
    found = Capabilities(**made)
    if found.arrays == "numpy" and found.device != "cpu":
        raise AdapterError(f"{name}: NumPy arrays are on the CPU, got device {found.device!r}")
    if found.arrays == "numpy" and "bfloat16" in found.dtypes:
        raise AdapterError(f"{name}: NumPy has no bfloat16; take it from capabilities['dtypes']")
    return found
