"""The quantizer: a grid, a transform, a gradient estimator and a sparsity pattern, composed.

Source: method, sections 1 to 6; QuEST (arXiv 2502.05003), Algorithm 1.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch

from . import eager, estimators, grids, ops, packing, sparsity, transforms
from .estimators import STE, Clip, Estimator, Trust
from .grids import Grid
from .sparsity import NM, Pairwise, Sparsity
from .transforms import Hadamard, Identity, Transform

FARTHEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Quantizer:
    """Rounds rows to a grid in the rotated domain, with an estimator for the gradient.

    grid: `quest.grids.uniform(bits=4)` and the like; None rotates without rounding.
    transform: `quest.Hadamard(block)` or `quest.Identity()`. estimator: `quest.Trust(scale)`,
    `quest.Clip(scale)` or `quest.STE()`. sparsity: `quest.NM(2, 4)`, `quest.Pairwise(4, 8)`, None.

    Calling it gives the values, differentiable; `quantize` the codes; `pack` the codes in bytes.
    """

    grid: Grid | None
    transform: Transform = field(default_factory=Hadamard)
    estimator: Estimator = field(default_factory=Trust)
    sparsity: Sparsity | None = None
    spec: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, kinds in (
            ("grid", (Grid, type(None))),
            ("transform", (Identity, Hadamard)),
            ("estimator", (STE, Clip, Trust)),
            ("sparsity", (NM, Pairwise, type(None))),
        ):
            value = getattr(self, name)
            if not isinstance(value, kinds):
                allowed = ", ".join("None" if k is type(None) else k.__name__ for k in kinds)
                raise TypeError(f"{name} must be one of {allowed}, got {value!r}")
        if self.grid is None and self.sparsity is not None:
            raise ValueError("sparsity needs a grid, got grid=None")
        if self.grid is not None and grids.parse(self.grid.name) != self.grid:
            raise ValueError(
                f"grid {self.grid.name!r} does not have the points of that name: make grids with "
                "quest.grids.uniform, ternary, e2m1 and lloyd_max"
            )
        # One string says it all: operators carry it, `parse` reads it.
        parts = (
            "none" if self.grid is None else str(self.grid),
            str(self.transform),
            str(self.estimator),
            "dense" if self.sparsity is None else str(self.sparsity),
        )
        object.__setattr__(self, "spec", "/".join(parts))

    @property
    def code_dtype(self) -> torch.dtype:
        """int8; uint8 for tables whose index does not fit it (more than 128 levels)."""
        wide = self.grid is not None and self.grid.step is None and self.grid.levels > 128
        return torch.uint8 if wide else torch.int8

    def require_grid(self) -> Grid:
        """The grid; ValueError where there is none."""
        if self.grid is None:
            raise ValueError("this quantizer has grid=None: it rotates and has no codes")
        return self.grid

    def thresholds(self) -> tuple[float, float, bool]:
        """(threshold, threshold of pruned entries, edge) of the mask, in units of sigma.

        edge: compare |x_h| with the threshold, else |Q(x_h) - x_h|. Trust(s >= 1) trusts all that
        lies inside the grid, so only the outer edge counts; written as a distance, rounding would
        mask entries at the cells' edges (method, section 4). At most float32's largest number: no
        entry of a row reaches that many sigma, and infinity times a sigma of 0 would be NaN.
        """
        grid = self.require_grid()
        if isinstance(self.estimator, Clip):
            c = min(self.estimator.scale * grid.outer, FARTHEST)
            return c, c, True
        if isinstance(self.estimator, Trust):
            t = min(self.estimator.scale * grid.half_gap, FARTHEST)
            return (grid.outer + t, t, True) if self.estimator.scale >= 1 else (t, t, False)
        return 0.0, 0.0, True

    def check(self, x: torch.Tensor) -> None:
        """Raise TypeError or ValueError where x can't be quantized; the message says why."""
        ops.check_input(x)
        d = x.shape[-1]
        self.transform.order(d)
        if self.sparsity is not None and d % self.sparsity.m:
            raise ValueError(
                f"width {d} is not divisible by the group of {self.sparsity.m} of sparsity "
                f"{self.sparsity}"
            )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., d) float32, bfloat16 or float16 to its quantized values in the rotated domain.

        Same shape and dtype. The gradient is (g * mask) H^T; none flows through the scale.
        """
        self.check(x)
        if self.grid is None:
            return self.transform.apply(x)
        ops.check_tangents(x)
        values: torch.Tensor = ops.fake_quantize(x, self.spec)[0]
        return values

    def quantize(self, x: torch.Tensor) -> Quantized:
        """The codes, scale and mask of x (..., d); `dequantize` gives what calling gives."""
        self.check(x)
        self.require_grid()
        # Codes are constants: nothing made of them may ask for a gradient later.
        codes, scale, mask, keep = ops.quantize(x.detach(), self.spec, False)
        return Quantized(self, x.dtype, codes, scale, mask, keep if self.sparsity else None)

    def pack(self, x: torch.Tensor) -> Packed:
        """Like `quantize`, with codes, mask and keep packed into bytes, in one pass."""
        self.check(x)
        self.require_grid()
        codes, scale, mask, keep = ops.quantize(x.detach(), self.spec, True)
        keep_or_none = keep if self.sparsity else None
        return Packed(self, x.dtype, x.shape[-1], codes, scale, mask, keep_or_none)

    def __str__(self) -> str:
        return self.spec


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized tensor (..., d) in the rotated domain.

    codes: (..., d) int8. Uniform grids of even L: in [-L/2, L/2 - 1], the point (code + 1/2) step;
    of odd L: in [-(L-1)/2, (L-1)/2], the point code * step; tables: the index from 0 (uint8 where
    L > 128). scale: (..., 1) float32, sigma. mask: (..., d) bool, where the gradient passes.
    keep: (..., d) bool, False where pruned; None without sparsity.
    """

    quantizer: Quantizer
    dtype: torch.dtype
    codes: torch.Tensor
    scale: torch.Tensor
    mask: torch.Tensor
    keep: torch.Tensor | None

    def dequantize(self) -> torch.Tensor:
        """(..., d) values in the input's dtype, bit for bit those of calling the quantizer."""
        points = eager.points(self.codes, self.quantizer.require_grid())
        if self.keep is not None:
            points = torch.where(self.keep, points, 0.0)
        return (points * self.scale).to(self.dtype)


