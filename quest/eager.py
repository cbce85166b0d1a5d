"""Every operator in plain PyTorch: the implementation on the CPU, and a check on any device.

The arithmetic is that of the kernels (`quest.kernels.quantize` has the formulas): float32 whatever
the input dtype, rows brought to [1, 2) by a power of two, the Hadamard transform as a butterfly.
A matrix product would be shorter, but a dot product of 128 terms has a bound 13 times that of seven
additions, too wide to judge 8-bit codes by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import operands, packing, transforms
from .estimators import STE
from .sparsity import NM, Pairwise

if TYPE_CHECKING:
    from .grids import Grid
    from .quantizer import Quantizer

FLOAT32_MAX = torch.finfo(torch.float32).max


def _rotate(x: torch.Tensor, order: int, transpose: bool) -> torch.Tensor:
    """x H or x H^T for float32 x; a new tensor."""
    m, power = transforms.split(order)
    y, half = x, 1
    while half < power:
        y = y.reshape(-1, 2, half)
        out = torch.empty_like(y)
        torch.add(y[:, 0], y[:, 1], out=out[:, 0])
        torch.sub(y[:, 0], y[:, 1], out=out[:, 1])
        y, half = out, 2 * half
    base = transforms.base(m, x.device)
    if base is not None:
        # Row-vector convention: x kron(base, S) multiplies each block, (m, power), by base^T. Term
        # by term: a matrix product would follow autocast and the precision set for products.
        blocks, signs = y.reshape(-1, m, power), base if transpose else base.t()
        y = torch.zeros_like(blocks)
        for j in range(m):
            y += signs[:, j, None] * blocks[:, j, None, :]
    normalised: torch.Tensor = y * order**-0.5
    return normalised.reshape(x.shape)


def _powers(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(2^-e, 2^e, |largest| as bits) of each row of float32 x (..., d); x 2^-e is below 2."""
    # Integer comparison of bit patterns sees NaN and infinity.
    top = x.view(torch.int32).bitwise_and(0x7FFFFFFF).amax(-1, keepdim=True)
    field = (top >> 23).clamp(1, 253)
    return ((254 - field) << 23).view(torch.float32), (field << 23).view(torch.float32), top


def _transform(x: torch.Tensor, order: int, transpose: bool) -> torch.Tensor:
    """x H or x H^T for float32 x of any magnitude: each block's sums are taken near 1."""
    # The result is laid out as its operator says, whatever x is.
    blocks = x.contiguous().view(-1, order)
    down, up, _ = _powers(blocks)
    return (_rotate(blocks * down, order, transpose) * up).reshape(x.shape)


def hadamard(x: torch.Tensor, order: int, transpose: bool) -> torch.Tensor:
    """x H, or x H^T, in float32; x (..., d) and the result have the same dtype."""
    return _transform(x.float(), order, transpose).to(x.dtype)


