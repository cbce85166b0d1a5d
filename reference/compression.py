"""The compressed form of a 2:4 sparse operand: half of the entries, and where they stood.

Of each group of four adjacent entries two are kept: nonzero before zero, the lower index first. So
a group with fewer than two nonzeros keeps its first zeros beside them, and the form is one and no
other. The two stand in the order of their indices, which is what sparse tensor cores ask for.

Metadata. A group has four bits: the lower index, and the higher one times 4. A word of 32 bits
holds eight adjacent groups, the first in its lowest bits. Words are stored in blocks of 256
entries: in a block word 4 h + i holds the groups of entries 64 i + 32 h to 64 i + 32 h + 31. An
instruction on 64 entries takes the words h = 0 and 1 from two threads; each of them finds its four
words of a block side by side. Groups past the row's end, up to a whole block, hold the indices 0
and 1.
Source: PTX ISA, `wgmma.mma_async.sp`, sparsity metadata for 8-bit types.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .arrays import Int64, integers
from .sparsity import keep_nm

BLOCK = 256
"""Entries of a row that eight words of metadata stand for."""


def compress(operand: npt.ArrayLike) -> tuple[Int64, Int64]:
    """(values, metadata) of int8 integers (rows, d) with two nonzeros at the most in each group.

    values: (rows, d / 2). metadata: (rows, 8 ceil(d / 256)), words of 32 bits without sign. Both
    int64. Raises ValueError for a width that is not a multiple of 4 and for a third nonzero in a
    group, and what `arrays.integers` raises.
    """
    x = integers("operand", operand, -128, 127)
    if x.ndim != 2 or x.shape[1] % 4:
        raise ValueError(f"operand has shape {x.shape}; (rows, a multiple of 4) is allowed")
    rows, d = x.shape
    keep = keep_nm((x != 0).astype(np.int64), 2, 4)
    if (x[~keep] != 0).any():
        raise ValueError("operand has a group of four with more than two nonzeros")
    values = x[keep].reshape(rows, d // 2)
    blocks = -(-d // BLOCK)
    words = np.zeros((rows, 8 * blocks), dtype=np.int64)
    for row in range(rows):
        for group in range(blocks * BLOCK // 4):
            places = [0, 1]
            if 4 * group < d:
                places = np.flatnonzero(keep[row, 4 * group : 4 * group + 4]).tolist()
            words[row, _word(4 * group)] |= (places[0] + 4 * places[1]) << (4 * (group % 8))
    return values, words


def _word(entry: int) -> int:
    """The word of a row's metadata that holds an entry's group."""
    block, inside = divmod(entry, BLOCK)
    i, rest = divmod(inside, 64)
    return 8 * block + 4 * (rest // 32) + i


def decompress(values: npt.ArrayLike, metadata: npt.ArrayLike) -> Int64:
    """The operand (rows, d) of values (rows, d / 2) and metadata, as `compress` makes them.

    Raises ValueError where their shapes don't belong together.
    """
    kept = integers("values", values, -128, 127)
    words = integers("metadata", metadata, 0, 2**32 - 1)
    rows, d = kept.shape[0], 2 * kept.shape[-1]
    if kept.ndim != 2 or d % 4 or words.shape != (rows, 8 * -(-d // BLOCK)):
        raise ValueError(
            f"values have shape {kept.shape} and metadata {words.shape}; (rows, d / 2) and"
            f" (rows, 8 ceil(d / {BLOCK})) are allowed"
        )
    operand = np.zeros((rows, d), dtype=np.int64)
    for row in range(rows):
        for group in range(d // 4):
            bits = words[row, _word(4 * group)] >> (4 * (group % 8))
            operand[row, 4 * group + (bits & 3)] = kept[row, 2 * group]
            operand[row, 4 * group + (bits >> 2 & 3)] = kept[row, 2 * group + 1]
    return operand
