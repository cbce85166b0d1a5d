"""The published quantizers in plain PyTorch, twice: by the paper's formulas, and as released.

`Paper` follows the text (QuEST, arXiv 2502.05003, section 3; the method's sections 2 to 6) in
float64, with the tie rule that the specification adds: dense Hadamard matrices, one line a formula.
`Released` keeps the arithmetic of the code that came with the paper: its constants, its 1e-8, its
rounding, the input's dtype throughout. It shows what a user of that code has.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from quest.conformance.public.formats import Format

GRIDS = [f"uniform{b}" for b in range(1, 9)]


def sylvester(order: int) -> Tensor:
    """Sylvester's Hadamard matrix, float64 of ±1; order a power of two."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h


def rotate(x: Tensor, block: int) -> Tensor:
    """x H along the last axis, in float64.

    Sums of ±x first and the factor last, so that what cancels is exactly 0.
    """
    y: Tensor = x.double().reshape(-1, block) @ sylvester(block) * block**-0.5
    return y.reshape(x.shape)


class Paper:
    """All of the specification that powers of two allow."""

    capabilities: ClassVar[dict[str, Any]] = {
        "dtypes": ["float32", "bfloat16", "float16"],
        "blocks": [1, 2, 16, 128, 256],
        "grids": [*GRIDS, "ternary", "e2m1", "lloyd_max2", "lloyd_max4"],
        "estimators": ["trust1.0", "trust0.5", "clip1.3", "ste"],
        "sparsities": ["2:4", "pairs4:8"],
        "bits": [1, 2, 4, 8],
        "inputs": ["extremes", "non_finite", "empty", "axes", "layouts"],
        "any_outer": True,
        "bias": True,
        "ties": "up",
        "accumulator": "float64",
        "deterministic": True,
    }

    def hadamard(self, x: Tensor, block: int) -> Tensor:
        """x (..., d) to x H."""
        return rotate(x, block).to(x.dtype)

    hadamard_transpose = hadamard  # H is symmetric

    def scale(self, x: Tensor, block: int) -> Tensor:
        """sigma (..., 1) float32; NaN for a row that is not finite."""
        wide = x.double()
        sigma = wide.square().mean(-1, keepdim=True).sqrt().float()
        return torch.where(wide.isfinite().all(-1, keepdim=True), sigma, torch.nan)

    def _places(self, x: Tensor, format: Format) -> tuple[Tensor, Tensor, Tensor]:
        """(t, keep, sigma): where x_h lies in units of sigma, 0 in rows without one."""
        sigma = self.scale(x, format.block)
        y = rotate(x, format.block)
        t = torch.where(sigma > 0, y / sigma, 0.0)
        keep = torch.ones_like(t, dtype=torch.bool)
        return t, keep if format.sparsity is None else self._largest(t, *format.sparsity), sigma

    def quantize(self, x: Tensor, format: Format) -> tuple[Tensor, Tensor]:
        """(codes (..., d), sigma (..., 1)); pruned entries have the code of 0."""
        t, keep, sigma = self._places(x, format)
        t = torch.where(keep, t, 0.0)
        if format.step is None:
            points = torch.tensor(format.points, dtype=torch.float64)
            codes = torch.searchsorted((points[1:] + points[:-1]) / 2, t.contiguous(), right=True)
            return codes, sigma
        half = format.levels // 2
        if format.levels % 2:
            return (t / format.step + 0.5).floor().clamp(-half, half).to(torch.int64), sigma
        return (t / format.step).floor().clamp(-half, half - 1).to(torch.int64), sigma

    def _points(self, codes: Tensor, format: Format) -> Tensor:
        index = codes if format.step is None else codes + format.levels // 2
        return torch.tensor(format.points, dtype=torch.float64)[index]

    def fake_quantize(self, x: Tensor, format: Format) -> Tensor:
        """The values in the rotated domain, x's dtype."""
        codes, sigma = self.quantize(x, format)
        points = torch.where(self.select(x, format), self._points(codes, format), 0.0)
        return (points * sigma.double()).to(x.dtype)

    def mask(self, x: Tensor, format: Format) -> Tensor:
        """Where the gradient passes, bool (..., d)."""
        codes, _ = self.quantize(x, format)
        t, keep, sigma = self._places(x, format)
        if format.estimator == "ste":
            return torch.ones_like(t, dtype=torch.bool)
        if format.estimator == "clip":
            near = t.abs() <= format.parameter * format.points[-1]
        elif format.parameter >= 1:
            # Inside the grid no entry is farther from its point than half a step; pruned ones are
            # compared with 0.
            outer = keep.double() * format.points[-1]
            near = t.abs() <= outer + format.parameter * format.half_gap
        else:
            distance = (torch.where(keep, self._points(codes, format), 0.0) - t).abs()
            near = distance <= format.parameter * format.half_gap
        return torch.where(sigma > 0, near, sigma == 0)

    def select(self, x: Tensor, format: Format) -> Tensor:
        """Which entries are kept, bool (..., d)."""
        return self._places(x, format)[1]

    @staticmethod
    def _largest(t: Tensor, kind: str, n: int, m: int) -> Tensor:
        unit = 2 if kind == "pairwise" else 1
        groups = t.reshape(*t.shape[:-1], t.shape[-1] // m, m // unit, unit)
        size = groups.square().sum(-1)
        ranked = size.sort(dim=-1, descending=True, stable=True).indices
        keep = torch.zeros_like(size, dtype=torch.bool).scatter(-1, ranked[..., : n // unit], True)
        return keep.unsqueeze(-1).expand(groups.shape).reshape(t.shape)

    def pack(self, codes: Tensor, bits: int) -> Tensor:
        """(..., d) in [0, 2^bits) to bytes, the first code in the lowest bits."""
        per = 8 // bits
        padded = torch.nn.functional.pad(codes.int(), (0, -codes.shape[-1] % per))
        groups = padded.reshape(*padded.shape[:-1], padded.shape[-1] // per, per)
        made: Tensor = (groups << (torch.arange(per) * bits)).sum(-1)
        return made.to(torch.uint8)

    def unpack(self, packed: Tensor, bits: int, width: int) -> Tensor:
        """The inverse of `pack`, for rows of `width` codes."""
        shifted = packed.int().unsqueeze(-1) >> torch.arange(0, 8, bits)
        made: Tensor = (shifted & (2**bits - 1)).flatten(-2)
        return made[..., :width]

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a b^T of int8 (n, k) and (m, k), int32."""
        return (a.double() @ b.double().T).to(torch.int32)

    def scaled_product(self, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
        """a b^T with a scale for each row of a and of b, float32 (n, m)."""
        y = self.product(a, b) * a_scale.double() * b_scale.double().T
        return y.float()

    def linear(
        self, x: Tensor, w: Tensor, bias: Tensor | None, activation: Format, weight: Format
    ) -> Tensor:
        """y = x_hat w_hat^T + b; x (n, in), w (out, in)."""
        x_hat, w_hat = self.fake_quantize(x, activation), self.fake_quantize(w, weight)
        y = x_hat.double() @ w_hat.double().T
        return (y if bias is None else y + bias).to(x.dtype)

    def linear_backward(
        self, x: Tensor, w: Tensor, grad: Tensor, activation: Format, weight: Format
    ) -> tuple[Tensor, Tensor]:
        """dx = ((G w_hat) * M_x) H^T and dw = ((G^T x_hat) * M_w) H^T."""
        x_hat, w_hat = self.fake_quantize(x, activation), self.fake_quantize(w, weight)
        dx = (grad.double() @ w_hat.double()) * self.mask(x, activation)
        dw = (grad.double().T @ x_hat.double()) * self.mask(w, weight)
        return rotate(dx, activation.block).to(x.dtype), rotate(dw, weight.block).to(w.dtype)


# As released; the specification's differ by 2.1e-9 (1 bit) to 3.7e-2 (8 bits).
OUTER = {
    1: 0.7978845587140913, 2: 1.4935346200015913, 3: 2.051068354131873, 4: 2.513930578568423,
    5: 2.9160938834961225, 6: 3.276597282593217, 7: 3.6010497188221655, 8: 3.884938678807525,
}  # fmt: skip


class Released:
    """The arithmetic of the released trust quantizer, in the input's dtype; blocks of 128."""

    capabilities: ClassVar[dict[str, Any]] = {
        "dtypes": ["float32", "bfloat16"],
        "blocks": [128],
        "grids": GRIDS,
        "estimators": ["trust1.0"],
        "ties": "even",
        "deterministic": True,
    }
    departures: ClassVar[list[str]] = [
        "the outermost points are not quite optimal: by 3e-9 of their size at 1 bit, 2e-7 at 3, "
        "3e-6 to 3e-5 at 2, 4 and 5, 4e-4 at 6, 3e-3 at 7 and 1e-2 at 8",
        "1e-8 is added to the scale: a row of zeros has the values -1e-8 / (L - 1) and not 0",
        "ties go to the even edge: x_h = 0 becomes -step/2 and not +step/2",
        "the factor 128^-0.5 is in the matrix: what cancels is not exactly 0",
        "everything is computed in the input's dtype: in bfloat16 the matrix, the rotated row and "
        "the scale are rounded to 8 bits, and codes follow",
        "the mask compares a rounded distance with half a step: interior entries lose their "
        "gradient where rounding pushes them past it",
    ]

    def _rotate(self, x: Tensor, block: int) -> Tensor:
        # Not judged apart: what it adds is in the codes and values.
        matrix = sylvester(block).mul(block**-0.5).to(x.dtype)
        return (x.reshape(-1, block) @ matrix).reshape(x.shape)

    def scale(self, x: Tensor, block: int) -> Tensor:
        """The root mean square of the rotated row."""
        return self._rotate(x, block).square().mean(-1, keepdim=True).sqrt().float()

    def _rounded(self, x: Tensor, format: Format) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x_h, its deviation, index of the upper edge, values)."""
        y = self._rotate(x, format.block)
        deviation = y.square().mean(-1, keepdim=True).sqrt()
        outer = OUTER[format.levels.bit_length() - 1] * deviation + 1e-8
        step = 2 * outer / (format.levels - 1)
        index = torch.round(y.clamp(-outer, outer) / step + 1 / 2)
        return y, deviation, index, index * step - step / 2

    def quantize(self, x: Tensor, format: Format) -> tuple[Tensor, Tensor]:
        """Codes and the deviation that they are scaled with."""
        _, deviation, index, _ = self._rounded(x, format)
        return index.to(torch.int64) - 1, deviation.float()

    def fake_quantize(self, x: Tensor, format: Format) -> Tensor:
        """The values in the rotated domain."""
        return self._rounded(x, format)[3]

    def mask(self, x: Tensor, format: Format) -> Tensor:
        """Where |xq - x_h| is at most half an (unshifted) step."""
        y, deviation, _, values = self._rounded(x, format)
        trust = OUTER[format.levels.bit_length() - 1] / (format.levels - 1)
        return (values - y).abs() <= deviation * trust
