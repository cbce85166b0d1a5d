"""Codes as bytes: 8 / bits elements a byte, the first in the lowest bits.

Element i of a row stands in byte i // (8 / bits) at bit offset (i % (8 / bits)) * bits. Each row
starts a new byte, and the unused bits of its last byte are 0. A mask is packed the same at 1 bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .arrays import Bool, Int64, Uint8, integers
from .grids import Grid
from .quantize import code_range


def _per_byte(bits: int) -> int:
    if bits not in (1, 2, 4, 8):
        raise ValueError(f"bits is {bits!r}; 1, 2, 4 and 8 are allowed")
    return 8 // bits


def storage_bits(levels: int) -> int:
    """The smallest of 1, 2, 4 and 8 bits that holds `levels` codes.

    Raises ValueError for levels outside 2 to 256.
    """
    if not 2 <= levels <= 256:
        raise ValueError(f"levels is {levels}; 2 to 256 is allowed")
    return next(bits for bits in (1, 2, 4, 8) if 2**bits >= levels)


def to_unsigned(codes: npt.ArrayLike, grid: Grid) -> Uint8:
    """Codes of any shape as level indices 0 to L - 1, uint8; raises as `quantize.decode` does."""
    low, high = code_range(grid)
    return (integers("codes", codes, low, high) - low).astype(np.uint8)


def from_unsigned(unsigned: npt.ArrayLike, grid: Grid) -> Int64:
    """The inverse of `to_unsigned`: int64. Raises ValueError for an index above L - 1."""
    low, _ = code_range(grid)
    return integers("unsigned", unsigned, 0, grid.levels - 1) + low


def pack(unsigned: npt.ArrayLike, bits: int) -> Uint8:
    """Pack integers in [0, 2^bits), (..., d), into uint8 (..., ceil(d bits / 8)).

    Raises ValueError for other bits, a value out of range or no last axis, TypeError for floats.
    """
    per_byte = _per_byte(bits)
    elements = integers("unsigned", unsigned, 0, 2**bits - 1).astype(np.uint8)
    if elements.ndim == 0:
        raise ValueError("unsigned is a scalar; an array with at least one axis is allowed")
    width = elements.shape[-1]
    packed = np.zeros((*elements.shape[:-1], -(-width // per_byte)), dtype=np.uint8)
    for i in range(width):
        packed[..., i // per_byte] |= elements[..., i] << (i % per_byte * bits)
    return packed


def unpack(packed: npt.ArrayLike, bits: int, width: int) -> Uint8:
    """The inverse of `pack`: uint8 (..., ceil(width bits / 8)) to uint8 (..., width).

    Raises ValueError for other bits or another number of bytes.
    """
    per_byte = _per_byte(bits)
    packed = integers("packed", packed, 0, 255).astype(np.uint8)
    expected = -(-width // per_byte)
    if packed.ndim == 0 or packed.shape[-1] != expected:
        raise ValueError(
            f"packed has shape {packed.shape}; (..., {expected}) is allowed"
            f" for width {width} at {bits} bits"
        )
    elements = np.zeros((*packed.shape[:-1], width), dtype=np.uint8)
    for i in range(width):
        elements[..., i] = packed[..., i // per_byte] >> (i % per_byte * bits) & (2**bits - 1)
    return elements


def pack_mask(mask: npt.ArrayLike) -> Uint8:
    """Pack bool (..., d) into uint8 (..., ceil(d / 8)). Raises TypeError for another dtype."""
    mask = np.asarray(mask)
    if mask.dtype != np.bool_:
        raise TypeError(f"mask has dtype {mask.dtype}; bool is allowed")
    return pack(mask.astype(np.uint8), 1)


def unpack_mask(packed: npt.ArrayLike, width: int) -> Bool:
    """The inverse of `pack_mask`: bool (..., width). Raises ValueError as `unpack` does."""
    return unpack(packed, 1, width).astype(np.bool_)
