"""From production objects to the oracle's arguments, and from tensors to float64 arrays."""

from __future__ import annotations

from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch

from quest.estimators import STE, Clip
from quest.grids import Grid
from quest.quantizer import Quantizer
from quest.reference import grids as reference_grids
from quest.reference.linear import Operand
from quest.sparsity import Pairwise

Array = npt.NDArray[Any]


class Arguments(TypedDict):
    """Keyword arguments of `quest.reference.quantize.quantize`, but for x."""

    grid: reference_grids.Grid
    block: int
    estimator: str
    parameter: float
    sparsity: tuple[str, int, int] | None


def lift(t: torch.Tensor) -> Array:
    """A tensor's values as float64 (floats), int64 (integers) or bool; exact."""
    t = t.detach().cpu()
    if t.dtype == torch.bool:
        return t.numpy()
    if t.dtype.is_floating_point:
        return t.double().numpy()
    return t.to(torch.int64).numpy()


def dtype_name(dtype: torch.dtype) -> str:
    """float32, bfloat16 or float16, as `quest.reference.bounds` calls them."""
    return str(dtype).removeprefix("torch.")


def grid(g: Grid) -> reference_grids.Grid:
    """The oracle's own grid of that name: its constants, not the literals under test."""
    kind, _, tail = g.name.partition(":")
    alpha = float(tail) if tail else None
    if kind.startswith("uniform"):
        return reference_grids.uniform(2 ** int(kind.removeprefix("uniform")), alpha)
    if kind == "ternary":
        return reference_grids.uniform(3, alpha)
    if kind == "e2m1":
        return reference_grids.e2m1(alpha)
    return reference_grids.lloyd_max(2 ** int(kind.removeprefix("lloyd_max")))


def estimator(q: Quantizer) -> tuple[str, float]:
    """(name, parameter) of a quantizer's estimator."""
    if isinstance(q.estimator, STE):
        return "ste", 1.0
    return ("clip" if isinstance(q.estimator, Clip) else "trust"), float(q.estimator.scale)


def pattern(q: Quantizer) -> tuple[str, int, int] | None:
    """The oracle's name of a quantizer's sparsity."""
    s = q.sparsity
    return None if s is None else ("pairwise" if isinstance(s, Pairwise) else "nm", s.n, s.m)


def arguments(q: Quantizer, width: int) -> Arguments:
    """What the oracle's `quantize` takes for this quantizer on rows of `width`."""
    kind, parameter = estimator(q)
    return {
        "grid": grid(q.require_grid()),
        "block": q.transform.order(width),
        "estimator": kind,
        "parameter": parameter,
        "sparsity": pattern(q),
    }


def operand(q: Quantizer, width: int) -> Operand:
    """The oracle's operand of a linear layer."""
    kind, parameter = estimator(q)
    return Operand(
        grid=None if q.grid is None else grid(q.grid),
        block=q.transform.order(width),
        estimator=kind,
        parameter=parameter,
        sparsity=pattern(q),
    )


def rows(a: Array) -> Array:
    """(..., d) as (rows, d), also where there are no elements."""
    n = int(np.prod(a.shape[:-1]))
    return a.reshape(n, a.shape[-1])
