"""Inputs that find bugs: distributions, special rows and memory layouts, from a seed.

Arrays are drawn from a generator and not element by element, so that they hold many values; what
Hypothesis shrinks is the shape, the seed and the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def _gaussian(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def _heavy(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    # Student's t with 2 degrees of freedom: no variance.
    chi = -2 * torch.rand(shape, generator=g, dtype=torch.float64).clamp_min(1e-12).log()
    return _gaussian(shape, g) / (chi / 2).sqrt()


def _outlier(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    x = _gaussian(shape, g)
    at = torch.randint(shape[-1], (*shape[:-1], 1), generator=g)
    return x.scatter(-1, at, x.gather(-1, at) * 1e4)


def _equal(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    # Seven significant bits: sums of 2^17 of them are exact in float32, in every order.
    row = (torch.randint(64, 128, (*shape[:-1], 1), generator=g) / 64).double()
    return row.expand(shape).clone()


def _alternating(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    sign = 1 - 2 * (torch.arange(shape[-1]) % 2)
    return _equal(shape, g) * sign


def _one_hot(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    at = torch.randint(shape[-1], (*shape[:-1], 1), generator=g)
    return torch.zeros(shape, dtype=torch.float64).scatter(-1, at, 1.5)


def _integers(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    # Small integers: rotations are exact and hit zero and each other often.
    return torch.randint(-3, 4, shape, generator=g).double()


def _tiny(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return _gaussian(shape, g) * 2.0**-120


def _subnormal(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return _gaussian(shape, g) * 2.0**-140


def _huge(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return _gaussian(shape, g) * 2.0**122


def _mixed_rows(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    # Each row its own magnitude, some of them zeros.
    power = torch.randint(-60, 61, (*shape[:-1], 1), generator=g).double()
    zero = torch.rand((*shape[:-1], 1), generator=g) < 0.3
    return torch.where(zero, 0.0, _gaussian(shape, g) * 2.0**power)


def _zeros(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _negative_zeros(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    # The first half of each row, so that whole blocks of a transform hold nothing else.
    x = _gaussian(shape, g)
    x[..., : shape[-1] // 2] = -0.0
    return x


def _non_finite(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    x = _gaussian(shape, g)
    bad = torch.tensor([float("nan"), float("inf"), float("-inf")], dtype=torch.float64)
    which = torch.randint(3, (*shape[:-1], 1), generator=g)
    at = torch.randint(shape[-1], (*shape[:-1], 1), generator=g)
    hit = torch.rand((*shape[:-1], 1), generator=g) < 0.5
    return torch.where(hit, x.scatter(-1, at, bad[which]), x)


DISTRIBUTIONS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "gaussian": _gaussian,
    "heavy": _heavy,
    "outlier": _outlier,
    "equal": _equal,
    "alternating": _alternating,
    "one_hot": _one_hot,
    "integers": _integers,
    "tiny": _tiny,
    "subnormal": _subnormal,
    "huge": _huge,
    "mixed_rows": _mixed_rows,
    "zeros": _zeros,
    "negative_zeros": _negative_zeros,
    "non_finite": _non_finite,
}
LAYOUTS = ("contiguous", "transposed", "offset", "padded", "strided", "expanded")
MARGIN = 3  # elements; odd, so that what comes behind is aligned for one element and no more


def draw(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """A contiguous CPU tensor of a distribution; values beyond the dtype's range are clamped."""
    g = torch.Generator().manual_seed(seed)
    if 0 in shape:
        return torch.zeros(shape, dtype=dtype)
    x = DISTRIBUTIONS[name](shape, g)
    largest = torch.finfo(dtype).max
    return torch.where(x.isfinite(), x.clamp(-largest, largest), x).to(dtype)


INTEGERS = ("one_hot", "random", "lowest", "highest", "coherent")


def integers(kind: str, rows: int, width: int, seed: int) -> Tensor:
    """(rows, width) int8 for products; "lowest" and "highest" have the sums that grow fastest.

    "coherent" ones grow nearly as fast, and are of unlike terms: what sums of equal terms hide,
    since floats add those exactly in any order, they show.
    """
    g = torch.Generator().manual_seed(seed)
    if kind == "random":
        return torch.randint(-127, 128, (rows, width), generator=g).to(torch.int8)
    if kind == "coherent":
        return torch.randint(64, 128, (rows, width), generator=g).to(torch.int8)
    if kind == "one_hot":
        at = torch.randint(width, (rows, 1), generator=g)
        return torch.zeros(rows, width, dtype=torch.int8).scatter(-1, at, 1)
    if kind not in INTEGERS:
        raise ValueError(f"kind must be one of {INTEGERS}, got {kind!r}")
    return torch.full((rows, width), -128 if kind == "lowest" else 127, dtype=torch.int8)


def unsigned(bits: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Integers in [0, 2^bits), uint8: codes to be packed."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, shape, generator=g).to(torch.uint8)


def edit(x: Tensor, edits: Sequence[tuple[int, float]]) -> Tensor:
    """x (contiguous) with some entries replaced: (flat index modulo its size, value)."""
    if not edits or not x.numel():
        return x
    x = x.clone()
    for index, value in edits:
        x.view(-1)[index % x.numel()] = value
    return x


def all_patterns(dtype: torch.dtype, width: int) -> Tensor:
    """Every bit pattern of a 16-bit float, (2**16 / width, width), NaN and infinities included."""
    if dtype.itemsize != 2:
        raise ValueError(f"dtype must have 16 bits, got {dtype}")
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(-1, width)


def equal_rows(x: Tensor) -> Tensor:
    """x with its first row in the place of every row: what the layout "expanded" can hold."""
    return x[(slice(1),) * (x.ndim - 1)].expand_as(x).contiguous()


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of x (contiguous) in another memory layout; gaps and margins hold NaN.

    "expanded" has stride 0 along the leading axes, and along the last where a row is one value (the
    gradient of a sum has both); ValueError where rows differ, see `equal_rows`.
    """
    nan = float("nan")
    if layout == "contiguous":
        return x
    if layout == "expanded":
        row = x[(slice(1),) * (x.ndim - 1)]
        if not _same_bits(row.expand_as(x), x):
            raise ValueError("x must have equal rows to be expanded, got rows that differ")
        one = row[..., :1]
        one = one if x.numel() and _same_bits(one.expand_as(row), row) else row
        return lay_out(one, "offset").expand_as(x)
    if layout == "offset":
        storage = x.new_full((MARGIN + x.numel() + MARGIN,), nan)
        out = storage[MARGIN:-MARGIN].view(x.shape)
    elif layout == "padded":
        out = x.new_full((*x.shape[:-1], x.shape[-1] + 5), nan)[..., : x.shape[-1]]
    elif layout == "strided":
        out = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), nan)[..., ::2]
    elif layout == "transposed":
        out = x.new_full(tuple(reversed(x.shape)), nan).permute(*reversed(range(x.ndim)))
    else:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    return out.copy_(x)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # NaN is itself here, and 0 is not -0.
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