def masked_transpose(
    grad: torch.Tensor, mask: torch.Tensor, order: int, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """(grad * mask) H^T for grad (..., d) and packed mask bits (..., ceil(d / 8)) uint8.

    As `dtype`, by default that of grad.
    """
    dtype = dtype or grad.dtype
    bits = packing.unpack(mask, 1, grad.shape[-1]).bool()
    return _transform(torch.where(bits, grad.float(), 0.0), order, True).to(dtype)


def _normalise(x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x 2^-e, sigma 2^-e, sigma) for float32 x (..., d); zeros in rows without a finite scale."""
    down, up, top = _powers(x)
    x = x * down
    sigma = (x.square().sum(-1, keepdim=True) / width).sqrt() * up
    # Rounding must not push the scale of a row at the end of the range over it.
    sigma = torch.where(top < 0x7F800000, sigma.clamp(max=FLOAT32_MAX), torch.nan)
    # Codes are taken against the stored scale, also where storing rounded it (subnormals).
    inner = sigma * down
    return torch.where(inner > 0, x, 0.0), inner, sigma


@transforms.kept
def table(grid: Grid, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(points, midpoints) of a grid, float32 on `device`; midpoints padded to 2^k - 1 with inf."""
    slots = 2 ** len(grid.midpoints).bit_length() - 1
    mids = [*grid.midpoints, *[float("inf")] * (slots - len(grid.midpoints))]
    return (
        torch.tensor(grid.points, dtype=torch.float32, device=device),
        torch.tensor(mids, dtype=torch.float32, device=device),
    )


def points(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The float32 points of integer codes, for a row of unit scale."""
    if grid.step is None:
        return table(grid, codes.device)[0][codes.int()]
    shift = 0.5 if grid.levels % 2 == 0 else 0.0
    return (codes.float() + shift) * grid.step


def _encode(y: torch.Tensor, sigma: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Nearest codes, a midpoint going up, as int32; sigma (..., 1) is positive."""
    if grid.step is None:
        mids = table(grid, y.device)[1]
        return torch.bucketize(y * sigma.reciprocal(), mids, out_int32=True, right=True)
    t = y * (sigma * grid.step).reciprocal()
    half = grid.levels // 2
    if grid.levels % 2 == 0:
        return t.floor().clamp(-half, half - 1).int()
    return (t + 0.5).floor().clamp(-half, half).int()


def select(y: torch.Tensor, sparsity: NM | Pairwise) -> torch.Tensor:
    """The entries that the pattern keeps, bool (..., d); ties keep the lower index."""
    unit = 2 if isinstance(sparsity, Pairwise) else 1
    shape = (*y.shape[:-1], y.shape[-1] // sparsity.m, sparsity.m // unit, unit)
    groups = y.reshape(shape)
    norm = (groups.square() if unit == 2 else groups.abs()).sum(-1)
    rank = norm.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    keep = rank < sparsity.n // unit
    return keep.unsqueeze(-1).expand_as(groups).flatten(-3)


def _mask(
    y: torch.Tensor,
    point: torch.Tensor,
    keep: torch.Tensor | None,
    sigma: torch.Tensor,
    q: Quantizer,
) -> torch.Tensor:
    """Where the gradient passes; y and sigma in the same units, point in units of sigma."""
    if isinstance(q.estimator, STE):
        return torch.ones(y.shape, dtype=torch.bool, device=y.device)
    inside, pruned, edge = q.thresholds()
    if not edge:
        distance = (point - y * sigma.reciprocal()).abs()  # NaN in rows without a scale, too
        return (distance <= inside) | (sigma == 0)
    bound = inside * sigma
    if keep is not None:
        bound = torch.where(keep, bound, pruned * sigma)
    return y.abs() <= bound


def _round(
    x: torch.Tensor, q: Quantizer
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(codes int32, points, sigma, mask, keep) of x (..., d), which has elements."""
    grid, d = q.require_grid(), x.shape[-1]
    # Sums follow the memory order: the same values in another layout must give the same bits.
    scaled, inner, sigma = _normalise(x.float().contiguous(), d)
    y = _rotate(scaled, q.transform.order(d), False)
    code = _encode(y, torch.where(inner > 0, inner, 1.0), grid)
    point = points(code, grid)
    keep = None
    if q.sparsity is not None:
        keep = select(y, q.sparsity)
        code = torch.where(keep, code, grid.zero_code)
        point = torch.where(keep, point, 0.0)
    return code, point, sigma, _mask(y, point, keep, inner, q), keep


def quantize(
    x: torch.Tensor, q: Quantizer, *, values: bool, codes: bool, packed: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments and results of `quest.kernels.quantize.quantize`, with a `Quantizer` as program."""
    grid = q.require_grid()
    nothing = torch.empty(0, dtype=torch.bool, device=x.device)
    if x.numel() == 0:
        return like(x, q, values=values, codes=codes, packed=packed)
    code, point, sigma, mask, keep = _round(x, q)
    value = (point * sigma).to(x.dtype) if values else nothing.to(x.dtype)
    kept = keep if keep is not None and codes else nothing
    if packed:
        mask = packing.pack(mask, 1)
        kept = packing.pack(kept, 1) if kept is keep else kept.to(torch.uint8)
        stored = packing.pack(code + grid.offset, grid.storage_bits)
    else:
        stored = code.to(q.code_dtype)
    return value, stored if codes else stored.new_empty(0), sigma, mask, kept


def encode(
    x: torch.Tensor, q: Quantizer, kind: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(operand, scale, mask, sums) of `quest.kernels.quantize.encode`."""
    form = operands.form_of(q, kind)
    if x.numel() == 0:
        return encoded_like(x, kind)
    _, point, sigma, mask, _ = _round(x, q)
    integers = (point / form.unit).round().int()
    stored = (integers + form.top) // form.stride
    operand = packing.pack(stored, 1) if kind == "bits" else stored.to(torch.int8)
    sums = integers.sum(-1, keepdim=True, dtype=torch.int32)
    return operand, sigma, packing.pack(mask, 1), sums


def encode_saved(
    x: torch.Tensor, q: Quantizer, kind: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `encode` gives, and the operand in the form of `operands.saved`."""
    made = encode(x, q, kind)
    packs = operands.saved(q, kind).kind in operands.PACKED
    return *made, pack_operand(made[0], q) if packs else made[0]


def encode_gated(
    gate: torch.Tensor, value: torch.Tensor, q: Quantizer, kind: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`encode_saved` of the rows that `gated` makes."""
    return encode_saved(gated(gate, value), q, kind)


def encoded_like(
    x: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs of `encode` by shape and dtype alone: fakes and empty inputs."""
    lead, d = x.shape[:-1], x.shape[-1]
    bits = -(-d // 8)
    return (
        x.new_empty((*lead, bits), dtype=torch.uint8)
        if kind == "bits"
        else x.new_empty((*lead, d), dtype=torch.int8),
        x.new_zeros((*lead, 1), dtype=torch.float32),
        x.new_empty((*lead, bits), dtype=torch.uint8),
        x.new_zeros((*lead, 1), dtype=torch.int32),
    )


def packed_like(operand: torch.Tensor, bits: int) -> torch.Tensor:
    """Output of `pack_operand` by shape and dtype alone."""
    return operand.new_empty(
        (*operand.shape[:-1], -(-operand.shape[-1] * bits // 8)), dtype=torch.uint8
    )


def pack_operand(operand: torch.Tensor, q: Quantizer) -> torch.Tensor:
    """An operand of integers (..., d) int8 in the form that is saved, (..., bytes) uint8."""
    form = operands.saved(q, "integers")
    return packing.pack((operand.int() + form.top) // form.stride, form.bits)


def integers(operand: torch.Tensor, form: operands.Form, width: int) -> torch.Tensor:
    """The integers (..., width) int32 that an operand stands for."""
    stored = operand if form.bits == 8 else packing.unpack(operand, form.bits, width)
    return form.stride * stored.int() - form.top


def gated(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """silu(gate) * value, in float32 and rounded once to the dtype of both."""
    x = torch.nn.functional.silu(gate.float()) * value.float()
    return x.to(gate.dtype).contiguous()


def gated_backward(
    grad: torch.Tensor, gate: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and value for that of the rows of `gated`, of their dtype and shape.

    grad value s (1 + g (1 - s)) for the sigmoid s of the gate g, and grad silu(g): in float32, each
    rounded once.
    """
    single, g = grad.float(), gate.float()
    to_gate = torch.ops.aten.silu_backward(single * value, g)
    to_value = single * torch.nn.functional.silu(g)
    return to_gate.to(gate.dtype), to_value.to(value.dtype)


def normed(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(h, (h / sqrt(mean(h^2) + eps)) weight), the second in float32 and rounded once to h's dtype.

    h: residual + x, or x where there is none.
    """
    h = x if residual is None else residual + x
    # Sums follow the memory order: the same values in another layout must give the same bits.
    single = h.float().contiguous()
    inverse = (single.square().mean(-1, keepdim=True) + eps).rsqrt()
    return h, (single * inverse * weight.float()).to(h.dtype)


def decode(
    operand: torch.Tensor, scale: torch.Tensor, q: Quantizer, kind: str, width: int,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """The values (..., width) of an operand, as `dtype`."""
    form = operands.readable(q, kind)
    # As float32 first: integers times a number have the default dtype, whatever that is.
    return (integers(operand, form, width).float() * form.unit * scale).to(dtype)


def accumulate(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(M, N) int32: a b^T of int8, or the number of bits that rows of uint8 share."""
    if a.dtype == torch.uint8:
        a, b = (packing.unpack(t, 1, 8 * t.shape[-1]) for t in (a, b))
    # float64 holds every sum exactly, in any order.
    return (a.double() @ b.double().t()).int()


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor],
    sums: tuple[torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
    terms: operands.Terms,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(M, N) of `dtype` from operands a (M, bytes), b (N, bytes); scales, sums (M,) and (N,)."""
    p = accumulate(a, b).double()
    if terms.corrected:
        rest = terms.rows * sums[0][:, None].double() + terms.columns * sums[1].double()
        p = 4 * p - rest - terms.length if a.dtype == torch.uint8 else p + (rest - terms.length) / 4
    # In float64: a large row's scale must not overflow before a small column's brings it back.
    y = p * (terms.factor * scales[0][:, None].double()) * scales[1].double()
    return (y if bias is None else y + bias.double()).to(dtype)


def like(
    x: torch.Tensor, q: Quantizer, *, values: bool, codes: bool, packed: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs of `quantize` by shape and dtype alone, uninitialised: fakes and empty inputs."""
    lead, d, grid = x.shape[:-1], x.shape[-1], q.require_grid()
    bits = -(-d // 8) if packed else d
    flag = torch.uint8 if packed else torch.bool
    code_width = -(-d * grid.storage_bits // 8) if packed else d
    return (
        x.new_empty((*lead, d) if values else (0,)),
        x.new_empty(
            (*lead, code_width) if codes else (0,), dtype=torch.uint8 if packed else q.code_dtype
        ),
        # A row of no columns is a row of zeros.
        x.new_zeros((*lead, 1), dtype=torch.float32),
        x.new_empty((*lead, bits), dtype=flag),
        x.new_empty((*lead, bits) if codes and q.sparsity is not None else (0,), dtype=flag),
    )
