"""Torch's own way to the same results, as a user would write it in eager mode.

The rotation is a dense product with the matrix of one block. Torch packs no bits, so codes are
int8 and masks bool; ties in a sparsity group may keep one entry more or less.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from quest import Pairwise, Quantizer, eager, operands, ops

from . import cases


@functools.lru_cache(maxsize=16)
def matrix(order: int, device: str, dtype: torch.dtype) -> Tensor:
    """H of one block, (order, order), normalised; x.view(-1, order) @ H is x H."""
    h: Tensor = ops.hadamard(torch.eye(order), order, False)
    return h.to(device, dtype)


def rotate(x: Tensor, h: Tensor) -> Tensor:
    """x H blockwise for x (..., d)."""
    return (x.view(-1, len(h)) @ h).view(x.shape)


def masked_transpose(grad: Tensor, mask: Tensor, h: Tensor) -> Tensor:
    """(grad * mask) H^T for a bool mask of grad's shape."""
    return rotate(torch.where(mask, grad, 0.0), h.t())


def _keep(y: Tensor, q: Quantizer) -> Tensor | None:
    if q.sparsity is None:
        return None
    n, m = q.sparsity.n, q.sparsity.m
    unit = 2 if isinstance(q.sparsity, Pairwise) else 1
    groups = y.view(-1, m // unit, unit)
    norm = groups.abs().squeeze(-1) if unit == 1 else groups.square().sum(-1)
    larger = (norm.unsqueeze(-2) > norm.unsqueeze(-1)).sum(-1)
    return (larger < n // unit).unsqueeze(-1).expand(groups.shape).reshape(y.shape)


def _rounded(x: Tensor, h: Tensor, q: Quantizer) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(float codes, sigma, mask, keep) of x (rows, d)."""
    grid = q.require_grid()
    y = rotate(x, h)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    sigma = norm / math.sqrt(x.shape[-1])
    if grid.step is None:
        codes = torch.bucketize(y / sigma, eager.table(grid, x.device)[1], right=True)
    else:
        half, odd = grid.levels // 2, grid.levels % 2
        t = y / (sigma * grid.step)
        codes = (t + 0.5 if odd else t).floor().clamp(-half, half if odd else half - 1)
    keep = _keep(y, q)
    mask = y.abs() <= q.thresholds()[0] * sigma
    if keep is not None:
        codes = torch.where(keep, codes, q.require_grid().zero_code)
        mask = torch.where(keep, mask, y.abs() <= q.thresholds()[1] * sigma)
    return codes, sigma, mask, keep


def quantize(x: Tensor, h: Tensor, q: Quantizer) -> tuple[Tensor, ...]:
    """(int8 codes, sigma, bool mask) of x (rows, d), and the kept entries where q is sparse."""
    codes, sigma, mask, keep = _rounded(x, h, q)
    made = codes.to(torch.int8), sigma, mask
    return made if keep is None else (*made, keep)


def fake_quantize(x: Tensor, h: Tensor, q: Quantizer) -> tuple[Tensor, Tensor]:
    """(values in x's dtype, bool mask) of x (rows, d)."""
    grid = q.require_grid()
    codes, sigma, mask, keep = _rounded(x, h, q)
    if grid.step is None:
        points = eager.table(grid, x.device)[0][codes]
    else:
        points = (codes + (0.0 if grid.levels % 2 else 0.5)) * grid.step
    if keep is not None:
        points = torch.where(keep, points, 0.0)
    return (points * sigma).to(x.dtype), mask


def pack_operand(operand: Tensor, form: operands.Form) -> Tensor:
    """(rows, bytes) uint8 of an operand (rows, d) int8; d a multiple of the entries of a byte."""
    # Modulo 256, where a sum that int8 does not hold is what it should be.
    index = (operand.view(torch.uint8) + form.top) // form.stride
    entries = index.view(len(index), -1, 8 // form.bits)
    shifts = torch.arange(0, 8, form.bits, dtype=torch.uint8, device=index.device)
    return (entries << shifts).sum(-1, dtype=torch.uint8)


def decode(operand: Tensor, scale: Tensor, form: operands.Form, width: int) -> Tensor:
    """The values (rows, width) of an operand (rows, bytes) and its scale (rows, 1)."""
    stored = operand
    if form.bits < 8:
        shifts = torch.arange(0, 8, form.bits, dtype=torch.uint8, device=operand.device)
        stored = ((operand.unsqueeze(-1) >> shifts) & (2**form.bits - 1)).flatten(-2)
    integer = stored[:, :width].float() * form.stride - form.top
    return (integer * form.unit * scale).to(cases.DTYPE)
