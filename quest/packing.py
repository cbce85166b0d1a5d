"""Low-bit integers in bytes, little-endian within a byte, each row padded with zero bits.

Element i of a row lies at bit (i % per) * bits of byte i // per, per = 8 / bits.
"""

from __future__ import annotations

import torch


def _check(bits: int) -> None:
    if bits not in (1, 2, 4, 8):
        raise ValueError(f"bits must be 1, 2, 4 or 8, got {bits!r}")


def pack(unsigned: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., d) integers or bool in [0, 2**bits) to (..., ceil(d bits / 8)) uint8."""
    _check(bits)
    if unsigned.is_floating_point() or unsigned.is_complex():
        raise TypeError(f"unsigned must hold integers, got {unsigned.dtype}")
    per = 8 // bits
    u = torch.nn.functional.pad(unsigned.to(torch.uint8), (0, -unsigned.shape[-1] % per))
    u = u.reshape(*u.shape[:-1], u.shape[-1] // per, per)
    out: torch.Tensor = u[..., 0].clone()
    for i in range(1, per):
        out |= u[..., i] << (i * bits)
    return out


def unpack(packed: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """(..., ceil(width bits / 8)) uint8 to (..., width) uint8 in [0, 2**bits)."""
    _check(bits)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed must be uint8, got {packed.dtype}")
    if packed.shape[-1] != -(-width * bits // 8):
        raise ValueError(
            f"packed has {packed.shape[-1]} bytes a row; width {width} at {bits} bits takes "
            f"{-(-width * bits // 8)}"
        )
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    u: torch.Tensor = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return u.flatten(-2)[..., :width]