@dataclass(frozen=True, eq=False)
class Packed:
    """A quantized tensor in bytes; see `quest.packing` for the layout.

    codes: (..., ceil(width bits / 8)) uint8, bits = the grid's storage_bits, codes counted from 0.
    mask, keep: (..., ceil(width / 8)) uint8. scale: (..., 1) float32.
    """

    quantizer: Quantizer
    dtype: torch.dtype
    width: int
    codes: torch.Tensor
    scale: torch.Tensor
    mask: torch.Tensor
    keep: torch.Tensor | None

    def unpack(self) -> Quantized:
        """The same tensor with one element a code."""
        grid = self.quantizer.require_grid()
        unsigned = packing.unpack(self.codes, grid.storage_bits, self.width)
        codes = (unsigned.to(torch.int16) - grid.offset).to(self.quantizer.code_dtype)
        mask = packing.unpack(self.mask, 1, self.width).bool()
        keep = None if self.keep is None else packing.unpack(self.keep, 1, self.width).bool()
        return Quantized(self.quantizer, self.dtype, codes, self.scale, mask, keep)


@functools.lru_cache(maxsize=256)
def parse(spec: str) -> Quantizer:
    """The quantizer of a `spec` string, like uniform4/hadamard128/trust1.0/dense."""
    parts = spec.split("/")
    if len(parts) != 4:
        raise ValueError(f"spec must be grid/transform/estimator/sparsity, got {spec!r}")
    return Quantizer(
        None if parts[0] == "none" else grids.parse(parts[0]),
        transforms.parse(parts[1]),
        estimators.parse(parts[2]),
        sparsity.parse(parts[3]),
    )
